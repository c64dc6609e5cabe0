"""Drafts as Triton kernels: reference.py's functions, one program a row. Everything is looked up on the device, so that all of them can be captured."""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, disable-error-code="no-any-return"

import torch
import triton.language as tl

from penstock.kernels.tile import launched, power

Tensor = torch.Tensor
LOOSE = ["tokens", "slots", "positions", "bounds", "ends", "drafts", "out", "counts", "kept", "sources", "froms", "tos", "last"]
LOOK = 1024


@launched(do_not_specialize_on_alignment=LOOSE)
def _verify(tokens, slots, positions, bounds, history, counts, kept, L, stride, WIDTH: tl.constexpr):
    row = tl.program_id(0)
    first = tl.load(bounds + row)
    width = tl.load(bounds + row + 1) - first
    slot = tl.load(slots + row).to(tl.int64)
    position = tl.load(positions + row)
    j = tl.arange(0, WIDTH)
    token = tl.load(tokens + first + j, mask=j < width, other=-1)
    mine = history + tl.where(slot < 0, 0, slot) * stride
    there = tl.load(mine + position + j, mask=(j < width - 1) & (position + j < L), other=-2)
    same = (token == there) & (j < width - 1)
    stop = tl.min(tl.where(same, WIDTH, j), 0)
    bad = (tl.sum(tl.where(j == stop, token, 0), 0) < 0) & (stop > 0)
    count = tl.where(bad, stop, stop + 1)
    tl.store(counts + row, count)
    tl.store(kept + first + j, tl.where(j < count, token, -1), mask=j < width)
    last = tl.sum(tl.where(j == count - 1, token, 0), 0)
    at = position + count - 1
    tl.store(mine + at, tl.maximum(last, 0), mask=(slot >= 0) & (at < L))


def verify(tokens: Tensor, slots: Tensor, positions: Tensor, bounds: Tensor, history: Tensor, widest: int) -> tuple[Tensor, Tensor]:
    """See reference.verify; no row has more than `widest` draws."""
    counts, kept = torch.empty_like(slots), torch.empty_like(tokens)
    if len(slots):
        _verify[(len(slots),)](
            tokens,
            slots,
            positions,
            bounds,
            history,
            counts,
            kept,
            history.shape[1],
            history.stride(0),
            WIDTH=power(max(2, widest)),
            num_warps=1,
        )
    return counts, kept


@launched(do_not_specialize_on_alignment=LOOSE)
def _verify_tree(
    tokens, slots, positions, bounds, history, parents, counts, kept, sources, L, stride, DEEPEST: tl.constexpr, WIDTH: tl.constexpr
):
    row = tl.program_id(0)
    first = tl.load(bounds + row)
    width = tl.load(bounds + row + 1) - first
    slot = tl.load(slots + row).to(tl.int64)
    position = tl.load(positions + row)
    j = tl.arange(0, WIDTH)
    mine = history + tl.where(slot < 0, 0, slot) * stride
    drawn = tl.load(tokens + first + j, mask=j < width, other=-1)
    there = tl.load(mine + position - 1 + j, mask=(j < width) & (position - 1 + j < L) & (slot >= 0), other=-2)
    over = tl.load(parents + j, mask=j < width, other=-2)
    path = j == 0
    token = tl.sum(tl.where(j == 0, drawn, 0), 0)
    count = token * 0 + 1
    node = token * 0
    going = token >= 0
    tl.debug_barrier()  # all is read before anything is written
    tl.store(mine + position, tl.maximum(token, 0), mask=(slot >= 0) & (position < L))
    for i in range(DEEPEST):
        fits = (over == node) & (there == token) & (j > node) & going
        child = tl.min(tl.where(fits, j, WIDTH), 0)
        next = tl.sum(tl.where(j == child, drawn, 0), 0)
        going = going & (child < WIDTH) & (next >= 0)
        tl.store(sources + row * DEEPEST + i, tl.where(going, child, -1))
        node = tl.where(going, child, node)
        token = tl.where(going, next, token)
        path = path | (going & (j == child))
        at = position + i + 1
        tl.store(mine + at, token, mask=going & (slot >= 0) & (at < L))
        count += going.to(tl.int32)
    tl.store(counts + row, count)
    tl.store(kept + first + j, tl.where(path, drawn, -1), mask=j < width)


def verify_tree(
    tokens: Tensor, slots: Tensor, positions: Tensor, bounds: Tensor, history: Tensor, parents: Tensor, deepest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See reference.verify_tree; no row has more draws than there are parents."""
    counts, kept = torch.empty_like(slots), torch.empty_like(tokens)
    sources = torch.empty(len(slots), deepest, dtype=torch.int32, device=slots.device)
    if len(slots):
        _verify_tree[(len(slots),)](
            tokens, slots, positions, bounds, history, parents, counts, kept, sources, history.shape[1], history.stride(0), DEEPEST=deepest,
            WIDTH=power(max(2, len(parents))), num_warps=1,
        )  # fmt: skip
    return counts, kept, sources


@launched(do_not_specialize_on_alignment=LOOSE)
def _moves(
    sources,
    counts,
    slots,
    positions,
    bounds,
    table,
    froms,
    tos,
    last,
    stride,
    W,
    DEEPEST: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0)
    slot = tl.load(slots + row).to(tl.int64)
    root = tl.load(positions + row) - 1
    i = tl.arange(0, WIDTH)
    node = tl.load(sources + row * DEEPEST + i, mask=i < DEEPEST, other=-1)
    there = (node > i + 1) & (slot >= 0)
    blocks = table + tl.where(slot < 0, 0, slot) * stride
    a = root + tl.where(node < 0, 0, node)
    b = root + i + 1
    a_block = tl.load(blocks + a // SIZE, mask=there & (a // SIZE < W), other=-1)
    b_block = tl.load(blocks + b // SIZE, mask=there & (b // SIZE < W), other=-1)
    tl.store(froms + row * DEEPEST + i, tl.where(a_block >= 0, a_block * SIZE + a % SIZE, -1), mask=i < DEEPEST)
    tl.store(tos + row * DEEPEST + i, tl.where(b_block >= 0, b_block * SIZE + b % SIZE, -1), mask=i < DEEPEST)
    end = tl.sum(tl.where(i == tl.load(counts + row) - 2, node, 0), 0)
    tl.store(last + row, tl.load(bounds + row) + end)


def tree_moves(
    sources: Tensor, counts: Tensor, slots: Tensor, positions: Tensor, bounds: Tensor, table: Tensor, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See reference.tree_moves."""
    rows, deepest = sources.shape
    froms, tos, last = torch.empty_like(sources), torch.empty_like(sources), torch.empty_like(slots)
    if rows:
        _moves[(rows,)](
            sources, counts, slots, positions, bounds, table, froms, tos, last, table.stride(0), table.shape[1], DEEPEST=deepest,
            SIZE=block_size, WIDTH=power(max(2, deepest)), num_warps=1,
        )  # fmt: skip
    return froms, tos, last


@launched(do_not_specialize=["count"], do_not_specialize_on_alignment=LOOSE)
def _put(drafts, slots, ends, history, count, V, L, stride, WIDTH: tl.constexpr):
    row = tl.program_id(0)
    slot = tl.load(slots + row).to(tl.int64)
    end = tl.load(ends + row)
    k = tl.arange(0, WIDTH)
    draft = tl.load(drafts + row * count + k, mask=k < count, other=-1)
    fits = (draft >= 0) & (draft < V) & (end + k < L)
    fits = k < tl.min(tl.where(fits, WIDTH, k), 0)
    tl.store(drafts + row * count + k, tl.where(fits, draft, -1), mask=k < count)
    tl.store(history + tl.where(slot < 0, 0, slot) * stride + end + k, draft, mask=fits & (slot >= 0))


def put_drafts(drafts: Tensor, slots: Tensor, ends: Tensor, history: Tensor, vocab: int) -> None:
    """See reference.put_drafts; `drafts` contiguous."""
    rows, count = drafts.shape
    if rows and count:
        _put[(rows,)](
            drafts, slots, ends, history, count, vocab, history.shape[1], history.stride(0), WIDTH=power(max(2, count)), num_warps=1
        )


@launched(do_not_specialize=["count"], do_not_specialize_on_alignment=LOOSE)
def _ngrams(
    slots,
    ends,
    history,
    out,
    count,
    stride,
    SHORTEST: tl.constexpr,
    LONGEST: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    slot = tl.load(slots + row).to(tl.int64)
    end = tl.where(slot < 0, 0, tl.load(ends + row))
    mine = history + tl.where(slot < 0, 0, slot) * stride
    best = tl.zeros([BLOCK], tl.int64)
    for base in range(0, end - 1, BLOCK):
        at = base + tl.arange(0, BLOCK)
        fits = at < end - 1
        length = tl.zeros([BLOCK], tl.int64)
        for back in tl.static_range(LONGEST):
            fits = fits & (at >= back)
            wanted = tl.load(mine + tl.maximum(end - 1 - back, 0))
            fits = fits & (tl.load(mine + at - back, mask=fits, other=-1) == wanted)
            length += fits.to(tl.int64)
        # The longest, of equal ones the last.
        best = tl.maximum(best, length * 4294967296 + at)
    found = tl.max(best, 0)
    source = (found % 4294967296).to(tl.int32) + 1
    k = tl.arange(0, WIDTH)
    there = found // 4294967296 >= SHORTEST
    again = k % tl.maximum(end - source, 1)
    token = tl.load(mine + source + again, mask=there & (k < count), other=-1)
    tl.store(out + row * count + k, token, mask=k < count)


def ngrams(slots: Tensor, ends: Tensor, history: Tensor, shortest: int, longest: int, out: Tensor) -> None:
    """See reference.ngrams; `out` contiguous."""
    rows, count = out.shape
    if rows and count:
        _ngrams[(rows,)](
            slots, ends, history, out, count, history.stride(0), SHORTEST=shortest, LONGEST=longest, WIDTH=power(max(2, count)), BLOCK=LOOK,
            num_warps=4,
        )  # fmt: skip
