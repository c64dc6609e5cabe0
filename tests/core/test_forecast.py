"""The forecast of memory: against counting token by token, with the scheduler, and what it learns of answers that end by themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from penstock.core.actors.scheduler.forecast import Forecast, Outlook
from penstock.core.protocol.messages import LENGTH, Park, Unpark

Make = Callable[..., Any]


def counted(held: list[int], left: list[int], block: int) -> int:
    """The most tokens in blocks at any time, one token after the other; who is at the end holds its blocks until then."""
    most = 0
    for time in range(max(left) + 1):
        grown = [-(-time // block) * block + mine for mine, more in zip(held, left, strict=True) if time <= more]
        most = max(most, sum(grown))
    return most


@pytest.mark.parametrize("block", [1, 16])
def test_the_most_is_what_counting_says(block: int) -> None:
    rng = np.random.default_rng(block)
    for _ in range(50):
        count = int(rng.integers(1, 9))
        held, left = rng.integers(0, 9, count) * block, rng.integers(0, 60, count)
        outlook = Outlook(Forecast(), 0, block, held.astype(np.float64), left.astype(np.float64))
        assert outlook.most() == counted(held.tolist(), left.tolist(), block)


def test_who_waits_is_counted_with_all_before_it() -> None:
    outlook = Outlook(Forecast(), 100, 1, np.zeros(0), np.zeros(0))
    assert outlook.admits(90, 90, 200, stops=False), "alone it always may"
    outlook = Outlook(Forecast(), 100, 1, np.zeros(0), np.zeros(0))
    assert outlook.admits(20, 20, 50, stops=False)
    assert outlook.admits(20, 20, 50, stops=False), "together they have 100 at last"
    assert not outlook.admits(20, 20, 50, stops=False)


def test_choices_share_their_prompt_and_grow_apart() -> None:
    outlook = Outlook(Forecast(), 50, 1, np.ones(1), np.ones(1))
    assert outlook.admits(10, 10, 20, stops=False, choices=4)
    outlook = Outlook(Forecast(), 49, 1, np.ones(1), np.ones(1))
    assert not outlook.admits(10, 10, 20, stops=False, choices=4)


def test_what_the_cache_has_needs_no_room() -> None:
    outlook = Outlook(Forecast(), 40, 1, np.ones(1), np.ones(1))
    assert outlook.admits(1000, 20, 1020, stops=False)
    assert not outlook.admits(1000, 20, 1020, stops=False)


def test_lengths_are_learned_from_stops_and_from_who_still_runs() -> None:
    forecast = Forecast()
    slots = np.arange(1000)
    most, stops = np.full(1000, 1e9), np.ones(1000, bool)
    assert np.mean(forecast.left(most, stops, slots)) == pytest.approx(512, rel=0.1)
    for _ in range(2000):
        forecast.drew(50)
        forecast.stopped()
    assert np.mean(forecast.left(most, stops, slots)) == pytest.approx(50, rel=0.1)
    assert (forecast.left(most, ~stops, slots) == 1e9).all(), "nothing stops these"
    assert forecast.left(most / 1e9, stops, slots).max() == 1, "nobody goes beyond its limit"
    for _ in range(2000):  # another kind of answers
        forecast.drew(500)
        forecast.stopped()
    assert np.mean(forecast.left(most, stops, slots)) == pytest.approx(500, rel=0.2)
    burst = Forecast()
    burst.drew(20 * 1000)
    for _ in range(10):
        burst.stopped()  # the shortest of a thousand answers, after 20 steps
    assert np.mean(burst.left(most, stops, slots)) > 1000


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("caching", [True, False])
def test_where_lengths_are_known_nobody_is_preempted(make_sim: Make, depth: int, caching: bool) -> None:
    def run(forecasts: bool) -> Any:
        sim = make_sim(
            depth=depth, num_blocks=24, max_num_seqs=12, max_num_batched_tokens=16, enable_prefix_caching=caching, forecasts=forecasts
        )
        keys = [sim.admit([i + 1] * (5 + i % 3), max_tokens=9 + 3 * (i % 4), temperature=1.0, post=False) for i in range(12)]
        sim.drain()
        sim.run()
        assert all(sim.reason(key) == LENGTH for key in keys)
        sim.check_idle()
        return sim

    with_it, without = run(True), run(False)
    assert with_it.sent[-1].stats.preemptions == 0
    assert without.sent[-1].stats.preemptions > 0
    assert max(f.num_decode for f in with_it.forwards) > 2, "and several run at once"


def test_who_outgrows_the_pool_runs_alone(make_sim: Make) -> None:
    sim = make_sim(num_blocks=8, max_num_seqs=4, max_model_len=200, forecasts=True)
    keys = [sim.admit([i + 1] * 5, max_tokens=190) for i in range(3)]
    sim.run()
    assert all(sim.reason(key) == LENGTH for key in keys)
    assert sim.sent[-1].stats.preemptions == 0
    sim.check_idle()


def test_the_parked_do_not_hold_the_others_up(make_sim: Make) -> None:
    sim = make_sim(num_blocks=8, max_num_seqs=4, forecasts=True)
    first = sim.admit([1] * 5, max_tokens=20)
    sim.post(Park(key=first))
    other = sim.admit([2] * 5, max_tokens=20)
    sim.run()
    assert sim.reason(other) == LENGTH
    sim.post(Unpark(key=first))
    sim.run()
    assert sim.reason(first) == LENGTH
    sim.check_idle()


def test_answers_that_end_early_let_more_in(make_sim: Make) -> None:
    def together(learned: bool) -> int:
        sim = make_sim(num_blocks=40, max_num_seqs=12, max_model_len=200, forecasts=True)
        if learned:
            for _ in range(3000):
                sim.scheduler._board.forecast.drew(4)
                sim.scheduler._board.forecast.stopped()
        for i in range(12):
            sim.admit([i + 1] * 5, max_tokens=150, eos=[2, 3, 5, 7, 11, 13], post=False)
        sim.drain()
        sim.run()
        sim.check_idle()
        return max(len(f.slots) for f in sim.forwards)

    assert together(True) > together(False)
