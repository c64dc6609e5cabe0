"""GPTQ checkpoints (Frantar et al. 2023, arXiv 2210.17323) as AutoGPTQ and GPTQModel save them, 4 and 8 bits.

What it is: a Quantizer. A layer is `qweight` [K * bits / 32, N] int32, `scales` [G, N], `qzeros` [G, N * bits / 32] int32 and, where inputs were
taken in order of their importance (act-order), `g_idx` [K], the group of each input. In format "gptq" zero points are stored less one, in
"gptq_v2" as they are. Which layers are quantised is what the files hold.
What it does not know: devices.
"""

from __future__ import annotations

from typing import Any

import torch

from penstock.core.protocol.errors import CheckpointError
from penstock.kernels.linear.scheme import Quantised, Scheme, pack_nibbles
from penstock.plugins.quantizers.fields import (
    FLOATING,
    Fields,
    divides,
    has,
    invented,
    makes_up,
    order_of,
    stored,
    words_to_codes,
)

FORMATS = ("gptq", "gptq_v2")


class Gptq:
    """See plugins/models/api.py: Quantizer."""

    def __init__(self, config: dict[str, Any]) -> None:
        fields = Fields(config)
        self._bits = fields.integer("bits")
        if self._bits not in (4, 8):
            raise fields.refuse("bits", "is not supported, only 4 and 8.")
        self._group = fields.group("group_size")
        self._act_order = fields.flag("desc_act", False)
        self._symmetric = fields.flag("sym", True)
        form = "checkpoint_format" if config.get("checkpoint_format") is not None else "format"
        self._less_one = fields.word(form, "gptq", *FORMATS) == "gptq"
        if config.get("dynamic"):
            raise fields.refuse("dynamic", "layers with settings of their own are not supported yet.")
        self.method = f"gptq, {self._bits} bits, {f'groups of {self._group}' if self._group else 'a scale a row'}"

    def scheme(self, weights: Any, layer: str, rows: int, inputs: int) -> Scheme | None:
        """See Quantizer."""
        scheme = Scheme(f"int{self._bits}", self._group if self._group < inputs else 0)
        if makes_up(weights):
            return scheme if layer != "lm_head" else None
        if not has(weights, f"{layer}.qweight"):
            return None
        divides(layer, "inputs", inputs, 32 // self._bits)
        divides(layer, "outputs", rows, 32 // self._bits)
        zeros = self._zeros(weights, layer, rows, scheme.groups(inputs))
        middle = 1 << (self._bits - 1)
        plain = self._symmetric and bool((zeros == middle).all())
        return scheme._replace(zeros=not plain, permuted=self._order(weights, layer, inputs) is not None)

    def read(self, weights: Any, layer: str, scheme: Scheme, rows: int, inputs: int, device: torch.device) -> Quantised:
        """See Quantizer."""
        if makes_up(weights):
            return invented(weights, layer, scheme, rows, inputs, device)
        groups, per_word = scheme.groups(inputs), 32 // self._bits
        words = stored(weights, f"{layer}.qweight", (inputs // per_word, rows), torch.int32).to(device)
        scales = stored(weights, f"{layer}.scales", (groups, rows), *FLOATING).to(device)
        codes = words_to_codes(words, self._bits, 0).t()
        order = self._order(weights, layer, inputs)
        if order is not None:
            order = order.to(device)
            codes = codes[:, order.long()]
        zeros = self._zeros(weights, layer, rows, groups).t().to(device) if scheme.zeros else None
        if self._bits == 8:
            data = (codes.to(torch.int16) - 128).to(torch.int8).contiguous()
            zeros = None if zeros is None else zeros - 128
        else:
            data = pack_nibbles(codes).contiguous()
        return Quantised(scheme, rows, inputs, data, scales.t().contiguous(), None if zeros is None else zeros.contiguous(), order)

    def _zeros(self, weights: Any, layer: str, rows: int, groups: int) -> torch.Tensor:
        """[G, N] int16."""
        name = f"{layer}.qzeros"
        words = stored(weights, name, (groups, rows * self._bits // 32), torch.int32)
        return words_to_codes(words, self._bits, 1).to(torch.int16) + int(self._less_one)

    def _order(self, weights: Any, layer: str, inputs: int) -> torch.Tensor | None:
        name = f"{layer}.g_idx"
        if not has(weights, name):
            if self._act_order and self._group and self._group < inputs:
                raise CheckpointError(f"tensor {name!r} is missing, but config.json says desc_act: the group of each input.", param=name)
            return None
        index = stored(weights, name, (inputs,), torch.int32, torch.int64)
        if int(index.min()) < 0:
            raise CheckpointError(f"tensor {name!r} holds groups below 0.", param=name)
        return order_of(index, name, self._group)
