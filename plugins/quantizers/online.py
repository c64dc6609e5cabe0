"""Wide weights quantised while they load: `--quantization int8 | int8-w8a8 | int4 | fp8 | nf4 | mxfp4`, and the output head by `--lm-head-quantization`.

What it is: a Quantizer that rounds every linear layer to the nearest (RTN), or the output head alone; embeddings stay wide. No data is looked at, so
that 4 bits cost more than a checkpoint that was quantised with data (AWQ, GPTQ).
What it does not know: files, devices.
"""

from __future__ import annotations

from typing import Any

import torch

from penstock.core.protocol.errors import CheckpointError
from penstock.kernels.linear.scheme import Quantised, Scheme, quantise

SCHEMES = {
    "int8": Scheme("int8"),
    "int4": Scheme("int4", 128, zeros=True),
    "int8-w8a8": Scheme("int8", activations="token"),
    "fp8": Scheme("fp8_e4m3", activations="token"),
    "nf4": Scheme("nf4", 64),
    "mxfp4": Scheme("fp4", 32),
}


class Online:
    """See plugins/models/api.py: Quantizer."""

    def __init__(self, word: str, *, head: bool = False) -> None:
        """`head`: of the output head, whose inputs stay as they are."""
        self._scheme = SCHEMES[word]._replace(activations="") if head else SCHEMES[word]
        self._head = head
        self.method = f"{word}, rounded while loading"

    def scheme(self, weights: Any, layer: str, rows: int, inputs: int) -> Scheme | None:
        """See Quantizer."""
        if (layer == "lm_head") != self._head:
            return None
        return self._scheme if self._scheme.group < inputs else self._scheme._replace(group=0)

    def read(self, weights: Any, layer: str, scheme: Scheme, rows: int, inputs: int, device: torch.device) -> Quantised:
        """See Quantizer."""
        wide = weights.take(f"{layer}.weight", (rows, inputs)).to(device)
        try:
            return quantise(wide, scheme, torch.float32 if scheme.bits == 8 else torch.bfloat16)
        except ValueError as error:
            raise CheckpointError(f"{layer}.weight cannot be quantised: {error}.", param=f"{layer}.weight") from None
