"""--kv-cache-dtype on a runner: what is chosen and refused, how much it holds, what it costs in log-probabilities, a checkpoint's own scales."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from penstock.core.contract.devices import RunnerConfig
from penstock.core.protocol.errors import CheckpointError, ConfigError
from penstock.core.protocol.sampling import SamplingParams
from penstock.kernels.attention.codes import KINDS, LARGEST, decode, encode
from penstock.plugins.devices import kv_cache
from penstock.plugins.devices.driver import Driver, Job, Options

Load = Callable[..., Any]
PROMPTS = [np.random.default_rng(seed).integers(0, 97, length).astype(np.int32) for seed, length in enumerate((50, 33, 50))]
SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


def scored(runner: Any, options: Options | None = None) -> list[Job]:
    """Prompts with the log-probability of each token, and four answers' tokens."""
    asks = SamplingParams(temperature=0.0, prompt_logprobs=0, logprobs=0)
    jobs = [Job(prompt=prompt.copy(), params=asks, max_tokens=4) for prompt in PROMPTS]
    jobs[2].prompt = jobs[0].prompt
    Driver(runner, options).run(jobs)
    return jobs


def drift(mine: list[Job], theirs: list[Job]) -> float:
    """The mean difference of a prompt token's log-probability (of weights made up, whose logits are wild)."""
    pairs = [
        (a.prompt_logprobs[at][1][0], b.prompt_logprobs[at][1][0]) for a, b in zip(mine, theirs, strict=True) for at in b.prompt_logprobs
    ]
    return sum(abs(a - b) for a, b in pairs) / len(pairs)


@pytest.fixture
def wide(folder: Path, load: Load) -> list[Job]:
    return scored(load(folder, attention_backend="torch"))


@pytest.mark.parametrize(("kind", "bound"), [("fp8_e4m3", 0.15), ("fp8_e5m2", 0.3), ("int8", 0.04)])
def test_log_probabilities_stay_close(kind: str, bound: float, folder: Path, load: Load, wide: list[Job]) -> None:
    runner = load(folder, kv_cache_dtype=kind, attention_backend="torch")
    assert (runner.dtype, runner.kv_dtype) == ("float32", kind)
    assert f":{kind}:" in runner.kv_layout
    found = drift(scored(runner), wide)
    assert 0 < found < bound


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_shared_prefixes_copies_and_replays_change_little(kind: str, folder: Path, load: Load) -> None:
    runner = load(folder, kv_cache_dtype=kind, attention_backend="torch")
    whole = scored(runner)
    for options in (
        Options(chunk=lambda rng: rng.randint(1, 9), scatter=True, seed=1),
        Options(share=True, at_once=1),
        Options(preempt=0.3, seed=3, scatter=True),
    ):
        again = scored(load(folder, kv_cache_dtype=kind, attention_backend="torch"), options)
        assert [job.tokens for job in again] == [job.tokens for job in whole]
        for mine, theirs in zip(again, whole, strict=True):
            shared = set(mine.prompt_logprobs) & set(theirs.prompt_logprobs)
            assert max(abs(mine.prompt_logprobs[at][1][0] - theirs.prompt_logprobs[at][1][0]) for at in shared) < 1e-3


def test_it_holds_twice_as_much(folder: Path, load: Load, rewrite: Callable[..., None]) -> None:
    rewrite(folder, head_dim=64, hidden_size=128, num_attention_heads=2, num_key_value_heads=2)
    settings = {"dtype": "bfloat16", "attention_backend": "torch", "load_format": "dummy"}
    wide, narrow = load(folder, **settings), load(folder, kv_cache_dtype="fp8_e4m3", **settings)
    per_block = 2 * 2 * 2 * 16 * 64  # layers, keys and values, heads, tokens, dimensions
    assert wide.memory.kv == wide.num_blocks * per_block * 2 == 1 << 20
    assert narrow.memory.kv == narrow.num_blocks * per_block * (64 + 2) // 64 <= 1 << 20
    assert narrow.num_blocks == wide.num_blocks * 2 * 64 // 66
    exact = load(folder, kv_cache_dtype="fp8_e4m3", num_gpu_blocks_override=wide.num_blocks, kv_cache_memory_bytes=None, **settings)
    assert exact.memory.kv / wide.memory.kv == pytest.approx(0.5 + 1 / 64)


def test_identities_differ(folder: Path, load: Load) -> None:
    runners = [load(folder, kv_cache_dtype=word, attention_backend="torch") for word in ("auto", "float32", *KINDS)]
    assert len({runner.kv_layout for runner in runners}) == 1 + len(KINDS)
    assert len({runner.fingerprint for runner in runners[1:]}) == 1 + len(KINDS)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"kv_cache_dtype": "bfloat16"}, "the model computes in float32"),
        ({"kv_cache_dtype": "int3"}, "--kv-cache-dtype int3 is not known"),
    ],
)
def test_refusals_name_the_option(settings: dict[str, Any], sentence: str, folder: Path, load: Load) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        load(folder, **settings)
    assert caught.value.param == "kv_cache_dtype"


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoints_scales_replace_those_of_tokens(kind: str, folder: Path, load: Load, rewrite: Any, make_tensors: Any) -> None:
    """One far too small: everything saturates, and the answers show it. Files without a word about their cache have scales of E4M3."""
    named = make_tensors()
    for layer in range(2):
        named |= {f"model.layers.{layer}.self_attn.{name}_scale": torch.tensor(0.0001) for name in "kv"}
    before = scored(load(folder, kv_cache_dtype=kind, attention_backend="torch"))
    rewrite(folder, named)
    assert drift(scored(load(folder, attention_backend="torch")), before) < 1  # a wide cache needs none
    runner = load(folder, kv_cache_dtype=kind, attention_backend="torch")
    found = drift(scored(runner), before)
    assert found > 1 if kind == "fp8_e4m3" else found == 0
    if kind == "fp8_e4m3":
        assert runner._caches[1].fixed == (pytest.approx(0.0001), pytest.approx(0.0001))
        scales = runner._caches[1].k_scale[:1, 0].float().unique()
        assert len(scales) == 1 or float(scales.min()) >= 0


NAMES = [
    ("self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale"),
    ("self_attn.k_proj.output_scale", "self_attn.v_proj.output_scale"),
    ("self_attn.kv_scale", "self_attn.kv_scale"),
]


@pytest.mark.parametrize("names", NAMES)
def test_auto_is_what_the_checkpoint_says(names: tuple[str, str], folder: Path, load: Load, rewrite: Any, make_tensors: Any) -> None:
    named = make_tensors()
    for layer in range(2):
        named |= {f"model.layers.{layer}.{name}": torch.tensor([0.01 * (index + 1)]) for index, name in enumerate(names)}
    own = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}, "kv_cache_scheme": SCHEME}
    rewrite(folder, named, quantization_config=own)
    runner = load(folder, attention_backend="torch")
    assert runner.kv_dtype == "fp8_e4m3"
    assert runner._caches[0].fixed is not None
    k, v = runner._caches[0].fixed
    assert v == pytest.approx(0.02)
    assert k == pytest.approx(0.02 if names[0] == names[1] else 0.01)
    assert load(folder, attention_backend="torch", kv_cache_dtype="float32").kv_dtype == "float32"
    other = load(folder, attention_backend="torch", kv_cache_dtype="int8")
    assert (other.kv_dtype, other._caches[0].fixed) == ("int8", None)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_scales_that_are_none_are_named(value: float, folder: Path, load: Load, rewrite: Any, make_tensors: Any) -> None:
    scales = {f"model.layers.{layer}.self_attn.{name}_scale": torch.tensor(value) for layer in range(2) for name in "kv"}
    rewrite(folder, make_tensors() | scales)
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.self_attn\.k_scale"):
        load(folder, kv_cache_dtype="fp8_e4m3", attention_backend="torch")


def test_a_scale_a_head_is_left_to_tokens_and_said(
    folder: Path, load: Load, rewrite: Any, make_tensors: Any, caplog: pytest.LogCaptureFixture
) -> None:
    scales = {f"model.layers.{layer}.self_attn.{name}_scale": torch.ones(4) for layer in range(2) for name in "kv"}
    rewrite(folder, make_tensors() | scales)
    with caplog.at_level(logging.WARNING, "penstock.weights"):
        runner = load(folder, kv_cache_dtype="fp8_e4m3", attention_backend="torch")
    assert runner._caches[0].fixed is None
    assert "more than one scale" in caplog.text


@pytest.mark.parametrize(
    ("own", "kind"),
    [
        ({}, None),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}, "fp8_e4m3"),
        ({"quant_method": "modelopt", "quantization": {"kv_cache_quant_algo": "FP8"}}, "fp8_e4m3"),
        ({"quant_method": "modelopt", "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}}, "fp8_e4m3"),
        ({"quant_method": "compressed-tensors", "kv_cache_scheme": {**SCHEME, "type": "int"}}, "int8"),
        ({"quant_method": "compressed-tensors", "kv_cache_scheme": {**SCHEME, "num_bits": 4}}, None),
        ({"quant_method": "compressed-tensors", "kv_cache_scheme": {**SCHEME, "symmetric": False}}, None),
    ],
)
def test_what_configurations_say(own: dict[str, Any], kind: str | None) -> None:
    assert kv_cache.scheme_of({"quantization_config": own} if own else {}) == kind


def test_a_scheme_that_is_none_is_named() -> None:
    with pytest.raises(CheckpointError, match="kv_cache_scheme"):
        kv_cache.scheme_of({"quantization_config": {"quant_method": "compressed-tensors", "kv_cache_scheme": 8}})


def test_needles_are_found_in_long_contexts() -> None:
    """One key of 128k points where the query does, and its value is the answer: 8 bits lose no more of it than their rounding, since sums are float32."""
    generator = torch.Generator().manual_seed(0)
    length, dim = 1 << 17, 64
    keys, values = (torch.randn(length, dim, generator=generator) for _ in range(2))
    query = torch.randn(dim, generator=generator)
    at = 77_777
    keys[at] = query * (keys[at].norm() / query.norm())
    scale = 1.7 * dim**-0.5  # the needle weighs about as much as all others together

    def attend(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, float]:
        weights = (k.double() @ query.double() * scale).softmax(0)
        return weights @ v.double(), float(weights[at])

    truth, share = attend(keys, values)
    assert 0.05 < share < 0.95
    lost = {"bfloat16": float((attend(keys.bfloat16(), values.bfloat16())[0] - truth).norm() / truth.norm())}
    for kind in KINDS:
        coded = [decode(*encode(x, kind), kind, torch.float64) for x in (keys, values)]
        found, own = attend(*coded)
        lost[kind] = float((found - truth).norm() / truth.norm())
        assert abs(own - share) < 0.08
        assert LARGEST[kind] > 0
    assert lost["int8"] < lost["bfloat16"] + 0.02
    assert lost["fp8_e4m3"] < lost["bfloat16"] + 0.06
    assert lost["fp8_e5m2"] < lost["bfloat16"] + 0.12


def test_a_configuration_without_the_option_is_wide() -> None:
    assert {field for field in RunnerConfig.__struct_fields__ if "kv_cache_dtype" in field} == {"kv_cache_dtype"}
