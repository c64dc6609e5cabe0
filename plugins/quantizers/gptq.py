"""GPTQ checkpoints (Frantar et al. 2023, arXiv 2210.17323) as AutoGPTQ and GPTQModel save them, 4 and 8 bits, layers with settings of their own too.

What it is: a Quantizer. A layer is `qweight` [K * bits / 32, N] int32, `scales` [G, N], `qzeros` [G, N * bits / 32] int32 and, where inputs were
taken in order of their importance (act-order), `g_idx` [K], the group of each input. In format "gptq" zero points are stored less one, in
"gptq_v2" as they are. Which layers are quantised is what the files hold.
What it does not know: devices.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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
from penstock.plugins.quantizers.overrides import Rules, contradicted, gptq_rules, said

FORMATS = ("gptq", "gptq_v2")


class Form(NamedTuple):
    """How a layer is stored."""

    bits: int
    group: int
    act_order: bool
    symmetric: bool

    def __str__(self) -> str:
        return f"{self.bits} bits, {f'groups of {self.group}' if self.group else 'a scale a row'}"


class Gptq:
    """See plugins/models/api.py: Quantizer."""

    def __init__(self, config: dict[str, Any], rules: Rules | None = None) -> None:
        """`rules`: of layers with settings of their own, in place of those in `dynamic`."""
        fields = Fields(config)
        self._form = _form(fields)
        form = "checkpoint_format" if config.get("checkpoint_format") is not None else "format"
        self._less_one = fields.word(form, "gptq", *FORMATS) == "gptq"
        rules = gptq_rules(fields) if rules is None else rules
        self._rules = [(rule.matches, None if rule.fields is None else _form(rule.fields)) for rule in rules]
        self.method = said(
            f"gptq, {self._form}", [str(form) for _, form in self._rules if form is not None and str(form) != str(self._form)]
        )

    def scheme(self, weights: Any, layer: str, rows: int, inputs: int) -> Scheme | None:
        """See Quantizer."""
        form = self._form_of(layer)
        if makes_up(weights):
            return None if form is None or layer == "lm_head" else _scheme(form, inputs)
        if not has(weights, f"{layer}.qweight"):
            return None
        if form is None:
            raise contradicted(layer)
        divides(layer, "inputs", inputs, 32 // form.bits)
        divides(layer, "outputs", rows, 32 // form.bits)
        scheme = _scheme(form, inputs)
        zeros = self._zeros(weights, layer, form, rows, scheme.groups(inputs))
        middle = 1 << (form.bits - 1)
        plain = form.symmetric and bool((zeros == middle).all())
        return scheme._replace(zeros=not plain, permuted=self._order(weights, layer, form, inputs) is not None)

    def _form_of(self, layer: str) -> Form | None:
        return next((form for matches, form in self._rules if matches(layer)), self._form)

    def read(self, weights: Any, layer: str, scheme: Scheme, rows: int, inputs: int, device: torch.device) -> Quantised:
        """See Quantizer."""
        if makes_up(weights):
            return invented(weights, layer, scheme, rows, inputs, device)
        form = self._form_of(layer)
        assert form is not None  # it has a scheme
        bits = form.bits
        groups, per_word = scheme.groups(inputs), 32 // bits
        words = stored(weights, f"{layer}.qweight", (inputs // per_word, rows), torch.int32).to(device)
        scales = stored(weights, f"{layer}.scales", (groups, rows), *FLOATING).to(device)
        codes = words_to_codes(words, bits, 0).t()
        order = self._order(weights, layer, form, inputs)
        if order is not None:
            order = order.to(device)
            codes = codes[:, order.long()]
        zeros = self._zeros(weights, layer, form, rows, groups).t().to(device) if scheme.zeros else None
        if bits == 8:
            data = (codes.to(torch.int16) - 128).to(torch.int8).contiguous()
            zeros = None if zeros is None else zeros - 128
        else:
            data = pack_nibbles(codes).contiguous()
        return Quantised(scheme, rows, inputs, data, scales.t().contiguous(), None if zeros is None else zeros.contiguous(), order)

    def _zeros(self, weights: Any, layer: str, form: Form, rows: int, groups: int) -> torch.Tensor:
        """[G, N] int16."""
        name = f"{layer}.qzeros"
        words = stored(weights, name, (groups, rows * form.bits // 32), torch.int32)
        return words_to_codes(words, form.bits, 1).to(torch.int16) + int(self._less_one)

    def _order(self, weights: Any, layer: str, form: Form, inputs: int) -> torch.Tensor | None:
        name = f"{layer}.g_idx"
        if not has(weights, name):
            if form.act_order and form.group and form.group < inputs:
                raise CheckpointError(f"tensor {name!r} is missing, but config.json says desc_act: the group of each input.", param=name)
            return None
        index = stored(weights, name, (inputs,), torch.int32, torch.int64)
        if int(index.min()) < 0:
            raise CheckpointError(f"tensor {name!r} holds groups below 0.", param=name)
        return order_of(index, name, form.group)


def _form(fields: Fields) -> Form:
    bits = fields.integer("bits")
    if bits not in (4, 8):
        raise fields.refuse("bits", "is not supported, only 4 and 8.")
    return Form(bits, fields.group("group_size"), fields.flag("desc_act", False), fields.flag("sym", True))


def _scheme(form: Form, inputs: int) -> Scheme:
    return Scheme(f"int{form.bits}", form.group if form.group < inputs else 0)
