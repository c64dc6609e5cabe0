"""The built-in scheduling policies: their keys, and the door through which they come in."""

from __future__ import annotations

import numpy as np
import pytest

from penstock.core.actors.scheduler.waiting import Entry, Request, Sequence, WaitingRoom
from penstock.core.contract.hookspecs import SchedulePolicySpec
from penstock.core.contract.policy import Running, SchedulePolicy, Waiting
from penstock.core.protocol.columns import EMPTY_I32, f32, i32, i64
from penstock.core.protocol.config import OPTIONS, Config
from penstock.core.protocol.messages import Admit
from penstock.core.protocol.sampling import SamplingParams
from penstock.plugins import policies
from penstock.plugins.policies.fcfs import FirstComeFirstServed
from penstock.plugins.policies.priority import PriorityWithAgeing


def waiting(arrival: list[int], priority: list[int], waited: list[float]) -> Waiting:
    ones = i32([1] * len(arrival))
    return Waiting(arrival_ns=i64(arrival), priority=i32(priority), waited_s=f32(waited), prompt_tokens=ones, cached_tokens=ones)


def running(arrival: list[int], priority: list[int]) -> Running:
    ones = i32([1] * len(arrival))
    return Running(arrival_ns=i64(arrival), priority=i32(priority), computed_tokens=ones, output_tokens=ones, blocks=ones)


def test_fcfs_is_arrival() -> None:
    policy: SchedulePolicy = FirstComeFirstServed()
    assert policy.order(waiting([3, 1, 2], [0, 9, 9], [0, 0, 0])).tolist() == [3, 1, 2]
    assert policy.victims(running([3, 1, 2], [0, 9, 9])).argmax() == 0


def test_priority_is_the_lower_number_first_and_ages() -> None:
    policy: SchedulePolicy = PriorityWithAgeing(10.0)
    keys = policy.order(waiting([1, 2, 3], [2, 0, 1], [25.0, 0.0, 5.0]))
    assert keys.tolist() == pytest.approx([-0.5, 0.0, 0.5])
    assert policy.victims(running([1, 2], [0, 5])).argmax() == 1
    assert PriorityWithAgeing(0.0).order(waiting([1, 2], [1, 0], [1e9, 0.0])).tolist() == [1, 0]


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf")])
def test_priority_refuses_a_nonsensical_ageing(wrong: float) -> None:
    with pytest.raises(ValueError, match="priority_ageing_s"):
        PriorityWithAgeing(wrong)


def test_they_are_registered_and_their_options_exist() -> None:
    specs = policies.register_schedule_policies()
    assert [s.name for s in specs] == ["fcfs", "priority"]
    for spec in specs:
        assert isinstance(spec, SchedulePolicySpec)
        assert spec.doc
        assert set(spec.options) <= set(OPTIONS)
        policy = spec.factory(**{name: getattr(Config(), name) for name in spec.options})
        assert policy.name == spec.name
        assert spec.factory().name == spec.name


def entry(key: int, arrival: int, priority: int = 0) -> Entry:
    admit = Admit(
        key=key,
        incarnation=0,
        prompt=i32([1, 2]),
        hashes=b"",
        root_hash=b"",
        choices=i32([0]),
        sampling=SamplingParams(),
        max_tokens=3,
        eos=EMPTY_I32,
        priority=priority,
        arrival_ns=arrival,
    )
    return Entry([Sequence(Request(admit, 0, 5, b""), 0, EMPTY_I32)], admit.prompt, b"")


def test_the_waiting_room_keeps_order_over_many_comings_and_goings() -> None:
    room = WaitingRoom(FirstComeFirstServed())
    dice = np.random.default_rng(1)
    arrivals = dice.permutation(300).tolist()
    entries = [entry(i, a + 1) for i, a in enumerate(arrivals)]
    for e in entries:
        room.add(e)
    gone = set(dice.choice(300, 120, replace=False).tolist())
    for i in gone:
        room.remove(entries[i])
    assert len(room) == room.sequences == 180
    left = [e.request.arrival_ns for e in room.ordered(10**9)]
    assert left == sorted(a + 1 for i, a in enumerate(arrivals) if i not in gone)


def test_ties_fall_to_arrival_then_to_the_sequence() -> None:
    room = WaitingRoom(PriorityWithAgeing(0.0))
    for key, arrival, priority in ((5, 7, 1), (4, 7, 1), (3, 2, 1), (9, 9, 0)):
        room.add(entry(key, arrival, priority))
    assert [e.request.key for e in room.ordered(10)] == [9, 3, 4, 5]
