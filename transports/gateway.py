"""The gateway: the edge's one door to the text process.

What it is: it gives requests their keys, sends Submit, Cancel, Park, Unpark and Query over the link, hands each row of a TextDelta to the
sink that owns its key, answers queries, holds readiness, counts, and fails everything as retryable when the link is lost.
What it does not know: HTTP, JSON, SSE: a transport gives it `Sink` objects and gets calls.
It is long because everything that a request needs of text goes through this one door.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from penstock.core.protocol.config import Config
from penstock.core.protocol.errors import Draining, EngineUnavailable, PenstockError, RetryableError
from penstock.core.protocol.messages import (
    Answer,
    Cancel,
    EdgeStats,
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
from penstock.core.runtime.clock import Clock, SystemClock
from penstock.transports.counters import Counters
from penstock.transports.link import Link, LinkBusy
from penstock.transports.tracing import NO_TRACING, Tracing

log = logging.getLogger("penstock.edge.gateway")

EDGE_BITS, NONCE_BITS, COUNT_BITS = 8, 24, 24  # 56 in all
QUERY_TIMEOUT_S = 10.0
SOON_S = 0.5
"""Longest wait of a request for a text process that is not ready, or whose link is being dialled: longer than the dialler's longest pause."""
STATS_PERIOD_S = 1.0
LOG_PERIOD_S = 10.0
SILENT_S = 4.0
"""A text process that has said nothing for so long stands still: it gives a sign of life every second."""

CancelCause = Any
"""A value of Cancel.cause."""


class TooManyStreams(RetryableError):
    status = 429
    type = "rate_limit_error"
    default_code = "too_many_streams"


class EdgeKeys:
    """Request keys: edge index, a random nonce of this process, a count. A restarted edge takes another nonce, so that it never reuses
    a key that text may still hold; so does an edge whose count is used up."""

    def __init__(self, edge: int, nonce: int | None = None) -> None:
        if not 0 <= edge < 1 << EDGE_BITS:
            raise ValueError(f"edge index {edge} does not fit {EDGE_BITS} bits")
        self._edge = edge
        self._nonce = secrets.randbits(NONCE_BITS) if nonce is None else nonce
        self._count = 0

    def __call__(self) -> int:
        self._count += 1
        if self._count >= 1 << COUNT_BITS:
            self._nonce = (self._nonce + 1 + secrets.randbits(NONCE_BITS - 1)) % (1 << NONCE_BITS)
            self._count = 1
        return (self._edge << NONCE_BITS | self._nonce) << COUNT_BITS | self._count


class Batch:
    """One TextDelta with its columns as lists, made only when somebody asks."""

    __slots__ = ("_extras", "_lists", "_starts", "delta")

    def __init__(self, delta: TextDelta) -> None:
        self.delta = delta
        self._lists: dict[str, list[int]] = {}
        self._starts: list[int] | None = None
        self._extras: dict[int, RowExtra] | None = {e.row: e for e in delta.extras} if delta.extras else None

    def column(self, name: str) -> list[int]:
        """A column of the TextDelta by its name ("output_tokens"), to be indexed by row."""
        found = self._lists.get(name)
        if found is None:
            found = self._lists[name] = getattr(self.delta, name).tolist()
        return found

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
    block; an exception in `row` fails the request."""

    def row(self, choice: int, text: str, reason: str, row: int, batch: Batch) -> None:
        """A step brought something for one choice (0 to n - 1): `text` to append (may be ""), and `reason`: "" (goes on), or why the choice ended: "stop",
        "length", "abort" (cancelled), "error" (`batch.extra(row)` says what). More about the row: `batch`, at index `row`."""
        ...

    def finished(self, message: Finished) -> None:
        """Every choice has ended."""
        ...

    def failed(self, error: PenstockError) -> None:
        """The request was refused, or is lost. `error` is what the client should get; a route may raise it."""
        ...


class Gateway:
    """One an edge process; everything happens on its event loop. `link` is set and cleared by whoever dials (edge.py, tests).

    A transport also reads: `config` (Config: every option), `edge` (int, this edge's index, for Submit.edge), `next_key()` (a new key, for
    Submit.key), `model_name` (str, the default model), `fingerprint` (str or None), `limits` (Limits or None), `draining` (bool),
    `counters` (`counters.add(name, amount=1)`: `name{label="value"}` as /metrics is to show it), `clock.now_ns()`.

    The life of a request: `await soon_ready()`, `enter()`, then `submit(...)` for each prompt; rows come to the sink; when the last sink has ended
    (or after `cancel` of its keys) `leave()`, exactly once for each `enter`.
    """

    def __init__(
        self,
        config: Config,
        edge: int,
        *,
        tracing: Tracing = NO_TRACING,
        clock: Clock | None = None,
        model_name: str = "",
    ) -> None:
        self.config = config
        self.edge = edge
        self.tracing = tracing
        self.clock: Clock = clock or SystemClock()
        self.counters = Counters()
        self.next_key = EdgeKeys(edge)
        self.model_name = model_name or (config.served_model_name[0] if config.served_model_name else "")
        self.fingerprint: str | None = None
        self.draining = False
        self.delivered = 0
        """Rows handed to sinks; a count that moves when work is done."""
        self.active = 0
        """HTTP requests in progress that hold a place."""
        self.joined = asyncio.Event()
        """Set once text has said, whatever it was, whether it is ready."""
        self.open = asyncio.Event()
        """Set while text takes requests (which may have to wait for an engine)."""
        self.limits: Limits | None = None
        """How large a prompt may be, once text has said so."""
        self._ready = False
        """Is everything up that an answer needs?"""
        self._ages: dict[str, float] = {}
        self._heard_ns = 0
        self._refused = 0
        self._refused_at_ns = -(10**18)
        self._over = False
        """The drain's time is over: nobody will answer any more."""
        self._sinks: dict[int, Sink] = {}
        self._link: Callable[[], Link | None] = lambda: None
        self._reason = "the text process is not connected yet"
        self._queries: dict[int, asyncio.Future[Answer]] = {}
        self._query_id = 0
        self._idle: asyncio.Event | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    # --- the link's side

    def attach(self, link: Callable[[], Link | None]) -> None:
        """`link()` gives the current link, or None while there is none."""
        self._link = link

    def link_opened(self, _: Hello) -> None:
        self._reason = "the text process has not said yet that it is ready"
        self._heard_ns = self.clock.now_ns()
        self.counters.touch()  # a new text process knows nothing of this edge

    def link_closed(self, reason: str) -> None:
        """Text is gone: every stream fails as retryable."""
        self.open.clear()
        self._ready, self._ages = False, {}
        self._reason = f"the text process is gone ({reason})"
        sinks, self._sinks = self._sinks, {}
        for sink in sinks.values():
            sink.failed(
                EngineUnavailable("The server lost its text process while this request ran. Send the request again.", retry_after_s=1.0)
            )
        queries, self._queries = self._queries, {}
        for future in queries.values():
            if not future.done():
                future.set_exception(self._unavailable())

    def on_message(self, message: Message) -> None:
        self._heard_ns = self.clock.now_ns()
        if type(message) is TextDelta:
            self._deliver(message)
        elif type(message) is Finished:
            sink = self._sinks.pop(message.key, None)
            if sink is not None:
                sink.finished(message)
        elif type(message) is Rejected:
            sink = self._sinks.pop(message.key, None)
            if sink is not None:
                sink.failed(error_of(message))
        elif type(message) is Answer:
            future = self._queries.pop(message.id, None)
            if future is not None and not future.done():
                future.set_result(message)
        elif type(message) is TextReady:
            self._take_ready(message)
        elif not isinstance(message, (Hello, Extension)):
            raise TypeError(f"the gateway does not take {type(message).__name__}")

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
                except Exception:  # one request fails, not the link with all the others
                    log.exception("a row of request %d could not be delivered", key)
                    self.cancel(key, "client")
                    sink.failed(PenstockError("The server made an error while it sent the answer."))

    def _send(self, message: Message) -> None:
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
        if self.draining:
            return False, "the server is shutting down"
        if not (self._ready and self.connected):
            return False, self._reason or "the engine is not ready"
        silent_s = self._silent_s()
        return (True, "") if silent_s <= SILENT_S else (False, f"the text process has not been heard of for {silent_s:.0f} s")

    def _silent_s(self) -> float:
        return (self.clock.now_ns() - self._heard_ns) / 1e9

    def ages(self) -> dict[str, float]:
        """Seconds since each process that answers depend on was last heard of. What text said about others is as old as text's word."""
        if not self.connected:
            return {}
        silent_s = self._silent_s()
        return {"text": round(silent_s, 3), **{name: round(age + silent_s, 3) for name, age in self._ages.items()}}

    def accepts(self) -> bool:
        """May a request come in: now, or to wait for an engine that is being restarted?"""
        return not self.draining and self.open.is_set() and self.connected

    def _unavailable(self) -> PenstockError:
        if self.draining:
            return Draining("The server is shutting down. Send the request again: another instance may take it.", retry_after_s=2.0)
        return EngineUnavailable(
            f"The server is not ready: {self._reason or 'the engine is not ready'}. Try again shortly.", retry_after_s=1.0
        )

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

    # --- a transport's side

    async def soon_ready(self) -> None:
        """Return when text takes requests, after SOON_S (half a second) at the latest: edges learn of it one after another, and a client that was told so by
        one of them may come to the next. Says nothing: `enter` does."""
        if self.draining or self.accepts():
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SOON_S):
                while not self.draining and not self.accepts():
                    if self.open.is_set():  # the link closed this instant; `link_closed` comes next
                        await asyncio.sleep(0)
                    else:
                        await self.open.wait()

    def enter(self) -> None:
        """Take a place for a request, or raise: draining or not ready (503), too many (429). `leave` gives it back."""
        if not self.accepts():
            raise self._unavailable()
        if self.active >= self.config.max_streams:
            self.counters.add("penstock_edge_refused_total")
            self._note_refused()
            raise TooManyStreams(
                f"This server already has {self.config.max_streams} requests in progress (--max-streams). Try again later.",
                retry_after_s=1.0,
            )
        self.active += 1

    def _note_refused(self) -> None:
        """One log line for all that were refused within LOG_PERIOD_S."""
        self._refused += 1
        now = self.clock.now_ns()
        if now - self._refused_at_ns >= LOG_PERIOD_S * 1e9:
            log.warning(
                "%d requests refused: %d are in progress at this edge (--max-streams %d)",
                self._refused,
                self.active,
                self.config.max_streams,
            )
            self._refused, self._refused_at_ns = 0, now

    def leave(self) -> None:
        """Give the place of an `enter` back."""
        self.active -= 1
        if self._idle is not None and self.active == 0:
            self._idle.set()

    def submit(self, submit: Submit, sink: Sink) -> None:
        """Start a request: what happens to `submit.key` is told to `sink` until it has ended. Raises EngineUnavailable, or LinkBusy (503, too)."""
        if not self.connected:
            raise self._unavailable()
        self._send(submit)
        self._sinks[submit.key] = sink

    def cancel(self, key: int, cause: CancelCause = "disconnect") -> None:
        """Forget a key and tell text. Unknown keys (finished ones) are ignored."""
        if self._sinks.pop(key, None) is None:
            return
        self._send(Cancel(key=key, cause=cause))

    def park(self, key: int) -> None:
        """The client reads too slowly: stop producing for this request. Rows that are under way still come."""
        if key in self._sinks:
            self._send(Park(key=key))

    def unpark(self, key: int) -> None:
        """Go on."""
        if key in self._sinks:
            self._send(Unpark(key=key))

    def fail_all(self, error: PenstockError, cause: CancelCause) -> None:
        """End every request and question with `error`, and every later one (a drain whose deadline passed)."""
        self._over = True
        for key, sink in list(self._sinks.items()):
            self.cancel(key, cause)
            sink.failed(error)
        for future in list(self._queries.values()):
            if not future.done():
                future.set_exception(error)

    async def query(self, what: str, body: bytes = b"", *, timeout: float = QUERY_TIMEOUT_S) -> Answer:
        """Ask text: `what` and `body` as in Query. An Answer whose status is not 200 holds an error. Raises EngineUnavailable when it is not there or does not
        answer in time (seconds), Draining when the server ends."""
        if self._over or not self.connected:
            raise self._unavailable()
        self._query_id += 1
        mine = self._query_id
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._queries[mine] = future
        try:
            self._send(Query(id=mine, edge=self.edge, what=what, body=body))
            async with asyncio.timeout(timeout):
                return await future
        except TimeoutError:
            raise EngineUnavailable(f"The text process did not answer within {timeout:g} s. Try again.", retry_after_s=1.0) from None
        finally:
            self._queries.pop(mine, None)

    # --- housekeeping

    def flush_stats(self) -> None:
        """Send the counters if they changed since the last time."""
        if self.counters.changed and self.connected:
            try:
                self._send(EdgeStats(edge=self.edge, counters=self.counters.read()))
            except LinkBusy:
                self.counters.touch()

    async def wait_idle(self) -> None:
        """Return when no request is in progress."""
        if self.active:
            self._idle = asyncio.Event()
            await self._idle.wait()


class ServerInfo(msgspec.Struct, frozen=True):
    """What the gateway reads of text's answer to the "server_info" query."""

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
