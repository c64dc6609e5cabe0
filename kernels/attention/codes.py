"""Keys and values in 8 bits: what a code and its scale mean, on every device.

    scale[t, h] = up(max(max_d |x[t, h, d]|, TINY) / LARGEST),   or the checkpoint's one for all tokens
    code[t, h, d] = round(x[t, h, d] / scale[t, h]), ties to even, at most LARGEST in size;   x ~ value(code) * scale

What it is: the kinds (E4M3 and E5M2: Micikevicius et al. 2022, arXiv 2209.05433; integers from -127), and the truth in torch. A scale is rounded *up* to
bfloat16 before the codes are made of it: nothing saturates by its rounding, and what is read is what was written. Every kind's codes are exact in 16
bits, so that a kernel widens them without a loss: a key's scale multiplies its scores, a value's its probability. A row that is not finite has the scale NaN
and codes of 0: who reads it gets NaN, as from a wide cache.
What it does not know: pages, attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("fp8_e4m3", "fp8_e5m2", "int8")
LARGEST = {"fp8_e4m3": 448.0, "fp8_e5m2": 57344.0, "int8": 127.0}
"""The largest value of a code."""
TINY = 2.0**-100
"""Rows whose largest element is smaller have this one's scale: a row of zeros stays zeros."""
FP8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def round_up(scale: Tensor) -> Tensor:
    """float32 above 0 -> the next bfloat16 that is not smaller. NaN stays."""
    up = ((scale.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)
    return torch.where(scale.isfinite(), up, torch.nan).to(torch.bfloat16)


def encode(x: Tensor, kind: str, fixed: float | None = None) -> tuple[Tensor, Tensor]:
    """x [..., D] -> (codes [..., D] uint8, scales [...] bfloat16). `fixed`: the checkpoint's scale, which replaces that of every row."""
    wide, most = x.float(), LARGEST[kind]
    size = wide.abs().amax(-1)
    # By a tensor, since torch on a GPU multiplies by a number's reciprocal: not exact, and then the next bfloat16 is one too far.
    scale = size.clamp_min(TINY) / size.new_full((), most) if fixed is None else torch.full_like(size, fixed)
    scales = round_up(torch.where(size.isfinite(), scale, torch.nan))
    y = (wide / scales.float()[..., None]).nan_to_num(0.0).clamp(-most, most)
    codes = y.round().to(torch.int8).view(torch.uint8) if kind == "int8" else y.to(FP8[kind]).view(torch.uint8)
    return codes, scales


def widen(codes: Tensor, kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """What uint8 codes mean, before their scale."""
    return codes.view(torch.int8 if kind == "int8" else FP8[kind]).to(dtype)


def decode(codes: Tensor, scales: Tensor, kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """codes [..., D], scales [...] -> [..., D]."""
    return (widen(codes, kind, torch.float64) * scales.to(torch.float64)[..., None]).to(dtype)
