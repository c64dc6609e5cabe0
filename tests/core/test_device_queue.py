"""Order, threads and failures of the device queue, with a runner that writes down what it is asked."""

from __future__ import annotations

import gc
import queue
import random
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.contract.fake_device import FakeDevice, FakeOptions
from penstock.core.processes.engine import runner_config
from penstock.core.protocol.columns import EMPTY_I32
from penstock.core.protocol.config import build
from penstock.core.protocol.control import Message
from penstock.core.protocol.errors import CheckpointError, ProtocolError, UnsupportedFeature
from penstock.core.protocol.messages import Control, DeviceLost, DeviceWork, Forward, Move, Sample, StepDone, WorkDone
from penstock.core.runtime.device_queue import StepOrder, ThreadDeviceQueue

CONFIG = runner_config(build({}))


def forward(step: int, epoch: int = 1) -> DeviceWork:
    return DeviceWork(forward=Forward(engine=0, epoch=epoch, step=step, slots=EMPTY_I32, starts=EMPTY_I32, counts=EMPTY_I32, num_decode=0))


def sample(step: int, epoch: int = 1) -> DeviceWork:
    return DeviceWork(sample=Sample(engine=0, epoch=epoch, step=step, rows=EMPTY_I32, slots=EMPTY_I32, positions=EMPTY_I32))


def control(id: int, name: str = "fence", *, after: int = 0, epoch: int = 1) -> DeviceWork:
    return DeviceWork(control=Control(engine=0, epoch=epoch, owner="me", id=id, name=name, after=after))


def move(id: int, *, after: int = 0) -> DeviceWork:
    return DeviceWork(move=Move(engine=0, epoch=1, owner="me", id=id, blocks=EMPTY_I32, pages=EMPTY_I32, out=True, after=after))


def works(steps: int) -> list[DeviceWork]:
    return [work for step in range(1, steps + 1) for work in (forward(step), sample(step))]


def place(entry: Forward | Sample) -> tuple[int, int]:
    return entry.step, 0 if isinstance(entry, Forward) else 1


@given(st.randoms(use_true_random=False), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_any_arrival_order_runs_in_step_order(rng: random.Random, steps: int) -> None:
    arriving = works(steps)
    rng.shuffle(arriving)
    order = StepOrder(engine=0, epoch=1)
    ran = [place(entry) for work in arriving for entry in order.put(work)]
    assert ran == [(step, phase) for step in range(1, steps + 1) for phase in (0, 1)]
    assert len(order) == 0


@given(st.randoms(use_true_random=False), st.integers(1, 8), st.lists(st.integers(0, 8), max_size=6))
@settings(max_examples=60, deadline=None)
def test_what_is_between_steps_runs_behind_its_step_and_before_what_was_sent_later(
    rng: random.Random, steps: int, afters: list[int]
) -> None:
    arriving = [*works(steps), *(control(id, after=min(after, steps)) for id, after in enumerate(afters))]
    rng.shuffle(arriving)
    order = StepOrder(engine=0, epoch=1)
    ran: list[Any] = []
    sent_before: dict[int, int] = {}
    for at, work in enumerate(arriving):
        ran += order.put(work)
        if work.control is not None:
            sent_before[work.control.id] = at
    assert len(order) == 0
    assert [place(entry) for entry in ran if not isinstance(entry, Control)] == [(s, p) for s in range(1, steps + 1) for p in (0, 1)]
    done, half = 0, False
    for entry in ran:
        if isinstance(entry, Control):
            assert not half, "between a Forward and its Sample"
            assert done >= entry.after
        else:
            half = isinstance(entry, Forward)
            done = entry.step if isinstance(entry, Sample) else done
    for work in arriving[::-1]:
        if work.forward is not None:
            later = [e.id for e in ran[: ran.index(work.forward)] if isinstance(e, Control)]
            mine = arriving.index(work)
            early = [i for i, at in sent_before.items() if at < mine and afters[i] < work.forward.step]
            assert set(early) <= set(later), "a Forward ran before what was sent ahead of it"


def test_entries_that_cannot_be_in_order_are_refused() -> None:
    order = StepOrder(engine=0, epoch=1)
    order.put(forward(1))
    with pytest.raises(ProtocolError, match="twice or too late"):
        order.put(forward(1))
    order.put(sample(3))
    with pytest.raises(ProtocolError, match="twice or too late"):
        order.put(sample(3))
    with pytest.raises(ProtocolError, match="exactly one"):
        order.put(DeviceWork())
    with pytest.raises(ProtocolError, match="exactly one"):
        order.put(DeviceWork(forward=forward(2).forward, control=control(1).control))


def test_entries_of_another_epoch_are_dropped() -> None:
    order = StepOrder(engine=0, epoch=2)
    assert order.put(forward(1, epoch=1)) == []
    assert order.put(control(1, epoch=1)) == []
    assert order.stale == 2
    assert len(order.put(forward(1, epoch=2))) == 1


class Recorder(FakeDevice):
    """Notes the thread and the order of every call; steps may fail or wait for a gate."""

    def __init__(self, depth: int = 1, fail_at: int = 0, gate: threading.Event | None = None) -> None:
        super().__init__(FakeOptions(depth=depth))
        self.calls: list[tuple[str, int]] = []
        self.threads: set[int] = set()
        self.fail_at = fail_at
        self.gate = gate

    def load(self, config: Any, progress: Callable[[str, float], None]) -> Any:
        self._note("load")
        return self

    def _note(self, what: str, step: int = 0) -> None:
        self.calls.append((what, step))
        self.threads.add(threading.get_ident())

    def warm_up(self, progress: Callable[[str], None]) -> None:
        self._note("warm_up")
        progress("shapes")

    def forward(self, work: Forward) -> None:
        self._note("forward", work.step)
        if work.step == self.fail_at:
            raise RuntimeError("it burns")

    def sample(self, work: Sample) -> Callable[[], StepDone]:
        self._note("sample", work.step)

        def wait() -> StepDone:
            if self.gate is not None:
                assert self.gate.wait(10)
            return StepDone(engine=0, epoch=1, step=work.step, slots=EMPTY_I32, tokens=EMPTY_I32)

        return wait

    def close(self) -> None:
        self._note("close")


def started(device: Recorder) -> tuple[ThreadDeviceQueue, queue.Queue[Message], list[tuple[str, float]]]:
    posted: queue.Queue[Message] = queue.Queue()
    progress: list[tuple[str, float]] = []
    device_queue = ThreadDeviceQueue(engine=0, epoch=1, post=posted.put)
    device_queue.load(device, CONFIG, lambda phase, fraction: progress.append((phase, fraction))).result(10)
    return device_queue, posted, progress


@pytest.mark.parametrize("depth", [1, 2])
def test_one_thread_does_everything_in_order(depth: int) -> None:
    device = Recorder(depth=depth)
    device_queue, posted, progress = started(device)
    arriving = works(20)
    random.Random(3).shuffle(arriving)
    for work in arriving:
        device_queue.deliver(work)
    done = [posted.get(timeout=10) for _ in range(20)]
    device_queue.close()
    assert [m.step for m in done if isinstance(m, StepDone)] == list(range(1, 21))
    steps = [(name, step) for step in range(1, 21) for name in ("forward", "sample")]
    assert device.calls == [("load", 0), ("warm_up", 0), *steps, ("close", 0)]
    assert len(device.threads) == 1
    assert device.threads != {threading.get_ident()}
    assert progress == [("shapes", 1.0)]


def test_with_depth_two_the_next_step_is_enqueued_before_the_last_is_done() -> None:
    gate = threading.Event()
    device = Recorder(depth=2, gate=gate)
    device_queue, posted, _ = started(device)
    for work in works(3):
        device_queue.deliver(work)
    device_queue.call(lambda: None).result(10)  # everything before it on the thread has run
    assert ("sample", 3) in device.calls
    assert posted.empty()
    gate.set()
    assert [posted.get(timeout=10).step for _ in range(3)] == [1, 2, 3]  # type: ignore[attr-defined]
    device_queue.close()


def test_a_failing_step_is_reported_once_and_nothing_runs_after_it() -> None:
    device = Recorder(fail_at=2)
    device_queue, posted, _ = started(device)
    for work in works(5):
        device_queue.deliver(work)
    first, second = posted.get(timeout=10), posted.get(timeout=10)
    assert isinstance(first, StepDone)
    assert isinstance(second, DeviceLost)
    assert (second.step, second.epoch) == (2, 1)
    assert "it burns" in second.error
    assert "test_device_queue.py" in second.error  # where, not only what
    device_queue.close()
    assert posted.empty()
    assert ("forward", 3) not in device.calls
    assert device.calls[-1] == ("close", 0)


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), SystemExit(2), GeneratorExit()])
@pytest.mark.parametrize("late", [False, True], ids=["in forward", "in the wait"])
def test_whatever_a_runner_raises_is_a_loss_and_never_silence(raised: BaseException, late: bool) -> None:
    class Wild(Recorder):
        def forward(self, work: Forward) -> None:
            if not late:
                raise raised

        def sample(self, work: Sample) -> Callable[[], StepDone]:
            def wait() -> StepDone:
                raise raised

            return wait

    device_queue, posted, _ = started(Wild(depth=2))
    for work in works(1):
        device_queue.deliver(work)
    lost = posted.get(timeout=10)
    assert isinstance(lost, DeviceLost)
    assert type(raised).__name__ in lost.error
    assert device_queue.call(lambda: 3).result(10) == 3, "the thread goes on"
    device_queue.close()


class Mover(Recorder):
    """A runner that has what most lack."""

    def move(self, work: Move) -> Callable[[], None]:
        self._note("move", work.id)
        return lambda: None

    def control(self, work: Control) -> bytes:
        self._note(f"control {work.name}", work.id)
        if work.name == "burn":
            raise RuntimeError("it burns")
        if work.name != "sleep":
            raise UnsupportedFeature(f"No such control: {work.name}.")
        return b"well"


@pytest.mark.parametrize("depth", [1, 2])
def test_moves_and_controls_run_between_steps_and_are_answered(depth: int) -> None:
    device = Mover(depth=depth)
    device_queue, posted, _ = started(device)
    one, two = works(2)[:2], works(2)[2:]
    for work in (one[0], control(1, "sleep"), move(2), control(3, "dream"), control(4, "sleep", after=2), one[1], *two):
        device_queue.deliver(work)
    done = [posted.get(timeout=10) for _ in range(6)]
    device_queue.close()
    assert [name for name, _ in device.calls[2:-1]] == [
        *("forward", "sample", "control sleep", "move", "control dream", "forward", "sample", "control sleep")
    ]
    answers = [(m.id, m.error, m.data) for m in done if isinstance(m, WorkDone)]
    assert answers == [(1, "", b"well"), (2, "", b""), (3, "No such control: dream.", b""), (4, "", b"well")]
    assert {m.owner for m in done if isinstance(m, WorkDone)} == {"me"}
    assert len(device.threads) == 1


def test_a_runner_that_lacks_the_method_says_so_and_goes_on() -> None:
    device = Recorder()
    device_queue, posted, _ = started(device)
    for work in (move(1), control(2, "sleep"), control(3), *works(1)):
        device_queue.deliver(work)
    answers: list[Any] = [posted.get(timeout=10) for _ in range(4)]
    device_queue.close()
    assert [m.error for m in answers[:3]] == [
        "The device's runner (Recorder) has no move().",
        "The device's runner (Recorder) has no control().",
        "",
    ]
    assert isinstance(answers[3], StepDone)


def test_a_control_that_breaks_is_a_loss() -> None:
    device_queue, posted, _ = started(Mover())
    device_queue.deliver(control(1, "burn", after=0))
    lost = posted.get(timeout=10)
    assert isinstance(lost, DeviceLost)
    assert "it burns" in lost.error
    device_queue.close()


class Improver(Recorder):
    """Has so many pieces to do while nothing else is; notes each, and what was under way then."""

    def __init__(self, pieces: int, fail: bool = False, gate: threading.Event | None = None) -> None:
        super().__init__(depth=2, gate=gate)
        self.pieces = pieces
        self.fail = fail
        self.over = threading.Event()

    def improve(self) -> bool:
        self._note("improve")
        if self.fail:
            self.over.set()
            raise RuntimeError("no memory for a graph")
        self.pieces -= 1
        if self.pieces <= 0:
            self.over.set()
        return self.pieces > 0


def idling(device: Improver) -> tuple[ThreadDeviceQueue, queue.Queue[Message]]:
    posted: queue.Queue[Message] = queue.Queue()
    device_queue = ThreadDeviceQueue(engine=0, epoch=1, post=posted.put, quiet_s=0.001)
    device_queue.load(device, CONFIG, lambda phase, fraction: None).result(10)
    return device_queue, posted


def test_a_runner_improves_itself_while_nothing_is_under_way_and_never_between() -> None:
    gate = threading.Event()
    device = Improver(3, gate=gate)
    device_queue, posted = idling(device)
    assert device.over.wait(10)
    first, second = works(2)[:2], works(2)[2:]
    device.pieces = 2
    device.over.clear()
    device_queue.deliver(first[0])
    for _ in range(20):  # its Sample may wait for a mask: many times the quiet time
        device_queue.call(lambda: None).result(10)
    assert not device.over.wait(0.05)
    device_queue.deliver(first[1])
    assert not device.over.wait(0.05)  # the device computes
    assert ("sample", 1) in device.calls
    gate.set()
    assert isinstance(posted.get(timeout=10), StepDone)
    assert device.over.wait(10)
    for work in second:
        device_queue.deliver(work)
    assert isinstance(posted.get(timeout=10), StepDone)
    device_queue.close()
    pieces = [name for name, _ in device.calls if name in ("improve", "forward", "sample")]
    assert pieces[:7] == [*["improve"] * 3, "forward", "sample", "improve", "improve"]
    assert len(device.threads) == 1
    assert device.calls[-1] == ("close", 0)


def test_an_improvement_that_fails_is_said_once_and_serving_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    device = Improver(3, fail=True)
    device_queue, posted = idling(device)
    assert device.over.wait(10)
    for work in works(2):
        device_queue.deliver(work)
    assert [type(posted.get(timeout=10)) for _ in range(2)] == [StepDone, StepDone]
    device_queue.close()
    assert [name for name, _ in device.calls].count("improve") == 1
    (said,) = caplog.messages
    assert said == "could not prepare for faster steps (RuntimeError: no memory for a graph); serving goes on without"


def test_work_that_comes_during_an_improvement_waits_for_that_piece_alone() -> None:
    device = Improver(1000)
    begun, go = threading.Event(), threading.Event()

    def improve() -> bool:
        device._note("improve")
        begun.set()
        assert go.wait(10)
        return True

    device.improve = improve  # type: ignore[method-assign]
    device_queue, posted = idling(device)
    assert begun.wait(10)
    for work in works(1):
        device_queue.deliver(work)
    go.set()
    assert isinstance(posted.get(timeout=10), StepDone)
    names = [name for name, _ in device.calls]
    assert names[: names.index("sample")] == ["load", "warm_up", "improve", "forward"]
    device_queue.close()


def test_a_lost_or_closed_device_improves_no_more_and_is_let_go() -> None:
    device = Improver(1)
    device_queue, posted = idling(device)
    assert device.over.wait(10)
    device.pieces = 1000

    def broken(work: Sample) -> Callable[[], StepDone]:
        raise RuntimeError("it burns")

    device.sample = broken  # type: ignore[method-assign]
    for work in works(1):
        device_queue.deliver(work)
    assert isinstance(posted.get(timeout=10), DeviceLost)
    assert not threading.Event().wait(0.05)  # many times the quiet time
    device_queue.close()
    assert [name for name, _ in device.calls].count("improve") == 1
    gone = weakref.ref(device)
    del device
    gc.collect()
    assert gone() is None  # though the queue is still here
    assert device_queue is not None


def test_work_before_the_runner_is_a_loss() -> None:
    posted: queue.Queue[Message] = queue.Queue()
    device_queue = ThreadDeviceQueue(engine=0, epoch=1, post=posted.put)
    device_queue.deliver(forward(1))
    lost = posted.get(timeout=10)
    assert isinstance(lost, DeviceLost)
    device_queue.close()


def test_a_failing_load_fails_its_future() -> None:
    device_queue = ThreadDeviceQueue(engine=0, epoch=1, post=lambda message: None)
    future = device_queue.load(FakeDevice(FakeOptions(fail_load="no such tensor")), CONFIG, lambda phase, fraction: None)
    with pytest.raises(CheckpointError, match="no such tensor"):
        future.result(10)
    device_queue.close()
    device_queue.close()  # idempotent
