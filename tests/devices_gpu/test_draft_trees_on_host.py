"""Trees of drafts on the CUDA device's runner, on host memory: nodes as rows of one token, in graphs or not; tokens stay those of a run without."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from draft_kit import heard

from penstock.core.protocol.sampling import SamplingParams
from penstock.core.protocol.speculation import DraftConfig, SpeculationConfig
from penstock.plugins.devices import runner as runner_module
from penstock.plugins.devices.driver import Driver, Job, Options

Make = Callable[..., Any]
VOCAB = 97
TREE = "[(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 1, 0), (1, 0, 1)]"
NODES = 7


def jobs(outputs: int = 16) -> list[Job]:
    rng = np.random.default_rng(5)
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.8, seed=3, top_p=0.9),
        SamplingParams(temperature=0.0, logprobs=2, prompt_logprobs=1),
        SamplingParams(temperature=1.0, seed=8, bad_words_token_ids=[[5]], min_tokens=4),
    ]
    return [Job(prompt=rng.integers(0, VOCAB, 3 + 7 * n).astype(np.int32), params=one, max_tokens=outputs) for n, one in enumerate(params)]


def drafts_of(runner: Any, options: Options) -> dict[tuple[int, ...], list[int]]:
    """History -> what was drafted behind it; and the answers are those of a run without."""
    mine = jobs()
    with heard(runner) as found:
        Driver(runner, options).run(mine)
    found[()] = [token for job in mine for token in job.tokens]
    return found


@pytest.mark.parametrize(
    ("method", "eager", "flat", "more", "window"),
    [
        ("eagle3", False, True, {}, 0),
        ("mtp", False, True, {}, 0),
        ("eagle3", True, True, {}, 9),
        ("mtp", True, True, {}, 0),
        ("eagle3", False, False, {}, 3),
        ("mtp", True, False, {"deterministic": True}, 0),
    ],
)
def test_answers_are_those_without_and_drafts_those_of_the_cpu(
    method: str,
    eager: bool,
    flat: bool,
    more: dict[str, Any],
    window: int,
    make_folder: Make,
    host_runner: Make,
    cpu_runner: Make,
    make_head: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner_module, "FLAT_BELOW", 1000 if flat else 4)  # 2 KV heads
    folder = make_folder("mistral", sliding_window=window) if window else make_folder("llama")
    truth = jobs()
    Driver(host_runner(folder, **more)).run(truth)
    one = DraftConfig(method=method, model=str(make_head(folder, method)), num_speculative_tokens=NODES, speculative_token_tree=TREE)
    asked = SpeculationConfig(methods=[one])
    runner = host_runner(folder, enforce_eager=eager, speculation=asked, **more)
    if not more:  # torch's attention would fail the test of deterministic mode
        runner.warm_up(lambda phase: None)
    rng = random.Random(2)
    for options in (
        Options(lookahead=lambda _: NODES, chunk=lambda rng: rng.randint(3, 20), seed=2),
        Options(lookahead=lambda _: rng.choice([0, NODES]), share=True, preempt=0.1, seed=3),
        Options(told=lambda job: [rng.randrange(3) for _ in range(NODES)], chunk=lambda rng: rng.randint(3, 20)),
    ):
        mine = drafts_of(runner, options)
        assert mine[()] == [token for job in truth for token in job.tokens]
        if options.seed == 2 and flat:
            theirs = drafts_of(cpu_runner(folder, speculation=asked, **more), options)
            shared = mine.keys() & theirs.keys()
            assert len(shared) > 20
            assert [key for key in shared if mine[key] != theirs[key]] == []
    assert (runner.counters.replays > 0) is not eager
