"""Drafts on the device: whoever makes them, every token and log-probability is the one that a step without drafts brings."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from draft_kit import truth_of
from safetensors.torch import save_file

from penstock.core.protocol.columns import i32
from penstock.core.protocol.errors import CheckpointError, ConfigError, EngineFailure, UnsupportedFeature
from penstock.core.protocol.messages import Control, Forward, Sample, SlotSampling
from penstock.core.protocol.sampling import SamplingParams
from penstock.core.protocol.speculation import DraftConfig, SpeculationConfig
from penstock.plugins.devices.driver import Driver, Job, Options
from penstock.plugins.devices.driver_ahead import AheadDriver
from penstock.plugins.drafters.api import NoLayers, Seen
from penstock.plugins.drafters.ngram import NgramDrafter

Load = Callable[..., Any]
VOCAB = 97
K = 4


class Told(NoLayers):
    """Drafts what the sequences said when they were run alone, each token wrong with a chance of `lies`; "empty", "foreign": no tokens at all."""

    name = "told"
    max_lookahead = K

    def __init__(self, truth: dict[bytes, list[int]], lies: float = 0.0, kind: str = "") -> None:
        self.truth, self.lies, self.kind = truth, lies, kind
        self.rng = random.Random(3)

    def propose(self, seen: Seen, out: torch.Tensor) -> None:
        proposal = seen.proposal
        assert proposal is not None
        for row, (slot, end) in enumerate(zip(proposal.slots.tolist(), proposal.ends.tolist(), strict=True)):
            history = seen.history[slot, :end].tolist()
            for k in range(out.shape[1]):
                if self.kind == "empty" or (self.kind == "foreign" and k == 1):
                    out[row, k] = -1 if self.kind == "empty" else VOCAB + 5
                    continue
                token = self.truth.get(i32(history).tobytes(), 0)
                wrong = self.rng.random() < self.lies
                out[row, k] = (token + wrong) % VOCAB
                history.append(int(out[row, k]))


PARAMS: dict[str, SamplingParams] = {
    "greedy": SamplingParams(temperature=0.0, logprobs=3),
    "seeded": SamplingParams(temperature=1.0, top_p=0.9, top_k=40, seed=5, logprobs=0),
    "penalties": SamplingParams(temperature=0.7, seed=6, repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.3),
    "greedy penalties": SamplingParams(temperature=0.0, repetition_penalty=1.2, frequency_penalty=0.7, logprobs=2),
    "bias": SamplingParams(temperature=0.9, seed=7, logit_bias={3: 2.5, 90: -100.0}, min_p=0.02),
    "bad words": SamplingParams(temperature=1.3, seed=8, bad_words_token_ids=[[t, (t * 7) % VOCAB] for t in range(60)] + [[4]]),
    "min tokens": SamplingParams(temperature=1.0, seed=9, min_tokens=11, allowed_token_ids=list(range(40))),
    "prompt": SamplingParams(temperature=0.0, prompt_logprobs=2, logprobs=1),
}


def jobs_of(max_tokens: int = 24) -> list[Job]:
    rng = np.random.default_rng(7)
    found = []
    for index, params in enumerate(PARAMS.values()):
        prompt = rng.integers(0, VOCAB, 5 + 9 * index).astype(np.int32)
        if index:
            prompt[:4] = found[0].prompt[:4]
        found.append(Job(prompt=prompt, params=params, max_tokens=max_tokens, choice=index % 3, stop_ids=(1, 2, 5)))
    return found


def said(jobs: list[Job]) -> list[Any]:
    return [(job.tokens, job.logprobs, job.prompt_logprobs) for job in jobs]


WAYS: dict[str, Options] = {
    "at once": Options(lookahead=lambda rng: K),
    "in chunks": Options(lookahead=lambda rng: K, chunk=lambda rng: rng.randint(1, 9), scatter=True, seed=1),
    "now and then": Options(lookahead=lambda rng: rng.choice([0, 1, K]), seed=2),
    "shared": Options(lookahead=lambda rng: K, share=True, at_once=2),
    "preempted": Options(lookahead=lambda rng: rng.choice([2, K]), preempt=0.15, seed=3),
}


@pytest.fixture
def drafting(load: Load, folder: Path) -> Callable[..., Any]:
    """drafting(drafter or None, **RunnerConfig fields): a runner with that drafter."""

    def make(drafter: Any, **over: Any) -> Any:
        asked = DraftConfig(method="ngram", num_speculative_tokens=K)
        runner = load(folder, deterministic=True, speculation=SpeculationConfig(methods=[asked]), **over)
        runner._drafters = [] if drafter is None else [drafter]
        return runner

    return make


@pytest.mark.parametrize("lies", [0.0, 0.3, 1.0])
def test_drafts_change_no_token_and_no_bit(lies: float, drafting: Any) -> None:
    plain = jobs_of()
    alone = Driver(drafting(None))
    alone.run(plain)
    truth = truth_of(plain)
    for name, options in WAYS.items():
        jobs = jobs_of()
        driver = Driver(drafting(Told(truth, lies)), options)
        driver.run(jobs)
        assert said(jobs) == said(plain), name
        assert (driver.accepted > 0) == (lies < 1)
        if not lies and name == "at once":
            assert driver.accepted > 120
            assert driver.steps < alone.steps / 2


TURNS: tuple[tuple[int, ...], ...] = ((K,), (K, K, 0, 1, K, 0, 0, 2, K))
"""Widths of steps, one after the other."""


@pytest.mark.parametrize("widths", TURNS)
@pytest.mark.parametrize("lies", [0.0, 0.3, 1.0])
def test_with_two_steps_in_flight(lies: float, widths: tuple[int, ...], drafting: Any) -> None:
    """The second begins wherever the first will have left its rows."""
    plain, jobs = jobs_of(), jobs_of()
    Driver(drafting(None)).run(plain)
    driver = AheadDriver(drafting(Told(truth_of(plain), lies)), widths)
    driver.run(jobs)
    assert said(jobs) == said(plain)
    assert driver.loose > 30
    assert (driver.accepted > 0) == (lies < 1)


@pytest.mark.parametrize("kind", ["empty", "foreign"])
def test_drafts_that_are_no_tokens_end_their_row(kind: str, drafting: Any) -> None:
    plain, jobs = jobs_of(), jobs_of()
    Driver(drafting(None)).run(plain)
    driver = Driver(drafting(Told(truth_of(plain), kind=kind)), WAYS["at once"])
    driver.run(jobs)
    assert said(jobs) == said(plain)
    assert (driver.accepted > 0) == (kind == "foreign")


def test_ngrams_change_no_token(load: Load, folder: Path, drafting: Any) -> None:
    plain, jobs = jobs_of(60), jobs_of(60)
    Driver(drafting(None)).run(plain)
    runner = drafting(None)
    config = DraftConfig(method="ngram", num_speculative_tokens=K, prompt_lookup_max=3, prompt_lookup_min=1)
    runner._drafters = [NgramDrafter(config, SimpleNamespace(ops=runner._ops))]  # type: ignore[arg-type]
    driver = Driver(runner, WAYS["preempted"])
    driver.run(jobs)
    assert said(jobs) == said(plain)
    assert driver.accepted > 5


def test_no_draft_reaches_beyond_the_history(drafting: Any) -> None:
    plain = [Job(prompt=np.arange(12, dtype=np.int32), params=PARAMS["greedy"], max_tokens=9) for _ in range(2)]
    Driver(drafting(None, max_model_len=20)).run(plain[:1])
    Driver(drafting(Told(truth_of(plain[:1])), max_model_len=20), WAYS["at once"]).run(plain[1:])
    assert said(plain[:1]) == said(plain[1:])


def test_a_bad_draw_behind_a_draft_is_the_next_step_s_first(drafting: Any, folder: Path, rewrite: Any, make_tensors: Any) -> None:
    """The embedding of a token is NaN; it is drafted rightly, so what comes behind it is drawn in the same step, and fails as it would have alone."""
    plain = Job(prompt=np.arange(5, dtype=np.int32), params=SamplingParams(temperature=0.0), max_tokens=8)
    Driver(drafting(None)).run([plain])
    poison = plain.tokens[2]
    assert poison not in plain.tokens[:2]
    broken = make_tensors()
    broken["model.embed_tokens.weight"][poison] = math.nan
    rewrite(folder, broken)
    runner = drafting(Told(truth_of([plain])))
    places = [SlotSampling(slot=0, choice=0, prompt_len=5, params=plain.params)]
    blocks = {"block_slots": i32([0]), "block_index": i32([0]), "block_ids": i32([0])}
    start = {"place_slots": i32([0]), "place_counts": i32([5]), "place_tokens": plain.prompt}
    runner.forward(Forward(engine=0, epoch=0, step=1, slots=i32([0]), starts=i32([0]), counts=i32([5]), num_decode=0, **blocks, **start))
    done = runner.sample(Sample(engine=0, epoch=0, step=1, rows=i32([0]), slots=i32([0]), positions=i32([5]), places=places, drafts=K))()
    assert done.tokens.tolist() == plain.tokens[:1]

    def step(number: int, at: int, count: int) -> Any:
        ids = {"slots": i32([0])}
        runner.forward(Forward(engine=0, epoch=0, step=number, starts=i32([at]), counts=i32([count]), num_decode=1, lookahead=K, **ids))
        return runner.sample(Sample(engine=0, epoch=0, step=number, rows=i32([0]), positions=i32([at + 1]), lookahead=K, drafts=K, **ids))()

    done = step(2, 5, 1 + K)
    assert (done.tokens.tolist(), done.counts.tolist(), done.bad_rows.tolist()) == (plain.tokens[1:3], [2], [])
    done = step(3, 7, 1)
    assert (done.tokens.tolist(), done.counts.tolist(), done.bad_rows.tolist()) == ([0], [1], [0])


def test_masks_behind_drafts(drafting: Any) -> None:
    """Each position under its own mask; a row ends where there is none yet (-2), though its drafts are right."""
    plain = Job(prompt=np.arange(5, dtype=np.int32), params=SamplingParams(temperature=0.0), max_tokens=8)
    Driver(drafting(None)).run([plain])
    words = -(-VOCAB // 32)

    def only(*tokens: int) -> list[int]:
        row = np.zeros(words * 32, np.uint8)
        row[list(tokens)] = 1
        return list(np.packbits(row, bitorder="little").view(np.int32))

    def step(mask_rows: list[int], mask: list[int]) -> Any:
        runner = drafting(Told(truth_of([plain])))
        ids, blocks = {"slots": i32([0])}, {"block_slots": i32([0]), "block_index": i32([0]), "block_ids": i32([0])}
        start = {"place_slots": i32([0]), "place_counts": i32([5]), "place_tokens": plain.prompt}
        places = [SlotSampling(slot=0, choice=0, prompt_len=5, params=plain.params)]
        runner.forward(Forward(engine=0, epoch=0, step=1, starts=i32([0]), counts=i32([5]), num_decode=0, **ids, **blocks, **start))
        runner.sample(Sample(engine=0, epoch=0, step=1, rows=i32([0]), positions=i32([5]), places=places, drafts=K, **ids))()
        runner.forward(Forward(engine=0, epoch=0, step=2, starts=i32([5]), counts=i32([1 + K]), num_decode=1, lookahead=K, **ids))
        masks = {"mask": i32(mask), "mask_rows": i32(mask_rows)}
        return runner.sample(Sample(engine=0, epoch=0, step=2, rows=i32([0]), positions=i32([6]), lookahead=K, **masks, **ids))()

    t = plain.tokens
    other = next(token for token in range(VOCAB) if token not in t)
    done = step([0, -1, 1, -1, -1], only(t[1]) + only(t[3], other))
    assert (done.tokens.tolist(), done.counts.tolist()) == (t[1:6], [5])
    done = step([-1, -1, 0, -1, -1], only(other))
    assert (done.tokens.tolist(), done.counts.tolist()) == ([*t[1:3], other], [3])
    done = step([-1, -1, -2, -2, -2], only(other))
    assert (done.tokens.tolist(), done.counts.tolist()) == (t[1:3], [2])


def test_what_cannot_be_drawn_is_refused(drafting: Any) -> None:
    runner = drafting(None)
    row = {"slots": i32([0]), "starts": i32([0]), "counts": i32([3])}
    place = {"place_slots": i32([0]), "place_counts": i32([3]), "place_tokens": i32([1, 2, 3])}
    blocks = {"block_slots": i32([0]), "block_index": i32([0]), "block_ids": i32([0])}
    runner.forward(Forward(engine=0, epoch=0, step=1, num_decode=0, lookahead=K, **row, **place, **blocks))
    with pytest.raises(EngineFailure, match="computed nothing"):
        runner.sample(Sample(engine=0, epoch=0, step=1, rows=i32([0]), slots=i32([0]), positions=i32([2]), lookahead=K))
    with pytest.raises(UnsupportedFeature, match=r"Forward\.lookahead"):
        runner.forward(Forward(engine=0, epoch=0, step=2, num_decode=0, lookahead=K + 1, **row))


def speculation(**fields: Any) -> SpeculationConfig:
    return SpeculationConfig(methods=[DraftConfig(**fields)])


@pytest.mark.parametrize("seed", [0, 1])
def test_a_draft_model_with_two_steps_in_flight(seed: int, load: Load, folder: Path, tmp_path: Path, make_tensors: Any) -> None:
    other = tmp_path / "draft"
    other.mkdir()
    (other / "config.json").write_text((folder / "config.json").read_text())
    save_file(make_tensors(seed=seed), other / "model.safetensors")
    plain, jobs = jobs_of(), jobs_of()
    Driver(load(folder, deterministic=True)).run(plain)
    runner = load(folder, deterministic=True, speculation=speculation(method="draft_model", model=str(other), num_speculative_tokens=K))
    driver = AheadDriver(runner, (K, K, K, K, 0, K, 2, K))
    driver.run(jobs)
    assert said(jobs) == said(plain)
    assert seed or driver.accepted > 60


@pytest.mark.parametrize("seed", [0, 1])
def test_a_draft_model_changes_no_token(seed: int, load: Load, folder: Path, tmp_path: Path, make_tensors: Any) -> None:
    """With the model itself as its draft all drafts are right, prompts' parts, shared blocks, gaps and preemptions notwithstanding; with another one few."""
    other = tmp_path / "draft"
    other.mkdir()
    (other / "config.json").write_text((folder / "config.json").read_text())
    save_file(make_tensors(seed=seed), other / "model.safetensors")
    plain = jobs_of()
    alone = Driver(load(folder, deterministic=True))
    alone.run(plain)
    runner = load(folder, deterministic=True, speculation=speculation(method="draft_model", model=str(other), num_speculative_tokens=K))
    assert (runner.lookahead, runner.drafters, runner.kv_layout.count("+")) == (K, ("draft_model",), 1)
    apt = [at for at, name in enumerate(PARAMS) if name in ("greedy", "seeded", "prompt")]
    for name, options in WAYS.items():
        jobs = jobs_of()
        driver = Driver(runner, options)
        driver.run(jobs)
        assert said(jobs) == said(plain), name
        if seed:
            continue
        assert driver.accepted > 60, name
        jobs = [jobs_of()[at] for at in apt]
        driver = Driver(runner, Options(lookahead=lambda rng: K, chunk=options.chunk, share=options.share, seed=4))
        driver.run(jobs)
        assert driver.accepted >= driver.drafted - 4 * len(apt), name


@pytest.mark.parametrize("share", [False, True])
def test_a_draft_model_reads_late_what_it_has_missed(share: bool, load: Load, folder: Path, tmp_path: Path) -> None:
    """Sequences that it was not to look at, and prefixes that were computed by such: all of its drafts are right, and no token is another."""
    plain = jobs_of()
    Driver(load(folder, deterministic=True)).run(plain)
    runner = load(folder, deterministic=True, speculation=speculation(method="draft_model", model=str(folder), num_speculative_tokens=K))
    assert runner.reads == (1,)
    apt = [at for at, name in enumerate(PARAMS) if name in ("greedy", "seeded", "prompt")]
    for seed in range(3):
        jobs = jobs_of()
        unread = Options(lookahead=lambda rng: rng.choice([0, 2, K]), share=share, unread=0.6, late=0.1, preempt=0.05, seed=seed)
        Driver(runner, unread).run(jobs)
        assert said(jobs) == said(plain)
        jobs = [jobs_of()[at] for at in apt]
        driver = Driver(runner, Options(lookahead=lambda rng: K, share=share, unread=0.6, late=0.2, at_once=2, seed=seed))
        driver.run(jobs)
        assert driver.drafted > 20
        assert driver.accepted >= driver.drafted - 4 * len(apt)
    prompt = np.arange(40, dtype=np.int32) % VOCAB
    driver = Driver(runner, Options(lookahead=lambda rng: K, share=share, unread=1.0))
    driver.run([Job(prompt=prompt, params=PARAMS["greedy"], max_tokens=4)])
    driver.options = Options(lookahead=lambda rng: K, share=share)
    later = Job(prompt=prompt, params=PARAMS["greedy"], max_tokens=24)
    driver.drafted = driver.accepted = 0
    driver.run([later])
    assert (later.shared > 0 or driver.cache != {}) == share
    assert driver.accepted >= driver.drafted - 4 > 10


@pytest.mark.parametrize("width", [VOCAB + 31, VOCAB - 31])
def test_a_draft_model_whose_vocabulary_is_padded_to_another_length(
    width: int, load: Load, folder: Path, tmp_path: Path, make_tensors: Any
) -> None:
    """What only one of them has is never drafted, however likely the other holds it."""
    other = tmp_path / "draft"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | {"vocab_size": width}))
    tensors = make_tensors()
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & set(tensors):
        more = 9 * torch.randn(max(0, width - VOCAB), tensors[name].shape[1], generator=torch.Generator().manual_seed(2))
        tensors[name] = torch.cat([tensors[name][:width], more.to(tensors[name].dtype)])
    save_file(tensors, other / "model.safetensors")
    plain, jobs = jobs_of(), jobs_of()
    Driver(load(folder, deterministic=True)).run(plain)
    driver = Driver(
        load(folder, deterministic=True, speculation=speculation(method="draft_model", model=str(other), num_speculative_tokens=K)),
        WAYS["at once"],
    )
    driver.run(jobs)
    assert said(jobs) == said(plain)
    assert driver.accepted > 20


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_draft_model_of_no_numbers_is_refused(value: float, load: Load, folder: Path, tmp_path: Path, make_tensors: Any) -> None:
    """It would never have a draft, and nobody would miss them."""
    other = tmp_path / "draft"
    other.mkdir()
    (other / "config.json").write_text((folder / "config.json").read_text())
    tensors = make_tensors()
    tensors["model.norm.weight"][3] = value
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load(folder, speculation=speculation(method="draft_model", model=str(other), num_speculative_tokens=K))
    said = f"--speculative-config: the drafter 'draft_model' in {other}: The tensor 'model.norm.weight' holds NaN or infinity."
    assert caught.value.message.startswith(said)
    assert str(caught.value) == caught.value.message


def test_what_is_wrong_with_a_drafter_is_not_said_of_the_model(load: Load, folder: Path, tmp_path: Path, make_tensors: Any) -> None:
    other = tmp_path / "draft"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | {"num_attention_heads": 0}))
    save_file(make_tensors(), other / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"--speculative-config: the drafter 'draft_model' in {other}: .*'num_attention_heads'"):
        load(folder, speculation=speculation(method="draft_model", model=str(other)))
    (other / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ConfigError, match=rf"--speculative-config: the drafter 'draft_model' in {other}: --quantization nope"):
        load(folder, speculation=speculation(method="draft_model", model=str(other), quantization="nope"))


def test_a_drafter_s_keys_travel_with_their_pages(load: Load, folder: Path) -> None:
    """Moved to the host and back into other blocks, a sequence is drafted as well as before."""
    runner = load(folder, speculation=speculation(method="draft_model", model=str(folder), num_speculative_tokens=K))
    own = runner.pool_bytes // runner.num_blocks
    assert int(runner.control(Control(engine=0, epoch=0, owner="", id=1, name="host_pages", data=b"2"))) == 2 * own
    assert own == 2 * (load(folder).pool_bytes // load(folder).num_blocks)
