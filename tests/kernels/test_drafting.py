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
