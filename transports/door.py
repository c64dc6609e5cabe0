"""A door: the edge's way to one pool's text process.

What it is: it sends Submit, Cancel, Attach, Detach, Park, Unpark and Query over the link, hands each row of a TextDelta to the sink that owns its key, answers
queries, knows whether text is ready, and fails everything as retryable when the link is lost.
What it does not know: other pools, places and keys of requests (gateway.py), HTTP, JSON, SSE.
It is long because what is sent and what comes back share one table of keys, whose entries each call must leave right.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import msgspec

from penstock.core.protocol.errors import EngineUnavailable, PenstockError, StreamTaken, described, tamed
from penstock.core.protocol.messages import (
    CONTENT,
    Answer,
    Attach,
    Attached,
    Cancel,
    Counted,
    Detach,
    Extension,
    Finished,
    Hello,
    Limits,
    Message,
    Park,
    Query,
    Rejected,
    RowExtra,
    Submit,
    TextDelta,
    TextReady,
    Unpark,
)
from penstock.core.protocol.pools import PoolSpec
from penstock.core.protocol.standing import Standing
from penstock.core.runtime.clock import Clock
from penstock.transports.link import Link

log = logging.getLogger("penstock.edge.gateway")

QUERY_TIMEOUT_S = 10.0
SILENT_S = 4.0
"""A text process that has said nothing for so long stands still: it gives a sign of life every second."""

CancelCause = Any
"""A value of Cancel.cause."""


class Batch:
    """One TextDelta with its columns as lists, made only when somebody asks."""

    __slots__ = ("_extras", "_lists", "_starts", "channels", "delta")

    def __init__(self, delta: TextDelta) -> None:
        self.delta = delta
        self._lists: dict[str, list[int]] = {}
        self._starts: list[int] | None = None
        self.channels: list[int] | None = delta.channels.tolist() if len(delta.channels) else None
        """By row; None: all are CONTENT."""
        self._extras: dict[int, RowExtra] | None = {e.row: e for e in delta.extras} if delta.extras else None

    def column(self, name: str) -> list[int]:
        """A column of the TextDelta by its name ("output_tokens"), to be indexed by row."""
        found = self._lists.get(name)
        if found is None:
            found = self._lists[name] = getattr(self.delta, name).tolist()
        return found

    def channel(self, row: int) -> tuple[int, int]:
        """What a row's text is (a channel of messages.py), and of which of the choice's calls, -1: of none."""
        return (CONTENT, -1) if self.channels is None else (self.channels[row], self.column("calls")[row])

    def extra(self, row: int) -> RowExtra | None:
        """The rare parts of a row, if it has any: log-probabilities, stop_reason, error."""
        return None if self._extras is None else self._extras.get(row)

    def tokens(self, row: int) -> list[int]:
        """The ids of the row's tokens."""
        if self._starts is None:
            total = 0
            starts = self._starts = [0]
            for count in self.column("counts"):
                total += count
                starts.append(total)
        return self.column("tokens")[self._starts[row] : self._starts[row + 1]]


class Sink(Protocol):
    """Who gets what belongs to one key. Calls come from the loop, never re-entrantly; after `finished` or `failed` none follows. They must not
    block; an exception fails the request. A sink may have `said(error) -> str`: whose mistake an exception of its own is, for the log."""

    def row(self, choice: int, text: str, reason: str, row: int, batch: Batch) -> None:
        """A step brought something for one choice (0 to n - 1): `text` to append (may be ""), and `reason`: "" (goes on), or why the choice ended: "stop",
        "length", "tool_calls", "abort" (cancelled), "error" (`batch.extra(row)` says what). More about the row: `batch`, at index `row`."""
        ...

    def finished(self, message: Finished) -> None:
        """Every choice has ended."""
        ...

    def failed(self, error: PenstockError) -> None:
        """The request was refused, or is lost. `error` is what the client should get; a route may raise it."""
        ...


class Door:
    """One a pool in each edge. `unavailable(reason)` makes the error for who comes while there is no way in; `opened()` is told of each new link."""

    def __init__(
        self, pool: PoolSpec, edge: int, *, clock: Clock, unavailable: Callable[[str], PenstockError], opened: Callable[[], None]
    ) -> None:
        self.pool = pool
        self.model_name = pool.models[0] if pool.models else ""
        """The model's first name, once known."""
        self.fingerprint: str | None = None
        self.limits: Limits | None = None
        """How large a prompt may be, once text has said so."""
        self.delivered = 0
        """Rows handed to sinks; a count that moves when work is done."""
        self.joined = asyncio.Event()
        """Set once text has said, whatever it was, whether it is ready."""
        self.open = asyncio.Event()
        """Set while text takes requests (which may have to wait for an engine)."""
        self._edge = edge
        self._clock = clock
        self._unavailable = unavailable
        self._opened = opened
        self._ready = False
        """Is everything up that an answer needs?"""
        self._ages: dict[str, float] = {}
        self._heard_ns = 0
        self._sinks: dict[int, Sink] = {}
        self._awaited: dict[int, dict[int, Sink]] = {}
        """By the mark of an Attach, the sinks that take its place once it is answered: what still comes until then was meant for who listened before."""
        self._counted: dict[int, Callable[[Standing], None]] = {}
        """Who is told where the tenant of a key stands, until it was."""
        self._mark = 0
        self._link: Callable[[], Link | None] = lambda: None
        self._reason = "the text process is not connected yet"
        self._queries: dict[int, asyncio.Future[Answer]] = {}
        self._query_id = 0
        self._tasks: set[asyncio.Task[None]] = set()

    # --- the link's side

    def attach(self, link: Callable[[], Link | None]) -> None:
        """`link()` gives the current link, or None while there is none."""
        self._link = link

    def link_opened(self, _: Hello) -> None:
        self._reason = "the text process has not said yet that it is ready"
        self._heard_ns = self._clock.now_ns()
        self._opened()

    def link_closed(self, reason: str) -> None:
        """Text is gone: every stream fails as retryable."""
        self.open.clear()
        self._ready, self._ages = False, {}
        self._reason = f"the text process is gone ({reason})"
        sinks, self._sinks = self._sinks, {}
        for some in self._awaited.values():
            sinks |= some
        self._awaited.clear()
        self._counted.clear()
        for key, sink in sinks.items():
            lost = EngineUnavailable("The server lost its text process while this request ran. Send the request again.", retry_after_s=1.0)
            told(sink, key, sink.failed, lost)
        queries, self._queries = self._queries, {}
        for future in queries.values():
            if not future.done():
                future.set_exception(self.unavailable())

    def on_message(self, message: Message) -> None:
        self._heard_ns = self._clock.now_ns()
        if type(message) is TextDelta:
            self._deliver(message)
        elif type(message) is Finished:
            sink = self._sinks.pop(message.key, None)
            self._counted.pop(message.key, None)
            if sink is not None and (wrong := told(sink, message.key, sink.finished, message)):
                told(sink, message.key, sink.failed, wrong)
        elif type(message) is Attached:
            self._sinks.update(self._awaited.pop(message.mark, {}))
        elif type(message) is Counted:
            self._count(message.key, message.standing)
        elif type(message) is Rejected:
            self._count(message.key, message.standing)
            sink = self._sinks.pop(message.key, None)
            if sink is not None:
                told(sink, message.key, sink.failed, error_of(message))
        elif type(message) is Answer:
            future = self._queries.pop(message.id, None)
            if future is not None and not future.done():
                future.set_result(message)
        elif type(message) is TextReady:
            self._take_ready(message)
        elif not isinstance(message, (Hello, Extension)):
            raise TypeError(f"a door does not take {type(message).__name__}")

    def _count(self, key: int, standing: Standing | None) -> None:
        counted = self._counted.pop(key, None)
        if counted is not None and standing is not None:
            counted(standing)

    def _take_ready(self, word: TextReady) -> None:
        if word.ready and not self._ready:
            self._spawn(self._learn())
        self._ready, self._reason, self._ages = word.ready, word.reason, word.ages
        self.limits = word.limits or self.limits
        self.joined.set()
        if word.ready or word.waits:
            self.open.set()
        else:
            self.open.clear()

    def _deliver(self, delta: TextDelta) -> None:
        sinks = self._sinks
        batch = Batch(delta)
        texts, reasons = delta.texts, delta.reasons
        choices = delta.choices.tolist()
        self.delivered += len(choices)
        for row, key in enumerate(delta.keys.tolist()):
            sink = sinks.get(key)
            if sink is not None:  # else: cancelled while the row was under way
                try:
                    sink.row(choices[row], texts[row], reasons[row], row, batch)
                except BaseException as raised:  # one request fails, not the link with all the others
                    wrong = blamed(sink, key, raised)
                    self.cancel(key, "client")
                    told(sink, key, sink.failed, wrong)

    def send(self, message: Message) -> None:
        link = self._link()
        if link is not None:
            link.send(message)

    # --- readiness

    @property
    def connected(self) -> bool:
        link = self._link()
        return link is not None and link.open

    def readiness(self) -> tuple[bool, str]:
        """Would a request be answered without waiting for a process, and if not, why."""
        if not (self._ready and self.connected):
            return False, self._why()
        silent_s = self._silent_s()
        return (True, "") if silent_s <= SILENT_S else (False, f"the text process has not been heard of for {silent_s:.0f} s")

    def _silent_s(self) -> float:
        return (self._clock.now_ns() - self._heard_ns) / 1e9

    def ages(self, name: str) -> dict[str, float]:
        """Seconds since each process that answers depend on was last heard of; text's own is called `name`. What text said about others is as
        old as text's word."""
        if not self.connected:
            return {}
        silent_s = self._silent_s()
        return {name: round(silent_s, 3), **{other: round(age + silent_s, 3) for other, age in self._ages.items()}}

    def accepts(self) -> bool:
        """May a request come in: now, or to wait for an engine that is being restarted?"""
        return self.open.is_set() and self.connected

    def _why(self) -> str:
        return self._reason or "the engine is not ready"

    def unavailable(self) -> PenstockError:
        """The error for who comes now and cannot get in."""
        return self._unavailable(self._why())

    async def _learn(self) -> None:
        """Ask for what replies carry: the default model's name and the system fingerprint."""
        try:
            answer = await self.query("server_info", timeout=5.0)
        except PenstockError:
            return
        if answer.status == 200:
            try:
                info = msgspec.json.decode(answer.body, type=ServerInfo, strict=False)
            except msgspec.MsgspecError:
                return
            self.fingerprint = info.fingerprint or self.fingerprint
            self.model_name = info.model or self.model_name

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- the gateway's side

    def submit(self, submit: Submit, sink: Sink, counted: Callable[[Standing], None] | None = None) -> None:
        """`counted` is told where the request's tenant stands, if it has limits, before anything comes to the sink. Raises EngineUnavailable, or LinkBusy (503, too)."""
        if not self.connected:
            raise self.unavailable()
        self.send(submit)
        self._sinks[submit.key] = sink
        if counted is not None:
            self._counted[submit.key] = counted

    def follow(self, rid: str, tenant: str, sinks: Mapping[int, Sink]) -> None:
        """Listen to a retained stream: what belongs to its keys comes to these sinks, from the beginning. Who listened here before is told that it is over."""
        if not self.connected:
            raise self.unavailable()
        before = [sink for key in sinks if (sink := self._forget(key)) is not None]
        taken = StreamTaken()
        for sink in before:
            sink.failed(taken)
        self._mark += 1
        self._awaited[self._mark] = dict(sinks)
        self.send(Attach(rid=rid, tenant=tenant, edge=self._edge, keys=list(sinks), mark=self._mark))

    def listener(self, key: int) -> Sink | None:
        """Whoever listens to it, or will as soon as text says so."""
        waiting = (some[key] for some in self._awaited.values() if key in some)  # most of the time there are none
        return next(waiting, self._sinks.get(key))

    def _forget(self, key: int) -> Sink | None:
        found = self.listener(key)
        self._sinks.pop(key, None)
        self._counted.pop(key, None)
        for some in self._awaited.values():
            some.pop(key, None)
        return found

    def detach(self, key: int, cause: CancelCause = "disconnect") -> None:
        """The client of a retained stream left, or was cut off. Unknown keys (finished ones) are ignored."""
        if self._forget(key) is not None:
            self.send(Detach(key=key, edge=self._edge, cause=cause))

    def cancel(self, key: int, cause: CancelCause) -> None:
        """Forget a key and tell text. Unknown keys (finished ones) are ignored."""
        if self._forget(key) is not None:
            self.send(Cancel(key=key, cause=cause))

    def park(self, key: int) -> None:
        if key in self._sinks:
            self.send(Park(key=key))

    def unpark(self, key: int) -> None:
        if key in self._sinks:
            self.send(Unpark(key=key))

    def fail_all(self, error: PenstockError, cause: CancelCause) -> None:
        """End every request and question with `error`."""
        for key, sink in [*self._sinks.items(), *(pair for some in self._awaited.values() for pair in some.items())]:
            self.cancel(key, cause)
            told(sink, key, sink.failed, error)
        for future in list(self._queries.values()):
            if not future.done():
                future.set_exception(error)

    async def query(self, what: str, body: bytes = b"", timeout: float = QUERY_TIMEOUT_S) -> Answer:
        """Raises EngineUnavailable when text is gone or does not answer in time (seconds)."""
        if not self.connected:
            raise self.unavailable()
        self._query_id += 1
        mine = self._query_id
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._queries[mine] = future
        try:
            self.send(Query(id=mine, edge=self._edge, what=what, body=body))
            async with asyncio.timeout(timeout):
                return await future
        except TimeoutError:
            raise EngineUnavailable(f"The text process did not answer within {timeout:g} s. Try again.", retry_after_s=1.0) from None
        finally:
            self._queries.pop(mine, None)


def told(sink: Sink, key: int, call: Callable[..., None], *arguments: Any) -> PenstockError | None:
    """Tell a sink something. What it raises is its own request's end, and not the link's with all the others: then the error that its client gets."""
    try:
        call(*arguments)
    except BaseException as raised:
        return blamed(sink, key, raised)
    return None


def blamed(sink: Sink, key: int, raised: BaseException) -> PenstockError:
    """Log what a sink raised, with what it says of that (`said`, which none needs), or its class's name. The error that its client gets."""
    error = tamed(raised)
    say = getattr(sink, "said", None)
    who = f"{type(sink).__module__}.{type(sink).__qualname__}: {described(error)}" if say is None else say(error)
    log.error("what came for request %d could not be delivered: %s", key, who, exc_info=raised)
    return PenstockError("The server made an error while it sent the answer.")


class ServerInfo(msgspec.Struct, frozen=True):
    """What a door reads of text's answer to the "server_info" query."""

    model: str = ""
    fingerprint: str = ""


def error_of(message: Rejected) -> PenstockError:
    """The error that a Rejected stands for."""
    return make_error(message.status, message.type, message.code, message.message, message.param, message.retry_after_s)


def make_error(
    status: int, type_: str, code: str, text: str, param: str | None = None, retry_after_s: float | None = None
) -> PenstockError:
    error = PenstockError(text, param=param, code=code, retry_after_s=retry_after_s)
    error.status = status  # type: ignore[misc]  # the class says the usual one, text decided this one
    error.type = type_  # type: ignore[misc]
    return error
