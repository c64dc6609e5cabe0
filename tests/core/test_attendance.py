"""Whom drafters look at: everybody until it is learned what drafts bring, hardly anybody while they bring nothing, and everybody again once they pay.

The simulation compares every token with what the sequence says when it is computed alone, and its device gives no drafts to those that are not read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from penstock.core.actors.scheduler import attendance
from penstock.core.actors.scheduler.widths import Widths
from penstock.core.protocol.messages import Forward, Sample
from penstock.core.runtime.clock import FakeClock

Make = Callable[..., Any]
TOKENS, STATES = 1, 2
ROOM = {"max_model_len": 200, "num_blocks": 400, "max_num_batched_tokens": 64}


def heavy(forward: Forward, sample: Sample) -> float:
    """Seconds of a step in which every token weighs, and every draft that is made."""
    return 0.001 * int(forward.counts.sum()) + 0.0005 * sample.drafts


def light(forward: Forward, sample: Sample) -> float:
    """Of one that takes as long whatever its tokens."""
    return 0.001 + 0.00001 * int(forward.counts.sum()) + 0.00005 * sample.drafts


def unread(sim: Any, since: int = 0) -> list[bool]:
    """Of each sequence that entered a slot since that step: is it not read?"""
    found: list[bool] = []
    for forward in sim.forwards[since:]:
        found += [flag > 0 for flag in forward.place_unread] if forward.place_unread.size else [False] * forward.place_slots.size
    return found


def answers(sim: Any, count: int, first: int = 0, **more: Any) -> None:
    """So many requests one after the other, none like another."""
    for n in range(first, first + count):
        sim.admit([1 + n % 50, 1 + n // 50, 3], max_tokens=40, **more)
        sim.run()


def wide(sim: Any, since: int) -> float:
    """The share of steps with drafts."""
    return sum(forward.lookahead > 0 for forward in sim.forwards[since:]) / max(1, len(sim.forwards) - since)


@pytest.mark.parametrize("reads", [TOKENS, STATES])
def test_while_drafts_bring_nothing_hardly_anybody_is_read(reads: int, make_sim: Make) -> None:
    sim = make_sim(lookahead=3, drafts=("wrong",), reads=(reads,), cost=heavy, **ROOM)
    answers(sim, 1)
    assert unread(sim) == [False], "nothing was known yet"
    answers(sim, 30, 1)
    learned = len(sim.forwards)
    answers(sim, 200, 31)
    later = unread(sim, learned)
    assert len(later) == 200
    read = later.count(False)
    assert read == 0 if reads == TOKENS else 0 < read <= 20, "trials go on, if only now and then"
    assert wide(sim, learned) < 0.02
    assert sim.scheduler._board.slots.num_unread == 0
    sim.check_idle()


@pytest.mark.parametrize("reads", [TOKENS, STATES])
def test_everybody_is_read_again_once_drafts_pay(reads: int, make_sim: Make) -> None:
    sim = make_sim(lookahead=3, drafts=("wrong",), reads=(reads,), cost=heavy, **ROOM)
    answers(sim, 60)
    sim.cost = light
    sim.runner._options = sim.runner._options.__class__(lookahead=3, drafts=("right",), reads=(reads,), vocab_size=61)
    answers(sim, 300, 60)
    since = len(sim.forwards)
    answers(sim, 20, 360)
    assert unread(sim, since) == [False] * 20
    assert wide(sim, since) > 0.5
    sim.check_idle()


def test_who_is_not_read_has_no_drafts_and_says_the_same(make_sim: Make) -> None:
    """Some are read and some not, in one step."""
    sim = make_sim(lookahead=3, drafts=("right",), reads=(STATES,), idle=lambda: True, **ROOM)
    keys = [sim.admit([n, 2, 3], max_tokens=30) for n in range(4)]
    sim.finish(4)
    forward = sim.flying[0][0]
    assert unread(sim) == [False, True, False, True], "for a trial half of them are enough"
    assert forward.counts.tolist() == [4, 1, 4, 1]
    sim.run()
    assert [len(sim.output(key)) for key in keys] == [30] * 4
    assert sim.scheduler._board.drafting.watches[0].rate == 1.0
    sim.check_idle()


def test_a_request_s_own_wish_counts_more(make_sim: Make) -> None:
    sim = make_sim(lookahead=3, drafts=("right",), reads=(STATES,), idle=lambda: True, choose=lambda rows: 0, **ROOM)
    for wish in (False, True, None):
        sim.admit([1, 2, 3], max_tokens=12, spec_decode=wish)
        sim.run()
    assert unread(sim) == [True, False, False], "the last one is for a trial"
    choices = sim.admit([4, 2, 3], max_tokens=12, n=3, spec_decode=False)
    sim.run()
    assert unread(sim)[3:] == [True] * 3, "choices share a prompt, and what was read of it"
    assert len(sim.output(choices, 2)) == 12
    sim.check_idle()


def test_a_trial_s_prompt_is_computed_whole(make_sim: Make) -> None:
    """What the cache has of it was perhaps computed while nobody read."""
    idle = True
    sim = make_sim(lookahead=3, drafts=("right",), reads=(STATES,), idle=lambda: idle, choose=lambda rows: 0, **ROOM)
    prompt = list(range(1, 13))
    for trial, computed in ((True, 12), (True, 12), (False, 4)):
        idle, since = trial, len(sim.forwards)
        sim.admit(prompt, max_tokens=2)
        sim.run()
        assert int(sim.forwards[since].counts.sum()) == computed
    sim.check_idle()


def test_what_is_read_late_is_bounded(make_sim: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attendance, "SHORT", 20)
    monkeypatch.setattr(attendance, "AT_ONCE", 24)
    width = 0
    sim = make_sim(lookahead=2, drafts=("right",), reads=(TOKENS,), idle=lambda: True, choose=lambda rows: width, **ROOM)
    short = [sim.admit([n] * 9, max_tokens=50) for n in range(3)]
    sim.admit([9] * 40, max_tokens=12)
    sim.finish(5)
    assert unread(sim) == [True] * 4
    assert sim.scheduler._board.slots.num_unread == 4
    width = 2
    sim.run()
    late = [forward for forward in sim.forwards if forward.read_slots.size]
    told_late = [forward.read_slots.tolist() for forward in late]
    assert told_late == [[1], [2], [0]], "the shortest first; two are too many at once, and the last has less to go than was read"
    told = {int(seq) for sent in sim.sent for seq in sent.drafted_seqs}
    assert told == {key << 7 for key in short}
    sim.check_idle()


def test_reading_late_is_paid_for() -> None:
    """Whole, where a step that took so long for another reason would count as a hiccup; and until that is earned back there are no drafts."""

    def after(whole: bool) -> Widths:
        widths = Widths(range(1, 4), 1 << 20, FakeClock())
        for _ in range(6):
            widths.timed(1, 0, 1_000_000)
        assert not widths.idle
        widths.timed(1, 2, 60_000_000, steady=False, whole=whole)
        return widths

    assert not after(False).idle
    spent = after(True)
    assert spent.idle
    assert spent.choose(1) == 0
    assert spent.rest == 256, "and nobody looks for as long"


def test_a_drafter_that_is_off_reads_nobody(make_sim: Make) -> None:
    sim = make_sim(lookahead=4, max_num_seqs=8, drafts=("wrong",), reads=(STATES,), drafters=("bad",), **ROOM)
    for n in range(8):
        sim.admit([n, 2, 3], max_tokens=90)
    while not sim.scheduler._board.drafting._off:
        assert sim.finish()
    sim.run()
    assert unread(sim) == [False] * 8
    sim.admit([1, 2, 4], max_tokens=20)
    sim.finish(2)
    assert unread(sim)[8:] == [True]
    assert sim.scheduler._board.stats(0).speculation.reasons[0], "why is told as ever"
    sim.run()
    sim.check_idle()


def test_others_have_drafts_for_those_who_are_not_read(make_sim: Make) -> None:
    sim = make_sim(lookahead=3, drafts=("wrong", "right"), reads=(STATES, 0), drafters=("a", "b"), idle=lambda: True, **ROOM)
    for n in range(4):
        sim.admit([n, 2, 3], max_tokens=24)
    sim.run()
    assert [round(watch.rate, 1) for watch in sim.scheduler._board.drafting.watches] == [0.0, 1.0]
    sim.check_idle()


@pytest.mark.parametrize("kind", ["right", "fair"])
@pytest.mark.parametrize("depth", [1, 2])
def test_preempted_and_aborted_sequences_leave_nothing_unread(depth: int, kind: str, make_sim: Make) -> None:
    moods = iter([True, False, True] * 400)
    sim = make_sim(
        lookahead=4,
        depth=depth,
        loose=depth > 1,
        drafts=(kind,),
        reads=(TOKENS,),
        idle=lambda: next(moods),
        num_blocks=14,
        max_model_len=40,
    )
    keys = [sim.admit([n, 2, 3], max_tokens=24) for n in range(6)]
    sim.finish(8)
    sim.abort(keys[1] << 7)
    sim.run()
    assert sim.scheduler._board.preemptions
    assert sim.scheduler._board.slots.num_unread == 0
    sim.check_idle()
