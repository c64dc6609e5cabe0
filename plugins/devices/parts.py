"""What a device is put together from: the model family, the weight source and the attention backends for a configuration.

What it is: config.json as the device's plugins will read it, and the choice among what plugins registered, for every device alike. Later
plugins are asked before built-in ones, so that a plugin may serve `--load-format auto` or an architecture in their place.
What it does not know: dtypes that a device computes, sizes, how anything is loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from penstock.core.contract.devices import ModelFacts, RunnerConfig
from penstock.core.contract.hookspecs import AttentionSpec, ModelSpec, WeightSourceSpec
from penstock.core.protocol.config import nearest
from penstock.core.protocol.errors import ConfigError, UnsupportedFeature
from penstock.plugins import attention as builtin_attention
from penstock.plugins import models as builtin_models
from penstock.plugins import weights as builtin_weights
from penstock.plugins.models.config import architecture_of, check_model_type, read_config
from penstock.plugins.weights.checkpoint import sample_of, stored_dtype


def model_of(config: RunnerConfig) -> tuple[dict[str, Any], ModelSpec, ModelFacts]:
    """(config.json with what overrides and files add to it, the family that serves it, its facts). Raises CheckpointError and
    UnsupportedFeature naming the field."""
    raw = read_config(config.model_path, config.hf_overrides)
    check_model_type(raw)
    spec = model_for(architecture_of(raw), models_of(config))
    if raw.get("dtype") is None and raw.get("torch_dtype") is None and weights_for(config).name == builtin_weights.SAFETENSORS:
        stored = stored_dtype(config.model_path)
        raw |= {"dtype": stored} if stored else {}
    return raw, spec, spec.facts(raw)


def models_of(config: RunnerConfig) -> Mapping[str, ModelSpec]:
    """Model families by name, built-in ones first."""
    return config.plugins.models() if config.plugins is not None else {s.name: s for s in builtin_models.register_models()}


def attention_of(config: RunnerConfig) -> Mapping[str, AttentionSpec]:
    """Attention backends by name, built-in ones first."""
    if config.plugins is not None:
        return dict(config.plugins.attention_backends())
    return {s.name: s for s in builtin_attention.register_attention_backends()}


def model_for(architecture: str, specs: Mapping[str, ModelSpec]) -> ModelSpec:
    """The family that serves config.json's architecture. Raises UnsupportedFeature listing those known."""
    for spec in reversed(list(specs.values())):
        if architecture in spec.architectures:
            return spec
    known = ", ".join(sorted({name for spec in specs.values() for name in spec.architectures}))
    raise UnsupportedFeature(f"config.json: architecture {architecture!r} is not supported yet. Known: {known}.", param="architectures")


def weights_for(config: RunnerConfig) -> WeightSourceSpec:
    """The source that serves --load-format. Raises ConfigError listing the formats known."""
    wanted = config.load_format
    if config.plugins is not None:
        specs: list[WeightSourceSpec] = list(config.plugins.weight_sources().values())
    else:
        specs = builtin_weights.register_weight_sources()
    for spec in reversed(specs):
        if wanted in spec.load_formats:
            return spec
    known = sorted({name for spec in specs for name in spec.load_formats})
    raise ConfigError(
        f"--load-format {wanted}: no plugin serves it.{nearest(wanted, known)} Known: {', '.join(known)}.", param="load_format"
    )


def identity(config: RunnerConfig, weights: Any) -> str:
    """A digest that changes with the checkpoint: config.json and what the weight source says of itself (`identity()`, a text), or else every
    file of the folder."""
    digest = hashlib.sha256((Path(config.model_path) / "config.json").read_bytes())
    own = getattr(weights, "identity", None)
    if own is not None:
        digest.update(str(own()).encode())
    else:
        for file in sorted(file for file in Path(config.model_path).iterdir() if file.is_file()):
            digest.update(f"{file.name} {config.load_format}".encode() + sample_of(file))
    return digest.hexdigest()
