"""Decode attention over a cache in 8 bits, in Triton: split KV as in triton.py, but the matrix units multiply the codes as they lie in memory.

    s[j, h] = k_scale[j] * (value(K[j]) . q[h]);   out[h] = sum_j (w_j v_scale[j]) value(V[j]) / sum_j w_j,   w_j = exp(f(scale * s[j, h]))

What it is: the kernel of one query row a sequence, where bits may depend on how the keys were cut (deterministic mode reads codes by triton.py's kernels).
Both products are computed transposed, keys or dimensions being the rows, and both are of 8-bit numbers, so that codes are never widened: whatever they are
multiplied with, a head's queries in units of a power of two or its probabilities, is a sum of two such numbers, which are two columns (`_halves`). For the
second product a value's codes lie in the page by dimension, [Hkv, D, block_size]. A value's scale enters the exponent, and a block of keys B has a maximum of
its own, so that what is rounded is measured by its neighbours alone and is as exact for any scales and however far apart blocks are:

    p_j = 2 ** (s_j + log2 v_scale[j] - m_B),  m_B = max_{j in B} (s_j + log2 v_scale[j])
    out = sum_B 2 ** m_B sum_{j in B} p_j value(V[j]) / sum_B 2 ** m_B sum_{j in B} p_j / v_scale[j]

Sums are float32 (integers within a block of int8), and each piece of a row has its own: no sum is as long as the context.
What it does not know: who owns a block, slots, layers.
Long: the kernel stands beside the numbers that it multiplies.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, disable-error-code="no-any-return, attr-defined"

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.attention.codes import KINDS, decode, encode
from penstock.kernels.attention.lines import place_of, shortened
from penstock.kernels.attention.pieces import add_up
from penstock.kernels.checks import require
from penstock.kernels.gpu import interpreting, tuned
from penstock.kernels.quantised.recipes import RECIPES
from penstock.kernels.tile import INTERPRETED, fetch_ahead, launched, make_room, narrow, wait

KV_LAYOUT = "paged-codes-v1"
"""Codes of keys [num_blocks, Hkv, block_size, D], of values [num_blocks, Hkv, D, block_size]; part of the KV identity key."""


MANY_ROWS, MOST_ROWS = 64, 192
"""Rows from which others of the tuned configurations hold."""


class Codes(NamedTuple):
    """What caches of uint8 hold."""

    kind: str
    """One of codes.KINDS."""
    scales: Tensor
    """[num_blocks, Hkv, block_size, 2 (K, V)] bfloat16, a block contiguous."""
    words: Tensor
    """The same as kernels read them, both at once: [num_blocks, Hkv, block_size] int32."""


def codes_of(kind: str, k_scale: Tensor) -> Codes:
    """In a page's room for a layer's scales: `k_scale` [num_blocks, Hkv, block_size], behind which there is as much for those of values. Here they lie in
    pairs."""
    blocks, heads, size = k_scale.shape
    scales = k_scale.as_strided((blocks, heads, size, 2), (k_scale.stride(0), 2 * size, 2, 1))
    return Codes(kind, scales, scales.view(torch.int32).squeeze(-1))


@triton.jit
def value_of(codes, KIND: tl.constexpr):
    """What bytes mean, as float32, for the interpreter."""
    code = codes.to(tl.int32)
    if KIND == "int8":
        return tl.where(code >= 128, code - 256, code).to(tl.float32)
    else:
        M: tl.constexpr = 3 if KIND == "fp8_e4m3" else 2
        BIAS: tl.constexpr = 7 if KIND == "fp8_e4m3" else 15
        exponent = (code & 127) >> M
        mantissa = (code & ((1 << M) - 1)).to(tl.float32) / (1 << M)
        size = tl.where(exponent == 0, mantissa * 2, 1 + mantissa) * tl.exp2((exponent - BIAS).to(tl.float32))
        size = tl.where((code & 127) >= (127 if KIND == "fp8_e4m3" else 124), float("nan"), size)
        return tl.where(code >= 128, -size, size)


@triton.jit
def widen(codes, KIND: tl.constexpr, RECIPE: tl.constexpr, BF16: tl.constexpr):
    """Bytes as numbers of the 16-bit dtype that the recipe makes; float32 under the interpreter."""
    if INTERPRETED:
        return value_of(codes, KIND)
    elif BF16:
        return tl.inline_asm_elementwise(RECIPE, "=r,=r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4)
    else:
        return tl.inline_asm_elementwise(RECIPE, "=r,=r,r", [codes], dtype=tl.float16, is_pure=True, pack=4)


@triton.jit
def scale_of(size, broken, fixed, LARGEST: tl.constexpr):
    """Scales of rows whose largest element is `size`, rounded up to bfloat16, as float32; NaN where `broken` is not 0. fixed: instead of their own."""
    if fixed is None:
        scale = tl.div_rn(tl.maximum(size, 7.888609052210118e-31), LARGEST)
    else:
        scale = size * 0.0 + fixed
    up = ((scale.to(tl.int32, bitcast=True) + 0xFFFF) & -0x10000).to(tl.float32, bitcast=True)
    return tl.where(broken == 0.0, up, float("nan"))


@triton.jit
def code_of(x, scale, KIND: tl.constexpr, LARGEST: tl.constexpr):
    """Codes of float32 x, which codes.encode defines: to nearest, ties to even, by integers, so that every device rounds alike."""
    y = tl.div_rn(x, scale)
    y = tl.where(y == y, y, 0.0)
    y = tl.minimum(tl.maximum(y, -LARGEST), LARGEST)
    if KIND == "int8":
        return ((y + 12582912.0).to(tl.int32, bitcast=True) & 255).to(tl.uint8)
    else:
        DROPPED: tl.constexpr = 20 if KIND == "fp8_e4m3" else 21  # bits of the mantissa
        BIAS: tl.constexpr = 120 if KIND == "fp8_e4m3" else 112  # of float32's exponents, less that of the kind
        MAGIC: tl.constexpr = 16384.0 if KIND == "fp8_e4m3" else 128.0  # its last bit is the kind's smallest number
        size = tl.abs(y)
        bits = size.to(tl.int32, bitcast=True)
        normal = ((bits + ((1 << (DROPPED - 1)) - 1) + ((bits >> DROPPED) & 1)) >> DROPPED) - (BIAS << (23 - DROPPED))
        small = (size + MAGIC).to(tl.int32, bitcast=True) & 15
        code = tl.where(bits < ((BIAS + 1) << 23), small, normal)
        return (code | ((y.to(tl.int32, bitcast=True) >> 24) & 128)).to(tl.uint8)


@triton.jit
def pages_of(table, at, limit, MASK: tl.constexpr, SIZE: tl.constexpr):
    """The page of each position, the same for 16 neighbours; page 0 for those that lie wholly at `limit` and beyond: it is read, and counts for nothing."""
    if MASK:
        page = tl.load(table + at // SIZE, mask=at // 16 * 16 < limit, other=0)
    else:
        page = tl.load(table + at // SIZE)
    return tl.max_constancy(page.to(tl.int64), [16])


@triton.jit
def scales_at(scales, page, sb, base, at, spot, limit, MASK: tl.constexpr, SIZE: tl.constexpr):
    """(of keys, of values), float32; 0 for positions at `limit` and beyond, where memory may hold NaN. One load of four bytes, which may be asynchronous. spot: where positions
    lie, as if the sequence's pages were one."""
    where = page * sb + base + spot % SIZE
    if MASK:
        both = tl.load(scales + where, mask=at < limit, other=0)
    else:
        both = tl.load(scales + where)
    return (both << 16).to(tl.float32, bitcast=True), (both & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _power(x):
    """Of each float32 above 0: (the power of two that is not larger, at least 2**-100; one over it)."""
    bits = tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, 27 << 23)
    return bits.to(tl.float32, bitcast=True), ((254 << 23) - bits).to(tl.float32, bitcast=True)


@triton.jit
def _e4m3(x):
    """float32 rounded to E4M3; float32 still under the interpreter, whose own cast is another."""
    if INTERPRETED:
        return value_of(code_of(x, x * 0.0 + 1.0, "fp8_e4m3", 448.0), "fp8_e4m3")
    else:
        return x.to(tl.float8e4nv)


@triton.jit
def _halves(x, KIND: tl.constexpr):
    """float32 x [N, M] of at most 256 (int8: 127) in size as pairs of 8-bit numbers [N, 16 or 2 M]: x = first + second / 16 (int8: 254). Matrix instructions
    want 16 columns: what is missing is zeros."""
    N: tl.constexpr = x.shape[0]
    M: tl.constexpr = x.shape[1]
    if KIND == "int8":
        near = x + 12582912.0
        rest = (x - (near - 12582912.0)) * 254.0 + 12582912.0
    else:
        near = _e4m3(x).to(tl.float32)
        rest = (x - near) * 16.0
    both = tl.reshape(tl.join(near, rest), (N, 2 * M))
    if M == 4:
        both = tl.reshape(tl.permute(tl.join(both, tl.zeros_like(both)), (0, 2, 1)), (N, 16))
    if KIND != "int8":
        return _e4m3(both)
    elif INTERPRETED:
        return both.to(tl.int32, bitcast=True).to(tl.int8).to(tl.float32)
    else:
        return both.to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _product(codes, halves, M: tl.constexpr, KIND: tl.constexpr):
    """codes [N, K] @ (what halves [K, 16 or 2 M] stand for): [N, M] float32. The matrix units keep some 14 bits of FP8's sums, so that they are carried
    on every 32 columns."""
    N: tl.constexpr = codes.shape[0]
    if INTERPRETED:
        both = tl.dot(value_of(codes, KIND), halves, input_precision="ieee")
    elif KIND == "int8":
        both = tl.dot(codes, halves, out_dtype=tl.int32)
    else:
        both = tl.dot(codes, halves, max_num_imprecise_acc=32)
    if M == 4:
        both, _ = tl.split(tl.permute(tl.reshape(both, (N, 2, 8)), (0, 2, 1)))
    first, second = tl.split(tl.reshape(both.to(tl.float32), (N, M, 2)))
    return first + second * (0.003937007874015748 if KIND == "int8" else 0.0625)


@triton.jit
def _typed(pointer, KIND: tl.constexpr):
    """A pointer to bytes as one to what they are."""
    if INTERPRETED:
        return pointer
    elif KIND == "int8":
        return pointer.to(tl.pointer_type(tl.int8))
    elif KIND == "fp8_e4m3":
        return pointer.to(tl.pointer_type(tl.float8e4nv))
    else:
        return pointer.to(tl.pointer_type(tl.float8e5))


@triton.jit
def _retyped(codes, KIND: tl.constexpr):
    """Bytes as what they are."""
    if INTERPRETED:
        return codes
    elif KIND == "int8":
        return codes.to(tl.int8, bitcast=True)
    elif KIND == "fp8_e4m3":
        return codes.to(tl.float8e4nv, bitcast=True)
    else:
        return codes.to(tl.float8e5, bitcast=True)


@triton.jit
def _keys(
    acc, m, z, q, to2, k, v, scales, table, base, sbase, length, start, end, soft, window, kb, sb, D: tl.constexpr, DP: tl.constexpr,
    SIZE: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, KIND: tl.constexpr, word=None, place=0, LINE: tl.constexpr = False,
):  # fmt: skip
    """Fold the key blocks of [start, end) into acc [DP, M], m [M] in base-2 units and z [BLOCK_N, M], which is summed up at the end; q is [DP, 2 M],
    halves of what to2 [M] makes scores in base-2 units (SOFTCAP: of the softcap). Acc and z are 2**(m - TOP) times smaller than they say. Without WINDOW page
    numbers are read a block ahead, so that no load waits for another, and codes behind the last key are read too, as whatever numbers they are: a
    block that was masked as it is loaded would be a pipeline of its own. LINE: a key's position is not its place (lines.py)."""
    d = tl.arange(0, DP)
    n = tl.arange(0, BLOCK_N)
    TOP: tl.constexpr = 6.988684686772166 if KIND == "int8" else 8.0
    FEW: tl.constexpr = BLOCK_N // SIZE if BLOCK_N > SIZE else 1
    few = tl.arange(0, FEW)
    AHEAD: tl.constexpr = not WINDOW and not LINE
    if AHEAD:
        following = tl.load(table + start // SIZE + few, mask=few * SIZE < end - start, other=0)
    for first in range(start, end, BLOCK_N):
        at = first + n
        spot = at
        if AHEAD:
            page = tl.reshape(tl.broadcast_to(following[:, None], (FEW, BLOCK_N // FEW)), (BLOCK_N,))
            page = tl.max_constancy(page.to(tl.int64), [16])
            after = first + BLOCK_N + few * SIZE
            following = tl.load(table + after // SIZE, mask=after < end, other=0)
            inside = tl.max_contiguous(tl.multiple_of(at % SIZE, [16]), [16])
        elif LINE:
            spot = place_of(word, place, at)
            page = tl.load(table + spot // SIZE, mask=at < length, other=0).to(tl.int64)
            inside = spot % SIZE
        else:
            page = pages_of(table, at, length, True, SIZE)
            inside = tl.max_contiguous(tl.multiple_of(at % SIZE, [16]), [16])
        where = (page * kb + base + inside * D)[:, None] + d[None, :]
        where_v = (page * kb + base + inside)[None, :] + (d * SIZE)[:, None]
        if not LINE:
            where_v = tl.max_contiguous(tl.multiple_of(where_v, [1, 16]), [1, 16])
        if not AHEAD:
            if DP == D:
                codes = tl.load(k + where)
                more = tl.load(v + where_v)
            else:
                codes = tl.load(k + where, mask=(d < D)[None, :], other=0)
                more = tl.load(v + where_v, mask=(d < D)[:, None], other=0)
            codes = _retyped(tl.where((at < length)[:, None], codes, 0), KIND)
            more = _retyped(tl.where((at < length)[None, :], more, 0), KIND)
        elif DP == D:
            codes = tl.load(_typed(k, KIND) + where)
            more = tl.load(_typed(v, KIND) + where_v)
        else:
            codes = tl.load(_typed(k, KIND) + where, mask=(d < D)[None, :], other=0.0)
            more = tl.load(_typed(v, KIND) + where_v, mask=(d < D)[:, None], other=0.0)
        k_scale, v_scale = scales_at(scales, page, sb, sbase, at, spot, length, not AHEAD, SIZE)
        s = _product(codes, q, m.shape[0], KIND) * k_scale[:, None] * to2[None, :]
        if SOFTCAP:
            s = (soft * 1.4426950408889634) * (1.0 - 2.0 / (1.0 + tl.exp2(s)))
        seen = at < length
        if WINDOW:
            seen = seen & (at >= length - window)
        # 2**-70: z must not overflow where all values are 0. Scales behind the last key may be anything.
        v_scale = tl.where((v_scale < 8.470329472543003e-22) | ~seen, 8.470329472543003e-22, v_scale)
        log_scale = tl.log2(v_scale)
        s = tl.where(seen[:, None], s + log_scale[:, None], float("-inf"))
        here = tl.max(s, 0)
        top = tl.maximum(m, here)
        shift = top
        if WINDOW:
            shift = tl.where(top == float("-inf"), 0.0, top)
            here = tl.where(here == float("-inf"), shift, here)
        p = tl.exp2(s - (here - TOP)[None, :])
        fade = tl.exp2(m - shift)
        gain = tl.exp2(here - shift)
        z = z * fade[None, :] + p * gain[None, :] * tl.exp2(-log_scale)[:, None]
        acc = acc * fade[None, :] + _product(more, _halves(p, KIND), m.shape[0], KIND) * gain[None, :]
        m = top
    return acc, m, z


@launched(do_not_specialize=["window"], do_not_specialize_on_alignment=["kv_len", "table_rows", "tables"])
def split(
    q, k, v, scales, out, lse, partial, partial_lse, counters, tables, q_start, kv_len, table_rows, sinks, scale2, soft, window, q_stride,
    table_stride, kb, kh, sb, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, MIN_SPLIT: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr, LSE: tl.constexpr, ROWS: tl.constexpr, AHEAD: tl.constexpr, MIXED: tl.constexpr, FUSED: tl.constexpr,
    GROUP_P: tl.constexpr, KIND: tl.constexpr, PDL: tl.constexpr, ancestors=None, TREE: tl.constexpr = False,
):  # fmt: skip
    """Grid (Hkv, R, SPLITS): triton.py's `_split` with both products transposed. Pieces, masks and the last one's sum are the same."""
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
    word = None
    if TREE:
        word = tl.load(ancestors + row, cache_modifier=".cg")
        length = shortened(length, word)
    base = group.to(tl.int64) * kh
    sbase = group * SIZE
    low = 0
    if WINDOW:
        low = tl.maximum(length - window, 0) // BLOCK_N * BLOCK_N
    span = length - low
    size = tl.maximum(tl.cdiv(tl.cdiv(span, SPLITS), BLOCK_N) * BLOCK_N, MIN_SPLIT)
    start = low + piece * size
    if PDL and AHEAD:  # noqa: SIM102 (known when compiled, the inner one is not)
        if start < length:
            token = start + tl.arange(0, BLOCK_N)
            page = pages_of(table, token, length, True, SIZE)
            line = tl.minimum(tl.arange(0, (DP + 127) // 128) * 128, D - 1)
            fetch_ahead(k + (page * kb + base + token % SIZE * D)[:, None] + line[None, :])
            fetch_ahead(v + (page * kb + base + token % SIZE * D)[:, None] + line[None, :])
    wait(PDL)
    if ((start < length) | (piece == 0)) & mine:
        end = tl.minimum(start + size, length)
        offs = tl.arange(0, BLOCK_M)
        d = tl.arange(0, DP)
        real = offs < GROUP
        head = group * GROUP + offs
        tile_mask = (d < D)[:, None] & real[None, :]
        queries = tl.load(q + row * q_stride + (head * D)[None, :] + d[:, None], mask=tile_mask, other=0.0)
        unit, inverse = _power(tl.max(tl.abs(queries.to(tl.float32)), 0))
        MOST: tl.constexpr = 63.5 if KIND == "int8" else 128.0
        queries = _halves(queries.to(tl.float32) * (inverse * MOST)[None, :], KIND)
        to2 = unit * (scale2 / MOST)
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        parts = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        acc = tl.zeros([DP, BLOCK_M], tl.float32)
        whole = end
        if TREE:  # what lies 64 and more before the row's own place lies at its position
            whole = start + tl.maximum(tl.minimum(end, place - 63) - start, 0) // BLOCK_N * BLOCK_N
        acc, m, parts = _keys(
            acc, m, parts, queries, to2, k, v, scales, table, base, sbase, length, start, whole, soft, window, kb, sb, D, DP, SIZE, BLOCK_N, WINDOW, SOFTCAP, KIND,
        )  # fmt: skip
        if TREE:
            acc, m, parts = _keys(
                acc, m, parts, queries, to2, k, v, scales, table, base, sbase, length, whole, end, soft, window, kb, sb, D, DP, SIZE, BLOCK_N, WINDOW, SOFTCAP, KIND,
                word, place, True,
            )  # fmt: skip
        z = tl.sum(parts, 0)
        TOP: tl.constexpr = 6.988684686772166 if KIND == "int8" else 8.0
        if SINKS and span <= size:
            sink = tl.load(sinks + head, mask=real, other=0.0) * 1.4426950408889634
            top = tl.maximum(m, sink)
            fade = tl.exp2(m - top)
            z = z * fade + tl.exp2(sink - top + TOP)
            acc = acc * fade[None, :]
            m = top
        some = z != 0.0  # a sum that is no number stays one
        safe = tl.where(some, z, 1.0)
        result = acc / safe[None, :]
        total = tl.where(some, m - TOP + tl.log2(safe), float("-inf"))
        if span <= size:
            tl.store(out + row * HEADS * D + (head * D)[None, :] + d[:, None], narrow(result, out.dtype.element_ty), mask=tile_mask)
            if LSE:
                tl.store(lse + row * HEADS + head, total * 0.6931471805599453, mask=real)
        else:
            at = (r * HEADS + head).to(tl.int64) * SPLITS + piece
            tl.store(partial + (at * D)[None, :] + d[:, None], result, mask=tile_mask)
            tl.store(partial_lse + at, total, mask=real)
            if FUSED:
                tl.debug_barrier()
                pieces = tl.cdiv(span, size)
                counter = counters + r * (HEADS // GROUP) + group
                if tl.atomic_add(counter, 1, sem="acq_rel") == pieces - 1:
                    tl.store(counter, 0)
                    add_up(out, lse, partial, partial_lse, sinks, r, row, group, pieces, HEADS, GROUP, GROUP_P, D, DP, SPLITS, SINKS, LSE)


def write_kv(k_cache: Tensor, v_cache: Tensor, codes: Codes, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """k, v [T, Hkv, D] into slots [T] (below 0: skipped). Torch; for tests and tools."""
    keep, size = slots >= 0, k_cache.shape[2]
    at, inside = slots[keep].long() // size, slots[keep].long() % size
    k_cache[at, :, inside], codes.scales[at, :, inside, 0] = encode(k[keep], codes.kind)
    by_dimension(v_cache)[at, :, :, inside], codes.scales[at, :, inside, 1] = encode(v[keep], codes.kind)


def read_kv(k_cache: Tensor, v_cache: Tensor, codes: Codes, slots: Tensor) -> tuple[Tensor, Tensor]:
    """(keys, values) at slots [T], two [T, Hkv, D] float32. Torch; for tests and tools."""
    size = k_cache.shape[2]
    at, inside = slots.long() // size, slots.long() % size
    keys = decode(k_cache[at, :, inside], codes.scales[at, :, inside, 0], codes.kind)
    return keys, decode(by_dimension(v_cache)[at, :, :, inside], codes.scales[at, :, inside, 1], codes.kind)


def by_dimension(v_cache: Tensor) -> Tensor:
    """A cache of values [num_blocks, Hkv, block_size, D] as what it holds: [num_blocks, Hkv, D, block_size]."""
    blocks, heads, size, dim = v_cache.shape
    return v_cache.as_strided((blocks, heads, dim, size), (v_cache.stride(0), v_cache.stride(1), size, 1))


def check(codes: Codes, q: Tensor, k_cache: Tensor) -> None:
    """Raises ValueError unless the scales fit."""
    require(codes.kind in KINDS, f"codes must be one of {', '.join(KINDS)}")
    require(interpreting() or q.dtype in (torch.bfloat16, torch.float16), "with codes q must be bfloat16 or float16")
    scales, size = codes.scales, k_cache.shape[2]
    require(
        scales.dtype == torch.bfloat16 and scales.shape == (*k_cache.shape[:3], 2),
        "scales must be bfloat16, [num_blocks, Hkv, block_size, 2]",
    )
    require(scales.stride()[1:] == (2 * size, 2, 1) and scales.stride(0) % 2 == 0, "a block's scales must be contiguous")


def config_of(dim: int, rows: int) -> dict[str, int]:
    """Of `split`. Few rows fill the device in many pieces (TARGET of all rows together); many do so by themselves, and are cut only where one is so long that
    the others would wait for it."""
    name = ".wide" if dim > 128 else ".most" if rows >= MOST_ROWS else ".many" if rows >= MANY_ROWS else ""
    config = dict(tuned("attention.coded" + name))
    target, most = config.pop("TARGET", 0), config.pop("MAX_SPLITS", 0)
    if "SPLITS" not in config:
        config["SPLITS"] = max(4, min(most, 1 << (max(1, target // rows).bit_length() - 1)))
        config["MIN_SPLIT"] = max(config["BLOCK_N"], 2048 // config["SPLITS"])
    return config


def most_pieces(dim: int, rows: int) -> int:
    """Of all rows together, however many of `rows` there are."""
    return max((count * config_of(dim, count)["SPLITS"] for count in range(1, rows + 1)), default=0)


def exact(codes: Codes, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of triton.py's kernels."""
    k_recipe, v_recipe = RECIPES[codes.kind, dtype == torch.bfloat16], RECIPES[codes.kind, True]
    words = codes.words
    return {"scales": words, "sb": words.stride(0), "KIND": codes.kind, "K_RECIPE": k_recipe, "V_RECIPE": v_recipe}


def arguments(codes: Codes) -> dict[str, Any]:
    """What `split` has to know of the codes."""
    return {"KIND": codes.kind}
