"""Makes torchao_layers.safetensors: a layer of each class that torchao itself quantised, as transformers saves them, beside the values that torchao says it has.

Run by hand where torchao is installed (0.18 wrote the file): `python tests/quantizers/make_torchao.py`. Int4Tensor is made of tensors by hand, because the library
makes it on GPUs alone; its values are computed here as torchao's own GPTQ does (prototype/gptq): code * scale + zero point.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torchao.quantization as ao
from safetensors.torch import save_file
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

N, K, GROUP = 8, 64, 32
FILE = Path(__file__).with_name("torchao_layers.safetensors")


def layer(config: Any, seed: int) -> torch.nn.Linear:
    torch.manual_seed(seed)
    made = torch.nn.Linear(K, N, bias=False, dtype=torch.bfloat16)
    if config is not None:
        ao.quantize_(made, config)
    return made


def main() -> None:
    group, four = ao.PerGroup(GROUP), torch.int4
    configs = {
        "int8": ao.Int8WeightOnlyConfig(),
        "int8_dynamic": ao.Int8DynamicActivationInt8WeightConfig(),
        "int8_whole": ao.Int8WeightOnlyConfig(granularity=ao.PerTensor()),
        "float8": ao.Float8WeightOnlyConfig(),
        "intx4": ao.IntxWeightOnlyConfig(weight_dtype=four, granularity=group),
        "intx4_zeros": ao.IntxWeightOnlyConfig(weight_dtype=four, granularity=group, mapping_type=ao.MappingType.ASYMMETRIC),
        "intx8_zeros": ao.IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=group, mapping_type=ao.MappingType.ASYMMETRIC),
        "intx6": ao.IntxWeightOnlyConfig(weight_dtype=torch.int6, granularity=group),
        "int8_dynamic_intx4": ao.Int8DynamicActivationIntxWeightConfig(weight_dtype=four, weight_granularity=group),
    }
    weights: dict[str, Any] = {}
    for seed, (name, config) in enumerate(configs.items()):
        weights[name] = layer(config, seed).weight.data
    for name, kwargs in (("float8_whole", None), ("float8_dynamic", QuantizeTensorToFloat8Kwargs(granularity=ao.PerRow()))):
        grain = ao.PerTensor() if kwargs is None else ao.PerRow()
        weights[name] = ao.Float8Tensor.from_hp(layer(None, 40).weight.data, granularity=grain, act_quant_kwargs=kwargs)
    meant = {name: weight.dequantize().float() for name, weight in weights.items()}
    for name, shift in (("int4", 0.0), ("int4_zeros", 0.3)):
        torch.manual_seed(50)
        codes = torch.randint(-8, 8, (N, K), dtype=torch.int8)
        scale = torch.rand(K // GROUP, N).add(0.5).bfloat16()
        zero = (shift * torch.randn(K // GROUP, N)).bfloat16()
        packed = (codes[:, 0::2] & 15) | (codes[:, 1::2] << 4)
        weights[name] = ao.Int4Tensor(packed, scale, zero, [1, GROUP], torch.Size([N, K]))
        spread = (part.float().t().repeat_interleave(GROUP, 1) for part in (scale, zero))
        meant[name] = codes.float() * next(spread) + next(spread)
    tensors, notes = flatten_tensor_state_dict({f"{name}.weight": weight for name, weight in weights.items()})
    tensors |= {f"meant.{name}": value for name, value in meant.items()}
    save_file({name: value.contiguous() for name, value in tensors.items()}, FILE, {"format": "pt", **notes})


if __name__ == "__main__":
    main()
