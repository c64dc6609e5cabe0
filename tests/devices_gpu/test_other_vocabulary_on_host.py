"""Drafts of a model with another vocabulary, on the CUDA device's runner on host memory and on the CPU's: what the draft model says behind the same text, and no other answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from draft_kit import heard
from vocabularies import renumbered, spelled_out

from penstock.core.protocol.columns import i32
from penstock.core.protocol.sampling import SamplingParams
from penstock.core.protocol.speculation import DraftConfig, SpeculationConfig
from penstock.plugins.devices import runner as runner_module
from penstock.plugins.devices.driver import Driver, Job, Options
from penstock.plugins.drafters import alignment as alignment_module
from penstock.plugins.drafters.alignment import Alignment
from penstock.plugins.tokenizers.hugging_face import HuggingFaceTokenizer

Make = Callable[..., Any]
VOCAB, K = 97, 3
WAYS = {
    "always": Options(lookahead=lambda rng: K, seed=1),
    "now and then": Options(lookahead=lambda rng: rng.choice([0, 0, 1, K]), chunk=lambda rng: rng.randint(1, 9), scatter=True, seed=2),
    "long pauses": Options(lookahead=lambda rng: K if rng.random() < 0.2 else 0, seed=3),
    "preempted and shared": Options(lookahead=lambda rng: K, share=True, preempt=0.2, at_once=3, seed=4),
}


def jobs(outputs: int = 60, greedy: bool = False) -> list[Job]:
    rng = np.random.default_rng(5)
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.0, logprobs=2),
        SamplingParams(temperature=0.8, seed=3, top_p=0.9),
        SamplingParams(temperature=0.7, seed=4, repetition_penalty=1.3),
    ]
    return [
        Job(prompt=rng.integers(0, VOCAB, 3 + 9 * n).astype(np.int32), params=params[0] if greedy else one, max_tokens=outputs)
        for n, one in enumerate(params)
    ]


@pytest.fixture
def spelled(folder: Path) -> Path:
    spelled_out(folder, VOCAB)
    return folder


@pytest.fixture
def runners(host_runner: Make, cpu_runner: Make) -> dict[str, Make]:
    return {"device": host_runner, "cpu": cpu_runner}


def asking(model: Path, **fields: Any) -> dict[str, Any]:
    return {
        "speculation": SpeculationConfig(methods=[DraftConfig(method="draft_model", model=str(model), num_speculative_tokens=K, **fields)])
    }


def drafts_of(runner: Any, options: Options) -> dict[tuple[int, ...], tuple[list[int], list[int]]]:
    """History -> what was drafted behind it, and what the draft model took it for."""
    own: dict[tuple[int, ...], list[int]] = {}
    contexts = getattr(runner._drafters[0], "_contexts", None)

    def note(history: tuple[int, ...], slot: int) -> None:
        own[history] = [] if contexts is None else contexts.history[slot, : int(contexts._ends[slot])].tolist()

    with heard(runner, note) as found:
        Driver(runner, options).run(jobs(greedy=True))
    return {history: (drafts, own[history]) for history, drafts in found.items()}


@pytest.mark.parametrize("lane", ["device", "cpu"])
@pytest.mark.parametrize("context", [None, 64])
def test_drafts_are_what_the_draft_model_says_of_the_text(
    lane: str,
    context: int | None,
    spelled: Path,
    tmp_path: Path,
    runners: dict[str, Make],
    cpu_runner: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is asked as a model by itself for each text, or the end of it that there is room for, in its own tokens, restricted to those that both vocabularies have."""
    monkeypatch.setattr(alignment_module, "USUAL", 1.0)
    other = renumbered(spelled, tmp_path / "other", merges=0.6)
    runner = runners[lane](spelled, **asking(other, **({} if context is None else {"options": {"context": context}})))
    if context and lane == "device":
        runner._drafters[0]._contexts._flat = 0  # rows of several tokens, as many sequences have
    runner.warm_up(lambda phase: None)
    names = [HuggingFaceTokenizer.load(str(path)) for path in (spelled, other)]
    table = Alignment(*names, VOCAB, names[1].vocab_size, "")
    assert 50 < table.common < VOCAB
    alone = cpu_runner(other)
    allowed = SamplingParams(temperature=0.0, allowed_token_ids=np.flatnonzero(table.to_model >= 0).tolist())
    for name, options in WAYS.items():
        found = drafts_of(runner, options)
        assert len(found) > 5, name
        asked = {history: own for history, (drafts, own) in found.items() if drafts[0] >= 0}
        assert len(asked) > (0.9 if context is None else 0.6) * len(found), name
        for history, own in asked.items():
            whole = table.translated(i32(list(history))).tolist()
            assert own == whole[len(whole) - len(own) :], (name, history)
            assert len(own) == len(whole) if context is None else len(own) >= min(len(whole), context // 4)
        said = [Job(prompt=i32(own), params=allowed, max_tokens=K) for own in asked.values()]
        Driver(alone).run(said)
        wrong = 0
        for history, job in zip(asked, said, strict=True):
            drafts = [one for one in found[history][0] if one >= 0]
            wrong += drafts != table.to_model[job.tokens].tolist()[: len(drafts)]
        assert wrong <= len(asked) / 50, name  # of two equal logits the first is taken, which is another one in another order


@pytest.mark.parametrize("lane", ["device", "cpu"])
@pytest.mark.parametrize(("merges", "context"), [(1.0, None), (0.5, None), (1.0, 24)])
def test_tokens_are_those_without_drafts(
    lane: str, merges: float, context: int | None, spelled: Path, tmp_path: Path, runners: dict[str, Make], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all its words under other numbers a draft model that is the model itself is right nearly always; with half of them, or a short memory, less often."""
    monkeypatch.setattr(runner_module, "LAZY_USES", 1)
    monkeypatch.setattr(runner_module, "LAZY_PAUSE_S", 0.0)
    truth = jobs()
    Driver(runners[lane](spelled)).run(truth)
    other = renumbered(spelled, tmp_path / "other", merges)
    fields = {} if context is None else {"options": {"context": context}}
    runner = runners[lane](spelled, **asking(other, **fields))
    runner.warm_up(lambda phase: None)
    for name, options in WAYS.items():
        mine = jobs()
        driver = Driver(runner, options)
        driver.run(mine)
        assert [job.tokens for job in mine] == [job.tokens for job in truth], name
        if merges == 1.0 and context is None:
            assert driver.accepted > 0.6 * driver.drafted, name
    if lane == "device":
        assert runner.counters.replays > 0


@pytest.mark.parametrize("lane", ["device", "cpu"])
def test_the_same_drafts_as_with_the_same_vocabulary(
    lane: str, spelled: Path, tmp_path: Path, runners: dict[str, Make], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Renumbered tokens are looked up, not guessed: each draft is the one that a draft model with the model's own numbers makes, as far as that has blocks."""
    found = []
    for model in (spelled, renumbered(spelled, tmp_path / "other")):
        runner = runners[lane](spelled, **asking(model))
        runner.warm_up(lambda phase: None)
        assert (runner._drafters[0].page_bytes > 0) == (model == spelled)
        found.append({history: drafts for history, (drafts, _) in drafts_of(runner, WAYS["always"]).items()})
    mine = {
        history: [new if old >= 0 else -1 for old, new in zip(found[0][history], drafts, strict=True)]
        for history, drafts in found[1].items()
    }
    assert mine == found[0]
    assert len(mine) > 20


@pytest.mark.parametrize("lane", ["device", "cpu"])
def test_with_two_steps_in_flight(lane: str, spelled: Path, tmp_path: Path, runners: dict[str, Make]) -> None:
    """As many drafts are right as with the model's own vocabulary, wherever rows begin."""
    ahead = pytest.importorskip("penstock.plugins.devices.driver_ahead", reason="no driver has two steps in flight")
    truth = jobs()
    Driver(runners[lane](spelled)).run(truth)
    for widths in ((K,), (K, K, 0, 1, K, 0, 0, 2, K)):
        right = []
        for model in (spelled, renumbered(spelled, tmp_path / f"other-{len(widths)}")):
            runner = runners[lane](spelled, **asking(model))
            runner.warm_up(lambda phase: None)
            mine = jobs()
            driver = ahead.AheadDriver(runner, widths)
            driver.run(mine)
            assert [job.tokens for job in mine] == [job.tokens for job in truth]
            assert driver.loose > 15
            right.append(driver.accepted)
        assert right[1] == right[0] > 20
