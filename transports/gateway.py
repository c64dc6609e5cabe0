"""The gateway: the edge's doors to the text processes, one a pool.

What it is: it gives requests their keys and places, finds the door of the model that they name, speaks for all doors about readiness, counts, and
refuses what cannot come in.
What it does not know: what goes on behind a door (door.py), HTTP, JSON, SSE: a transport gives it `Sink` objects and gets calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable, Sequence

from penstock.core.protocol.config import Config
from penstock.core.protocol.errors import Draining, EngineUnavailable, PenstockError, RetryableError
from penstock.core.protocol.messages import Answer, EdgeStats, Limits, Submit
from penstock.core.protocol.pools import PoolSpec, pools_of
from penstock.core.runtime.clock import Clock, SystemClock
from penstock.transports.counters import Counters
from penstock.transports.door import QUERY_TIMEOUT_S as QUERY_TIMEOUT_S
from penstock.transports.door import Batch as Batch
from penstock.transports.door import CancelCause as CancelCause
from penstock.transports.door import Door as Door
from penstock.transports.door import Sink as Sink
from penstock.transports.door import make_error as make_error
from penstock.transports.link import LinkBusy
from penstock.transports.store import Store
from penstock.transports.tracing import NO_TRACING, Tracing

log = logging.getLogger("penstock.edge.gateway")

EDGE_BITS, NONCE_BITS, COUNT_BITS = 8, 24, 24  # 56 in all
SOON_S = 0.5
"""Longest wait of a request for a text process that is not ready, or whose link is being dialled: longer than the dialler's longest pause."""
STATS_PERIOD_S = 1.0
LOG_PERIOD_S = 10.0


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


class Gateway:
    """One an edge process; everything happens on its event loop. `doors` are by the name of their pool; whoever dials (edge.py, tests) sets their links.

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
        pools: Sequence[PoolSpec] = (),
        tracing: Tracing = NO_TRACING,
        clock: Clock | None = None,
        store: Store | None = None,
    ) -> None:
        self.config = config
        self.store = store
        """What is kept between requests; None: nothing (--no-store)."""
        self.edge = edge
        self.tracing = tracing
        self.clock: Clock = clock or SystemClock()
        self.counters = Counters()
        self.batch_news = asyncio.Event()
        """Set when there may be a batch to be run."""
        self.parsing = asyncio.Lock()
        """Held while a large body is parsed: see Surface.understood."""
        self.next_key = EdgeKeys(edge)
        self.draining = False
        self.active = 0
        """HTTP requests in progress that hold a place."""
        self.entered: Callable[[], None] | None = None
        """Told of each request that takes a place."""
        self._refused = 0
        self._refused_at_ns = -(10**18)
        self._over = False
        """The drain's time is over: nobody will answer any more."""
        self._idle: asyncio.Event | None = None
        pools = pools or pools_of(config)
        self.doors = {
            pool.name: Door(pool, edge, clock=self.clock, unavailable=self._unavailable, opened=self.counters.touch) for pool in pools
        }
        self._default = self.doors[pools[0].name]
        self._by_model = {model: self.doors[pool.name] for pool in pools for model in pool.models}

    # --- doors

    def door(self, model: str = "") -> Door:
        """Who serves that model. Text tells who names one that nobody serves; it is asked at the first door, as for requests that name none."""
        return self._by_model.get(model, self._default)

    @property
    def model_name(self) -> str:
        """The default model."""
        return self._default.model_name

    @property
    def fingerprint(self) -> str | None:
        """The default model's system fingerprint, once known."""
        return self._default.fingerprint

    @property
    def limits(self) -> Limits | None:
        """How large a prompt may be, if that is known and the same whichever model is meant."""
        return self._default.limits if len(self.doors) == 1 else None

    @property
    def delivered(self) -> int:
        """Rows handed to sinks; a count that moves when work is done."""
        return sum(door.delivered for door in self.doors.values())

    async def joined(self) -> None:
        """Return once every text process has said, whatever it was, whether it is ready."""
        for door in self.doors.values():
            await door.joined.wait()

    async def open(self) -> None:
        """Return once every text process takes requests."""
        for door in self.doors.values():
            await door.open.wait()

    # --- readiness

    def readiness(self) -> tuple[bool, str]:
        """Would a request be answered without waiting for a process, whichever model it names, and if not, why."""
        if self.draining:
            return False, "the server is shutting down"
        return next((said for said in (door.readiness() for door in self.doors.values()) if not said[0]), (True, ""))

    def ages(self) -> dict[str, float]:
        """Seconds since each process that answers depend on was last heard of."""
        out: dict[str, float] = {}
        for door in self.doors.values():
            out |= door.ages("text" if len(self.doors) == 1 else f"text-{door.pool.text}")
        return out

    def accepts(self, model: str = "") -> bool:
        """May a request come in: now, or to wait for an engine that is being restarted?"""
        return not self.draining and self.door(model).accepts()

    def _unavailable(self, reason: str) -> PenstockError:
        if self.draining:
            return Draining("The server is shutting down. Send the request again: another instance may take it.", retry_after_s=2.0)
        return EngineUnavailable(f"The server is not ready: {reason}. Try again shortly.", retry_after_s=1.0)

    # --- a transport's side

    async def soon_ready(self, model: str = "") -> None:
        """Return when text takes requests, after SOON_S (half a second) at the latest: edges learn of it one after another, and a client that was told so by
        one of them may come to the next. Says nothing: `enter` does."""
        door = self.door(model)
        if self.draining or door.accepts():
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SOON_S):
                while not self.draining and not door.accepts():
                    if door.open.is_set():  # the link closed this instant; `link_closed` comes next
                        await asyncio.sleep(0)
                    else:
                        await door.open.wait()

    def enter(self, model: str = "") -> None:
        """Take a place for a request, or raise: draining or not ready (503), too many (429). `leave` gives it back."""
        if not self.accepts(model):
            raise self.door(model).unavailable()
        if self.active >= self.config.max_streams:
            self.counters.add("penstock_edge_refused_total")
            self._note_refused()
            raise TooManyStreams(
                f"This server already has {self.config.max_streams} requests in progress (--max-streams). Try again later.",
                retry_after_s=1.0,
            )
        self.active += 1
        if self.entered is not None:
            self.entered()

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
        self.door(submit.model).submit(submit, sink)

    def cancel(self, key: int, cause: CancelCause = "disconnect") -> None:
        """Forget a key and tell text. Unknown keys (finished ones) are ignored."""
        for door in self.doors.values():
            door.cancel(key, cause)

    def park(self, key: int) -> None:
        """The client reads too slowly: stop producing for this request. Rows that are under way still come."""
        for door in self.doors.values():
            door.park(key)

    def unpark(self, key: int) -> None:
        """Go on."""
        for door in self.doors.values():
            door.unpark(key)

    def fail_all(self, error: PenstockError, cause: CancelCause) -> None:
        """End every request and question with `error`, and every later one (a drain whose deadline passed)."""
        self._over = True
        for door in self.doors.values():
            door.fail_all(error, cause)

    async def query(self, what: str, body: bytes = b"", *, timeout: float = QUERY_TIMEOUT_S, model: str = "") -> Answer:
        """Ask text: `what` and `body` as in Query. An Answer whose status is not 200 holds an error. Raises EngineUnavailable when it is not there or does not
        answer in time (seconds), Draining when the server ends."""
        door = self.door(model)
        if self._over:
            raise door.unavailable()
        return await door.query(what, body, timeout)

    # --- housekeeping

    def flush_stats(self) -> None:
        """Send the counters if they changed since the last time; the first text process holds every edge's."""
        if self.counters.changed and self._default.connected:
            try:
                self._default.send(EdgeStats(edge=self.edge, counters=self.counters.read()))
            except LinkBusy:
                self.counters.touch()

    async def wait_idle(self) -> None:
        """Return when no request is in progress."""
        if self.active:
            self._idle = asyncio.Event()
            await self._idle.wait()
