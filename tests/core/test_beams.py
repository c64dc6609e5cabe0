"""Beam searches in the scheduler, with the KV manager and the fake device: what they say, what they cost, and what becomes of them when memory runs
out, somebody cancels, or the engine dies. The simulation compares every hypothesis with a search over histories that are computed one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from penstock.core.contract.devices import refuse_columns
from penstock.core.protocol.errors import UnsupportedFeature
from penstock.core.protocol.messages import ABORTED, FAILED, LENGTH, STOP, Forward, Park, seq_of
from penstock.core.protocol.sampling import Beam

Make = Callable[..., Any]
ENDS = list(range(0, 60, 7))


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("size", [1, 3, 4, 5, 8, 11])
def test_hypotheses_are_those_of_a_search_by_itself(size: int, width: int, depth: int, make_sim: Make) -> None:
    sim = make_sim(depth=depth)
    key = sim.admit(list(range(1, size + 1)), max_tokens=13, n=width, beam=Beam(width=width))
    sim.run()
    assert [sim.reason(key, c) for c in range(width)] == [LENGTH] * width
    assert len({tuple(sim.output(key, c)) for c in range(width)}) == width
    sim.check_idle()


@pytest.mark.parametrize("early", [True, False, "never"])
@pytest.mark.parametrize("penalty", [-1.0, 0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("minimum", [0, 4])
def test_ends(penalty: float, early: Any, minimum: int, make_sim: Make) -> None:
    sim = make_sim(depth=2)
    reasons = set()
    for seed in range(6):
        beam = Beam(width=4, length_penalty=penalty, early_stopping=early)
        key = sim.admit([seed, 2, 3], max_tokens=12, n=2, beam=beam, eos=ENDS, min_tokens=minimum, stop_token_ids=[1])
        sim.run()
        reasons |= {sim.reason(key, c) for c in range(2)}
        assert min(len(sim.output(key, c)) for c in range(2)) > minimum
    assert STOP in reasons
    sim.check_idle()


def branches(sim: Any) -> int:
    """Beams that went on in another one's slot."""
    return sum(int(np.isin(asked.fork_dst, seen).sum()) for at, asked in enumerate(sim.asked) for seen in [_forked(sim, at)])


def _forked(sim: Any, before: int) -> list[int]:
    return [seq for asked in sim.asked[:before] for seq in asked.fork_dst.tolist()] + [seq for seq in sim.ledgers if seq % 128 == 0]


def test_beams_branch_by_sharing_blocks_and_writing_tokens(make_sim: Make) -> None:
    sim = make_sim(num_blocks=400, max_model_len=400)
    sim.admit(list(range(50)) * 3, max_tokens=60, n=4, beam=Beam(width=4, length_penalty=0.0))
    sim.run()
    assert branches(sim) > 10
    assert sum(f.place_tokens.size for f in sim.forwards) == 4 * 150, "no history is sent again"
    assert max(f.write_tokens.size for f in sim.forwards) < 4 * 60
    assert max(g.copy_dst.size for g in sim.grants) <= 4
    sim.check_idle()


def test_four_beams_of_a_long_prompt_hold_little_more_than_one(make_sim: Make) -> None:
    def blocks(**params: Any) -> int:
        sim = make_sim(num_blocks=400, block_size=16, max_model_len=1100, max_num_batched_tokens=256)
        sim.admit([n % 61 for n in range(1003)], max_tokens=12, **params)
        sim.run()
        return max(grant.total_blocks - grant.free_blocks - grant.cached_blocks for grant in sim.grants)

    alone, four = blocks(), blocks(n=4, beam=Beam(width=4))
    assert (alone, four) == (64, 70)
    assert four < 1.1 * alone


def test_nothing_is_told_before_the_end(make_sim: Make) -> None:
    sim = make_sim()
    key = sim.admit([1, 2, 3], max_tokens=9, n=2, beam=Beam(width=3))
    sim.run()
    told = [sent for sent in sim.sent if sent.tokens.size]
    assert len(told) == 1
    assert sorted(set(told[0].seqs.tolist())) == [seq_of(key, 0), seq_of(key, 1)], "the third is nobody's"


def test_beams_wait_for_their_step_and_others_do_not(make_sim: Make) -> None:
    sim = make_sim(depth=2, max_num_seqs=6)
    sim.admit([1, 2, 3], max_tokens=20, n=4, beam=Beam(width=4))
    sim.finish(3)
    sim.admit([4, 5], max_tokens=20)
    sim.finish(2)
    for forward in sim.forwards:
        assert forward.slots.size in (1, 2, 4, 5), "all beams or none"
    assert len(sim.flying) == 2, "another sequence is in two steps at once"
    sim.run()
    sim.check_idle()


def test_log_probabilities_are_those_of_the_hypothesis(make_sim: Make) -> None:
    sim = make_sim()
    key = sim.admit([1, 2, 3, 4], max_tokens=7, n=3, beam=Beam(width=4), logprobs=2)
    beside = sim.admit([3, 4], max_tokens=7, logprobs=1)
    sim.run()
    (sent,) = [sent for sent in sim.sent if seq_of(key, 0) in sent.seqs.tolist()]
    found = sent.logprobs
    firsts = np.cumsum(found.counts) - found.counts
    assert found.ids[firsts].tolist() == sent.tokens[found.rows].tolist()
    mine = [row for row in found.rows.tolist() if sent.seqs[row] >> 7 == key]
    assert len(mine) == 3 * 7
    assert found.positions.tolist()[-7:] == list(range(4, 11))
    assert set(found.counts.tolist()) <= {2, 3}
    for at, row in enumerate(found.rows.tolist()):
        if sent.seqs[row] >> 7 == key:
            values = found.values[firsts[at] : firsts[at] + 3]
            assert values[1] >= values[2]
            assert values[0] == values[0 if found.ranks[at] > 2 else int(found.ranks[at])]
    assert len(sim.output(beside)) == 7


def test_a_group_starts_when_there_is_a_slot_for_each_beam(make_sim: Make) -> None:
    sim = make_sim(max_num_seqs=4)
    first = sim.admit([1, 2], max_tokens=6)
    late = sim.admit([1, 2, 3], max_tokens=5, beam=Beam(width=4))
    behind = sim.admit([2, 2], max_tokens=3)
    sim.finish(3)
    assert sim.scheduler.leftovers()["slots"] == 1, "nobody overtakes"
    sim.run()
    assert [sim.reason(key) for key in (first, late, behind)] == [LENGTH] * 3
    sim.check_idle()


def test_want_of_memory_preempts_a_search_as_a_whole_and_it_begins_anew(make_sim: Make) -> None:
    sim = make_sim(max_num_seqs=8, num_blocks=22, block_size=4, depth=2)
    old = sim.admit([1] * 5, max_tokens=40)
    key = sim.admit([2] * 9, max_tokens=9, n=2, beam=Beam(width=4, length_penalty=0.0))
    also = sim.admit([3] * 6, max_tokens=10, beam=Beam(width=3))
    sim.run()
    assert [sim.reason(k) for k in (old, key, also)] == [LENGTH] * 3
    assert sim.sent[-1].stats.preemptions > 0
    assert {seq >> 7 for sent in sim.sent for seq in sent.preempted_seqs.tolist()} <= {key, also}
    sim.check_idle()


def test_aborting_one_answer_ends_the_search(make_sim: Make) -> None:
    for steps in range(5):
        sim = make_sim(depth=2, max_num_seqs=6)
        key = sim.admit([1, 2, 3], max_tokens=20, n=2, beam=Beam(width=4))
        sim.finish(steps)
        sim.abort(seq_of(key, 1))
        sim.run()
        assert [sim.reason(key, c) for c in range(2)] == [ABORTED] * 2
        sim.check_idle()


def test_a_row_that_is_not_a_number_fails_its_search_alone(make_sim: Make) -> None:
    sim = make_sim(max_num_seqs=8)
    key = sim.admit([1, 2, 3], max_tokens=20, n=2, beam=Beam(width=3))
    other = sim.admit([3, 2, 1], max_tokens=6, n=2, beam=Beam(width=2))
    sim.finish(3)
    sim.bad = lambda sample: [1]
    sim.finish()
    sim.bad = None
    sim.run()
    assert [sim.reason(key, c) for c in range(2)] == [FAILED] * 2
    assert [sim.reason(other, c) for c in range(2)] == [LENGTH] * 2
    sim.check_idle()


def test_a_slow_client_does_not_park_a_search(make_sim: Make) -> None:
    sim = make_sim()
    key = sim.admit([1, 2, 3], max_tokens=6, beam=Beam(width=3))
    sim.post(Park(key=key))
    sim.run()
    assert sim.reason(key) == LENGTH


def test_prefix_hits_and_chunks(make_sim: Make) -> None:
    sim = make_sim(max_num_batched_tokens=5)
    prompt = [n % 7 for n in range(22)]
    for _ in range(2):
        sim.admit(prompt, max_tokens=6, n=4, beam=Beam(width=4), prompt_logprobs=None)
        sim.run()
    assert sim.sent[-1].stats.prompt_cached == 20
    scored = sim.admit(prompt, max_tokens=1, n=2, beam=Beam(width=2), prompt_logprobs=1)
    sim.run()
    assert sim.ledgers[seq_of(scored, 0)].prompt_logprobs == list(range(1, 22))
    sim.check_idle()


@pytest.mark.parametrize(
    ("settings", "params", "words"),
    [
        ({"beams": False}, {}, "cannot search"),
        ({"max_num_seqs": 3}, {}, "does not fit the engine's 3"),
        ({"num_blocks": 8}, {"max_tokens": 12}, "may not hold 4 beams of 15"),
        ({"vocab": 6}, {"stop_token_ids": [0, 1, 2]}, "too small for 4 beams"),
    ],
)
def test_what_cannot_be_searched_is_refused(settings: dict[str, Any], params: dict[str, Any], words: str, make_sim: Make) -> None:
    sim = make_sim(**settings)
    key = sim.admit([1, 2, 3], **{"max_tokens": 6, "beam": Beam(width=4)} | params)
    sim.run()
    assert sim.reason(key) == FAILED
    assert words in sim.ledgers[seq_of(key, 0)].error
    sim.check_idle()


def test_nothing_is_paid_without_a_search(make_sim: Make) -> None:
    """A step without beams asks no more of numpy or Python than before: nothing of a group is ever looked at."""
    sim = make_sim(depth=2)
    beams = sim.scheduler._beams
    for name in ("pending", "moves", "moved", "writes", "whole", "land", "unaffordable"):
        setattr(beams, name, None)
    sim.admit([1, 2, 3], max_tokens=30, n=3)
    sim.admit([1, 2, 3], max_tokens=30)
    sim.run()
    sim.check_idle()


def test_a_runner_that_does_not_write_says_so() -> None:
    row = np.zeros(1, np.int32)
    work = Forward(engine=0, epoch=1, step=1, slots=row, starts=row, counts=row + 1, num_decode=1, write_slots=row)
    refuse_columns(work, writes=True)
    with pytest.raises(UnsupportedFeature, match="write_slots"):
        refuse_columns(work)
