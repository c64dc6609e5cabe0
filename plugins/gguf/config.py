"""The configuration that a GGUF file stands for, as the config.json that model families read.

What it is: the fields of the architectures "llama" (Llama, and Mistral, which is written as one), "qwen2" and "qwen3" by the names of Hugging Face; what the
tensors themselves say (biases, tied embeddings, rotary factors, the form of most weights) is read from them. A field that would change answers
and is not understood is refused by name, never ignored.
What it does not know: how weights are read, tokenizers, torch.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from penstock.core.protocol.errors import CheckpointError, UnsupportedFeature
from penstock.plugins.gguf.container import GgufFile, Texts, shown
from penstock.plugins.gguf.names import EMBEDDING, HEAD, ROPE_FACTORS
from penstock.plugins.gguf.types import FLOATS

METHOD = "gguf"
"""quantization_config.quant_method of what is read here."""
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
WINDOWED = "MistralForCausalLM"
"""What a "llama" with a sliding window is."""
HARMLESS = {
    "vocab_size",
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.attn_factor",
    "rope.scaling.finetuned",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "tensor_data_layout",
}
"""Fields of an architecture that are read below, or change no number."""
NOTHING: dict[str, Any] = {
    "use_parallel_residual": False,
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.causal": True,
    "rope.scaling.yarn_ext_factor": 1,
    "rope.scaling.yarn_log_multiplier": 0,
    "logit_scale": 1,
    "residual_scale": 1,
    "embedding_scale": 1,
}
"""Fields that change nothing where they have this value, and are refused where they have another one."""


class Fields:
    """Typed reads of one architecture's fields, which name the field."""

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self.file, self.architecture = file, architecture

    def key(self, name: str) -> str:
        return f"{self.architecture}.{name}"

    def get(self, name: str) -> Any:
        return self.file.fields.get(self.key(name))

    def refuse(self, name: str, why: str) -> UnsupportedFeature:
        key = self.key(name)
        return UnsupportedFeature(f"{self.file.name}: '{key}' {shown(self.file.fields.get(key))}: {why}", param=key)

    def wrong(self, name: str, why: str) -> CheckpointError:
        key = self.key(name)
        said = f"is {shown(self.file.fields[key])}, but {why}" if key in self.file.fields else "is missing"
        return CheckpointError(f"{self.file.name}: '{key}' {said}.", param=key)

    def integer(self, name: str, default: int | None = None, *, low: int = 1) -> int:
        value = self.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, np.ndarray) and value.size and np.issubdtype(value.dtype, np.integer):
            if (value != value[0]).any():
                raise self.refuse(name, "layers of different shapes are not supported yet.")
            value = int(value[0])
        if type(value) is not int or not low <= value < 1 << 31:
            raise self.wrong(name, f"must be an integer of at least {low}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.get(name)
        if value is None and default is not None:
            return default
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
            raise self.wrong(name, "must be a number above 0")
        return float(value)


def config_of(path: str) -> dict[str, Any]:
    """config.json's fields. Raises CheckpointError naming a field or tensor that is missing or wrong, UnsupportedFeature naming one that is not
    supported."""
    return config_in(GgufFile(Path(path)))


def config_in(file: GgufFile) -> dict[str, Any]:
    """The same, of an open file."""
    architecture = architecture_of(file)
    fields = Fields(file, architecture)
    _refuse_unknown(fields)
    hidden, heads, layers = fields.integer("embedding_length"), fields.integer("attention.head_count"), fields.integer("block_count")
    kv_heads = fields.integer("attention.head_count_kv", heads)
    if heads % kv_heads:
        raise fields.wrong("attention.head_count_kv", f"must divide the {heads} heads")
    head_dim = _head_dim(fields, hidden, heads)
    context = fields.integer("context_length")
    family = ARCHITECTURES[architecture]
    window = _window(fields, architecture, context)
    config: dict[str, Any] = {
        "architectures": [family if window is None else WINDOWED],
        "model_type": architecture if window is None else "mistral",
        "vocab_size": _vocabulary(file, hidden),
        "hidden_size": hidden,
        "intermediate_size": fields.integer("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "tie_word_embeddings": HEAD not in file.tensors,
        "rope_theta": fields.number("rope.freq_base", 10000.0),
        "rope_scaling": _rope(fields, context, head_dim),
    }
    if window is not None:
        config["sliding_window"] = window
    if architecture == "llama":
        config |= {"attention_bias": "blk.0.attn_q.bias" in file.tensors, "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors}
    return config | _numbers(file)


def architecture_of(file: GgufFile) -> str:
    """Raises CheckpointError and UnsupportedFeature."""
    kind = file.fields.get("general.type", "model")
    if kind != "model":
        raise UnsupportedFeature(f"{file.name}: 'general.type' is {shown(kind)}: only whole models can be served.", param="general.type")
    name = file.fields.get("general.architecture")
    if not isinstance(name, str):
        raise CheckpointError(f"{file.name}: 'general.architecture' is missing, or no text.", param="general.architecture")
    if name not in ARCHITECTURES:
        raise UnsupportedFeature(
            f"{file.name}: architecture {shown(name)} is not supported yet. Known: {', '.join(ARCHITECTURES)}.",
            param="general.architecture",
        )
    return name


def _refuse_unknown(fields: Fields) -> None:
    prefix = fields.key("")
    for key, value in fields.file.fields.items():
        name = key.removeprefix(prefix)
        if not key.startswith(prefix) or name in HARMLESS:
            continue
        if name not in NOTHING or isinstance(value, np.ndarray) or value != NOTHING[name]:
            raise fields.refuse(name, "this field, or this value of it, is not supported yet.")


def _head_dim(fields: Fields, hidden: int, heads: int) -> int:
    if fields.get("attention.key_length") is None and hidden % heads:
        raise fields.wrong("embedding_length", f"must be a multiple of the {heads} heads")
    size = fields.integer("attention.key_length", hidden // heads)
    if size % 2:
        raise (
            fields.wrong("attention.key_length", "must be even")
            if fields.get("attention.key_length")
            else fields.wrong("embedding_length", f"makes {heads} heads of {size}, which must be even")
        )
    for name in ("attention.value_length", "rope.dimension_count"):
        if fields.integer(name, size) != size:
            raise fields.refuse(name, f"only that of a whole head, {size}, is supported.")
    return size


def _window(fields: Fields, architecture: str, context: int) -> int | None:
    """Of all layers. A file does not say in which layers of a Qwen it would be."""
    if not fields.get("attention.sliding_window"):
        return None
    window = fields.integer("attention.sliding_window")
    if window >= context:
        return None
    if architecture != "llama":
        raise fields.refuse("attention.sliding_window", "a window in some layers is not supported yet.")
    return window


def _vocabulary(file: GgufFile, hidden: int) -> int:
    place = file.tensors.get(EMBEDDING)
    if place is None:
        raise CheckpointError(f"{file.name}: tensor {EMBEDDING!r} is missing.", param=EMBEDDING)
    if len(place.shape) != 2 or place.shape[1] != hidden:
        raise CheckpointError(f"{file.name}: tensor {EMBEDDING!r} has shape {list(place.shape)}, not [., {hidden}].", param=EMBEDDING)
    tokens = file.fields.get("tokenizer.ggml.tokens", ())
    if isinstance(tokens, Texts) and len(tokens) > place.shape[0]:
        raise CheckpointError(
            f"{file.name}: 'tokenizer.ggml.tokens' has {len(tokens)} tokens, and tensor {EMBEDDING!r} only {place.shape[0]} rows.",
            param=EMBEDDING,
        )
    return place.shape[0]


def _rope(fields: Fields, context: int, head_dim: int) -> dict[str, Any] | None:
    kind = fields.get("rope.scaling.type")
    linear = fields.get("rope.scale_linear")
    if ROPE_FACTORS in fields.file.tensors:
        if kind not in (None, "none"):
            raise fields.refuse("rope.scaling.type", f"it cannot be combined with the tensor {ROPE_FACTORS!r}.")
        factors = _factors(fields.file, head_dim)
        # Llama 3's scaling, of which the file has the result alone: longrope with one list for all lengths is the same formula
        return {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "factor": 1.0,
            "attention_factor": 1.0,
            "original_max_position_embeddings": context,
        }
    if kind == "linear" or (kind is None and linear is not None):
        factor = fields.number("rope.scaling.factor" if kind else "rope.scale_linear")
        return None if factor == 1.0 else {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        factor = fields.number("rope.scaling.factor")
        scaled: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
        scaled["original_max_position_embeddings"] = fields.integer("rope.scaling.original_context_length", context)
        scaled |= {name: fields.number(f"rope.scaling.yarn_{name}") for name in ("beta_fast", "beta_slow") if _given(fields, name)}
        if fields.get("rope.scaling.attn_factor") is not None:
            usual = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
            scaled["attention_factor"] = fields.number("rope.scaling.attn_factor") * usual
        return scaled
    if kind not in (None, "none"):
        raise fields.refuse("rope.scaling.type", "only none, linear and yarn are supported.")
    return None


def _given(fields: Fields, name: str) -> bool:
    return fields.get(f"rope.scaling.yarn_{name}") is not None


def _factors(file: GgufFile, head_dim: int) -> list[float]:
    place = file.tensors[ROPE_FACTORS]
    if place.form.name != "F32" or place.shape != (head_dim // 2,):
        raise CheckpointError(
            f"{file.name}: tensor {ROPE_FACTORS!r} is {place.form.name} {list(place.shape)}, not F32 [{head_dim // 2}].", param=ROPE_FACTORS
        )
    values = file.array(ROPE_FACTORS).view("<f4")
    if not (np.isfinite(values) & (values > 0)).all():
        raise CheckpointError(f"{file.name}: tensor {ROPE_FACTORS!r} holds factors that are not above 0.", param=ROPE_FACTORS)
    return [float(value) for value in values]


def _numbers(file: GgufFile) -> dict[str, Any]:
    """The dtype to compute in, and whether weights are quantised: by what most of the matrices' values are stored as."""
    forms: Counter[str] = Counter()
    for place in file.tensors.values():
        if len(place.shape) > 1:
            forms[place.form.name] += math.prod(place.shape)
    usual = forms.most_common(1)[0][0]
    dtype = {"dtype": FLOATS.get(usual, "bfloat16")}
    return dtype if set(forms) <= set(FLOATS) else {**dtype, "quantization_config": {"quant_method": METHOD, "form": usual}}
