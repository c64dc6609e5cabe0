"""Forward and Sample as core/protocol/messages.py documents them, and the slots' sampling state against the float64 reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.protocol.columns import i32
from penstock.core.protocol.errors import EngineFailure, UnsupportedFeature
from penstock.core.protocol.messages import Forward, Sample, SlotSampling
from penstock.core.protocol.sampling import SamplingParams
from penstock.kernels.sampling import reference
from penstock.plugins.devices import runner as runner_module
from penstock.plugins.devices.driver import Driver, Job, Options
from penstock.plugins.devices.host_ops import HostOps
from penstock.plugins.devices.lane import HostLane
from penstock.plugins.devices.rings import Download, Upload
from penstock.plugins.devices.sampler import SlotSampler

Load = Callable[..., Any]
VOCAB = 97
GREEDY = SamplingParams(temperature=0.0, logprobs=5)


def forward(runner: Any, rows: list[tuple[int, int, int]], **columns: Any) -> None:
    decode = sum(1 for row in rows if row[2] == 1)
    named = {name: i32(value) for name, value in columns.items()}
    slots, starts, counts = (i32([row[i] for row in rows]) for i in range(3))
    runner.forward(Forward(engine=1, epoch=2, step=3, slots=slots, starts=starts, counts=counts, num_decode=decode, **named))


def sample(runner: Any, rows: list[int], slots: list[int], positions: list[int], **more: Any) -> Any:
    return runner.sample(Sample(engine=1, epoch=2, step=3, rows=i32(rows), slots=i32(slots), positions=i32(positions), **more))()


def place(slot: int, prompt_len: int, params: SamplingParams = GREEDY, choice: int = 0, stop: tuple[int, ...] = ()) -> SlotSampling:
    return SlotSampling(slot=slot, choice=choice, prompt_len=prompt_len, params=params, stop_ids=i32(stop))


def values_of(done: Any) -> list[float]:
    return list(done.logprobs.values.tolist())


def test_a_step_carries_its_identity_and_times(folder: Path, load: Load) -> None:
    runner = load(folder)
    forward(runner, [(2, 0, 3)], place_slots=[2], place_counts=[3], place_tokens=[4, 5, 6], block_slots=[2], block_index=[0], block_ids=[7])
    done = sample(runner, [0], [2], [3], places=[place(2, 3)])
    assert (done.engine, done.epoch, done.step, done.slots.tolist(), len(done.tokens)) == (1, 2, 3, [2], 1)
    assert 0 < done.started_ns < done.finished_ns
    assert runner.history[2, :4].tolist() == [4, 5, 6, done.tokens[0]]
    assert (done.logprobs.rows.tolist(), done.logprobs.positions.tolist(), done.logprobs.counts.tolist()) == ([0], [3], [6])
    assert done.logprobs.ids[0] == done.logprobs.ids[1] == done.tokens[0]
    assert done.logprobs.ranks.tolist() == [1]


def test_columns_that_it_does_not_serve_are_refused_by_name(folder: Path, load: Load) -> None:
    runner = load(folder)
    with pytest.raises(UnsupportedFeature, match=r"Forward\.clone_src"):
        forward(runner, [], clone_src=[0], clone_dst=[1], clone_lens=[1])
    forward(runner, [])
    with pytest.raises(UnsupportedFeature, match=r"Sample\.lookahead"):
        sample(runner, [], [], [], lookahead=1)


def bits(*allowed: int) -> list[int]:
    row = np.zeros(-(-VOCAB // 32) * 32, np.uint8)
    row[list(allowed)] = 1
    return list(np.packbits(row, bitorder="little").view(np.int32))


def test_masked_rows_draw_what_their_mask_allows_and_no_other_row_changes(folder: Path, load: Load) -> None:
    prompts = {"place_slots": [0, 1, 2, 3], "place_counts": [3] * 4, "place_tokens": [4, 5, 6] * 4}
    blocks = {"block_slots": [0, 1, 2, 3], "block_index": [0] * 4, "block_ids": [0, 1, 2, 3]}
    hot = SamplingParams(temperature=1.0, seed=3, repetition_penalty=1.2)
    places = [place(0, 3), place(1, 3), place(2, 3, hot), place(3, 3)]
    rows = [(slot, 0, 3) for slot in range(4)]

    def draw(**more: Any) -> Any:
        runner = load(folder)
        forward(runner, rows, **prompts, **blocks)
        done = sample(runner, [0, 1, 2, 3], [0, 1, 2, 3], [3] * 4, places=places, **more)
        for slot, token in enumerate(done.tokens.tolist()):
            assert runner.history[slot, 3] == token
        return done

    free = draw()
    best = int(free.tokens[0])
    others = [token for token in range(VOCAB) if token != best]
    masks = bits(*others) + bits(40, 41) + bits()
    masked = draw(mask=i32(masks), mask_rows=i32([-1, 0, 1, 2]))
    assert masked.tokens[0] == best
    assert masked.tokens[1] == free.logprobs.ids[2]  # the second best: log-probabilities stay those of the raw logits
    assert masked.tokens[2] in (40, 41)
    assert masked.bad_rows.tolist() == [3]
    assert masked.logprobs.values[:6].tolist() == free.logprobs.values[:6].tolist()


def test_a_step_without_rows_to_draw(folder: Path, load: Load) -> None:
    runner = load(folder)
    forward(
        runner,
        [(0, 0, 3)],
        place_slots=[0],
        place_counts=[5],
        place_tokens=[1, 2, 3, 4, 5],
        block_slots=[0],
        block_index=[0],
        block_ids=[0],
    )
    done = sample(runner, [], [], [], places=[place(0, 5)])
    assert (len(done.tokens), done.logprobs, done.prompt_logprobs) == (0, None, None)
    forward(runner, [])
    assert len(sample(runner, [], [], []).tokens) == 0


def test_forked_blocks_are_copied_before_they_are_written(folder: Path, load: Load) -> None:
    """Two choices share a full block and each has its own copy of the partial one; both go on as a sequence of their own would."""
    runner = load(folder)
    prompt = np.arange(20, dtype=np.int32)
    want = Job(prompt=prompt, params=GREEDY, max_tokens=4)
    Driver(load(folder)).run([want])
    both = {"place_slots": [0, 1], "place_counts": [20, 20], "place_tokens": [*prompt, *prompt]}
    forward(runner, [(0, 0, 20)], **both, block_slots=[0, 0], block_index=[0, 1], block_ids=[5, 9])
    first = sample(runner, [0, 0], [0, 1], [20, 20], places=[place(0, 20), place(1, 20, choice=1)])
    assert first.tokens.tolist() == [want.tokens[0]] * 2
    runner.history[0, 20] = (int(first.tokens[0]) + 1) % VOCAB  # the first choice goes another way
    forward(runner, [(0, 20, 1), (1, 20, 1)], copy_src=[9], copy_dst=[4], block_slots=[1, 1], block_index=[0, 1], block_ids=[5, 4])
    tokens = [int(sample(runner, [1, 0], [1, 0], [21, 21]).tokens[0])]
    for position in (21, 22):
        forward(runner, [(0, position, 1), (1, position, 1)])
        tokens.append(int(sample(runner, [0, 1], [0, 1], [position + 1] * 2).tokens[1]))
    assert tokens == want.tokens[1:]


def test_choices_of_one_prompt_draw_differently_and_repeatably(folder: Path, load: Load) -> None:
    hot = SamplingParams(temperature=1.5, seed=11)

    def draw(order: list[int]) -> dict[int, int]:
        runner = load(folder)
        slots = {"place_slots": list(range(8)), "place_counts": [4] * 8, "place_tokens": [1, 2, 3, 4] * 8}
        forward(runner, [(0, 0, 4)], **slots, block_slots=[0], block_index=[0], block_ids=[0])
        done = sample(runner, [0] * 8, order, [4] * 8, places=[place(slot, 4, hot, choice=slot) for slot in range(8)])
        return dict(zip(order, done.tokens.tolist(), strict=True))

    tokens = draw(list(range(8)))
    assert len(set(tokens.values())) > 2
    assert draw([3, 1, 0, 2, 7, 6, 5, 4]) == tokens


def test_positions_without_blocks_stop_the_step(folder: Path, load: Load) -> None:
    runner = load(folder)
    with pytest.raises(EngineFailure, match="names what does not exist: a block table"):
        forward(runner, [(0, 0, 3)], place_slots=[0], place_counts=[3], place_tokens=[1, 2, 3])
    forward(runner, [(0, 0, 3)], block_slots=[0], block_index=[0], block_ids=[0])
    with pytest.raises(EngineFailure, match="names what does not exist: a block table"):  # a new sequence starts with an empty table
        forward(runner, [(0, 0, 2)], place_slots=[0], place_counts=[2], place_tokens=[1, 2])


def test_the_last_position_of_a_full_context(folder: Path, load: Load) -> None:
    runner = load(folder, max_model_len=16)
    job = Job(prompt=np.arange(12, dtype=np.int32), params=GREEDY, max_tokens=5)
    Driver(runner).run([job])
    assert len(job.tokens) == 5


def test_bad_rows_fail_alone(folder: Path, load: Load, rewrite: Any, make_tensors: Any) -> None:
    broken = make_tensors()
    broken["model.embed_tokens.weight"][50] = math.nan
    rewrite(folder, broken)
    runner = load(folder)
    for params in (GREEDY, SamplingParams(temperature=1.0, seed=3)):
        columns = {"place_slots": [0, 1, 2], "place_counts": [2, 2, 2], "place_tokens": [1, 2, 3, 50, 5, 6]}
        blocks = {"block_slots": [0, 1, 2], "block_index": [0, 0, 0], "block_ids": [0, 1, 2]}
        forward(runner, [(0, 0, 2), (1, 0, 2), (2, 0, 2)], **columns, **blocks)
        done = sample(runner, [0, 1, 2], [0, 1, 2], [2, 2, 2], places=[place(slot, 2, params) for slot in range(3)])
        assert done.bad_rows.tolist() == [1]
        assert done.tokens[1] == 0
        clean = load(folder)
        forward(clean, [(0, 0, 2)], place_slots=[0], place_counts=[2], place_tokens=[1, 2], block_slots=[0], block_index=[0], block_ids=[0])
        assert sample(clean, [0], [0], [2], places=[place(0, 2, params)]).tokens[0] == done.tokens[0]


def test_prompt_logprobs_in_small_pieces(folder: Path, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    asks = SamplingParams(temperature=0.0, prompt_logprobs=4)
    jobs = [Job(prompt=np.arange(3, 50, dtype=np.int32), params=asks, max_tokens=3) for _ in range(2)]
    Driver(load(folder)).run(jobs[:1])
    monkeypatch.setattr(runner_module, "DIRECT_LOGIT_ELEMENTS", 5 * VOCAB)
    Driver(load(folder), Options(chunk=lambda rng: 13)).run(jobs[1:])
    assert sorted(jobs[0].prompt_logprobs) == list(range(1, 47))
    assert jobs[0].tokens == jobs[1].tokens
    for position, (ids, values) in jobs[0].prompt_logprobs.items():
        assert ids[0] == jobs[0].prompt[position]
        assert len(ids) == 5
        assert (ids, values) == jobs[1].prompt_logprobs[position]


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    token = st.integers(0, VOCAB - 1)
    prompt = draw(st.lists(token, min_size=1, max_size=12))
    output = draw(st.lists(token, max_size=6))
    history = prompt + output
    words = [[*history[-2:], draw(token)] for _ in range(draw(st.integers(0, 2)))] + [[draw(token)] for _ in range(draw(st.integers(0, 1)))]
    small = st.floats(-2, 2, width=32, allow_subnormal=False)
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.7, 1.3])),
        top_k=draw(st.sampled_from([0, 5])),
        seed=draw(st.integers(-(2**63), 2**63 - 1)),
        repetition_penalty=draw(st.sampled_from([1.0, 1.25, 0.75])),
        frequency_penalty=draw(st.one_of(st.just(0.0), small)),
        presence_penalty=draw(st.one_of(st.just(0.0), small)),
        logit_bias=draw(st.dictionaries(token, st.floats(-50, 50, width=32, allow_subnormal=False), max_size=3)),
        allowed_token_ids=draw(st.one_of(st.none(), st.lists(token, min_size=30, max_size=60))),
        bad_words_token_ids=[word for word in words if word],
        min_tokens=draw(st.integers(0, 8)),
        logprobs=draw(st.sampled_from([None, 0, 3])),
    )
    return {
        "prompt": prompt,
        "output": output,
        "params": params,
        "stop": draw(st.lists(token, max_size=3)),
        "logits": draw(st.integers(0, 2**31)),
        "choice": draw(st.integers(0, 3)),
    }


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(cases(), min_size=1, max_size=5), order=st.randoms())
def test_slot_sampling_equals_the_reference(rows: list[dict[str, Any]], order: Any) -> None:
    """Rows with different settings in one batch, two steps each (so that counts grow), in slots in any order."""
    slots = order.sample(range(8), len(rows))
    history = torch.zeros(8, 64, dtype=torch.int32)
    lane = HostLane(direct=True)
    ops, down = HostOps(), Download(lane, 1, 8)
    sampler = SlotSampler(ops, 8, VOCAB, history, *(Upload(lane, 1, 128) for _ in range(3)), lambda column: torch.from_numpy(column))
    known = []
    for slot, row in zip(slots, rows, strict=True):
        tokens = row["prompt"] + row["output"]
        history[slot, : len(tokens)] = torch.tensor(tokens)
        known.append(tokens)
    sampler.place(
        [
            place(slot, len(row["prompt"]), row["params"], choice=row["choice"], stop=tuple(row["stop"]))
            for slot, row in zip(slots, rows, strict=True)
        ]
    )
    for step in range(2):
        raw = np.stack([np.random.default_rng(row["logits"] + step).normal(0, 3, VOCAB) for row in rows]).astype(np.float32)
        positions = i32([len(tokens) for tokens in known])
        landing = down.take()
        columns = (torch.from_numpy(i32(slots)), torch.from_numpy(positions))
        tokens, wanted = sampler.sample(torch.from_numpy(raw.copy()), i32(slots), positions, *columns, landing)
        landing.close()
        found = None if wanted is None else wanted.columns(landing)
        at = 0
        for i, row in enumerate(rows):
            params = row["params"]
            outputs = known[i][len(row["prompt"]) :]
            x = reference.penalise(
                raw[i].astype(np.float64),
                row["prompt"],
                outputs,
                repetition=params.repetition_penalty,
                frequency=params.frequency_penalty,
                presence=params.presence_penalty,
            )
            banned = reference.bad_word_ends(known[i], params.bad_words_token_ids)
            if len(outputs) < params.min_tokens:
                banned += row["stop"]
            x = reference.restrict(x, bias=params.logit_bias, allowed=params.allowed_token_ids, banned=banned)
            want = reference.draw(
                x, temperature=params.temperature, top_k=params.top_k, seed=params.seed, choice=row["choice"], position=int(positions[i])
            )
            assert tokens[i] == want
            if params.logprobs is not None:
                assert found is not None
                where = found.rows.tolist().index(i)
                start = int(found.counts[:where].sum())
                count = int(found.counts[where])
                assert count == params.logprobs + 1
                truth = reference.log_softmax(raw[i].astype(np.float64))
                ids = found.ids[start : start + count]
                assert ids[0] == tokens[i]
                assert np.allclose(found.values[start : start + count], truth[ids], atol=1e-4)
                assert found.ranks[where] == reference.rank(raw[i], int(tokens[i]))
                at += count
            history[slots[i], positions[i]] = tokens[i]
            known[i].append(int(tokens[i]))
        assert (found is None) == (at == 0)


def test_counts_are_only_kept_for_slots_that_ask(folder: Path, load: Load) -> None:
    runner = load(folder)
    settings = runner.sampler.nbytes
    prompts = [np.arange(3 + i, dtype=np.int32) for i in range(4)]
    Driver(runner).run([Job(prompt=p, params=GREEDY, max_tokens=3) for p in prompts])
    assert runner.sampler.nbytes == settings
    asks = SamplingParams(temperature=0.0, presence_penalty=1.0)
    for _ in range(5):
        Driver(runner).run([Job(prompt=p, params=asks, max_tokens=3) for p in prompts])
    assert runner.sampler.nbytes == settings + 4 * VOCAB * 5


def test_presence_penalty_stops_repetition(folder: Path, load: Load) -> None:
    job = Job(
        prompt=np.arange(5, dtype=np.int32),
        params=SamplingParams(temperature=0.0, presence_penalty=2.0, frequency_penalty=2.0),
        max_tokens=40,
    )
    plain = Job(prompt=job.prompt, params=GREEDY, max_tokens=40)
    Driver(load(folder)).run([job, plain])
    assert len(set(job.tokens)) > len(set(plain.tokens))
    again = Job(prompt=job.prompt, params=job.params, max_tokens=40)
    Driver(load(folder), Options(preempt=0.2, seed=4)).run([again])
    assert again.tokens == job.tokens


def test_prompt_logprobs_cost_no_second_pass_through_the_layers(folder: Path, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted: one call of the model a step, which keeps all hidden states of the rows that are asked about, and of no other."""
    runner = load(folder)
    assert runner._program is not None
    kept: list[int] = []
    program = runner._program

    def counting(columns: Any, rows: torch.Tensor, hidden: torch.Tensor) -> None:
        kept.append(len(rows))
        program(columns, rows, hidden)

    monkeypatch.setattr(runner, "_program", counting)
    prompts = [np.arange(3, 13, dtype=np.int32), np.arange(20, 27, dtype=np.int32), np.arange(30, 36, dtype=np.int32)]
    asks = SamplingParams(temperature=0.0, prompt_logprobs=1)
    params = [asks, SamplingParams(temperature=0.0), asks]
    jobs = [Job(prompt=prompt, params=one, max_tokens=2) for prompt, one in zip(prompts, params, strict=True)]
    Driver(runner).run(jobs)
    assert kept == [3 + 10 + 6, 3]
    alone = [Job(prompt=prompt, params=one, max_tokens=2) for prompt, one in zip(prompts, params, strict=True)]
    for job in alone:
        Driver(load(folder)).run([job])
    assert [job.prompt_logprobs for job in jobs] == [job.prompt_logprobs for job in alone]
    assert [job.tokens for job in jobs] == [job.tokens for job in alone]


def test_a_row_that_forward_was_not_told_of_has_no_prompt_logprobs(folder: Path, load: Load) -> None:
    runner = load(folder)
    forward(runner, [(0, 0, 3)], place_slots=[0], place_counts=[3], place_tokens=[4, 5, 6], block_slots=[0], block_index=[0], block_ids=[0])
    with pytest.raises(EngineFailure, match="of which its Forward did not say so"):
        sample(runner, [0], [0], [3], places=[place(0, 3)], prompt_rows=i32([0]), prompt_topk=i32([0]))
