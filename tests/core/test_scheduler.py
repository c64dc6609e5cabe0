"""The scheduler with the KV manager and the fake device: what it must do, case by case. The simulation checks every token against the
sequence computed alone, the budget, the offsets, and reuse in flight (see conftest.py)."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from penstock.core.actors.scheduler.outline import select_logprobs
from penstock.core.protocol.columns import f32, i32
from penstock.core.protocol.messages import (
    ABORTED,
    FAILED,
    LENGTH,
    STOP,
    DeviceLost,
    Drain,
    Forward,
    KvGrant,
    KvStep,
    LogprobColumns,
    Message,
    Park,
    PeerDown,
    Plan,
    Sample,
    StepDone,
    StepTokens,
    Unpark,
    seq_of,
)
from penstock.core.runtime.actor import Ask
from penstock.plugins.policies.priority import PriorityWithAgeing

Make = Callable[..., Any]


def computed(sim: Any) -> int:
    return sum(int(f.counts.sum()) for f in sim.forwards)


# ------------------------------------------------------------------ the plain course


def test_one_request_runs_alone(make_sim: Make) -> None:
    sim = make_sim()
    key = sim.admit([1, 2, 3, 4, 5, 6, 7], max_tokens=5)
    assert sim.run() == 5
    assert sim.output(key) == sim.expected(key << 7)
    assert len(sim.output(key)) == 5
    assert sim.reason(key) == LENGTH
    assert [f.num_decode for f in sim.forwards] == [0, 1, 1, 1, 1]
    assert sim.sent[0].started_seqs.tolist() == [key << 7]
    sim.check_idle()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_many_requests_share_slots(make_sim: Make, depth: int) -> None:
    sim = make_sim(depth=depth)
    for i in range(20):
        sim.admit([i % 3 + 1] * (i % 9 + 1) + [i], max_tokens=3 + i % 11, eos=[7], post=False)
    sim.drain()
    sim.run()
    assert len(sim.ledgers) == 20
    sim.check_idle()


def test_one_step_tokens_follows_each_step_done(make_sim: Make) -> None:
    sim = make_sim(max_num_batched_tokens=4)
    sim.admit([1] * 18, max_tokens=2)
    sim.run()
    *steps, last = sim.sent
    assert [s.step for s in steps] == list(range(1, len(sim.forwards) + 1))
    assert [s.tokens.size for s in steps] == [0, 0, 0, 0, 1, 1]
    assert [s.stats.batch_tokens for s in steps] == [4, 4, 4, 4, 2, 1]
    assert (last.seqs.size, last.stats.running, last.stats.blocks_used) == (0, 0, 0), "an idle engine says that the blocks came back"


def test_at_depth_two_the_next_step_is_planned_before_the_token_is_known(make_sim: Make) -> None:
    sim = make_sim(depth=2)
    sim.admit([1, 2, 3], max_tokens=6)
    assert [f[0].step for f in sim.flying] == [1, 2]
    assert sim.flying[1][0].starts.tolist() == [3]
    sim.run()
    sim.check_idle()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_max_tokens_is_known_ahead_and_not_overrun(make_sim: Make, depth: int) -> None:
    sim = make_sim(depth=depth)
    sim.admit([1, 2, 3], max_tokens=4)
    sim.admit([4, 5], max_tokens=7)
    sim.run()
    assert sum(s.rows.size for s in sim.samples) == 11


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_stop_is_found_late_and_the_surplus_dropped(make_sim: Make, depth: int) -> None:
    sim = make_sim(depth=depth)
    probe = sim.admit([1, 2, 3], max_tokens=8)
    sim.run()
    said = sim.output(probe)
    eos = said[3]
    drawn = sum(s.rows.size for s in sim.samples)
    key = sim.admit([1, 2, 3], max_tokens=20, eos=[eos])
    sim.run()
    assert sim.output(key) == said[: said.index(eos) + 1]
    assert sim.reason(key) == STOP
    assert sum(s.rows.size for s in sim.samples) - drawn == len(sim.output(key)) + depth - 1
    sim.check_idle()


def test_stop_token_ids_and_eos_stop_alike_and_many_of_them(make_sim: Make) -> None:
    sim = make_sim()
    key = sim.admit([1, 2, 3], max_tokens=30, eos=[2, 3], stop_token_ids=list(range(10, 60)))
    sim.run()
    assert sim.reason(key) == STOP
    assert sim.output(key)[-1] in {2, 3, *range(10, 60)}
    sim.check_idle()


def test_min_tokens_holds_the_end_back(make_sim: Make) -> None:
    sim = make_sim()
    every = list(range(1, 61))
    short = sim.admit([1, 2, 3], max_tokens=10, eos=every)
    held = sim.admit([1, 2, 3], max_tokens=10, eos=every, min_tokens=4)
    sim.run()
    assert len(sim.output(short)) == 1
    assert len(sim.output(held)) == 5, "token 0 four times, then any"
    assert [p.stop_ids.size for s in sim.samples for p in s.places] == [0, 60]


def test_the_context_ends_a_sequence(make_sim: Make) -> None:
    sim = make_sim(max_model_len=12)
    key = sim.admit([1] * 9, max_tokens=100)
    sim.run()
    assert len(sim.output(key)) == 3
    assert sim.reason(key) == LENGTH


def test_the_pool_ends_a_sequence_that_outgrows_it(make_sim: Make) -> None:
    sim = make_sim(num_blocks=3)
    key = sim.admit([1] * 9, max_tokens=100)
    sim.run()
    assert len(sim.output(key)) == 3
    sim.check_idle()


# ------------------------------------------------------------------ prompts


def test_prompts_are_chunked_beside_decodes_which_come_first(make_sim: Make) -> None:
    sim = make_sim(max_num_batched_tokens=8)
    first = sim.admit([1, 2], max_tokens=20)
    sim.finish()
    sim.admit([5] * 20, max_tokens=2)
    sim.finish(3)
    mixed = sim.forwards[2]
    assert mixed.counts.tolist() == [1, 7]
    assert mixed.num_decode == 1
    assert mixed.slots[0] == sim.forwards[0].slots[0]
    assert [f.counts.tolist() for f in sim.forwards[2:5]] == [[1, 7], [1, 7], [1, 6]]
    assert len(sim.output(first)) == 4, "the running sequence got a token in every step"
    sim.run()
    sim.check_idle()


def test_prefill_beside_decodes_can_be_bounded(make_sim: Make) -> None:
    sim = make_sim(max_num_batched_tokens=12, mixed_prefill_tokens=3)
    sim.admit([9] * 20, max_tokens=6)
    sim.finish(3)
    sim.admit([5] * 5, max_tokens=2)
    sim.admit([6] * 2, max_tokens=2)
    sim.run()
    alone, beside = [f for f in sim.forwards if f.num_decode == 0], [f for f in sim.forwards if 0 < f.num_decode < len(f.counts)]
    assert [f.counts.tolist() for f in alone[:2]] == [[12], [8]], "with nothing to decode the whole budget is used"
    assert [f.counts.tolist() for f in beside[:2]] == [[1, 3], [1, 2, 1]]
    assert all(f.counts[f.num_decode :].sum() <= 3 for f in beside)
    sim.check_idle()


def test_the_last_token_of_a_prompt_counts_as_a_decode_row(make_sim: Make) -> None:
    sim = make_sim(max_num_batched_tokens=4)
    sim.admit([1] * 5, max_tokens=2)
    sim.run()
    assert [(f.counts.tolist(), f.num_decode) for f in sim.forwards[:2]] == [([4], 0), ([1], 1)]


def test_without_chunking_a_prompt_waits_for_its_whole_budget_but_not_for_ever(make_sim: Make) -> None:
    sim = make_sim(max_num_batched_tokens=8, enable_chunked_prefill=False, max_num_seqs=4)
    for _ in range(3):
        sim.admit([1, 2], max_tokens=30)
    sim.finish(2)
    key = sim.admit([5] * 8, max_tokens=30)
    sim.finish(4)
    assert sim.output(key), "decodes gave way once"
    assert all((f.counts == 1).all() or 8 in f.counts for f in sim.forwards[2:])
    sim.run()
    sim.check_idle()


def test_more_decodes_than_budget_take_turns(make_sim: Make) -> None:
    sim = make_sim(max_num_batched_tokens=3, max_num_seqs=5)
    key = sim.admit([1, 2], n=5, max_tokens=20)
    for _ in range(25):
        sim.finish()
        counts = [len(sim.output(key, c)) for c in range(5)]
        assert max(counts) - min(counts) <= 2
    sim.run()
    sim.check_idle()


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 3])
def test_a_prompt_as_long_as_the_context_is_computed_and_nothing_drawn(make_sim: Make, depth: int, n: int) -> None:
    sim = make_sim(depth=depth, max_model_len=32, num_blocks=8, block_size=4, max_num_batched_tokens=5)
    key = sim.admit(list(range(1, 33)), max_tokens=0, prompt_logprobs=0, n=n)
    sim.run()
    assert [sim.reason(key, choice) for choice in range(n)] == [LENGTH] * n
    assert [sim.output(key, choice) for choice in range(n)] == [[]] * n
    (lead,) = {seq for seq, ledger in sim.ledgers.items() if ledger.prompt_logprobs}
    assert sim.ledgers[lead].prompt_logprobs == list(range(1, 32))
    assert computed(sim) == 32
    assert all(s.rows.size == 0 for s in sim.samples)
    assert all(f.num_decode == 0 for f in sim.forwards), "its last position is no decode: nobody samples there"
    sim.check_idle()
    over = sim.admit(list(range(1, 34)), max_tokens=0)
    assert sim.reason(over) == FAILED
    short = sim.admit(list(range(1, 33)), max_tokens=1)
    assert sim.reason(short) == FAILED


def test_who_draws_nothing_runs_beside_the_others_and_can_be_cancelled_in_flight(make_sim: Make) -> None:
    sim = make_sim(depth=2)
    beside = sim.admit([1, 2, 3], max_tokens=12)
    sim.finish(2)
    scored = sim.admit([4, 5, 6, 7], max_tokens=0)
    gone = sim.admit([4, 5, 6, 8], max_tokens=0, n=2)
    sim.abort(seq_of(gone, 0))
    sim.run()
    assert (sim.reason(scored), sim.output(scored)) == (LENGTH, [])
    assert (sim.reason(gone), sim.reason(gone, 1)) == (ABORTED, LENGTH)
    assert sim.output(beside) == sim.expected(beside << 7)
    sim.check_idle()


def test_prompt_logprobs_come_once_for_every_position_and_skip_the_look_up(make_sim: Make) -> None:
    sim = make_sim(max_num_batched_tokens=6)
    prompt = list(range(1, 18))
    sim.admit(prompt, max_tokens=2)
    sim.run()
    key = sim.admit(prompt, max_tokens=2, prompt_logprobs=3)
    sim.run()
    assert sim.ledgers[key << 7].prompt_logprobs == list(range(1, 17))
    assert sim.sent[-1].stats.prefix_hits == 0
    assert {k for s in sim.samples for k in s.prompt_topk.tolist()} == {3}
    sim.check_idle()


# ------------------------------------------------------------------ prefix cache


def test_a_prefix_is_computed_once(make_sim: Make) -> None:
    sim = make_sim()
    sim.admit([7] * 13, max_tokens=2)
    sim.run()
    before = computed(sim)
    key = sim.admit([7] * 13, max_tokens=2)
    sim.run()
    assert computed(sim) - before == 2, "one prompt token and one decode"
    assert [s.started_cached.tolist() for s in sim.sent if s.started_seqs.tolist() == [key << 7]] == [[12]]
    stats = sim.sent[-1].stats
    assert (stats.prefix_queries, stats.prefix_hits, stats.prompt_computed, stats.prompt_cached) == (26, 12, 14, 12)


def test_simultaneous_equal_prefixes_share_blocks_of_a_forward_in_flight(make_sim: Make) -> None:
    sim = make_sim(depth=2, max_num_batched_tokens=32)
    first = sim.admit([7] * 13, max_tokens=4, post=False)
    second = sim.admit([7] * 12 + [8, 9], max_tokens=4, post=False)
    sim.drain()
    assert [f[0].step for f in sim.flying] == [1, 2], "nothing has come back yet"
    assert sim.forwards[0].counts.tolist() == [13], "the second one lets the first compute"
    assert sorted(sim.forwards[1].counts.tolist()) == [1, 2], "and takes its blocks while they are being written"
    sim.run()
    assert sim.reason(first) == sim.reason(second) == LENGTH
    sim.check_idle()


def test_who_waits_for_a_prefix_does_not_hold_others_up(make_sim: Make) -> None:
    sim = make_sim(max_num_batched_tokens=32)
    for prompt in ([7] * 13, [7] * 12 + [8], [1, 2, 3]):
        sim.admit(prompt, max_tokens=2, post=False)
    sim.drain()
    assert sorted(sim.forwards[0].counts.tolist()) == [3, 13]
    sim.run()
    sim.check_idle()


def test_generated_tokens_can_be_hit_by_the_next_turn(make_sim: Make) -> None:
    sim = make_sim()
    key = sim.admit([1, 2, 3], max_tokens=10)
    sim.run()
    turn = [1, 2, 3, *sim.output(key), 9]
    sim.admit(turn, max_tokens=1)
    sim.run()
    assert [12] in [s.started_cached.tolist() for s in sim.sent]


def test_many_look_ups_fit_one_step_when_the_cache_serves_them(make_sim: Make) -> None:
    sim = make_sim(max_num_batched_tokens=16, max_num_seqs=8, block_size=4)
    sim.admit([7] * 13, max_tokens=1)
    sim.run()
    steps = len(sim.forwards)
    for i in range(8):
        sim.admit([7] * 12 + [i], max_tokens=1, post=False)
    sim.drain()
    sim.run()
    assert len(sim.forwards) - steps == 1
    sim.check_idle()


# ------------------------------------------------------------------ several choices


def test_choices_compute_their_prompt_once_then_fork(make_sim: Make) -> None:
    sim = make_sim()
    key = sim.admit([1, 2, 3, 4, 5, 6], n=3, max_tokens=5, temperature=1.0, seed=11)
    first, sample = sim.forwards[0], sim.samples[0]
    assert first.counts.tolist() == [6]
    assert first.place_counts.tolist() == [6, 6, 6]
    assert sample.rows.tolist() == [0, 0, 0]
    assert sample.positions.tolist() == [6, 6, 6]
    assert [p.choice for p in sample.places] == [0, 1, 2]
    sim.finish()
    second = sim.forwards[1]
    assert second.copy_src.tolist() == [second.copy_src[0]] * 2
    assert len(set(second.copy_dst.tolist())) == 2
    assert sim.kv.counts()[2] == 4, "one full block shared by three, and three tails"
    sim.run()
    assert len({tuple(sim.output(key, c)) for c in range(3)}) == 3
    assert computed(sim) == 6 + 3 * 4
    assert sim.sent[0].started_seqs.size == 3
    sim.check_idle()


def test_more_choices_than_slots(make_sim: Make) -> None:
    sim = make_sim(max_num_seqs=2, num_blocks=32)
    key = sim.admit([1, 2, 3, 4, 5], n=5, max_tokens=3, temperature=1.0)
    sim.run()
    assert all(sim.reason(key, c) == LENGTH for c in range(5))
    assert computed(sim) == (5 + 1 + 1) + 5 * 2, "two more prefills, of one token each"
    assert sim.sent[-1].stats.prefix_queries == 5, "counted once a request"
    sim.check_idle()


def test_a_choice_that_ends_with_its_first_token_does_not_hinder_the_others(make_sim: Make) -> None:
    for depth in (1, 2):
        sim = make_sim(depth=depth)
        key = sim.admit([1, 2, 3, 4, 5], n=4, max_tokens=6, temperature=1.0, seed=3, eos=list(range(0, 61, 3)))
        sim.run()
        assert {sim.reason(key, c) for c in range(4)} <= {STOP, LENGTH}
        sim.check_idle()


def test_aborting_the_choice_that_computes_the_prompt(make_sim: Make) -> None:
    sim = make_sim(max_num_batched_tokens=4)
    key = sim.admit([1] * 14, n=3, max_tokens=3)
    sim.finish()
    sim.abort(seq_of(key, 0))
    sim.run()
    assert [sim.reason(key, c) for c in range(3)] == [ABORTED, LENGTH, LENGTH]
    assert computed(sim) < 2 * 14 + 4, "its blocks were hit"
    sim.check_idle()


# ------------------------------------------------------------------ re-admission and preemption


@pytest.mark.parametrize("depth", [1, 2])
def test_readmission_goes_on_where_it_was(make_sim: Make, depth: int) -> None:
    sim = make_sim(depth=depth)
    whole = sim.admit([1, 2, 3], max_tokens=9, temperature=1.0, seed=5, eos=[4], min_tokens=6)
    sim.run()
    said = sim.output(whole)
    for received in range(len(said)):
        again = make_sim(depth=depth)
        key = again.admit(
            [1, 2, 3], key=1, incarnation=3, max_tokens=9, temperature=1.0, seed=5, eos=[4], min_tokens=6, outputs={0: said[:received]}
        )
        again.run()
        assert again.output(key) == said
        assert again.samples[0].positions[0] == 3 + received
        assert again.sent[0].offsets[0] == received
        assert {int(s.incarnations[0]) for s in again.sent if s.incarnations.size} == {3}
        again.check_idle()


def test_readmission_of_some_choices(make_sim: Make) -> None:
    sim = make_sim()
    sim.admit([1, 2, 3], key=9, incarnation=1, choices=[0, 2, 3], outputs={2: sim_output(make_sim, 2)}, n=4, max_tokens=6, temperature=1.0)
    sim.run()
    assert [sim.reason(9, c) for c in (0, 2, 3)] == [LENGTH] * 3
    assert sim.ledgers[seq_of(9, 2)].outputs == sim.expected(seq_of(9, 2))
    sim.check_idle()


def sim_output(make_sim: Make, choice: int) -> list[int]:
    sim = make_sim()
    sim.admit([1, 2, 3], key=9, n=4, max_tokens=6, temperature=1.0)
    sim.run()
    out: list[int] = sim.output(9, choice)[:3]
    return out


def test_readmission_of_what_was_complete_ends_at_once(make_sim: Make) -> None:
    sim = make_sim()
    key = sim.admit([1, 2], max_tokens=2, outputs={0: sim_first_two(make_sim)})
    assert sim.reason(key) == LENGTH
    assert not sim.forwards
    sim.check_idle()


def sim_first_two(make_sim: Make) -> list[int]:
    sim = make_sim()
    key = sim.admit([1, 2], max_tokens=2)
    sim.run()
    out: list[int] = sim.output(key)
    return out


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("caching", [True, False])
def test_memory_that_runs_out_preempts_the_latest(make_sim: Make, depth: int, caching: bool) -> None:
    sim = make_sim(depth=depth, num_blocks=8, enable_prefix_caching=caching)
    keys = [sim.admit([i + 1] * 5, max_tokens=20, temperature=1.0) for i in range(3)]
    sim.run()
    assert all(sim.reason(k) == LENGTH for k in keys)
    preempted = Counter(seq for s in sim.sent for seq in s.preempted_seqs.tolist())
    assert preempted
    assert keys[0] << 7 not in preempted, "the oldest is never preempted"
    assert sim.sent[-1].stats.preemptions == sum(preempted.values())
    ends = [next(i for i, s in enumerate(sim.sent) if k << 7 in s.seqs[s.reasons > 0].tolist()) for k in keys]
    assert ends[0] == min(ends)
    sim.check_idle()


def test_a_preempted_sequence_finds_its_blocks_in_the_cache(make_sim: Make) -> None:
    sim = make_sim(num_blocks=8, max_num_seqs=2)
    sim.admit([1] * 8, max_tokens=13)
    sim.admit([2] * 8, max_tokens=13)
    sim.run()
    assert sim.sent[-1].stats.preemptions > 0
    assert sim.sent[-1].stats.prompt_cached > 0
    assert sim.sent[-1].stats.prefix_queries == 16, "a recomputation is no query"
    sim.check_idle()


# ------------------------------------------------------------------ cancelling and parking


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_an_abort_frees_blocks_within_two_steps(make_sim: Make, depth: int) -> None:
    sim = make_sim(depth=depth)
    stays = sim.admit([1, 2, 3], max_tokens=30)
    goes = sim.admit([5] * 9, max_tokens=30)
    sim.finish(4)
    held = sim.kv.counts()[2]
    mine = len(sim.kv.blocks_of(goes << 7))
    sim.abort(goes << 7)
    assert sim.sent[-1].reasons.tolist() == [ABORTED]
    sim.finish(depth)
    assert sim.kv.counts()[2] <= held - mine + 1
    assert not sim.kv.blocks_of(goes << 7)
    sim.run()
    assert sim.reason(stays) == LENGTH
    sim.check_idle()


def test_an_abort_of_the_only_one_gives_everything_back(make_sim: Make) -> None:
    sim = make_sim(depth=2)
    key = sim.admit([1, 2, 3], max_tokens=30)
    sim.finish()
    sim.abort(key << 7)
    sim.abort(key << 7)
    sim.abort(123)
    assert sim.run() == 2
    assert sum(s.reasons.tolist().count(ABORTED) for s in sim.sent) == 1
    sim.check_idle()


def test_an_abort_of_who_waits(make_sim: Make) -> None:
    sim = make_sim(max_num_seqs=1)
    sim.admit([1], max_tokens=3)
    key = sim.admit([2], max_tokens=3)
    sim.abort(key << 7)
    sim.run()
    assert sim.reason(key) == ABORTED
    assert not sim.output(key)
    sim.check_idle()


def test_a_parked_sequence_keeps_its_blocks_and_is_left_out(make_sim: Make) -> None:
    sim = make_sim()
    key = sim.admit([1, 2, 3, 4, 5], max_tokens=12)
    other = sim.admit([7], max_tokens=12)
    sim.finish(2)
    sim.post(Park(key=key), Park(key=key), Park(key=99))
    sim.finish()
    said = len(sim.output(key))
    sim.finish(4)
    assert len(sim.output(key)) == said
    assert sim.kv.blocks_of(key << 7)
    assert sim.sent[-1].stats.parked == 1
    sim.run()
    assert sim.reason(other) == LENGTH
    assert sim.reason(key) is None
    assert sim.scheduler.progress == (sim.scheduler.done_step, 0)  # it waits for its client, so nothing should move
    sim.post(Unpark(key=key))
    assert sim.scheduler.progress[1] > 0
    sim.run()
    assert sim.reason(key) == LENGTH
    sim.check_idle()


@pytest.mark.parametrize("depth", [1, 2])
def test_a_step_whose_clients_all_left_still_counts_as_work(make_sim: Make, depth: int) -> None:
    """Else a device that hangs in it would never be noticed."""
    sim = make_sim(depth=depth)
    key = sim.admit([1, 2, 3], max_tokens=12)
    sim.drain()
    assert sim.flying
    sim.abort(key << 7)
    assert not sim.live()
    assert sim.scheduler.progress[1] > 0
    sim.run()
    assert sim.scheduler.progress[1] == 0


def test_a_parked_sequence_is_preempted_first(make_sim: Make) -> None:
    sim = make_sim(num_blocks=8, max_num_seqs=3)
    parked = sim.admit([1] * 8, max_tokens=20)
    sim.finish(2)
    sim.post(Park(key=parked))
    others = [sim.admit([i] * 6, max_tokens=10) for i in (2, 3)]
    sim.run()
    assert all(sim.reason(k) == LENGTH for k in others)
    assert {seq for s in sim.sent for seq in s.preempted_seqs.tolist()} == {parked << 7}
    sim.post(Unpark(key=parked))
    sim.run()
    assert sim.reason(parked) == LENGTH
    sim.check_idle()


def test_parked_sequences_do_not_hold_all_slots(make_sim: Make) -> None:
    sim = make_sim(max_num_seqs=2)
    slow = [sim.admit([i], max_tokens=20) for i in range(2)]
    sim.finish(3)
    for key in slow:
        sim.post(Park(key=key))
    quick = sim.admit([9, 9], max_tokens=4)
    sim.run()
    assert sim.reason(quick) == LENGTH
    for key in slow:
        sim.post(Unpark(key=key))
    sim.run()
    sim.check_idle()


def test_who_is_parked_while_waiting_is_overtaken(make_sim: Make) -> None:
    sim = make_sim(max_num_seqs=1)
    sim.admit([1], max_tokens=2)
    parked = sim.admit([2], max_tokens=2)
    last = sim.admit([3], max_tokens=2)
    sim.post(Park(key=parked))
    sim.run()
    assert sim.reason(last) == LENGTH
    assert sim.reason(parked) is None
    sim.post(Unpark(key=parked))
    sim.run()
    sim.check_idle()


# ------------------------------------------------------------------ failures


@pytest.mark.parametrize("depth", [1, 2])
def test_a_bad_row_fails_its_sequence_only_and_poisons_nothing(make_sim: Make, depth: int) -> None:
    sim = make_sim(depth=depth)
    bad = sim.admit([7] * 9, max_tokens=9)
    good = sim.admit([1, 2], max_tokens=9)
    sim.finish(2)
    row = {}

    def hurt(sample: Sample) -> list[int]:
        slot = sim.forwards[0].slots[sim.forwards[0].counts == 9][0]
        row["n"] = np.flatnonzero(sample.slots == slot).tolist()
        return row["n"]

    sim.bad = hurt
    sim.finish()
    sim.bad = None
    assert sim.reason(bad) == FAILED
    assert "not a number" in sim.ledgers[bad << 7].error
    sim.run()
    assert sim.reason(good) == LENGTH
    again = sim.admit([7] * 9, max_tokens=2)
    sim.run()
    assert [s.started_cached.tolist() for s in sim.sent if again << 7 in s.started_seqs] == [[0]]
    sim.check_idle()


@pytest.mark.parametrize(
    ("options", "prompt", "why"),
    [
        ({}, [], "no tokens"),
        ({"max_model_len": 8}, [1] * 8, "context is 8"),
        ({"num_blocks": 2}, [1] * 9, "KV cache of 2 blocks holds 8"),
        ({"enable_chunked_prefill": False, "max_num_batched_tokens": 4}, [1] * 5, "without chunked prefill"),
        ({}, [1, 61], "outside 0..60"),
        ({}, [-1], "outside 0..60"),
    ],
)
def test_what_can_never_run_fails_with_a_reason(make_sim: Make, options: dict[str, Any], prompt: list[int], why: str) -> None:
    sim = make_sim(**options)
    key = sim.admit(prompt, n=2)
    assert sim.reason(key) == sim.reason(key, 1) == FAILED
    assert why in sim.ledgers[key << 7].error
    assert not sim.forwards
    sim.check_idle()


def test_what_no_longer_fits_because_blocks_are_quarantined_fails_rather_than_hangs(make_sim: Make) -> None:
    sim = make_sim(num_blocks=4)
    sim.kv._free = sim.kv._free[:2]
    sim._referee_grant = lambda question, grant: None
    key = sim.admit([1] * 11, max_tokens=2)
    sim.run()
    assert sim.reason(key) == FAILED
    assert "needs 3 KV blocks, but only 2 of 4" in sim.ledgers[key << 7].error


def test_what_outgrows_a_damaged_pool_fails_rather_than_hangs(make_sim: Make) -> None:
    sim = make_sim(num_blocks=4)
    sim.kv._free = sim.kv._free[:2]
    sim._referee_grant = lambda question, grant: None
    key = sim.admit([1] * 6, max_tokens=8)
    sim.run()
    assert sim.reason(key) == FAILED
    assert "exhausted" in sim.ledgers[key << 7].error
    assert len(sim.output(key)) == 3


def test_results_of_another_epoch_are_dropped(make_sim: Make) -> None:
    sim = make_sim()
    key = sim.admit([1, 2], max_tokens=3)
    step = sim.flying[0][1]
    stale = StepDone(engine=0, epoch=0, step=1, slots=step.slots, tokens=i32([5]))
    sim.post(stale, msgspec.structs.replace(stale, epoch=1, step=2), msgspec.structs.replace(stale, epoch=1, engine=4))
    assert sim.scheduler.stale == 3
    assert not sim.sent
    sim.run()
    assert sim.reason(key) == LENGTH


def test_a_lost_device_ends_planning(make_sim: Make) -> None:
    sim = make_sim()
    sim.admit([1, 2], max_tokens=3)
    sim.post(DeviceLost(engine=0, epoch=1, step=1, error="gone"))
    steps = len(sim.forwards)
    sim.admit([1, 2], max_tokens=3)
    assert len(sim.forwards) == steps


def test_a_request_said_twice_runs_once(make_sim: Make) -> None:
    sim = make_sim()
    key = sim.admit([1, 2], max_tokens=3)
    sim.post(sim.ledgers[key << 7].admit)
    sim.run()
    assert len(sim.output(key)) == 3
    assert sim.scheduler.stale == 1
    sim.check_idle()


@pytest.mark.parametrize("depth", [1, 2])
def test_a_later_life_of_a_request_replaces_the_earlier(make_sim: Make, depth: int) -> None:
    sim = make_sim(depth=depth)
    key = sim.admit([1, 2], max_tokens=9)
    sim.finish(2)
    said = list(sim.output(key))
    sim.admit([1, 2], max_tokens=9, key=key, incarnation=1, outputs={0: said})
    sim.run()
    assert sim.output(key) == sim.expected(key << 7)
    sim.check_idle()


def test_when_text_is_gone_everything_ends(make_sim: Make) -> None:
    sim = make_sim(depth=2, max_num_seqs=2)
    for i in range(4):
        sim.admit([i], max_tokens=20)
    sim.finish(3)
    for ledger in sim.ledgers.values():
        ledger.aborted = True
    sim.post(PeerDown(role="text", id=0, epoch=1))
    assert sim.run() <= 2
    sim.check_idle()


# ------------------------------------------------------------------ the end


def test_drain_finishes_what_runs_and_what_waits_then_says_so(make_sim: Make) -> None:
    sim = make_sim(max_num_seqs=1, depth=2)
    keys = [sim.admit([i], max_tokens=4) for i in range(3)]
    sim.post(Drain())
    late = sim.admit([9], max_tokens=4)
    assert sim.reason(late) == FAILED
    assert "draining" in sim.ledgers[late << 7].error
    assert sim.drained == 0
    sim.run()
    assert all(sim.reason(k) == LENGTH for k in keys)
    assert sim.drained == 1
    sim.check_idle()


def test_an_idle_engine_is_drained_at_once(make_sim: Make) -> None:
    sim = make_sim()
    sim.post(Drain())
    sim.post(Drain())
    assert sim.drained == 1


# ------------------------------------------------------------------ order


def test_priority_goes_first_and_ageing_saves_the_rest(make_sim: Make) -> None:
    sim = make_sim(policy=PriorityWithAgeing(1.0), max_num_seqs=1)
    sim.admit([1], max_tokens=2)
    low = sim.admit([2], max_tokens=2, priority=5)
    high = sim.admit([3], max_tokens=2, priority=0)
    old = sim.admit([4], max_tokens=2, priority=5)
    sim.run()
    order = [seq for s in sim.sent for seq in s.started_seqs.tolist()]
    assert order[1:] == [high << 7, low << 7, old << 7]
    sim.admit([1], max_tokens=2)
    aged = sim.admit([2], max_tokens=2, priority=5)
    sim.clock.advance(6.0)
    young = sim.admit([3], max_tokens=2, priority=0)
    sim.run()
    assert [seq for s in sim.sent for seq in s.started_seqs.tolist()][-2:] == [aged << 7, young << 7]


def test_stats_say_what_is(make_sim: Make) -> None:
    sim = make_sim(max_num_seqs=2, num_blocks=16)
    for i in range(3):
        sim.admit([i] * 5, max_tokens=5, post=False)
    sim.drain()
    sim.finish()
    stats = sim.sent[-1].stats
    assert (stats.running, stats.waiting, stats.blocks_total, stats.blocks_used, stats.steps, stats.batch_tokens) == (2, 1, 16, 4, 1, 10)


# ------------------------------------------------------------------ log-probabilities


@pytest.mark.parametrize("depth", [1, 2])
def test_logprobs_stay_with_their_rows(make_sim: Make, depth: int) -> None:
    sim = make_sim(depth=depth)
    keys = [sim.admit([i + 1], max_tokens=12, logprobs=i, eos=list(range(0, 61, 4))) for i in range(4)]
    sim.run()
    wanted = {key << 7: i for i, key in enumerate(keys)}
    for sent in sim.sent:
        if sent.logprobs is None:
            continue
        at = 0
        assert sent.logprobs.rows.size == (sent.tokens >= 0).sum()
        for row, count in zip(sent.logprobs.rows.tolist(), sent.logprobs.counts.tolist(), strict=True):
            assert sent.logprobs.ids[at] == sent.tokens[row]
            assert count == 1 + wanted[int(sent.seqs[row])]
            at += count
        assert at == sent.logprobs.ids.size == sent.logprobs.values.size


def test_select_logprobs_renumbers() -> None:
    columns = LogprobColumns(
        rows=i32([0, 2, 3]),
        positions=i32([5, 6, 7]),
        counts=i32([1, 2, 1]),
        ranks=i32([1, 2, 3]),
        ids=i32([9, 8, 7, 6]),
        values=f32([1, 2, 3, 4]),
    )
    kept = select_logprobs(columns, np.array([1, 2, 3]), 4)
    assert kept.rows.tolist() == [1, 2]
    assert kept.ids.tolist() == [8, 7, 6]
    assert kept.values.tolist() == [2, 3, 4]
    assert kept.positions.tolist() == [6, 7]


# ------------------------------------------------------------------ the price of a step


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("rows", [1, 8])
def test_a_decode_step_takes_at_most_ten_messages(make_sim: Make, depth: int, rows: int) -> None:
    """With the two DeviceWork that executor and sampler make of Forward and Sample; the number does not depend on the rows."""
    sim = make_sim(depth=depth, max_num_seqs=8, block_size=4)
    for i in range(rows):
        sim.admit([i] * (i % 4 + 1), max_tokens=40)
    sim.finish(4)
    sim.routed.clear()
    steps = sim.finish(24)
    counts = Counter(type(m) for m in sim.routed)
    for kind in (StepDone, StepTokens, Plan, Forward, Sample):
        assert counts[kind] == steps
    assert counts[KvStep] == counts[KvGrant] <= steps
    if rows == 1:
        assert counts[KvStep] == steps // 4, "KV is asked only where a block is needed"
    assert len(sim.routed) + 2 * steps <= 10 * steps


@pytest.mark.parametrize(("num_blocks", "questions"), [(42, 10), (100, 3)])
def test_kv_is_asked_for_some_steps_at_once_where_there_is_enough(make_sim: Make, num_blocks: int, questions: int) -> None:
    """In nearly every step another of the eight comes to the end of its block. Where blocks are few, it is asked for then, and not before."""
    sim = make_sim(max_num_seqs=8, block_size=8, num_blocks=num_blocks, max_model_len=64)
    keys = [sim.admit([i] * (i + 1), max_tokens=40) for i in range(8)]
    sim.finish(20)
    sim.asked.clear()
    assert sim.finish(12) == 12
    assert sum(question.reserve_seqs.size > 0 for question in sim.asked) == questions
    slots = sim.scheduler._board.slots
    assert int((slots.capacity[:8] - slots.computed[:8]).max()) < 8 + 3, "no more than for those steps"
    sim.run()
    assert [len(sim.output(key)) for key in keys] == [40] * 8
    assert (sim.scheduler._board.preemptions > 0) == (num_blocks == 42)
    sim.check_idle()


@pytest.mark.parametrize("lookahead", [0, 3])
def test_columns_of_a_step_are_typed(lookahead: int, make_sim: Make) -> None:
    sim = make_sim(max_num_batched_tokens=8, num_blocks=16, lookahead=lookahead)
    for i in range(4):
        sim.admit([i] * 7, max_tokens=9, n=2, temperature=1.0)
    sim.run()
    assert any(sent.drafted.size for sent in sim.sent) == (lookahead > 0)
    wide = {"seqs", "started_seqs", "preempted_seqs", "prompt_seqs", "drafted_seqs"}
    narrow = {"reasons", "block_groups", "copy_groups", "pool_kinds", "loose", "place_unread"}
    for message in (*sim.forwards, *sim.samples, *sim.sent):
        for field in msgspec.structs.fields(message):
            value = getattr(message, field.name)
            if isinstance(value, np.ndarray):
                expected = np.int64 if field.name in wide else np.uint8 if field.name in narrow else np.int32
                assert value.dtype == expected, (type(message).__name__, field.name)
                assert value.ndim == 1
            elif field.name in {"step", "num_decode"}:
                assert type(value) is int


@pytest.mark.benchmarks
@pytest.mark.parametrize(("rows", "target_us"), [(1, 30), (64, 100)])
@pytest.mark.parametrize("depth", [1, 2])
def test_machinery_of_a_decode_step(make_sim: Make, rows: int, target_us: float, depth: int) -> None:
    """Scheduler and KV manager only: StepDone in, Forward and Sample out; the median step of the best of fifteen runs."""
    sim = make_sim(depth=depth, max_num_seqs=64, max_num_batched_tokens=2048, max_model_len=4096, block_size=16, num_blocks=64 * 256)
    flying: deque[Sample] = deque()
    for i in range(rows):
        sim.admit([i % 60] * (20 + i), max_tokens=3000, post=False)
        step(sim, sim.fifo.pop(), flying)
    while flying[0].rows.size < rows:
        step(sim, done_of(flying.popleft()), flying)
    best = np.inf
    for _ in range(15):
        spent = []
        for _ in range(100):
            done = done_of(flying.popleft())
            start = time.perf_counter_ns()
            step(sim, done, flying)
            spent.append(time.perf_counter_ns() - start)
        best = min(best, float(np.median(spent)))
    assert best / 1000 <= target_us


def done_of(sample: Sample) -> StepDone:
    return StepDone(engine=0, epoch=1, step=sample.step, slots=sample.slots, tokens=np.full(sample.slots.size, 5, np.int32))


def step(sim: Any, message: Message, flying: deque[Sample]) -> None:
    """What the cell does, with nobody watching."""
    queue = deque([message])
    while queue:
        handling, answer = sim.scheduler.handle(queue.popleft()), None
        if not hasattr(handling, "send"):
            queue.extend(handling)
            continue
        while True:
            try:
                out = handling.send(answer)
            except StopIteration:
                break
            answer = None
            if type(out) is Ask:
                (answer,) = sim.kv.handle(out.question)
            elif type(out) is Plan:
                queue.append(out)
            elif type(out) is Sample:
                flying.append(out)


# ------------------------------------------------------------------ prompt tokens with log-probabilities


def rows_of(sim: Any, slot_of_interest: int) -> list[int]:
    """Tokens of that slot in each step that has any of its prompt (its last token alone counts as a decode)."""
    return [int(f.counts[f.slots == slot_of_interest][0]) for f in sim.forwards if slot_of_interest in f.slots[f.num_decode :]]


@pytest.mark.parametrize(("weight", "chunks"), [(1.0, [11, 9]), (2.5, [4, 4, 4, 4, 4]), (16.0, [1] * 19)])
def test_a_step_takes_as_many_prompt_tokens_with_logprobs_as_its_budget_pays_for(make_sim: Make, weight: float, chunks: list[int]) -> None:
    sim = make_sim(max_num_batched_tokens=12, prompt_logprobs_weight=weight)
    runs = sim.admit([1, 2], max_tokens=40)
    sim.finish()
    asks = sim.admit(list(range(1, 21)), max_tokens=1, prompt_logprobs=2)
    sim.run()
    assert rows_of(sim, 1) == chunks
    assert sim.ledgers[asks << 7].prompt_logprobs == list(range(1, 20))
    assert sim.output(runs) == sim.expected(runs << 7)
    assert all(f.prompt_rows.tolist() == s.prompt_rows.tolist() for f, s in zip(sim.forwards, sim.samples, strict=True))
    sim.check_idle()


def test_who_does_not_ask_pays_nothing_and_fills_what_is_left(make_sim: Make) -> None:
    sim = make_sim(max_num_batched_tokens=12, prompt_logprobs_weight=4.0)
    asks = sim.admit(list(range(1, 8)), max_tokens=1, prompt_logprobs=0, post=False)
    plain = sim.admit(list(range(30, 50)), max_tokens=1, post=False)
    sim.drain()
    sim.run()
    assert rows_of(sim, 0) == [3, 3]
    assert rows_of(sim, 1) == [11, 9], "the last token of the first prompt predicts none of it, and weighs what others weigh"
    assert (sim.reason(asks), sim.reason(plain)) == (LENGTH, LENGTH)


def test_only_prompt_logprobs_that_are_still_to_be_told_weigh_more(make_sim: Make) -> None:
    """A sequence that comes with outputs (after a restart) told them before."""
    sim = make_sim(max_num_batched_tokens=12, prompt_logprobs_weight=4.0, enable_prefix_caching=False)
    prompt = list(range(1, 12))
    first = sim.admit(prompt, max_tokens=1)
    sim.run()
    before = len(sim.forwards)
    sim.admit(prompt, max_tokens=4, prompt_logprobs=0, outputs={0: sim.output(first)})
    sim.run()
    assert sim.forwards[before].counts.tolist() == [12]


def test_without_chunks_a_prompt_is_taken_whole_whatever_it_weighs(make_sim: Make) -> None:
    sim = make_sim(max_num_batched_tokens=24, prompt_logprobs_weight=4.0, enable_chunked_prefill=False)
    sim.admit([1, 2], max_tokens=12)
    sim.finish()
    sim.admit(list(range(1, 21)), max_tokens=1, prompt_logprobs=2)
    sim.run()
    assert rows_of(sim, 1) == [20]


def test_a_prompt_with_logprobs_ends_where_decodes_leave_next_to_nothing(make_sim: Make) -> None:
    sim = make_sim(max_num_seqs=4, max_num_batched_tokens=4, prompt_logprobs_weight=8.0)
    for first in range(3):
        sim.admit([first + 1], max_tokens=30)
    sim.finish(2)
    asks = sim.admit([9] * 6, max_tokens=2, prompt_logprobs=0)
    sim.run()
    assert rows_of(sim, 3)[:5] == [1] * 5
    assert sim.reason(asks) == LENGTH
    sim.check_idle()
