"""config.json of a Hugging Face folder -> ModelFacts.

What it is: the reading, overriding and checking of the decoder family's configuration: every field that changes the arithmetic is either
understood or refused by name, never ignored. What is absent, null or said twice means what transformers 5 takes it for, per family; what it
refuses is refused here. (Only the five sizes that no checkpoint leaves out have no default.) Rotary parameters come from `rope_scaling`,
else from `rope_parameters`; where the one that is read holds no `rope_theta`, the flat one counts.
What it does not know: torch, tensors, devices.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from penstock.core.contract.devices import ModelFacts, RopeFacts, RopeType
from penstock.core.protocol.errors import CheckpointError, ConfigError, UnsupportedFeature
from penstock.core.protocol.model_files import read_object

log = logging.getLogger("penstock.models")
CONFIG = "config.json"

MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""`model_type` -> the class that transformers makes of it, whatever `architectures` says."""

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
DTYPE_ALIASES = {"float": "float32", "half": "float16"}
SILU = ("silu", "swish")
LAYER_KINDS = {"full_attention": False, "attention": False, "sliding_attention": True}
"""Entries of `layer_types` (`attention` is an older name) -> does such a layer have the window."""

KV_HEADS = {"MistralForCausalLM": 8, "Qwen2ForCausalLM": 32, "Qwen3ForCausalLM": 32}
"""`num_key_value_heads` where the field is absent and this divides the query heads; else as many as those, as it is for null and in a Llama."""
MAX_POSITIONS = {"LlamaForCausalLM": 2048, "MistralForCausalLM": 131072}
"""`max_position_embeddings` where it is absent; 32768 in the others."""
QWEN3_HEAD_DIM = 128
ROPES = ("rope_scaling", "rope_parameters")
"""Spellings of the rotary parameters, the one that counts first."""
YARN_NUMBERS = ("mscale", "mscale_all_dim", "beta_fast", "beta_slow")


def read_config(model_path: str | Path, overrides: Mapping[str, Any] | None = None, own: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """config.json with `overrides` (--hf-overrides) merged over it, nested objects key by key, whichever of two spellings each of them uses. `own`
    stands for the file where a model has its configuration elsewhere.

    Raises CheckpointError if the file is missing or no JSON object.
    """
    if own is not None:
        return merge(_respelled(dict(own), overrides or {}), overrides or {})
    path = Path(model_path) / CONFIG
    try:
        raw = read_object(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): is --model a Hugging Face folder?", param="model") from None
    return merge(_respelled(raw, overrides or {}), overrides or {})


def _respelled(file: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`file` in the spelling of `over` where there are two for one thing: else an override would stand beside the field that counts, or
    take a rope_theta away with the rest of the dict that it replaces."""
    out = dict(file)
    if "torch_dtype" in over and "dtype" not in over:
        out.pop("dtype", None)
    source = _rope_source(file)
    used = next((name for name in ROPES if name in over), source)
    given = over[used] if isinstance(over.get(used), Mapping) else {}
    if "original_max_position_embeddings" in given:
        out.pop("original_max_position_embeddings", None)
    if not isinstance(file.get(source), dict):
        return out
    inner = dict(file[source])
    if "type" in given and "rope_type" not in given:
        inner.pop("rope_type", None)
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in inner and name not in given and (name in over or used == "rope_scaling"):
            out[name] = inner.pop(name)
    return {name: value for name, value in out.items() if name not in ROPES} | {used: inner}


def _rope_source(config: Mapping[str, Any]) -> str:
    """The one of the two that is read. It replaces the other as a whole."""
    return ROPES[0] if config.get(ROPES[0]) else ROPES[1]


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`; objects on both sides merge, anything else is replaced."""
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        out[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return out


def architecture_of(config: Mapping[str, Any]) -> str:
    """The first entry of `architectures`; where the field is absent, what `model_type` stands for. Raises CheckpointError."""
    names, kind = config.get("architectures"), config.get("model_type")
    implied = MODEL_TYPES.get(kind) if isinstance(kind, str) else None
    if names is None and implied is not None:
        return implied
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{CONFIG}: 'architectures' must name the model's class, but is {names!r}.", param="architectures")
    return cast(str, names[0])


def check_model_type(config: Mapping[str, Any]) -> None:
    """Raises CheckpointError if `model_type` and `architectures` name different families: transformers would go by the first."""
    name, kind = architecture_of(config), config.get("model_type")
    own = next((model_type for model_type, architecture in MODEL_TYPES.items() if architecture == name), None)
    if kind is not None and own is not None and kind != own:
        raise CheckpointError(
            f"{CONFIG}: 'model_type' {kind!r} contradicts 'architectures' {name!r}, whose model_type is {own!r}. Correct the one that is"
            " wrong, or give --hf-overrides.",
            param="model_type",
        )


class _Fields:
    """Typed reads that name the field when it is missing or wrong. A null is wrong too, unless `null` says what it stands for."""

    def __init__(self, raw: Mapping[str, Any], where: str = CONFIG) -> None:
        self.raw, self.where = raw, where

    def integer(self, name: str, default: int | None = None, *, low: int = 1, null: int | None = None) -> int:
        value = self.raw.get(name, default) if self.raw.get(name, 0) is not None else null
        if value is None and name not in self.raw:
            raise CheckpointError(f"{self.where}: '{name}' is missing.", param=name)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise CheckpointError(f"{self.where}: '{name}' must be an integer of at least {low}, but is {_said(value)}.", param=name)
        return value

    def number(self, name: str, default: float | None = None, *, low: float | None = None, null: float | None = None) -> float:
        """`low`: the least that is allowed; without it, the number must be above 0."""
        value: Any = self.raw.get(name, default) if self.raw.get(name, 0) is not None else null
        if value is None and name not in self.raw:
            raise CheckpointError(f"{self.where}: '{name}' is missing.", param=name)
        number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300  # a longer integer is no float
        if number and (value > 0 if low is None else value >= low):
            return float(value)
        kind = "a positive number" if low is None else f"a number of at least {low:g}"
        raise CheckpointError(f"{self.where}: '{name}' must be {kind}, but is {_said(value)}.", param=name)

    def flag(self, name: str, default: bool) -> bool:
        """Null is the default here: every reader takes it for "no", which all these defaults are."""
        value = self.raw.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.where}: '{name}' must be true or false, but is {value!r}.", param=name)
        return value


def _said(value: Any) -> str:
    """A value as config.json spells it."""
    return "null" if value is None else f"{value!r:.200}"


def decoder_facts(config: dict[str, Any]) -> ModelFacts:
    """The shape of a Llama, Mistral, Qwen2 or Qwen3 checkpoint.

    Raises CheckpointError naming a missing or impossible field, UnsupportedFeature naming one that is not supported yet.
    """
    architecture = architecture_of(config)
    fields = _Fields(config)
    _refuse_other_models(config)
    act = config.get("hidden_act", "silu")
    if act not in SILU:
        raise UnsupportedFeature(f"{CONFIG}: 'hidden_act' {_said(act)} is not supported yet, only 'silu'.", param="hidden_act")
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    usual = KV_HEADS.get(architecture, heads)
    kv_heads = fields.integer("num_key_value_heads", heads if heads % usual else usual, null=heads)
    layers = fields.integer("num_hidden_layers")
    if config.get("head_dim") is None and architecture != "Qwen3ForCausalLM" and hidden % heads:
        raise CheckpointError(f"{CONFIG}: 'hidden_size' {hidden} is no multiple of 'num_attention_heads' {heads}.", param="hidden_size")
    if architecture == "Qwen3ForCausalLM":
        head_dim = fields.integer("head_dim", QWEN3_HEAD_DIM)
    else:
        head_dim = fields.integer("head_dim", hidden // heads, null=hidden // heads)
    if head_dim % 2:
        raise CheckpointError(f"{CONFIG}: 'head_dim' must be even, but is {head_dim}.", param="head_dim")
    if heads % kv_heads:
        raise CheckpointError(
            f"{CONFIG}: 'num_attention_heads' {heads} is no multiple of 'num_key_value_heads' {kv_heads}.", param="num_key_value_heads"
        )
    window, sliding = _windows(config, fields, architecture, layers)
    bias = architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM") and fields.flag("attention_bias", False)
    max_position = fields.integer("max_position_embeddings", MAX_POSITIONS.get(architecture, 32768))
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
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6, low=0),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        attention_bias=bias or architecture == "Qwen2ForCausalLM",
        attention_out_bias=bias,
        mlp_bias=architecture == "LlamaForCausalLM" and fields.flag("mlp_bias", False),
        qk_norm=architecture == "Qwen3ForCausalLM",
        hidden_act="silu",
        sliding_window=window,
        sliding_layers=sliding,
        rope=rope,
        torch_dtype=_dtype(config),
    )


def _refuse_other_models(config: Mapping[str, Any]) -> None:
    """Raises for fields that make another model of it: those that transformers obeys whatever the family."""
    for name, why in (
        ("per_layer_config", "layers of different shapes are not supported yet"),
        ("configuration_files", "which of several files counts depends on a version of transformers: keep config.json alone"),
        ("text_config", "a model inside another one's configuration is not supported here: give the text model's own config.json"),
    ):
        if config.get(name):
            raise UnsupportedFeature(f"{CONFIG}: '{name}': {why}.", param=name)
    if config.get("is_causal", True) is not True:
        raise UnsupportedFeature(
            f"{CONFIG}: 'is_causal' {_said(config['is_causal'])}: attention to later tokens is not supported.", param="is_causal"
        )


def _dtype(config: Mapping[str, Any]) -> str:
    """`dtype` counts before `torch_dtype`. Absent: see plugins/devices/loading.py, which looks into the files."""
    value = next((config[name] for name in ("dtype", "torch_dtype") if config.get(name) is not None), "float32")
    name = str(value).removeprefix("torch.")
    name = DTYPE_ALIASES.get(name, name)
    if name not in DTYPES:
        raise UnsupportedFeature(f"{CONFIG}: 'dtype' {value!r} is not supported yet, only {', '.join(DTYPES)}.", param="dtype")
    return name


def _windows(config: Mapping[str, Any], fields: _Fields, architecture: str, layers: int) -> tuple[int | None, list[bool]]:
    """(window in tokens or None, one flag per layer or []). A token attends to itself and the window - 1 before it."""
    kinds = config.get("layer_types")
    flags: list[bool] | None = None
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != layers or not all(isinstance(kind, str) and kind in LAYER_KINDS for kind in kinds):
            raise UnsupportedFeature(
                f"{CONFIG}: 'layer_types' must hold {layers} entries out of full_attention, sliding_attention; other kinds are not supported"
                " yet.",
                param="layer_types",
            )
        flags = [LAYER_KINDS[kind] for kind in kinds]
    if architecture == "LlamaForCausalLM":
        if flags is not None and any(flags):
            raise UnsupportedFeature(f"{CONFIG}: 'layer_types' with a window in a Llama is not supported.", param="layer_types")
        if config.get("sliding_window") is not None:
            log.warning("%s: 'sliding_window' %s is ignored: a Llama has none.", CONFIG, _said(config["sliding_window"]))
        return None, []
    # a Mistral has its window unless it is null; a Qwen only if use_sliding_window says so, and then in the upper layers
    window = None
    if architecture == "MistralForCausalLM" or fields.flag("use_sliding_window", False):
        window = fields.integer("sliding_window", 4096) if config.get("sliding_window", 0) is not None else None
    if flags is not None:
        if any(flags) and window is None:
            off = (
                "" if architecture == "MistralForCausalLM" or config.get("use_sliding_window") else " 'use_sliding_window' is not true, so"
            )
            raise CheckpointError(
                f"{CONFIG}: 'layer_types' has sliding_attention, but{off} there is no 'sliding_window'. Correct one of them.",
                param="layer_types",
            )
    elif window is None or architecture == "MistralForCausalLM":
        return window, []
    else:
        first = fields.integer("max_window_layers", 28, low=0)
        flags = [layer >= first for layer in range(layers)]
    return (window, flags) if any(flags) else (None, [])


def rope_facts(config: Mapping[str, Any], max_position: int) -> RopeFacts:
    """Rotary facts, `params` completed so that nobody needs config.json again: `max_position_embeddings` always, and
    `original_max_position_embeddings` where the type uses it. Raises CheckpointError / UnsupportedFeature."""
    for name in ROPES:
        if config.get(name) is not None and not isinstance(config[name], dict):
            raise CheckpointError(f"{CONFIG}: '{name}' must be an object, but is {config[name]!r}.", param=name)
    source = _rope_source(config)
    given: dict[str, Any] = dict(config.get(source) or {})
    if any(isinstance(value, dict) for value in given.values()):
        raise UnsupportedFeature(f"{CONFIG}: '{source}' with one entry per layer type is not supported yet.", param=source)
    older = given.pop("type", "default")
    named = given.pop("rope_type", older)
    kind = ROPE_TYPES.get(str(named))
    if kind is None:
        raise UnsupportedFeature(
            f"{CONFIG}: '{source}.rope_type' {_said(named)} is not supported yet, only {', '.join(sorted(set(ROPE_TYPES.values())))}.",
            param=source,
        )
    inner, outer = _Fields(given, f"{CONFIG}: {source}"), _Fields(config)
    theta = (inner if "rope_theta" in given else outer).number("rope_theta", 10000.0)
    partial = (given if "partial_rotary_factor" in given else config).get("partial_rotary_factor")
    if partial is not None and partial != 1.0:
        raise UnsupportedFeature(f"{CONFIG}: 'partial_rotary_factor' {partial!r} is not supported yet.", param="partial_rotary_factor")
    params: dict[str, Any] = {"max_position_embeddings": max_position}
    if kind in ("yarn", "llama3", "longrope"):
        name = "original_max_position_embeddings"
        params[name] = (outer if name in config else inner).integer(name, max_position)
    if kind in ("linear", "dynamic", "llama3"):
        params["factor"] = inner.number("factor")
    if kind == "llama3":
        params["low_freq_factor"], params["high_freq_factor"] = inner.number("low_freq_factor"), inner.number("high_freq_factor")
    if kind in ("yarn", "longrope"):
        # the ratio of the two lengths stands for a null; only longrope may leave the field out
        ratio = max_position / int(params["original_max_position_embeddings"])
        params["factor"] = inner.number("factor", ratio if kind == "longrope" else None, null=ratio)
        if given.get("attention_factor") is not None:
            params["attention_factor"] = inner.number("attention_factor")
    if kind == "yarn":
        params |= {name: inner.number(name, low=0) for name in YARN_NUMBERS if given.get(name) is not None}
        params["truncate"] = given.get("truncate", True)
        if not isinstance(params["truncate"], bool):
            raise CheckpointError(
                f"{CONFIG}: '{source}.truncate' must be true or false, but is {_said(params['truncate'])}.", param="truncate"
            )
    if kind == "longrope":
        for name in ("short_factor", "long_factor"):
            value = given.get(name)
            if not isinstance(value, list) or not value or not all(isinstance(x, int | float) and x > 0 for x in value):
                raise CheckpointError(f"{CONFIG}: '{source}.{name}' must be a list of positive numbers.", param=name)
            params[name] = value
    return RopeFacts(type=kind, theta=theta, params=params)


def _scaled_max(rope: RopeFacts, max_position: int) -> int:
    """The longest sequence that the checkpoint with its rope scaling is meant for."""
    if rope.type in ("linear", "dynamic"):
        return round(max_position * max(1.0, float(rope.params["factor"])))
    if rope.type == "yarn":
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
