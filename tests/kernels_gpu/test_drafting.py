"""Drafts: the Triton kernels against the torch reference, and that against plain Python."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from penstock.kernels.drafting import reference, triton

VOCAB, LENGTH, SLOTS = 50, 60, 7


def i32(device: str, values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def by_hand(history: list[list[int]], slots: list[int], positions: list[int], draws: list[list[int]]) -> tuple[list[int], list[int]]:
    counts, kept = [], []
    for slot, position, drawn in zip(slots, positions, draws, strict=True):
        count = 0
        for j, token in enumerate(drawn):
            if token < 0 and j:
                break
            count = j + 1
            if j + 1 == len(drawn) or history[slot][position + j] != token:
                break
        counts.append(count)
        kept += [token if j < count else -1 for j, token in enumerate(drawn)]
        history[slot][position + count - 1] = max(drawn[count - 1], 0)
    return counts, kept


def test_verify(device: str) -> None:
    rng = random.Random(3)
    for _ in range(12):
        history = [[rng.randrange(2) for _ in range(LENGTH)] for _ in range(SLOTS)]
        rows = rng.randint(1, SLOTS)
        slots, positions = rng.sample(range(SLOTS), rows), [rng.randint(1, LENGTH - 7) for _ in range(rows)]
        draws = [[rng.choice([0, 1, 1, 0, -1 if rng.random() < 0.2 else 1]) for _ in range(rng.randint(1, 6))] for _ in range(rows)]
        bounds = [0]
        for drawn in draws:
            bounds.append(bounds[-1] + len(drawn))
        columns = [token for drawn in draws for token in drawn], slots, positions, bounds
        tables = [torch.tensor(history, dtype=torch.int32, device=device) for _ in range(2)]
        counts, kept = by_hand(history, slots, positions, draws)
        for table, found in (
            (tables[0], reference.verify(*(i32(device, column) for column in columns), tables[0])),
            (tables[1], triton.verify(*(i32(device, column) for column in columns), tables[1], 6)),
        ):
            assert (found[0].tolist(), found[1].tolist()) == (counts, kept)
            assert table.tolist() == history


def test_put_drafts(device: str) -> None:
    drafts = [[3, 4, 5], [3, VOCAB, 5], [-1, 4, 5], [7, 8, 9], [1, 2, 3]]
    slots, ends = [0, 1, 2, 3, -1], [10, 20, 30, LENGTH - 2, 5]
    wanted = [[3, 4, 5], [3, -1, -1], [-1, -1, -1], [7, 8, -1], [1, 2, 3]]
    for put in (reference.put_drafts, triton.put_drafts):
        history = torch.zeros(SLOTS, LENGTH, dtype=torch.int32, device=device)
        given = torch.tensor(drafts, dtype=torch.int32, device=device)
        put(given, i32(device, slots), i32(device, ends), history, VOCAB)
        assert given.tolist() == wanted
        truth = torch.zeros(SLOTS, LENGTH, dtype=torch.int32)
        for slot, end, row in zip(slots[:4], ends, wanted, strict=False):
            for k, token in enumerate(row):
                if token >= 0:
                    truth[slot, end + k] = token
        assert torch.equal(history.cpu(), truth)


def looked_up(tokens: list[int], shortest: int, longest: int, count: int) -> list[int]:
    """The definition, slowly."""
    for size in range(min(longest, len(tokens) - 1), shortest - 1, -1):
        for start in range(len(tokens) - size - 1, -1, -1):
            if tokens[start : start + size] == tokens[-size:]:
                said = list(tokens)
                for k in range(count):
                    said.append(said[start + size + k])
                return said[len(tokens) :]
    return [-1] * count


@pytest.mark.parametrize(("shortest", "longest", "count"), [(1, 3, 4), (2, 2, 1), (3, 5, 7)])
def test_ngrams(shortest: int, longest: int, count: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "LOOK", 16)  # several blocks
    rng = random.Random(longest)
    history = torch.tensor([[rng.randrange(3) for _ in range(LENGTH)] for _ in range(SLOTS)], dtype=torch.int32, device=device)
    history[4] = torch.arange(LENGTH)
    slots, ends = [0, 5, -1, 3, 2, 4, 6], [LENGTH, 40, 30, 2, 1, 50, 17]
    wanted = [
        [-1] * count if slot < 0 else looked_up(history[slot, :end].tolist(), shortest, longest, count)
        for slot, end in zip(slots, ends, strict=True)
    ]
    for look in (reference.ngrams, triton.ngrams):
        out = torch.full((len(slots), count), 9, dtype=torch.int32, device=device)
        look(i32(device, slots), i32(device, ends), history, shortest, longest, out)
        assert out.tolist() == wanted
