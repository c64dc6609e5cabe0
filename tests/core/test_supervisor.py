"""The supervisor's decisions, with fake children and a fake clock."""

from __future__ import annotations

import signal
from typing import Any

import msgspec
import pytest

from penstock.core.processes.kernel import child_specs
from penstock.core.processes.supervisor import ChildSpec, Supervisor, failure_of
from penstock.core.protocol.config import build
from penstock.core.protocol.control import (
    ChildDown,
    ChildExited,
    ChildUp,
    Drain,
    Drained,
    EngineDown,
    EngineFacts,
    EngineUp,
    Heartbeat,
    KillChild,
    Leave,
    Notice,
    Ready,
    Signalled,
    StartChild,
    StartupPhase,
    Stop,
    Tick,
    Vitals,
)
from penstock.core.protocol.errors import CheckpointError, EngineUnavailable
from penstock.core.protocol.pools import PoolSpec
from penstock.core.runtime.actor import To
from penstock.core.runtime.clock import FakeClock

FACTS = EngineFacts(
    model="m",
    architecture="A",
    dtype="float32",
    device="fake",
    attention="fake",
    vocab_size=10,
    max_model_len=10,
    block_size=4,
    num_blocks=4,
    max_num_seqs=4,
    max_num_batched_tokens=4,
    deterministic=False,
    fingerprint="f",
    kv_layout="l",
    weights_bytes=1,
    workspace_bytes=1,
    kv_bytes=1,
    slack_bytes=1,
)
ENGINE, TEXT, EDGE0, EDGE1 = range(4)
NAMES = ["engine-0", "text-0", "edge-0", "edge-1"]


class World:
    """Everything around the supervisor: says what the children say, and keeps what they are told."""

    def __init__(self, specs: list[ChildSpec] | None = None, **options: Any) -> None:
        self.clock = FakeClock()
        specs = specs or [ChildSpec(role=name[:-2], id=int(name[-1]), module="m") for name in NAMES]
        self.names = [(spec.role, spec.id) for spec in specs]
        self.supervisor = Supervisor(specs, clock=self.clock, **{"drain_s": 30.0, "max_restarts": 3, **options})
        self.out: list[Any] = list(self.supervisor.start())

    def say(self, message: Any) -> list[Any]:
        """What the supervisor answers, without its log."""
        self.out = [out for out in self.supervisor.handle(message) if not isinstance(out, Notice)]
        return self.out

    def epoch(self, index: int) -> int:
        return self.supervisor.children[index].epoch

    def up(self, index: int) -> list[Any]:
        role, id_ = self.names[index]
        if role == "engine":
            return self.say(EngineUp(engine=id_, epoch=self.epoch(index), facts=FACTS))
        return self.say(ChildUp(role=role, id=id_, epoch=self.epoch(index), pid=1))

    def all_up(self) -> World:
        for index in range(len(self.names)):
            self.up(index)
        return self

    def dies(self, index: int, status: int = -9, error: BaseException | None = None) -> list[Any]:
        (role, id_), epoch = self.names[index], self.epoch(index)
        if error is not None:
            self.say(ChildDown(role=role, id=id_, epoch=epoch, status=1, detail=failure_of(error)))
        return self.say(ChildExited(role=role, id=id_, epoch=epoch, status=status))

    def drained(self, index: int, cut: int = 0) -> list[Any]:
        role, id_ = self.names[index]
        return self.say(Drained(role=role, id=id_, cut=cut))

    def after(self, seconds: float) -> list[Any]:
        self.clock.advance(seconds)
        return self.say(Tick(now_ns=self.clock.now_ns()))

    def everybody_leaves(self) -> Leave:
        for index in range(len(self.names)):
            self.dies(index, 0)
        (leave,) = [out for out in self.out if isinstance(out, Leave)]
        return leave


def told(out: list[Any], kind: type[Any]) -> list[int]:
    """Who was sent a message of that type."""
    return [o.index for o in out if isinstance(o, To) and type(o.message) is kind]


def of(out: list[Any], kind: type[Any]) -> list[Any]:
    return [o for o in out if type(o) is kind]


# ------------------------------------------------------------------ start


def test_children_start_side_by_side_and_ready_is_said_once() -> None:
    world = World()
    assert [(o.role, o.id, o.epoch) for o in world.out] == [("engine", 0, 1), ("text", 0, 1), ("edge", 0, 1), ("edge", 1, 1)]
    world.up(EDGE0)
    assert told(world.up(ENGINE), EngineUp) == [TEXT]
    world.clock.advance(1.5)
    assert told(world.up(TEXT), EngineUp) == [TEXT]  # whoever is up first: text learns of the engine
    assert of(world.out, Ready) == []
    (ready,) = world.up(EDGE1)
    assert ready == Ready(facts=[FACTS], first=True, seconds=1.5)
    world.dies(EDGE0)
    (again,) = world.up(EDGE0)
    assert not again.first


def test_a_start_that_fails_ends_the_server_with_the_reason() -> None:
    world = World()
    world.up(TEXT)
    world.dies(ENGINE, 1, CheckpointError("model.safetensors is truncated"))
    assert told(world.out, Stop) == [TEXT, EDGE0, EDGE1]
    leave = world.everybody_leaves()
    assert leave == Leave(status=1, error="model.safetensors is truncated")


def test_a_crash_while_starting_is_not_tried_again() -> None:
    world = World()
    world.dies(ENGINE, -9)
    leave = world.everybody_leaves()
    assert leave.status == 1
    assert "engine-0 process could not start" in leave.error
    assert "SIGKILL (out of memory?)" in leave.error
    world = World()
    world.dies(TEXT, 1, ValueError("what"))
    assert "failed with ValueError: what" in world.everybody_leaves().error


# ------------------------------------------------------------------ several pools


def two_pools() -> World:
    """Two models: "a" on engine 0, "b" on engines 1 and 2. Children: engines 0 to 2, texts 3 and 4, edge 5."""
    pools = [
        PoolSpec(name="a", models=["a"], text=0, engines=[0]),
        PoolSpec(name="b", models=["b"], text=1, engines=[1, 2]),
    ]
    return World(child_specs(build({}), pools))


def test_texts_hear_of_the_engines_of_their_own_pool_only() -> None:
    world = two_pools()
    assert world.names == [("engine", 0), ("engine", 1), ("engine", 2), ("text", 0), ("text", 1), ("edge", 0)]
    assert [told(world.up(index), EngineUp) for index in range(3)] == [[3], [4], [4]]
    heard = world.up(4)
    assert [(o.index, o.message.engine) for o in heard if isinstance(o, To)] == [(4, 1), (4, 2)]
    world.up(3)
    (ready,) = world.up(5)
    assert len(ready.facts) == 3
    out = world.dies(2)
    assert told(out, EngineDown) == [4]
    assert of(out, StartChild) == [StartChild(role="engine", id=2, epoch=2)]
    assert told(world.after(1.0), Vitals) == [3, 4]


def test_every_text_drains_before_any_engine() -> None:
    world = two_pools().all_up()
    assert told(world.say(Signalled(signum=signal.SIGTERM)), Drain) == [5]
    assert told(world.drained(5), Drain) == [3, 4]
    assert told(world.drained(4), Drain) == []
    assert told(world.drained(3), Drain) == [0, 1, 2]


# ------------------------------------------------------------------ restarts


def test_an_engine_that_dies_is_started_again_and_text_knows() -> None:
    world = World().all_up()
    out = world.dies(ENGINE)
    (down,) = [o.message for o in out if isinstance(o, To) and isinstance(o.message, EngineDown)]
    assert (down.engine, down.epoch) == (0, 1)
    assert told(out, EngineDown) == [TEXT]
    assert of(out, StartChild) == [StartChild(role="engine", id=0, epoch=2)]
    out = world.up(ENGINE)
    assert told(out, EngineUp) == [TEXT]
    assert of(out, Ready)[0].first is False


def test_text_and_edges_are_started_again_alone() -> None:
    world = World().all_up()
    assert world.dies(TEXT) == [StartChild(role="text", id=0, epoch=2)]
    assert told(world.up(TEXT), EngineUp) == [TEXT]
    assert world.dies(EDGE1) == [StartChild(role="edge", id=1, epoch=2)]


def test_words_of_an_earlier_life_are_ignored() -> None:
    world = World().all_up()
    world.dies(ENGINE)
    assert world.say(EngineUp(engine=0, epoch=1, facts=FACTS)) == []
    assert world.say(ChildExited(role="engine", id=0, epoch=1, status=0)) == []
    assert world.supervisor.children[ENGINE].state == "starting"


def test_restarts_pause_longer_and_longer_and_then_it_is_over() -> None:
    world = World().all_up()
    assert of(world.dies(ENGINE), StartChild)  # at once
    for pause in (0.5, 1.0):
        world.up(ENGINE)
        assert not of(world.dies(ENGINE), StartChild)
        assert not of(world.after(pause - 0.1), StartChild)
        assert of(world.after(0.2), StartChild)
    world.up(ENGINE)
    world.dies(ENGINE)
    assert told(world.out, Stop) == [TEXT, EDGE0, EDGE1]
    leave = world.everybody_leaves()
    assert leave.status == 1
    assert "failed for good after 3 restarts within 60 s" in leave.error


def test_restarts_are_forgotten_after_the_window() -> None:
    world = World(max_restarts=1).all_up()
    for _ in range(5):
        assert of(world.dies(EDGE0), StartChild)
        world.up(EDGE0)
        world.after(61)
    assert of(world.dies(EDGE0), StartChild)
    world.up(EDGE0)
    assert told(world.dies(EDGE0), Stop)


def test_no_restarts_allowed() -> None:
    world = World(max_restarts=0).all_up()
    world.dies(TEXT)
    assert world.everybody_leaves().status == 1


def test_a_restart_that_cannot_succeed_is_not_repeated() -> None:
    world = World().all_up()
    world.dies(ENGINE)
    assert told(world.dies(ENGINE, 1, CheckpointError("the folder is gone")), Stop)
    assert world.everybody_leaves() == Leave(status=1, error="the folder is gone")
    world = World().all_up()
    world.dies(ENGINE)
    assert not told(world.dies(ENGINE, 1, EngineUnavailable("busy")), Stop)  # worth another try


# ------------------------------------------------------------------ the stop ladder


def test_a_clean_drain_goes_from_the_edges_inwards_and_leaves_with_0() -> None:
    world = World().all_up()
    out = world.say(Signalled(signum=signal.SIGTERM))
    assert told(out, Drain) == [EDGE0, EDGE1]
    assert out[0].message.deadline_s == pytest.approx(30.0)
    assert world.drained(EDGE1) == []
    assert told(world.drained(EDGE0), Drain) == [TEXT]
    assert told(world.drained(TEXT), Drain) == [ENGINE]
    assert sorted(told(world.drained(ENGINE), Stop)) == [ENGINE, TEXT, EDGE0, EDGE1]
    assert world.everybody_leaves() == Leave(status=0)


def test_a_drain_does_not_wait_for_an_engine_that_is_being_restarted() -> None:
    world = World().all_up()
    world.say(Signalled(signum=signal.SIGTERM))
    world.dies(ENGINE)
    for index in (EDGE0, EDGE1):
        world.drained(index)
    assert sorted(told(world.drained(TEXT), Stop)) == [ENGINE, TEXT, EDGE0, EDGE1]


def test_cut_requests_make_the_status_say_so() -> None:
    world = World().all_up()
    world.say(Signalled(signum=signal.SIGTERM))
    world.drained(EDGE0, cut=2)
    world.drained(EDGE1, cut=1)
    world.drained(TEXT)
    world.drained(ENGINE)
    leave = world.everybody_leaves()
    assert leave.status == 128 + signal.SIGTERM
    assert leave.error == "3 requests were cut short by the shutdown deadline"


def test_the_deadline_passes() -> None:
    world = World(drain_s=5.0).all_up()
    world.say(Signalled(signum=signal.SIGINT))
    assert told(world.after(5.5), Stop) == []
    assert sorted(told(world.after(1.0), Stop)) == [ENGINE, TEXT, EDGE0, EDGE1]
    assert [k.signum for k in of(world.after(3.1), KillChild)] == [signal.SIGTERM] * 4
    world.dies(ENGINE, 0)
    assert [k.signum for k in of(world.after(0.6), KillChild)] == [signal.SIGKILL] * 3
    assert world.everybody_leaves().status == 128 + signal.SIGINT


def drain_deadlines(out: list[Any]) -> list[float]:
    return [o.message.deadline_s for o in out if isinstance(o, To) and isinstance(o.message, Drain)]


@pytest.mark.parametrize("pause", [0.0, 0.2, 0.9])
def test_a_copy_of_a_signal_is_that_signal(pause: float) -> None:
    """make and timeout send on what the whole group got already."""
    world = World().all_up()
    world.say(Signalled(signum=signal.SIGTERM))
    world.after(pause)
    assert world.say(Signalled(signum=signal.SIGTERM)) == []
    for index in (EDGE0, EDGE1, TEXT, ENGINE):
        world.drained(index)
    assert world.say(Signalled(signum=signal.SIGTERM)) == []  # a drain may be over sooner than the copy comes
    assert world.everybody_leaves() == Leave(status=0)


def test_a_copy_while_starting_kills_nothing() -> None:
    world = World()
    world.say(Signalled(signum=signal.SIGTERM))
    assert world.say(Signalled(signum=signal.SIGTERM)) == []
    assert world.everybody_leaves() == Leave(status=0)


def test_a_second_signal_ends_the_drain_now_in_its_order() -> None:
    world = World().all_up()
    world.say(Signalled(signum=signal.SIGTERM))
    world.after(1.5)
    out = world.say(Signalled(signum=signal.SIGINT))
    assert told(out, Drain) == [EDGE0, EDGE1]
    assert drain_deadlines(out) == [0.0, 0.0]
    assert not told(out, Stop)
    assert world.say(Signalled(signum=signal.SIGINT)) == []  # its copy
    world.drained(EDGE0, cut=2)
    out = world.drained(EDGE1)
    assert (told(out, Drain), drain_deadlines(out)) == ([TEXT], [0.0])
    world.drained(TEXT)
    assert len(told(world.drained(ENGINE), Stop)) == 4
    assert world.everybody_leaves() == Leave(status=128 + signal.SIGINT, error="2 requests were cut short by a second signal")


def test_a_second_signal_that_cuts_nothing_leaves_with_0() -> None:
    world = World().all_up()
    world.say(Signalled(signum=signal.SIGTERM))
    for index in (EDGE0, EDGE1):
        world.drained(index)
    world.after(1.5)
    assert told(world.say(Signalled(signum=signal.SIGTERM)), Drain) == [TEXT]
    world.drained(TEXT)
    world.drained(ENGINE)
    assert world.everybody_leaves() == Leave(status=0)


def test_after_a_second_signal_nobody_is_waited_for_long() -> None:
    world = World().all_up()
    world.say(Signalled(signum=signal.SIGINT))
    world.after(2)
    world.say(Signalled(signum=signal.SIGINT))
    assert len(told(world.after(1.1), Stop)) == 4
    assert [k.signum for k in of(world.after(0.4), KillChild)] == [signal.SIGKILL] * 4
    assert world.everybody_leaves().status == 130


def test_a_third_and_a_fourth_signal_do_not_wait_at_all() -> None:
    world = World().all_up()
    for _ in range(2):
        world.say(Signalled(signum=signal.SIGINT))
        world.clock.advance(1.1)
    assert len(told(world.say(Signalled(signum=signal.SIGINT)), Stop)) == 4
    world.clock.advance(1.1)
    assert len(of(world.say(Signalled(signum=signal.SIGINT)), KillChild)) == 4  # this instant
    assert world.everybody_leaves().status == 130


def test_a_signal_before_ready_stops_at_once_and_cleanly() -> None:
    world = World()
    world.up(TEXT)
    assert len(told(world.say(Signalled(signum=signal.SIGINT)), Stop)) == 4
    assert world.everybody_leaves() == Leave(status=0)


def test_an_engine_that_dies_while_draining_is_replaced() -> None:
    """Streams that are being finished need it: they are replayed on the new one."""
    world = World().all_up()
    world.say(Signalled(signum=signal.SIGTERM))
    assert of(world.dies(ENGINE), StartChild)
    assert told(world.up(ENGINE), EngineUp) == [TEXT]
    world.drained(EDGE0)
    world.drained(EDGE1)
    world.drained(TEXT)
    world.drained(ENGINE)
    assert world.everybody_leaves().status == 0


def test_an_edge_that_dies_while_draining_took_answers_with_it() -> None:
    world = World().all_up()
    world.say(Signalled(signum=signal.SIGTERM))
    assert not of(world.dies(EDGE0), StartChild)
    world.drained(EDGE1)
    world.drained(TEXT)
    world.drained(ENGINE)
    leave = world.everybody_leaves()
    assert leave.status == 1
    assert "edge-0 process died while requests were being finished" in leave.error


def test_a_failure_while_stopping_does_not_hang() -> None:
    world = World().all_up()
    world.say(Signalled(signum=signal.SIGTERM))
    for index in (EDGE0, EDGE1, TEXT, ENGINE):
        world.drained(index)
    world.dies(ENGINE, 1)
    assert world.everybody_leaves().status == 0


def test_a_child_that_waits_for_its_restart_does_not_hold_up_a_stop() -> None:
    world = World().all_up()
    world.dies(EDGE0)
    world.up(EDGE0)
    world.dies(EDGE0)
    assert world.supervisor.children[EDGE0].state == "waiting"
    for _ in range(3):
        world.say(Signalled(signum=signal.SIGTERM))
        world.clock.advance(1.1)
    for index in (ENGINE, TEXT, EDGE1):
        world.dies(index, 0)
    assert of(world.out, Leave)


# ------------------------------------------------------------------ vital signs


def test_vitals_tell_idle_busy_and_stalled_apart() -> None:
    world = World().all_up()

    def beat(progress: int, pending: int) -> None:
        world.say(Heartbeat(role="engine", id=0, at_ns=world.clock.now_ns(), progress=progress, pending=pending))

    def engine() -> Any:
        out = world.say(Tick(now_ns=world.clock.now_ns()))
        assert told(out, Vitals) == [TEXT]
        return out[0].message.rows[ENGINE]

    def wait(seconds: int) -> None:
        for _ in range(seconds):
            world.after(1)

    beat(0, 0)
    wait(100)
    beat(0, 0)
    assert engine().stalled_s == 0  # idle, however long
    beat(5, 3)
    wait(2)
    beat(9, 3)
    assert engine().stalled_s == 0  # busy
    wait(40)
    beat(9, 3)
    row = engine()
    assert (row.stalled_s, row.age_s) == (40, 0)  # alive, but nothing moves
    wait(7)
    row = engine()
    assert (row.stalled_s, row.age_s) == (47, 7)  # silent as well
    world.dies(ENGINE)
    row = engine()
    assert (row.up, row.stalled_s) == (False, 0)


def kills(out: list[Any]) -> list[tuple[str, int, int]]:
    return [(kill.role, kill.id, kill.signum) for kill in of(out, KillChild)]


class Beats:
    """Everybody alive for some seconds, one tick each; but `silent`. `engine` is its progress and pending."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.engine = (0, 0)

    def pass_s(self, seconds: int, silent: tuple[str, ...] = ()) -> list[tuple[str, int, int]]:
        killed = []
        for _ in range(seconds):
            self.world.clock.advance(1)
            for name in NAMES:
                if name not in silent:
                    progress, pending = self.engine if name == "engine-0" else (0, 7)
                    at = self.world.clock.now_ns()
                    self.world.say(Heartbeat(role=name[:-2], id=int(name[-1]), at_ns=at, progress=progress, pending=pending))
            killed += kills(self.world.say(Tick(now_ns=self.world.clock.now_ns())))
        return killed


GPU = msgspec.structs.replace(FACTS, bounded_steps=True)


def watched_gpu() -> tuple[World, Beats]:
    """All up, the engine on a GPU."""
    world = World(watchdog_s=20.0)
    world.say(EngineUp(engine=0, epoch=1, facts=GPU))
    for index in (TEXT, EDGE0, EDGE1):
        world.up(index)
    return world, Beats(world)


def test_an_engine_with_work_and_no_steps_is_ended_and_started_again() -> None:
    world, beats = watched_gpu()
    assert beats.pass_s(100) == []  # idle
    beats.engine = (0, 3)  # the first work after that has its own time
    assert beats.pass_s(19) == []
    beats.engine = (1, 3)
    assert beats.pass_s(20) == []
    beats.engine = (2, 3)  # slow, but it moves
    assert beats.pass_s(20) == []
    assert beats.pass_s(1) == [("engine", 0, signal.SIGUSR2)]
    assert beats.pass_s(1) == []  # it writes its stacks
    assert beats.pass_s(2) == [("engine", 0, signal.SIGKILL)] * 2  # until it is gone
    out = world.dies(ENGINE)
    (down,) = [o.message for o in out if isinstance(o, To) and isinstance(o.message, EngineDown)]
    assert down.reason == "hung: it finished no step for 20 s, with 3 sequences and steps waiting"
    assert [(s.role, s.epoch) for s in of(out, StartChild)] == [("engine", 2)]
    assert beats.pass_s(100) == []  # a start may take any time
    world.say(EngineUp(engine=0, epoch=2, facts=GPU))
    assert beats.pass_s(19) == []  # the new life has its own time


def test_a_start_that_stops_giving_signs_of_life_is_ended_but_imports_may_take_any_time() -> None:
    world = World(watchdog_s=20.0).all_up()
    beats = Beats(world)
    world.dies(ENGINE)
    assert world.supervisor.children[ENGINE].state == "starting"
    assert beats.pass_s(1000, silent=("engine-0",)) == []
    assert beats.pass_s(1000) == []
    assert beats.pass_s(19, silent=("engine-0",)) == []
    assert beats.pass_s(1, silent=("engine-0",)) == [("engine", 0, signal.SIGUSR2)]


def test_who_goes_on_after_all_is_not_ended() -> None:
    world, beats = watched_gpu()
    assert beats.pass_s(20, silent=("edge-0",)) == [("edge", 0, signal.SIGUSR2)]
    assert beats.pass_s(50) == []
    assert beats.pass_s(20, silent=("edge-0",)) == [("edge", 0, signal.SIGUSR2)]  # and is watched as before
    assert beats.pass_s(50) == []
    beats.engine = (1, 3)
    assert beats.pass_s(21) == [("engine", 0, signal.SIGUSR2)]
    beats.engine = (2, 3)
    assert beats.pass_s(19) == []
    out = world.dies(ENGINE)
    (down,) = [o.message for o in out if isinstance(o, To) and isinstance(o.message, EngineDown)]
    assert "hung" not in down.reason  # it died of something else later


def test_the_watchdog_watches_a_drain_too() -> None:
    world = World(watchdog_s=20.0, drain_s=300.0).all_up()
    beats = Beats(world)
    world.say(Signalled(signum=signal.SIGTERM))
    assert world.supervisor.phase == "draining"
    assert beats.pass_s(20, silent=("text-0",)) == [("text", 0, signal.SIGUSR2)]


def test_a_step_on_a_cpu_may_take_any_time() -> None:
    world = World(watchdog_s=20.0).all_up()
    beats = Beats(world)
    beats.engine = (1, 3)
    assert beats.pass_s(1000) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_process_that_gives_no_sign_of_life_is_ended_and_a_loss_of_text_is_told(name: str) -> None:
    world = World(watchdog_s=20.0).all_up()
    beats = Beats(world)
    role, index = name[:-2], int(name[-1])
    assert beats.pass_s(3) == []
    assert beats.pass_s(19, silent=(name,)) == []
    assert beats.pass_s(1, silent=(name,)) == [(role, index, signal.SIGUSR2)]
    assert beats.pass_s(2, silent=(name,)) == [(role, index, signal.SIGKILL)]
    # What it says on its way out does not hide why it had to go.
    world.say(ChildDown(role=role, id=index, epoch=1, status=1, detail=failure_of(ValueError("late"))))
    notices = [n for n in world.supervisor.handle(ChildExited(role=role, id=index, epoch=1, status=-9)) if isinstance(n, Notice)]
    assert [n.fields["reason"] for n in notices] == ["hung: it gave no sign of life for 20 s"]


def test_time_in_which_root_itself_slept_counts_for_nobody() -> None:
    world = World(watchdog_s=20.0).all_up()
    beats = Beats(world)
    assert beats.pass_s(5) == []
    world.clock.advance(3600)
    assert kills(world.say(Tick(now_ns=world.clock.now_ns()))) == []
    assert beats.pass_s(19, silent=("edge-0",)) == []
    assert beats.pass_s(2, silent=("edge-0",)) == [("edge", 0, signal.SIGUSR2)]


@pytest.mark.parametrize("beat_first", [False, True])
def test_a_stall_around_roots_sleep_is_noticed_in_time(beat_first: bool) -> None:
    """Whether the heartbeats that wait are read before the first tick or after."""
    world, beats = watched_gpu()
    beats.engine = (1, 3)
    assert beats.pass_s(10) == []
    world.clock.advance(3600)
    if beat_first:
        world.say(Heartbeat(role="engine", id=0, at_ns=world.clock.now_ns(), progress=2, pending=3))
        beats.engine = (2, 3)
    assert kills(world.say(Tick(now_ns=world.clock.now_ns()))) == []
    assert beats.pass_s(9) == []
    assert beats.pass_s(11)[:1] == [("engine", 0, signal.SIGUSR2)]


def test_without_a_watchdog_nobody_is_ended_for_hanging() -> None:
    world = World(watchdog_s=0.0).all_up()
    assert Beats(world).pass_s(2000, silent=tuple(NAMES)) == []


def test_phases_of_a_start_reach_text_as_durations_that_add_up() -> None:
    """Also those that passed before text was there to hear them, once."""
    world = World()
    for phase, at in (("reading config", 1.5), ("loading weights", 2.0), ("ready", 4.5)):
        world.say(StartupPhase(role="engine", id=0, phase=phase, seconds=at))
    out = world.up(TEXT)
    assert set(told(out, StartupPhase)) == {TEXT}
    phases = [m.message for m in out if isinstance(m, To) and isinstance(m.message, StartupPhase)]
    assert [(p.phase, p.seconds) for p in phases] == [("imports", 1.5), ("reading config", 0.5), ("loading weights", 2.5)]
    assert all((p.role, p.id) == ("engine", 0) for p in phases)
