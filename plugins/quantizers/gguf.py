"""The quantised layers of a GGUF file.

What it is: a Quantizer. Which form a layer has is what the file holds; forms that are no Scheme (Q2_K, Q4_K, Q5_K, Q4_1, Q5_1: they have a minimum a block) are
read as ordinary weights, which the weight source says.
What it does not know: what the bytes of a block mean (ggml.py), devices.
"""

from __future__ import annotations

from typing import Any

import torch

from penstock.core.protocol.errors import CheckpointError
from penstock.kernels.linear.scheme import Quantised, Scheme
from penstock.plugins.quantizers.fields import invented, makes_up
from penstock.plugins.quantizers.ggml import SCHEMES, quantised


class Gguf:
    """See plugins/models/api.py: Quantizer. `config` is what plugins/gguf/config.py says."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._usual = str(config.get("form"))
        self.method = f"gguf, mostly {self._usual}"

    def scheme(self, weights: Any, layer: str, rows: int, inputs: int) -> Scheme | None:
        """See Quantizer."""
        if makes_up(weights):
            scheme = SCHEMES.get(self._usual)
            return None if layer == "lm_head" or scheme is None or inputs % scheme.group else scheme
        name = f"{layer}.weight"
        return SCHEMES.get(weights.form(name)) if weights.has(name) else None

    def read(self, weights: Any, layer: str, scheme: Scheme, rows: int, inputs: int, device: torch.device) -> Quantised:
        """See Quantizer."""
        if makes_up(weights):
            return invented(weights, layer, scheme, rows, inputs, device)
        name = f"{layer}.weight"
        stored = weights.raw(name)
        try:
            found = quantised(weights.form(name), stored.to(device))
        except ValueError as error:
            raise CheckpointError(f"tensor {weights.called(name)!r} {error}: the file is damaged.", param=weights.called(name)) from None
        if (found.n, found.k) != (rows, inputs):
            raise CheckpointError(
                f"tensor {weights.called(name)!r} has shape {[found.n, found.k]}, the fields say {[rows, inputs]}.",
                param=weights.called(name),
            )
        return found
