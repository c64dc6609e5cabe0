"""Keeps the processes alive, and ends them in order.

What it is: root's one actor. Child specs are data; from what happens to children (up, down, exited, heartbeats) and from signals it decides
what is started, restarted, told and killed, and with which exit status root leaves. It is pure: time comes from a clock, processes and
links are ports, so that tests drive every path without either.
What it does not know: how a process is started (core/processes/spawn.py), what roles do.

Strategy: one for one. A child that was up and dies (or hangs: no heartbeat, or an engine with work and no finished step, for `watchdog_s`) is started again (epoch + 1), at once the first time, then after growing pauses; more than
`max_restarts` within `window_s`, or a death before the child was ever up, ends the server with status 1. An engine's death is told to text
(EngineDown, later EngineUp): to clients it is a pause. A new text process is told which engines are up.
Stop ladder: the first signal drains (edges refuse and finish, then text), for at most `drain_s`; then Stop; then SIGTERM; then SIGKILL. A second
signal ends the drain now, in the same order (edges end each stream with an error event); a third skips to the end. A signal within SAME_S of
the one before is that one again: make and timeout pass on what their group got too. Exit status: 0 after a clean drain; 128 + n if signal n
cut requests short; 1 if a child failed for good.
Long, because the strategies share one state that must be seen whole.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator

import msgspec

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
    Message,
    Notice,
    Ready,
    Signalled,
    StartChild,
    StartupPhase,
    Stop,
    Tick,
    Vital,
    Vitals,
)
from penstock.core.protocol.errors import FinalError, PenstockError, described
from penstock.core.runtime.actor import To
from penstock.core.runtime.clock import Clock

STOP_S = 3.0
"""From Stop to SIGTERM."""
TERM_S = 0.5
"""From SIGTERM to SIGKILL."""
HARD_S = 0.3
"""From Stop to SIGKILL when somebody is in a hurry."""
SAME_S = 1.0
"""A signal so soon after another is a copy of it."""
DUMP_S = 2.0
"""A process that hangs has so long to write its threads' stacks, or to go on after all, before SIGKILL."""
ASLEEP_S = 2.0
"""Ticks further apart than this: root itself did not run (a laptop's lid, SIGSTOP), so nobody's silence meanwhile means anything."""
LATE_S = 1.0
"""Longer than `drain_s` that root waits for the children's own deadline."""


class ChildSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A child as data: what runs in it, and what it gets. `(role, id)` is its name; there may be any number of one role."""

    role: str
    id: int
    module: str
    function: str = "run"
    env: dict[str, str] = {}
    listeners: list[str] = []
    """The listening sockets that it inherits, by name."""
    pool: str = ""
    """A text or engine process serves this pool; texts hear of its engines only. "" is everybody's."""


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """What a child says about its own end, in ChildDown.detail as JSON. `final`: starting it again cannot help."""

    message: str
    kind: str = ""
    code: str = ""
    param: str | None = None
    final: bool = False


class Child:
    """One child as the supervisor sees it. `index` is its place in the children port."""

    def __init__(self, index: int, spec: ChildSpec) -> None:
        self.index = index
        self.spec = spec
        self.epoch = 0
        self.state = "down"
        """down | waiting (for its restart) | starting | up"""
        self.was_up = False
        self.drained = False
        self.drain_sent = False
        self.restarts: list[int] = []
        self.start_at_ns = 0
        self.failure: Failure | None = None
        self.facts: EngineFacts | None = None
        self.beat_ns = 0
        self.moved_ns = 0
        self.progress = 0
        self.pending = 0
        self.beats = False
        """It gave a sign of life in this life: imports, which come before the first, may take any time."""
        self.hung_ns = 0
        """When it was asked for its stacks because it hangs; 0: it does not."""
        self.phase = "imports"
        self.phase_s = 0.0
        self.phases: list[StartupPhase] = []
        """Of this life: what each phase of the start took."""

    @property
    def name(self) -> str:
        return f"{self.spec.role}-{self.spec.id}"

    @property
    def alive(self) -> bool:
        return self.state in ("starting", "up")


class Supervisor:
    name = "supervisor"
    takes: frozenset[type[Message]] = frozenset(
        {ChildUp, ChildDown, ChildExited, EngineUp, Heartbeat, StartupPhase, Drained, Signalled, Tick}
    )
    gives: frozenset[type[Message]] = frozenset(
        {StartChild, KillChild, Drain, Stop, EngineUp, EngineDown, Vitals, StartupPhase, Notice, Ready, Leave}
    )

    def __init__(
        self,
        specs: Iterable[ChildSpec],
        *,
        clock: Clock,
        drain_s: float,
        max_restarts: int,
        window_s: float = 60.0,
        watchdog_s: float = 0.0,
    ) -> None:
        self.children = [Child(index, spec) for index, spec in enumerate(specs)]
        self._by_name = {(child.spec.role, child.spec.id): child for child in self.children}
        self._clock = clock
        self._drain_s = drain_s
        self._max_restarts = max_restarts
        self._window_s = window_s
        self._watchdog_s = watchdog_s
        """0: nobody is ended for hanging."""
        self._began_ns = self._ticked_ns = clock.now_ns()
        self._announced = False
        self._complete = False
        self.phase = "running"
        """running | draining | stopping | terminating | killing | over"""
        self._deadline_ns = 0
        self._signum = 0
        self._signal_ns = 0
        """When the last signal came that was not a copy."""
        self._hurried = False
        """The drain was ended by a second signal."""
        self._cut = 0
        """Requests that the children ended before their time."""
        self._status = 0
        self._error = ""

    @property
    def leaving(self) -> bool:
        """A stop is under way: ticks should come often."""
        return self.phase != "running"

    def start(self) -> Iterator[StartChild]:
        """The first start of every child, side by side. Before anything is handled."""
        for child in self.children:
            yield self._launch(child)

    def handle(self, message: Message) -> Iterator[Message | To]:
        if isinstance(message, Tick):
            yield from self._tick()
        elif isinstance(message, Signalled):
            yield from self._signalled(message.signum)
        elif isinstance(message, ChildExited):
            yield from self._exited(message)
        else:
            role, id_ = ("engine", message.engine) if isinstance(message, EngineUp) else (message.role, message.id)  # type: ignore[attr-defined]
            child = self._by_name.get((role, id_))
            if child is None or not child.alive or getattr(message, "epoch", child.epoch) != child.epoch:
                return  # of an earlier life
            yield from self._heard(child, message)

    # --- children speak

    def _heard(self, child: Child, message: Message) -> Iterator[Message | To]:
        if isinstance(message, Heartbeat):
            if message.progress != child.progress or message.pending == 0:
                child.moved_ns = message.at_ns
            child.beat_ns, child.progress, child.pending, child.beats = message.at_ns, message.progress, message.pending, True
            if child.hung_ns and not self._hangs(child, self._clock.now_ns()):
                child.hung_ns, child.failure = 0, None
                yield Notice(level="warning", event="process goes on", fields={"process": child.name, "epoch": child.epoch})
        elif isinstance(message, StartupPhase):
            yield from self._phase_began(child, message)
            yield Notice(
                level="info", event="startup", fields={"process": child.name, "phase": message.phase, "seconds": round(message.seconds, 3)}
            )
        elif isinstance(message, EngineUp):
            child.facts = message.facts
            yield from self._tell_texts(message, child.spec.pool)
            yield from self._up(child)
        elif isinstance(message, ChildUp):
            if child.spec.role != "engine":  # an engine is up when its facts are known
                yield from self._up(child)
        elif isinstance(message, ChildDown):
            if not child.hung_ns:
                child.failure = _failure(message.detail)
        elif isinstance(message, Drained):
            child.drained = True
            if message.cut and self._signum:
                self._cut += message.cut
                self._worse(128 + self._signum, "")
            yield from self._drain_on()

    def _phase_began(self, child: Child, message: StartupPhase) -> Iterator[To]:
        """A child tells when each phase began; text exports how long each took, so that they add up to the whole start."""
        took = StartupPhase(role=message.role, id=message.id, phase=child.phase, seconds=max(0.0, message.seconds - child.phase_s))
        child.phase, child.phase_s = message.phase, message.seconds
        child.phases.append(took)
        for text in self._role("text"):
            if text.state == "up":  # one that comes up later is told then
                yield To(took, text.index)

    def _up(self, child: Child) -> Iterator[Message | To]:
        child.state = "up"
        child.was_up = True
        child.beat_ns = child.moved_ns = self._clock.now_ns()
        if child.spec.role == "text":
            for phase in (phase for other in self.children for phase in other.phases):
                yield To(phase, child.index)
            for engine in self._role("engine"):
                if engine.state == "up" and engine.facts is not None and engine.spec.pool == child.spec.pool:
                    yield To(EngineUp(engine=engine.spec.id, epoch=engine.epoch, facts=engine.facts), child.index)
        if self.phase == "draining":
            yield from self._drain_on()
        elif self.phase == "running" and not self._complete and all(c.state == "up" for c in self.children):
            self._complete = True
            facts = [c.facts for c in self._role("engine") if c.facts is not None]
            seconds = (self._clock.now_ns() - self._began_ns) / 1e9
            yield Ready(facts=facts, first=not self._announced, seconds=seconds)
            self._announced = True

    def _role(self, role: str) -> list[Child]:
        return [child for child in self.children if child.spec.role == role]

    def _tell_texts(self, message: Message, pool: str | None = None) -> Iterator[To]:
        """All of them, or those of one pool."""
        for text in self._role("text"):
            if text.alive and pool in (None, text.spec.pool):
                yield To(message, text.index)

    # --- children die

    def _exited(self, message: ChildExited) -> Iterator[Message | To]:
        child = self._by_name.get((message.role, message.id))
        if child is None or child.epoch != message.epoch or not child.alive:
            return
        starting = child.state == "starting"
        child.state = "down"
        why = child.failure.message if child.failure else _describe(message.status)
        if child.spec.role == "engine":
            child.facts = None
            yield from self._tell_texts(EngineDown(engine=child.spec.id, epoch=child.epoch, reason=why), child.spec.pool)
        if self.phase in ("running", "draining"):
            yield from self._died(child, starting, why)
        if self.phase not in ("running", "draining"):
            yield from self._maybe_leave()

    def _died(self, child: Child, starting: bool, why: str) -> Iterator[Message | To]:
        self._complete = False
        yield Notice(level="error", event="process died", fields={"process": child.name, "epoch": child.epoch, "reason": why})
        if starting and (not child.was_up or (child.failure is not None and child.failure.final)):
            said = child.failure is not None and child.failure.code  # a PenstockError speaks for itself
            yield from self._give_up(why if said else f"The {child.name} process could not start: it {why}.")
            return
        if self.phase == "draining" and child.spec.role != "engine":
            # Its streams are gone with it; a new one would have nothing to finish.
            child.drained = True
            self._worse(1, f"The {child.name} process died while requests were being finished: {_because(child, why)}")
            yield from self._drain_on()
            return
        now = self._clock.now_ns()
        child.restarts = [at for at in child.restarts if now - at < self._window_s * 1e9]
        if len(child.restarts) >= self._max_restarts:
            times = f"{len(child.restarts)} restarts within {self._window_s:g} s"
            yield from self._give_up(f"The {child.name} process failed for good after {times}: {_because(child, why)}")
            return
        pause_s = 0.0 if not child.restarts else min(0.5 * 2 ** (len(child.restarts) - 1), 10.0)
        child.restarts.append(now)
        child.state = "waiting"
        child.start_at_ns = now + round(pause_s * 1e9)
        if pause_s == 0:
            yield self._launch(child)

    def _launch(self, child: Child) -> StartChild:
        child.epoch += 1
        child.state = "starting"
        child.failure = None
        child.drain_sent = False
        child.beat_ns = child.moved_ns = self._clock.now_ns()
        child.progress = child.pending = child.hung_ns = 0
        child.beats = False
        child.phase, child.phase_s, child.phases = "imports", 0.0, []
        return StartChild(role=child.spec.role, id=child.spec.id, epoch=child.epoch)

    def _give_up(self, error: str) -> Iterator[Message | To]:
        self._worse(1, error)
        yield from self._stop("a process failed for good", STOP_S)

    def _worse(self, status: int, error: str) -> None:
        """The first bad news decides the status and the line for the user."""
        if self._status == 0:
            self._status, self._error = status, error

    # --- the stop ladder

    def _signalled(self, signum: int) -> Iterator[Message | To]:
        now = self._clock.now_ns()
        if self._signum and now - self._signal_ns < SAME_S * 1e9:
            return
        self._signal_ns = now
        if self.phase == "running":
            self._signum = signum
            yield Notice(level="info", event="stopping", fields={"signal": signal.Signals(signum).name, "drain_s": self._drain_s})
            if not self._announced:  # nothing was ever accepted
                yield from self._stop("stopped while starting", STOP_S)
                return
            self.phase = "draining"
            self._deadline_ns = now + round((self._drain_s + LATE_S) * 1e9)
            yield from self._drain_on()
        elif self.phase == "draining" and not self._hurried:
            self._signum = signum
            self._hurried = True
            self._deadline_ns = min(self._deadline_ns, now + round(LATE_S * 1e9))
            yield Notice(level="warning", event="second signal: ending what runs", fields={"signal": signal.Signals(signum).name})
            for child in self.children:
                child.drain_sent = False  # again, with a deadline that has come
            yield from self._drain_on()
        elif self.phase == "draining":
            self._worse(128 + signum, "")
            yield from self._stop("third signal", HARD_S, kill=True)
        elif self.phase in ("stopping", "terminating"):
            self._signum = signum
            self._worse(128 + signum, "")
            yield from self._kill()

    def _drain_on(self) -> Iterator[Message | To]:
        """Edges first; when they have finished, text; when it has nothing left either, the engines; then stop."""
        if self.phase != "draining":
            return
        left_s = max(0.0, (self._deadline_ns - self._clock.now_ns()) / 1e9 - LATE_S)
        for role in ("edge", "text", "engine"):
            # An engine that is being restarted has nothing left to do.
            open_ = [child for child in self._role(role) if not child.drained and (role != "engine" or child.state == "up")]
            for child in open_:
                if child.state == "up" and not child.drain_sent:
                    child.drain_sent = True
                    yield To(Drain(deadline_s=left_s), child.index)
            if open_:
                return
        yield from self._stop("drained", STOP_S)

    def _stop(self, reason: str, patience_s: float, *, kill: bool = False) -> Iterator[Message | To]:
        self.phase = "terminating" if kill else "stopping"
        self._deadline_ns = self._clock.now_ns() + round(patience_s * 1e9)
        for child in self.children:
            if child.alive:
                yield To(Stop(reason=reason), child.index)
            else:
                child.state = "down"
        yield from self._maybe_leave()

    def _signal_all(self, signum: int) -> Iterator[Message]:
        for child in self.children:
            if child.alive:
                yield KillChild(role=child.spec.role, id=child.spec.id, epoch=child.epoch, signum=signum)

    def _kill(self) -> Iterator[Message]:
        self.phase = "killing"
        yield from self._signal_all(signal.SIGKILL)

    def _maybe_leave(self) -> Iterator[Message]:
        if self.phase != "over" and not any(child.alive for child in self.children):
            self.phase = "over"
            error = self._error
            if not error and self._cut:
                by = "a second signal" if self._hurried else "the shutdown deadline"
                error = f"{self._cut} {'request was' if self._cut == 1 else 'requests were'} cut short by {by}"
            yield Leave(status=self._status, error=error)

    def _tick(self) -> Iterator[Message | To]:
        now = self._clock.now_ns()
        if self.phase in ("running", "draining"):
            yield from self._watch(now)
            for child in self.children:
                if child.state == "waiting" and now >= child.start_at_ns:
                    yield self._launch(child)
            vitals = Vitals(rows=[self._vital(child, now) for child in self.children])
            yield from self._tell_texts(vitals)
        if self.phase == "running" or now < self._deadline_ns:
            return
        if self.phase == "draining":
            self._worse(128 + self._signum, "Requests were still running when the shutdown deadline passed")
            yield from self._stop("the shutdown deadline passed", HARD_S if self._hurried else STOP_S, kill=self._hurried)
        elif self.phase == "stopping":
            self.phase = "terminating"
            self._deadline_ns = now + round(TERM_S * 1e9)
            yield from self._signal_all(signal.SIGTERM)
        elif self.phase == "terminating":
            yield from self._kill()

    def _watch(self, now: int) -> Iterator[Message]:
        """End who hangs: first its threads' stacks (SIGUSR2), then SIGKILL. Its exit does the rest."""
        slept = now - self._ticked_ns
        self._ticked_ns = now
        if slept > ASLEEP_S * 1e9:
            for child in self.children:
                child.beat_ns = min(now, child.beat_ns + slept)
                child.moved_ns = min(now, child.moved_ns + slept)
        for child in self.children:
            if child.hung_ns:
                if child.alive and now - child.hung_ns >= DUMP_S * 1e9:
                    yield KillChild(role=child.spec.role, id=child.spec.id, epoch=child.epoch, signum=signal.SIGKILL)
            elif why := self._hangs(child, now):
                child.hung_ns = now
                child.failure = Failure(message=f"hung: {why}")
                yield Notice(level="error", event="process hangs", fields={"process": child.name, "epoch": child.epoch, "reason": why})
                yield KillChild(role=child.spec.role, id=child.spec.id, epoch=child.epoch, signum=signal.SIGUSR2)

    def _hangs(self, child: Child, now: int) -> str:
        """How it shows, or nothing. A start may take any time while it gives signs of life, and so may a step on a CPU; text and edges wait for engines
        and clients."""
        if self._watchdog_s <= 0 or not child.alive or not (child.beats or child.state == "up"):
            return ""
        silent, stalled = (now - child.beat_ns) / 1e9, (now - child.moved_ns) / 1e9
        if silent >= self._watchdog_s:
            return f"it gave no sign of life for {silent:.0f} s"
        bounded = child.state == "up" and child.facts is not None and child.facts.bounded_steps
        if bounded and child.pending and stalled >= self._watchdog_s:
            return f"it finished no step for {stalled:.0f} s, with {child.pending} sequences and steps waiting"
        return ""

    def _vital(self, child: Child, now: int) -> Vital:
        up = child.state == "up"
        return Vital(
            role=child.spec.role,
            id=child.spec.id,
            up=up,
            age_s=max(0.0, (now - child.beat_ns) / 1e9) if up else 0.0,
            progress=child.progress,
            pending=child.pending,
            stalled_s=max(0.0, (now - child.moved_ns) / 1e9) if up and child.pending else 0.0,
        )


def _because(child: Child, why: str) -> str:
    """A PenstockError is a sentence of its own; anything else continues "it"."""
    return why if child.failure is not None and child.failure.code else f"it {why}."


def _describe(status: int) -> str:
    """A wait status in words that follow "it"."""
    if status < 0:
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = f"signal {-status}"
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return f"was killed by {name}{hint}"
    return f"left with status {status}"


def _failure(detail: str) -> Failure | None:
    try:
        return msgspec.json.decode(detail, type=Failure) if detail else None
    except msgspec.MsgspecError:
        return Failure(message=detail)


def failure_of(error: BaseException) -> str:
    """ChildDown.detail for an exception."""
    if isinstance(error, PenstockError):
        return msgspec.json.encode(
            Failure(
                message=error.message, kind=type(error).__name__, code=error.code, param=error.param, final=isinstance(error, FinalError)
            )
        ).decode()
    return msgspec.json.encode(Failure(message=f"failed with {described(error, 2000)}", kind=type(error).__name__)).decode()
