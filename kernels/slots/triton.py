"""Slot state on the device in Triton: how step n feeds step n+1 without the host. Formulas in reference.py, shapes in kernels/gpu.py.

What it is: the Forward and Sample columns of core/protocol/messages.py turned into index tensors, tokens written back, places, block tables, block
copies. Everything is exact integer work; launches of one step run in stream order (copies, place, set_blocks, inputs, model, draw, write).
What it does not know: the model, messages, who decides.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, disable-error-code="no-any-return"

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.checks import require
from penstock.kernels.gpu import tuned
from penstock.kernels.tile import launched, power

_LOOSE = [
    "slots",
    "starts",
    "places",
    "lens",
    "q_start",
    "counts",
    "offsets",
    "tokens",
    "positions",
    "index",
    "ids",
    "src",
    "dst",
    "cache_slots",
    "kv_len",
]
"""Columns are views at any element of a step's buffer: compiling again for each alignment would stall a step."""


@triton.jit
def _look(slots, starts, history, table, row, within, here, h_stride, t_stride, L: tl.constexpr, SIZE: tl.constexpr):
    """(token, position, cache slot) of token `within` of `row`, vectors; padding as in reference.py."""
    slot = tl.load(slots + row, mask=here, other=-1)
    live = here & (slot >= 0)
    position = tl.where(live, tl.load(starts + row, mask=here, other=0) + within, 0)
    known = live & (position < L)
    at = tl.where(known, slot, 0).to(tl.int64)
    token = tl.load(history + at * h_stride + position, mask=known, other=0)
    block = tl.load(table + at * t_stride + position // SIZE, mask=live, other=-1)
    return token, position, tl.where(block >= 0, block * SIZE + position % SIZE, -1)


@launched(do_not_specialize=["rows"], do_not_specialize_on_alignment=_LOOSE)
def _decode(
    slots, starts, history, table, tokens, positions, cache_slots, kv_len, rows, h_stride, t_stride, L: tl.constexpr, SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(R / BLOCK))."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = row < rows
    token, position, cache = _look(slots, starts, history, table, row, 0, here, h_stride, t_stride, L, SIZE)
    slot = tl.load(slots + row, mask=here, other=-1)
    tl.store(tokens + row, token, mask=here)
    tl.store(positions + row, position, mask=here)
    tl.store(cache_slots + row, cache, mask=here)
    tl.store(kv_len + row, tl.where(slot >= 0, position + 1, 0), mask=here)


@launched(do_not_specialize=["rows", "total"], do_not_specialize_on_alignment=_LOOSE)
def _ragged(
    slots, starts, q_start, history, table, tokens, positions, cache_slots, kv_len, rows, total, h_stride, t_stride, L: tl.constexpr,
    SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(max(T, R) / BLOCK)). Each token finds its row by bisection; each row its length."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = at < total
    low = tl.zeros([BLOCK], tl.int32)
    high = tl.zeros([BLOCK], tl.int32) + rows
    width = rows
    while width > 0:  # ends with low = number of rows whose first token is not after `at`
        middle = (low + high) // 2
        open = low < high
        right = open & (tl.load(q_start + middle, mask=open, other=0) <= at)
        low = tl.where(right, middle + 1, low)
        high = tl.where(open & ~right, middle, high)
        width = width // 2
    row = low - 1
    inside = here & (row >= 0) & (at < tl.load(q_start + rows))
    within = at - tl.load(q_start + row, mask=inside, other=0)
    token, position, cache = _look(slots, starts, history, table, row, within, inside, h_stride, t_stride, L, SIZE)
    tl.store(tokens + at, token, mask=here)
    tl.store(positions + at, position, mask=here)
    tl.store(cache_slots + at, cache, mask=here)
    real = at < rows
    slot = tl.load(slots + at, mask=real, other=-1)
    count = tl.load(q_start + at + 1, mask=real, other=0) - tl.load(q_start + at, mask=real, other=0)
    start = tl.load(starts + at, mask=real, other=0)
    tl.store(kv_len + at, tl.where((slot >= 0) & (count > 0), start + count, 0), mask=real)


@launched(do_not_specialize=["rows"], do_not_specialize_on_alignment=_LOOSE)
def _advance(slots, starts, rows, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = (row < rows) & (tl.load(slots + row, mask=row < rows, other=-1) >= 0)
    tl.store(starts + row, tl.load(starts + row, mask=live, other=0) + 1, mask=live)


@launched(do_not_specialize=["rows"], do_not_specialize_on_alignment=_LOOSE)
def _ends(slots, places, lens, rows, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = row < rows
    slot = tl.load(slots + row, mask=here, other=-1)
    place = tl.load(places + row, mask=here, other=0)
    counted = here & (slot >= 0) & (place < 0)
    tl.store(places + row, tl.load(lens + tl.where(counted, slot, 0), mask=counted, other=0) - 2 - place, mask=counted)


@launched(do_not_specialize=["rows"], do_not_specialize_on_alignment=_LOOSE)
def _write(slots, positions, tokens, history, rows, h_stride, L: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = row < rows
    slot = tl.load(slots + row, mask=here, other=-1)
    position = tl.load(positions + row, mask=here, other=-1)
    token = tl.load(tokens + row, mask=here, other=0)
    live = here & (slot >= 0) & (position >= 0) & (position < L)
    tl.store(history + tl.where(live, slot, 0).to(tl.int64) * h_stride + position, tl.maximum(token, 0), mask=live)


@launched(do_not_specialize_on_alignment=_LOOSE)
def _place(history, table, slots, counts, offsets, tokens, h_stride, t_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (E)."""
    entry = tl.program_id(0)
    slot = tl.load(slots + entry).to(tl.int64)
    if slot >= 0:
        count = tl.load(counts + entry)
        first = tl.load(offsets + entry).to(tl.int64)
        c = tl.arange(0, BLOCK)
        for at in range(0, count, BLOCK):
            mask = at + c < count
            tl.store(history + slot * h_stride + at + c, tl.load(tokens + first + at + c, mask=mask, other=0), mask=mask)
        for at in range(0, WIDTH, BLOCK):
            tl.store(table + slot * t_stride + at + c, tl.full([BLOCK], -1, tl.int32), mask=at + c < WIDTH)


@launched(do_not_specialize=["entries"], do_not_specialize_on_alignment=_LOOSE)
def _set(table, slots, index, ids, entries, t_stride, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = at < entries
    slot = tl.load(slots + at, mask=here, other=-1)
    column = tl.load(index + at, mask=here, other=0)
    live = here & (slot >= 0)
    tl.store(table + tl.where(live, slot, 0).to(tl.int64) * t_stride + column, tl.load(ids + at, mask=here, other=0), mask=live)


@launched(do_not_specialize_on_alignment=_LOOSE)
def _copy(pools, src, dst, words, g_stride, b_stride, BLOCK: tl.constexpr):
    """Grid (ceil(words / BLOCK), E, G)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(src + tl.program_id(1)).to(tl.int64)
    target = tl.load(dst + tl.program_id(1)).to(tl.int64)
    group = pools + tl.program_id(2).to(tl.int64) * g_stride
    mask = (at < words) & (source >= 0) & (target >= 0)
    tl.store(group + target * b_stride + at, tl.load(group + source * b_stride + at, mask=mask, other=0), mask=mask)


def decode_inputs(
    slots: Tensor, starts: Tensor, history: Tensor, table: Tensor, block_size: int, *, tokens: Tensor, positions: Tensor,
    cache_slots: Tensor, kv_len: Tensor,
) -> None:  # fmt: skip
    """Index tensors [R] of a decode step: one token a row, at starts[r]."""
    rows = slots.shape[0]
    if rows:
        _decode[(-(-rows // 128),)](
            slots, starts, history, table, tokens, positions, cache_slots, kv_len, rows, history.stride(0), table.stride(0),
            L=history.shape[1], SIZE=block_size, BLOCK=128,
        )  # fmt: skip


def ragged_inputs(
    slots: Tensor, starts: Tensor, q_start: Tensor, history: Tensor, table: Tensor, block_size: int, *, tokens: Tensor, positions: Tensor,
    cache_slots: Tensor, kv_len: Tensor,
) -> None:  # fmt: skip
    """Index tensors of a mixed step; tokens [T] beyond q_start[R] become padding."""
    rows, total = slots.shape[0], tokens.shape[0]
    if rows or total:
        _ragged[(-(-max(rows, total) // 128),)](
            slots, starts, q_start, history, table, tokens, positions, cache_slots, kv_len, rows, total, history.stride(0),
            table.stride(0), L=history.shape[1], SIZE=block_size, BLOCK=128,
        )  # fmt: skip


def advance(slots: Tensor, starts: Tensor) -> None:
    """starts[r] += 1 in live rows."""
    if slots.shape[0]:
        _advance[(-(-slots.shape[0] // 128),)](slots, starts, slots.shape[0], BLOCK=128)


def find_ends(slots: Tensor, places: Tensor, lens: Tensor) -> None:
    """See reference.find_ends."""
    if slots.shape[0]:
        _ends[(-(-slots.shape[0] // 128),)](slots, places, lens, slots.shape[0], BLOCK=128)


def write_tokens(slots: Tensor, positions: Tensor, tokens: Tensor, history: Tensor) -> None:
    """history[slot, position] = max(token, 0); the last position of a full context has no successor and is skipped."""
    if slots.shape[0]:
        _write[(-(-slots.shape[0] // 128),)](
            slots, positions, tokens, history, slots.shape[0], history.stride(0), L=history.shape[1], BLOCK=128
        )


def place(history: Tensor, table: Tensor, slots: Tensor, counts: Tensor, offsets: Tensor, tokens: Tensor) -> None:
    """Slot slots[e]'s history becomes tokens[offsets[e] : offsets[e] + counts[e]], its block table -1. Slots are distinct."""
    if slots.shape[0]:
        _place[(slots.shape[0],)](
            history, table, slots, counts, offsets, tokens, history.stride(0), table.stride(0), WIDTH=table.shape[1], BLOCK=1024
        )


def set_blocks(table: Tensor, slots: Tensor, index: Tensor, ids: Tensor) -> None:
    """table[slots[e], index[e]] = ids[e]; (slot, index) pairs are distinct."""
    if slots.shape[0]:
        _set[(-(-slots.shape[0] // 128),)](table, slots, index, ids, slots.shape[0], table.stride(0), BLOCK=128)


def copy_blocks(pools: Tensor, src: Tensor, dst: Tensor, *, config: dict[str, int] | None = None) -> None:
    """pools [G, num_blocks, ...]: block dst[e] becomes block src[e] in every group; no block is both. Blocks must be contiguous."""
    groups, blocks = pools.shape[:2]
    count = src.shape[0]
    if not count or not groups:
        return
    inner = pools[0, 0]
    size = inner.numel() * pools.element_size()
    require(inner.is_contiguous() and size % 8 == 0, "blocks must be contiguous, of a multiple of 8 bytes")
    scale = 8 // pools.element_size()
    words = pools.as_strided((groups, blocks, inner.numel()), (pools.stride(0), pools.stride(1), 1)).view(torch.int64)
    config = dict(config or tuned("copy_blocks"))
    block = min(config.pop("BLOCK"), power(size // 8))
    _copy[(-(-(size // 8) // block), count, groups)](
        words, src, dst, size // 8, pools.stride(0) // scale, pools.stride(1) // scale, BLOCK=block, **config
    )
