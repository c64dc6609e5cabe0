"""Paged attention in Triton: ragged rows (prefill chunks, and everything in deterministic mode) and split-KV decode rows.

    out[t, h] = sum_j w_j V[j] / sum_j w_j,   w_j = exp(f(scale * q[t, h] . K[j])),   j in [max(0, p - window + 1), p] (window 0: from 0)
    f(s) = softcap * tanh(s / softcap) or s;   a sink adds exp(sink[h]) to the denominator;   lse = log(sum_j w_j + exp(sink))

p = the row's position = kv_len - rows + t. Softmax is computed online over blocks of keys (Milakov and Gimelshein 2018, arXiv:1805.02867; Dao
2023, arXiv:2307.08691) in base 2; the heads of a group are packed into one tile (Ainslie et al. 2023, arXiv:2305.13245); pages: Kwon et
al. 2023, arXiv:2309.06180; split KV: Flash-Decoding (Dao et al. 2023); sinks: Xiao et al. 2023, arXiv:2309.17453; soft-cap: Gemma 2,
arXiv:2408.00118.

Rows that are nodes of a tree of drafts (`ancestors`) lie elsewhere than at their positions. A row by itself reads its keys in the order of their positions, each from
where it lies (`lines.py`), so that its bits are those that it would have along a chain, in deterministic mode, too; rows that share a tile read keys in the order of their
places under a mask.

What a row's result depends on: its own sequence and position only. Key blocks start at multiples of BLOCK_N of the absolute position, so the
ragged kernel gives a token the same bits in any chunk (blocks that are wholly masked for a row leave its sums untouched). The split kernel cuts
[lo, kv_len) into pieces of max(MIN_SPLIT, ceil(span / SPLITS) rounded up to BLOCK_N) keys and combines them in ascending order in one
fixed tree. So the two kernels differ in their last bits. In deterministic mode they do not: both use one tile, begin anew at every multiple of
`segment_of(...)` keys of the absolute position, and fold the segments' sums together one after the other with the same operations.

Layout: see KV_LAYOUT and kernels/gpu.py. What it does not know: who owns a block, slots, layers.
Long: each kernel stands beside the launch that sizes it.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, disable-error-code="no-any-return, attr-defined"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from penstock.kernels.attention import coded
from penstock.kernels.attention.coded import Codes, pages_of, scales_at, widen
from penstock.kernels.attention.lines import lowest, place_of, seen_of, shortened
from penstock.kernels.attention.moves import move_kv
from penstock.kernels.attention.pieces import add_up
from penstock.kernels.checks import require
from penstock.kernels.gpu import chained, interpreting, tuned
from penstock.kernels.tile import fetch_ahead, follow, launched, make_room, narrow, power, wait

__all__ = [
    "allocate_cache",
    "decode_attention",
    "merge",
    "move_kv",
    "paged_attention",
    "ragged_attention",
    "read_kv",
    "segment_of",
    "workspace_elements",
    "write_kv",
]
KV_LAYOUT = "paged-bhsd-v1"
"""[num_blocks, Hkv, block_size, D] row-major; part of the KV identity key."""
FUSED_ELEMENTS = 16384
"""Most float32 values that the last piece of a decode row may gather at once."""
SEGMENT = 64 if interpreting() else 1024
SEGMENTS = 33
"""Deterministic mode: a segment has at least SEGMENT keys, and the longest sequence at most SEGMENTS of them (33, since a server's tables hold one block
more than its longest sequence: 32 would double the segment's length at 32k, 64k, 128k)."""
LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453


def allocate_cache(num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype, device: str = "cuda") -> Tensor:
    """One layer's K or V cache, not initialised (unwritten positions are never read)."""
    return torch.empty(num_blocks, num_kv_heads, block_size, head_dim, dtype=dtype, device=device)


def write_kv(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """k, v [T, Hkv, D] into slots [T] (below 0: skipped). Torch; for tests and tools."""
    keep = slots >= 0
    at, size = slots[keep].long(), k_cache.shape[2]
    k_cache[at // size, :, at % size] = k[keep]
    v_cache[at // size, :, at % size] = v[keep]


def read_kv(cache: Tensor, slots: Tensor) -> Tensor:
    """The entries at slots [T]: [T, Hkv, D]. Torch; for tests and tools."""
    at, size = slots.long(), cache.shape[2]
    return cache[at // size, :, at % size]


@triton.jit
def _keys(
    acc, m, z, q, k, v, table, base, position, valid, start, end, limit, scale2, soft, window, kb, D: tl.constexpr, DP: tl.constexpr,
    SIZE: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, WIDE: tl.constexpr,
    DENSE: tl.constexpr, scales, sb, sbase, KIND: tl.constexpr, K_RECIPE: tl.constexpr,
    V_RECIPE: tl.constexpr, ancestors=None, TREE: tl.constexpr = False, seen_last=None, LINE: tl.constexpr = False,
):  # fmt: skip
    """Fold the key blocks of [start, end) into (acc, m, z); m in base-2 units. Keys at `limit` and beyond do not exist.

    Paged: k and v are pointers, table the sequence's pages, base the head's offset. DENSE: k and v are descriptors of [T, Hkv * D], table the row
    that belongs to key 0, base the head's first column. KIND: k and v are codes as in coded.py. TREE: `ancestors` [BLOCK_M] says what each row sees of the 64 keys up to its
    own, `seen_last` [BLOCK_M] how many of them; what no row sees may be NaN. LINE: there is one row, and a key's position is not its place: `ancestors` is its word, `seen_last` its
    own place.
    """
    d = tl.arange(0, DP)
    n = tl.arange(0, BLOCK_N)
    for first in range(start, end, BLOCK_N):
        at = first + n
        spot = at
        if LINE:
            spot = place_of(ancestors, seen_last, at)
        if DENSE:
            keys = k.load([table + first, base])
        elif KIND != "":
            if LINE:
                page = tl.load(table + spot // SIZE, mask=at < limit, other=0).to(tl.int64)
                inside = spot % SIZE
            else:
                page = pages_of(table, at, limit, MASK, SIZE)
                inside = tl.max_contiguous(tl.multiple_of(at % SIZE, [16]), [16])
            where = (page * kb + base + inside * D)[:, None] + d[None, :]
            where_v = (page * kb + base + inside)[None, :] + (d * SIZE)[:, None]
            if not LINE:
                where_v = tl.max_contiguous(tl.multiple_of(where_v, [1, 16]), [1, 16])
            if DP == D:
                keys = widen(tl.load(k + where), KIND, K_RECIPE, q.dtype == tl.bfloat16)
            else:
                keys = widen(tl.load(k + where, mask=(d < D)[None, :], other=0), KIND, K_RECIPE, q.dtype == tl.bfloat16)
        else:
            if MASK:
                page = tl.load(table + spot // SIZE, mask=at < limit, other=0).to(tl.int64)
            else:
                page = tl.load(table + spot // SIZE).to(tl.int64)
            where = (page * kb + base + (spot % SIZE) * D)[:, None] + d[None, :]
            if MASK:
                exists = (at < limit)[:, None] & (d < D)[None, :]
                keys = tl.load(k + where, mask=exists, other=0.0)
            elif DP == D:
                keys = tl.load(k + where)
            else:
                keys = tl.load(k + where, mask=(d < D)[None, :], other=0.0)
        if WIDE:
            s = tl.dot(q, tl.trans(keys.to(tl.float32)), input_precision="ieee")
        else:
            s = tl.dot(q, tl.trans(keys))
        if KIND != "":
            k_scale, v_scale = scales_at(scales, page, sb, sbase, at, spot, limit, MASK, SIZE)
            s = s * k_scale[None, :]
        if SOFTCAP:
            # tanh(y) = 1 - 2 / (1 + exp(2y)), exact at both ends; soft = softcap, scale2 = 2 scale / softcap * log2(e)
            s = soft * (1.0 - 2.0 / (1.0 + tl.exp2(s * scale2)))
        if MASK:
            seen = (at[None, :] <= position[:, None]) & (at < limit)[None, :] & valid[:, None]
            if TREE:
                back = position[:, None] - at[None, :]
                bit = (ancestors[:, None] >> tl.minimum(tl.maximum(back, 0), 63).to(tl.int64)) & 1
                if WINDOW:  # of the last 64 `ancestors` has no more than the window
                    seen = seen & ((back < 64) | (back - 64 + seen_last[:, None] < window))
                seen = seen & ((back >= 64) | (bit == 1))
            elif WINDOW:
                seen = seen & (at[None, :] > position[:, None] - window)
            if TREE:
                some = tl.max(seen.to(tl.int32), 0) > 0
            s = tl.where(seen, s, float("-inf"))
        if SOFTCAP:
            to2 = 1.4426950408889634
        else:
            to2 = scale2
        # m is kept in base-2 units, so that there is one way to round each of these lines, masked or not (compilers contract a * b - c)
        top = tl.maximum(m, tl.max(s, 1) * to2)
        shift = tl.where(top == float("-inf"), 0.0, top)
        p = tl.exp2(s * to2 - shift[:, None])
        fade = tl.exp2(m - shift)
        z = z * fade + tl.sum(p, 1)
        acc = acc * fade[:, None]
        if DENSE:
            values = v.load([table + first, base])
            if MASK:  # rows of the next sequence, or padding that may hold anything: 0 * NaN would stay
                values = tl.where((at < limit)[:, None], values, 0.0)
            if TREE and MASK:
                values = tl.where(some[:, None], values, 0.0)
        elif KIND != "":
            if DP == D:
                codes = tl.load(v + where_v)
            else:
                codes = tl.load(v + where_v, mask=(d < D)[:, None], other=0)
            if MASK:  # what was never written may be codes that are no numbers
                codes = tl.where((at < limit)[None, :], codes, 0)
            if TREE and MASK:
                codes = tl.where(some[None, :], codes, 0)
                v_scale = tl.where(some, v_scale, 0.0)
            values = tl.trans(widen(codes, KIND, V_RECIPE, True))
            p = p * v_scale[None, :]
        elif MASK:
            values = tl.load(v + where, mask=exists, other=0.0)
            if TREE:
                values = tl.where(some[:, None], values, 0.0)
        elif DP == D:
            values = tl.load(v + where)
        else:
            values = tl.load(v + where, mask=(d < D)[None, :], other=0.0)
        if WIDE:
            acc = tl.dot(p, values.to(tl.float32), acc, input_precision="ieee")
        else:
            acc = tl.dot(p.to(values.dtype), values, acc)
        m = top
    return acc, m, z


@triton.jit
def _range(
    acc, m, z, q, k, v, table, base, position, valid, start, whole, end, scale2, soft, window, kb, D: tl.constexpr, DP: tl.constexpr,
    SIZE: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, WIDE: tl.constexpr, DENSE: tl.constexpr,
    scales, sb, sbase, KIND: tl.constexpr, K_RECIPE: tl.constexpr, V_RECIPE: tl.constexpr, ancestors=None, TREE: tl.constexpr = False,
    seen_last=None, LINE: tl.constexpr = False,
):  # fmt: skip
    """Fold the keys of [start, end) into (acc, m, z). All rows see those before `whole` (a multiple of BLOCK_N from `start` on, unless there is a
    window); the rest goes under a mask. LINE: those before `whole` lie in the places of their positions."""
    if WINDOW and LINE:
        acc, m, z = _keys(
            acc, m, z, q, k, v, table, base, position, valid, start, whole, end, scale2, soft, window, kb, D, DP, SIZE, BLOCK_N, True,
            WINDOW, SOFTCAP, WIDE, DENSE, scales, sb, sbase, KIND, K_RECIPE, V_RECIPE,
        )  # fmt: skip
        start = whole
    if not WINDOW:
        acc, m, z = _keys(
            acc, m, z, q, k, v, table, base, position, valid, start, whole, end, scale2, soft, window, kb, D, DP, SIZE, BLOCK_N, False,
            False, SOFTCAP, WIDE, DENSE, scales, sb, sbase, KIND, K_RECIPE, V_RECIPE,
        )  # fmt: skip
        start = whole
    return _keys(
        acc, m, z, q, k, v, table, base, position, valid, start, end, end, scale2, soft, window, kb, D, DP, SIZE, BLOCK_N, True, WINDOW,
        SOFTCAP, WIDE, DENSE, scales, sb, sbase, KIND, K_RECIPE, V_RECIPE, ancestors, TREE, seen_last, LINE,
    )  # fmt: skip


@triton.jit
def _fold(acc, m, z, part, part_m, part_z):
    """(acc, m, z) and a later segment's, as one. Written as explicit fused multiply-adds: no compiler then rounds it differently in one of the
    kernels that must agree."""
    top = tl.maximum(m, part_m)
    shift = tl.where(top == float("-inf"), 0.0, top)
    old = tl.exp2(m - shift)
    new = tl.exp2(part_m - shift)
    acc = tl.fma(part, tl.broadcast_to(new[:, None], part.shape), acc * old[:, None])
    return acc, top, tl.fma(part_z, new, z * old)


@triton.jit
def _close(acc, m2, z, sinks, head, here, SINKS: tl.constexpr):
    """Divide by the denominator: (out, lse in base 2). Rows that saw nothing: zeros and -inf."""
    if SINKS:
        sink = tl.load(sinks + head, mask=here, other=0.0) * 1.4426950408889634
        top = tl.maximum(m2, sink)
        fade = tl.exp2(m2 - top)
        z = z * fade + tl.exp2(sink - top)
        acc = acc * fade[:, None]
        m2 = top
    some = z > 0.0
    safe = tl.where(some, z, 1.0)
    return acc / safe[:, None], tl.where(some, m2 + tl.log2(safe), float("-inf"))


@launched(do_not_specialize=["sequences", "window"], do_not_specialize_on_alignment=["q_start", "kv_len", "table_rows", "tables"])
def _ragged(
    q, k, v, out, lse, tables, q_start, kv_len, table_rows, sinks, scale2, soft, window, sequences, q_stride, table_stride, kb, kh,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SIZE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, LSE: tl.constexpr,
    ROWS: tl.constexpr, WIDE: tl.constexpr, DENSE: tl.constexpr, MIXED: tl.constexpr, SEGMENT: tl.constexpr, PDL: tl.constexpr, new_k=None,
    new_v=None, scales=None, sb=None, KIND: tl.constexpr = "", K_RECIPE: tl.constexpr = "", V_RECIPE: tl.constexpr = "", ancestors=None,
    TREE: tl.constexpr = False,
):  # fmt: skip
    """Grid (T // BLOCK_Q + R, Hkv). Sequence r's tiles start at q_start[r] // BLOCK_Q + r, which leaves every sequence enough of them.
    MIXED: sequences of one row are left to `_split`. SEGMENT: 0, or the keys after which sums begin anew (deterministic mode)."""
    follow(PDL)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # late tiles see the most keys: first
    group = tl.program_id(1)
    low = 0
    high = sequences
    while low < high:
        middle = (low + high) // 2
        if tl.load(q_start + middle) // BLOCK_Q + middle <= tile:
            low = middle + 1
        else:
            high = middle
    r = low - 1
    if r >= 0:
        first = tl.load(q_start + r)
        rows = tl.load(q_start + r + 1) - first
        t0 = (tile - first // BLOCK_Q - r) * BLOCK_Q
        if MIXED:
            rows = tl.where(rows == 1, 0, rows)
        if t0 < rows:
            length = tl.load(kv_len + r)
            context = length - rows
            offs = tl.arange(0, BLOCK_M)
            d = tl.arange(0, DP)
            token = t0 + offs // GROUP
            head = group * GROUP + offs % GROUP
            real = (token < rows) & (offs < BLOCK_Q * GROUP)
            valid = real & (length > 0)
            row = (first + token).to(tl.int64)
            tile_mask = real[:, None] & (d < D)[None, :]
            queries = tl.load(q + (row * q_stride + head * D)[:, None] + d[None, :], mask=tile_mask, other=0.0)
            if WIDE:
                queries = queries.to(tl.float32)
            position = context + token
            if ROWS:
                table = tables + tl.load(table_rows + r).to(tl.int64) * table_stride
            else:
                table = tables + r.to(tl.int64) * table_stride
            base = group.to(tl.int64) * kh
            sbase = group * SIZE
            end = context + tl.minimum(t0 + BLOCK_Q, rows)
            start = 0
            if WINDOW:
                nearest = context + t0 - window + 1
                if TREE:  # a node's position lies at most 63 before its place
                    nearest -= 63
                start = tl.maximum(nearest, 0) // BLOCK_N * BLOCK_N
            m = tl.full([BLOCK_M], float("-inf"), tl.float32)
            z = tl.zeros([BLOCK_M], tl.float32)
            acc = tl.zeros([BLOCK_M, DP], tl.float32)
            # what is visible to all rows of the tile, block by block, then the rest under a mask
            whole = tl.maximum(context + t0 + 1, 0) // BLOCK_N * BLOCK_N
            mine = None
            seen_last = None
            own = position  # of rows, by which windows are counted over keys that lie at their positions
            if TREE:
                mine = tl.load(ancestors + row, mask=real, other=-1)
                seen_last = seen_of(mine)
                own = position - 64 + seen_last
                if WINDOW:
                    mine = lowest(mine, window)
                whole = tl.maximum(context + t0 - 63, 0) // BLOCK_N * BLOCK_N
            if SEGMENT:
                for at in range(start // SEGMENT * SEGMENT, end, SEGMENT):
                    begin = tl.maximum(start, at)
                    last = tl.minimum(end, at + SEGMENT)
                    part_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
                    part_z = tl.zeros([BLOCK_M], tl.float32)
                    part = tl.zeros([BLOCK_M, DP], tl.float32)
                    part, part_m, part_z = _range(
                        part, part_m, part_z, queries, k, v, table, base, position, valid, begin,
                        tl.minimum(tl.maximum(whole, begin), last // BLOCK_N * BLOCK_N), last, scale2, soft, window, kb, D, DP, SIZE, BLOCK_N,
                        WINDOW, SOFTCAP, WIDE, False, scales, sb, sbase, KIND, K_RECIPE, V_RECIPE,
                    )  # fmt: skip
                    acc, m, z = _fold(acc, m, z, part, part_m, part_z)
            elif DENSE:
                acc, m, z = _range(
                    acc, m, z, queries, k, v, table, base, own, valid, start, context // BLOCK_N * BLOCK_N, context, scale2, soft, window,
                    kb, D, DP, SIZE, BLOCK_N, WINDOW, SOFTCAP, WIDE, False, scales, sb, sbase, KIND, K_RECIPE, V_RECIPE,
                )  # fmt: skip
                column = group * D
                start = 0
                whole = tl.where(length > 0, (t0 + 1) // BLOCK_N * BLOCK_N, 0)
                if TREE:  # what lies before this step is seen by all
                    whole = tl.where(length > 0, tl.maximum(t0 - 63, 0) // BLOCK_N * BLOCK_N, 0)
                if WINDOW:
                    nearest = t0 - window + 1
                    if TREE:
                        nearest -= 63
                    start = tl.maximum(nearest, 0) // BLOCK_N * BLOCK_N
                acc, m, z = _range(
                    acc, m, z, queries, new_k, new_v, first, column, token, valid, start, whole, end - context, scale2, soft, window, kb, D,
                    DP, SIZE, BLOCK_N, WINDOW, SOFTCAP, WIDE, True, None, None, None, "", "", "", mine, TREE, seen_last,
                )  # fmt: skip
            else:
                acc, m, z = _range(
                    acc, m, z, queries, k, v, table, base, position, valid, start, whole, end, scale2, soft, window, kb, D, DP, SIZE, BLOCK_N,
                    WINDOW, SOFTCAP, WIDE, False, scales, sb, sbase, KIND, K_RECIPE, V_RECIPE, mine, TREE, seen_last,
                )  # fmt: skip
            result, total = _close(acc, m, z, sinks, head, real, SINKS)
            tl.store(out + (row * HEADS * D + head * D)[:, None] + d[None, :], narrow(result, out.dtype.element_ty), mask=tile_mask)
            if LSE:
                tl.store(lse + row * HEADS + head, total * 0.6931471805599453, mask=real)


@launched(do_not_specialize=["window"], do_not_specialize_on_alignment=["kv_len", "table_rows", "tables"])
def _split(
    q, k, v, out, lse, partial, partial_lse, partial_z, counters, tables, q_start, kv_len, table_rows, sinks, scale2, soft, window, q_stride,
    table_stride, kb, kh, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SIZE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, MIN_SPLIT: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr, LSE: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, AHEAD: tl.constexpr,
    MIXED: tl.constexpr, FUSED: tl.constexpr, GROUP_P: tl.constexpr, SEGMENT: tl.constexpr, PDL: tl.constexpr, scales=None, sb=None,
    KIND: tl.constexpr = "", K_RECIPE: tl.constexpr = "", V_RECIPE: tl.constexpr = "", ancestors=None, TREE: tl.constexpr = False,
):  # fmt: skip
    """Grid (Hkv, R, SPLITS): one piece of one row's keys for one group of heads. A row of one piece is finished here. AHEAD: ask for the first
    block's entries while the kernel before still runs (all but the newest token's were written in earlier steps). MIXED: sequence r's only row is
    q_start[r]; those with another number of rows are left to `_ragged`. FUSED: whoever comes last adds up the pieces; else `_combine` does.
    SEGMENT: the pieces are `_ragged`'s segments, and `_join` folds them."""
    group = tl.program_id(0)
    r = tl.program_id(1)
    piece = tl.program_id(2)
    make_room(PDL)
    length = tl.load(kv_len + r, cache_modifier=".cg")
    row = r.to(tl.int64)
    mine = True
    if ROWS:
        table = tables + tl.load(table_rows + r, cache_modifier=".cg").to(tl.int64) * table_stride
    else:
        table = tables + row * table_stride
    if MIXED:
        row = tl.load(q_start + r, cache_modifier=".cg").to(tl.int64)
        mine = tl.load(q_start + r + 1, cache_modifier=".cg") == row + 1
        length = tl.where(mine, length, 0)
    place = length - 1
    own = None
    if TREE:
        own = tl.load(ancestors + row, cache_modifier=".cg")
        length = shortened(length, own)
    base = group.to(tl.int64) * kh
    low = 0
    if WINDOW:
        low = tl.maximum(length - window, 0) // BLOCK_N * BLOCK_N
    origin = low
    if SEGMENT:
        origin = low // SEGMENT * SEGMENT
        size = SEGMENT
    else:
        size = tl.maximum(tl.cdiv(tl.cdiv(length - low, SPLITS), BLOCK_N) * BLOCK_N, MIN_SPLIT)
    span = length - origin
    start = origin + piece * size
    if PDL and AHEAD:  # noqa: SIM102 (known when compiled, the inner one is not)
        if start < length:
            token = start + tl.arange(0, BLOCK_N)
            page = tl.load(table + token // SIZE, mask=token < length, other=0, cache_modifier=".cg").to(tl.int64)
            line = tl.minimum(tl.arange(0, (DP + 63) // 64) * 64, D - 1)
            entries = (page * kb + base + token % SIZE * D)[:, None] + line[None, :]
            fetch_ahead(k + entries)
            fetch_ahead(v + entries)
    wait(PDL)
    if ((start < length) | (piece == 0)) & mine:
        end = tl.minimum(start + size, length)
        start = tl.maximum(start, low)
        offs = tl.arange(0, BLOCK_M)
        d = tl.arange(0, DP)
        real = offs < GROUP
        head = group * GROUP + offs
        tile_mask = real[:, None] & (d < D)[None, :]
        queries = tl.load(q + row * q_stride + (head * D)[:, None] + d[None, :], mask=tile_mask, other=0.0)
        if WIDE:
            queries = queries.to(tl.float32)
        position = tl.zeros([BLOCK_M], tl.int32) + (length - 1)
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        z = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, DP], tl.float32)
        whole = start + (end - start) // BLOCK_N * BLOCK_N
        if TREE:  # what lies 64 and more before the row's own place lies at its position
            whole = start + tl.maximum(tl.minimum(end, place - 63) - start, 0) // BLOCK_N * BLOCK_N
        acc, m, z = _range(
            acc, m, z, queries, k, v, table, base, position, real, start, whole, end, scale2, soft, window,
            kb, D, DP, SIZE, BLOCK_N, WINDOW, SOFTCAP, WIDE, False, scales, sb, group * SIZE, KIND, K_RECIPE, V_RECIPE, own, False, place, TREE,
        )  # fmt: skip
        if span <= size:
            result, total = _close(acc, m, z, sinks, head, real, SINKS)
            tl.store(out + row * HEADS * D + (head * D)[:, None] + d[None, :], narrow(result, out.dtype.element_ty), mask=tile_mask)
            if LSE:
                tl.store(lse + row * HEADS + head, total * 0.6931471805599453, mask=real)
        elif SEGMENT:
            cell = (r * HEADS + head).to(tl.int64) * SPLITS + piece
            tl.store(partial + (cell * D)[:, None] + d[None, :], acc, mask=tile_mask)
            tl.store(partial_lse + cell, m, mask=real)
            tl.store(partial_z + cell, z, mask=real)
        else:
            result, total = _close(acc, m, z, sinks, head, real, False)
            at = (r * HEADS + head).to(tl.int64) * SPLITS + piece
            tl.store(partial + (at * D)[:, None] + d[None, :], result, mask=tile_mask)
            tl.store(partial_lse + at, total, mask=real)
            if FUSED:
                tl.debug_barrier()
                counter = counters + r * (HEADS // GROUP) + group
                pieces = tl.cdiv(span, size)
                if tl.atomic_add(counter, 1, sem="acq_rel") == pieces - 1:
                    tl.store(counter, 0)
                    add_up(out, lse, partial, partial_lse, sinks, r, row, group, pieces, HEADS, GROUP, GROUP_P, D, DP, SPLITS, SINKS, LSE)


@launched(do_not_specialize=["window"], do_not_specialize_on_alignment=["kv_len"])
def _combine(
    out, lse, partial, partial_lse, q_start, kv_len, sinks, window, HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr, MIN_SPLIT: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, LSE: tl.constexpr,
    MIXED: tl.constexpr, PDL: tl.constexpr, ancestors=None, TREE: tl.constexpr = False,
):  # fmt: skip
    """Grid (R, Hq): the pieces of one row and head, always in the same order. MIXED: as in `_split`."""
    make_room(PDL)
    r = tl.program_id(0).to(tl.int64)
    row = r
    head = tl.program_id(1)
    length = tl.load(kv_len + r, cache_modifier=".cg")
    if MIXED:
        row = tl.load(q_start + r, cache_modifier=".cg").to(tl.int64)
        length = tl.where(tl.load(q_start + r + 1, cache_modifier=".cg") == row + 1, length, 0)
    if TREE:
        length = shortened(length, tl.load(ancestors + row, cache_modifier=".cg"))
    low = 0
    if WINDOW:
        low = tl.maximum(length - window, 0) // BLOCK_N * BLOCK_N
    span = length - low
    size = tl.maximum(tl.cdiv(tl.cdiv(span, SPLITS), BLOCK_N) * BLOCK_N, MIN_SPLIT)
    wait(PDL)
    if span > size:
        pieces = tl.cdiv(span, size)
        s = tl.arange(0, SPLITS)
        d = tl.arange(0, DP)
        at = (r * HEADS + head) * SPLITS + s
        parts = tl.load(partial_lse + at, mask=s < pieces, other=float("-inf"))
        top = tl.max(parts, 0)
        if SINKS:
            sink = tl.load(sinks + head) * 1.4426950408889634
            top = tl.maximum(top, sink)
        weight = tl.exp2(parts - top)
        total = tl.sum(weight, 0)
        if SINKS:
            total += tl.exp2(sink - top)
        values = tl.load(partial + (at * D)[:, None] + d[None, :], mask=(s < pieces)[:, None] & (d < D)[None, :], other=0.0)
        result = tl.sum(values * weight[:, None], 0) / total
        tl.store(out + (row * HEADS + head) * D + d, narrow(result, out.dtype.element_ty), mask=d < D)
        if LSE:
            tl.store(lse + row * HEADS + head, (top + tl.log2(total)) * 0.6931471805599453)


@launched(do_not_specialize=["window"], do_not_specialize_on_alignment=["kv_len"])
def _join(
    out, lse, partial, partial_m, partial_z, q_start, kv_len, sinks, window, HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_P: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, SEGMENT: tl.constexpr, WINDOW: tl.constexpr,
    SINKS: tl.constexpr, LSE: tl.constexpr, MIXED: tl.constexpr, PDL: tl.constexpr, ancestors=None, TREE: tl.constexpr = False,
):  # fmt: skip
    """Grid (R, Hkv): the segments of one row and group of heads, one after the other, as `_ragged` does. MIXED: as in `_split`."""
    make_room(PDL)
    r = tl.program_id(0).to(tl.int64)
    row = r
    length = tl.load(kv_len + r, cache_modifier=".cg")
    if MIXED:
        row = tl.load(q_start + r, cache_modifier=".cg").to(tl.int64)
        length = tl.where(tl.load(q_start + r + 1, cache_modifier=".cg") == row + 1, length, 0)
    if TREE:
        length = shortened(length, tl.load(ancestors + row, cache_modifier=".cg"))
    low = 0
    if WINDOW:
        low = tl.maximum(length - window, 0) // BLOCK_N * BLOCK_N
    origin = low // SEGMENT * SEGMENT
    wait(PDL)
    if length - origin > SEGMENT:
        h = tl.arange(0, GROUP_P)
        real = h < GROUP
        head = tl.program_id(1) * GROUP + h
        d = tl.arange(0, DP)
        mask = real[:, None] & (d < D)[None, :]
        cell = (r * HEADS + head) * SPLITS
        m = tl.full([GROUP_P], float("-inf"), tl.float32)
        z = tl.zeros([GROUP_P], tl.float32)
        acc = tl.zeros([GROUP_P, DP], tl.float32)
        for piece in range(tl.cdiv(length - origin, SEGMENT)):
            part = tl.load(partial + ((cell + piece) * D)[:, None] + d[None, :], mask=mask, other=0.0)
            part_m = tl.load(partial_m + cell + piece, mask=real, other=float("-inf"))
            part_z = tl.load(partial_z + cell + piece, mask=real, other=0.0)
            acc, m, z = _fold(acc, m, z, part, part_m, part_z)
        result, total = _close(acc, m, z, sinks, head, real, SINKS)
        tl.store(out + row * HEADS * D + (head * D)[:, None] + d[None, :], narrow(result, out.dtype.element_ty), mask=mask)
        if LSE:
            tl.store(lse + row * HEADS + head, total * 0.6931471805599453, mask=real)


@launched
def _merge(out_a, lse_a, out_b, lse_b, out, lse, D: tl.constexpr, DP: tl.constexpr, LSE: tl.constexpr):
    """Grid (T * Hq): exact softmax over the union of two disjoint sets of keys."""
    at = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, DP)
    a = tl.load(lse_a + at)
    b = tl.load(lse_b + at)
    top = tl.maximum(a, b)
    shift = tl.where(top == float("-inf"), 0.0, top)
    wa = tl.exp(a - shift)
    wb = tl.exp(b - shift)
    total = wa + wb
    safe = tl.where(total > 0.0, total, 1.0)
    x = tl.load(out_a + at * D + d, mask=d < D, other=0.0).to(tl.float32)
    y = tl.load(out_b + at * D + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(out + at * D + d, narrow((x * wa + y * wb) / safe, out.dtype.element_ty), mask=d < D)
    if LSE:
        tl.store(lse + at, tl.where(total > 0.0, shift + tl.log(safe), float("-inf")))


def _scales(scale: float, softcap: float) -> tuple[float, float]:
    """(scale2, soft) as the kernels want them: see `_keys`."""
    return (2.0 * scale / softcap * LOG2E, softcap) if softcap > 0 else (scale * LOG2E, 0.0)


def _check(q: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float, codes: Codes | None = None) -> None:
    heads, dim = q.shape[1], q.shape[2]
    require(q.stride(2) == 1 and q.stride(1) == dim, "q's last two dimensions must be contiguous")
    require(k_cache.shape == v_cache.shape and k_cache.stride() == v_cache.stride(), "the caches must have one shape and stride")
    require(
        k_cache.dtype == v_cache.dtype == (q.dtype if codes is None else torch.uint8),
        "q and the caches must have one dtype, or the caches codes",
    )
    if codes is not None:
        coded.check(codes, q, k_cache)
    require(k_cache.shape[3] == dim and heads % k_cache.shape[1] == 0, "q and the caches do not fit each other")
    size = k_cache.shape[2]
    require(size >= 16 and size & (size - 1) == 0, "block_size must be a power of two from 16")
    require(k_cache.stride()[1:] == (size * dim, dim, 1), "a block must be contiguous")
    require(scale > 0, "scale must be above 0")


def _ragged_config(dim: int, dense: bool, deterministic: bool) -> dict[str, int]:
    if dim <= 128 and (dense or deterministic):
        return tuned("attention.ragged.fixed" if deterministic else "attention.ragged.dense")
    return tuned("attention.ragged" if dim <= 128 else "attention.ragged.wide")


def _split_config(dim: int) -> dict[str, int]:
    return tuned("attention.split" if dim <= 128 else "attention.split.wide")


def _descriptors(new_k: Tensor | None, new_v: Tensor | None, dim: int, block_n: int) -> tuple[Any, Any]:
    if new_k is None or new_v is None or dim != power(dim) or dim * new_k.element_size() < 32:
        return None, None
    found = []
    for value in (new_k, new_v):
        tokens, heads = value.shape[:2]
        stride = value.stride(0)
        require(value.stride()[1:] == (dim, 1), "new_k and new_v must be contiguous in their last two dimensions")
        require(stride * value.element_size() % 16 == 0 and value.data_ptr() % 16 == 0, "new_k and new_v must be aligned to 16 bytes")
        found.append(TensorDescriptor(value, [tokens, heads * dim], [stride, 1], [block_n, dim]))
    return found[0], found[1]


def workspace_elements(rows: int, num_heads: int, head_dim: int, *, deterministic: bool = False, codes: bool = False) -> int:
    """float32 elements that `decode_attention` needs for that many rows; `codes`: of a cache in 8 bits."""
    if codes and not deterministic:
        return coded.most_pieces(head_dim, rows) * num_heads * (head_dim + 2)
    pieces = SEGMENTS if deterministic else _split_config(head_dim)["SPLITS"]
    return rows * num_heads * pieces * (head_dim + 2)


def segment_of(longest: int) -> int:
    """Keys after which deterministic mode's sums begin anew, where no sequence has more than `longest`: a power of two."""
    return max(SEGMENT, power(-(-longest // SEGMENTS)))


def ragged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, q_start: Tensor, kv_len: Tensor, scale: float, window: int = 0, *,
    softcap: float = 0.0, sinks: Tensor | None = None, table_rows: Tensor | None = None, out: Tensor | None = None, lse: Tensor | None = None,
    new_k: Tensor | None = None, new_v: Tensor | None = None, deterministic: bool = False, mixed: bool = False,
    codes: Codes | None = None, ancestors: Tensor | None = None, config: dict[str, int] | None = None,
) -> Tensor:  # fmt: skip
    """The ragged kernel for all rows (mixed: for all sequences but those of one row) of q [T, Hq, D]; arguments as in kernels/gpu.py.

    new_k, new_v [T, Hkv, D] (last two dimensions contiguous), this step's own keys and values in token order: where they are given and D is a power
    of two they are read from there by the bulk copy engine, and only what lies before this step comes from the pages. Faster, but the blocks
    then start at the chunk's first token, so that bits depend on how a prompt was cut: not for deterministic mode. `deterministic`: by the tile
    and the segments that chunks share with decode rows in that mode. `codes`: the caches hold 8 bits (coded.py); new_k and new_v are wide all the same.
    `ancestors` [T] int64, for trees of drafts: see reference.py; what a row does not see of this step, and nobody else in its tile, may be NaN. In deterministic mode nodes
    are rows of their own (`decode_attention`).
    """
    _check(q, k_cache, v_cache, scale, codes)
    require(not deterministic or new_k is None, "deterministic attention reads all keys through the pages")
    require(not deterministic or ancestors is None, "in deterministic attention a tree's nodes are rows of their own")
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    tokens, heads, dim = q.shape
    sequences, kv_heads = kv_len.shape[0], k_cache.shape[1]
    if tokens == 0 or sequences == 0:
        return out
    config = dict(config or _ragged_config(dim, new_k is not None, deterministic))
    group = heads // kv_heads
    block_m = max(config.pop("BLOCK_M"), power(group), 16)
    block_q = block_m // group
    scale2, soft = _scales(scale, softcap)
    descriptors = _descriptors(new_k, new_v, dim, config["BLOCK_N"])
    _ragged[(tokens // block_q + sequences, kv_heads)](
        q, k_cache, v_cache, out, lse, block_tables, q_start, kv_len, table_rows, sinks, scale2, soft, window, sequences, q.stride(0),
        block_tables.stride(0), k_cache.stride(0), k_cache.stride(1), HEADS=heads, GROUP=group, D=dim, DP=max(16, power(dim)),
        SIZE=k_cache.shape[2], BLOCK_M=block_m, BLOCK_Q=block_q, WINDOW=window > 0, SOFTCAP=softcap > 0, SINKS=sinks is not None,
        LSE=lse is not None, ROWS=table_rows is not None, WIDE=interpreting() or q.dtype == torch.float32,
        DENSE=descriptors[0] is not None, MIXED=mixed, SEGMENT=segment_of(block_tables.shape[1] * k_cache.shape[2]) if deterministic else 0,
        new_k=descriptors[0], new_v=descriptors[1], **({} if codes is None else coded.exact(codes, q.dtype)),
        ancestors=ancestors, TREE=ancestors is not None, **chained(), **config,
    )  # fmt: skip
    return out


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, kv_len: Tensor, scale: float, window: int = 0, *,
    softcap: float = 0.0, sinks: Tensor | None = None, table_rows: Tensor | None = None, out: Tensor | None = None, lse: Tensor | None = None,
    workspace: Tensor | None = None, counters: Tensor | None = None, q_start: Tensor | None = None, deterministic: bool = False,
    codes: Codes | None = None, ancestors: Tensor | None = None, config: dict[str, int] | None = None,
) -> Tensor:  # fmt: skip
    """The split-KV kernel: one query row q [R, Hq, D] a sequence, at position kv_len[r] - 1; arguments as in kernels/gpu.py.

    counters [>= R * Hkv] int32, zero before and after every call: spares a launch where a row's pieces fit into one program's registers.
    q_start [R + 1] int32: q is [T, Hq, D], and those sequences that have one row there are computed; nothing else of `out` is written.
    deterministic: bits as `ragged_attention` gives them (counters are not used). codes: the caches hold 8 bits (coded.py). ancestors: [rows of q], as
    `ragged_attention`'s; a row's bits are then those that it would have at its position along a chain."""
    _check(q, k_cache, v_cache, scale, codes)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    (rows, heads, dim), mixed = (kv_len.shape[0], *q.shape[1:]), q_start is not None
    if rows == 0:
        return out
    kv_heads, given = k_cache.shape[1], config
    segment = 0
    if deterministic:
        longest = block_tables.shape[1] * k_cache.shape[2]
        segment = segment_of(longest)
        config = {
            **_ragged_config(dim, False, True),
            **tuned("attention.split.fixed"),
            "SPLITS": -(-longest // segment),
            "MIN_SPLIT": 0,
            **(config or {}),
        }
        counters = None
    else:
        config = dict(config or (_split_config(dim) if codes is None else coded.config_of(dim, rows)))
    splits = config["SPLITS"]
    if ancestors is not None and workspace is not None and not mixed and (most := workspace.numel() // (heads * splits * (dim + 2))) < rows:
        require(most > 0, "the workspace is too small")
        for at in range(0, rows, most):  # many trees have more rows than any other step
            part = slice(at, at + most)
            decode_attention(
                q[part], k_cache, v_cache, block_tables if table_rows is not None else block_tables[part], kv_len[part], scale, window,
                softcap=softcap, sinks=sinks, table_rows=None if table_rows is None else table_rows[part], out=out[part],
                lse=None if lse is None else lse[part], workspace=workspace, counters=counters, deterministic=deterministic, codes=codes,
                ancestors=ancestors[part], config=given,
            )  # fmt: skip
        return out
    cells = rows * heads * splits
    if workspace is None:
        workspace = torch.empty(cells * (dim + 2), dtype=torch.float32, device=q.device)
    require(workspace.numel() >= cells * (dim + 2) and workspace.dtype == torch.float32, "the workspace is too small")
    partial, partial_lse, partial_z = workspace[: cells * dim], workspace[cells * dim :][:cells], workspace[cells * (dim + 1) :][:cells]
    scale2, soft = _scales(scale, softcap)
    # Triton 3.6 multiplies int8 rows of exactly 32 bytes wrongly on Hopper; padded ones, and FP8, it does not.
    least = 16 if codes is None or deterministic else 64 if codes.kind == "int8" else 32
    group, padded = heads // kv_heads, max(least, power(dim))
    block_m = max(16 if codes is None or deterministic else 4, power(group), config.pop("BLOCK_M", 0))
    fused = counters is not None and power(group) * splits * padded <= FUSED_ELEMENTS
    require(
        counters is None or (counters.dtype == torch.int32 and counters.numel() >= rows * kv_heads), "counters must be int32, [R * Hkv]"
    )
    common = {"WINDOW": window > 0, "SINKS": sinks is not None, "LSE": lse is not None, "MIXED": mixed}
    where = {"HEADS": heads, "GROUP": group, "D": dim, "DP": padded, "SIZE": k_cache.shape[2], "BLOCK_M": block_m, "SOFTCAP": softcap > 0}
    where |= {"ROWS": table_rows is not None, "FUSED": fused, "GROUP_P": power(group), **common}
    nodes = {"ancestors": ancestors, "TREE": ancestors is not None}
    settings = (soft, window, q.stride(0), block_tables.stride(0), k_cache.stride(0), k_cache.stride(1))
    if codes is not None and not deterministic:
        coded.split[(kv_heads, rows, splits)](
            q, k_cache, v_cache, codes.words, out, lse, partial, partial_lse, counters, block_tables, q_start, kv_len, table_rows,
            sinks, scale2, *settings, codes.words.stride(0), **coded.arguments(codes), **nodes, **where, **chained(), **{"AHEAD": 0, **config},
        )  # fmt: skip
    else:
        _split[(kv_heads, rows, splits)](
            q, k_cache, v_cache, out, lse, partial, partial_lse, partial_z, counters, block_tables, q_start, kv_len, table_rows, sinks, scale2,
            *settings, WIDE=interpreting() or q.dtype == torch.float32, SEGMENT=segment, **nodes,
            **({} if codes is None else coded.exact(codes, q.dtype)), **where, **chained(), **{"AHEAD": 0, **config},
        )  # fmt: skip
    if fused or splits == 1:
        return out
    sizes = {"HEADS": heads, "D": dim, "DP": padded, "BLOCK_N": config["BLOCK_N"], "SPLITS": splits, **common}
    if segment:
        _join[(rows, kv_heads)](
            out, lse, partial, partial_lse, partial_z, q_start, kv_len, sinks, window, GROUP=group, GROUP_P=power(group), SEGMENT=segment, **sizes,
            **nodes, num_warps=4, **chained(),
        )  # fmt: skip
    else:
        _combine[(rows, heads)](
            out,
            lse,
            partial,
            partial_lse,
            q_start,
            kv_len,
            sinks,
            window,
            MIN_SPLIT=config["MIN_SPLIT"],
            **sizes,
            **nodes,
            num_warps=2,
            **chained(),
        )
    return out


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, q_start: Tensor, kv_len: Tensor, scale: float, window: int = 0, *,
    num_decode: int = 0, softcap: float = 0.0, sinks: Tensor | None = None, table_rows: Tensor | None = None, out: Tensor | None = None,
    lse: Tensor | None = None, workspace: Tensor | None = None, counters: Tensor | None = None, deterministic: bool = False,
    new_k: Tensor | None = None, new_v: Tensor | None = None, codes: Codes | None = None, ancestors: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of a mixed step: the first `num_decode` sequences have one row each; see kernels/gpu.py. In deterministic mode no sequence of several rows is a tree."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    extras: dict[str, Any] = {"softcap": softcap, "sinks": sinks, "out": out, "lse": lse, "deterministic": deterministic, "codes": codes}
    extras["ancestors"] = None if deterministic else ancestors
    spaces: dict[str, Any] = {"workspace": workspace, "counters": counters}
    own: dict[str, Any] = {} if deterministic else {"new_k": new_k, "new_v": new_v}
    if num_decode < 0:
        extras["table_rows"] = table_rows
        alone = {**extras, "ancestors": ancestors}
        decode_attention(q, k_cache, v_cache, block_tables, kv_len, scale, window, q_start=q_start, **spaces, **alone)
        return ragged_attention(q, k_cache, v_cache, block_tables, q_start, kv_len, scale, window, mixed=True, **own, **extras)
    if num_decode:
        rows = None if table_rows is None else table_rows[:num_decode]
        part = {"out": out[:num_decode], "lse": None if lse is None else lse[:num_decode], "table_rows": rows}
        part["ancestors"] = None if ancestors is None else ancestors[:num_decode]
        decode_attention(q[:num_decode], k_cache, v_cache, block_tables, kv_len[:num_decode], scale, window, **spaces, **{**extras, **part})
    if num_decode < kv_len.shape[0]:
        extras["table_rows"] = None if table_rows is None else table_rows[num_decode:]
        tables = block_tables if table_rows is not None else block_tables[num_decode:]
        ragged_attention(q, k_cache, v_cache, tables, q_start[num_decode:], kv_len[num_decode:], scale, window, **own, **extras)
    return out


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor | None = None, lse: Tensor | None = None) -> Tensor:
    """Attention over the union of two disjoint key sets from (out [T, Hq, D], lse [T, Hq]) of each; at most one of them counted a sink."""
    out = torch.empty_like(out_a) if out is None else out
    cells, dim = lse_a.numel(), out_a.shape[-1]
    if cells:
        _merge[(cells,)](out_a, lse_a, out_b, lse_b, out, lse, D=dim, DP=power(dim), LSE=lse is not None, num_warps=1)
    return out
