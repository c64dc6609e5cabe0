"""What a scheduling policy is.

What it is: the Protocol that `--scheduling-policy` plugins implement: columns in, key columns out, called once a plan and never per
request. Rows with smaller keys go first; victims with larger keys are preempted first. `CheckedPolicy` stands between a policy and the
scheduler, so that a policy's mistake is known as such; `probe` finds most of them before the first request.
What it does not know: the scheduler's state, KV, messages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import msgspec
import numpy as np

from penstock.core.protocol.columns import F32, I32, I64, Column, f32, i32, i64
from penstock.core.protocol.errors import tamed

R = TypeVar("R", bound=msgspec.Struct)


class Waiting(msgspec.Struct, frozen=True, kw_only=True):
    """Columns over waiting sequences, one row each, in no order that means anything. They are not to be written to."""

    arrival_ns: Column
    """I64, on a clock that only grows (CLOCK_MONOTONIC): smaller came earlier."""
    priority: Column
    """I32, the request's `priority`: lower goes first, 0 when nobody says."""
    waited_s: Column
    """F32, seconds since its arrival."""
    prompt_tokens: Column
    """I32, tokens to be there before the first (next) one can be drawn: the prompt, and after a preemption what was drawn already."""
    cached_tokens: Column
    """I32, how many of them the prefix cache held when it was last asked; 0 before."""


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """Columns over running sequences that may be preempted, one row each. They are not to be written to."""

    arrival_ns: Column
    """I64, as in Waiting."""
    priority: Column
    """I32, as in Waiting."""
    computed_tokens: Column
    """I32, tokens whose KV is there: they would be computed again."""
    output_tokens: Column
    """I32, tokens drawn so far."""
    blocks: Column
    """I32, KV blocks that it holds (shared ones too)."""


class SchedulePolicy(Protocol):
    """Both methods get columns and give one key a row: a 1-D numpy array of the same length, of integers or floats, without NaN. They run in
    the engine's step loop, on its one thread: vectorised numpy, no waiting. An exception or an answer of another form ends the engine with
    a message that names the plugin (which is why they are tried before the first request)."""

    name: str
    """As its spec's."""

    def order(self, waiting: Waiting) -> I64 | I32 | F32:
        """Who goes first: **the smallest key**; ties fall to the earlier arrival, then to the sequence's id. Asked at most once a plan, when
        more than one waits."""
        ...

    def victims(self, running: Running) -> I64 | I32 | F32:
        """Who is preempted first when KV memory runs out: **the largest key**; ties fall to the latest arrival. The one with the smallest key goes on
        in any case."""
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
        except BaseException as error:
            raise self._blame("order", tamed(error)) from error
        return self._keys("order", keys, waiting.arrival_ns.size)

    def victims(self, running: Running) -> Any:
        try:
            keys = self._policy.victims(running)
        except BaseException as error:
            raise self._blame("victims", tamed(error)) from error
        return self._keys("victims", keys, running.arrival_ns.size)

    def _keys(self, method: str, keys: Any, rows: int) -> Column:
        if not isinstance(keys, np.ndarray):
            raise self._blame(method, f"must return a numpy array of {rows} keys for {rows} rows, not {type(keys).__name__}")
        if keys.shape != (rows,):
            raise self._blame(method, f"must return an array of shape ({rows},) for {rows} rows, not {keys.shape}")
        if keys.dtype.kind not in "iuf":
            raise self._blame(method, f"must return an array of numbers (integers or floats), not of {keys.dtype}")
        if keys.dtype.kind == "f" and np.isnan(keys).any():
            raise self._blame(method, f"must return keys that can be compared, and there is a NaN among its {rows}")
        return keys


def probe(policy: SchedulePolicy) -> None:
    """Ask for keys of one row and of four made-up rows, whose columns cannot be written to; raises what the policy raises."""
    for rows in (1, 4):
        step = np.arange(rows)
        waiting = _locked(
            Waiting(
                arrival_ns=i64(10**15 + step * 10**9),
                priority=i32(step % 3),
                waited_s=f32(90.0 - 30.0 * step),
                prompt_tokens=i32(16 + 100 * step),
                cached_tokens=i32(16 * (step % 2)),
            )
        )
        running = _locked(
            Running(
                arrival_ns=i64(10**15 + step * 10**9),
                priority=i32(step % 3),
                computed_tokens=i32(16 + 100 * step),
                output_tokens=i32(step),
                blocks=i32(1 + 6 * step),
            )
        )
        policy.order(waiting)
        policy.victims(running)


def _locked(rows: R) -> R:
    for name in rows.__struct_fields__:
        getattr(rows, name).setflags(write=False)
    return rows
