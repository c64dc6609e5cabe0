"""RMSNorm in Triton, plain and with the residual added first; formula and roundings as in reference.py, in one pass over memory.

    residual = round(residual + x);   y = weight * round(residual * rsqrt(mean(residual^2) + eps))       (Zhang and Sennrich 2019, arXiv:1910.07467)

One program a row, so no row depends on another. `rounded_norm` gives the same rows rounded to 8 bits (kernels/w8a8): what rounding the norm's result would, without writing and reading it.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, disable-error-code="no-any-return"

import torch
import triton.language as tl
from torch import Tensor

from penstock.kernels.checks import require
from penstock.kernels.gpu import chained, tuned
from penstock.kernels.tile import launched, make_room, narrow, power, wait
from penstock.kernels.w8a8.rounding import finish_row, outputs
from penstock.kernels.w8a8.rows import Rounded, Rounding


@launched(do_not_specialize=["rows"])
def _norm(
    x, residual, weight, out, eps, stride, rows, codes, scales, given, width, K: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, ROUND: tl.constexpr,
    TOP: tl.constexpr, INT: tl.constexpr, GROUP: tl.constexpr, FIXED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (M)."""
    make_room(PDL)
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    inside = k < K
    gain = tl.load(weight + k, mask=inside, other=0.0).to(tl.float32)
    wait(PDL)
    value = tl.load(x + row * stride + k, mask=inside, other=0.0)
    if ADD:
        value = narrow(value.to(tl.float32) + tl.load(residual + row * K + k, mask=inside, other=0.0).to(tl.float32), x.dtype.element_ty)
        tl.store(residual + row * K + k, value, mask=inside)
    wide = value.to(tl.float32)
    factor = tl.rsqrt(tl.sum(wide * wide, 0) / K + eps)
    scaled = narrow(wide * factor, x.dtype.element_ty).to(tl.float32)
    if ROUND:
        y = narrow(scaled * gain, x.dtype.element_ty).to(tl.float32)
        finish_row(y, row, rows, codes, scales, given, width, TOP, INT, GROUP, BLOCK, FIXED)
    else:
        tl.store(out + row * K + k, narrow(scaled * gain, out.dtype.element_ty), mask=inside)


PLAIN = {"codes": None, "scales": None, "given": None, "width": 0, "ROUND": False, "TOP": 1.0, "INT": False, "GROUP": 0, "FIXED": False}


def _check(x: Tensor, residual: Tensor | None, weight: Tensor) -> None:
    k = x.shape[1]
    require(x.stride(1) == 1 and weight.shape == (k,) and weight.dtype == x.dtype, "weight must be [K] of x's dtype")
    require(residual is None or (residual.shape == x.shape and residual.is_contiguous()), "residual must be contiguous, of x's shape")


def _run(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor | None, config: dict[str, int] | None) -> Tensor:
    rows, k = x.shape
    _check(x, residual, weight)
    out = torch.empty(rows, k, dtype=x.dtype, device=x.device) if out is None else out
    require(out.shape == x.shape and out.is_contiguous(), "out must be contiguous, of x's shape")
    if rows:
        config = config or tuned("rmsnorm")
        _norm[(rows,)](
            x, residual, weight, out, eps, x.stride(0), rows, K=k, BLOCK=power(k), ADD=residual is not None, **PLAIN, **chained(), **config
        )  # fmt: skip
    return out


def rounded_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, rounding: Rounding, *, config: dict[str, int] | None = None
) -> Rounded:
    """`rms_norm` of x, or with a residual `add_rms_norm`, its rows rounded to 8 bits."""
    rows, k = x.shape
    _check(x, residual, weight)
    rounded, settings = outputs(rows, k, rounding, x)
    if rows:
        config = config or tuned("rmsnorm")
        _norm[(rows,)](
            x, residual, weight, None, eps, x.stride(0), rows, K=k, ADD=residual is not None, ROUND=True, **settings, **chained(), **config
        )  # fmt: skip
    return rounded


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None, *, config: dict[str, int] | None = None) -> Tensor:
    """x [M, K] (rows may be strided), weight [K]; [M, K]. `out` may be x where x is contiguous."""
    return _run(x, None, weight, eps, out, config)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor | None = None, *, config: dict[str, int] | None = None
) -> Tensor:
    """residual += x in place, rounded to the dtype; returns its norm. `out` may be x."""
    return _run(x, residual, weight, eps, out, config)
