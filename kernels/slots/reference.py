"""Plain-torch truth of the slot kernels; see kernels/gpu.py for shapes. Rows with a slot below 0 are padding: they read token 0 at position 0,
their cache slot is -1 and their kv_len 0, and they write nowhere. A block-table entry below 0 is a block that was never given: cache slot -1.

    token = history[slot, position],  cache slot = table[slot, position // size] * size + position % size,  kv_len = last position + 1
"""

from __future__ import annotations

import torch
from torch import Tensor


def ragged_inputs(
    slots: Tensor, starts: Tensor, q_start: Tensor, history: Tensor, table: Tensor, block_size: int, tokens: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(tokens [T], positions [T], cache_slots [T], kv_len [R]) of rows of q_start[r+1] - q_start[r] tokens from position starts[r]."""
    values, positions, kv_len = torch.zeros(tokens).int(), torch.zeros(tokens).int(), torch.zeros(len(slots)).int()
    cache = torch.full((tokens,), -1, dtype=torch.int32)
    for row, (slot, start) in enumerate(zip(slots.tolist(), starts.tolist(), strict=True)):
        first, last = int(q_start[row]), int(q_start[row + 1])
        if slot < 0 or first == last:
            continue
        at = torch.arange(start, start + last - first)
        values[first:last] = history[slot, at]
        positions[first:last] = at.int()
        block = table[slot, at // block_size]
        cache[first:last] = torch.where(block >= 0, block * block_size + at.int() % block_size, -1)
        kv_len[row] = start + last - first
    return values, positions, cache, kv_len


def find_ends(slots: Tensor, places: Tensor, lens: Tensor) -> None:
    """In place: a place below 0 counts from the end of its slot's history of lens[slot] tokens: -1 is the last token's, -2 the first one behind it, and so on."""
    ends = lens[slots.clamp_min(0).long()]
    places.copy_(torch.where((places < 0) & (slots >= 0), ends - 2 - places, places))


def write_tokens(slots: Tensor, positions: Tensor, tokens: Tensor, history: Tensor) -> None:
    """history[slot, position] = max(token, 0) where both indices exist."""
    for slot, position, token in zip(slots.tolist(), positions.tolist(), tokens.tolist(), strict=True):
        if slot >= 0 and 0 <= position < history.shape[1]:
            history[slot, position] = max(token, 0)
