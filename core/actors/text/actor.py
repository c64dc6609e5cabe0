"""The tokenizer actor: everything between an edge and the engines.

What it is: it checks a Submit, has it rendered and tokenised (Encode to its worker), decides admission, writes the ledger entry and admits it to an
engine; it turns the engines' tokens into text for the edges; it keeps every stream alive over an engine's death and re-admits the requests
with the tokens it received. It answers the edges' questions and holds the metrics. It never blocks and never waits.
What it does not know: sockets, threads, HTTP, how a model computes.

This file takes the messages apart and knows edges and time; intake.py, lane.py and ending.py are the stages of a request, on one desk.py; pool.py is
the model. A message to an edge is yielded as `To(message, edge)`, edge -1 being a caller in the same process; one to an engine as
`To(message, engine)`. Life of a request here: ENCODING (with the worker) -> WAITING (no engine, or replays before it) -> ADMITTED -> gone. A
request counts as queued until its first step.
It is long because each message that text takes has its place here, so that one file shows all of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec

from penstock.core.actors.text import queries
from penstock.core.actors.text.desk import Desk, Outbound
from penstock.core.actors.text.ending import Ending
from penstock.core.actors.text.formats import Formats
from penstock.core.actors.text.health import Health
from penstock.core.actors.text.intake import Intake
from penstock.core.actors.text.lane import MAX_STRIKES, Lane
from penstock.core.actors.text.ledger import Request
from penstock.core.actors.text.pool import Pool
from penstock.core.actors.text.readers import Readers
from penstock.core.actors.text.tenants import REVOKED, Tenants
from penstock.core.contract.text import Tokenizer
from penstock.core.protocol.config import Config
from penstock.core.protocol.errors import Draining, EngineUnavailable, InvalidRequest, NotFound, PenstockError, Unauthorized, described
from penstock.core.protocol.messages import (
    Abort,
    Admit,
    Answer,
    Attach,
    Attached,
    Cancel,
    CheckGrammar,
    Counted,
    Detach,
    Drain,
    Drained,
    EdgeStats,
    Encode,
    Encoded,
    EngineDown,
    EngineUp,
    Finished,
    GrammarChecked,
    Message,
    Park,
    PeerDown,
    PeerUp,
    Query,
    Rejected,
    Spending,
    StartupPhase,
    StepTokens,
    Submit,
    Tables,
    TextDelta,
    TextReady,
    Tick,
    Unpark,
    Vitals,
    Vocabulary,
)
from penstock.core.runtime.actor import Ask, Handling, To
from penstock.core.runtime.clock import Clock, SystemClock
from penstock.core.telemetry.metrics import Metrics
from penstock.core.telemetry.traces import NO_TRACES, Traces

REPLAY_TIMEOUT_S = 300.0
"""Streams outlive a dead engine for so long; then they fail as retryable."""


FROM_ROOT: frozenset[type[Message]] = frozenset({Drain, EngineDown, Vitals, StartupPhase, Tables})
TO_ROOT: frozenset[type[Message]] = frozenset({Drained, Spending})


class TextActor:
    """`names`: what requests may call the model, the reported one first. `defaults`: sampling defaults (resolve.generation_defaults).

    `grammars` names the grammar backend that text has ("": none). `secret` salts cache keys, `rng` draws missing seeds; `hooks` is a pluggy relay (request_finished, engine_ready, engine_lost); `log` a
    structlog logger. `shard` is this text process's id.
    """

    name = "text"
    takes: frozenset[type[Message]] = frozenset(
        {
            Submit,
            Cancel,
            Park,
            Unpark,
            Attach,
            Detach,
            Query,
            EdgeStats,
            StepTokens,
            EngineUp,
            EngineDown,
            Encoded,
            GrammarChecked,
            Tick,
            Drain,
            PeerUp,
            PeerDown,
            Vitals,
            StartupPhase,
            Tables,
        }
    )
    gives: frozenset[type[Message]] = frozenset(
        {
            Encode,
            CheckGrammar,
            Vocabulary,
            Admit,
            Abort,
            Park,
            Unpark,
            TextDelta,
            Attached,
            Counted,
            Finished,
            Rejected,
            Answer,
            TextReady,
            Drained,
            Spending,
        }
    )

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        *,
        names: list[str],
        model_path: str = "",
        defaults: dict[str, Any] | None = None,
        clock: Clock | None = None,
        metrics: Metrics | None = None,
        traces: Traces = NO_TRACES,
        secret: bytes | None = None,
        formats: Formats | None = None,
        rng: random.Random | None = None,
        max_strikes: int = MAX_STRIKES,
        hooks: Any = None,
        log: Any = None,
        shard: int = 0,
        root: bool = True,
        grammars: str = "",
    ) -> None:
        """`root`: there is one, that tells of processes' lives and drains. Without it these messages are not in the wiring."""
        if not root:
            self.takes, self.gives = self.takes - FROM_ROOT, self.gives - TO_ROOT
        self._clock: Clock = clock or SystemClock()
        self.metrics = metrics or Metrics([names[0]], compat=config.metrics_compat == "vllm")
        self._desk = desk = Desk(config, clock=self._clock, metrics=self.metrics, traces=traces, hooks=hooks, log=log)
        if root and config.tables is not None:
            desk.tenants = Tenants(self._clock, names)
        self.ledger, self.admission = desk.ledger, desk.admission
        self._streams = desk.streams
        parts: dict[str, Any] = {"grammars": grammars, "formats": formats}
        self._pool = Pool(desk, tokenizer, names=names, model_path=model_path, defaults=defaults, secret=secret, **parts)
        self._ending = Ending(desk, self._pool)
        self._intake = Intake(desk, self._pool, self._ending, place=self._lane_for, rng=rng or random.SystemRandom())
        self._readers = Readers(desk, self._ending)
        self._lanes: dict[int, Lane] = {}
        self._max_strikes = max_strikes
        self._shard = shard
        self._edges: set[int] = set()
        self._created_s = self._clock.wall_ns() // 1_000_000_000
        self._drained = False
        self._said: tuple[bool, str, int] | None = None
        self._health = Health(desk, self._pool, self._lanes)
        self._handlers: dict[type[Message], Callable[[Any], Handling]] = {
            Submit: self._submit,
            Cancel: self._cancel,
            Park: self._park,
            Unpark: self._park,
            Attach: self._attach,
            Detach: self._readers.detach,
            Query: self._query,
            EdgeStats: self._edge_stats,
            StepTokens: self._step,
            EngineUp: self._engine_up,
            EngineDown: self._engine_down,
            Encoded: self._intake.encoded,
            GrammarChecked: self._grammar_checked,
            Tick: self._tick,
            Drain: self._drain,
            PeerUp: self._peer_up,
            PeerDown: self._peer_down,
            Vitals: self._take_vitals,
            StartupPhase: self._take_phase,
            Tables: self._take_tables,
        }

    def handle(self, message: Message) -> Handling:
        handling = self._handlers[type(message)](message)
        return handling if self._desk.drain_at_ns is None else self._until_drained(handling)

    def failed(self, message: Message, error: Exception) -> Handling:
        """A handler raised: what concerns one request or question fails alone; anything else is not survivable."""
        inner = PenstockError("The server made an error while it handled this request. It is logged.")
        if isinstance(message, Submit):
            request = self.ledger.requests.get(message.key)
            if request is None or request.submit is not message:
                return self._desk.refuse(message.key, message.edge, inner)
            return self._until_drained(self._ending.abandon(request, inner))
        if isinstance(message, Query):
            return [To(queries.failure(message, inner), message.edge)]
        raise error

    def vocabulary(self) -> Vocabulary:
        """As engines get it."""
        return self._pool.receiver.vocabulary()

    # --- requests

    def _submit(self, message: Submit) -> Iterator[Outbound]:
        yield from self._greet(message.edge)
        tenants = self._desk.tenants
        if tenants is None or not tenants.waits(message):
            yield from self._intake.submit(message)

    def _park(self, message: Park | Unpark) -> Iterable[Outbound]:
        request = self.ledger.requests.get(message.key)
        return () if request is None else self._readers.hold(request, message.why, isinstance(message, Park))

    def _cancel(self, message: Cancel) -> Iterable[Outbound]:
        request = self.ledger.requests.get(message.key)
        if request is None:
            if self._desk.tenants is not None:
                self._desk.tenants.leave(key=message.key)
            return ()
        return self._ending.drop(request, message.cause) if request.kept is None else self._ending.revoke(request, message.cause)

    def _attach(self, message: Attach) -> Iterator[Outbound]:
        yield from self._greet(message.edge)
        yield from self._readers.attach(message)

    def _grammar_checked(self, message: GrammarChecked) -> Iterator[Outbound]:
        owner = self._pool.obedience.owner(message)
        if isinstance(owner, Request):
            yield from self._intake.compiled(owner, message)
        elif owner is not None:
            self._pool.receiver.verified(owner, message.error, disobeys=message.error_status == InvalidRequest.status)
            yield from self._ending.deliver()
            if (lane := owner.choice.request.lane) is not None:
                yield from lane.pump()

    # --- engines

    def _lane_for(self, request: Request) -> Lane:
        """Where a request goes that is ready: the first engine that is up, or the first that will be again."""
        lanes = self._lanes.values()
        return next((lane for lane in lanes if lane.up), None) or next(iter(lanes))

    def _step(self, message: StepTokens) -> Iterable[Outbound]:
        lane = self._lanes.get(message.engine)
        if lane is None:
            self.metrics.count("dropped_rows", "stale", by=len(message.seqs))
            return ()
        return self._readers.told(lane.step(message)) if len(self._streams) else lane.step(message)

    def _engine_up(self, message: EngineUp) -> Iterator[Outbound]:
        lane = self._lanes.get(message.engine)
        if lane is None:
            lane = self._lanes[message.engine] = Lane(self._desk, self._pool, self._ending, message.engine, max_strikes=self._max_strikes)
        yield from lane.rise(message)
        yield from self._say_ready()

    def _engine_down(self, message: EngineDown) -> Iterator[Outbound]:
        yield from self._lose(message.engine, message.epoch, message.reason)

    def _lose(self, engine: int, epoch: int, reason: str) -> Iterator[Outbound]:
        lane = self._lanes.get(engine)
        if lane is not None and lane.up and lane.epoch == epoch:
            yield from lane.lose(reason)
            yield from self._say_ready()

    # --- time, draining, edges

    def _tick(self, message: Tick) -> Iterator[Outbound]:
        now, drain_at_ns = message.now_ns, self._desk.drain_at_ns
        if drain_at_ns is not None and now >= drain_at_ns and self.ledger.requests:
            yield from self._ending.everything("abort", Draining("The server shut down before this request was done.", retry_after_s=2.0))
        lanes = self._lanes.values()
        if lanes and self.ledger.requests and all(not lane.up and now - lane.down_since_ns > REPLAY_TIMEOUT_S * 1e9 for lane in lanes):
            error = EngineUnavailable(f"The engine died and did not come back within {REPLAY_TIMEOUT_S:g} s. Send the request again.")
            yield from self._ending.everything("error", error)
        for lane in lanes:
            lane.late.over(now)
            yield from lane.pump()
        yield from self._readers.tend(now)
        yield from self._say_ready(again=True)
        yield from self._say_spent()

    def _drain(self, message: Drain) -> Handling:
        deadline = self._clock.now_ns() + round(message.deadline_s * 1e9)
        before = self._desk.drain_at_ns
        self._desk.drain_at_ns = deadline if before is None else min(deadline, before)
        return self._until_drained(self._say_ready())

    def _until_drained(self, handling: Handling) -> Iterator[Outbound | Ask]:
        """What a handler does, and after it, while draining: is nothing left?"""
        yield from handling
        if self._desk.drain_at_ns is not None and not self._drained and not self.ledger.requests:
            self._drained = True
            yield from self._say_spent()
            yield Drained(role="text", id=self._shard)

    def _say_ready(self, *, again: bool = False) -> Iterator[Outbound]:
        """To all edges if it is news; `again`: in any case, as a sign of life."""
        word = self._health.readiness()
        self.metrics.set("ready", float(word.ready))
        if again or (word.ready, word.reason, word.epoch) != self._said:
            self._said = (word.ready, word.reason, word.epoch)
            for edge in sorted(self._edges):
                yield To(word, edge)

    def _greet(self, edge: int) -> Iterator[Outbound]:
        """An edge that we did not know learns whether it may send."""
        if edge not in self._edges:
            self._edges.add(edge)
            yield To(self._health.readiness(), edge)

    def _peer_up(self, message: PeerUp) -> Iterator[Outbound]:
        if message.role == "edge":
            self._edges.discard(message.id)
            yield from self._greet(message.id)

    def _peer_down(self, message: PeerDown) -> Iterator[Outbound]:
        if message.role == "engine":
            yield from self._lose(message.id, message.epoch, "its link broke")
        elif message.role == "edge":
            self._edges.discard(message.id)
            yield from self._readers.lose(message.id)
            if self._desk.tenants is not None:
                self._desk.tenants.leave(edge=message.id)
            for request in [request for request in self.ledger.requests.values() if request.kept is None and request.edge == message.id]:
                for out in self._ending.drop(request, "disconnect"):
                    if not (isinstance(out, To) and isinstance(out.message, TO_EDGE) and out.index == message.id):
                        yield out
            self._pool.receiver.forget(message.id)

    def _edge_stats(self, message: EdgeStats) -> Iterator[Outbound]:
        self.metrics.edge(message.edge, message.counters)
        return self._greet(message.edge)

    def _take_phase(self, message: StartupPhase) -> Iterable[Outbound]:
        self.metrics.set("startup_phase_seconds", message.seconds, f"{message.role}-{message.id}", message.phase)
        return ()

    def _take_vitals(self, message: Vitals) -> Iterable[Outbound]:
        self._health.vitals = message
        return ()

    # --- tenants

    def _take_tables(self, message: Tables) -> Iterator[Outbound]:
        """Others' limits count from now on, and what runs with a key that is none any more ends."""
        tenants = self._desk.tenants
        if tenants is None:
            return
        early = tenants.take(message)
        self.metrics.forget("slo_target_seconds")
        for name, slo in tenants.classes.items():
            self.metrics.know(name)
            for objective, ms in (("ttft", slo.ttft_ms), ("itl", slo.itl_ms)):
                if ms:
                    self.metrics.set("slo_target_seconds", ms / 1e3, name, objective)
        for request in [one for one in self.ledger.requests.values() if not tenants.good(one.submit.key_mark)]:
            if not self.ledger.has(request):
                continue  # another one's end was its own
            lane = request.lane
            yield from self._ending.abandon(request, Unauthorized(REVOKED))
            if lane is not None:  # others may have waited for its place
                yield from lane.pump()
        for submit in early:
            yield from self._submit(submit)

    def _say_spent(self) -> Iterator[Outbound]:
        """To root, if it is news."""
        spending = self._desk.tenants.spending() if self._desk.tenants is not None else None
        if spending is not None:
            yield spending

    # --- questions

    def _query(self, message: Query) -> Iterator[Outbound]:
        yield from self._greet(message.edge)
        try:
            if message.what in queries.LABOUR:
                yield self._intake.question(message)
                return
            if message.what in ("cancel", "control"):
                yield from self._control(message)
                return
            answer = self._answer(message)
        except PenstockError as error:
            answer = queries.failure(message, error)
        except Exception as error:  # a tokenizer's, say: this question alone feels it
            answer = queries.failure(message, PenstockError(f"The question could not be answered: {described(error, 300)}"))
        yield To(answer, message.edge)

    def _control(self, query: Query) -> Iterator[Outbound]:
        """Something is to happen to every prompt of a request, which may be another edge's. To other tenants it does not exist."""
        asked = queries.control_args(query)
        found = [
            request
            for request in self.ledger.requests.values()
            if request.submit.rid == asked.rid and asked.tenant in (None, request.submit.tenant)
        ]
        if asked.tenant is None:  # an administrator's own goes before others of that name
            found = [request for request in found if request.submit.tenant == asked.own] or found
        if not found:
            raise NotFound("No request of that id is running.")
        for request in found:
            if asked.do == "cancel":
                yield from self._ending.revoke(request)
            elif asked.do == "stop":
                yield from self._ending.stop(request)
            else:
                yield from self._readers.hold(request, "user", asked.do == "pause")
        yield To(queries.controlled(query, len(found)), query.edge)

    def _answer(self, query: Query) -> Answer:
        pool, facts = self._pool, self._pool.facts
        match query.what:
            case "models":
                return queries.models(query, pool.names, pool.model_path, self._created_s, facts)
            case "tokenizer_info":
                return Answer(id=query.id, body=msgspec.json.encode(queries.tokenizer_info(pool.tokenizer, facts)))
            case "server_info":
                return queries.server_info(query, pool.names, self._desk.config, facts, self._health.epoch)
            case "health":
                return self._health.answer(query)
            case "stream":
                return queries.stream(query, self._streams)
            case "metrics":
                self._health.set_gauges()
                return Answer(id=query.id, body=self.metrics.render())
        raise NotFound(f"This server cannot answer {query.what!r}.")


TO_EDGE = (TextDelta, Attached, Counted, Finished, Rejected, Answer, TextReady)
