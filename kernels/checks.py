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
    _shaped(name, value, shape, dtypes)
    if not value.is_contiguous() or not value.is_cpu:
        raise ValueError(f"{name} must be a contiguous CPU tensor")


def blocks(name: str, value: Tensor, shape: Sequence[int | None], *dtypes: torch.dtype) -> None:
    """As `tensor`, but only what lies behind the first dimension must be contiguous."""
    _shaped(name, value, shape, dtypes)
    if not value.is_cpu or (value.shape[0] and not value[0].is_contiguous()):
        raise ValueError(f"{name} must be a CPU tensor of contiguous blocks")


def _shaped(name: str, value: Tensor, shape: Sequence[int | None], dtypes: tuple[torch.dtype, ...]) -> None:
    sizes = value.shape
    fits = len(sizes) == len(shape)
    for want, got in zip(shape, sizes, strict=False):  # a loop, since a decode step makes a dozen of these checks
        if want is not None and want != got:
            fits = False
    if not fits:
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} must have shape [{wanted}], not {list(sizes)}")
    if value.dtype not in dtypes:
        raise ValueError(f"{name} must be {' or '.join(str(dtype) for dtype in dtypes)}, not {value.dtype}")
