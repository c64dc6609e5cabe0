"""Plain-torch truth of the linear layer: y = round(x @ W^T + b), accumulated in float32.

Where torch has fast bfloat16 matmuls they are used as they are; elsewhere the weight is widened to float32 once, which is the same sum.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def prepare(weight: Tensor) -> Tensor:
    """The weight in the form that this machine's torch multiplies fastest: bfloat16 only where oneDNN has kernels for it."""
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return weight.float()
    return weight.clone()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """x [M, K], weight [N, K] as prepared; [M, N] of out_dtype."""
    if weight.dtype == x.dtype == out_dtype:
        return functional.linear(x, weight, bias)
    return functional.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(out_dtype)
