"""config.json of a Hugging Face folder -> ModelFacts.

What it is: the reading, overriding and checking of the decoder family's configuration: every field that changes the arithmetic is either
understood or refused by name, never ignored. Defaults are those of the Hugging Face configuration classes of the four families.
Rotary parameters come from `rope_scaling`, from `rope_parameters` (one dict that also holds rope_theta) or from a flat `rope_theta`.
What it does not know: torch, tensors, devices.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from penstock.core.device_api import ModelFacts, RopeFacts, RopeType
from penstock.core.errors import CheckpointError, ConfigError, UnsupportedFeature

CONFIG = "config.json"

ROPE_TYPES: dict[str, RopeType] = {
    "default": "default",
    "linear": "linear",
    "dynamic": "dynamic",
    "yarn": "yarn",
    "llama3": "llama3",
    "longrope": "longrope",
    "su": "longrope",
}
"""Names in config.json (`su` is longrope's first name) -> ours."""

DTYPES = ("float32", "bfloat16", "float16")


def read_config(model_path: str | Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """config.json with `overrides` (--hf-overrides) merged over it, nested objects key by key.

    Raises CheckpointError if the file is missing or no JSON object.
    """
    path = Path(model_path) / CONFIG
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): is --model a Hugging Face folder?", param="model") from None
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.", param="model") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(raw).__name__}.", param="model")
    return merge(raw, overrides or {})


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`; objects on both sides merge, anything else is replaced."""
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        out[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return out


def architecture_of(config: Mapping[str, Any]) -> str:
    """The first entry of `architectures`. Raises CheckpointError."""
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{CONFIG}: 'architectures' must name the model's class, but is {names!r}.", param="architectures")
    return cast(str, names[0])


class _Fields:
    """Typed reads that name the field when it is missing or wrong."""

    def __init__(self, raw: Mapping[str, Any], where: str = CONFIG) -> None:
        self.raw, self.where = raw, where

    def integer(self, name: str, default: int | None = None, *, low: int = 1) -> int:
        value = self.raw.get(name)
        if value is None:
            if default is None:
                raise CheckpointError(f"{self.where}: '{name}' is missing.", param=name)
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise CheckpointError(f"{self.where}: '{name}' must be an integer of at least {low}, but is {value!r}.", param=name)
        return value

    def number(self, name: str, default: float | None = None, *, positive: bool = True) -> float:
        value = self.raw.get(name)
        if value is None:
            if default is None:
                raise CheckpointError(f"{self.where}: '{name}' is missing.", param=name)
            return default
        good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not good or (positive and value <= 0):
            raise CheckpointError(
                f"{self.where}: '{name}' must be a {'positive ' if positive else ''}number, but is {value!r}.", param=name
            )
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.raw.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.where}: '{name}' must be true or false, but is {value!r}.", param=name)
        return value


def decoder_facts(config: dict[str, Any]) -> ModelFacts:
    """The shape of a Llama, Mistral, Qwen2 or Qwen3 checkpoint.

    Raises CheckpointError naming a missing or impossible field, UnsupportedFeature naming one that is not supported yet.
    """
    architecture = architecture_of(config)
    fields = _Fields(config)
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method") if isinstance(config["quantization_config"], dict) else None
        raise UnsupportedFeature(
            f"{CONFIG}: 'quantization_config' (method {method!r}): quantised checkpoints are not supported yet.",
            param="quantization_config",
        )
    act = config.get("hidden_act", "silu")
    if act != "silu":
        raise UnsupportedFeature(f"{CONFIG}: 'hidden_act' {act!r} is not supported yet, only 'silu'.", param="hidden_act")
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", heads)
    layers = fields.integer("num_hidden_layers")
    if config.get("head_dim") is None and architecture != "Qwen3ForCausalLM" and hidden % heads:
        raise CheckpointError(f"{CONFIG}: 'hidden_size' {hidden} is no multiple of 'num_attention_heads' {heads}.", param="hidden_size")
    head_dim = fields.integer("head_dim", 128 if architecture == "Qwen3ForCausalLM" else hidden // heads)
    if head_dim % 2:
        raise CheckpointError(f"{CONFIG}: 'head_dim' must be even, but is {head_dim}.", param="head_dim")
    if heads % kv_heads:
        raise CheckpointError(
            f"{CONFIG}: 'num_attention_heads' {heads} is no multiple of 'num_key_value_heads' {kv_heads}.", param="num_key_value_heads"
        )
    window, sliding = _windows(config, fields, architecture, layers)
    bias = architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM") and fields.flag("attention_bias", False)
    max_position = fields.integer("max_position_embeddings")
    rope = rope_facts(config, max_position)
    return ModelFacts(
        architecture=architecture,
        model_type=str(config.get("model_type", "")),
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position=_scaled_max(rope, max_position),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        attention_bias=bias or architecture == "Qwen2ForCausalLM",
        attention_out_bias=bias,
        mlp_bias=architecture == "LlamaForCausalLM" and fields.flag("mlp_bias", False),
        qk_norm=architecture == "Qwen3ForCausalLM",
        hidden_act=act,
        sliding_window=window,
        sliding_layers=sliding,
        rope=rope,
        torch_dtype=_dtype(config),
    )


def _dtype(config: Mapping[str, Any]) -> str:
    value = config.get("dtype") or config.get("torch_dtype") or "float32"
    name = str(value).removeprefix("torch.")
    if name not in DTYPES:
        raise UnsupportedFeature(f"{CONFIG}: 'dtype' {value!r} is not supported yet, only {', '.join(DTYPES)}.", param="dtype")
    return name


def _windows(config: Mapping[str, Any], fields: _Fields, architecture: str, layers: int) -> tuple[int | None, list[bool]]:
    """(window in tokens or None, one flag per layer or []). A token attends to itself and the window - 1 before it."""
    kinds = config.get("layer_types")
    if kinds is not None:
        known = ("full_attention", "sliding_attention")
        if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in known for kind in kinds):
            raise UnsupportedFeature(
                f"{CONFIG}: 'layer_types' must hold {layers} entries out of {', '.join(known)}; other kinds are not supported yet.",
                param="layer_types",
            )
    if architecture == "LlamaForCausalLM":
        if kinds is not None and "sliding_attention" in kinds:
            raise UnsupportedFeature(f"{CONFIG}: 'layer_types' with a window in a Llama is not supported.", param="layer_types")
        return None, []
    if architecture == "MistralForCausalLM":
        window = fields.integer("sliding_window", 4096) if "sliding_window" not in config or config["sliding_window"] is not None else None
        if kinds is not None and len(set(kinds)) > 1:
            raise UnsupportedFeature(f"{CONFIG}: 'layer_types' that mix kinds in a Mistral are not supported yet.", param="layer_types")
        return window, []
    if not fields.flag("use_sliding_window", False):
        return None, []
    if "sliding_window" in config and config["sliding_window"] is None:
        return None, []
    window = fields.integer("sliding_window", 4096)
    first = fields.integer("max_window_layers", 28, low=0)
    flags = [kind == "sliding_attention" for kind in kinds] if kinds is not None else [layer >= first for layer in range(layers)]
    return (window, flags) if any(flags) else (None, [])


def rope_facts(config: Mapping[str, Any], max_position: int) -> RopeFacts:
    """Rotary facts, `params` completed so that nobody needs config.json again: `max_position_embeddings` always, and
    `original_max_position_embeddings` where the type uses it. Raises CheckpointError / UnsupportedFeature."""
    for name in ("rope_scaling", "rope_parameters"):
        if config.get(name) is not None and not isinstance(config[name], dict):
            raise CheckpointError(f"{CONFIG}: '{name}' must be an object, but is {config[name]!r}.", param=name)
    source = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    given: dict[str, Any] = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    if any(isinstance(value, dict) for value in given.values()):
        raise UnsupportedFeature(f"{CONFIG}: '{source}' with one entry per layer type is not supported yet.", param=source)
    named = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)
    kind = ROPE_TYPES.get(str(named))
    if kind is None:
        raise UnsupportedFeature(
            f"{CONFIG}: '{source}.rope_type' {named!r} is not supported yet, only {', '.join(sorted(set(ROPE_TYPES.values())))}.",
            param=source,
        )
    elsewhere = {"rope_theta": config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta")}
    theta = _Fields({**elsewhere, **{k: v for k, v in given.items() if v is not None}}, source).number("rope_theta", 10000.0)
    given.pop("rope_theta", None)
    partial = given.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise UnsupportedFeature(f"{CONFIG}: 'partial_rotary_factor' {partial!r} is not supported yet.", param="partial_rotary_factor")
    inner = _Fields(given, f"{CONFIG}: {source}")
    params = {key: value for key, value in given.items() if value is not None}
    params["max_position_embeddings"] = max_position
    if kind in ("yarn", "llama3", "longrope"):
        outside = config.get("original_max_position_embeddings")
        original = _Fields({"original_max_position_embeddings": outside}).integer("original_max_position_embeddings", 0, low=1)
        params["original_max_position_embeddings"] = original or inner.integer("original_max_position_embeddings", max_position)
    if kind in ("linear", "dynamic", "llama3"):
        inner.number("factor")
    if kind == "llama3":
        inner.number("low_freq_factor")
        inner.number("high_freq_factor")
    if kind in ("yarn", "longrope"):
        inner.number("factor", 1.0)
        inner.number("attention_factor", 1.0)
    if kind == "longrope":
        for name in ("short_factor", "long_factor"):
            value = given.get(name)
            if not isinstance(value, list) or not value or not all(isinstance(x, int | float) and x > 0 for x in value):
                raise CheckpointError(f"{CONFIG}: '{source}.{name}' must be a list of positive numbers.", param=name)
    return RopeFacts(type=kind, theta=theta, params=params)


def _scaled_max(rope: RopeFacts, max_position: int) -> int:
    """The longest sequence that the checkpoint with its rope scaling is meant for."""
    if rope.type in ("linear", "dynamic"):
        return round(max_position * max(1.0, float(rope.params["factor"])))
    if rope.type == "yarn" and "factor" in rope.params:
        return max(max_position, round(int(rope.params["original_max_position_embeddings"]) * float(rope.params["factor"])))
    return max_position


def default_max_len(facts: ModelFacts) -> int:
    """`--max-model-len` when nobody says: the model's own length; for dynamic NTK the length it was trained at, because the longer one
    would change the frequencies of short sequences too (see plugins/models/rope.py)."""
    return int(facts.rope.params["max_position_embeddings"]) if facts.rope.type == "dynamic" else facts.max_position


def check_max_len(facts: ModelFacts, wanted: int) -> None:
    """Raises ConfigError if `wanted` is longer than the model reaches."""
    if wanted > facts.max_position:
        raise ConfigError(
            f"--max-model-len {wanted} is longer than the model's {facts.max_position} positions. Lower it, or give the model a"
            " rope_scaling by --hf-overrides if it was trained for one.",
            param="max_model_len",
        )
