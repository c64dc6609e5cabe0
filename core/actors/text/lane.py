"""A lane: one engine, as text knows it, over all its lives.

What it is: which life (epoch) runs and whether it is up; the requests that wait for it, in order; what happens to them when it dies and comes
back: every request waits again with the tokens that were received for it, replays at the engine's pace, and those under which an engine died
before they got a token (suspects) one at a time, until they are let through or condemned. Everything for the engine is yielded as
`To(message, engine)`.
What it does not know: how requests come in (intake.py), what their end means (ending.py), other lanes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from penstock.core.actors.text.desk import Desk, Outbound
from penstock.core.actors.text.ending import Ending
from penstock.core.actors.text.late import Late
from penstock.core.actors.text.ledger import ADMITTED, GENERAL, WAITING, Choice, Request
from penstock.core.actors.text.pool import Pool
from penstock.core.protocol.columns import i64
from penstock.core.protocol.control import EngineFacts, EngineUp, Vitals
from penstock.core.protocol.messages import Abort, Park, StepTokens
from penstock.core.runtime.actor import To

MAX_STRIKES = 2
"""So many engines may die under a request that gets nowhere. After the first, it is a suspect and runs as the only one of its kind; after the
last it is failed: one request that kills engines must not take the server with it."""
SILENT_S = 4.0
"""An engine that root has not heard for so long stands still: it beats once a second, and load balancers should know within ten."""
STUCK_S = 6.0
"""The same for one whose device says that no step takes long, has work, and finishes none."""


class Lane:
    """`max_strikes`: after so many deaths without progress a request is condemned."""

    def __init__(self, desk: Desk, pool: Pool, ending: Ending, engine: int, *, max_strikes: int = MAX_STRIKES) -> None:
        self._desk = desk
        self._pool = pool
        self._ending = ending
        self._max_strikes = max_strikes
        self.engine = engine
        self.epoch = 0
        self.facts: EngineFacts | None = None
        self.up = False
        self.down_since_ns = 0
        self.outbox: deque[Request] = deque()
        """Encoded requests that the engine has not been told of: replays, and whoever came behind them."""
        self.suspects: deque[Request] = deque()
        """Those under which an engine died before they got a token."""
        self._trial: Request | None = None
        self.replaying: set[int] = set()
        self._admitted = 0
        self._taught = False
        """Has this life been told the vocabulary?"""
        self.busy_since_ns = 0
        self.last_step_ns = 0
        self.last_token_ns = 0
        self.late = Late()
        self._off: list[str] = []
        """As the engine's last step has it: SpeculationStats.reasons."""

    # --- requests to the engine

    def enter(self, request: Request) -> Iterator[Outbound]:
        """A request is ready for the engine."""
        request.lane = self
        request.state = WAITING
        self.outbox.append(request)
        yield from self.pump()

    def pump(self) -> Iterator[Outbound]:
        """Admit what waits, in order; of replays only as many as the engine can run at a time; of suspects one at a time."""
        if not self.up or self.facts is None or not (self.outbox or self.suspects):
            return
        yield from self._pump_outbox(self.facts)
        while self.suspects and not self._on_trial():
            request = self.suspects.popleft()
            if self._desk.ledger.has(request):
                self._trial = request
                yield from self._admit(request)

    def _on_trial(self) -> bool:
        """Does a suspect run that has not got a token yet?"""
        request = self._trial
        if request is None or not self._desk.ledger.has(request) or request.output_tokens > request.mark:
            self._trial = None
        return self._trial is not None

    def _pump_outbox(self, facts: EngineFacts) -> Iterator[Outbound]:
        outbox = self.outbox
        while outbox:
            request = outbox[0]
            if not self._desk.ledger.has(request):
                outbox.popleft()
                continue
            if request.replays and len(self.replaying) >= facts.max_num_seqs:
                return
            outbox.popleft()
            yield from self._admit(request)

    def _admit(self, request: Request) -> Iterator[To]:
        now = self._desk.clock.now_ns()
        if not self._admitted:
            self.busy_since_ns = now
        self._admitted += 1
        request.state = ADMITTED
        request.admitted_ns = request.admitted_ns or now
        request.mark = request.output_tokens
        if request.replays:
            self.replaying.add(request.key)
            request.replaying = True
        if request.grammar and not self._taught:
            self._taught = True
            yield To(self._pool.receiver.vocabulary(), self.engine)
        yield To(request.admit(self._pool.receiver.ends, replay=request.replays > 0), self.engine)
        if request.parked:
            yield To(Park(key=request.key, why=sorted(request.parked)[0]), self.engine)

    def stop(self, request: Request, choices: list[Choice]) -> Iterator[To]:
        """The engine need not go on with these choices, if it knows them."""
        if choices and request.state == ADMITTED:
            yield To(Abort(seqs=i64([choice.seq for choice in choices])), self.engine)

    def speculates(self, request: Request) -> bool:
        """Does the engine still know how drafts of this request were?"""
        return self.up and self.facts is not None and self.facts.lookahead > 0 and request.state == ADMITTED

    @property
    def off(self) -> list[str]:
        """Drafters that are off, each with why."""
        names = [] if self.facts is None else self.facts.drafters
        return [f"{name}: {why}" for name, why in zip(names, self._off, strict=False) if why]

    def _switched(self, reasons: list[str], at_ns: int) -> None:
        """Drafters went off, or on again: it stands in the spans of what runs."""
        before = set(self.off)
        self._off = reasons
        news = [one for one in self.off if one not in before]
        for request in self._desk.ledger.requests.values() if news else ():
            if request.traced and request.state == ADMITTED and request.lane is self:
                request.events.append(("drafter_off", at_ns))
                request.off += news

    def release(self, request: Request) -> None:
        """The request is over."""
        if request.state == ADMITTED:
            self._admitted -= 1
        self.replaying.discard(request.key)

    # --- steps

    def step(self, message: StepTokens) -> Iterable[Outbound]:
        """The rows of one step, if they are of the life that runs."""
        metrics = self._desk.metrics
        if not self.up or message.epoch != self.epoch:
            metrics.count("dropped_rows", "stale", by=len(message.seqs))
            return ()
        now = self._desk.clock.now_ns()
        self.last_step_ns = now
        if len(message.tokens):
            self.last_token_ns = now
        metrics.engine_stats(message.engine, message.stats)
        drafts = message.stats.speculation
        if drafts is not None and drafts.reasons != self._off:
            self._switched(drafts.reasons, min(message.finished_ns or now, now))
        if self.late and len(message.drafted_seqs):
            self.late.figures(message)
        receiver = self._pool.receiver
        receiver.step(message, now)
        if not (receiver.begun or receiver.ended or receiver.aborts or receiver.held):
            if self.late:
                self.late.ended(message)
            return receiver.take()
        return self._after_step(now, message)

    def _after_step(self, now_ns: int, message: StepTokens) -> Iterator[Outbound]:
        """What a step changed besides text."""
        desk, receiver = self._desk, self._pool.receiver
        begun, receiver.begun = receiver.begun, []
        aborts, receiver.aborts = receiver.aborts, []
        held, receiver.held = receiver.held, []
        for request, first in begun:
            self.replaying.discard(request.key)
            if first:
                desk.admission.start(len(request.prompt), now_ns)
                request.series.count("tokens", "prompt_cached", by=request.cached)
                request.series.count("tokens", "prompt_computed", by=len(request.prompt) - request.cached)
        if aborts:
            yield To(Abort(seqs=i64(aborts)), self.engine)
        if held:
            yield from self._pool.obedience.verify(held, receiver.verified)
        yield from self._ending.deliver()
        if self.late:  # of what ended now, too: the engine may have ended it in the same step
            self.late.ended(message)
        yield from self.pump()

    # --- the engine's life

    def rise(self, message: EngineUp) -> Iterator[Outbound]:
        """A life begins; news of an earlier one is ignored."""
        if message.epoch < self.epoch or (self.up and message.epoch == self.epoch):
            return
        if self.up:
            yield from self.lose("it was replaced")
        self.epoch, self.facts, self.up = message.epoch, message.facts, True
        self._taught = False
        self._pool.take(message.facts)
        self._desk.metrics.engine_up(self._pool.names[0], message.engine, message.epoch, message.facts)
        self.last_step_ns = self._desk.clock.now_ns()
        self._desk.hook("engine_ready", engine=message.engine, epoch=message.epoch)
        for request in (*self.suspects, *self.outbox):
            self._pool.rehash(request, message.facts)
        yield from self.pump()

    def lose(self, reason: str) -> Iterator[Outbound]:
        """Every request waits again, with what was received for it; no stream ends but that of a request which may be what kills engines."""
        desk = self._desk
        self.up = False
        self.late.over()
        self._off = []
        self.down_since_ns = desk.clock.now_ns()
        desk.metrics.engine_down(self.engine)
        desk.hook("engine_lost", engine=self.engine, epoch=self.epoch, reason=reason)
        waiting = [request for request in (*self.suspects, *self.outbox) if desk.ledger.has(request)]
        lost = [request for request in desk.ledger.requests.values() if request.state == ADMITTED and request.lane is self]
        for request in [request for request in lost if not request.running]:
            lost.remove(request)
            request.lane = None  # its answers are being verified: no engine has anything to do with it any more
        for request in lost:
            request.state = WAITING
            request.replaying = False
            request.replays += 1
            request.strikes = 0 if request.output_tokens > request.mark else request.strikes + 1
            request.incarnation += 1
            for choice in request.choices:
                choice.incarnation = request.incarnation
                choice.mode = GENERAL  # its next row may tell that the replay has begun
            request.series.count("replays")
            request.series.count("tokens", "replayed", by=sum(len(choice.outputs) for choice in request.choices if not choice.finish))
        again = sorted(lost + waiting, key=lambda request: (not request.replays, request.arrival_ns))
        self.outbox = deque(request for request in again if not request.strikes)
        self.suspects = deque(request for request in again if 0 < request.strikes < self._max_strikes)
        self._trial = None
        self.replaying.clear()
        self._admitted = 0
        for request in again:
            if request.strikes >= self._max_strikes:
                yield from self._ending.condemn(request)

    # --- is it alive?

    def alive(self, vitals: Vitals | None) -> tuple[float | None, str]:
        """(seconds since a sign of life, as root last saw it or as its steps show; what to say if it stands still)."""
        if vitals is None or not self.up or self.facts is None:
            return None, ""
        step_s = (self._desk.clock.now_ns() - self.last_step_ns) / 1e9
        for vital in vitals.rows:
            if vital.role == "engine" and vital.id == self.engine and vital.up:
                age_s, stalled_s = min(vital.age_s, step_s), min(vital.stalled_s, step_s)
                if age_s > SILENT_S:
                    return age_s, f"the engine has not been heard of for {age_s:.0f} s"
                if self.facts.bounded_steps and stalled_s > STUCK_S:
                    return age_s, f"the engine has work and has finished no step for {stalled_s:.0f} s"
                return age_s, ""
        return None, ""
