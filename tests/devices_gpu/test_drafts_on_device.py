"""On a real GPU: with drafts, however they are made, every token and every bit of a log-probability is the one without, and no launch waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from draft_kit import launching
from vocabularies import renumbered, spelled_out

from penstock.core.protocol.sampling import SamplingParams
from penstock.core.protocol.speculation import DraftConfig, SpeculationConfig
from penstock.plugins.devices import runner as runner_module
from penstock.plugins.devices.cuda import CudaDevice
from penstock.plugins.devices.driver import Driver, Job, Options
from penstock.plugins.devices.driver_ahead import AheadDriver

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEMO = Path(__file__).parents[2] / "plugins" / "demo_model"
VOCAB, K = 97, 4
SHAPE = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPE |= {"max_position_embeddings": 2500, "num_hidden_layers": 3}


def jobs(outputs: int = 40) -> list[Job]:
    rng = np.random.default_rng(9)
    params = [
        SamplingParams(temperature=0.0, logprobs=2),
        SamplingParams(temperature=0.8, seed=3, top_p=0.9, logprobs=0),
        SamplingParams(temperature=0.0, logprobs=2, prompt_logprobs=1),
        SamplingParams(temperature=0.7, seed=4, repetition_penalty=1.3, frequency_penalty=0.3, presence_penalty=0.2, logprobs=1),
        SamplingParams(temperature=1.0, seed=8, bad_words_token_ids=[[t, (t * 7) % VOCAB] for t in range(60)], min_tokens=4, logprobs=1),
        SamplingParams(temperature=0.9, seed=2, logit_bias={3: 4.0}, allowed_token_ids=list(range(80)), logprobs=3),
    ]
    lengths = (5, 60, 700, 30, 1500, 17)
    return [
        Job(prompt=rng.integers(0, VOCAB, length).astype(np.int32), params=one, max_tokens=outputs, stop_ids=(1, 2))
        for one, length in zip(params, lengths, strict=True)
    ]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("method", ["ngram", "draft_model", "other vocabulary", "eagle3", "mtp"])
def test_no_bit_changes_and_nothing_waits(
    method: str,
    make_folder: Callable[..., Path],
    config_for: Any,
    make_head: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = make_folder("llama", torch.bfloat16, **SHAPE)
    over: dict[str, Any] = {"deterministic": True, "max_num_batched_tokens": 512, "kv_cache_memory_bytes": 64 << 20}

    def load(**more: Any) -> Any:
        return CudaDevice().load(config_for(folder, **over, **more), lambda phase, fraction: None)

    truth = jobs()
    plain = load()
    plain.warm_up(lambda phase: None)
    Driver(plain).run(truth)
    fields: dict[str, Any] = {"prompt_lookup_min": 1} if method == "ngram" else {"model": str(folder)}
    if method in ("eagle3", "mtp"):
        fields["model"] = str(make_head(folder, method))
    if method == "other vocabulary":
        spelled_out(folder, VOCAB)
        method, fields["model"] = "draft_model", str(renumbered(folder, tmp_path / "other"))
    runner = load(speculation=SpeculationConfig(methods=[DraftConfig(method=method, num_speculative_tokens=K, **fields)]))
    runner.warm_up(lambda phase: None)
    waited = False
    for flat, options in (
        (1000, Options(lookahead=lambda rng: K)),
        (4, Options(lookahead=lambda rng: rng.choice([0, 1, K]), chunk=lambda rng: rng.randint(1, 300), scatter=True, seed=1)),
        (1000, Options(lookahead=lambda rng: K, share=True, preempt=0.05, seed=3)),
        (4, Options(lookahead=lambda rng: K, seed=4)),
    ):
        monkeypatch.setattr(runner_module, "FLAT_BELOW", flat)  # 2 KV heads
        mine = jobs()
        driver = Driver(runner, options)
        driver.run(mine)
        for at, (a, b) in enumerate(zip(mine, truth, strict=True)):
            assert a.tokens == b.tokens, at
            assert a.logprobs == b.logprobs, at
            assert a.prompt_logprobs == b.prompt_logprobs, at
        if method == "draft_model":
            assert driver.accepted > driver.drafted / 3
        if not waited:  # everything is compiled by now
            waited = True
            torch.cuda.synchronize()
            with launching(runner):
                Driver(runner, options).run(jobs(12))
    assert runner._lane.waits == 0
    for widths in ((K,), (K, K, 0, 1, K, 0, 0, 2, K)):  # two steps in flight: the second begins wherever the first will have left its rows
        mine = jobs()
        ahead = AheadDriver(runner, widths)
        with launching(runner):
            ahead.run(mine)
        assert [(job.tokens, job.logprobs, job.prompt_logprobs) for job in mine] == [
            (job.tokens, job.logprobs, job.prompt_logprobs) for job in truth
        ]
        assert ahead.loose > 40


@pytest.mark.skipif(not (DEMO / "brook" / "model.safetensors").is_file(), reason="the demo model is not here")
def test_brook_and_its_draft(config_for: Any) -> None:
    """Prompts as text are not needed: what the models make of any tokens will do."""
    over = {"deterministic": True, "max_num_batched_tokens": 512, "kv_cache_memory_bytes": 256 << 20}
    rng = np.random.default_rng(1)
    prompts = [rng.integers(300, 4000, 40 + 90 * n).astype(np.int32) for n in range(4)]
    params = [SamplingParams(temperature=0.8 * (n % 2), seed=n, logprobs=2) for n in range(4)]

    def fresh() -> list[Job]:
        return [Job(prompt=prompt, params=one, max_tokens=60) for prompt, one in zip(prompts, params, strict=True)]

    truth = fresh()
    runner = CudaDevice().load(config_for(DEMO / "brook", **over), lambda phase, fraction: None)
    runner.warm_up(lambda phase: None)
    Driver(runner).run(truth)
    draft = DraftConfig(method="draft_model", model=str(DEMO / "brook-draft"), num_speculative_tokens=K)
    runner = CudaDevice().load(
        config_for(DEMO / "brook", speculation=SpeculationConfig(methods=[draft]), **over), lambda phase, fraction: None
    )
    runner.warm_up(lambda phase: None)
    mine = fresh()
    driver = Driver(runner, Options(lookahead=lambda rng: K))
    driver.run(mine)
    assert [(job.tokens, job.logprobs) for job in mine] == [(job.tokens, job.logprobs) for job in truth]
    assert driver.accepted > 20
