"""The configuration in a file's fields, against that of the folder it was made of."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import pytest
import torch
from gguf_kit import add, convert, fields_of, made_up_tokens, set_fields, write

from penstock.core.protocol.errors import CheckpointError, UnsupportedFeature
from penstock.plugins.gguf.config import config_of
from penstock.plugins.models.config import decoder_facts
from penstock.plugins.models.rope import inverse_frequencies

BASE: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500000.0,
    "dtype": "float32",
}
FAMILIES = {
    "llama": {**BASE, "architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "qwen2": {**BASE, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "head_dim": 8},
    "qwen3": {**BASE, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
}


def file_of(path: Path, config: dict[str, Any], tensors: dict[str, tuple[np.ndarray, str]] | None = None, **fields: Any) -> str:
    """Fields and an embedding, and no other weights than `tensors`; "__" in a field's name stands for a dot."""
    name = config["model_type"]
    writer = gguf.GGUFWriter(path, name)
    over = {key.replace("__", "."): value for key, value in fields.items()}
    set_fields(writer, fields_of(config) | made_up_tokens(config["vocab_size"], "gpt-2"), over)
    table = {"token_embd.weight": (np.zeros((config["vocab_size"], config["hidden_size"]), np.float32), "F32")}
    head = {"output.weight": table["token_embd.weight"]}
    for tensor, (value, form) in (table | (head if tensors is None else tensors)).items():
        add(writer, tensor, value, form)
    write(writer)
    return str(path)


@pytest.mark.parametrize("family", FAMILIES)
def test_facts_are_those_of_the_original(tmp_path: Path, family: str) -> None:
    config = FAMILIES[family]
    assert decoder_facts(config_of(file_of(tmp_path / "x.gguf", config))) == decoder_facts(config)
    tied = decoder_facts(config_of(file_of(tmp_path / "y.gguf", config, {})))
    assert tied == msgspec.structs.replace(decoder_facts(config), tie_word_embeddings=True)


def test_fields_that_may_be_left_out(tmp_path: Path) -> None:
    config = {**FAMILIES["llama"], "head_dim": 8, "num_key_value_heads": 4, "rope_theta": 10000.0}
    left = ("vocab_size", "attention__head_count_kv", "attention__key_length", "attention__value_length", "rope__dimension_count")
    path = file_of(tmp_path / "x.gguf", config, **{f"llama__{name}": None for name in (*left, "rope__freq_base")})
    assert decoder_facts(config_of(path)) == decoder_facts(config)


def test_biases_of_a_llama_are_seen(tmp_path: Path) -> None:
    bias = {"blk.0.attn_q.bias": (np.zeros(64, np.float32), "F32"), "blk.0.ffn_gate.bias": (np.zeros(48, np.float32), "F32")}
    facts = decoder_facts(config_of(file_of(tmp_path / "x.gguf", FAMILIES["llama"], bias)))
    assert (facts.attention_bias, facts.attention_out_bias, facts.mlp_bias) == (True, True, True)


def test_a_llama_with_a_window_is_a_mistral(tmp_path: Path) -> None:
    facts = decoder_facts(config_of(file_of(tmp_path / "x.gguf", FAMILIES["llama"], llama__attention__sliding_window=64)))
    assert (facts.architecture, facts.sliding_window, facts.sliding_layers) == ("MistralForCausalLM", 64, [])
    wide = decoder_facts(config_of(file_of(tmp_path / "y.gguf", FAMILIES["llama"], llama__attention__sliding_window=256)))
    assert (wide.architecture, wide.sliding_window) == ("LlamaForCausalLM", None)


@pytest.mark.parametrize(
    ("scaling", "fields"),
    [
        ({"rope_type": "linear", "factor": 4.0}, {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}),
        ({"rope_type": "linear", "factor": 4.0}, {"rope__scale_linear": 4.0}),
        (
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128},
            {"rope__scaling__type": "yarn", "rope__scaling__factor": 2.0, "rope__scaling__original_context_length": 128},
        ),
        (
            {
                "rope_type": "yarn",
                "factor": 2.0,
                "original_max_position_embeddings": 128,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "attention_factor": 0.5 * (0.1 * math.log(2.0) + 1),
            },
            {
                "rope__scaling__type": "yarn",
                "rope__scaling__factor": 2.0,
                "rope__scaling__original_context_length": 128,
                "rope__scaling__yarn_beta_fast": 16.0,
                "rope__scaling__yarn_beta_slow": 2.0,
                "rope__scaling__attn_factor": 0.5,
            },
        ),
        ({}, {"rope__scaling__type": "none"}),
    ],
)
def test_rope_scaling(tmp_path: Path, scaling: dict[str, Any], fields: dict[str, Any]) -> None:
    config = {**FAMILIES["qwen2"], "rope_scaling": scaling or None}
    path = file_of(tmp_path / "x.gguf", FAMILIES["qwen2"], **{f"qwen2__{key}": value for key, value in fields.items()})
    assert decoder_facts(config_of(path)) == decoder_facts(config)


def test_llama_3_has_its_scaling_in_a_tensor(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    original = decoder_facts({**FAMILIES["llama"], "rope_scaling": scaling})
    plain, _ = inverse_frequencies(decoder_facts(FAMILIES["llama"]), 256)
    scaled, _ = inverse_frequencies(original, 256)
    factors = (plain.double() / scaled.double()).float().numpy()
    path = file_of(tmp_path / "x.gguf", FAMILIES["llama"], {"rope_freqs.weight": (factors, "F32")})
    facts = decoder_facts(config_of(path))
    assert facts.max_position == original.max_position
    found, scale = inverse_frequencies(facts, 256)
    assert scale == 1.0
    torch.testing.assert_close(found, scaled, rtol=2e-7, atol=0)
    assert not torch.equal(found, plain)


@pytest.mark.parametrize(
    ("form", "dtype", "quantised"),
    [("F32", "float32", False), ("F16", "float16", False), ("BF16", "bfloat16", False), ("Q8_0", "bfloat16", True)],
)
def test_what_to_compute_in_is_what_most_weights_are_stored_as(tmp_path: Path, form: str, dtype: str, quantised: bool) -> None:
    value = (np.ones((96, 32), np.float32), form)
    config = config_of(file_of(tmp_path / "x.gguf", FAMILIES["llama"], {f"blk.{i}.ffn_up.weight": value for i in range(2)}))
    assert config["dtype"] == dtype
    assert config.get("quantization_config") == ({"quant_method": "gguf", "form": "Q8_0"} if quantised else None)


@pytest.mark.parametrize(
    ("family", "fields", "param"),
    [
        ("llama", {"general__architecture": "clip"}, "general.architecture"),
        ("llama", {"general__type": "adapter"}, "general.type"),
        ("llama", {"llama__expert_count": 8}, "llama.expert_count"),
        ("llama", {"llama__logit_scale": 0.5}, "llama.logit_scale"),
        ("llama", {"llama__attention__causal": False}, "llama.attention.causal"),
        ("llama", {"llama__something__new": 1}, "llama.something.new"),
        ("llama", {"llama__rope__dimension_count": 8}, "llama.rope.dimension_count"),
        ("llama", {"llama__attention__value_length": 8}, "llama.attention.value_length"),
        ("llama", {"llama__feed_forward_length": [48, 64]}, "llama.feed_forward_length"),
        ("llama", {"llama__rope__scaling__type": "longrope"}, "llama.rope.scaling.type"),
        ("qwen2", {"qwen2__attention__sliding_window": 64}, "qwen2.attention.sliding_window"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, family: str, fields: dict[str, Any], param: str) -> None:
    path = file_of(tmp_path / "x.gguf", FAMILIES[family], **fields)
    if "general__architecture" in fields:  # the writer has one of its own
        Path(path).write_bytes(Path(path).read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0clip2", 1))
    with pytest.raises(UnsupportedFeature, match=r"x\.gguf") as caught:
        config_of(path)
    assert caught.value.param == param
    assert param in caught.value.message or "architecture 'clip2'" in caught.value.message


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"llama__block_count": None}, "'llama.block_count' is missing"),
        ({"llama__block_count": 0}, "'llama.block_count' is 0, but must be an integer of at least 1"),
        ({"llama__block_count": "2"}, "'llama.block_count' is '2', but must be"),
        ({"llama__embedding_length": 1 << 31}, "'llama.embedding_length' is 2147483648, but"),
        ({"llama__attention__layer_norm_rms_epsilon": None}, "'llama.attention.layer_norm_rms_epsilon' is missing"),
        ({"llama__attention__layer_norm_rms_epsilon": float("nan")}, "must be a number above 0"),
        ({"llama__attention__head_count_kv": 3}, "'llama.attention.head_count_kv' is 3, but must divide the 4 heads"),
        ({"llama__attention__key_length": 15}, "'llama.attention.key_length' is 15, but must be even"),
        ({"llama__attention__key_length": None, "llama__attention__head_count": 5}, "must be a multiple of the 5 heads|must divide"),
        ({"llama__embedding_length": 64}, r"tensor 'token_embd.weight' has shape \[40, 32\], not \[., 64\]"),
        ({"llama__rope__scaling__type": "linear"}, "'llama.rope.scaling.factor' is missing"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        config_of(file_of(tmp_path / "x.gguf", FAMILIES["llama"], **fields))


def test_more_tokens_than_rows_are_refused(tmp_path: Path) -> None:
    tokens = [f"t{i}" for i in range(41)]
    path = file_of(tmp_path / "x.gguf", FAMILIES["llama"], tokenizer__ggml__tokens=tokens)
    with pytest.raises(CheckpointError, match=r"has 41 tokens, and tensor 'token_embd\.weight' only 40 rows"):
        config_of(path)


def test_a_file_of_no_model_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    set_fields(writer, fields_of(FAMILIES["llama"]), {})
    write(writer)
    with pytest.raises(CheckpointError, match=r"tensor 'token_embd\.weight' is missing"):
        config_of(str(tmp_path / "x.gguf"))


def test_the_demo_model(tmp_path: Path) -> None:
    from penstock.core.protocol.model_folder import demo_folder

    path = convert(demo_folder(), tmp_path / "brook.gguf", "BF16")
    assert decoder_facts(config_of(str(path))) == decoder_facts(json.loads((demo_folder() / "config.json").read_text()))
