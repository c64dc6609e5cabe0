"""Checks shared by the operations' checked entries: shape, dtype, contiguity, one line each.

What it is: `require` and `tensor`, which raise ValueError with a sentence naming the argument.
What it does not know: any operation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float32)


def require(condition: bool, sentence: str) -> None:
    """Raises ValueError(sentence) unless condition."""
    if not condition:
        raise ValueError(sentence)


def tensor(name: str, value: Tensor, shape: Sequence[int | None], *dtypes: torch.dtype) -> None:
    """`value` must be a contiguous CPU tensor of one of `dtypes` and of `shape` (None: any size)."""
    if value.dim() != len(shape) or any(want is not None and want != got for want, got in zip(shape, value.shape, strict=True)):
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} must have shape [{wanted}], not {list(value.shape)}")
    if value.dtype not in dtypes:
        raise ValueError(f"{name} must be {' or '.join(str(dtype) for dtype in dtypes)}, not {value.dtype}")
    if not value.is_contiguous() or value.device.type != "cpu":
        raise ValueError(f"{name} must be a contiguous CPU tensor")
