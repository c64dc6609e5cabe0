"""Responses in the background.

What it is: `Background`, a job without a connection, whose events are kept while they come; `Follow`, a stream of such events at whichever HTTP process, from wherever a
client left off; `Hub`, what one HTTP process has of both.
What it does not know: what the rows say (responses_voice.py), how requests are understood, what SQLite does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence

import msgspec

from penstock.core.protocol.errors import Cancelled, Draining, PenstockError
from penstock.transports.frame import Frame
from penstock.transports.gateway import Gateway, TooManyStreams
from penstock.transports.job import Job, watch
from penstock.transports.request import Header, Receive, RequestContext, Scope, Send, context_of
from penstock.transports.responses import Asked
from penstock.transports.responses_jobs import Leg, kept_of, unheard
from penstock.transports.responses_store import LEASE_S, Record, Records
from penstock.transports.responses_voice import ResponsesVoice
from penstock.transports.stream import cut_error

log = logging.getLogger("penstock.edge.responses")

FLUSH_S = 0.1
"""Events of a response in the background are kept so often, at most."""
FOLLOW_S = 0.2
"""Who follows a response that runs in another process looks so often."""

_json = msgspec.json.Encoder().encode
_LAST = tuple(b'{"type":"response.%s"' % kind for kind in (b"completed", b"incomplete", b"failed"))
"""How the last event of a stream begins."""


class Hub:
    """What one HTTP process has in the background: the jobs that run, by tenant and id, and how many clients follow one."""

    def __init__(self) -> None:
        self.running: dict[tuple[str, str], Background] = {}
        self.following = 0

    def check(self, most: int) -> None:
        """May one more client follow? Raises TooManyStreams."""
        if self.following >= most:
            raise TooManyStreams(f"{most} clients follow responses here already (--max-streams). Try again later.", retry_after_s=1.0)


class Background(Job):
    """A response that nobody waits for. `await start()`; it ends by itself, or by `stop`."""

    def __init__(self, gateway: Gateway, asked: Asked, records: Records, context: RequestContext, hub: Hub) -> None:
        self._says = ResponsesVoice(asked.shown)
        super().__init__(gateway, asked.call, self._says, context)
        self._asked = asked
        self._records = records
        self._hub = hub
        self._row = Leg(self, self._says, self._say)
        self._events: list[bytes] = []
        """Those that are not kept yet."""
        self._pieces = 0
        self._started = False
        """Its first row is here, and the record does not say so yet."""
        self._wake = asyncio.Event()
        self.moved = asyncio.Event()
        """Set, and replaced, whenever something of it was kept."""
        self._ended = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.introduce()

    @property
    def key(self) -> tuple[str, str]:
        return self.context.tenant, self._asked.id

    async def start(self) -> dict[str, object]:
        """The response as it is now. Raises what `begin` raises, and what the store raises; then nothing is left behind."""
        await self.gateway.soon_ready(self.model)
        tenant, name = self.key
        asked = self._asked
        queued = self._says.response("queued")
        try:
            if asked.stream:
                self._events += [self._says.accepted("queued"), self._says.queued()]
                await self._flush()
            await self._records.renew(tenant, name)
            await self._records.put(tenant, name, _json(queued), kept_of(asked, self.model))
            self.begin()
        except BaseException:
            with contextlib.suppress(PenstockError):
                await self._records.delete(tenant, name)
                await self._records.release(tenant, name)
            raise
        self._hub.running[self.key] = self
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"response {name}")
        return queued

    def stop(self) -> None:
        """Cancel it."""
        if self._says.final is None:
            self.leg_failed(Cancelled("The response was cancelled."))

    # --- Job

    def leg(self, index: int) -> Leg:
        return self._row

    def _say(self, payloads: Iterable[bytes]) -> None:
        if not self._asked.stream:
            unheard(payloads)
        else:
            self._events += payloads
        self._started = True
        self._wake.set()

    def leg_failed(self, error: PenstockError) -> None:
        super().leg_failed(self._asked.renamed(error))

    def complete(self) -> None:
        self._end(lambda: self._says.ended(self.usage(), None))

    def broken(self, error: PenstockError) -> None:
        self._end(lambda: self._says.broken(error))
        self._says.fail(error)

    def _end(self, words: Callable[[], Iterable[bytes]]) -> None:
        try:
            self._events += words()
        except Exception:
            log.exception("request %s: its response could not be made", self.context.rid)
            self._says.fail(PenstockError("The server made an error while it made the answer."))
        self._ended.set()
        self._wake.set()

    # --- keeping

    async def _run(self) -> None:
        tenant, name = self.key
        loop = asyncio.get_running_loop()
        renewed, said = loop.time(), False
        try:
            while not self._ended.is_set():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LEASE_S / 3):
                        await self._wake.wait()
                self._wake.clear()
                if loop.time() - renewed >= LEASE_S / 3:
                    await self._records.renew(tenant, name)
                    renewed = loop.time()
                if self._started and not said and not self._ended.is_set():
                    said = True
                    await self._records.update(tenant, name, _json(self._says.response("in_progress")))
                await self._flush()
                with contextlib.suppress(TimeoutError):  # not more often than that
                    async with asyncio.timeout(FLUSH_S):
                        await self._ended.wait()
        except PenstockError as error:
            log.warning("response %s cannot be kept any more: %s", name, error.message)
            self.cancel("client")
            self._says.fail(error)
        finally:
            await self._close()

    async def _flush(self) -> None:
        events, self._events = self._events, []
        if events and self._asked.stream:
            await self._records.put_events(*self.key, self._pieces, events)
            self._pieces += 1
        moved, self.moved = self.moved, asyncio.Event()
        moved.set()

    async def _close(self) -> None:
        """It is over: the events first, then the record, so that who sees that it is over finds all of them."""
        tenant, name = self.key
        try:
            await self._flush()
            if self._says.final is None:  # its task was cancelled
                self._says.fail(Draining("The server is shutting down and could not finish this request."))
            await self._records.update(tenant, name, _json(self._says.final))
            await self._records.release(tenant, name)
        except PenstockError as error:
            log.warning("the end of response %s could not be kept: %s", name, error.message)
        finally:
            self._hub.running.pop(self.key, None)
            self.moved.set()
            self.summarize([self._row.reason])
            self.context.span.end(200, self.context.summary)
            self.gateway.leave()


class Follow:
    """The events of a response in the background behind number `after`, as they come, or once more. An ASGI application."""

    def __init__(
        self,
        gateway: Gateway,
        records: Records,
        frame: Frame,
        hub: Hub,
        tenant: str,
        name: str,
        after: int,
        headers: Sequence[Header] = (),
    ) -> None:
        self._gateway = gateway
        self._records = records
        self._frame = frame
        self._hub = hub
        self._tenant = tenant
        self._name = name
        self._after = after
        self._headers = [*frame.headers, *headers]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._hub.check(self._gateway.config.max_streams)
        context = context_of(scope)
        gone = asyncio.get_running_loop().create_task(watch(receive))
        self._hub.following += 1
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self._headers})
            try:
                await self._stream(send, gone)
            except PenstockError as error:
                await self._push(send, [_json({"type": "error", "code": error.code, "message": error.message, "param": error.param})])
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            log.warning("response %s: a client reads too slowly, its stream is cut", self._name)
            self._gateway.counters.add('penstock_edge_cuts_total{why="stalled"}')
            await self._say_cut(send, context)
        finally:
            self._hub.following -= 1
            gone.cancel()
            if context.status == 200 and gone.done() and not gone.cancelled():
                context.status = 499

    async def _say_cut(self, send: Send, context: RequestContext) -> None:
        """As far as it can still be said."""
        config = self._gateway.config
        error = cut_error("stalled", config, kept=True)
        try:
            await self._push(send, [_json({"type": "error", "code": error.code, "message": error.message, "param": error.param})])
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            if context.hang_up is not None:
                context.hang_up(config.stream_stall_s)
        except TimeoutError:
            if context.abort is not None:
                context.abort()
        context.status = 499

    async def _push(self, send: Send, payloads: Sequence[bytes]) -> None:
        """Raises TimeoutError if the client takes nothing for too long."""
        await self._write(send, b"".join(map(self._frame.wrap, payloads)))

    async def _write(self, send: Send, data: bytes) -> None:
        if data:
            async with asyncio.timeout(self._gateway.config.stream_stall_s):
                await send({"type": "http.response.body", "body": data, "more_body": True})
            self._said = asyncio.get_running_loop().time()

    async def _stream(self, send: Send, gone: asyncio.Task[None]) -> None:
        number = seen = 0
        loop = asyncio.get_running_loop()
        self._said = loop.time()
        last = b""
        record: Record | None = None
        while not gone.done():
            job = self._hub.running.get((self._tenant, self._name))
            moved = job.moved if job is not None else None  # before the look: what is kept after it is not missed
            events = await self._records.events(self._tenant, self._name, number)
            if events is not None:
                skip = max(0, self._after + 1 - seen)
                seen, number, last = seen + len(events), number + 1, events[-1]
                await self._push(send, events[skip:])
                continue
            if record is not None and record.final:  # looked for events once more: its last ones were kept before it was
                if not last.startswith(_LAST):  # nobody was left to say how it ended
                    failed = {"type": "response.failed", "sequence_number": seen, "response": msgspec.Raw(record.body)}
                    await self._push(send, [_json(failed)])
                return
            record = await self._records.find(self._tenant, self._name)
            if record is None:  # deleted
                return
            if not record.final:
                await _moved(moved, gone)
            if loop.time() - self._said >= self._gateway.config.keep_alive_s:
                await self._write(send, self._frame.keep_alive)


async def _moved(event: asyncio.Event | None, gone: asyncio.Task[None]) -> None:
    """Return after a while, or sooner: the event is set, or the client has gone."""
    waiter = asyncio.get_running_loop().create_task((event or asyncio.Event()).wait())
    try:
        await asyncio.wait([gone, waiter], timeout=FOLLOW_S, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiter.cancel()
