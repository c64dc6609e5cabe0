"""Plain-torch truth of RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467), with Hugging Face Llama's roundings:

    y = w * round(x * rsqrt(mean(x^2) + eps))

in float32 up to `round` (to x's dtype), then multiplied by the weight in x's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., K], weight [K] of x's dtype."""
    wide = x if x.dtype == torch.float64 else x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
