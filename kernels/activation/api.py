"""Checked entry of the gated activations.

    gated(kind, gate_up[T, 2I], out=None) -> [T, I]      out = act(gate_up[:, :I]) * gate_up[:, I:]

kind: "silu", "gelu_tanh" or "gelu". dtype bfloat16 or float32, contiguous. Each row's result does not depend on other rows.
`linear.pack_gated` fuses this into the gate-up matmul; use this one only where the two projections cannot be fused.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from penstock.kernels import native
from penstock.kernels.activation import reference
from penstock.kernels.checks import FLOATS, require, tensor

Activation = Literal["silu", "gelu_tanh", "gelu"]
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu_tanh", "gelu")


def gated(kind: Activation, gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """act(gate) * up of gate_up [T, 2I]; see the module."""
    require(kind in ACTIVATIONS, f"activation must be one of {ACTIVATIONS}, not {kind!r}")
    tensor("gate_up", gate_up, (None, None), *FLOATS)
    require(gate_up.shape[1] % 2 == 0, "gate_up must have an even number of columns")
    if out is None:
        out = torch.empty(gate_up.shape[0], gate_up.shape[1] // 2, dtype=gate_up.dtype)
    else:
        tensor("out", out, (gate_up.shape[0], gate_up.shape[1] // 2), gate_up.dtype)
    lib = native.library()
    if lib is None:
        return out.copy_(reference.gated(kind, gate_up))
    rows, bf16 = gate_up.shape[0], gate_up.dtype == torch.bfloat16
    lib.lib.ps_gated(gate_up.data_ptr(), out.data_ptr(), rows, out.shape[1], ACTIVATIONS.index(kind), bf16, torch.get_num_threads())
    return out
