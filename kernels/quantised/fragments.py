"""Matmuls with a weight whose codes lie in the order of the matrix unit's registers, in Triton.

    y[m, n] = round(sum_g scales[g, n] * sum_{k in g} x[m, k] (value(code[n, k]) - zero[g, n]) + bias[n]),   x in bf16 or fp16, float32 sums

What it is: `product`, and `widen`, which writes rows of the weight in full width. A tile of the product is computed transposed: the weight's rows are the rows of the
matrix instruction, whose first operand may lie in registers. A thread reads sixteen bytes of codes, and they are the elements that the instruction wants of that
thread (layout.py has the order), so that codes are widened where they arrive (recipes.py) and never move between threads: the reshapes below cost nothing. The idea of
such an order is Marlin's (Frantar et al. 2024, arXiv 2408.11743). Up to EXACT rows scales multiply the float32 sums of a group, and a weight is never rounded. With more
rows that would make the matrix unit wait: there scales multiply the values, which are rounded once, as those of a widened weight are. Powers of two (MXFP4) multiply the
values exactly for any rows. The K axis is cut as in kernels/linear/triton.py: pieces in a fixed order, whoever comes last adds them up.
It is long because all kinds of codes and scales share one loop.
What it does not know: layers, files, when to widen.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, disable-error-code="no-any-return"

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from penstock.kernels.activation.triton import KINDS as ACTIVATIONS
from penstock.kernels.activation.triton import activate
from penstock.kernels.checks import require
from penstock.kernels.gpu import chained, interpreting, tuned
from penstock.kernels.linear.scheme import NF4 as NF4_VALUES
from penstock.kernels.linear.triton import COUNTERS
from penstock.kernels.quantised.layout import KINDS, LINE, ROWS_OF_TILE, Weight
from penstock.kernels.quantised.recipes import RECIPES
from penstock.kernels.tile import INTERPRETED, fetch_ahead, follow, launched, narrow

HEIGHTS = (16, 32, 64, 128)
"""Heights of a tile: rows of x."""
EXACT = HEIGHTS[-1]
"""Most rows for which a weight is never rounded."""
EVEN_HEIGHTS = (16, 32, 64)
"""Those whose sums have the same bits."""


NF4 = tl.constexpr(NF4_VALUES)


@triton.jit
def _table(code, KIND: tl.constexpr):
    """Codes as float32, for the interpreter."""
    if KIND == 0:
        return tl.where(code >= 128, code - 256, code).to(tl.float32)
    elif KIND == 1:
        return code.to(tl.float32) - 8
    elif KIND == 2:
        exponent = (code >> 3) & 15
        mantissa = (code & 7).to(tl.float32) / 8
        size = tl.where(exponent == 0, mantissa * 0.015625, (1 + mantissa) * tl.exp2((exponent - 7).to(tl.float32)))
        return tl.where(code >= 128, -size, size)
    elif KIND == 3:
        exponent = (code >> 1) & 3
        mantissa = (code & 1).to(tl.float32)
        size = tl.where(exponent == 0, 0.5 * mantissa, (1 + 0.5 * mantissa) * tl.exp2((exponent - 1).to(tl.float32)))
        return tl.where(code >= 8, -size, size)
    elif KIND == 4:
        value = tl.zeros(code.shape, tl.float32)
        for index in tl.static_range(16):
            value = tl.where(code == index, NF4[index], value)
        return value
    else:
        exponent = (code >> 2) & 31
        mantissa = (code & 3).to(tl.float32) / 4
        size = tl.where(exponent == 0, mantissa * 2.0**-14, (1 + mantissa) * tl.exp2((exponent - 15).to(tl.float32)))
        return tl.where(code >= 128, -size, size)


@triton.jit
def _of_rows(first, second, like: tl.constexpr, T: tl.constexpr, U: tl.constexpr, W: tl.constexpr):
    """One value a row [T, U or 1, W, 8], of the first and the second eight rows of sixteen -> the codes' shape."""
    both = tl.join(first, second).to(like)
    return tl.broadcast_to(tl.reshape(both, [T, first.shape[1], W, 8, 1, 1, 1, 2, 1]), [T, U, W, 8, 4, 2, 2, 2, 2])


@triton.jit
def raised_zero(zero, like: tl.constexpr):
    """128 (fp16: 1024) + zero, int16 -> like: the zero point is in the mantissa."""
    if INTERPRETED:
        return (zero.to(tl.float32) + (128 if like == tl.bfloat16 else 1024)).to(like)
    elif like == tl.bfloat16:
        return (zero.to(tl.int16) | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return (zero.to(tl.int16) | 0x6400).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _power(byte, like: tl.constexpr):
    """2^(byte - 127) in bfloat16, 0 for 0."""
    if INTERPRETED:
        return tl.where(byte == 0, 0.0, tl.exp2(byte.to(tl.float32) - 127))
    else:
        return (byte.to(tl.int16) << 7).to(tl.bfloat16, bitcast=True)


@triton.jit
def _scaled(value, large, small, like: tl.constexpr):
    """For the interpreter: times large + small, rounded, where they are there."""
    if large is not None:
        value = narrow(value * (large.to(tl.float32) + small.to(tl.float32)), like).to(tl.float32)
    return value


@triton.jit
def halves(codes, less, large, small, like: tl.constexpr, KIND: tl.constexpr, RECIPE: tl.constexpr):
    """Bytes of two codes -> the values of both. less: 128 (fp16: 1024) and the zero point; large, small: the two parts of a scale."""
    if INTERPRETED:
        low, high = _table((codes & 15).to(tl.int32), KIND), _table((codes >> 4).to(tl.int32), KIND)
        if less is not None:
            zero = less.to(tl.float32) - (8 + (128 if like == tl.bfloat16 else 1024))
            low, high = low - zero, high - zero
        return _scaled(low, large, small, like), _scaled(high, large, small, like)
    elif less is not None and large is not None:
        return tl.inline_asm_elementwise(
            RECIPE, "=r,=r,=r,=r,r,r,r,r,r,r,r", [codes, less, large, small], dtype=(like.value, like.value), is_pure=True, pack=4
        )
    elif less is not None:
        return tl.inline_asm_elementwise(RECIPE, "=r,=r,=r,=r,r,r,r", [codes, less], dtype=(like.value, like.value), is_pure=True, pack=4)
    elif large is not None:
        return tl.inline_asm_elementwise(
            RECIPE, "=r,=r,=r,=r,r,r,r,r,r", [codes, large, small], dtype=(like.value, like.value), is_pure=True, pack=4
        )
    else:
        return tl.inline_asm_elementwise(RECIPE, "=r,=r,=r,=r,r", [codes], dtype=(like.value, like.value), is_pure=True, pack=4)


@triton.jit
def _raised(codes, low_power, high_power, like: tl.constexpr, KIND: tl.constexpr, RECIPE: tl.constexpr):
    """Bytes of two codes -> the values of both times powers of two."""
    if INTERPRETED:
        low, high = _table((codes & 15).to(tl.int32), KIND), _table((codes >> 4).to(tl.int32), KIND)
        return low * low_power.to(tl.float32), high * high_power.to(tl.float32)
    else:
        return tl.inline_asm_elementwise(
            RECIPE, "=r,=r,=r,=r,r,r,r,r,r", [codes, low_power, high_power], dtype=(like.value, like.value), is_pure=True, pack=4
        )


@triton.jit
def whole(codes, large, small, like: tl.constexpr, KIND: tl.constexpr, RECIPE: tl.constexpr):
    """Bytes of one code -> its value, as `halves`."""
    if INTERPRETED:
        return _scaled(_table(codes.to(tl.int32), KIND), large, small, like)
    elif large is not None:
        return tl.inline_asm_elementwise(RECIPE, "=r,=r,r,r,r,r,r", [codes, large, small], dtype=like.value, is_pure=True, pack=4)
    else:
        return tl.inline_asm_elementwise(RECIPE, "=r,=r,r", [codes], dtype=like.value, is_pure=True, pack=4)


@launched(do_not_specialize=["M"])
def _matmul(
    x, box_x, w, box_w, scales, zeros, bias, out, counters, partial, M, N, K, UNITS, GROUPS, w_tile, w_unit, x_stride, out_stride,
    KIND: tl.constexpr, RECIPE: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, U: tl.constexpr, GROUP: tl.constexpr, POWERS: tl.constexpr,
    SPLITS: tl.constexpr, EVEN: tl.constexpr, ROUNDED: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, ACT: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(N / BLOCK_N) * ceil(M / ROWS), SPLITS), the rows of x first. w [tiles, UNITS, 32, 128] bytes; scales [tiles, GROUPS, 128] and zeros [tiles, GROUPS, 64 pairs]; GROUP 0: one a row.
    U: units in a step. ROUNDED: values are multiplied by their scale and rounded. POWERS: scales are exponents of groups of 32, KIND's codes two a byte.
    GATED: rows of w alternate gate, up."""
    NIBBLE: tl.constexpr = (KIND == 1) or (KIND == 3) or (KIND == 4)
    UNIT: tl.constexpr = 64 if NIBBLE else 32
    WIDTH: tl.constexpr = U * UNIT
    HALVES: tl.constexpr = NIBBLE and GROUP == 32 and not POWERS
    SUMS: tl.constexpr = GROUP > 0 and not POWERS and not HALVES and not ROUNDED  # a group's sums are multiplied by its scale
    GROUPED: tl.constexpr = U if GROUP > 0 and WIDTH > GROUP else 1  # groups in a step, or their parts
    T: tl.constexpr = BLOCK_N // 128 if BLOCK_N > 128 else 1
    W: tl.constexpr = BLOCK_N // 16 // T
    heights = tl.cdiv(M, ROWS)
    column = tl.program_id(0) // heights
    top = tl.program_id(0) % heights * ROWS
    piece = tl.program_id(1)
    tile = column * BLOCK_N // 128
    line = column * BLOCK_N % 128 // 4
    steps = tl.cdiv(UNITS // U, SPLITS)
    first = piece * steps
    last = tl.minimum(first + steps, UNITS // U)
    if PDL and AHEAD > 0:
        ahead = tl.arange(0, AHEAD)
        unit = tl.minimum(first * U + ahead // (4 * W), UNITS - 1)
        fetch_ahead(w + tile.to(tl.int64) * w_tile + unit.to(tl.int64) * w_unit + (line + ahead % (4 * W)) * 128)
    follow(PDL)
    m = top + tl.arange(0, ROWS)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    here = m < M
    like = x.dtype.element_ty
    tiles = tl.minimum(tile + tl.arange(0, T), (N - 1) // 128).to(tl.int64)
    bytes_ = tl.arange(0, U).to(tl.int64)[None, :, None] * w_unit + tl.arange(0, W * 512)[None, None, :]
    w_step = tl.full([], U, tl.int64) * w_unit
    rows = w + (tiles * w_tile + line * 128)[:, None, None] + bytes_
    left = x + tl.where(here, m, 0).to(tl.int64)[:, None] * x_stride
    k = tl.arange(0, WIDTH)
    half = tl.arange(0, 32)
    of_row = tl.minimum(n // 128, (N - 1) // 128).to(tl.int64) * GROUPS * 128 + n % 128
    eights = (
        (tiles * GROUPS * 128 + column * BLOCK_N % 128)[:, None, None, None]
        + (tl.arange(0, W) * 16)[None, None, :, None]
        + tl.arange(0, 8)[None, None, None, :]
    )
    pairs = (
        (tiles * GROUPS * (32 if POWERS else 64) + column * BLOCK_N % 128 // 2)[:, None, None, None]
        + (tl.arange(0, W) * 8)[None, None, :, None]
        + tl.arange(0, 8)[None, None, None, :]
    )
    parts = tl.arange(0, GROUPED) * UNIT
    first_group = first * WIDTH // GROUP if GROUP > 0 else 0
    if SUMS:
        s = tl.load(scales + of_row + first_group * 128).to(tl.float32)
    if GROUP > 0:
        groups = ((first * WIDTH + parts) // GROUP)[None, :, None, None]
    else:
        groups = parts[None, :, None, None]
    if zeros is not None and not HALVES:
        z = tl.load(zeros + pairs + groups * 64)
    if ROUNDED:
        o = tl.load(scales + eights + groups * 128).to(tl.float32)
        oo = tl.load(scales + eights + groups * 128 + 8).to(tl.float32)
    if POWERS:
        e = tl.load(scales + pairs + ((first * U + tl.arange(0, U)) * 64)[None, :, None, None])
    acc = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for step in range(first, last):
        if box_w is not None:
            codes = box_w.load([tile, step * U, line, 0])
        else:
            codes = tl.load(rows + step * w_step)
        at = step * WIDTH
        if not HALVES:
            if box_x is not None:
                a = box_x.load([top, at])
            elif EVEN:
                a = tl.load(left + (at + k)[None, :], mask=here[:, None], other=0.0)
            else:
                a = tl.load(left + (at + k)[None, :], mask=here[:, None] & (at + k < K)[None, :], other=0.0)
            if INTERPRETED:
                a = a.to(tl.float32)
        group = (at + WIDTH) // GROUP if GROUP > 0 else 0  # of the next step, whose scales are asked for now
        group = tl.minimum(group, GROUPS - 1)
        codes = tl.reshape(codes, [T, U, W, 8, 4, 2, 2, 2, 2])
        large = None
        small = None
        less = None
        if ROUNDED:
            large = _of_rows(o, oo, like, T, U, W)
            small = _of_rows(o - o.to(like).to(tl.float32), oo - oo.to(like).to(tl.float32), like, T, U, W)
        if zeros is not None and not HALVES:
            less = _of_rows(raised_zero(z & 255, like), raised_zero((z >> 8) & 255, like), like, T, U, W)
        if GROUP > 0 and not HALVES:  # of the next step
            groups = ((tl.minimum(step + 1, last - 1) * WIDTH + parts) // GROUP)[None, :, None, None]
            if zeros is not None:
                z = tl.load(zeros + pairs + groups * 64)
            if ROUNDED:
                o = tl.load(scales + eights + groups * 128).to(tl.float32)
                oo = tl.load(scales + eights + groups * 128 + 8).to(tl.float32)
        if NIBBLE:
            if POWERS:
                powers = _of_rows(_power(e & 255, like), _power((e >> 8) & 255, like), like, T, U, W)
                more = _of_rows(_power((e >> 16) & 255, like), _power((e >> 24) & 255, like), like, T, U, W)
                low, high = _raised(codes, powers, more, like, KIND, RECIPE)
                e = tl.load(scales + pairs + ((tl.minimum(step + 1, last - 1) * U + tl.arange(0, U)) * 64)[None, :, None, None])
            else:
                low, high = halves(codes, less, large, small, like, KIND, RECIPE)
            if HALVES:
                low = tl.reshape(tl.permute(low, (0, 2, 7, 3, 1, 5, 6, 4, 8)), [BLOCK_N, 32])
                high = tl.reshape(tl.permute(high, (0, 2, 7, 3, 1, 5, 6, 4, 8)), [BLOCK_N, 32])
            else:
                value = tl.permute(tl.join(low, high), (0, 2, 7, 3, 1, 9, 5, 6, 4, 8))
        else:
            value = tl.permute(whole(codes, large, small, like, KIND, RECIPE), (0, 2, 7, 3, 1, 5, 6, 4, 8))
        if HALVES:
            a = tl.load(left + (at + half)[None, :], mask=here[:, None] & (at + half < K)[None, :], other=0.0)
            b = tl.load(left + (at + 32 + half)[None, :], mask=here[:, None] & (at + 32 + half < K)[None, :], other=0.0)
            if INTERPRETED:
                a, b = a.to(tl.float32), b.to(tl.float32)
            s = tl.load(scales + of_row + step * 256).to(tl.float32)
            t = tl.load(scales + of_row + step * 256 + 128).to(tl.float32)
            p, q = tl.dot(low, tl.trans(a)), tl.dot(high, tl.trans(b))
            if zeros is not None:  # kept out of the values: few weights have such groups and zero points
                half_row = tl.minimum(n // 128, (N - 1) // 128).to(tl.int64) * GROUPS * 64 + n % 128 // 16 * 8 + n % 8
                z = (tl.load(zeros + half_row + step * 128) >> (n % 16 // 8 * 8).to(tl.int16)) & 255
                zz = (tl.load(zeros + half_row + step * 128 + 64) >> (n % 16 // 8 * 8).to(tl.int16)) & 255
                p += (8.0 - z.to(tl.float32))[:, None] * tl.sum(a.to(tl.float32), 1)[None, :]
                q += (8.0 - zz.to(tl.float32))[:, None] * tl.sum(b.to(tl.float32), 1)[None, :]
            acc += p * s[:, None]
            acc += q * t[:, None]
        else:
            value = tl.reshape(value, [BLOCK_N, WIDTH])
            if SUMS:
                following = tl.load(scales + of_row + group * 128).to(tl.float32)
                acc += tl.dot(value, tl.trans(a)) * s[:, None]
                s = following
            else:
                acc = tl.dot(value, tl.trans(a), acc)
    if GROUP == 0:
        acc *= tl.load(scales + of_row).to(tl.float32)[:, None]
    final = True
    inside = here[None, :] & (n < N)[:, None]
    if SPLITS > 1:
        cells = partial + (m.to(tl.int64)[None, :] * N + n[:, None])
        tl.store(cells + piece.to(tl.int64) * M * N, acc, mask=inside)
        tl.debug_barrier()
        counter = counters + tl.program_id(0)
        final = tl.atomic_add(counter, 1, sem="acq_rel") == SPLITS - 1
        if final:
            acc = tl.zeros([BLOCK_N, ROWS], tl.float32)
            for other in tl.static_range(SPLITS):
                acc += tl.load(cells + tl.full([], other, tl.int64) * M * N, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(counter, 0)
    if final:
        dtype = out.dtype.element_ty
        if BIAS:
            acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        if GATED:
            two = tl.permute(tl.reshape(narrow(acc, dtype).to(tl.float32), (BLOCK_N // 2, 2, ROWS)), (0, 2, 1))
            gate, up = tl.split(two)
            result = narrow(narrow(activate(gate, ACT), dtype).to(tl.float32) * up, dtype)
            j = column * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            tl.store(out + m.to(tl.int64)[None, :] * out_stride + j[:, None], result, mask=here[None, :] & (j < N // 2)[:, None])
        else:
            tl.store(out + m.to(tl.int64)[None, :] * out_stride + n[:, None], narrow(acc, dtype), mask=inside)


@launched
def _widen(
    w, scales, zeros, out, FIRST, N, K, GROUPS, w_tile, w_unit, ROWS_OUT,
    KIND: tl.constexpr, RECIPE: tl.constexpr, U: tl.constexpr, GROUP: tl.constexpr, EXPONENTS: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, UNITS / U). Tile FIRST + i of w -> rows 128 i and on of out [ROWS_OUT, K]; GATED: even rows to the first half, odd ones to the second."""
    NIBBLE: tl.constexpr = (KIND == 1) or (KIND == 3) or (KIND == 4)
    UNIT: tl.constexpr = 64 if NIBBLE else 32
    WIDTH: tl.constexpr = U * UNIT
    SMALL: tl.constexpr = WIDTH if GROUP == 0 or WIDTH < GROUP else GROUP
    step = tl.program_id(1)
    tile = (FIRST + tl.program_id(0)).to(tl.int64)
    like = out.dtype.element_ty
    follow(PDL)
    source = w + tile * w_tile + step.to(tl.int64) * U * w_unit
    codes = tl.load(source + tl.arange(0, U).to(tl.int64)[:, None] * w_unit + tl.arange(0, 4096)[None, :])
    codes = tl.reshape(codes, [U, 8, 8, 4, 2, 2, 2, 2])
    if NIBBLE:
        low, high = halves(codes, None, None, None, like, KIND, RECIPE)
        value = tl.permute(tl.join(low, high), (1, 6, 2, 0, 8, 4, 5, 3, 7))
    else:
        value = tl.permute(whole(codes, None, None, like, KIND, RECIPE), (1, 6, 2, 0, 4, 5, 3, 7))
    value = tl.reshape(value, [128, WIDTH // SMALL, SMALL]).to(tl.float32)
    r = tl.arange(0, 128)
    g = step * WIDTH // GROUP if GROUP > 0 else 0
    groups = (g + tl.arange(0, WIDTH // SMALL))[None, :]
    paired = r // 16 * 16 + r % 8 * 2 + r % 16 // 8
    if zeros is not None:
        value += (8 - tl.load(zeros + (tile * GROUPS + groups) * 128 + paired[:, None]).to(tl.float32))[:, :, None]
    if EXPONENTS:
        quad = r // 16 * 32 + r % 8 * 4 + r % 16 // 8
        s = tl.exp2(tl.load(scales + tile * GROUPS * 128 + groups // 2 * 256 + groups % 2 * 2 + quad[:, None]).to(tl.float32) - 127)
    else:
        s = tl.load(scales + (tile * GROUPS + groups) * 128 + r[:, None])
    value = tl.reshape(narrow(value * s.to(tl.float32)[:, :, None], like), [128, WIDTH])
    row = tl.program_id(0) * 128 + r
    if GATED:
        row = row // 2 + (row % 2) * (ROWS_OUT // 2)
    k = step * WIDTH + tl.arange(0, WIDTH)
    tl.store(out + row.to(tl.int64)[:, None] * K + k[None, :], value, mask=(tile * 128 + r < N)[:, None] & (k < K)[None, :])


def splits_of(tiles: int, steps: int, config: dict[str, int]) -> int:
    """Pieces of the K axis, at least two steps each. Depends on shapes only."""
    return max(1, min(config["MAX_SPLITS"], config["TARGET"] // tiles, steps // 2))


def units_of_step(weight: Weight, most: int, rounded: bool) -> int:
    """As many as a group has, `most` columns at most."""
    unit, group = weight.unit, weight.scheme.group
    units = max(1, (min(most, group) if group and not weight.exponents and not rounded else most) // unit)
    while weight.units % units or (group > 32 and group % (units * unit) and units * unit % group):
        units //= 2
    return units


def by_halves(weight: Weight, dtype: torch.dtype) -> bool:
    """Whether each half of a unit has a scale of its own that must not be multiplied with the values: the slowest case."""
    powers = weight.exponents and dtype == torch.bfloat16
    return weight.scheme.bits == 4 and weight.scheme.group == 32 and not powers


def for_many(weight: Weight, dtype: torch.dtype) -> bool:
    """Whether there is a tile for more rows than EXACT on this device: it takes the bulk copy engine and 213 KB of shared memory."""
    return (interpreting() or chained()["PDL"]) and not by_halves(weight, dtype)


def configured(weight: Weight, rows: int, dtype: torch.dtype, deterministic: bool) -> dict[str, int]:
    """The shipped configuration for so many rows."""
    bits = weight.scheme.bits
    if rows > EXACT and not deterministic and for_many(weight, dtype):
        return tuned(f"fragments.{bits}.many")
    heights = EVEN_HEIGHTS if deterministic or by_halves(weight, dtype) else HEIGHTS
    tall = next((height for height in heights if rows <= height), heights[-1])
    if weight.exponents and tall == 64:  # as much work a code as for those of 8 bits
        bits = 8
    config = {"ROWS": tall, **tuned(f"fragments.{bits}.{tall}")}
    if weight.scheme.kind == "nf4" and tall == EXACT:  # its values are rounded already, and its groups are short
        config["ROUNDED"] = 1
    return config


def _aligned(x: Tensor) -> Tensor:
    """As the bulk copy engine wants it: rows begin at multiples of 16 bytes."""
    if x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0:
        return x
    rows, k = x.shape
    wide = x.new_zeros(rows, k + -k % 8)
    wide[:, :k] = x
    return wide[:, :k]


def product(
    x: Tensor, weight: Weight, bias: Tensor | None, out: Tensor, *, gated: str | None = None, workspace: Tensor | None = None,
    deterministic: bool = False, config: dict[str, int] | None = None,
) -> Tensor:  # fmt: skip
    """As kernels/quantised/triton.py's matmul, which has checked everything; x has rows."""
    (rows, k), n, scheme = x.shape, weight.n, weight.scheme
    config = dict(config or configured(weight, rows, x.dtype, deterministic))
    block_n, tall = config["BLOCK_N"], config["ROWS"]
    require(block_n in (16, 32, 64) or block_n % ROWS_OF_TILE == 0, "BLOCK_N must fit the weight's tiles")
    powers = weight.exponents and x.dtype == torch.bfloat16
    rounded = bool(config.pop("ROUNDED", 0)) and scheme.group >= weight.unit and not weight.exponents
    units = units_of_step(weight, config.pop("STEP", 128), rounded)
    if by_halves(weight, x.dtype):
        units = 1
    steps = weight.units // units
    columns, heights = -(-n // block_n), -(-rows // tall)
    splits = 1 if deterministic else splits_of(columns * heights, steps, config)
    counters = partial = None
    if splits > 1 and workspace is not None:
        splits = max(1, min(splits, (workspace.numel() - COUNTERS) // (rows * n)))
    splits = -(-steps // -(-steps // splits))  # so that none has nothing to do
    if splits > 1:
        require(columns * heights <= COUNTERS, "the weight has too many columns for the counters")
        if workspace is None:
            workspace = torch.zeros(COUNTERS + splits * rows * n, dtype=torch.float32, device=x.device)
        counters, partial = workspace[:COUNTERS].view(torch.int32), workspace[COUNTERS:]
    strides = weight.strides()
    box_x = box_w = None
    # Both or none: sums were wrong on an H100 (Triton 3.6) where the bulk copy engine brought x and ordinary copies the codes.
    if config.pop("TMA", 1) and (interpreting() or chained()["PDL"]) and not by_halves(weight, x.dtype):
        x = _aligned(x)
        box_x = TensorDescriptor(x, [rows, k], [max(k + -k % 8, x.stride(0)), 1], [tall, units * weight.unit])
        shape = [-(-n // ROWS_OF_TILE), weight.units, LINE, 128]
        box = [max(1, block_n // ROWS_OF_TILE), units, min(LINE, block_n // 4), 128]
        box_w = TensorDescriptor(weight.data, shape, [*strides, 128, 1], box)
    name = scheme.kind + ("r" if weight.zeros is not None and scheme.group != 32 else "s" if powers else "") + ("q" if rounded else "")
    launch = {name: value for name, value in config.items() if name not in ("TARGET", "MAX_SPLITS", "ROWS")}
    scales = weight.scales
    if powers:
        scales = scales.view(torch.int32)
    elif weight.exponents:
        scales = weight.plain_scales()  # fp16 beside MXFP4 is rare
    zeros = weight.pairs()
    _matmul[(columns * heights, splits)](
        x, box_x, weight.data, box_w, scales, zeros, bias, out, counters, partial, rows, n, k, weight.units, weight.scales.shape[1], *strides, x.stride(0), out.stride(0),
        KIND=KINDS.index(scheme.kind), RECIPE=RECIPES[name, x.dtype == torch.bfloat16], U=units, ROWS=tall, GROUP=scheme.group, POWERS=powers, ROUNDED=rounded, SPLITS=splits,
        EVEN=k == weight.units * weight.unit, BIAS=bias is not None, GATED=gated is not None, ACT=ACTIVATIONS.index(gated) if gated else 0, **chained(),
        **{"AHEAD": 0, **launch},
    )  # fmt: skip
    return out


def widen(weight: Weight, first: int, tiles: int, part: Tensor, gated: bool) -> None:
    """Tiles from `first` on -> part [rows, K], rounded to its dtype; gated: gate's rows first."""
    scheme = weight.scheme
    units = 4 if weight.units % 4 == 0 else 2
    _widen[(tiles, weight.units // units)](
        weight.data, weight.scales, weight.zeros, part, first, weight.n, weight.k, weight.scales.shape[1], *weight.strides(), part.shape[0],
        KIND=KINDS.index(scheme.kind), RECIPE=RECIPES[scheme.kind, part.dtype == torch.bfloat16], U=units, GROUP=scheme.group,
        EXPONENTS=weight.exponents, GATED=gated, num_warps=8, **chained(),
    )  # fmt: skip
