"""Slot kernels: inputs of a step from the slots' state, tokens fed back, places and block tables."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from penstock.kernels.slots import reference, triton

SLOTS, LENGTH, WIDTH, SIZE = 5, 100, 7, 16


def state(device: str) -> tuple[Tensor, Tensor]:
    table = torch.arange(SLOTS * WIDTH).view(SLOTS, WIDTH)[:, torch.randperm(WIDTH)].int()
    table[3, 4:] = -1
    return torch.randint(1, 999, (SLOTS, LENGTH)).int().to(device), table.to(device)


def fresh(tokens: int, rows: int, device: str) -> dict[str, Tensor]:
    sizes = {"tokens": tokens, "positions": tokens, "cache_slots": tokens, "kv_len": rows}
    return {name: torch.full((size,), -77, dtype=torch.int32, device=device) for name, size in sizes.items()}


def i32(device: str, *values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def same(got: dict[str, Tensor], want: tuple[Tensor, ...]) -> None:
    for (name, value), truth in zip(got.items(), want, strict=True):
        assert torch.equal(value.cpu(), truth), name


def test_decode_inputs(device: str) -> None:
    history, table = state(device)
    slots, starts = i32(device, 4, 0, -1, 3, 3), i32(device, 99, 0, 50, 63, 64)
    got = fresh(5, 5, device)
    triton.decode_inputs(slots, starts, history, table, SIZE, **got)
    want = reference.ragged_inputs(slots, starts, torch.arange(6), history.cpu(), table.cpu(), SIZE, 5)
    same(got, want)
    assert got["cache_slots"].tolist()[2] == -1
    assert got["cache_slots"].tolist()[4] == -1  # a block that was never given
    triton.advance(slots, starts)
    assert starts.tolist() == [100, 1, 50, 64, 65]


def test_find_ends(device: str) -> None:
    """Places below 0 count from the ends of histories; others, and padding, stay."""
    lens = i32(device, 10, 20, 30, 40, 50)
    slots = torch.arange(300).remainder(6).sub(1).int().to(device)
    places = torch.arange(300).mul(7).remainder(13).sub(8).int().to(device)
    want = places.cpu()
    reference.find_ends(slots.cpu(), want, lens.cpu())
    assert want[1:4].tolist() == [9, 25, 0]  # the last token of 10, the sixth one behind 20, and a place that counts from the beginning
    triton.find_ends(slots, places, lens)
    assert torch.equal(places.cpu(), want)


@pytest.mark.parametrize("counts", [[1, 1, 40, 3], [5], [0, 7, 0, 0, 90], [2] * 5])
def test_ragged_inputs(counts: list[int], device: str) -> None:
    history, table = state(device)
    table[3] = table[2] + 100
    rows = len(counts)
    slots, starts = torch.randperm(SLOTS)[:rows].int().to(device), torch.randint(0, 10, (rows,)).int().to(device)
    if rows > 3:
        slots[2] = -1
    q_start = torch.tensor([0, *counts]).cumsum(0).int().to(device)
    tokens = int(q_start[-1]) + 150
    got = fresh(tokens, rows, device)
    triton.ragged_inputs(slots, starts, q_start, history, table, SIZE, **got)
    same(got, reference.ragged_inputs(slots.cpu(), starts.cpu(), q_start.cpu(), history.cpu(), table.cpu(), SIZE, tokens))


def test_step_feeds_the_next(device: str) -> None:
    """Places and blocks in, a token written, read by the next step, all without the host."""
    history, table = state(device)
    others = history[[0, 1, 3]].clone()
    triton.place(history, table, i32(device, 2, 4), i32(device, 3, 60), i32(device, 60, 0), torch.arange(100, 163).int().to(device))
    assert history[2, :3].tolist() == [160, 161, 162]
    assert history[4, :60].tolist() == list(range(100, 160))
    assert (table[[2, 4]] == -1).all()
    assert torch.equal(history[[0, 1, 3]], others)
    triton.set_blocks(table, i32(device, 2, 4, -1, 4), i32(device, 0, 3, 0, 0), i32(device, 33, 8, 5, 9))
    assert table[4].tolist() == [9, -1, -1, 8, -1, -1, -1]
    slots, starts = i32(device, 2, -1, 4), i32(device, 2, 0, 59)
    got = fresh(3, 3, device)
    for step, drawn in enumerate(([7, 1, 8], [-1, 1, 9])):
        triton.decode_inputs(slots, starts, history, table, SIZE, **got)
        assert got["tokens"].tolist() == [[162, 0, 159], [7, 0, 8]][step]
        assert got["cache_slots"].tolist() == [33 * 16 + 2 + step, -1, 8 * 16 + 11 + step]
        triton.advance(slots, starts)
        triton.write_tokens(slots, starts, i32(device, *drawn), history)
    assert history[2, :5].tolist()[:5] == [160, 161, 162, 7, 0]
    assert history[4, 60:62].tolist() == [8, 9]
    before = history.clone()
    triton.write_tokens(i32(device, 0), i32(device, LENGTH), i32(device, 5), history)
    assert torch.equal(history, before)
