"""Priorities with ageing.

What it is: lower numbers go first (as in vLLM); every `priority_ageing_s` seconds of waiting are worth one level, so that a low priority
is late but never starved. Victims are of the lowest priority first, among equals the latest arrival.
What it does not know: the scheduler, where priorities come from.
"""

from __future__ import annotations

import numpy as np

from penstock.core.contract.policy import Running, Waiting
from penstock.core.protocol.columns import F32, I32


class PriorityWithAgeing:
    """`priority_ageing_s` 0: no ageing (a low priority may then starve)."""

    name = "priority"

    def __init__(self, priority_ageing_s: float = 30.0) -> None:
        if not np.isfinite(priority_ageing_s) or priority_ageing_s < 0:
            raise ValueError("priority_ageing_s must be 0 or more seconds")
        self.ageing_s = priority_ageing_s

    def order(self, waiting: Waiting) -> F32:
        keys: F32 = waiting.priority.astype(np.float32)
        if self.ageing_s:
            keys -= waiting.waited_s.astype(np.float32) / np.float32(self.ageing_s)
        return keys

    def victims(self, running: Running) -> I32:
        priority: I32 = running.priority
        return priority
