"""The CUDA device's runner against the CPU's: tokens and log-probabilities, however a run is cut, with graphs and without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock.core.protocol.errors import UnsupportedFeature
from penstock.core.protocol.messages import Forward, Sample
from penstock.core.protocol.sampling import SamplingParams
from penstock.plugins.devices import runner as runner_module
from penstock.plugins.devices.driver import Driver, Job, Options

Make = Callable[..., Any]
VOCAB = 97


def jobs(count: int, seed: int, outputs: int = 7) -> list[Job]:
    rng = np.random.default_rng(seed)
    made = []
    for index in range(count):
        hot = index % 3 == 1
        params = SamplingParams(
            temperature=0.9 if hot else 0.0,
            top_p=0.9 if index % 2 else 1.0,
            top_k=20 if hot and index % 4 == 0 else 0,
            min_p=0.02 if index % 5 == 1 else 0.0,
            seed=index - 3,
            logprobs=[None, 0, 4][index % 3],
            prompt_logprobs=2 if index % 4 == 3 else None,
            repetition_penalty=1.2 if index % 5 == 2 else 1.0,
            presence_penalty=0.4 if index % 5 == 4 else 0.0,
            frequency_penalty=-0.3 if index % 5 == 4 else 0.0,
        )
        made.append(
            Job(prompt=rng.integers(0, VOCAB, rng.integers(1, 45)).astype(np.int32), params=params, max_tokens=outputs, choice=index)
        )
    return made


def same(mine: list[Job], theirs: list[Job]) -> None:
    for a, b in zip(mine, theirs, strict=True):
        assert a.tokens == b.tokens
        assert len(a.logprobs) == len(b.logprobs)
        for x, y in zip(a.logprobs, b.logprobs, strict=True):
            assert np.allclose(np.frombuffer(x, np.float32), np.frombuffer(y, np.float32), atol=2e-4)
        assert a.prompt_logprobs.keys() == b.prompt_logprobs.keys()
        for position, (ids, values) in a.prompt_logprobs.items():
            assert ids == b.prompt_logprobs[position][0]
            assert np.allclose(values, b.prompt_logprobs[position][1], atol=2e-4)


@pytest.mark.parametrize(("family", "eager"), [("llama", False), ("llama", True), ("qwen2", False), ("qwen3", False), ("mistral", True)])
def test_equal_to_the_cpu_runner(family: str, eager: bool, make_folder: Make, host_runner: Make, cpu_runner: Make) -> None:
    folder = make_folder(family)
    truth = jobs(11, seed=1)
    Driver(cpu_runner(folder)).run(truth)
    runner = host_runner(folder, enforce_eager=eager)
    runner.warm_up(lambda phase: None)
    for options in (
        Options(),
        Options(chunk=lambda rng: rng.randint(1, 9), scatter=True, seed=1),
        Options(share=True, at_once=3),
        Options(preempt=0.3, seed=3, scatter=True),
    ):
        mine = jobs(11, seed=1)
        Driver(runner, options).run(mine)
        same(mine, truth)
    assert (runner.counters.replays > 0) is not eager


def test_steps_with_prefill_have_graphs(make_folder: Make, host_runner: Make, cpu_runner: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is padded and replayed: sequences of one token among others, prompt log-probabilities, any cut."""
    monkeypatch.setattr(runner_module, "LAZY_USES", 1)
    monkeypatch.setattr(runner_module, "LAZY_PAUSE_S", 0.0)
    monkeypatch.setattr(runner_module, "MIXED_ROWS", (2, 4))
    monkeypatch.setattr(runner_module, "MIXED_TOKENS", (3, 8, 20, 40))
    folder = make_folder("llama")
    truth = jobs(11, seed=1)
    Driver(cpu_runner(folder)).run(truth)
    for options, sizes in (
        (Options(), 1),
        (Options(chunk=lambda rng: rng.randint(1, 9), scatter=True, seed=1), 4),
        (Options(share=True, at_once=3), 2),
    ):
        runner = host_runner(folder)
        runner.graph_reserve = 1
        mine = jobs(11, seed=1)
        driver = Driver(runner, options)
        driver.run(mine)
        same(mine, truth)
        assert len(runner._mixed) >= sizes
        if sizes == 4:
            assert runner.counters.replays > 0.8 * driver.steps  # all but those of more than 40 tokens, and each size's first use


def test_sizes_of_steps_with_prefill() -> None:
    assert runner_module.mixed_for(512, 2048)[0] == [16, 64, 128, 256, 512]
    assert runner_module.mixed_for(512, 2048)[1][-1] == 2048
    assert runner_module.mixed_for(512, 8192)[1][-1] == runner_module.MIXED_TOKENS[-1], "longer ones have no graph"
    assert runner_module.mixed_for(20, 100) == ([16, 24], [64, 128])
    assert runner_module.mixed_for(1, 16) == ([1], [64])


def test_columns_that_it_does_not_serve_are_refused_by_name(folder: Path, host_runner: Make) -> None:
    runner, none = host_runner(folder), np.zeros(0, np.int32)
    with pytest.raises(UnsupportedFeature, match=r"Forward\.lookahead"):
        runner.forward(Forward(engine=0, epoch=1, step=1, slots=none, starts=none, counts=none, num_decode=0, lookahead=1))
    runner.forward(Forward(engine=0, epoch=1, step=1, slots=none, starts=none, counts=none, num_decode=0))
    with pytest.raises(UnsupportedFeature, match=r"Sample\.lookahead"):
        runner.sample(Sample(engine=0, epoch=1, step=1, rows=none, slots=none, positions=none, lookahead=1))


def test_prompt_logprobs_in_small_pieces(folder: Path, host_runner: Make, cpu_runner: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    asks = SamplingParams(temperature=0.0, prompt_logprobs=4)

    def run(runner: Any, options: Options) -> list[Job]:
        job = Job(prompt=np.arange(3, 50, dtype=np.int32), params=asks, max_tokens=3)
        Driver(runner, options).run([job])
        return [job]

    truth = run(cpu_runner(folder), Options())
    same(run(host_runner(folder), Options()), truth)
    monkeypatch.setattr(runner_module, "PROMPT_LOGIT_ELEMENTS", 5 * VOCAB)
    same(run(host_runner(folder), Options(chunk=lambda rng: 13)), truth)
    assert sorted(truth[0].prompt_logprobs) == list(range(1, 47))
