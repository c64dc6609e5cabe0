"""Checked entry of linear layers over packed weights.

    pack(weight[N, K], bias[N] | None) -> PackedLinear
    PackedLinear(x[M, K], out=None, out_dtype=None) -> [M, N]           y = x @ W^T + b
    pack_gated(gate[I, K], up[I, K], kind, gate_bias=None, up_bias=None) -> PackedGated
    PackedGated(x[M, K], out=None) -> [M, I]                            y = act(x @ gate^T) * (x @ up^T)

bfloat16 or float32; accumulation is float32; the result has x's dtype, or float32 with out_dtype=torch.float32 (logits). Packing copies:
the caller may drop the checkpoint's tensor. Every output element is one fixed chain of additions over K, whatever M is and wherever the
row lies in the batch, so a row alone equals the row in any batch, bit for bit. `nbytes` counts the packed bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels.activation import reference as activation_reference
from penstock.kernels.activation.api import ACTIVATIONS, Activation
from penstock.kernels.checks import FLOATS, require, tensor
from penstock.kernels.linear import reference


class PackedLinear:
    """A weight [n, k] with an optional bias, ready to be multiplied. Made by `pack`."""

    n: int
    k: int
    dtype: torch.dtype

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.n, self.k = weight.shape
        self.dtype = weight.dtype
        self._weight = reference.prepare(weight)
        self._bias = None if bias is None else bias.clone()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._weight.nbytes + (0 if self._bias is None else self._bias.nbytes)

    def __call__(self, x: Tensor, out: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
        """x [M, K] to [M, N]."""
        tensor("x", x, (None, self.k), self.dtype)
        out_dtype = out_dtype or (self.dtype if out is None else out.dtype)
        require(out_dtype in (self.dtype, torch.float32), "out_dtype must be the weight's dtype or float32")
        if out is None:
            return reference.linear(x, self._weight, self._bias, out_dtype)
        tensor("out", out, (x.shape[0], self.n), out_dtype)
        return out.copy_(reference.linear(x, self._weight, self._bias, out_dtype))


class PackedGated:
    """Gate and up projections [n, k] fused with their activation. Made by `pack_gated`."""

    n: int
    k: int
    dtype: torch.dtype

    def __init__(self, gate: Tensor, up: Tensor, kind: Activation, gate_bias: Tensor | None, up_bias: Tensor | None) -> None:
        self.n, self.k = gate.shape
        self.dtype = gate.dtype
        self.kind = kind
        bias = None if gate_bias is None or up_bias is None else torch.cat((gate_bias, up_bias))
        self._both = PackedLinear(torch.cat((gate, up)), bias)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._both.nbytes

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x [M, K] to [M, I]."""
        result = activation_reference.gated(self.kind, self._both(x))
        if out is None:
            return result
        tensor("out", out, (x.shape[0], self.n), self.dtype)
        return out.copy_(result)


def pack(weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
    """Pack weight [N, K] and bias [N]."""
    tensor("weight", weight, (None, None), *FLOATS)
    require(weight.shape[0] > 0 and weight.shape[1] > 0, "weight must not be empty")
    if bias is not None:
        tensor("bias", bias, (weight.shape[0],), weight.dtype)
    return PackedLinear(weight, bias)


def pack_gated(gate: Tensor, up: Tensor, kind: Activation, gate_bias: Tensor | None = None, up_bias: Tensor | None = None) -> PackedGated:
    """Pack gate [I, K] and up [I, K] with activation `kind`; both biases or none."""
    require(kind in ACTIVATIONS, f"activation must be one of {ACTIVATIONS}, not {kind!r}")
    tensor("gate", gate, (None, None), *FLOATS)
    tensor("up", up, gate.shape, gate.dtype)
    require(gate.shape[0] > 0 and gate.shape[1] > 0, "gate must not be empty")
    require((gate_bias is None) == (up_bias is None), "give both biases or none")
    for name, bias in (("gate_bias", gate_bias), ("up_bias", up_bias)):
        if bias is not None:
            tensor(name, bias, (gate.shape[0],), gate.dtype)
    return PackedGated(gate, up, kind, gate_bias, up_bias)
