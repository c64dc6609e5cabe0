"""Checked entry of linear layers over quantised weights, which are held and multiplied as codes.

    pack_quantised(parts, bias=None) -> PackedQuantised                    y = x @ W^T + b, W being the parts, one below the other
    pack_quantised_gated(gate, up, kind, gate_bias=None, up_bias=None) -> PackedQuantisedGated
    PackedQuantised(scheme, rows, k, bias=None), PackedQuantisedGated(scheme, n, k, kind, ...): the same, to be filled part by part

They are called like the layers of linear/api.py, with inputs in bfloat16 or float32, and hold what linear/scheme.py describes. Inputs stay as they are: what a scheme
says of rounded activations is not done. A code minus its zero point is exact in float32 and is never rounded; a result is, over the
groups of a row, the sum of scale times (sum of inputs times codes), in float32 and in a fixed order whatever the batch is, so that a row alone equals the row
in any batch, bit for bit. Without the C library the weight is dequantised to float32. `nbytes` counts what is held: a group's scale takes four
bytes, its zero point too, and a group of codes is filled up to 64 bytes for 16 outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.kernels import native
from penstock.kernels.activation.api import ACTIVATIONS, Activation
from penstock.kernels.checks import FLOATS, require, tensor
from penstock.kernels.linear.api import PackedGated, PackedLinear, Panels
from penstock.kernels.linear.scheme import E2M1, KINDS, NF4, NIBBLES, Quantised, Scheme, dequantise
from penstock.kernels.native.bind import FORMATS

ZEROS = {"int8": (-128, 128), "int4": (-16, 32)}
"""Zero points from, to, with which codes are multiplied as bfloat16: what is left of a code is a bfloat16 value, and for int4 one of 64."""


class _Codes(Panels):
    """A weight [n, k] in panels of codes, a gated one in two halves."""

    def __init__(self, lib: native.Native, scheme: Scheme, n: int, k: int, *, gated: bool = False, act: int = 0) -> None:
        kind, group = scheme.kind, min(scheme.group or k, k)
        name = {"nf4": "table4", "fp4": "table4"}.get(kind, f"{kind}_zeros" if scheme.zeros else kind)
        panel_bytes = lib.lib.ps_panel_bytes(FORMATS[name], k, group)
        super().__init__(lib, n, k, panel_bytes, name, group=group, gated=gated, act=act)
        self.data.zero_()
        self._pack = lib.lib.ps_pack_codes
        self._scheme = scheme
        self._table: Tensor | None = None
        self._exact = torch.ones(1, dtype=torch.int32)
        self.weight.exact = self._exact.data_ptr()
        if kind in NIBBLES:
            integers = torch.arange(16.0) - (0 if scheme.zeros else 8)
            self._table = integers if kind == "int4" else torch.tensor(NF4 if kind == "nf4" else E2M1)
            self._exact.fill_(torch.equal(self._table, self._table.bfloat16().float()))
            self.weight.table = self._table.data_ptr()
            self.nbytes += self._table.nbytes
        self.perm: Tensor | None = None
        if scheme.permuted:
            self.perm = torch.full((k,), -1, dtype=torch.int32)
            self.weight.perm = self.perm.data_ptr()
            self.nbytes += self.perm.nbytes

    def fill(self, row: int, part: Quantised, half: int = 0) -> None:
        """Outputs from `row` on."""
        scheme, scales, zeros = self._scheme, part.scales.float().contiguous(), part.zeros
        if scheme.zeros and zeros is None:
            zeros = torch.full_like(scales, 8 if scheme.kind == "int4" else 0, dtype=torch.int16)
        if self.perm is not None:
            perm = torch.arange(part.k, dtype=torch.int32) if part.perm is None else part.perm
            require(bool((self.perm == -1).all() | (self.perm == perm).all()), "the parts of one layer must have one order of inputs")
            self.perm.copy_(perm)
        if zeros is not None and not ZEROS[scheme.kind][0] <= int(zeros.min()) <= int(zeros.max()) <= ZEROS[scheme.kind][1]:
            self._exact.zero_()
        zeros_at = None if zeros is None else zeros.data_ptr()
        threads = torch.get_num_threads()
        self._pack(self.by_reference, part.data.data_ptr(), scales.data_ptr(), zeros_at, scheme.rows or part.n, row, part.n, half, threads)


def _checked(scheme: Scheme, part: Quantised, n: int, k: int) -> None:
    """Raises ValueError for a part that the layer cannot take."""
    require(part.scheme == scheme and (part.n, part.k) == (n, k), f"a part must be [{n}, {k}] of {scheme}")
    bytes_of = (k + 1) // 2 if scheme.kind in NIBBLES else k
    tensor("data", part.data, (n, bytes_of), scheme.dtype)
    blocks = (scheme.scale_rows(n), scheme.groups(k))
    require(part.scales.shape == blocks and part.scales.is_floating_point(), f"scales must be {list(blocks)}, floating")
    require((part.zeros is None or scheme.zeros) and (part.perm is None or scheme.permuted), f"zeros or perm do not fit {scheme}")
    if part.zeros is not None:
        tensor("zeros", part.zeros, blocks, torch.int16)
    if part.perm is not None:
        tensor("perm", part.perm, (k,), torch.int32)
        require(bool((part.perm.long().sort().values == torch.arange(k)).all()), "perm must name every input once")
    if scheme.kind == "fp8_e4m3":  # C has no NaN for it
        require(not bool((part.data.view(torch.uint8) & 0x7F == 0x7F).any()), "the weight holds NaN")


def _checked_scheme(scheme: Scheme) -> None:
    require(scheme.kind in KINDS, f"kind must be one of {KINDS}, not {scheme.kind!r}")
    require(not scheme.zeros or scheme.kind in ("int4", "int8"), "only integers have zero points")


class PackedQuantised(PackedLinear):
    """A weight whose parts have `rows` outputs each, with an optional bias of all of them. See the module."""

    def __init__(self, scheme: Scheme, rows: Sequence[int], k: int, bias: Tensor | None = None) -> None:
        _checked_scheme(scheme)
        self.n, self.k = sum(rows), k
        require(min(rows) > 0 and k > 0, "weight must not be empty")
        if bias is not None:
            tensor("bias", bias, (self.n,), *FLOATS)
        self.dtypes, self.gathers = FLOATS, scheme.permuted
        self._scheme, self._rows = scheme, list(rows)
        lib = native.library()
        self.packed = self._codes = None if lib is None else _Codes(lib, scheme, self.n, k)
        self._weight = torch.empty(self.n, k) if lib is None else None
        self._bias = None if bias is None else bias.float()
        if self._codes is not None and bias is not None:
            self._codes.add(bias)

    def fill(self, index: int, part: Quantised) -> None:
        """Part `index`, once each, before the first call; from any thread. The part is copied."""
        _checked(self._scheme, part, self._rows[index], self.k)
        row = sum(self._rows[:index])
        if self._codes is not None:
            self._codes.fill(row, part)
        else:
            assert self._weight is not None
            self._weight[row : row + part.n] = dequantise(part)


class PackedQuantisedGated(PackedGated):
    """Gate (part 0) and up (part 1), [n, k] each, with their activation; both biases or none. See the module."""

    def __init__(
        self, scheme: Scheme, n: int, k: int, kind: Activation, gate_bias: Tensor | None = None, up_bias: Tensor | None = None
    ) -> None:
        _checked_scheme(scheme)
        require(kind in ACTIVATIONS, f"activation must be one of {ACTIVATIONS}, not {kind!r}")
        require(n > 0 and k > 0, "gate must not be empty")
        require((gate_bias is None) == (up_bias is None), "give both biases or none")
        for name, bias in (("gate_bias", gate_bias), ("up_bias", up_bias)):
            if bias is not None:
                tensor(name, bias, (n,), *FLOATS)
        self.n, self.k, self.kind, self.dtypes, self.gathers = n, k, kind, FLOATS, scheme.permuted
        self._scheme = scheme
        lib = native.library()
        self.packed = self._codes = None if lib is None else _Codes(lib, scheme, n, k, gated=True, act=ACTIVATIONS.index(kind))
        self._both = None
        if self._codes is None:
            both = None if gate_bias is None or up_bias is None else torch.cat((gate_bias.float(), up_bias.float()))
            self._both = self._reference = PackedQuantised(scheme, (n, n), k, both)
        elif gate_bias is not None:
            self._codes.add(gate_bias, up_bias)

    def fill(self, index: int, part: Quantised) -> None:
        """See PackedQuantised."""
        _checked(self._scheme, part, self.n, self.k)
        if self._codes is not None:
            self._codes.fill(0, part, half=index)
        else:
            self._reference.fill(index, part)


def pack_quantised(parts: Sequence[Quantised], bias: Tensor | None = None) -> PackedQuantised:
    """Parts of one scheme and one k, one below the other, and bias [N]."""
    layer = PackedQuantised(parts[0].scheme, [part.n for part in parts], parts[0].k, bias)
    for index, part in enumerate(parts):
        layer.fill(index, part)
    return layer


def pack_quantised_gated(
    gate: Quantised, up: Quantised, kind: Activation, gate_bias: Tensor | None = None, up_bias: Tensor | None = None
) -> PackedQuantisedGated:
    """Gate and up, [I, K] each, with activation `kind`."""
    layer = PackedQuantisedGated(gate.scheme, gate.n, gate.k, kind, gate_bias, up_bias)
    layer.fill(0, gate)
    layer.fill(1, up)
    return layer
