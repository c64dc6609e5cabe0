"""Quantised weights, as plugins of the engine: readers of the formats that checkpoints come in, and rounding while loading.

What it is: the registering hook. Nothing heavy is imported before a factory is called.
What it does not know: devices, kernels.
"""

from __future__ import annotations

from typing import Any

from penstock.core.contract.hookspecs import QuantizerSpec, hookimpl


def _gptq(*, method: str, config: dict[str, Any], **options: Any) -> Any:
    from penstock.plugins.quantizers.gptq import Gptq

    return Gptq(config)


def _awq(*, method: str, config: dict[str, Any], **options: Any) -> Any:
    from penstock.plugins.quantizers.awq import Awq

    return Awq(config)


def _auto_round(*, method: str, config: dict[str, Any], **options: Any) -> Any:
    from penstock.plugins.quantizers.auto_round import auto_round

    return auto_round(config)


def _compressed(*, method: str, config: dict[str, Any], **options: Any) -> Any:
    from penstock.plugins.quantizers.compressed import CompressedTensors

    return CompressedTensors(config)


def _fp8(*, method: str, config: dict[str, Any], **options: Any) -> Any:
    from penstock.plugins.quantizers.fp8 import Fp8

    return Fp8(method, config)


def _modelopt(*, method: str, config: dict[str, Any], **options: Any) -> Any:
    from penstock.plugins.quantizers.fp8 import modelopt

    return modelopt(config)


def _bitsandbytes(*, method: str, config: dict[str, Any], **options: Any) -> Any:
    from penstock.plugins.quantizers.bitsandbytes import Bitsandbytes

    return Bitsandbytes(config)


def _torchao(*, method: str, config: dict[str, Any], **options: Any) -> Any:
    from penstock.plugins.quantizers.torchao import TorchAo

    return TorchAo(config)


def _gguf(*, method: str, config: dict[str, Any], **options: Any) -> Any:
    from penstock.plugins.quantizers.gguf import Gguf

    return Gguf(config)


def _online(*, method: str, config: dict[str, Any], head: bool = False, **options: Any) -> Any:
    from penstock.plugins.quantizers.online import Online

    return Online(method, head=head)


@hookimpl
def register_quantizers() -> list[QuantizerSpec]:
    """The built-in readers and the rounding."""

    def reader(name: str, doc: str, methods: list[str], factory: Any) -> QuantizerSpec:
        return QuantizerSpec(name=name, api_level=1, doc=doc, methods=methods, factory=factory)

    return [
        reader("gptq", "GPTQ, 4 and 8 bits, act-order too.", ["gptq"], _gptq),
        reader("awq", "AWQ, 4 bits, layout gemm.", ["awq"], _awq),
        reader("auto-round", "AutoRound in the packings of GPTQ and AWQ.", ["auto-round", "intel/auto-round"], _auto_round),
        reader("compressed-tensors", "Integers, FP8, NVFP4, MXFP4 of llm-compressor.", ["compressed-tensors"], _compressed),
        reader("fp8", "FP8 with a scale a tensor, row or block.", ["fp8", "fbgemm_fp8"], _fp8),
        reader("modelopt", "FP8 and NVFP4 of TensorRT Model Optimizer.", ["modelopt"], _modelopt),
        reader("bitsandbytes", "NF4 and LLM.int8().", ["bitsandbytes"], _bitsandbytes),
        reader("torchao", "Integers of 8 and 4 bits and FP8 of torchao, in safetensors files.", ["torchao"], _torchao),
        reader("gguf", "Q8_0, Q6_K, Q5_0, Q4_0 and Q3_K of GGUF files.", ["gguf"], _gguf),
        QuantizerSpec(
            name="online",
            api_level=1,
            doc="Rounds wide weights while they load.",
            methods=[],
            schemes=["int8", "int8-w8a8", "int4", "fp8", "nf4", "mxfp4"],
            factory=_online,
        ),
    ]
