"""Attention backends of the CPU, as plugins of the engine: the project's own kernels, or torch's.

What it is: the registering hook. Nothing heavy is imported before a factory is called.
What it does not know: models, devices, caches' owners.
"""

from __future__ import annotations

from typing import Any

from penstock.core.device_api import ModelFacts
from penstock.core.hookspecs import AttentionSpec, hookimpl

GROUP = 16


def _supports(facts: ModelFacts, dtype: str) -> str | None:
    if dtype not in ("float32", "bfloat16"):
        return f"dtype {dtype} is not supported"
    if facts.head_dim % GROUP:
        return f"head_dim {facts.head_dim} is no multiple of {GROUP}"
    return None


def _native(**options: Any) -> Any:
    from penstock.plugins.attention.native import NativeAttention

    return NativeAttention()


def _torch(**options: Any) -> Any:
    from penstock.plugins.attention.sdpa import TorchAttention

    return TorchAttention()


@hookimpl
def register_attention_backends() -> list[AttentionSpec]:
    """`factory()` returns an object of plugins/models/api.py's Attention."""
    return [
        AttentionSpec(
            name="native",
            api_level=1,
            doc="The whole step as one program of C kernels (their torch references where no compiler is found).",
            devices=["cpu"],
            supports=_supports,
            factory=_native,
            priority=10,
        ),
        AttentionSpec(
            name="torch",
            api_level=1,
            doc="scaled_dot_product_attention on gathered keys, operation by operation: a cross-check, and a fallback.",
            devices=["cpu"],
            supports=_supports,
            factory=_torch,
        ),
    ]
