"""Plain-torch truth of the greedy choice: the first index of the row's maximum; a row with a NaN, +inf, or nothing but -inf is bad (-1)."""

from __future__ import annotations

import torch
from torch import Tensor


def argmax(logits: Tensor) -> Tensor:
    """logits [M, V] float32; [M] int32, -1 for a bad row. NaN spreads through max, so one reduction finds every bad row."""
    best = logits.max(dim=-1, keepdim=True).values
    first = (logits == best).int().argmax(dim=-1).int()
    return torch.where(torch.isfinite(best[:, 0]), first, torch.full_like(first, -1))
