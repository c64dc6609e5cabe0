"""One request of a WebSocket.

What it is: `SocketStream`, a request whose payloads become lines, each of which is one message (`SocketFrame`), and which is steered while it runs.
What it does not know: handshakes, other streams of its socket, how the edge answers (carried.py), what payloads say.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from litestar.types import ASGIApp

from penstock.core.protocol.errors import Cancelled, NotFound, PenstockError
from penstock.transports.carried import CARRIED, Carried
from penstock.transports.gateway import Gateway
from penstock.transports.request import Header, RequestContext, Scope, error_fields
from penstock.transports.retained import control
from penstock.transports.socket_messages import encode, line

MOST_WAITING = 16
"""Things that a client may ask of one stream before the first of them is done."""


class SocketFrame:
    """A Frame with an id: payloads become lines, each of which is one message. Marks that are no JSON are left out."""

    headers: Sequence[Header] = ((b"content-type", CARRIED),)
    keep_alive = b""  # sockets have pings
    tells_numbers = True

    def __init__(self, id: str) -> None:
        self._head = b'{"id":' + encode(id) + b',"seq":'

    def wrap(self, payload: bytes) -> bytes:
        return b"" if payload == b"[DONE]" else b',"data":' + payload + b"}\n"

    def numbered(self, number: int, message: bytes) -> bytes:
        return b"%b%d%b" % (self._head, number, message) if message else b""

    def around(self, before: bytes, after: bytes) -> tuple[bytes, bytes]:
        return b',"data":' + before, after + b"}\n"


class SocketStream(Carried):
    """`write` takes lines in turn with the socket's other streams."""

    def __init__(self, id: str, app: ASGIApp, gateway: Gateway, write: Callable[[bytes], Coroutine[Any, Any, None]]) -> None:
        super().__init__(SocketFrame(id), app)
        self.id = id
        self._gateway = gateway
        self._out = write
        self._ready = asyncio.Event()
        """It runs in text, or is over."""
        self._asked: deque[str] = deque()
        self._steering: asyncio.Task[None] | None = None
        self._cancelled = False

    def begun(self, context: RequestContext) -> None:
        super().begun(context)
        self._ready.set()

    async def write(self, data: bytes) -> None:
        await self._out(data)

    async def greet(self, rid: str) -> None:
        await self._out(line(id=self.id, stream=rid))

    async def ignored(self, names: bytes) -> None:
        await self._out(line(id=self.id, ignored=names.decode("latin-1").split(", ")))

    async def run(self, scope: Scope, body: bytes) -> None:
        """Have it answered, and say how it ended."""
        try:
            await super().run(scope, body)
        finally:
            self._ready.set()
            if self._steering is not None and not self._steering.done():
                self._asked.clear()
        await self.greeted()
        if self.error is not None:
            wait = self.headers.get(b"retry-after")
            seconds = int(wait) if wait and wait.isdigit() else None
            await self._out(line(id=self.id, error=self.error, status=self.status, retry_after_s=seconds))
        elif self.complete:
            await self._out(line(id=self.id, done=True))
        elif not self.left or self._cancelled:
            error = Cancelled("The request was cancelled.")
            await self._out(line(id=self.id, error=error_fields(error), status=error.status))

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
                await self.greeted()
                await self._have(op)
            except PenstockError as error:
                await self._out(line(id=self.id, op=op, error=error_fields(error), status=error.status))
            else:
                await self._out(line(id=self.id, op=op, ok=True))

    async def _have(self, op: str) -> None:
        if self.context is None:
            raise NotFound(f"No stream {self.id!r} is running.", param="id")
        try:
            await control(self._gateway, self.context.rid, self.context, op)
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
