"""What tests of drafts share: what was drafted behind each history, what is right behind each, and launches that may not wait for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from penstock.core.protocol.columns import i32
from penstock.plugins.devices.driver import Job


def truth_of(jobs: Sequence[Job]) -> dict[bytes, int]:
    """History, as int32 in bytes -> the token that came behind it."""
    found = {}
    for job in jobs:
        history = [*job.prompt.tolist(), *job.tokens]
        for end in range(len(job.prompt), len(history)):
            found[i32(history[:end]).tobytes()] = history[end]
    return found


@contextmanager
def heard(runner: Any, tell: Callable[[tuple[int, ...], int], None] | None = None) -> Iterator[dict[tuple[int, ...], list[int]]]:
    """Inside, of a runner on host memory: history -> what was drafted behind it. `tell` hears of each such history and its slot at that moment."""
    found: dict[tuple[int, ...], list[int]] = {}
    sample = runner.sample

    def listening(work: Any) -> Any:
        done = sample(work)()
        for row, (slot, position) in enumerate(zip(work.slots.tolist(), work.positions.tolist(), strict=True)):
            count = int(done.counts[row]) if len(done.counts) else 1
            if work.drafts:
                drafts = done.drafts[row * work.drafts : (row + 1) * work.drafts].tolist()
                history = tuple(runner.history[slot, : position + count].tolist())
                found[history] = drafts
                if tell is not None:
                    tell(history, slot)
        return lambda: done

    runner.sample = listening
    try:
        yield found
    finally:
        del runner.sample


@contextmanager
def launching(runner: Any) -> Iterator[None]:
    """Inside, every call that waits for the device raises while a step is launched; results are waited for in peace. All must be compiled by then."""
    for name in ("forward", "sample"):
        call = getattr(runner, name)

        def guarded(work: Any, call: Any = call) -> Any:
            torch.cuda.set_sync_debug_mode("error")
            try:
                return call(work)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        setattr(runner, name, guarded)
    try:
        yield
    finally:
        del runner.forward, runner.sample
