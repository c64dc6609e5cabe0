"""Rounding of rows to 8 bits in Triton, alone and for other kernels to end with.

    codes[t, k] = round(x[t, k] / scale),   scale = max |x[t, :]| / 448 (FP8 E4M3) or / 127 (int8)

What it is: `quantise_rows`, a launch of its own; `finish_row`, with which a kernel that has a row in registers rounds it in the same launch (a norm); `outputs`, what that
kernel writes to.
What it does not know: matmuls.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, disable-error-code="no-any-return"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.checks import require
from penstock.kernels.gpu import chained
from penstock.kernels.tile import INTERPRETED, follow, launched, power
from penstock.kernels.w8a8.rows import STEP, TOPS, Rounded, Rounding

DTYPES = {"fp8_e4m3": torch.float8_e4m3fn, "int8": torch.int8}


@triton.jit
def _codes(ratio, TOP: tl.constexpr, INT: tl.constexpr):
    ratio = tl.minimum(tl.maximum(ratio, -TOP), TOP)
    if INT:
        return tl.floor(ratio + 0.5).to(tl.int8)
    else:
        if INTERPRETED:  # whose cast cuts off
            step = tl.exp2(tl.maximum(tl.floor(tl.log2(tl.maximum(tl.abs(ratio), 1e-9))), -6.0) - 3)
            ratio = tl.floor(ratio / step + 0.5) * step
        return ratio.to(tl.float8e4nv)


@triton.jit
def finish_row(
    value, row, rows, codes, scales, given, width, TOP: tl.constexpr, INT: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, FIXED: tl.constexpr
):  # fmt: skip
    """Round `value` [BLOCK] float32, zeros behind the row's last column, and write its codes [width] and scales. Behind `**settings(...)`."""
    k = tl.arange(0, BLOCK)
    if FIXED:
        scale = tl.maximum(tl.load(given), 1e-12)
        code = _codes(value * (1.0 / scale), TOP, INT)
        tl.store(scales + row, scale)
    elif GROUP > 0:
        parts = tl.reshape(value, (BLOCK // GROUP, GROUP))
        scale = tl.maximum(tl.max(tl.abs(parts), axis=1) / TOP, 1e-12)
        code = tl.reshape(_codes(parts * (1.0 / scale)[:, None], TOP, INT), (BLOCK,))
        g = tl.arange(0, BLOCK // GROUP)
        tl.store(scales + g.to(tl.int64) * rows + row, scale, mask=g < width // GROUP)
    else:
        scale = tl.maximum(tl.max(tl.abs(value), axis=0) / TOP, 1e-12)
        code = _codes(value * (1.0 / scale), TOP, INT)
        tl.store(scales + row, scale)
    tl.store(codes + row * width + k, code, mask=k < width)


@launched(do_not_specialize=["rows"])
def _quantise(
    x, rows, K, x_stride, codes, scales, given, width, TOP: tl.constexpr, INT: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, FIXED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (rows)."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    follow(PDL)
    value = tl.load(x + row * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
    finish_row(value, row, rows, codes, scales, given, width, TOP, INT, GROUP, BLOCK, FIXED)


def outputs(rows: int, k: int, rounding: Rounding, like: Tensor) -> tuple[Rounded, dict[str, Any]]:
    """Memory for rounded rows of inputs of the dtype and the device of `like`, and what a kernel that ends with `finish_row` gets for it."""
    require(
        rounding.group in (0, STEP) and not (rounding.group and rounding.scale is not None), "scales are one a row, a tensor or 128 columns"
    )
    width = -(-k // STEP) * STEP
    codes = torch.empty(rows, width, dtype=DTYPES[rounding.kind], device=like.device)
    shape = (width // STEP, rows) if rounding.group else (rows,)
    scales = torch.empty(shape, dtype=torch.float32, device=like.device)
    settings = {
        "codes": codes, "scales": scales, "given": rounding.scale, "width": width, "TOP": TOPS[rounding.kind], "INT": rounding.kind == "int8",
        "GROUP": rounding.group, "BLOCK": power(width), "FIXED": rounding.scale is not None,
    }  # fmt: skip
    return Rounded(codes, scales, like.dtype), settings


def warps_of(block: int) -> int:
    """For a row of so many columns."""
    return min(16, max(4, block // 1024))


def quantise_rows(x: Tensor, rounding: Rounding | str) -> Rounded:
    """x [T, K] rounded, each row by itself. A string: its kind, a scale a row."""
    rounding = Rounding(rounding) if isinstance(rounding, str) else rounding
    (rows, k) = x.shape
    require(x.stride(1) == 1, "x must be contiguous along K")
    rounded, settings = outputs(rows, k, rounding, x)
    if rows:
        _quantise[(rows,)](x, rows, k, x.stride(0), num_warps=warps_of(settings["BLOCK"]), **settings, **chained())
    return rounded
