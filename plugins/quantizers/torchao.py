"""torchao checkpoints as transformers saves them in safetensors files: integers of 8 and 4 bits and FP8, for weights alone or for rounded inputs, too.

What it is: a Quantizer. A weight "a.b.weight" is the tensors "a.b._weight_qdata", "a.b._weight_scale" and others; what they mean is a JSON text of that name in the
header of the file: the class (`_type`), its attributes (`_data`, with `block_size`, the rows and inputs that share a scale) and which tensors there are. Classes:
Int8Tensor (int8 [N, K]), IntxUnpackedToInt8Tensor (fewer bits, a byte each), Float8Tensor, all (code - zero point) * scale; Int4Tensor ([N, K / 2], the even
input in the low half, two's complement; scale and zero point [K / group, N], code * scale + zero point, which are ordinary numbers: no Scheme has those,
so that it is held in full width, but for zeros). Which layers are quantised is what the files hold. Older versions wrote .bin files, which are
not read (plugins/weights/checkpoint.py).
What it does not know: devices.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec
import torch

from penstock.core.protocol.errors import CheckpointError, UnsupportedFeature
from penstock.kernels.linear.scheme import Quantised, Scheme, pack_nibbles
from penstock.plugins.quantizers.fields import FLOATING, Fields, has, invented, makes_up, number_of, scales_of, stored
from penstock.plugins.quantizers.fp8 import KINDS

log = logging.getLogger("penstock.weights")
Tensor = torch.Tensor
INT8, INTX, FLOAT8, INT4 = "Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor", "Int4Tensor"
CLASSES = (INT8, INTX, FLOAT8, INT4)
SAVE = "Quantise the wide model again with a recent torchao and save it with transformers' save_pretrained"
TYPES = {"int8weight": "int8", "float8weight": "fp8_e4m3", "int4weight": "int4", "float8dynamicactivationfloat8": "fp8_e4m3"}


class Stored(NamedTuple):
    """What the header says of a weight."""

    kind: str
    """One of CLASSES."""
    fields: Mapping[str, Any]
    rows: int
    """Outputs that share a scale; 0: all."""
    group: int
    """Inputs that share a scale; 0: all."""


class TorchAo:
    """See plugins/models/api.py: Quantizer."""

    def __init__(self, config: dict[str, Any]) -> None:
        fields = Fields(config)
        said = config.get("quant_type")
        inner = said.get("default", said) if isinstance(said, Mapping) else said
        name = inner.get("_type") if isinstance(inner, Mapping) else inner
        if not isinstance(name, str):
            raise CheckpointError(
                f"config.json: '{fields.where}.quant_type' must name a configuration of torchao, but is {said!r:.60}.", param="quant_type"
            )
        self._name = name
        self.method = f"torchao, {name}"
        self._warned = False

    def scheme(self, weights: Any, layer: str, rows: int, inputs: int) -> Scheme | None:
        """See Quantizer."""
        if makes_up(weights):
            return None if layer == "lm_head" else self._usual()
        if not has(weights, f"{layer}._weight_qdata"):
            return None
        what = _described(weights, layer, rows, inputs)
        if what.kind == INT4:
            return None if self._shifts(weights, layer, rows, inputs, what).any() else Scheme("int4", what.group)
        if what.kind == FLOAT8:
            kind = KINDS.get(weights.raw(f"{layer}._weight_qdata").dtype)
            if kind is None:
                raise CheckpointError(
                    f"tensor '{layer}._weight_qdata' is no FP8 tensor; its header says {FLOAT8}.", param=f"{layer}._weight_qdata"
                )
            return Scheme(kind, what.group, what.rows, activations=_activations(weights, layer, what))
        four = what.kind == INTX and _target(what, layer) <= 4
        zeros = self._zeros(weights, layer, rows, inputs, what)
        return Scheme(
            "int4" if four else "int8",
            what.group,
            what.rows,
            zeros=zeros is not None,
            activations="" if four else _activations(weights, layer, what),
        )

    def _usual(self) -> Scheme:
        """Of invented weights, by the configuration's name."""
        name = self._name.lower().replace("_", "")
        kind = next((kind for word, kind in TYPES.items() if word in name), "int4" if "int4" in name or "intx" in name else "int8")
        return Scheme(kind, 32 if kind == "int4" else 0)

    def read(self, weights: Any, layer: str, scheme: Scheme, rows: int, inputs: int, device: torch.device) -> Quantised:
        """See Quantizer."""
        if makes_up(weights):
            return invented(weights, layer, scheme, rows, inputs, device)
        what = _described(weights, layer, rows, inputs)
        name = f"{layer}._weight_"
        weights.ignore(f"{name}act_quant_zero_point", f"{name}act_quant_scale", f"{name}zero_point")
        if what.kind == INT4:
            codes, scales = _four(weights, layer, rows, inputs, what)
            return Quantised(scheme, rows, inputs, pack_nibbles(codes).to(device), scales.to(device))
        scales = scales_of(weights, f"{name}scale", scheme.scale_rows(rows), scheme.groups(inputs))
        given = None
        if scheme.activations == "tensor":
            given = number_of(weights, f"{name}act_quant_scale").to(device)
        if what.kind == FLOAT8:
            data = stored(weights, f"{name}qdata", (rows, inputs), scheme.dtype)
            return Quantised(scheme, rows, inputs, data.to(device), scales.to(device), input_scale=given)
        data = stored(weights, f"{name}qdata", (rows, inputs), torch.int8)
        bits = 8 if what.kind == INT8 else _target(what, layer)
        low = -(1 << (bits - 1))
        if bits < 8 and (int(data.min()) < low or int(data.max()) >= -low):
            raise CheckpointError(
                f"tensor '{name}qdata' holds codes that {bits} bits do not have: the file is damaged.", param=f"{name}qdata"
            )
        zeros = self._zeros(weights, layer, rows, inputs, what)
        if scheme.kind == "int4":
            data = pack_nibbles(data + 8)
            zeros = None if zeros is None else zeros + 8
        return Quantised(
            scheme,
            rows,
            inputs,
            data.contiguous().to(device),
            scales.to(device),
            None if zeros is None else zeros.contiguous().to(device),
            None,
            given,
        )

    def wide(self, weights: Any, layer: str, rows: int, inputs: int) -> Tensor | None:
        """See Quantizer: an Int4Tensor with zero points."""
        if makes_up(weights) or not has(weights, f"{layer}._weight_qdata"):
            return None
        what = _described(weights, layer, rows, inputs)
        if what.kind != INT4:
            return None
        if not self._warned:
            self._warned = True
            log.warning(
                "torchao's %s has zero points that are no whole numbers, for which there are no kernels: these layers are held in full width, with the values of"
                " the checkpoint, and the memory and the time of an unquantised model.",
                INT4,
            )
        codes, scales = _four(weights, layer, rows, inputs, what)
        group = what.group or inputs
        scale, shift = (
            part.float().repeat_interleave(group, 1)[:, :inputs] for part in (scales, self._shifts(weights, layer, rows, inputs, what))
        )
        return torch.addcmul(shift, codes.float() - 8, scale)

    def _zeros(self, weights: Any, layer: str, rows: int, inputs: int, what: Stored) -> Tensor | None:
        """int16 [rows of scales, groups], or None where all are 0."""
        name = f"{layer}._weight_zero_point"
        if not has(weights, name):
            return None
        value = stored(weights, name, None, torch.int8, torch.int32, *FLOATING)
        shape = Scheme("int8", what.group, what.rows)
        if value.numel() != shape.scale_rows(rows) * shape.groups(inputs):
            raise CheckpointError(
                f"tensor {name!r} holds {value.numel()} zero points; its header says {shape.scale_rows(rows)} x {shape.groups(inputs)}.",
                param=name,
            )
        wide = value.double()
        whole = wide.round().clamp(-256, 256).to(torch.int16)
        if bool((whole.double() != wide).any()):
            raise UnsupportedFeature(f"tensor {name!r}: zero points that are no whole numbers are not supported.", param=name)
        return whole.reshape(shape.scale_rows(rows), shape.groups(inputs)) if bool(whole.any()) else None

    def _shifts(self, weights: Any, layer: str, rows: int, inputs: int, what: Stored) -> Tensor:
        """Of an Int4Tensor: what is added to each group's values, [N, groups]."""
        groups = Scheme("int4", what.group).groups(inputs)
        return stored(weights, f"{layer}._weight_zero_point", (groups, rows), *FLOATING).t()


def _four(weights: Any, layer: str, rows: int, inputs: int, what: Stored) -> tuple[Tensor, Tensor]:
    """Of an Int4Tensor: (codes raised by 8 [N, K], scales [N, groups])."""
    if what.rows != 1:
        raise UnsupportedFeature(
            f"header of '{layer}.weight': an {INT4} whose scales stand for {what.rows} rows is not supported.", param=f"{layer}.weight"
        )
    if inputs % 2:
        raise UnsupportedFeature(f"{layer}: {inputs} inputs, an odd number, are not supported by this format.", param="quantization_config")
    packed = stored(weights, f"{layer}._weight_qdata", (rows, inputs // 2), torch.int8, torch.uint8).view(torch.uint8)
    scales = stored(weights, f"{layer}._weight_scale", (Scheme("int4", what.group).groups(inputs), rows), *FLOATING)
    halves = torch.stack((packed & 15, packed >> 4), 2).flatten(1)
    return halves ^ 8, scales.t().contiguous()  # two's complement raised by 8: its highest bit turned over


def _described(weights: Any, layer: str, rows: int, inputs: int) -> Stored:
    """What the header says of the layer's weight. Raises CheckpointError, UnsupportedFeature."""
    name = f"{layer}.weight"
    text = weights.note(name) if hasattr(weights, "note") else None
    if text is None:
        raise CheckpointError(
            f"tensor '{layer}._weight_qdata': the header of its file says nothing of {name!r}, which torchao writes there. Copy the file again, or take it from"
            f" where the model came from.",
            param=name,
        )
    try:
        said = msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise CheckpointError(f"header of {name!r}: no JSON object ({error}).", param=name) from None
    kind, fields = said.get("_type"), said.get("_data")
    if kind not in CLASSES or not isinstance(fields, dict):
        raise UnsupportedFeature(
            f"header of {name!r}: torchao's {kind!r:.60} is not supported, only {', '.join(CLASSES)}. {SAVE} in one of these.", param=name
        )
    if has(weights, f"{layer}._weight_act_pre_scale"):
        raise UnsupportedFeature(f"tensor '{layer}._weight_act_pre_scale': inputs with factors of their own are not supported.", param=name)
    block = fields.get("block_size")
    if block in (None, []) and kind == FLOAT8:
        return Stored(kind, fields, 0 if rows > 1 else 1, 0)
    if not (isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)):
        raise CheckpointError(f"header of {name!r}: 'block_size' must be two sizes, but is {block!r:.60}.", param=name)
    shared = 1 if rows == 1 else 0 if block[0] >= rows else block[0]
    group = 0 if block[1] >= inputs and shared < 2 else block[1]
    return Stored(str(kind), fields, shared, group)


def _target(what: Stored, layer: str) -> int:
    """Bits of an IntxUnpackedToInt8Tensor."""
    said = what.fields.get("target_dtype")
    word = said.get("_data") if isinstance(said, dict) else said
    bits = str(word).removeprefix("torch.").removeprefix("int")
    if not bits.isdecimal() or not 1 <= int(bits) <= 8:
        raise CheckpointError(
            f"header of '{layer}.weight': 'target_dtype' must be int1 to int8, but is {said!r:.60}.", param=f"{layer}.weight"
        )
    return int(bits)


def _activations(weights: Any, layer: str, what: Stored) -> str:
    """How inputs are rounded."""
    if has(weights, f"{layer}._weight_act_quant_scale"):
        return "tensor" if weights.raw(f"{layer}._weight_act_quant_scale").numel() == 1 else "token"
    return "token" if what.fields.get("act_quant_kwargs") or what.fields.get("activation_quantization") else ""
