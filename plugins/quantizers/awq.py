"""AWQ checkpoints (Lin et al. 2024, arXiv 2306.00978) in the "gemm" layout, 4 bits.

What it is: a Quantizer. A layer is `qweight` [K, N / 8] int32, `qzeros` [G, N / 8] int32 and `scales` [G, N]; a word's eight codes, from its lowest
bits up, are those of outputs 0, 2, 4, 6, 1, 3, 5, 7. Which layers are quantised is what the files hold.
What it does not know: devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from penstock.kernels.linear.scheme import Quantised, Scheme, pack_nibbles
from penstock.plugins.quantizers.fields import FLOATING, Fields, divides, has, invented, makes_up, stored, words_to_codes
from penstock.plugins.quantizers.overrides import Rules, contradicted, said

OUTPUTS = (0, 2, 4, 6, 1, 3, 5, 7)


class Form(NamedTuple):
    """How a layer is stored."""

    group: int
    zeros: bool

    def __str__(self) -> str:
        return f"4 bits, {f'groups of {self.group}' if self.group else 'a scale a row'}"


class Awq:
    """See plugins/models/api.py: Quantizer."""

    def __init__(self, config: Mapping[str, Any], rules: Rules = ()) -> None:
        """`rules`: of layers with settings of their own."""
        fields = Fields(config)
        self._form = _form(fields)
        form = "version" if config.get("version") is not None else "format"
        fields.word(form, "gemm", "gemm")
        self._rules = [(rule.matches, None if rule.fields is None else _form(rule.fields)) for rule in rules]
        self.method = said(
            f"awq, {self._form}", [str(form) for _, form in self._rules if form is not None and str(form) != str(self._form)]
        )

    def scheme(self, weights: Any, layer: str, rows: int, inputs: int) -> Scheme | None:
        """See Quantizer."""
        form = next((form for matches, form in self._rules if matches(layer)), self._form)
        if makes_up(weights):
            return None if form is None or layer == "lm_head" else _scheme(form, inputs)
        if not has(weights, f"{layer}.qweight"):
            return None
        if form is None:
            raise contradicted(layer)
        divides(layer, "outputs", rows, 8)
        return _scheme(form, inputs)

    def read(self, weights: Any, layer: str, scheme: Scheme, rows: int, inputs: int, device: torch.device) -> Quantised:
        """See Quantizer."""
        if makes_up(weights):
            return invented(weights, layer, scheme, rows, inputs, device)
        groups = scheme.groups(inputs)
        words = stored(weights, f"{layer}.qweight", (inputs, rows // 8), torch.int32).to(device)
        scales = stored(weights, f"{layer}.scales", (groups, rows), *FLOATING).to(device)
        zeros = None
        if scheme.zeros:
            packed = stored(weights, f"{layer}.qzeros", (groups, rows // 8), torch.int32).to(device)
            zeros = _in_order(packed).t().to(torch.int16).contiguous()
        else:
            weights.ignore(f"{layer}.qzeros")
        return Quantised(scheme, rows, inputs, pack_nibbles(_in_order(words).t()).contiguous(), scales.t().contiguous(), zeros)


def _form(fields: Fields) -> Form:
    name = "bits" if fields.config.get("bits") is not None else "w_bit"
    if fields.integer(name) != 4:
        raise fields.refuse(name, "is not supported, only 4.")
    group = fields.group("group_size" if fields.config.get("group_size") is not None else "q_group_size")
    return Form(group, fields.flag("zero_point", True))


def _scheme(form: Form, inputs: int) -> Scheme:
    return Scheme("int4", form.group if form.group < inputs else 0, zeros=form.zeros)


def _in_order(words: torch.Tensor) -> torch.Tensor:
    """[rows, N / 8] words -> [rows, N] codes."""
    codes = words_to_codes(words, 4, 1).view(words.shape[0], -1, 8)
    place = torch.tensor(OUTPUTS, device=words.device).argsort()
    return codes[:, :, place].flatten(1)
