"""Rotary tables against transformers' own formulas: equal bit by bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from penstock.core.protocol.errors import CheckpointError
from penstock.plugins.models.config import decoder_facts
from penstock.plugins.models.rope import inverse_frequencies, rope_tables

SHAPE: dict[str, Any] = {
    "vocab_size": 8,
    "hidden_size": 128,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
}
CASES: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 1e6},
    {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0},
    {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
        "rope_theta": 5e5,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "rope_theta": 1e6},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "rope_theta": 1e6, "mscale": 0.7, "mscale_all_dim": 1.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "rope_theta": 1e6, "truncate": False, "beta_fast": 20.0},
    {
        "rope_type": "longrope",
        "original_max_position_embeddings": 1024,
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.01 * i for i in range(32)],
        "long_factor": [1.0 + 0.3 * i for i in range(32)],
    },
]


def build(rope: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(**SHAPE, rope_parameters=dict(rope))
    facts = decoder_facts({**SHAPE, "architectures": ["LlamaForCausalLM"], "rope_parameters": dict(rope)})
    return facts, LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("rope", CASES, ids=lambda rope: "-".join(str(v) for v in list(rope.values())[:2]))
def test_tables_equal_transformers(rope: dict[str, Any]) -> None:
    facts, embedding = build(rope)
    lengths = {"longrope": (1024, 4096), "dynamic": (4096, 6000)}.get(rope["rope_type"], (4096,))
    for length in lengths:
        cos, sin = embedding(torch.zeros(1), torch.arange(length)[None])
        ours = rope_tables(facts, length)
        half = cos.shape[-1] // 2
        if rope["rope_type"] == "dynamic" and length > 4096:  # there the base is a float32 tensor, here a double
            assert torch.allclose(ours[0], cos[0, :, :half], atol=2e-2)
            assert torch.allclose(inverse_frequencies(facts, length)[0], embedding.inv_freq, rtol=1e-5)
        else:
            assert torch.equal(ours[0], cos[0, :, :half])
            assert torch.equal(ours[1], sin[0, :, :half])


def test_length_dependent_types_choose_once() -> None:
    longrope, _ = build(CASES[-1])
    short, long = inverse_frequencies(longrope, 1024)[0], inverse_frequencies(longrope, 1025)[0]
    assert not torch.equal(short, long)
    assert torch.equal(long, inverse_frequencies(longrope, 4096)[0])
    dynamic, _ = build(CASES[2])
    assert torch.equal(inverse_frequencies(dynamic, 100)[0], inverse_frequencies(dynamic, 4096)[0])
    assert not torch.equal(inverse_frequencies(dynamic, 4097)[0], inverse_frequencies(dynamic, 4096)[0])


def test_a_form_that_transformers_would_not_take_for_short_sequences_is_said(caplog: pytest.LogCaptureFixture) -> None:
    for rope, short in ((CASES[-1], 1024), (CASES[2], 4096)):
        facts, _ = build(rope)
        caplog.clear()
        rope_tables(facts, short)
        assert not caplog.records
        rope_tables(facts, short + 1)
        (said,) = (record.getMessage() for record in caplog.records)
        assert f"rope_type {rope['rope_type']}: with --max-model-len {short + 1} every sequence" in said
        assert f"--max-model-len {short} keeps" in said
    facts, _ = build(CASES[4])
    caplog.clear()
    rope_tables(facts, 4096)
    assert not caplog.records


def test_factor_lists_must_fit_the_heads() -> None:
    facts, _ = build(CASES[0])
    wrong = decoder_facts({**SHAPE, "architectures": ["LlamaForCausalLM"], "rope_scaling": {**CASES[-1], "short_factor": [1.0]}})
    assert facts.head_dim == wrong.head_dim
    with pytest.raises(CheckpointError, match="short_factor"):
        inverse_frequencies(wrong, 1024)
