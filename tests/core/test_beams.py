"""Beam searches in the scheduler, with the KV manager and the fake device: what they say, what they cost, and what becomes of them when memory runs
out, somebody cancels, or the engine dies. The simulation compares every hypothesis with a search over histories that are computed one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from penstock.core.protocol.messages import ABORTED, FAILED, LENGTH, STOP
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
