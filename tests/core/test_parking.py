"""Requests that are parked give their memory up after a while, and say the same as if they had never been.

The simulation compares every token with what the sequence says when it is computed alone, and the KV manager's books after every step. Time is the
fake clock's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

sys.path.insert(0, str(Path(__file__).parent))  # for grammar_kit.py: pytest's importlib mode does not

from penstock.core.actors.kv import KvManager
from penstock.core.contract.fake_device import FakeDevice, FakeOptions
from penstock.core.contract.host import PluginHost
from penstock.core.processes import engine as engine_module
from penstock.core.processes.engine import Engine
from penstock.core.protocol.columns import i32
from penstock.core.protocol.config import build
from penstock.core.protocol.messages import LENGTH, Admit, Park, Plan, StepTokens, Unpark, Vocabulary, seq_of
from penstock.core.protocol.sampling import Beam, SamplingParams
from penstock.plugins.policies.fcfs import FirstComeFirstServed

Make = Callable[..., Any]
VOCAB = 61


def held(sim: Any) -> int:
    return int(sim.kv.counts()[2])


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("caching", [True, False])
def test_who_is_parked_for_long_gives_up_slot_and_blocks_and_goes_on_where_it_was(make_sim: Make, depth: int, caching: bool) -> None:
    sim = make_sim(depth=depth, enable_prefix_caching=caching, park_kv_s=5.0)
    other = sim.admit([7], max_tokens=30)
    sim.finish(2)
    slow = sim.admit([1, 2, 3, 4, 5, 6], max_tokens=20)
    sim.finish(3 + depth)
    sim.post(Park(key=slow))
    sim.finish(2 * depth)
    said = len(sim.output(slow))
    assert sim.kv.blocks_of(slow << 7), "not at once"
    sim.clock.advance(5.0)
    sim.finish(2)
    assert not sim.kv.blocks_of(slow << 7)
    assert held(sim) == len(sim.kv.blocks_of(other << 7))
    assert sim.kv.check() == []
    assert 0 < said == len(sim.output(slow))
    sim.run()
    assert sim.reason(other) == LENGTH
    sim.post(Unpark(key=slow))
    sim.run()
    assert sim.reason(slow) == LENGTH
    sim.check_idle()


def test_where_nothing_runs_a_plan_is_all_it_takes(make_sim: Make) -> None:
    """And text hears of it, so that the gauges do not stand still."""
    sim = make_sim(park_kv_s=5.0)
    slow = sim.admit([1, 2, 3, 4, 5], max_tokens=20)
    sim.finish(2)
    sim.post(Park(key=slow))
    sim.run()
    assert sim.scheduler.parks_until_ns is not None
    sim.clock.advance(4.9)
    sim.post(Plan())
    assert held(sim) > 0
    sim.clock.advance(0.2)
    assert sim.scheduler.parks_until_ns < sim.clock.now_ns()
    sim.post(Plan())
    assert held(sim) == 0
    assert sim.scheduler.parks_until_ns is None
    assert sim.sent[-1].stats.blocks_used == 0
    assert sim.sent[-1].preempted_seqs.tolist() == [slow << 7]
    sim.post(Unpark(key=slow))
    sim.run()
    assert sim.reason(slow) == LENGTH
    sim.check_idle()


def test_its_slot_is_somebody_elses(make_sim: Make) -> None:
    sim = make_sim(max_num_seqs=1, park_kv_s=1.0)
    slow = sim.admit([1, 2, 3], max_tokens=20)
    sim.finish(3)
    sim.post(Park(key=slow))
    sim.run()
    sim.clock.advance(1.0)
    sim.post(Plan())
    assert sim.scheduler.leftovers().get("slots", 0) == 0
    quick = sim.admit([9], max_tokens=4)
    sim.run()
    assert sim.reason(quick) == LENGTH
    sim.post(Unpark(key=slow))
    sim.run()
    sim.check_idle()


def test_time_counts_from_the_last_park(make_sim: Make) -> None:
    sim = make_sim(park_kv_s=5.0)
    slow = sim.admit([1, 2, 3], max_tokens=20)
    sim.finish(2)
    for _ in range(3):
        sim.post(Park(key=slow))
        sim.run()
        sim.clock.advance(3.0)
        sim.post(Plan())
        assert sim.kv.blocks_of(slow << 7)
        sim.post(Unpark(key=slow))
        sim.finish()
    sim.run()
    assert not any(sent.preempted_seqs.size for sent in sim.sent)
    sim.check_idle()


@pytest.mark.parametrize("steps", range(6))
def test_choices_and_prompts_in_the_middle_of_being_computed(make_sim: Make, steps: int) -> None:
    """At once (0 seconds), whatever is in flight: chunks of the prompt, forks, first tokens."""
    sim = make_sim(depth=2, max_num_batched_tokens=4, park_kv_s=0.0)
    slow = sim.admit(list(range(1, 11)), max_tokens=6, n=3)
    other = sim.admit([7], max_tokens=20)
    sim.finish(steps)
    sim.post(Park(key=slow))
    sim.run()
    assert sim.reason(other) == LENGTH
    sim.post(Plan())
    assert held(sim) == 0
    sim.post(Unpark(key=slow))
    sim.run()
    assert [sim.reason(slow, choice) for choice in range(3)] == [LENGTH] * 3
    sim.check_idle()


def test_who_leaves_while_it_is_parked_leaves_nothing(make_sim: Make) -> None:
    sim = make_sim(depth=2, park_kv_s=5.0)
    keys = [sim.admit([key] * 5, max_tokens=20) for key in (1, 2)]
    sim.finish(3)
    sim.post(*(Park(key=key) for key in keys))
    sim.abort(seq_of(keys[0], 0))  # before its time
    sim.run()
    sim.clock.advance(9.0)
    sim.post(Plan())
    sim.abort(seq_of(keys[1], 0))  # after it
    sim.run()
    sim.check_idle()


def test_a_search_with_beams_is_not_parked(make_sim: Make) -> None:
    """It says nothing before it is over: there is nothing that its client could be late for."""
    sim = make_sim(beams=True, park_kv_s=0.0)
    key = sim.admit([1, 2, 3], max_tokens=6, n=2, beam=Beam(width=2))
    sim.finish(2)
    sim.post(Park(key=key))
    assert sim.scheduler.parks_until_ns is None
    sim.run()
    assert sim.reason(key) is not None
    sim.check_idle()


def test_who_is_not_parked_costs_a_plan_nothing(make_sim: Make) -> None:
    """The clock is not even read."""
    sim = make_sim()
    sim.admit([1, 2, 3], max_tokens=20)
    sim.finish(3)
    read: list[int] = []
    now = sim.clock.now_ns

    def now_ns() -> int:
        read.append(1)
        return int(now())

    sim.clock.now_ns = now_ns
    sim.finish(3)
    assert read == []


# ------------------------------------------------------------------ the whole engine


def test_an_idle_engine_sees_to_it_and_a_grammar_is_obeyed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing runs, so nothing but the engine's own look at the clock can make the parked one give up. Its place in the grammar it keeps."""
    monkeypatch.setattr(engine_module, "PARKS_S", 0.002)
    heard: list[StepTokens] = []
    request = Admit(
        key=1, incarnation=1, prompt=i32([1, 2, 3]), hashes=b"", root_hash=b"r" * 16, choices=i32([0]),
        sampling=SamplingParams(temperature=1.0, seed=1), max_tokens=40, eos=i32([2]), grammar=b"[20,30,24]",
    )  # fmt: skip

    async def main() -> None:
        plugins = PluginHost("engine", extra=["grammar_kit"]).load()
        config = build({"max_num_seqs": 2, "block_size": 4, "park_kv_s": 0.01})
        device = FakeDevice(FakeOptions(vocab_size=VOCAB, depth=2, step_s=0.002))
        engine = Engine(config, output=lambda m: heard.append(m) if isinstance(m, StepTokens) else None,
                        device=device, policy=FirstComeFirstServed(), plugins=plugins)  # fmt: skip
        try:
            async with trio.open_nursery() as nursery:
                await engine.start(nursery)
                assert engine.host is not None
                engine.post(Vocabulary(data=b"x" * VOCAB, counts=i32([1] * VOCAB)), request)
                with trio.fail_after(20):
                    while sum(sent.tokens.size for sent in heard) < 6:
                        await trio.sleep(0.001)
                    engine.post(Park(key=1))
                    kv = engine.host._actors["kv"]
                    assert isinstance(kv, KvManager)
                    while kv.counts()[2]:
                        await trio.sleep(0.001)
                    assert kv.check() == []
                    assert heard[-1].stats.blocks_used == 0
                    engine.post(Unpark(key=1))
                    while not any(sent.reasons.any() for sent in heard):
                        await trio.sleep(0.001)
                nursery.cancel_scope.cancel()
        finally:
            engine.close()

    trio.run(main)
    tokens = [token for sent in heard for token in sent.tokens.tolist() if token >= 0]
    assert len(tokens) == 25
    assert all(20 <= token < 30 for token in tokens[:24])
    assert tokens[24] == 2
    assert [seq for sent in heard for seq in sent.preempted_seqs.tolist()] == [seq_of(1, 0)]
