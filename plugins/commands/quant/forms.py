"""How `penstock quantize` stores a layer: the schemes it knows, in the compressed-tensors format, and NF4, which that has not, in bitsandbytes'.

What it is: for a word of --scheme the rounding of a weight of this shape, its entry of `config_groups`, and its tensors as files hold them.
plugins/quantizers/compressed.py and bitsandbytes.py read them.
What it does not know: files, which layers there are, how a weight is rounded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from penstock.kernels.linear.scheme import NF4, Quantised, Scheme
from penstock.plugins.quantizers.bitsandbytes import STATE

Tensor = torch.Tensor

FORMATS = {
    "w4a16": "pack-quantized",
    "w8a16": "pack-quantized",
    "int8": "int-quantized",
    "fp8": "float-quantized",
    "fp8-block": "float-quantized",
    "mxfp4": "mxfp4-pack-quantized",
}
"""Word of --scheme -> the format's name in config.json."""
NF4_WORD = "nf4"
NF4_GROUP = 64
"""The block size that bitsandbytes has by itself."""
GROUPS = (128, 64, 32)
"""Of w4a16, the widest that divides a layer's inputs."""
BLOCK = 128
MXFP4_GROUP = 32
EXPONENT_BIAS = 127
"""Of a scale of MXFP4 (E8M0)."""


def scheme_of(word: str, rows: int, inputs: int) -> Scheme | None:
    """How a weight [rows, inputs] is rounded; None: its shape does not fit, and it stays wide."""
    if word == "w4a16":
        group = next((group for group in GROUPS if inputs % group == 0), None)
        return None if group is None else Scheme("int4", group)
    if word == NF4_WORD:
        return None if inputs % NF4_GROUP else Scheme("nf4", NF4_GROUP)
    if word == "mxfp4":
        return None if inputs % MXFP4_GROUP else Scheme("fp4", MXFP4_GROUP)
    if word == "fp8-block":
        return None if rows % BLOCK or inputs % BLOCK else Scheme("fp8_e4m3", BLOCK, BLOCK)
    return Scheme("fp8_e4m3" if word == "fp8" else "int8")


def scale_dtype_of(word: str, stored: torch.dtype) -> torch.dtype:
    """bfloat16 for weights of it, as other programs keep scales in the model's dtype; else float32: float16 has no scales for groups that are nearly zero."""
    return torch.bfloat16 if stored == torch.bfloat16 and word not in ("mxfp4", NF4_WORD) else torch.float32


def tensors_of(word: str, layer: str, q: Quantised, wide: torch.dtype) -> dict[str, Tensor]:
    """The layer's tensors by the names that files hold; `wide` is the dtype that it had."""
    if word == NF4_WORD:
        state = {"quant_type": "nf4", "blocksize": q.scheme.group, "dtype": str(wide).removeprefix("torch."), "shape": [q.n, q.k]}
        return {
            f"{layer}.weight": (q.data >> 4 | q.data << 4).reshape(-1, 1),  # the even input in the high half
            f"{layer}.weight.absmax": q.scales.float().reshape(-1),
            f"{layer}.weight.quant_map": torch.tensor(NF4),
            f"{layer}.weight.{STATE}nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
        }
    form = FORMATS[word]
    if form == "mxfp4-pack-quantized":
        powers = (torch.log2(q.scales.float()).round() + EXPONENT_BIAS).clamp(0, 254).to(torch.uint8)
        return {f"{layer}.weight_packed": q.data, f"{layer}.weight_scale": powers}
    scales = {f"{layer}.weight_scale": q.scales}
    if form != "pack-quantized":
        return {f"{layer}.weight": q.data, **scales}
    raised = q.data if q.scheme.bits == 4 else (q.data.to(torch.int16) + 128).to(torch.uint8)
    words = torch.nn.functional.pad(raised, (0, -raised.shape[1] % 4)).contiguous().view(torch.int32)  # low codes first, as bytes lie
    return {f"{layer}.weight_packed": words, f"{layer}.weight_shape": torch.tensor([q.n, q.k]), **scales}


def configuration(schemes: Mapping[str, tuple[str, Scheme]], wide: Sequence[str]) -> dict[str, Any]:
    """`quantization_config` for layers, their words of --scheme and their schemes; `wide` are linear layers that stay as they were. The form that most layers have
    stands for all, others name theirs."""
    kinds: dict[tuple[str, Scheme], list[str]] = {}
    for layer, form in schemes.items():
        kinds.setdefault(form, []).append(layer)
    ordered = sorted(kinds.items(), key=lambda kind: -len(kind[1]))
    groups = {
        f"group_{index}": {
            "targets": ["Linear"] if index == 0 else layers,
            "weights": _weights(word, scheme),
            "input_activations": _activations(word),
            "output_activations": None,
            "format": FORMATS[word],
        }
        for index, ((word, scheme), layers) in enumerate(ordered)
    }
    formats = {FORMATS[word] for word, _ in kinds}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(wide),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def bitsandbytes(wide: Sequence[str], dtype: str) -> dict[str, Any]:
    """`quantization_config` of NF4; `wide` are linear layers that stay as they were."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_compute_dtype": dtype,
        "llm_int8_skip_modules": sorted(wide),
    }


def _weights(word: str, scheme: Scheme) -> dict[str, Any]:
    said: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": "int" if scheme.kind.startswith("int") else "float",
        "symmetric": True,
        "dynamic": False,
    }
    if word == "fp8-block":
        return {**said, "strategy": "block", "block_structure": [BLOCK, BLOCK]}
    if scheme.group:
        return {**said, "strategy": "group", "group_size": scheme.group, **({"scale_dtype": "torch.uint8"} if word == "mxfp4" else {})}
    return {**said, "strategy": "channel"}


def _activations(word: str) -> dict[str, Any] | None:
    """How a server that multiplies 8 bits by 8 bits rounds inputs: while it runs."""
    if word not in ("int8", "fp8", "fp8-block"):
        return None
    said = {"num_bits": 8, "type": "int" if word == "int8" else "float", "symmetric": True, "dynamic": True}
    return {**said, "strategy": "group", "group_size": BLOCK} if word == "fp8-block" else {**said, "strategy": "token"}


NORMS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Norms of a plain decoder's layer, whose weight is a factor of what these layers read, and nothing else does."""
PLAIN = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Architectures of which that is so."""


def norm_of(layers: Sequence[str], architecture: str) -> str | None:
    """The tensor that is a factor of the inputs of these layers, if they are all that read it."""
    for norm, readers in NORMS.items():
        at = layers[0].removesuffix(readers[0])
        if architecture in PLAIN and list(layers) == [at + reader for reader in readers]:
            return f"{at}{norm}.weight"
    return None


def norm_before(layer: str, architecture: str) -> str | None:
    """The tensor that is a factor of the inputs of one layer."""
    for norm, readers in NORMS.items():
        for reader in readers:
            if architecture in PLAIN and layer.endswith("." + reader):
                return f"{layer.removesuffix(reader)}{norm}.weight"
    return None
