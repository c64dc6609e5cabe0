"""FP8 checkpoints: "fp8" (a scale a tensor, or one a block as DeepSeek-V3's), "fbgemm_fp8" (one a row), and modelopt's FP8 and NVFP4.

What it is: a Quantizer. A layer is `weight` [N, K] in E4M3 or E5M2 and `weight_scale` or, with blocks, `weight_scale_inv`, which is multiplied all the
same; `input_scale` where inputs are rounded with a fixed scale. NVFP4 is two codes of E2M1 a byte, an E4M3 scale a group of 16, times
`weight_scale_2`. Which layers are quantised is what the files hold.
What it does not know: devices.
"""

from __future__ import annotations

from typing import Any

import torch

from penstock.core.protocol.errors import CheckpointError
from penstock.kernels.linear.scheme import Quantised, Scheme
from penstock.plugins.quantizers.fields import Fields, divides, has, invented, makes_up, number_of, scales_of, stored

KINDS = {torch.float8_e4m3fn: "fp8_e4m3", torch.float8_e5m2: "fp8_e5m2"}


class Fp8:
    """See plugins/models/api.py: Quantizer. `method` is the config's quant_method."""

    def __init__(self, method: str, config: dict[str, Any]) -> None:
        fields = Fields(config)
        self._fixed = fields.word("activation_scheme", "dynamic", "dynamic", "static") == "static"
        block = config.get("weight_block_size")
        if block is not None and not (isinstance(block, list | tuple) and len(block) == 2 and all(type(x) is int and x > 0 for x in block)):
            raise CheckpointError(
                f"config.json: 'quantization_config.weight_block_size' must be two sizes, but is {block!r:.60}.", param="weight_block_size"
            )
        self._block = None if block is None else (block[0], block[1])
        self.method = method + (f", blocks of {block[0]} x {block[1]}" if block else "")

    def scheme(self, weights: Any, layer: str, rows: int, inputs: int) -> Scheme | None:
        """See Quantizer."""
        if makes_up(weights):
            return None if layer == "lm_head" else Scheme("fp8_e4m3", *self._shape(weights, layer, rows), activations="token")
        if not (has(weights, f"{layer}.weight_scale") or has(weights, f"{layer}.weight_scale_inv")):
            return None
        kind = KINDS.get(weights.raw(f"{layer}.weight").dtype)
        if kind is None:
            raise CheckpointError(f"tensor '{layer}.weight' is no FP8 tensor, but has a scale.", param=f"{layer}.weight")
        fixed = self._fixed and has(weights, f"{layer}.input_scale")
        return Scheme(kind, *self._shape(weights, layer, rows), activations="tensor" if fixed else "token")

    def _shape(self, weights: Any, layer: str, rows: int) -> tuple[int, int]:
        """(group, rows) of a scale."""
        if self._block:
            return self._block[1], self._block[0]
        one = not makes_up(weights) and rows > 1 and weights.raw(f"{layer}.weight_scale").numel() == 1
        return 0, 0 if one else 1

    def read(self, weights: Any, layer: str, scheme: Scheme, rows: int, inputs: int, device: torch.device) -> Quantised:
        """See Quantizer."""
        if makes_up(weights):
            return invented(weights, layer, scheme, rows, inputs, device)
        data = stored(weights, f"{layer}.weight", (rows, inputs), *KINDS)
        name = f"{layer}.weight_scale_inv" if has(weights, f"{layer}.weight_scale_inv") else f"{layer}.weight_scale"
        scales = scales_of(weights, name, scheme.scale_rows(rows), scheme.groups(inputs))
        given = None
        if scheme.activations == "tensor":
            given = number_of(weights, f"{layer}.input_scale")
        else:
            weights.ignore(f"{layer}.input_scale")
        weights.ignore(f"{layer}.input_scale_ub", f"{layer}.k_scale", f"{layer}.v_scale")
        return Quantised(scheme, rows, inputs, data.to(device), scales.to(device), input_scale=None if given is None else given.to(device))


class Nvfp4:
    """See plugins/models/api.py: Quantizer. modelopt's NVFP4: groups of 16."""

    method = "modelopt, NVFP4"

    def scheme(self, weights: Any, layer: str, rows: int, inputs: int) -> Scheme | None:
        """See Quantizer."""
        if makes_up(weights):
            return None if layer == "lm_head" else Scheme("fp4", 16)
        if not has(weights, f"{layer}.weight_scale_2"):
            return None
        divides(layer, "inputs", inputs, 16)
        return Scheme("fp4", 16)

    def read(self, weights: Any, layer: str, scheme: Scheme, rows: int, inputs: int, device: torch.device) -> Quantised:
        """See Quantizer."""
        if makes_up(weights):
            return invented(weights, layer, scheme, rows, inputs, device)
        weights.ignore(f"{layer}.input_scale")
        whole = number_of(weights, f"{layer}.weight_scale_2")
        return nvfp4(weights, f"{layer}.weight", f"{layer}.weight_scale", whole, scheme, rows, inputs, device)


def nvfp4(
    weights: Any, name: str, scale_name: str, whole: torch.Tensor, scheme: Scheme, rows: int, inputs: int, device: torch.device
) -> Quantised:
    """Codes [N, K / 2] uint8 and scales [N, K / 16] E4M3, all times `whole`."""
    data = stored(weights, name, (rows, inputs // 2), torch.uint8)
    scales = stored(weights, scale_name, (rows, inputs // 16), torch.float8_e4m3fn)
    wide = scales.float() * whole
    if not bool(torch.isfinite(wide).all()):
        raise CheckpointError(f"tensor {scale_name!r} holds NaN, or its whole scale is none: the file is damaged.", param=scale_name)
    return Quantised(scheme, rows, inputs, data.to(device), wide.to(device))


def modelopt(config: dict[str, Any]) -> Fp8 | Nvfp4:
    """The reader of a modelopt checkpoint. Raises UnsupportedFeature for an algorithm that is neither FP8 nor NVFP4."""
    fields = Fields(config)
    inner = fields.inner("quantization") or fields
    if inner.word("quant_algo", "", "fp8", "nvfp4") == "nvfp4":
        return Nvfp4()
    return Fp8("modelopt", {"activation_scheme": "static"})
