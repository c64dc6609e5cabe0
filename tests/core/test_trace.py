"""A recorded trace of the scheduler's inputs replays to the same decisions."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgspec

from penstock.core.actors.scheduler import Scheduler
from penstock.core.actors.trace import Recorder, dump, load, replay
from penstock.core.protocol.columns import enc_hook
from penstock.core.protocol.errors import PenstockError
from penstock.core.protocol.messages import Forward, KvStep, Park, Plan, Sample, StepTokens, Unpark
from penstock.plugins.policies.priority import PriorityWithAgeing


def record(make_sim: Callable[..., Any], **options: Any) -> tuple[Any, Callable[[Any], Scheduler]]:
    sim = make_sim(policy=PriorityWithAgeing(0.05), depth=2, num_blocks=8, max_num_seqs=3, **options)

    def make(clock: Any) -> Scheduler:
        return Scheduler(sim.settings, PriorityWithAgeing(0.05), clock)

    recorder = Recorder(make, sim.clock)
    sim.scheduler = recorder
    dice = random.Random(7)
    for i in range(60):
        key = sim.admit(
            [3] * dice.randint(1, 9) + [i % 5],
            max_tokens=dice.randint(1, 12),
            n=dice.choice([1, 1, 3]),
            priority=dice.randint(0, 3),
            temperature=1.0,
            seed=i,
            eos=[7, 11],
        )
        sim.finish(dice.randint(0, 2))
        if i % 7 == 3:
            sim.post(Park(key=key))
            sim.finish(2)
            sim.abort(key << 7)
            sim.post(Unpark(key=key))
    sim.run()
    sim.scheduler = recorder.actor
    sim.check_idle()
    return recorder, make


def test_a_trace_replays_to_the_same_decisions(make_sim: Callable[..., Any]) -> None:
    recorder, make = record(make_sim)
    kinds = {type(m) for h in recorder.trace for m in h.said}
    assert {Forward, Sample, StepTokens, Plan, KvStep} <= kinds
    assert max(m.stats.preemptions for h in recorder.trace for m in h.said if isinstance(m, StepTokens)) > 0
    said = replay(make, recorder.trace)
    assert dump_said(said) == dump_said([h.said for h in recorder.trace])


def test_a_trace_survives_bytes(make_sim: Callable[..., Any]) -> None:
    recorder, make = record(make_sim)
    loaded = load(dump(recorder.trace))
    assert len(loaded) == len(recorder.trace)
    assert dump_said(replay(make, loaded)) == dump_said([h.said for h in recorder.trace])


def test_another_actor_says_something_else(make_sim: Callable[..., Any]) -> None:
    """The comparison has teeth: with half the slots the decisions differ."""
    recorder, _ = record(make_sim)
    sim = make_sim(max_num_seqs=1, depth=2, num_blocks=8)
    try:
        said = replay(lambda clock: Scheduler(sim.settings, PriorityWithAgeing(0.05), clock), recorder.trace)
    except (PenstockError, IndexError, ValueError, KeyError):
        return  # the recorded results do not even fit its steps
    assert dump_said(said) != dump_said([h.said for h in recorder.trace])


def dump_said(said: list[list[Any]]) -> list[list[bytes]]:
    encoder = msgspec.msgpack.Encoder(enc_hook=enc_hook)
    return [[encoder.encode(m) for m in mine] for mine in said]
