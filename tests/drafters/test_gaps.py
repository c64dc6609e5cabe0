"""What a drafter's layer has not read: any order of steps that are read and steps that pass, against a plain account of each position."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from penstock.core.protocol.columns import i32
from penstock.core.protocol.messages import Forward
from penstock.plugins.drafters.gaps import Gaps

SLOTS, WIDTH = 4, 3


def step(slots: list[int], starts: list[int], counts: list[int]) -> Forward:
    return Forward(engine=0, epoch=0, step=1, slots=i32(slots), starts=i32(starts), counts=i32(counts), num_decode=len(slots))


def states_of(work: Forward, dtype: torch.dtype) -> torch.Tensor:
    """A position's own: (slot, position, 1)."""
    rows = [
        (slot, position, 1)
        for slot, start, count in zip(work.slots.tolist(), work.starts.tolist(), work.counts.tolist(), strict=True)
        for position in range(start, start + count)
    ]
    return torch.tensor(rows).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 4, 128])
def test_what_passed_is_missing_until_it_was_read(dtype: torch.dtype, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.plugins.drafters.gaps.LONGEST", length)
    rng = np.random.default_rng(5)
    gaps = Gaps(SLOTS, WIDTH, dtype)
    at, read = {}, {}
    for _ in range(400):
        fresh = [slot for slot in range(SLOTS) if slot not in at or rng.random() < 0.03]
        for slot in fresh:
            at[slot] = read[slot] = int(rng.integers(0, 9))
        if fresh:
            gaps.enter(i32(fresh))
        slots = rng.permutation(SLOTS)[: int(rng.integers(1, SLOTS + 1))].tolist()
        counts = [int(count) for count in rng.integers(1, 4, len(slots))] if rng.random() < 0.3 else [1] * len(slots)
        work = step(slots, [at[slot] for slot in slots], counts)
        gaps.begin(work)
        kept = [int(rng.integers(1, count + 1)) for count in counts]  # of drafts some may be wrong
        if rng.random() < 0.6:
            gaps.keep(work, len(slots), states_of(work, dtype))
        else:
            missing = gaps.missing(work)
            found = {} if missing is None else dict(zip(missing.slots.tolist(), range(SLOTS), strict=False))
            first = 0
            for slot in slots:
                lacking = min(at[slot] - read[slot], length)
                assert (slot in found) == (lacking > 0)
                if lacking:
                    assert missing is not None
                    assert (int(missing.starts[found[slot]]), int(missing.counts[found[slot]])) == (at[slot] - lacking, lacking)
                    wanted = [(slot, position, 1) for position in range(at[slot] - lacking, at[slot])]
                    assert missing.states[first : first + lacking].tolist() == [list(map(float, row)) for row in wanted]
                    first += lacking
            gaps.read(work.slots, work.starts + work.counts)
            gaps.read(work.slots, work.starts + i32(kept))
            read |= {slot: at[slot] + more for slot, more in zip(slots, kept, strict=True)}
        at |= {slot: at[slot] + more for slot, more in zip(slots, kept, strict=True)}
        if rng.random() < 0.02:
            for slot in range(SLOTS):
                assert read[slot] <= at[slot]


def test_states_wait_for_others_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.plugins.drafters.gaps.WAITING", 5)
    gaps = Gaps(SLOTS, WIDTH, torch.float32)
    gaps.enter(i32([2]))
    gaps.begin(step([2], [0], [1]))
    held = []
    for position in range(23):
        work = step([2], [position], [1])
        gaps.keep(work, 1, states_of(work, torch.float32))
        held.append(len(gaps._waiting))
    assert max(held) < 5
    missing = gaps.missing(step([2], [23], [1]))
    assert missing is not None
    assert missing.states.tolist() == [[2.0, float(position), 1.0] for position in range(23)]


def test_rings_are_bounded() -> None:
    gaps = Gaps(16, 1 << 10, torch.bfloat16, bytes_=20 << 15)
    assert gaps.length == 4
    assert gaps.nbytes == 20 << 15
    assert Gaps(2, 8, torch.bfloat16, bytes_=1).length == 1
