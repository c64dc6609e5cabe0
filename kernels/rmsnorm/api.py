"""Checked entry of RMSNorm.

    rms_norm(x[M, K], weight[K], eps, out=None) -> [M, K]
    add_rms_norm(x[M, K], residual[M, K], weight[K], eps, out=None) -> [M, K]

`add_rms_norm` first does residual += x in place (rounded to the dtype) and returns the norm of the new residual. dtype bfloat16 or
float32, all arguments alike, contiguous. `out` may be `x` itself. Each row's result does not depend on other rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels.checks import FLOATS, tensor
from penstock.kernels.rmsnorm import reference


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """weight * x / rms(x), row by row."""
    tensor("x", x, (None, None), *FLOATS)
    tensor("weight", weight, (x.shape[1],), x.dtype)
    if out is None:
        out = torch.empty_like(x)
    else:
        tensor("out", out, x.shape, x.dtype)
    return out.copy_(reference.rms_norm(x, weight, eps))


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """residual += x; then the norm of residual."""
    tensor("x", x, (None, None), *FLOATS)
    tensor("residual", residual, x.shape, x.dtype)
    tensor("weight", weight, (x.shape[1],), x.dtype)
    if out is None:
        out = torch.empty_like(x)
    else:
        tensor("out", out, x.shape, x.dtype)
    residual.add_(x)
    return out.copy_(reference.rms_norm(residual, weight, eps))
