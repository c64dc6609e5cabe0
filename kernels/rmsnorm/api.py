"""Checked entry of RMSNorm.

    rms_norm(x[M, K], weight[K], eps, out=None) -> [M, K]
    add_rms_norm(x[M, K], residual[M, K], weight[K], eps, out=None) -> [M, K]

`add_rms_norm` first does residual += x in place (rounded to the dtype) and returns the norm of the new residual. dtype bfloat16 or
float32, all arguments alike, contiguous. `out` may be `x` itself. Each row's result does not depend on other rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels import native
from penstock.kernels.checks import FLOATS, tensor
from penstock.kernels.rmsnorm import reference


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor) -> Tensor:
    lib = native.library()
    if lib is None:
        return out.copy_(reference.rms_norm(x if residual is None else residual.add_(x), weight, eps))
    wide = weight.float()
    lib.lib.ps_norm(
        x.data_ptr(), None if residual is None else residual.data_ptr(), wide.data_ptr(), out.data_ptr(), x.shape[0], x.shape[1], eps,
        x.dtype == torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """weight * x / rms(x), row by row."""
    tensor("x", x, (None, None), *FLOATS)
    tensor("weight", weight, (x.shape[1],), x.dtype)
    if out is None:
        out = torch.empty_like(x)
    else:
        tensor("out", out, x.shape, x.dtype)
    return _norm(x, None, weight, eps, out)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """residual += x; then the norm of residual."""
    tensor("x", x, (None, None), *FLOATS)
    tensor("residual", residual, x.shape, x.dtype)
    tensor("weight", weight, (x.shape[1],), x.dtype)
    if out is None:
        out = torch.empty_like(x)
    else:
        tensor("out", out, x.shape, x.dtype)
    return _norm(x, residual, weight, eps, out)
