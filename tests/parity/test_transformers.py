"""The CPU runner against transformers, on tiny random checkpoints of every architecture and rope_type.

Logits are compared through prompt log-probabilities and the log-probabilities of drawn tokens, that is through the whole runner: chunked
prefill, ragged batches, scattered blocks. In float32 the greedy tokens must be the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from penstock.core.protocol.sampling import SamplingParams
from penstock.plugins.devices.driver import Driver, Job, Options

VOCAB = 131

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-tied-bias": ("LlamaForCausalLM", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-mha-wide-heads": ("LlamaForCausalLM", {"num_key_value_heads": 4, "head_dim": 32}),
    "mistral-window": ("MistralForCausalLM", {"sliding_window": 21}),
    "mistral-full": ("MistralForCausalLM", {"sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2-window-above": ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 13, "max_window_layers": 1}),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "qwen3-window-bias": (
        "Qwen3ForCausalLM",
        {
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 17,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}

ROPES: dict[str, dict[str, Any]] = {
    "default-theta": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 10000.0,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0},
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 10000.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
    },
    "yarn-attention-factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 10000.0,
        "attention_factor": 0.7,
        "truncate": False,
    },
    "longrope": {
        "rope_type": "longrope",
        "original_max_position_embeddings": 64,
        "factor": 4.0,
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.8, 2.0, 2.5],
        "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 9.0],
    },
}


def prompts_of(lengths: list[int], seed: int = 5) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, length).astype(np.int32) for length in lengths]


def truth(model: Any, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities [T, V] of one plain pass."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0].float()
    return torch.log_softmax(logits, dim=-1)


def run(runner: Any, prompts: list[Any], count: int, options: Options) -> list[Job]:
    params = SamplingParams(temperature=0.0, logprobs=20, prompt_logprobs=20)
    jobs = [Job(prompt=prompt, params=params, max_tokens=count) for prompt in prompts]
    Driver(runner, options).run(jobs)
    return jobs


RAGGED = Options(chunk=lambda rng: rng.randint(1, 40), scatter=True, at_once=3, seed=11)


def check_logprobs(model: Any, jobs: list[Job], tolerance: float, greedy: bool = False) -> None:
    """Every prompt position's reported log-probabilities lie within `tolerance` of transformers', and each draw's too; with `greedy` each
    draw is its most likely token (of a causal model: one pass over the whole sequence shows all of them)."""
    for job in jobs:
        tokens = job.prompt.tolist() + job.tokens
        want = truth(model, tokens)
        assert sorted(job.prompt_logprobs) == list(range(1, len(job.prompt)))
        for position, (ids, values) in job.prompt_logprobs.items():
            assert ids[0] == tokens[position]
            got = torch.tensor(values)
            assert torch.allclose(got, want[position - 1][ids], atol=tolerance), (position, (got - want[position - 1][ids]).abs().max())
            assert got[1] >= want[position - 1].max() - tolerance
        for index, raw in enumerate(job.logprobs):
            drawn = float(np.frombuffer(raw, np.float32)[0])
            if greedy:
                assert job.tokens[index] == int(want[len(job.prompt) + index - 1].argmax())
            assert drawn == pytest.approx(float(want[len(job.prompt) + index - 1, job.tokens[index]]), abs=tolerance)


@pytest.mark.parametrize(("name", "backend"), [(name, "native") for name in ARCHITECTURES] + [("qwen3-window-bias", "torch")])
def test_every_architecture_in_float32(checkpoint: Callable[..., Any], load: Callable[..., Any], name: str, backend: str) -> None:
    architecture, config = ARCHITECTURES[name]
    folder, model = checkpoint(architecture, **config)
    runner = load(folder, attention_backend=backend)
    assert (runner.dtype, runner.attention, runner.facts.architecture) == ("float32", backend, architecture)
    prompts = prompts_of([1, 33, 70, 16, 48])
    jobs = run(runner, prompts, 8, RAGGED)
    check_logprobs(model, jobs, 1e-3, greedy=True)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_in_bfloat16(checkpoint: Callable[..., Any], load: Callable[..., Any], name: str) -> None:
    architecture, config = ARCHITECTURES[name]
    folder, model = checkpoint(architecture, dtype=torch.bfloat16, initializer_range=0.08, **config)
    runner = load(folder)
    assert runner.dtype == "bfloat16"
    jobs = run(runner, prompts_of([1, 33, 50]), 4, RAGGED)
    # against the exact result of the rounded weights: activations round at many places
    check_logprobs(model, jobs, 0.15)


@pytest.mark.parametrize("name", ROPES)
def test_every_rope_type(checkpoint: Callable[..., Any], load: Callable[..., Any], name: str) -> None:
    extra = {"max_position_embeddings": 64} if name == "dynamic" else {}
    folder, model = checkpoint("LlamaForCausalLM", rope_parameters=dict(ROPES[name]), **extra)
    # the short regime of the two types that depend on length; the whole reach for the others
    runner = load(folder, max_model_len=64 if name in ("dynamic", "longrope") else 250)
    prompts = prompts_of([40, 7] if runner.max_model_len == 64 else [120, 40, 7])
    jobs = run(runner, prompts, 8, RAGGED)
    check_logprobs(model, jobs, 1e-3, greedy=True)


def test_longrope_beyond_the_original_length(checkpoint: Callable[..., Any], load: Callable[..., Any]) -> None:
    folder, model = checkpoint("LlamaForCausalLM", rope_parameters=dict(ROPES["longrope"]))
    runner = load(folder)
    assert runner.max_model_len == 256
    prompts = prompts_of([100, 70])
    jobs = run(runner, prompts, 8, RAGGED)
    check_logprobs(model, jobs, 1e-3, greedy=True)


def test_dynamic_beyond_the_trained_length(checkpoint: Callable[..., Any], load: Callable[..., Any]) -> None:
    folder, model = checkpoint("LlamaForCausalLM", rope_parameters=dict(ROPES["dynamic"]), max_position_embeddings=64)
    assert load(folder).max_model_len == 64
    runner = load(folder, max_model_len=120)
    jobs = run(runner, prompts_of([119]), 1, RAGGED)
    # transformers takes the base from the length of the pass: equal where that is the server's longest sequence
    full = truth(model, jobs[0].prompt.tolist() + jobs[0].tokens)
    for position, (ids, values) in jobs[0].prompt_logprobs.items():
        assert torch.allclose(torch.tensor(values), full[position - 1][ids], atol=5e-4)


@pytest.mark.parametrize("style", ["rope_scaling", "flat"])
def test_older_spellings_of_rope(
    checkpoint: Callable[..., Any], load: Callable[..., Any], edit_config: Callable[..., None], style: str
) -> None:
    rope = dict(ROPES["llama3"] if style == "rope_scaling" else ROPES["default-theta"])
    folder, model = checkpoint("LlamaForCausalLM", rope_parameters=dict(rope))
    theta = rope.pop("rope_theta")
    if style == "rope_scaling":
        rope["type"] = rope.pop("rope_type")
        edit_config(folder, drop=("rope_parameters",), rope_scaling=rope, rope_theta=theta)
    else:
        edit_config(folder, drop=("rope_parameters",), rope_theta=theta)
    prompts = prompts_of([90])
    jobs = run(load(folder), prompts, 4, Options())
    check_logprobs(model, jobs, 1e-3)


def test_sharded_equals_single(checkpoint: Callable[..., Any], load: Callable[..., Any]) -> None:
    one, _ = checkpoint("Qwen2ForCausalLM", dtype=torch.bfloat16)
    many, _ = checkpoint("Qwen2ForCausalLM", dtype=torch.bfloat16, shard="40KB")
    assert len(list(many.glob("*.safetensors"))) > 2
    prompts = prompts_of([30])
    a, b = (run(load(folder), prompts, 4, Options())[0] for folder in (one, many))
    assert (a.tokens, a.logprobs) == (b.tokens, b.logprobs)


def test_dtype_conversion(checkpoint: Callable[..., Any], load: Callable[..., Any]) -> None:
    folder, model = checkpoint("LlamaForCausalLM", dtype=torch.bfloat16)
    runner = load(folder, dtype="float32")
    assert runner.dtype == "float32"
    check_logprobs(model, run(runner, prompts_of([50]), 4, RAGGED), 1e-3)
