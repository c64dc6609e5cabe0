"""bitsandbytes checkpoints: NF4 (Dettmers et al. 2023, arXiv 2305.14314), with its double quantisation, and LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339).

What it is: a Quantizer. NF4 is `weight` [N * K / 2, 1] uint8, the even element in the high half of a byte, a scale a block of 64 elements in `weight.absmax`,
itself quantised to 8 bits if there is a `weight.nested_absmax`, and a JSON text in `weight.quant_state.bitsandbytes__nf4`. LLM.int8() is `weight` [N, K] int8 and
`SCB` [N], the largest magnitude of each row; inputs are not rounded here, so that there are no outlier columns to keep apart.
What it does not know: devices.
"""

from __future__ import annotations

from typing import Any

import msgspec
import torch

from penstock.core.protocol.errors import CheckpointError, UnsupportedFeature
from penstock.kernels.linear.scheme import NF4, Quantised, Scheme
from penstock.plugins.quantizers.fields import Fields, divides, has, invented, makes_up, stored

STATE = "quant_state.bitsandbytes__"


class Bitsandbytes:
    """See plugins/models/api.py: Quantizer."""

    def __init__(self, config: dict[str, Any]) -> None:
        fields = Fields(config)
        self._four = fields.flag("load_in_4bit", fields.flag("_load_in_4bit", False))
        if self._four:
            fields.word("bnb_4bit_quant_type", "fp4", "nf4")
        elif not fields.flag("load_in_8bit", fields.flag("_load_in_8bit", False)):
            raise CheckpointError("config.json: 'quantization_config' says neither load_in_4bit nor load_in_8bit.", param="load_in_4bit")
        self.method = "bitsandbytes, " + ("nf4" if self._four else "int8")

    def scheme(self, weights: Any, layer: str, rows: int, inputs: int) -> Scheme | None:
        """See Quantizer."""
        if makes_up(weights):
            return None if layer == "lm_head" else Scheme("nf4", 64) if self._four else Scheme("int8")
        if has(weights, f"{layer}.SCB"):
            return Scheme("int8")
        if not has(weights, f"{layer}.weight.absmax"):
            return None
        size = self._state(weights, layer).get("blocksize")
        if type(size) is not int or size < 2 or size % 2:
            raise CheckpointError(f"tensor '{layer}.weight.{STATE}nf4' says blocksize {size!r:.60}.", param=f"{layer}.weight.{STATE}nf4")
        divides(layer, "inputs", inputs, size)
        return Scheme("nf4", size)

    def read(self, weights: Any, layer: str, scheme: Scheme, rows: int, inputs: int, device: torch.device) -> Quantised:
        """See Quantizer."""
        if makes_up(weights):
            return invented(weights, layer, scheme, rows, inputs, device)
        if scheme.kind == "int8":
            data = stored(weights, f"{layer}.weight", (rows, inputs), torch.int8)
            largest = stored(weights, f"{layer}.SCB", (rows,), torch.float32, torch.float16)
            if has(weights, f"{layer}.weight_format") and bool(weights.raw(f"{layer}.weight_format").any()):
                raise UnsupportedFeature(
                    f"tensor '{layer}.weight_format': only rows as they are (0) can be read.", param=f"{layer}.weight_format"
                )
            return Quantised(scheme, rows, inputs, data.to(device), (largest.float()[:, None] / 127).contiguous().to(device))
        name = f"{layer}.weight"
        state = self._state(weights, layer)
        if state.get("shape") != [rows, inputs]:
            raise CheckpointError(f"tensor '{name}.{STATE}nf4' says shape {state.get('shape')!r:.60}, not {[rows, inputs]}.", param=name)
        table = stored(weights, f"{name}.quant_map", (16,), torch.float32)
        if not torch.equal(table, torch.tensor(NF4)):
            raise CheckpointError(f"tensor '{name}.quant_map' holds other values than those of NF4.", param=f"{name}.quant_map")
        data = stored(weights, name, (rows * inputs // 2, 1), torch.uint8).view(rows, inputs // 2).to(device)
        scales = self._scales(weights, name, state, rows * inputs // scheme.group).view(rows, -1)
        return Quantised(scheme, rows, inputs, (data >> 4) | (data << 4), scales.contiguous().to(device))

    def _scales(self, weights: Any, name: str, state: dict[str, Any], count: int) -> torch.Tensor:
        if not has(weights, f"{name}.nested_absmax"):
            return stored(weights, f"{name}.absmax", (count,), torch.float32)
        codes = stored(weights, f"{name}.absmax", (count,), torch.uint8)
        table = stored(weights, f"{name}.nested_quant_map", (256,), torch.float32)
        size = state.get("nested_blocksize")
        if type(size) is not int or size < 1:
            raise CheckpointError(f"tensor '{name}.{STATE}nf4' says nested_blocksize {size!r:.60}.", param=name)
        largest = stored(weights, f"{name}.nested_absmax", (-(-count // size),), torch.float32)
        wide = table[codes.long()] * largest.repeat_interleave(size)[:count]
        offset = state.get("nested_offset", 0.0)
        if not isinstance(offset, int | float):
            raise CheckpointError(f"tensor '{name}.{STATE}nf4' says nested_offset {offset!r:.60}.", param=name)
        return wide + float(offset)

    def _state(self, weights: Any, layer: str) -> dict[str, Any]:
        name = f"{layer}.weight.{STATE}nf4"
        text = bytes(stored(weights, name, None, torch.uint8).flatten().tolist())
        try:
            return msgspec.json.decode(text, type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise CheckpointError(f"tensor {name!r} holds no JSON object ({error}).", param=name) from None
