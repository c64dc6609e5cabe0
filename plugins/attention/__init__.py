"""Attention backends, as plugins of the engine: on the CPU the project's own kernels or torch's, on a GPU the Triton kernels.

What it is: the registering hook. Nothing heavy is imported before a factory is called.
What it does not know: models, devices, caches' owners.
"""

from __future__ import annotations

from typing import Any

from penstock.core.contract.devices import ModelFacts
from penstock.core.contract.hookspecs import AttentionSpec, hookimpl

GROUP = 16
EIGHT_BITS = ("fp8_e4m3", "fp8_e5m2", "int8")


def _supports(facts: ModelFacts, dtype: str) -> str | None:
    if dtype not in ("float32", "bfloat16"):
        return f"dtype {dtype} is not supported"
    if facts.head_dim % GROUP:
        return f"head_dim {facts.head_dim} is no multiple of {GROUP}"
    if facts.softcap or facts.sinks:
        return "it has neither soft-caps nor sinks"
    return None


def _native(*, facts: ModelFacts, dtype: Any, device: Any, block_size: int, kv: str = "", **options: Any) -> Any:
    from penstock.plugins.attention.native import NativeAttention

    return NativeAttention(facts, dtype, device, block_size, kv)


def _torch_supports(facts: ModelFacts, dtype: str) -> str | None:
    return f"head_dim {facts.head_dim} is no multiple of {GROUP}" if facts.head_dim % GROUP else None


def _torch(*, facts: ModelFacts, dtype: Any, device: Any, block_size: int, kv: str = "", **options: Any) -> Any:
    from penstock.plugins.attention.sdpa import TorchAttention

    return TorchAttention(facts, dtype, device, block_size, kv)


def _triton_supports(facts: ModelFacts, dtype: str) -> str | None:
    if dtype not in ("bfloat16", "float16"):
        return f"dtype {dtype} is not supported"
    if facts.head_dim % GROUP or facts.head_dim > 256:
        return f"head_dim {facts.head_dim} is no multiple of {GROUP} up to 256"
    return None


def _triton(
    *, facts: ModelFacts, dtype: Any, device: Any, block_size: int, max_rows: int, deterministic: bool, kv: str = "", **options: Any
) -> Any:
    from penstock.plugins.attention.triton import TritonAttention

    return TritonAttention(facts, dtype, device, block_size, max_rows=max_rows, deterministic=deterministic, kv=kv)


@hookimpl
def register_attention_backends() -> list[AttentionSpec]:
    """Their factories give objects of plugins/models/api.py's Attention."""
    return [
        AttentionSpec(
            name="native",
            api_level=2,
            doc="The whole step as one program of C kernels (their torch references where no compiler is found).",
            devices=["cpu"],
            supports=_supports,
            factory=_native,
            priority=10,
            kv_dtypes=EIGHT_BITS,
        ),
        AttentionSpec(
            name="torch",
            api_level=2,
            doc="scaled_dot_product_attention on gathered keys, operation by operation: a cross-check, and a fallback.",
            devices=["cpu", "cuda"],
            supports=_torch_supports,
            factory=_torch,
            kv_dtypes=EIGHT_BITS,
        ),
        AttentionSpec(
            name="triton",
            api_level=2,
            doc="Triton kernels: split-KV decode, ragged prefill, and everything between.",
            devices=["cuda"],
            supports=_triton_supports,
            factory=_triton,
            priority=10,
            kv_dtypes=EIGHT_BITS,
        ),
    ]
