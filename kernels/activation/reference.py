"""Plain-torch truth of the gated activations.

    out = round(round(act(gate)) * up),  gate = x[:, :I], up = x[:, I:]

with act evaluated in float32 and both roundings to x's dtype, as Hugging Face's MLP does. silu(g) = g / (1 + exp(-g)) (Elfwing et al.
2017, arXiv:1702.03118); gelu and its tanh form from Hendrycks and Gimpel 2016, arXiv:1606.08415; gating from Shazeer 2020,
arXiv:2002.05202.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def act(kind: str, gate: Tensor) -> Tensor:
    """act(gate) in gate's dtype, evaluated in float32 (or float64)."""
    wide = gate if gate.dtype == torch.float64 else gate.float()
    if kind == "silu":
        wide = functional.silu(wide)
    elif kind == "gelu_tanh":
        wide = functional.gelu(wide, approximate="tanh")
    else:
        wide = functional.gelu(wide)
    return wide.to(gate.dtype)


def gated(kind: str, gate_up: Tensor) -> Tensor:
    """[T, 2I] to [T, I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return act(kind, gate) * up
