"""A KV cache of eight bits under the CPU's own kernels: the same bits however a prompt is cut, shared, copied or begun anew, and what torch's backend gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from penstock.core.protocol.sampling import SamplingParams
from penstock.kernels import native
from penstock.kernels.attention.codes import KINDS
from penstock.plugins.devices.driver import Driver, Job, Options
from penstock.plugins.devices.host_ops import HostOps

Load = Callable[..., Any]
PROMPTS = [np.random.default_rng(seed).integers(0, 97, length).astype(np.int32) for seed, length in enumerate((50, 33, 50))]


def scored(runner: Any, options: Options | None = None) -> list[Job]:
    """Prompts, of which two are the same, with the log-probability of each token, and four answers' tokens."""
    asks = SamplingParams(temperature=0.0, prompt_logprobs=0, logprobs=0)
    jobs = [Job(prompt=prompt.copy(), params=asks, max_tokens=4) for prompt in PROMPTS]
    jobs[2].prompt = jobs[0].prompt
    Driver(runner, options).run(jobs)
    return jobs


def difference(mine: list[Job], theirs: list[Job]) -> float:
    """The largest of a prompt token's log-probability, where both have it."""
    pairs = [
        (a.prompt_logprobs[at][1][0], b.prompt_logprobs[at][1][0])
        for a, b in zip(mine, theirs, strict=True)
        for at in set(a.prompt_logprobs) & set(b.prompt_logprobs)
    ]
    assert len(pairs) > 50
    return max(abs(a - b) for a, b in pairs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_shared_prefixes_copies_and_replays_are_equal(kind: str, dtype: str, folder: Path, load: Load) -> None:
    if native.library() is None:
        pytest.skip(native.describe())
    runner = load(folder, kv_cache_dtype=kind, dtype=dtype)
    assert (runner.attention, runner.kv_dtype) == ("native", kind)
    assert f"cpu-panel16-v1:{kind}:" in runner.kv_layout
    whole = scored(runner)
    for options in (
        Options(chunk=lambda rng: rng.randint(1, 9), scatter=True, seed=1),
        Options(share=True, at_once=1),
        Options(preempt=0.3, seed=3, scatter=True),
    ):
        again = scored(load(folder, kv_cache_dtype=kind, dtype=dtype), options)
        assert [job.tokens for job in again] == [job.tokens for job in whole]
        assert difference(again, whole) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_composed_and_as_one_program_it_is_the_same(kind: str, folder: Path, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = scored(load(folder, kv_cache_dtype=kind, dtype="bfloat16"))
    monkeypatch.setattr(HostOps, "fuse", lambda self, model, caches: None)
    composed = scored(load(folder, kv_cache_dtype=kind, dtype="bfloat16"))
    assert [job.tokens for job in composed] == [job.tokens for job in whole]
    assert difference(composed, whole) == 0 or native.library() is None


@pytest.mark.parametrize("scales", [None, 0.05])
@pytest.mark.parametrize("kind", KINDS)
def test_it_gives_what_torch_gives(kind: str, scales: float | None, folder: Path, load: Load, rewrite: Any, make_tensors: Any) -> None:
    """Also with a checkpoint's scales, so small that some values saturate."""
    if scales is not None:
        named = {f"model.layers.{layer}.self_attn.{name}_scale": torch.tensor(scales) for layer in range(2) for name in "kv"}
        scheme = {"num_bits": 8, "type": "int" if kind == "int8" else "float", "symmetric": True}
        own = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}, "kv_cache_scheme": scheme}
        rewrite(folder, make_tensors() | named, quantization_config=own)
    mine = load(folder, kv_cache_dtype=kind)
    theirs = load(folder, kv_cache_dtype=kind, attention_backend="torch")
    assert (mine.attention, theirs.attention, mine.dtype) == ("native", "torch", "float32")
    assert (mine._caches[0].fixed is not None) is (scales is not None and kind != "fp8_e5m2")
    assert difference(scored(mine), scored(theirs)) < 2e-2  # a key on the edge between two codes may fall to either side
