"""Rows of inputs rounded to 8 bits: what a layer asks for, and what it gets.

What it is: `Rounding`, how a layer wants its inputs rounded, and `Rounded`, inputs [T, K] so rounded. What rounds (a norm, an activation, a launch of its own) and what multiplies
know each other by these alone.
What it does not know: kernels, layers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TOPS = {"fp8_e4m3": 448.0, "int8": 127.0}
"""Largest codes, by kind."""
STEP = 128
"""Columns of a step of the matmul: codes are padded to a multiple of it."""


class Rounding(NamedTuple):
    """Each input becomes the nearest code times a scale."""

    kind: str
    """One of TOPS."""
    group: int = 0
    """Columns that share a scale (STEP), or 0: all of a row. The largest magnitude among them becomes the largest code."""
    scale: Tensor | None = None
    """[] float32 on the device: one scale for all inputs instead; what lies beyond the largest code is cut off."""


class Rounded(NamedTuple):
    """Inputs [T, K]: codes times scales."""

    codes: Tensor
    """[T, K rounded up to STEP], zeros behind."""
    scales: Tensor
    """[T] float32, or of groups [groups, T]."""
    dtype: torch.dtype
    """What the inputs were, and products with them become."""
