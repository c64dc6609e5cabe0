"""Checkpoints in the compressed-tensors format, as llm-compressor and `penstock quantize` write them: integers, FP8, NVFP4 and MXFP4.

What it is: a Quantizer. Layers belong to groups of the configuration by name, by regular expression or by kind ("Linear"); each group says bits, kind and
blocks of its weights, and how inputs are rounded. Formats: pack-quantized (`weight_packed` [N, K * bits / 32] int32, codes raised by half their range,
`weight_zero_point` packed along N likewise), int-quantized (`weight` int8), float-quantized (`weight` FP8), nvfp4-pack-quantized and
mxfp4-pack-quantized (`weight_packed` [N, K / 2] uint8); scales are `weight_scale`. Which layers are quantised is what the files hold.
What it does not know: devices.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch

from penstock.core.protocol.errors import CheckpointError
from penstock.kernels.linear.scheme import Quantised, Scheme, pack_nibbles
from penstock.plugins.quantizers.fields import (
    Fields,
    divides,
    has,
    invented,
    makes_up,
    number_of,
    order_of,
    scales_of,
    stored,
    words_to_codes,
)
from penstock.plugins.quantizers.fp8 import nvfp4

PACKED, NVFP4, MXFP4 = "pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized"
FORMATS = (PACKED, "int-quantized", "float-quantized", "naive-quantized", NVFP4, MXFP4, "mixed-precision", "dense")
OFFLINE = ("weight_input", "weight_output")
"""Where a transform is part of the stored weights; elsewhere a step would have to compute it."""
STRATEGIES = ("tensor", "channel", "group", "block", "tensor_group")


class Group(NamedTuple):
    """One of config_groups."""

    targets: list[str]
    form: str
    scheme: Scheme
    ordered: bool
    """Each layer holds the group of each input."""


class CompressedTensors:
    """See plugins/models/api.py: Quantizer."""

    def __init__(self, config: dict[str, Any]) -> None:
        fields = Fields(config)
        fields.word("quantization_status", "compressed", "compressed", "frozen")
        sparsity = fields.inner("sparsity_config")
        if sparsity is not None and sparsity.config:
            sparsity.word("format", "dense", "dense")
        if _online(fields.inner("transform_config")):
            raise fields.refuse("transform_config", "transforms of inputs or outputs (rotations) are not supported yet.")
        form = fields.word("format", "dense", *FORMATS)
        groups = fields.inner("config_groups")
        named = groups.config if groups is not None else {}
        if (
            not named and fields.config.get("kv_cache_scheme") is None
        ):  # a checkpoint of wide weights may have scales for the KV cache alone
            raise CheckpointError("config.json: 'quantization_config.config_groups' names no group.", param="config_groups")
        self._groups = [] if groups is None else [_group(groups.inner(name), name, form) for name in named]
        self.method = f"compressed-tensors, {form}"

    def scheme(self, weights: Any, layer: str, rows: int, inputs: int) -> Scheme | None:
        """See Quantizer."""
        if makes_up(weights):
            return None if layer == "lm_head" or not self._groups else _sized(self._groups[0].scheme, rows, inputs)
        if not has(weights, f"{layer}.weight_scale"):
            return None
        group = self._group_of(layer)
        scheme = _sized(group.scheme, rows, inputs)
        if group.form in (NVFP4, MXFP4):
            divides(layer, "inputs", inputs, scheme.group)
        return scheme._replace(permuted=scheme.kind.startswith("int") and self._order(weights, layer, inputs, scheme) is not None)

    def _group_of(self, layer: str) -> Group:
        for match in (_names, _kinds):
            for group in self._groups:
                if any(match(target, layer) for target in group.targets):
                    return group
        raise CheckpointError(
            f"config.json: no group of 'quantization_config.config_groups' has {layer} for a target, but the files hold its scales.",
            param="config_groups",
        )

    def read(self, weights: Any, layer: str, scheme: Scheme, rows: int, inputs: int, device: torch.device) -> Quantised:
        """See Quantizer."""
        if makes_up(weights):
            return invented(weights, layer, scheme, rows, inputs, device)
        form = self._group_of(layer).form
        weights.ignore(f"{layer}.input_zero_point", f"{layer}.input_global_scale", f"{layer}.output_scale")
        if form == NVFP4:
            whole = number_of(weights, f"{layer}.weight_global_scale")
            return nvfp4(weights, f"{layer}.weight_packed", f"{layer}.weight_scale", 1 / whole, scheme, rows, inputs, device)
        if form == MXFP4:
            packed = stored(weights, f"{layer}.weight_packed", (rows, inputs // 2), torch.uint8)
            powers = stored(weights, f"{layer}.weight_scale", (rows, inputs // 32), torch.uint8)
            if bool((powers == 255).any()):  # E8M0's NaN
                raise CheckpointError(f"tensor '{layer}.weight_scale' holds NaN: the file is damaged.", param=f"{layer}.weight_scale")
            return Quantised(scheme, rows, inputs, packed.to(device), torch.exp2(powers.float() - 127).to(device))
        scales = scales_of(weights, f"{layer}.weight_scale", scheme.scale_rows(rows), scheme.groups(inputs))
        given = None
        if scheme.activations == "tensor":
            given = number_of(weights, f"{layer}.input_scale").to(device)
        else:
            weights.ignore(f"{layer}.input_scale")
        if scheme.kind.startswith("fp8"):
            data = stored(weights, f"{layer}.weight", (rows, inputs), scheme.dtype)
            weights.ignore(f"{layer}.weight_zero_point")
            return Quantised(scheme, rows, inputs, data.to(device), scales.to(device), input_scale=given)
        zeros = self._zeros(weights, layer, scheme, rows, scheme.groups(inputs), form)
        codes = self._codes(weights, layer, scheme, rows, inputs, form).to(device)
        order = self._order(weights, layer, inputs, scheme)
        if order is not None:
            order = order.to(device)
            codes = codes[:, order.long()]
        data = pack_nibbles(codes) if scheme.kind == "int4" else (codes.to(torch.int16) - 128).to(torch.int8)
        return Quantised(
            scheme, rows, inputs, data.contiguous(), scales.to(device), None if zeros is None else zeros.to(device), order, given
        )

    def _codes(self, weights: Any, layer: str, scheme: Scheme, rows: int, inputs: int, form: str) -> torch.Tensor:
        """[N, K] uint8, raised by half the range."""
        half = 1 << (scheme.bits - 1)
        if form != PACKED:
            return (stored(weights, f"{layer}.weight", (rows, inputs), torch.int8).to(torch.int16) + half).to(torch.uint8)
        if has(weights, f"{layer}.weight_shape"):
            shape = stored(weights, f"{layer}.weight_shape", (2,), torch.int64, torch.int32).tolist()
            if shape != [rows, inputs]:
                raise CheckpointError(
                    f"tensor '{layer}.weight_shape' says {shape}, the model {[rows, inputs]}.", param=f"{layer}.weight_shape"
                )
        words = stored(weights, f"{layer}.weight_packed", (rows, -(-inputs * scheme.bits // 32)), torch.int32)
        return words_to_codes(words, scheme.bits, 1)[:, :inputs]

    def _zeros(self, weights: Any, layer: str, scheme: Scheme, rows: int, groups: int, form: str) -> torch.Tensor | None:
        name = f"{layer}.weight_zero_point"
        if not scheme.zeros:
            weights.ignore(name)  # some files hold zeros there
            return None
        half = 1 << (scheme.bits - 1)
        rows = scheme.scale_rows(rows)
        if form == PACKED and weights.raw(name).dtype == torch.int32:
            words = stored(weights, name, (-(-rows * scheme.bits // 32), groups), torch.int32)
            zeros = words_to_codes(words, scheme.bits, 0)[:rows].to(torch.int16)
        else:
            value = stored(weights, name, None, torch.int8)
            if value.numel() != rows * groups:
                raise CheckpointError(f"tensor {name!r} holds {value.numel()} zero points; the format says {rows} x {groups}.", param=name)
            zeros = value.reshape(rows, groups).to(torch.int16) + half
        return (zeros if scheme.kind == "int4" else zeros - 128).contiguous()

    def _order(self, weights: Any, layer: str, inputs: int, scheme: Scheme) -> torch.Tensor | None:
        name = f"{layer}.weight_g_idx"
        if not has(weights, name):
            if scheme.group and self._group_of(layer).ordered:
                raise CheckpointError(f"tensor {name!r} is missing, but config.json says actorder: the group of each input.", param=name)
            return None
        index = stored(weights, name, (inputs,), torch.int32, torch.int64)
        if bool((index == -1).all()):  # stands for none
            return None
        return order_of(index, name, scheme.group)


def _names(target: str, layer: str) -> bool:
    if target.startswith("re:"):
        try:
            return re.match(target[3:], layer) is not None
        except re.error as error:
            raise CheckpointError(
                f"config.json: the target {target!r} of a config group is no regular expression ({error}).", param="targets"
            ) from None
    return target == layer


def _kinds(target: str, layer: str) -> bool:
    return target == "Linear"


def _sized(scheme: Scheme, rows: int, inputs: int) -> Scheme:
    """One group that holds all of a row is none, and a scale a row of one row is one a tensor."""
    return scheme._replace(group=0) if scheme.group >= inputs and scheme.rows == 1 else scheme


def _group(fields: Fields | None, name: str, form: str) -> Group:
    if fields is None or not isinstance(fields.config.get("targets"), list):
        raise CheckpointError(f"config.json: 'quantization_config.config_groups.{name}' must be an object with targets.", param=name)
    targets = [str(target) for target in fields.config["targets"]]
    form = fields.word("format", form, *FORMATS) if form == "mixed-precision" or fields.config.get("format") else form
    weights = fields.inner("weights")
    if weights is None:
        raise fields.refuse("weights", "a group without quantised weights is not supported.")
    bits, kind = weights.integer("num_bits"), weights.word("type", "int", "int", "float")
    strategy = weights.word("strategy", "group" if weights.config.get("group_size") else "tensor", *STRATEGIES)
    group = weights.group("group_size") if strategy in ("group", "tensor_group") else 0
    if (kind, bits) not in (("int", 4), ("int", 8), ("float", 8), ("float", 4)):
        raise weights.refuse("num_bits", "is not supported, only 4 and 8.")
    name = {("int", 4): "int4", ("int", 8): "int8", ("float", 8): "fp8_e4m3", ("float", 4): "fp4"}[kind, bits]
    if name == "fp4" and (form, group) not in ((NVFP4, 16), (MXFP4, 32)):
        raise weights.refuse("group_size", f"is not that of {form}.")
    rows = 0 if strategy == "tensor" else 1
    if strategy == "block":
        block = weights.config.get("block_structure")
        if not (isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)):
            raise CheckpointError(f"config.json: '{weights.where}.block_structure' must be two sizes.", param="block_structure")
        rows, group = block
    zeros = name.startswith("int") and not weights.flag("symmetric", True)
    ordered = strategy == "group" and weights.config.get("actorder") in (True, "group", "dynamic")
    return Group(
        targets, form, Scheme(name, group, rows, zeros, activations=_activations(fields.inner("input_activations"), name)), ordered
    )


def _online(fields: Fields | None) -> bool:
    """Whether a transform is anywhere but in stored weights."""
    groups = None if fields is None else fields.inner("config_groups")
    for name in () if groups is None else groups.config:
        one = groups.inner(name) if groups is not None else None
        places = [] if one is None else one.config.get("apply") or []
        if not isinstance(places, list) or any(not isinstance(at, dict) or at.get("location") not in OFFLINE for at in places):
            return True
    return False


def _activations(fields: Fields | None, kind: str) -> str:
    """How inputs are rounded; those of 4-bit weights are not. A fixed scale beside a zero point reaches to the middle of no range: a scale a row then."""
    if fields is None or kind in ("int4", "fp4"):
        return ""
    dynamic = fields.config.get("dynamic", False)
    return "token" if dynamic or not fields.flag("symmetric", True) else "tensor"
