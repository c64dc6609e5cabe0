"""One request of a WebSocket.

What it is: `SocketStream`, which has the edge's own application answer a message as if it were an HTTP request, and carries what comes of it as messages: a StreamReply's payloads as they are
made (`SocketFrame`), other event streams taken apart, other bodies whole.
What it does not know: handshakes, other streams of its socket, what payloads say.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import msgspec
from litestar.types import ASGIApp

from penstock.core.protocol.errors import Cancelled, InvalidRequest, NotFound, PenstockError, tamed
from penstock.transports.blame import ours
from penstock.transports.frame import CARRIER
from penstock.transports.gateway import Gateway
from penstock.transports.request import Header, JsonReply, RequestContext, error_fields
from penstock.transports.retained import asker, control
from penstock.transports.socket_messages import SlowClient, encode, error_of, line

log = logging.getLogger("penstock.edge.websocket.stream")

MOST_WAITING = 16
"""Things that a client may ask of one stream before the first of them is done."""
_LINES = b"application/vnd.penstock.lines"


class SocketFrame:
    """A Frame with an id: payloads become lines, each of which is one message. Marks that are no JSON are left out."""

    headers: Sequence[Header] = ((b"content-type", _LINES),)
    keep_alive = b""  # sockets have pings

    def __init__(self, id: str) -> None:
        self._head = b'{"id":' + encode(id) + b',"seq":'

    def wrap(self, payload: bytes) -> bytes:
        return b"" if payload == b"[DONE]" else b',"data":' + payload + b"}\n"

    def numbered(self, number: int, message: bytes) -> bytes:
        return b"%b%d%b" % (self._head, number, message) if message else b""

    def around(self, before: bytes, after: bytes) -> tuple[bytes, bytes]:
        return b',"data":' + before, after + b"}\n"


class SocketStream:
    """A Carrier (frame.py). `write` takes lines in turn with the socket's other streams."""

    def __init__(self, id: str, app: ASGIApp, gateway: Gateway, write: Callable[[bytes], Coroutine[Any, Any, None]]) -> None:
        self.id = id
        self.frame = SocketFrame(id)
        self._app = app
        self._gateway = gateway
        self._write = write
        self._body: list[Any] = []
        self._gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ready = asyncio.Event()
        """It runs in text, or is over."""
        self._context: RequestContext | None = None
        self._greeting: asyncio.Task[None] | None = None
        self._asked: deque[str] = deque()
        self._steering: asyncio.Task[None] | None = None
        self._status = 0
        self._kind = b""
        self._headers: dict[bytes, bytes] = {}
        self._parts: list[bytes] = []
        self._number = 0
        self._complete = False
        self._error: Any = None
        self._cancelled = False

    # --- what the reply tells

    def begun(self, context: RequestContext) -> None:
        self._context = context
        self._greet(context.rid)
        self._ready.set()

    def broke(self, reply: JsonReply) -> None:
        self._status = reply.status
        self._error = error_of(reply.body)

    def cut(self) -> None:
        self._fail(SlowClient("The stream was cut: its messages were not read in time, or fast enough."))

    def _fail(self, error: PenstockError) -> None:
        self._status = error.status
        self._error = error_fields(error)

    # --- the request

    async def run(self, scope: dict[str, Any], body: bytes) -> None:
        """Have it answered, and say how it ended."""
        scope["state"] = {CARRIER: self}
        self._body = [{"type": "http.request", "body": body, "more_body": False}]
        try:
            await self._app(scope, self._receive, self._send)  # type: ignore[arg-type]
        except BaseException as raised:
            if ours(raised):
                raise
            log.error("stream %r failed", self.id, exc_info=tamed(raised))
            self._fail(PenstockError("The server made an error."))
        finally:
            self._ready.set()
            if self._steering is not None and not self._steering.done():
                self._asked.clear()
        if self._greeting is not None:
            await self._greeting
        if self._error is not None:
            wait = self._headers.get(b"retry-after")
            await self._write(
                line(id=self.id, error=self._error, status=self._status, retry_after_s=int(wait) if wait and wait.isdigit() else None)
            )
        elif self._complete:
            await self._write(line(id=self.id, done=True))
        elif not self._gone.done() or self._cancelled:
            error = Cancelled("The request was cancelled.")
            await self._write(line(id=self.id, error=error_fields(error), status=error.status))

    def leave(self) -> None:
        """Nobody is there any more."""
        if not self._gone.done():
            self._gone.set_result(None)

    async def _receive(self) -> Any:
        if self._body:
            return self._body.pop()
        await asyncio.shield(self._gone)
        return {"type": "http.disconnect"}

    def _greet(self, rid: str) -> asyncio.Task[None]:
        """Its first message: whatever comes next waits for it."""
        if self._greeting is None:
            self._greeting = asyncio.get_running_loop().create_task(self._write(line(id=self.id, stream=rid)))
        return self._greeting

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._headers = {name.lower(): value for name, value in message["headers"]}
            self._kind = self._headers.get(b"content-type", b"").split(b";")[0]
            if self._status < 400:
                await self._greet(self._headers.get(b"x-request-id", b"").decode("latin-1"))
                ignored = self._headers.get(b"x-penstock-ignored-fields")
                if ignored is not None:
                    await self._write(line(id=self.id, ignored=ignored.decode("latin-1").split(", ")))
            return
        data: bytes = message.get("body", b"")
        last = not message.get("more_body", False)
        if self._kind == _LINES:
            if data:
                await self._write(data)
        elif data:
            self._parts.append(data)
        if self._status < 400 and self._kind == b"text/event-stream":
            await self._events(last)
        elif last and self._kind != _LINES:
            await self._whole(b"".join(self._parts))
        self._complete = last

    async def _events(self, last: bool) -> None:
        """Server-sent events that somebody made himself."""
        *events, rest = b"".join(self._parts).split(b"\n\n")
        self._parts = [rest] if rest and not last else []
        payloads = [part[5:].strip() for event in events for part in event.split(b"\n") if part.startswith(b"data:")]
        for payload in payloads:
            self._number += 1
            if data := self.frame.numbered(self._number, self.frame.wrap(payload)):
                await self._write(data)

    async def _whole(self, body: bytes) -> None:
        if self._status >= 400:
            self._error = error_of(body)
        elif not body:
            return
        elif self._kind == b"application/json" or self._kind.endswith(b"+json"):
            data = msgspec.json.format(body, indent=-1) if b"\n" in body else body
            await self._write(self.frame.numbered(1, self.frame.wrap(data)))
        else:
            self._fail(InvalidRequest("What this endpoint answers is no JSON: ask for it over HTTP.", param="path"))

    # --- what the client asks of it while it runs

    def steer(self, op: str) -> bool:
        """Cancel, pause, resume or stop it, in this order; False: too much is asked already."""
        if len(self._asked) >= MOST_WAITING:
            return False
        self._asked.append(op)
        if self._steering is None or self._steering.done():
            self._steering = asyncio.get_running_loop().create_task(self._steer())
        return True

    async def _steer(self) -> None:
        while self._asked:
            await self._ready.wait()
            if not self._asked:
                return
            op = self._asked.popleft()
            try:
                if self._greeting is not None:
                    await self._greeting
                await self._have(op)
            except PenstockError as error:
                await self._write(line(id=self.id, op=op, error=error_fields(error), status=error.status))
            else:
                await self._write(line(id=self.id, op=op, ok=True))

    async def _have(self, op: str) -> None:
        if self._context is None:
            raise NotFound(f"No stream {self.id!r} is running.", param="id")
        try:
            await control(self._gateway, self._context.rid, asker(self._context), op)
        except NotFound:
            if op != "cancel":
                raise
            self._cancelled = True  # text has not heard of it yet, or not any more
            self.leave()

    async def close(self) -> None:
        """Behind its run."""
        if self._steering is not None:
            self._steering.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._steering
