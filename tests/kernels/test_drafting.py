"""Prompt lookup in C against the torch reference."""

from __future__ import annotations

import pytest
import torch

from penstock.kernels import native
from penstock.kernels.drafting import api, reference


@pytest.mark.parametrize(("shortest", "longest", "count"), [(1, 1, 3), (1, 3, 4), (2, 5, 1), (4, 4, 9)])
def test_equals_the_reference(shortest: int, longest: int, count: int) -> None:
    if native.library() is None:
        pytest.skip("no C kernels here")
    generator = torch.Generator().manual_seed(longest)
    history = torch.randint(0, 3, (9, 300), dtype=torch.int32, generator=generator)
    history[7] = torch.arange(300)
    slots = torch.tensor([8, 0, -1, 3, 7, 4, 5], dtype=torch.int32)
    for _ in range(20):
        ends = torch.randint(0, 301, slots.shape, dtype=torch.int32, generator=generator)
        found, wanted = (torch.full((len(slots), count), 77, dtype=torch.int32) for _ in range(2))
        api.ngrams(slots, ends, history, shortest, longest, found)
        reference.ngrams(slots, ends, history, shortest, longest, wanted)
        assert torch.equal(found, wanted)


def test_what_lies_outside_is_refused() -> None:
    history, one = torch.zeros(2, 10, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    out = torch.zeros(1, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match="shortest"):
        api.ngrams(one, one, history, 3, 2, out)
    if native.library() is not None:
        for slots, ends in ((one + 2, one), (one, one + 11)):
            with pytest.raises(IndexError, match="outside the history"):
                api.ngrams(slots, ends, history, 1, 2, out)


def test_checking_and_putting_equal_the_reference() -> None:
    if native.library() is None:
        pytest.skip("no C kernels here")
    generator = torch.Generator().manual_seed(5)
    for _ in range(30):
        rows = int(torch.randint(1, 7, (1,), generator=generator))
        widths = torch.randint(1, 6, (rows,), generator=generator)
        bounds = torch.cat([torch.zeros(1), widths.cumsum(0)]).int()
        history = torch.randint(0, 2, (8, 30), dtype=torch.int32, generator=generator)
        slots = torch.randperm(8, generator=generator)[:rows].int()
        positions = torch.randint(1, 25, (rows,), dtype=torch.int32, generator=generator)
        tokens = (
            torch.randint(-1, 2, (int(bounds[-1]),), dtype=torch.int32, generator=generator).abs()
            - (torch.rand(int(bounds[-1]), generator=generator) < 0.1).int() * 2
        )
        one, other = history.clone(), history.clone()
        found, wanted = api.verify(tokens, slots, positions, bounds, one), reference.verify(tokens, slots, positions, bounds, other)
        assert [part.tolist() for part in found] == [part.tolist() for part in wanted]
        drafts = torch.randint(-1, 12, (rows, 4), dtype=torch.int32, generator=generator)
        again = drafts.clone()
        api.put_drafts(drafts, slots, positions + 4, one, 10)
        reference.put_drafts(again, slots, positions + 4, other, 10)
        assert torch.equal(drafts, again)
        assert torch.equal(one, other)
