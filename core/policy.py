"""What a scheduling policy is.

What it is: the Protocol that `--scheduling-policy` plugins implement: columns in, key columns out, called once a plan and never per
request. Rows with smaller keys go first; victims with larger keys are preempted first.
What it does not know: the scheduler's state, KV, messages.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from penstock.core.columns import F32, I32, I64, Column


class Waiting(msgspec.Struct, frozen=True, kw_only=True):
    """Columns over waiting sequences. arrival_ns I64; priority I32 (lower = earlier); waited_s F32; prompt_tokens, cached_tokens I32."""

    arrival_ns: Column
    priority: Column
    waited_s: Column
    prompt_tokens: Column
    cached_tokens: Column


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """Columns over running sequences that may be preempted. computed_tokens I32 would be computed again; blocks I32 would be freed."""

    arrival_ns: Column
    priority: Column
    computed_tokens: Column
    output_tokens: Column
    blocks: Column


class SchedulePolicy(Protocol):
    name: str

    def order(self, waiting: Waiting) -> I64 | I32 | F32:
        """Sort keys, ascending; ties fall to arrival, then to sequence id."""
        ...

    def victims(self, running: Running) -> I64 | I32 | F32:
        """Sort keys, descending: the largest is preempted first; ties fall to the latest arrival."""
        ...
