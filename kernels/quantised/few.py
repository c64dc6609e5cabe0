"""A matmul of few rows with a weight in fragments whose K axis is shared out among the warps of a program, in Triton.

What it is: `product`, for at most ROWS rows. What kernels/quantised/fragments.py computes, but no program waits for another: each has all of K for some rows of the weight, each of its
warps every S-th unit of them, and their sums are added up at the end, in a fixed order. So short a kernel is over before pieces of K in memory could be added up.
What it does not know: weights by halves of a unit or with powers of two, layers, files.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, disable-error-code="no-any-return"

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.activation.triton import KINDS as ACTIVATIONS
from penstock.kernels.activation.triton import activate
from penstock.kernels.gpu import chained
from penstock.kernels.linear.scheme import Scheme
from penstock.kernels.quantised.fragments import halves, whole
from penstock.kernels.quantised.layout import KINDS, ROWS_OF_TILE, Weight
from penstock.kernels.quantised.recipes import RECIPES
from penstock.kernels.tile import INTERPRETED, fetch_ahead, follow, launched, narrow

ROWS = 16
"""Most rows."""


@triton.jit
def _by_row(first, second, S: tl.constexpr, BLOCK_N: tl.constexpr):
    """[S, W, 8] of rows g and g + 8 of sixteen -> [S, BLOCK_N]."""
    return tl.reshape(tl.permute(tl.join(first, second), (0, 1, 3, 2)), [S, BLOCK_N])


@triton.jit
def _ones(codes, like: tl.constexpr):
    """Twice 1 in the codes' shape, "made" of them: what comes of 8 bits has another order of K in registers than what does not, and x would be needed in both."""
    if INTERPRETED:
        return codes.to(tl.float32) * 0 + 1, codes.to(tl.float32) * 0 + 1
    elif like == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, 0x3F803F80; mov.b32 $1, 0x3F803F80; mov.b32 $2, 0x3F803F80; mov.b32 $3, 0x3F803F80;", "=r,=r,=r,=r,r", [codes],
            dtype=(like.value, like.value), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, 0x3C003C00; mov.b32 $1, 0x3C003C00; mov.b32 $2, 0x3C003C00; mov.b32 $3, 0x3C003C00;", "=r,=r,=r,=r,r", [codes],
            dtype=(like.value, like.value), is_pure=True, pack=4,
        )  # fmt: skip


@launched(do_not_specialize=["M"])
def _matmul(
    x, w, scales, zeros, bias, out, M, N, UNITS, GROUPS, w_tile, w_unit, x_stride, out_stride,
    KIND: tl.constexpr, RECIPE: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, S: tl.constexpr, GROUP: tl.constexpr,
    BIAS: tl.constexpr, GATED: tl.constexpr, ACT: tl.constexpr, AHEAD: tl.constexpr, SOON: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(N / BLOCK_N)), S warps. As fragments.py's; UNITS is a multiple of S, and K fills all of them."""
    NIBBLE: tl.constexpr = (KIND == 1) or (KIND == 3) or (KIND == 4)
    UNIT: tl.constexpr = 64 if NIBBLE else 32
    W: tl.constexpr = BLOCK_N // 16
    column = tl.program_id(0)
    tile = (column * BLOCK_N // 128).to(tl.int64)
    line = column * BLOCK_N % 128 // 4
    unit = tl.arange(0, S)
    if PDL and AHEAD > 0:
        ahead = tl.arange(0, AHEAD)
        fetch_ahead(w + tile * w_tile + tl.minimum(ahead // (4 * W), UNITS - 1).to(tl.int64) * w_unit + (line + ahead % (4 * W)) * 128)
    if PDL and SOON > 0 and GROUP > 0:  # some lines of the tile's scales and zero points
        soon = tl.arange(0, SOON)
        fetch_ahead(scales + tile * (GROUPS * 128) + tl.minimum(soon * 128, GROUPS * 128 - 1) + column * BLOCK_N % 128)
        if zeros is not None:
            fetch_ahead(zeros + tile * (GROUPS * 64) + tl.minimum(soon * 64, GROUPS * 64 - 1))
    follow(PDL)
    m = tl.arange(0, ROWS)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    here = m < M
    like = x.dtype.element_ty
    rows = w + tile * w_tile + line * 128 + (tl.arange(0, W) * 512)[:, None, None] + (unit.to(tl.int64) * w_unit)[None, :, None]
    rows += tl.arange(0, 512)[None, None, :]
    w_step = tl.full([], S, tl.int64) * w_unit
    left = x + m.to(tl.int64)[None, :, None] * x_stride + (unit * UNIT)[:, None, None] + tl.arange(0, UNIT)[None, None, :]
    eights = tile * (GROUPS * 128) + column * BLOCK_N % 128 + (tl.arange(0, W) * 16)[None, :, None] + tl.arange(0, 8)[None, None, :]
    pairs = tile * (GROUPS * 64) + column * BLOCK_N % 128 // 2 + (tl.arange(0, W) * 8)[None, :, None] + tl.arange(0, 8)[None, None, :]
    if GROUP > 0:
        group = unit * UNIT // GROUP
        s = tl.load(scales + eights + (group * 128)[:, None, None])
        t = tl.load(scales + eights + (group * 128)[:, None, None] + 8)
        if zeros is not None:
            z = tl.load(zeros + pairs + (group * 64)[:, None, None])
    elif zeros is not None:
        z = tl.load(zeros + pairs + (unit * 0)[:, None, None])
    acc = tl.zeros([S, BLOCK_N, ROWS], tl.float32)
    for step in range(UNITS // S):
        codes = tl.load(rows + step * w_step)
        a = tl.load(left + step * (S * UNIT), mask=here[None, :, None], other=0.0)
        if INTERPRETED:
            a = a.to(tl.float32)
        codes = tl.reshape(codes, [W, S, 8, 4, 2, 2, 2, 2])
        if zeros is not None:
            more = 8.0 - _by_row(z & 255, (z >> 8) & 255, S, BLOCK_N).to(tl.float32)
        if GROUP > 0:  # of the next step
            group = (tl.minimum(step + 1, UNITS // S - 1) * S + unit) * UNIT // GROUP
            following = tl.load(scales + eights + (group * 128)[:, None, None])
            after = tl.load(scales + eights + (group * 128)[:, None, None] + 8)
            if zeros is not None:
                z = tl.load(zeros + pairs + (group * 64)[:, None, None])
        if NIBBLE:
            low, high = halves(codes, None, None, None, like, KIND, RECIPE)
            value = tl.permute(tl.join(low, high), (1, 0, 6, 2, 8, 4, 5, 3, 7))
        else:
            value = tl.permute(whole(codes, None, None, like, KIND, RECIPE), (1, 0, 6, 2, 4, 5, 3, 7))
        value = tl.reshape(value, [S, BLOCK_N, UNIT])
        b = tl.permute(a, (0, 2, 1))
        if GROUP > 0 or zeros is not None:
            sums = tl.dot(value, b)
            if zeros is not None:  # x's sums come from the matrix unit, too, for every row of the weight: where they are wanted
                one, other = _ones(codes, like)
                one = tl.reshape(tl.permute(tl.join(one, other), (1, 0, 6, 2, 8, 4, 5, 3, 7)), [S, BLOCK_N, UNIT])
                sums += more[:, :, None] * tl.dot(one, b)
            if GROUP > 0:
                sums *= _by_row(s, t, S, BLOCK_N).to(tl.float32)[:, :, None]
                s = following
                t = after
            acc += sums
        else:
            acc = tl.dot(value, b, acc)
    y = tl.sum(acc, 0)
    if GROUP == 0:
        y *= tl.load(scales + tile * (GROUPS * 128) + n % 128).to(tl.float32)[:, None]
    dtype = out.dtype.element_ty
    if BIAS:
        y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    if GATED:
        two = tl.permute(tl.reshape(narrow(y, dtype).to(tl.float32), (BLOCK_N // 2, 2, ROWS)), (0, 2, 1))
        gate, up = tl.split(two)
        result = narrow(narrow(activate(gate, ACT), dtype).to(tl.float32) * up, dtype)
        j = column * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        tl.store(out + m.to(tl.int64)[None, :] * out_stride + j[:, None], result, mask=here[None, :] & (j < N // 2)[:, None])
    else:
        tl.store(out + m.to(tl.int64)[None, :] * out_stride + n[:, None], narrow(y, dtype), mask=here[None, :] & (n < N)[:, None])


def takes(weight: Weight, rows: int, warps: int) -> bool:
    """Whether `product` can multiply so many rows with it."""
    scheme: Scheme = weight.scheme
    return (
        rows <= ROWS
        and (scheme.group == 0 or scheme.group >= weight.unit)
        and not weight.exponents
        and weight.units % warps == 0
        and weight.units * weight.unit == weight.k
    )


def product(x: Tensor, weight: Weight, bias: Tensor | None, out: Tensor, gated: str | None, config: dict[str, int]) -> Tensor:
    """As fragments.product's, where `takes` says so."""
    (rows, _), n, scheme = x.shape, weight.n, weight.scheme
    block_n = config["BLOCK_N"]
    assert ROWS_OF_TILE % block_n == 0
    launch = {name: value for name, value in config.items() if name in ("AHEAD", "SOON", "num_warps", "num_stages")}
    _matmul[(-(-n // block_n),)](
        x, weight.data, weight.scales, weight.pairs(), bias, out, rows, n, weight.units, weight.scales.shape[1], *weight.strides(), x.stride(0),
        out.stride(0), KIND=KINDS.index(scheme.kind), RECIPE=RECIPES[scheme.kind, x.dtype == torch.bfloat16], ROWS=config.get("ROWS", ROWS), BLOCK_N=block_n, S=config["num_warps"], GROUP=scheme.group,
        BIAS=bias is not None, GATED=gated is not None, ACT=ACTIVATIONS.index(gated) if gated else 0, **chained(), **{"AHEAD": 0, "SOON": 0, **launch},
    )  # fmt: skip
    return out
