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

import ctypes

import torch
from torch import Tensor

from penstock.kernels import native
from penstock.kernels.activation import reference as activation_reference
from penstock.kernels.activation.api import ACTIVATIONS, Activation
from penstock.kernels.checks import FLOATS, require, tensor
from penstock.kernels.linear import arena, reference
from penstock.kernels.native.bind import FORMATS, check

PANEL = 16


def _panel_order(bias: Tensor, second: Tensor | None) -> Tensor:
    """Biases as float32 [panels * 16], padded with zeros, those of two halves interleaved by panel."""
    halves = [bias] if second is None else [bias, second]
    panels = -(-bias.shape[0] // PANEL)
    out = torch.zeros(panels, len(halves), PANEL)
    for index, half in enumerate(halves):
        padded = torch.zeros(panels * PANEL)
        padded[: half.shape[0]] = half
        out[:, index] = padded.view(panels, PANEL)
    return out.flatten()


class Panels:
    """Memory for a weight in panel order, and its C description. `act`: of a gated weight, whose panels alternate gate and up."""

    def __init__(
        self, lib: native.Native, n: int, k: int, panel_bytes: int, format: str, *, group: int = 0, gated: bool = False, act: int = 0
    ) -> None:
        panels = -(-n // PANEL) * (2 if gated else 1)
        self.data = arena.take(panels * panel_bytes)
        self.weight = native.Weight(
            w=self.data.data_ptr(),
            n=n,
            k=k,
            panels=panels,
            panel_bytes=panel_bytes,
            format=FORMATS[format],
            group=group,
            gated=gated,
            act=act,
        )
        self.by_reference = ctypes.byref(self.weight)
        self.nbytes = self.data.nbytes
        self._run = lib.lib.ps_linear
        self._bias: Tensor | None = None

    def add(self, bias: Tensor, second: Tensor | None = None) -> None:
        """A bias [n]; of a gated weight both."""
        self._bias = _panel_order(bias, second)
        self.weight.bias = self._bias.data_ptr()
        self.nbytes += self._bias.nbytes

    def __call__(self, x: Tensor, out: Tensor) -> Tensor:
        bf16 = torch.bfloat16
        check(
            self._run(
                self.by_reference, x.data_ptr(), x.dtype == bf16, x.shape[0], out.data_ptr(), out.dtype == bf16, torch.get_num_threads()
            )
        )
        return out


def _packed(lib: native.Native, weight: Tensor, bias: Tensor | None, second: Tensor | None, second_bias: Tensor | None, act: int) -> Panels:
    """Panels of [K/2][16][2] bfloat16 or [K][16] float32, zeros where N or K end."""
    n, k = weight.shape
    bf16 = weight.dtype == torch.bfloat16
    panel_bytes = (-(-k // 2) if bf16 else k) * PANEL * 4
    panels = Panels(lib, n, k, panel_bytes, "bf16" if bf16 else "f32", gated=second is not None, act=act)
    other = None if second is None else second.data_ptr()
    lib.lib.ps_pack(weight.data_ptr(), other, panels.data.data_ptr(), n, k, bf16, panel_bytes, torch.get_num_threads())
    if bias is not None:
        panels.add(bias, second_bias)
    return panels


class PackedLinear:
    """A weight [n, k] with an optional bias, ready to be multiplied. Made by `pack`."""

    dtypes: tuple[torch.dtype, ...]
    """Of inputs."""
    gathers = False
    """Whether its columns are stored in another order than its inputs."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.n, self.k = weight.shape
        self.dtypes = (weight.dtype,)
        lib = native.library()
        self.packed: Panels | None = None
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None
        if lib is not None:
            self.packed = _packed(lib, weight, bias, None, None, 0)
        else:
            self._weight = reference.prepare(weight)
            self._bias = None if bias is None else bias.clone()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        if self.packed is not None:
            return self.packed.nbytes
        return sum(held.nbytes for held in (self._weight, self._bias) if held is not None)

    def __call__(self, x: Tensor, out: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
        """x [M, K] to [M, N]."""
        tensor("x", x, (None, self.k), *self.dtypes)
        out_dtype = out_dtype or (x.dtype if out is None else out.dtype)
        require(out_dtype in (x.dtype, torch.float32), "out_dtype must be x's dtype or float32")
        if out is None:
            out = torch.empty(x.shape[0], self.n, dtype=out_dtype)
        else:
            tensor("out", out, (x.shape[0], self.n), out_dtype)
        if self.packed is not None:
            return self.packed(x, out)
        assert self._weight is not None
        return out.copy_(reference.linear(x, self._weight, self._bias, out_dtype))


class PackedGated:
    """Gate and up projections [n, k] fused with their activation. Made by `pack_gated`."""

    dtypes: tuple[torch.dtype, ...]
    """Of inputs."""
    gathers = False
    """Whether its columns are stored in another order than its inputs."""

    def __init__(self, gate: Tensor, up: Tensor, kind: Activation, gate_bias: Tensor | None, up_bias: Tensor | None) -> None:
        self.n, self.k = gate.shape
        self.dtypes = (gate.dtype,)
        self.kind = kind
        lib = native.library()
        self.packed: Panels | None = None
        self._both: PackedLinear | None = None
        if lib is not None:
            self.packed = _packed(lib, gate, gate_bias, up, up_bias, ACTIVATIONS.index(kind))
        else:
            self._both = PackedLinear(
                torch.cat((gate, up)), None if gate_bias is None or up_bias is None else torch.cat((gate_bias, up_bias))
            )

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        holder = self.packed or self._both
        assert holder is not None
        return holder.nbytes

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x [M, K] to [M, I]."""
        tensor("x", x, (None, self.k), *self.dtypes)
        if out is None:
            out = torch.empty(x.shape[0], self.n, dtype=x.dtype)
        else:
            tensor("out", out, (x.shape[0], self.n), x.dtype)
        if self.packed is not None:
            return self.packed(x, out)
        assert self._both is not None
        return out.copy_(activation_reference.gated(self.kind, self._both(x)))


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
