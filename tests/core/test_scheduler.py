"""The scheduler with the KV manager and the fake device: what it must do, case by case."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def test_one_request_runs_alone(make_sim: Callable[..., Any]) -> None:
    sim = make_sim()
    key = sim.admit([1, 2, 3, 4, 5, 6, 7], max_tokens=5)
    assert sim.run() == 5
    assert sim.output(key) == sim.expected(key << 7)
    assert len(sim.output(key)) == 5
    assert sim.reason(key) == 2
    sim.check_idle()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_many(make_sim: Callable[..., Any], depth: int) -> None:
    sim = make_sim(depth=depth)
    for i in range(20):
        sim.admit([i % 3 + 1] * (i % 9 + 1) + [i], max_tokens=3 + i % 11, eos=[7], post=False)
    sim.run() if sim.flying else sim.drain()
    sim.run()
    sim.check_idle()
