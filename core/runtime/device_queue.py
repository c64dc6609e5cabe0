"""The ordered device queue.

What it is: the only way to a device. Whatever order DeviceWork arrives in, steps run strictly by (step, forward before sample), moves and controls
between them, on one thread that also loads and warms up the runner, so that a device library sees a single thread from first to last (on a CPU a second thread
means a second OpenMP pool: every step 1.5 to 1.8 times slower). Results are posted back through a thread-safe callback: StepDone a step, or
DeviceLost once, after which nothing runs any more; WorkDone a move or control. On an asynchronous device with a depth above 1 a second thread waits for the copies of
finished steps, so that the device thread can enqueue the next one meanwhile. While nothing is queued or under way, a runner with an `improve` may
make its later steps faster, a little at a time.
What it does not know: what a step is, torch, trio.
"""

from __future__ import annotations

import logging
import queue
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from penstock.core.contract.devices import Device, Runner, RunnerConfig
from penstock.core.protocol.control import Message
from penstock.core.protocol.errors import CheckpointError, PenstockError, ProtocolError, UnsupportedFeature, described
from penstock.core.protocol.messages import Control, DeviceLost, DeviceWork, Forward, Move, Sample, StepDone, WorkDone

log = logging.getLogger("penstock.engine.device")
T = TypeVar("T")
Entry = Forward | Sample | Move | Control
JOIN_S = 10.0
QUIET_S = 0.25
"""Nothing was queued for so long: clients may be between two requests, or gone."""


class StepOrder:
    """Entries in any order -> steps in (step, forward, sample) order, with moves and controls between a Sample and the next Forward. Pure."""

    def __init__(self, *, engine: int, epoch: int, first_step: int = 1) -> None:
        self._engine = engine
        self._epoch = epoch
        self._step = first_step
        self._phase = 0
        self._waiting: dict[tuple[int, int], Forward | Sample] = {}
        self._between: list[Move | Control] = []
        """Moves and controls whose step has not been sampled yet, in the order of arrival."""
        self.stale = 0
        """Entries of another epoch that were dropped."""

    def __len__(self) -> int:
        return len(self._waiting) + len(self._between)

    def put(self, work: DeviceWork) -> list[Entry]:
        """Everything that may run now. Raises ProtocolError for an entry that is empty, double, or already past."""
        if work.move is not None or work.control is not None:
            return self._put_between(work)
        if (work.forward is None) == (work.sample is None):
            raise ProtocolError("DeviceWork must hold exactly one of forward, sample, move and control.")
        entry: Forward | Sample = work.forward if work.forward is not None else work.sample  # type: ignore[assignment]
        if (entry.engine, entry.epoch) != (self._engine, self._epoch):
            self.stale += 1
            return []
        place = (entry.step, 0 if work.forward is not None else 1)
        if place < (self._step, self._phase) or place in self._waiting:
            raise ProtocolError(f"{type(entry).__name__} of step {entry.step} came twice or too late.")
        self._waiting[place] = entry
        ready: list[Entry] = []
        while (due := self._waiting.pop((self._step, self._phase), None)) is not None:
            ready.append(due)
            self._step, self._phase = (self._step, 1) if self._phase == 0 else (self._step + 1, 0)
            if self._between and self._phase == 0:
                ready += self._due()
        return ready

    def _put_between(self, work: DeviceWork) -> list[Entry]:
        entries = [entry for entry in (work.forward, work.sample, work.move, work.control) if entry is not None]
        entry = work.move if work.move is not None else work.control
        if len(entries) != 1 or entry is None:
            raise ProtocolError("DeviceWork must hold exactly one of forward, sample, move and control.")
        if (entry.engine, entry.epoch) != (self._engine, self._epoch):
            self.stale += 1
            return []
        self._between.append(entry)
        return self._due() if self._phase == 0 else []

    def _due(self) -> list[Entry]:
        """Those whose step has passed, at a boundary between steps."""
        due: list[Entry] = [entry for entry in self._between if entry.after < self._step]
        self._between = [entry for entry in self._between if entry.after >= self._step]
        return due


def begin(runner: Runner, work: Move | Control) -> Callable[[], WorkDone]:
    """Run or enqueue a move or a control on the device's thread; the returned call waits for its end. What the runner refuses is an answer; what it
    raises besides is a fault of the device."""
    data, error, wait = b"", "", None
    try:
        if type(work) is Move:
            wait = _ability(runner, "move")(work)
        elif work.name != "fence":  # type: ignore[union-attr]
            data = _ability(runner, "control")(work)
    except PenstockError as refusal:
        error = refusal.message

    def finish() -> WorkDone:
        if wait is not None:
            wait()
        return WorkDone(engine=work.engine, epoch=work.epoch, owner=work.owner, id=work.id, error=error, data=data)

    return finish


def _ability(runner: Runner, name: str) -> Callable[[Any], Any]:
    method: Callable[[Any], Any] | None = getattr(runner, name, None)
    if method is None:
        raise UnsupportedFeature(f"The device's runner ({type(runner).__name__}) has no {name}().", param=name)
    return method


class ThreadDeviceQueue:
    """The device's thread. `submit` is called on the host's thread; `post` is called on the device's threads and must be thread-safe."""

    name = "device"
    takes: frozenset[type[Message]] = frozenset({DeviceWork})
    gives: frozenset[type[Message]] = frozenset({StepDone, DeviceLost, WorkDone})

    def __init__(self, *, engine: int, epoch: int, post: Callable[[Message], None], quiet_s: float = QUIET_S) -> None:
        self._engine = engine
        self._epoch = epoch
        self._post = post
        self._quiet_s = quiet_s
        self._order = StepOrder(engine=engine, epoch=epoch)
        self._jobs: queue.SimpleQueue[Callable[[], None] | Entry | None] = queue.SimpleQueue()
        self._waits: queue.SimpleQueue[tuple[int, Callable[[], StepDone | WorkDone]] | None] = queue.SimpleQueue()
        self._lost = threading.Event()
        self._runner: Runner | None = None
        self._improve: Callable[[], bool] | None = None
        self._may_improve = False
        self._half = False
        """A Forward ran whose Sample has not come (it may wait for a mask): the runner holds its hidden states."""
        # Steps whose results the waiter was asked for, and has: each thread writes its own.
        self._asked = 0
        self._answered = 0
        self._waits_here = True
        self._thread = threading.Thread(target=self._work, name=f"device-{engine}", daemon=True)
        self._waiter: threading.Thread | None = None
        self._thread.start()

    # --- from outside

    def load(self, device: Device, config: RunnerConfig, progress: Callable[[str, float], None]) -> Future[Runner]:
        """Load and warm up on the device's thread. The future fails with whatever the device raised."""

        def build() -> Runner:
            runner = device.load(config, progress)
            try:
                runner.warm_up(lambda phase: progress(phase, 1.0))
            except CheckpointError as error:  # a runner knows no folder
                raise CheckpointError(f"{config.model_path}: {error.message}", param=error.param) from error
            self._runner = runner
            self._improve = getattr(runner, "improve", None)
            self._may_improve = self._improve is not None
            self._waits_here = device.capabilities.depth <= 1 or device.capabilities.synchronous
            return runner

        return self.call(build)

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run something on the device's thread, behind what is queued."""
        future: Future[T] = Future()

        def job() -> None:
            try:
                future.set_result(function())
            except BaseException as error:  # the future carries it to whoever asked
                future.set_exception(error)

        self._jobs.put(job)
        return future

    def deliver(self, message: Message, index: int | None = None) -> None:
        """The port's entrance. Raises ProtocolError if the entry cannot be in order."""
        assert isinstance(message, DeviceWork)
        if self._lost.is_set():
            return
        for entry in self._order.put(message):
            self._jobs.put(entry)

    def close(self) -> None:
        """Finish what runs, close the runner, end the threads. Idempotent; blocks for at most JOIN_S."""
        self._lost.set()
        self._jobs.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(JOIN_S)

    # --- the device's thread

    def _next(self) -> Callable[[], None] | Entry | None:
        """The next job. While there is none, and no step is under way, the runner improves itself: a piece at a time, and again only after a
        step once it says that nothing is left."""
        while self._may_improve:
            try:
                return self._jobs.get(timeout=self._quiet_s)
            except queue.Empty:
                if self._half or self._asked != self._answered:
                    continue
            while self._may_improve and self._jobs.empty():
                assert self._improve is not None
                try:
                    self._may_improve = not self._lost.is_set() and self._improve()
                except BaseException as error:  # nobody asked for it; a device that is broken will say so at the next step
                    log.warning("could not prepare for faster steps (%s); serving goes on without", described(error))
                    self._improve, self._may_improve = None, False
        return self._jobs.get()

    def _work(self) -> None:
        while True:
            job = self._next()
            if job is None:
                break
            if type(job) is Forward or type(job) is Sample or type(job) is Move or type(job) is Control:
                if not self._lost.is_set():
                    self._run(job)
            else:
                job()  # type: ignore[operator]
            job = None  # an entry's columns must not outlive it here
        if self._waiter is not None:
            self._waits.put(None)
            self._waiter.join(JOIN_S)
        self._improve = None
        runner, self._runner = self._runner, None  # whoever keeps the closed engine does not keep the model's memory
        if runner is not None:
            runner.close()

    def _run(self, entry: Any) -> None:
        runner = self._runner
        wait: Callable[[], StepDone | WorkDone]
        try:
            if runner is None:
                raise ProtocolError("Work came before the runner was loaded.")
            if type(entry) is Forward:
                self._half, self._may_improve = True, self._improve is not None
                runner.forward(entry)
                return
            if type(entry) is Sample:
                self._half = False
                wait = runner.sample(entry)
            else:
                wait = begin(runner, entry)
            if self._waits_here:
                self._post(wait())
                return
        except BaseException as error:  # this thread goes on, and the engine's end is in order
            self._lose(_step_of(entry), error)
            return
        if self._waiter is None:
            self._waiter = threading.Thread(target=self._wait, name=f"device-{self._engine}-waiter", daemon=True)
            self._waiter.start()
        self._asked += 1
        self._waits.put((_step_of(entry), wait))

    def _wait(self) -> None:
        while (item := self._waits.get()) is not None:
            step, wait = item
            if self._lost.is_set():
                continue
            try:
                done = wait()
            except BaseException as error:
                self._lose(step, error)
            else:
                self._post(done)
            self._answered += 1

    def _lose(self, step: int, error: BaseException) -> None:
        if not self._lost.is_set():
            self._lost.set()
            where = traceback.extract_tb(error.__traceback__)[-1:]
            at = f" at {where[0].filename.rsplit('/', 1)[-1]}:{where[0].lineno}" if where else ""
            text = described(error, 2000) + at
            self._post(DeviceLost(engine=self._engine, epoch=self._epoch, step=step, error=text))


def _step_of(entry: Entry) -> int:
    return entry.step if isinstance(entry, Forward | Sample) else entry.after


class InlineDeviceQueue:
    """The same order without threads, for tests: work runs inside `deliver`, or, with `manual`, one step a call of `step()`."""

    name = "device"
    takes: frozenset[type[Message]] = frozenset({DeviceWork})
    gives: frozenset[type[Message]] = frozenset({StepDone, DeviceLost, WorkDone})

    def __init__(self, runner: Runner, *, engine: int, epoch: int, post: Callable[[Message], None], manual: bool = False) -> None:
        self._runner = runner
        self._engine = engine
        self._epoch = epoch
        self._post = post
        self._manual = manual
        self._order = StepOrder(engine=engine, epoch=epoch)
        self._finished: list[Callable[[], StepDone | WorkDone]] = []
        self._lost = False

    @property
    def waiting(self) -> int:
        """Steps whose results have not been posted."""
        return len(self._finished)

    def deliver(self, message: Message, index: int | None = None) -> None:
        assert isinstance(message, DeviceWork)
        for entry in self._order.put(message):
            if self._lost:
                return
            try:
                if isinstance(entry, Forward):
                    self._runner.forward(entry)
                    continue
                self._finished.append(self._runner.sample(entry) if isinstance(entry, Sample) else begin(self._runner, entry))
            except Exception as error:
                self._lost = True
                self._post(DeviceLost(engine=self._engine, epoch=self._epoch, step=_step_of(entry), error=described(error)))
                return
            if not self._manual:
                self.step()

    def step(self) -> bool:
        """Post the oldest finished step. False if there is none."""
        if not self._finished or self._lost:
            return False
        self._post(self._finished.pop(0)())
        return True

    def close(self) -> None:
        self._runner.close()
