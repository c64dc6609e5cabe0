"""Bit-equality of the CPU runner's native path: a sequence alone, in a ragged batch, in chunks, on shared blocks, on other blocks and
preempted with recomputation gives the same log-probabilities (compared as bytes) and the same tokens, greedy and seeded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from penstock.core.protocol.sampling import SamplingParams
from penstock.kernels import native
from penstock.plugins.devices.driver import Driver, Job, Options

VOCAB = 131
WAYS = {
    "batched": Options(),
    "ragged and chunked": Options(chunk=lambda rng: rng.randint(1, 40), scatter=True, at_once=5, seed=1),
    "chunks of one block": Options(chunk=lambda rng: 16, seed=2),
    "one token at a time": Options(chunk=lambda rng: 1, at_once=3),
    "shared blocks": Options(share=True, at_once=2),
    "preempted": Options(preempt=0.15, scatter=True, seed=3),
    "everything": Options(preempt=0.1, scatter=True, share=True, chunk=lambda rng: rng.randint(1, 60), seed=4),
}


def jobs(count: int = 6) -> list[Job]:
    rng = np.random.default_rng(8)
    common = rng.integers(0, VOCAB, 50).astype(np.int32)
    out = []
    for index in range(count):
        prompt = rng.integers(0, VOCAB, int(rng.integers(1, 70))).astype(np.int32)
        if index % 2:
            prompt = np.concatenate([common, prompt[:30]])
        hot = SamplingParams(temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, seed=index, repetition_penalty=1.1, logprobs=20)
        greedy = SamplingParams(temperature=0.0, logprobs=20)
        out.append(Job(prompt=prompt, params=hot if index % 3 else greedy, max_tokens=8, choice=index % 2))
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("architecture", "config"), [("LlamaForCausalLM", {}), ("MistralForCausalLM", {"sliding_window": 29})])
def test_bit_equality(
    checkpoint: Callable[..., Any], load: Callable[..., Any], architecture: str, config: dict[str, Any], dtype: torch.dtype
) -> None:
    if native.library() is None:
        pytest.skip("no C kernels on this machine")
    folder, _ = checkpoint(architecture, dtype=dtype, **config)
    runner = load(folder, threads=2)
    alone = jobs()
    for job in alone:
        Driver(runner).run([job])
    assert len({tuple(job.tokens) for job in alone}) > 3
    for name, options in WAYS.items():
        again = jobs()
        Driver(runner, options).run(again)
        for index, (one, other) in enumerate(zip(alone, again, strict=True)):
            assert one.tokens == other.tokens, (name, index)
            assert one.logprobs == other.logprobs, (name, index)


def test_the_torch_backend_agrees_within_rounding(checkpoint: Callable[..., Any], load: Callable[..., Any]) -> None:
    folder, _ = checkpoint("LlamaForCausalLM")
    a, b = jobs(4), jobs(4)
    Driver(load(folder), WAYS["ragged and chunked"]).run(a)
    Driver(load(folder, attention_backend="torch")).run(b)
    for one, other in zip(a, b, strict=True):
        assert one.tokens == other.tokens
        for x, y in zip(one.logprobs, other.logprobs, strict=True):
            assert np.allclose(np.frombuffer(x, np.float32), np.frombuffer(y, np.float32), atol=1e-3)
