"""First come, first served.

What it is: the default scheduling policy: arrival decides, and who came last is preempted first (it has the least to lose, and the oldest
always finishes).
What it does not know: priorities, the scheduler.
"""

from __future__ import annotations

from penstock.core.contract.policy import Running, Waiting
from penstock.core.protocol.columns import I64


class FirstComeFirstServed:
    name = "fcfs"

    def order(self, waiting: Waiting) -> I64:
        arrival: I64 = waiting.arrival_ns
        return arrival

    def victims(self, running: Running) -> I64:
        arrival: I64 = running.arrival_ns
        return arrival
