"""What readers of quantised checkpoints share: fields of a quantization_config, and tensors as they are stored.

What it is: `Fields`, whose errors name the field and say what it must be; `stored`, a raw tensor of the shape and dtypes that a format says; codes
unpacked from 32-bit words.
What it does not know: any format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from penstock.core.protocol.errors import CheckpointError, UnsupportedFeature
from penstock.kernels.linear.scheme import Quantised, Scheme, quantise

Tensor = torch.Tensor
EIGHT = {torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7C}
"""Bits that are all set in a code that is no number."""
FLOATING = (torch.float16, torch.bfloat16, torch.float32)


class Fields:
    """A quantization_config, or an object within it."""

    def __init__(self, config: Mapping[str, Any], where: str = "quantization_config") -> None:
        self.config = config
        self.where = where

    def refuse(self, name: str, why: str) -> UnsupportedFeature:
        """To be raised: what it says is understood, and not served."""
        return UnsupportedFeature(f"config.json: '{self.where}.{name}' {self.config.get(name)!r:.60}: {why}", param=name)

    def integer(self, name: str, default: int | None = None, *also: str) -> int:
        """Its value, or that of another spelling."""
        value = next((self.config[one] for one in (name, *also) if self.config.get(one) is not None), default)
        if type(value) is not int:
            raise CheckpointError(f"config.json: '{self.where}.{name}' must be a whole number, but is {value!r:.60}.", param=name)
        return value

    def flag(self, name: str, default: bool) -> bool:
        """Its value."""
        value = self.config.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise CheckpointError(f"config.json: '{self.where}.{name}' must be true or false, but is {value!r:.60}.", param=name)
        return value

    def word(self, name: str, default: str, *known: str) -> str:
        """Its value, one of those known. Raises UnsupportedFeature for another."""
        value = self.config.get(name)
        value = default if value is None else value
        if not isinstance(value, str) or value.lower() not in known:
            raise self.refuse(name, f"is not supported, only {', '.join(known)}.")
        return value.lower()

    def inner(self, name: str) -> Fields | None:
        """The object of that name."""
        value = self.config.get(name)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise CheckpointError(f"config.json: '{self.where}.{name}' must be an object, but is {value!r:.60}.", param=name)
        return Fields(value, f"{self.where}.{name}")

    def group(self, name: str, default: int | None = None, *also: str) -> int:
        """A group size: above 0, or 0 where the field says -1 (a whole row)."""
        size = self.integer(name, default, *also)
        if size == -1:
            return 0
        if size < 1:
            raise CheckpointError(f"config.json: '{self.where}.{name}' must be above 0 or -1, but is {size}.", param=name)
        return size


def has(weights: Any, name: str) -> bool:
    """Whether the checkpoint holds the tensor."""
    return bool(weights.has(name))


def makes_up(weights: Any) -> bool:
    """A source of invented tensors, which has none of the format's."""
    return not hasattr(weights, "raw")


def invented(weights: Any, layer: str, scheme: Scheme, rows: int, inputs: int, device: torch.device) -> Quantised:
    """Invented numbers in this scheme."""
    wide = weights.take(f"{layer}.weight", (rows, inputs)).to(device)
    scales = torch.float16 if scheme.bits == 4 else torch.float32
    return quantise(wide, scheme._replace(permuted=False, activations=""), scales)._replace(scheme=scheme)


def stored(weights: Any, name: str, shape: Sequence[int] | None, *dtypes: torch.dtype) -> Tensor:
    """The tensor as it is stored. Raises CheckpointError naming it where it is missing or has another shape or dtype, or where it is floating and not
    finite."""
    value: Tensor = weights.raw(name)
    if shape is not None and list(value.shape) != list(shape):
        raise CheckpointError(
            f"tensor {name!r} has shape {list(value.shape)}; what config.json says of the model and its quantisation makes it {list(shape)}.",
            param=name,
        )
    if dtypes and value.dtype not in dtypes:
        raise CheckpointError(f"tensor {name!r} is {value.dtype}; this format stores {' or '.join(map(str, dtypes))} there.", param=name)
    if not _finite(value):
        raise CheckpointError(f"tensor {name!r} holds NaN or infinite values: the file is damaged.", param=name)
    return value


def number_of(weights: Any, name: str) -> Tensor:
    """A tensor of one number, as float32 without a dimension."""
    value = stored(weights, name, None, *FLOATING)
    if value.numel() != 1:
        raise CheckpointError(f"tensor {name!r} has shape {list(value.shape)}; this format stores one number there.", param=name)
    return value.float().reshape(())


def _finite(value: Tensor) -> bool:
    if value.dtype in EIGHT:
        bits = EIGHT[value.dtype]
        return not bool(torch.eq(value.view(torch.uint8) & bits, bits).any())
    return value.dtype not in FLOATING or bool(torch.isfinite(value).all())


def scales_of(weights: Any, name: str, rows: int, groups: int) -> Tensor:
    """Scales [rows, groups], however a format shortens the shape of one that has a dimension of 1."""
    value = stored(weights, name, None, *FLOATING)
    if value.numel() != rows * groups:
        raise CheckpointError(
            f"tensor {name!r} holds {value.numel()} scales (shape {list(value.shape)}); the format says {rows} x {groups}.", param=name
        )
    return value.reshape(rows, groups).contiguous()


def words_to_codes(words: Tensor, bits: int, dim: int) -> Tensor:
    """int32 words, each 32 / bits codes from its lowest bits up, along dimension `dim` (0 or 1): uint8, that dimension so much longer."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    if dim == 0:
        codes = (words[:, None, :] >> shifts[None, :, None]) & ((1 << bits) - 1)
        return codes.to(torch.uint8).flatten(0, 1)
    codes = (words[:, :, None] >> shifts) & ((1 << bits) - 1)
    return codes.to(torch.uint8).flatten(1)


def divides(layer: str, what: str, size: int, by: int) -> None:
    """Raises UnsupportedFeature unless `by` divides `size`."""
    if size % by:
        raise UnsupportedFeature(f"{layer}: {size} {what} are no multiple of {by}, which this format needs.", param="quantization_config")


def order_of(group_of: Tensor, name: str, group: int) -> Tensor | None:
    """For the group of each input (GPTQ's g_idx): the order of inputs in which groups follow one another, int32; None where they do already. Raises
    CheckpointError where groups have other sizes than the format says."""
    k = group_of.shape[0]
    plain = torch.arange(k, dtype=group_of.dtype) // min(group or k, k)
    if torch.equal(group_of, plain):
        return None
    order = torch.argsort(group_of, stable=True)
    if not torch.equal(group_of[order], plain):
        raise CheckpointError(f"tensor {name!r} puts other numbers of inputs into a group than the group size {group} allows.", param=name)
    return order.to(torch.int32)
