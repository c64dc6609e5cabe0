"""What a scheduling policy is.

What it is: the Protocol that `--scheduling-policy` plugins implement: columns in, key columns out, called once a plan and never per
request. Rows with smaller keys go first; victims with larger keys are preempted first. `CheckedPolicy` stands between a policy and the
scheduler, so that a policy's mistake is known as such; `probe` finds most of them before the first request.
What it does not know: the scheduler's state, KV, messages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import msgspec
import numpy as np

from penstock.core.protocol.columns import F32, I32, I64, Column, f32, i32, i64


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


class CheckedPolicy:
    """`policy`, with every exception and every answer that is no column of one number a row raised as what `blame(method, what)` makes of it."""

    def __init__(self, policy: SchedulePolicy, blame: Callable[[str, Exception | str], Exception]) -> None:
        self.name = policy.name if hasattr(policy, "name") else type(policy).__name__
        self._policy = policy
        self._blame = blame

    def order(self, waiting: Waiting) -> Any:
        try:
            keys = self._policy.order(waiting)
        except Exception as error:
            raise self._blame("order", error) from error
        return self._keys("order", keys, waiting.arrival_ns.size)

    def victims(self, running: Running) -> Any:
        try:
            keys = self._policy.victims(running)
        except Exception as error:
            raise self._blame("victims", error) from error
        return self._keys("victims", keys, running.arrival_ns.size)

    def _keys(self, method: str, keys: Any, rows: int) -> Column:
        if not isinstance(keys, np.ndarray):
            raise self._blame(method, f"must return a numpy array of {rows} keys for {rows} rows, not {type(keys).__name__}")
        if keys.shape != (rows,):
            raise self._blame(method, f"must return an array of shape ({rows},) for {rows} rows, not {keys.shape}")
        if keys.dtype.kind not in "iuf":
            raise self._blame(method, f"must return an array of numbers (int64, int32 or float32), not of {keys.dtype}")
        return keys


def probe(policy: SchedulePolicy) -> None:
    """Ask for keys of one row and of four made-up rows; raises what the policy raises."""
    for rows in (1, 4):
        step = np.arange(rows)
        policy.order(
            Waiting(
                arrival_ns=i64(10**15 + step * 10**9),
                priority=i32(step % 3),
                waited_s=f32(90.0 - 30.0 * step),
                prompt_tokens=i32(16 + 100 * step),
                cached_tokens=i32(16 * (step % 2)),
            )
        )
        policy.victims(
            Running(
                arrival_ns=i64(10**15 + step * 10**9),
                priority=i32(step % 3),
                computed_tokens=i32(16 + 100 * step),
                output_tokens=i32(step),
                blocks=i32(1 + 6 * step),
            )
        )
