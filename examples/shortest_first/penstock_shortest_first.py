"""A scheduling policy as a plugin: the least prompt left to compute goes first; a minute of waiting outweighs any length.

Install it beside Penstock (`pip install ./examples/shortest_first`) and start with `--scheduling-policy shortest-first`.
What it does not know: the scheduler. It gets columns and gives sort keys, once a plan.
"""

from __future__ import annotations

import numpy as np

from penstock.core.contract.hookspecs import SchedulePolicySpec, hookimpl
from penstock.core.contract.policy import Running, Waiting
from penstock.core.protocol.columns import F32, I64


class ShortestFirst:
    name = "shortest-first"

    def order(self, waiting: Waiting) -> F32:
        left = (waiting.prompt_tokens - waiting.cached_tokens).astype(np.float32)
        return np.where(waiting.waited_s > 60, -waiting.waited_s, left).astype(np.float32)

    def victims(self, running: Running) -> I64:
        return running.arrival_ns


@hookimpl
def register_schedule_policies() -> list[SchedulePolicySpec]:
    return [SchedulePolicySpec(name="shortest-first", api_level=1, factory=ShortestFirst, doc="least prompt left first")]
