"""Drafts on the CUDA device's runner, on host memory: rows of several positions become rows of one, in the same graphs; tokens stay those of a run without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from draft_kit import heard

from penstock.core.protocol.sampling import SamplingParams
from penstock.core.protocol.speculation import DraftConfig, SpeculationConfig
from penstock.plugins.devices import runner as runner_module
from penstock.plugins.devices.driver import Driver, Job, Options
from penstock.plugins.devices.driver_ahead import AheadDriver

Make = Callable[..., Any]
VOCAB, K = 97, 3


def jobs(outputs: int = 16) -> list[Job]:
    rng = np.random.default_rng(5)
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.8, seed=3, top_p=0.9),
        SamplingParams(temperature=0.0, logprobs=2, prompt_logprobs=1),
        SamplingParams(temperature=0.7, seed=4, repetition_penalty=1.3, frequency_penalty=0.3),
        SamplingParams(temperature=1.0, seed=8, bad_words_token_ids=[[t, (t * 7) % VOCAB] for t in range(60)], min_tokens=4),
        SamplingParams(temperature=1.0, seed=9, min_tokens=11),
    ]
    stops = tuple(range(0, VOCAB, 2))
    return [
        Job(prompt=rng.integers(0, VOCAB, 3 + 7 * n).astype(np.int32), params=one, max_tokens=outputs, stop_ids=stops)
        for n, one in enumerate(params)
    ]


def same(mine: list[Job], theirs: list[Job]) -> None:
    for a, b in zip(mine, theirs, strict=True):
        assert a.tokens == b.tokens
        for x, y in zip(a.logprobs, b.logprobs, strict=True):
            assert np.allclose(np.frombuffer(x, np.float32), np.frombuffer(y, np.float32), atol=2e-4)
        assert a.prompt_logprobs.keys() == b.prompt_logprobs.keys()


@pytest.mark.parametrize("method", ["ngram", "draft_model"])
@pytest.mark.parametrize(("eager", "flat"), [(False, True), (True, True), (False, False)])
def test_tokens_are_those_without_drafts(
    method: str, eager: bool, flat: bool, folder: Path, host_runner: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "LAZY_USES", 1)
    monkeypatch.setattr(runner_module, "LAZY_PAUSE_S", 0.0)
    monkeypatch.setattr(runner_module, "FLAT_BELOW", 1000 if flat else 4)  # 2 KV heads
    truth = jobs()
    Driver(host_runner(folder)).run(truth)
    model = str(folder) if method == "draft_model" else None
    one = DraftConfig(method=method, model=model, num_speculative_tokens=K, **({} if model else {"prompt_lookup_min": 1}))
    runner = host_runner(folder, enforce_eager=eager, speculation=SpeculationConfig(methods=[one]))
    runner.warm_up(lambda phase: None)
    for options in (
        Options(lookahead=lambda rng: K),
        Options(lookahead=lambda rng: rng.choice([0, 1, K]), chunk=lambda rng: rng.randint(1, 9), scatter=True, seed=1),
        Options(lookahead=lambda rng: K, share=True, preempt=0.2, seed=3),
    ):
        mine = jobs()
        driver = Driver(runner, options)
        driver.run(mine)
        same(mine, truth)
        if model:
            assert driver.accepted > driver.drafted / 4
    assert (runner.counters.replays > 0) is not eager


@pytest.mark.parametrize("method", ["ngram", "draft_model", "eagle3", "mtp"])
@pytest.mark.parametrize(("eager", "flat"), [(False, True), (True, True), (False, False)])
def test_with_two_steps_in_flight(
    method: str, eager: bool, flat: bool, folder: Path, host_runner: Make, make_head: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody here knows where the second begins when it is launched; graphs, flat rows, prompts beside and steps without drafts among them."""
    monkeypatch.setattr(runner_module, "LAZY_USES", 1)
    monkeypatch.setattr(runner_module, "LAZY_PAUSE_S", 0.0)
    monkeypatch.setattr(runner_module, "FLAT_BELOW", 1000 if flat else 4)  # 2 KV heads
    truth = jobs(30)
    Driver(host_runner(folder)).run(truth)
    model = {"ngram": None, "draft_model": str(folder)}.get(method, "")
    model = str(make_head(folder, method)) if model == "" else model
    one = DraftConfig(method=method, model=model, num_speculative_tokens=K, **({} if model else {"prompt_lookup_min": 1}))
    runner = host_runner(folder, enforce_eager=eager, speculation=SpeculationConfig(methods=[one]))
    runner.warm_up(lambda phase: None)
    for widths in ((K,), (K, K, 0, 1, K, 0, 0, 2, K)):
        mine = jobs(30)
        driver = AheadDriver(runner, widths)
        driver.run(mine)
        same(mine, truth)
        assert driver.loose > 15
        if method == "draft_model":
            assert driver.accepted > 20
    assert (runner.counters.replays > 0) is not eager


def drafts_of(runner: Any) -> dict[tuple[int, ...], list[int]]:
    """History -> what was drafted behind it, of a few sequences."""
    with heard(runner) as found:
        Driver(runner, Options(lookahead=lambda rng: K, chunk=lambda rng: rng.randint(3, 20), seed=2)).run(jobs()[:3])
    return found


@pytest.mark.parametrize("method", ["eagle3", "mtp", "draft_model"])
def test_drafts_are_those_of_the_cpu(
    method: str, folder: Path, host_runner: Make, cpu_runner: Make, make_head: Make, make_folder: Make
) -> None:
    """Graphs, padding and rows of one token each against a step at a time on the CPU."""
    model = make_folder(num_hidden_layers=1) if method == "draft_model" else make_head(folder, method)
    asked = SpeculationConfig(methods=[DraftConfig(method=method, model=str(model), num_speculative_tokens=K)])
    runner = host_runner(folder, speculation=asked)
    runner.warm_up(lambda phase: None)
    mine, theirs = drafts_of(runner), drafts_of(cpu_runner(folder, speculation=asked))
    assert mine.keys() == theirs.keys()
    assert len(mine) > 30
    assert [key for key in mine if mine[key] != theirs[key]] == []
    assert runner.counters.replays > 0


@pytest.mark.parametrize("method", ["draft_model", "eagle3"])
def test_who_is_not_read_is_in_the_same_graphs(
    method: str, folder: Path, host_runner: Make, make_head: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside those that are read; and where nobody is, nothing is looked at and prompts have graphs, as without a drafter."""
    monkeypatch.setattr(runner_module, "LAZY_USES", 1)
    monkeypatch.setattr(runner_module, "LAZY_PAUSE_S", 0.0)
    truth = jobs()
    Driver(host_runner(folder)).run(truth)
    model = str(folder) if method == "draft_model" else str(make_head(folder, method))
    one = DraftConfig(method=method, model=model, num_speculative_tokens=K)
    runner = host_runner(folder, speculation=SpeculationConfig(methods=[one]))
    runner.warm_up(lambda phase: None)
    late = 0.2 if method == "draft_model" else 0.0
    mine = jobs()
    driver = Driver(
        runner, Options(lookahead=lambda rng: rng.choice([0, K, K]), chunk=lambda rng: rng.randint(2, 9), unread=0.5, late=late, seed=5)
    )
    driver.run(mine)
    same(mine, truth)
    assert driver.drafted > 10
    assert late == 0 or driver.accepted > driver.drafted / 4
    monkeypatch.setattr(runner, "_look", lambda *seen: pytest.fail("looked at"))
    replayed, replay = [], runner._replay_mixed
    monkeypatch.setattr(runner, "_replay_mixed", lambda *step: (replayed.append(1), replay(*step))[1])
    mine = jobs()
    Driver(runner, Options(lookahead=lambda rng: rng.choice([0, K]), unread=1.0)).run(mine)
    same(mine, truth)
    assert replayed
