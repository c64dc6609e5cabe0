"""config.json -> ModelFacts: what is read, what is refused and how it is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from penstock.core.protocol.errors import CheckpointError, ConfigError, PenstockError, UnsupportedFeature
from penstock.plugins.models import register_models
from penstock.plugins.models.config import check_max_len, decoder_facts, default_max_len, merge, read_config

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
}


def facts(**over: Any) -> Any:
    return decoder_facts({k: v for k, v in {**BASE, **over}.items() if v != "DROP"})


def test_defaults_are_those_of_the_hugging_face_classes() -> None:
    f = facts()
    assert (f.num_kv_heads, f.head_dim, f.tie_word_embeddings, f.attention_bias, f.rope.theta, f.torch_dtype) == (
        4,
        16,
        False,
        False,
        1e4,
        "bfloat16",
    )
    assert facts(dtype="DROP").torch_dtype == "float32"
    assert facts(dtype="DROP", torch_dtype="float16").torch_dtype == "float16"
    assert facts(architectures=["MistralForCausalLM"]).sliding_window == 4096
    assert facts(architectures=["MistralForCausalLM"], sliding_window=None).sliding_window is None
    assert facts(architectures=["Qwen2ForCausalLM"], sliding_window=64).sliding_window is None
    assert facts(architectures=["Qwen2ForCausalLM"]).attention_bias
    assert not facts(architectures=["Qwen2ForCausalLM"]).attention_out_bias
    assert facts(architectures=["Qwen3ForCausalLM"]).head_dim == 128
    assert facts(architectures=["Qwen3ForCausalLM"]).qk_norm
    upper = facts(architectures=["Qwen2ForCausalLM"], use_sliding_window=True, sliding_window=64, max_window_layers=1)
    assert (upper.sliding_window, upper.sliding_layers) == (64, [False, True])


@pytest.mark.parametrize(
    ("over", "param"),
    [
        ({"vocab_size": "DROP"}, "vocab_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"hidden_size": 66}, "hidden_size"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"architectures": []}, "architectures"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "factor": 2.0}}, "long_factor"),
        ({"rope_scaling": "yarn"}, "rope_scaling"),
    ],
)
def test_wrong_fields_are_named(over: dict[str, Any], param: str) -> None:
    with pytest.raises(CheckpointError) as error:
        facts(**over)
    assert error.value.param == param
    assert param in error.value.message


@pytest.mark.parametrize(
    ("over", "param"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "proportional"}}, "rope_scaling"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rope_parameters"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"dtype": "float8_e4m3fn"}, "dtype"),
        ({"architectures": ["Qwen3ForCausalLM"], "layer_types": ["linear_attention", "full_attention"]}, "layer_types"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(over: dict[str, Any], param: str) -> None:
    with pytest.raises(UnsupportedFeature, match="not supported") as error:
        facts(**over)
    assert error.value.param == param


def test_rope_spellings_and_precedence() -> None:
    inner = facts(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 777.0}, rope_theta=5.0)
    assert (inner.rope.type, inner.rope.theta, inner.rope.params["factor"]) == ("linear", 777.0, 2.0)
    outer = facts(
        rope_scaling={"type": "su", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
        rope_theta=5.0,
        original_max_position_embeddings=32,
    )
    assert (outer.rope.type, outer.rope.theta, outer.rope.params["original_max_position_embeddings"]) == ("longrope", 5.0, 32)
    both = facts(rope_scaling={"rope_type": "linear", "factor": 4.0}, rope_parameters={"rope_type": "default", "rope_theta": 9.0})
    assert (both.rope.type, both.rope.theta) == ("linear", 10000.0)  # rope_scaling replaces the other as a whole
    assert facts(rope_parameters={"rope_type": "default", "rope_theta": 9.0}).rope.theta == 9.0


def test_reach_of_scaled_ropes() -> None:
    dynamic = facts(rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    assert (dynamic.max_position, default_max_len(dynamic)) == (256, 128)
    linear = facts(rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert (linear.max_position, default_max_len(linear)) == (256, 256)
    assert facts(rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}).max_position == 512
    assert facts(rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}).max_position == 128
    check_max_len(linear, 256)
    with pytest.raises(ConfigError, match="256 positions") as error:
        check_max_len(linear, 257)
    assert error.value.param == "max_model_len"


def test_reading_and_overrides(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="Hugging Face folder"):
        read_config(tmp_path)
    path = tmp_path / "config.json"
    path.write_text("[1]")
    with pytest.raises(CheckpointError, match="JSON object"):
        read_config(tmp_path)
    path.write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_config(tmp_path)
    path.write_text(json.dumps({**BASE, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}))
    raw = read_config(tmp_path, {"rope_scaling": {"factor": 3.0}, "vocab_size": 7})
    assert raw["rope_scaling"] == {"rope_type": "linear", "factor": 3.0}
    assert raw["vocab_size"] == 7
    assert merge({"a": {"b": 1}}, {"a": None}) == {"a": None}


YARN = {"factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("file", "over", "same"),
    [
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
            {"rope_scaling": {"rope_type": "yarn", **YARN}},
            {"rope_theta": 50.0, "rope_scaling": {"rope_type": "yarn", **YARN}},
        ),
        (
            {"rope_theta": 7.0, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
            {"rope_scaling": {"type": "yarn", **YARN}},
            {"rope_theta": 50.0, "rope_scaling": {"rope_type": "yarn", **YARN}},
        ),
        (
            {"rope_theta": 50.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"factor": 3.0}},
            {"rope_theta": 50.0, "rope_scaling": {"type": "linear", "factor": 3.0}},
        ),
        (
            {"rope_theta": 50.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_scaling": {"rope_type": "default"}},
            {"rope_theta": 50.0},
        ),
        ({"rope_theta": 50.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}, {"rope_scaling": None}, {"rope_theta": 50.0}),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 50.0}}, {"rope_scaling": None}, {"rope_theta": 50.0}),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 50.0}},
            {"rope_theta": 90.0},
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 90.0}},
        ),
        (
            {"rope_theta": 50.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            {"rope_scaling": {"type": "dynamic"}},
            {"rope_theta": 50.0, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        ),
        (
            {"original_max_position_embeddings": 64, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            {"rope_scaling": YARN},
            {"rope_scaling": {"rope_type": "yarn", **YARN}},
        ),
        (
            {"rope_theta": 50.0},
            {"rope_scaling": {"rope_type": "yarn", **YARN}},
            {"rope_theta": 50.0, "rope_scaling": {"type": "yarn", **YARN}},
        ),
        ({"dtype": "bfloat16"}, {"torch_dtype": "float32"}, {"dtype": "float32"}),
        ({"dtype": "DROP", "torch_dtype": "bfloat16"}, {"dtype": "float32"}, {"dtype": "float32"}),
    ],
)
def test_an_override_counts_in_either_spelling(tmp_path: Path, file: dict[str, Any], over: dict[str, Any], same: dict[str, Any]) -> None:
    """`same`: the fields of a file that means what the two mean together."""
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in {**BASE, **file}.items() if v != "DROP"}))
    assert decoder_facts(read_config(tmp_path, over)) == facts(**same)


def test_the_hooks_name_every_family_once() -> None:
    specs = register_models()
    names = [name for spec in specs for name in spec.architectures]
    assert len(set(names)) == len(names) == 4
    for spec in specs:
        assert spec.facts({**BASE, "architectures": spec.architectures}).architecture == spec.architectures[0]
        with pytest.raises(PenstockError):
            spec.facts({})
