"""Model families, as plugins of the engine: the decoder family of Llama, Mistral, Qwen2 and Qwen3.

What it is: the registering hook. Nothing heavy is imported before a factory or `facts` is called.
What it does not know: devices, weights, kernels.
"""

from __future__ import annotations

from typing import Any

from penstock.core.contract.devices import ModelFacts
from penstock.core.contract.hookspecs import ModelSpec, hookimpl


def _facts(config: dict[str, Any]) -> ModelFacts:
    from penstock.plugins.models.config import decoder_facts

    return decoder_facts(config)


def _factory(**parts: Any) -> Any:
    from penstock.plugins.models.decoder import build_decoder

    return build_decoder(**parts)


_FAMILY = {
    "llama": (["LlamaForCausalLM"], "Llama 2 and 3 and what shares their shape."),
    "mistral": (["MistralForCausalLM"], "Mistral: Llama with a sliding window in every layer."),
    "qwen2": (["Qwen2ForCausalLM"], "Qwen2 and Qwen2.5: biases on q, k and v; an optional window in the upper layers."),
    "qwen3": (["Qwen3ForCausalLM"], "Qwen3 (dense): RMS norms on the heads of q and k."),
}


@hookimpl
def register_models() -> list[ModelSpec]:
    """The built-in decoder families, by config.json's `architectures`."""
    return [
        ModelSpec(name=name, api_level=2, doc=doc, architectures=architectures, facts=_facts, factory=_factory)
        for name, (architectures, doc) in _FAMILY.items()
    ]
