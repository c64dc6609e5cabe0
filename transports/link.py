"""The asyncio side of Penstock's links.

What it is: an `asyncio.Protocol` that speaks the loop-free frame codec of core/runtime/frames.py: Hello both ways first, then messages; a bounded
send queue in which control goes before data; `Dialer`, which keeps a link to a unix socket open (reconnecting with backoff), and `adopt`,
which makes a link of an inherited socket (the control link to root).
What it does not know: what the messages mean, HTTP, trio.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
from collections.abc import Callable, Collection
from typing import Any, cast

from penstock.core.protocol.errors import ProtocolError, RetryableError
from penstock.core.protocol.messages import Hello, Message
from penstock.core.runtime.frames import FrameDecoder, Outbox, check_hello, encode, is_control

log = logging.getLogger("penstock.edge.link")

HIGH_WATER = 1 << 20
"""Bytes in the socket's own buffer from which on frames wait in the queue (where control can overtake data)."""
MAX_QUEUED = 64 << 20
"""Bytes of waiting data frames; more are refused."""
BACKOFF_S = (0.02, 0.2)
"""First and longest pause between two attempts to connect (a try costs microseconds; edges should learn of a new text process together)."""


class LinkBusy(RetryableError):
    """The other side does not read fast enough: nothing more can be queued."""

    default_code = "queue_full"


class Link(asyncio.Protocol):
    """One connection. `on_open(hello)` after both Hellos, then `on_message` for each message, then `on_close(reason)` once.

    A frame that cannot be decoded, or a Hello of another build, closes the link.
    """

    def __init__(
        self,
        reads: Any,
        hello: Hello,
        *,
        on_open: Callable[[Hello], None],
        on_message: Callable[[Message], None],
        on_close: Callable[[str], None],
        peers: Collection[str] | None = None,
        max_queued: int = MAX_QUEUED,
    ) -> None:
        """`peers`: the roles that the other side may have (None: any)."""
        self._peers = peers
        self._decoder = FrameDecoder(reads)
        self._hello = hello
        self._on_open = on_open
        self._on_message = on_message
        self._on_close = on_close
        self._max_queued = max_queued
        self._transport: asyncio.Transport | None = None
        self._paused = False
        self._outbox = Outbox()
        self._reason = "closed by the other side"
        self.peer: Hello | None = None

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=HIGH_WATER)
        self._transport.write(encode(self._hello))

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._decoder.feed(data):
                if self.peer is None:
                    self._greet(message)
                elif self._transport is not None:
                    self._on_message(message)
        except ProtocolError as error:
            log.error("link to %s: %s", self.peer.role if self.peer else "?", error)
            self.close(str(error))

    def _greet(self, message: Message) -> None:
        self.peer = check_hello(self._hello, message, self._peers)
        self._on_open(self.peer)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        while self._transport is not None and not self._paused and self._outbox:
            self._transport.write(self._outbox.take())

    def eof_received(self) -> None:
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        if self._transport is not None:
            self._transport = None
            self._outbox.clear()
            self._on_close(str(exc) if exc else self._reason)

    # --- for whoever holds it

    @property
    def open(self) -> bool:
        return self._transport is not None and self.peer is not None

    def send(self, message: Message) -> None:
        """Send, or queue by the rule of core/runtime/frames.py (control first). A closed link drops it. Raises LinkBusy when the queue is full."""
        transport = self._transport
        if transport is None:
            return
        if not self._paused and not self._outbox:
            transport.write(encode(message))
        elif self._outbox.bytes > self._max_queued and not is_control(message):
            raise LinkBusy("The server cannot take more requests at the moment.", retry_after_s=1.0)
        else:
            self._outbox.put(message)

    def close(self, reason: str = "closed") -> None:
        if self._transport is not None:
            self._reason = reason
            self._transport.abort()


class Dialer:
    """Keeps one link to a unix socket open until `stop`. `link` is None while it is down."""

    def __init__(
        self,
        path: str,
        reads: Any,
        greeting: Hello,
        *,
        on_open: Callable[[Hello], None],
        on_message: Callable[[Message], None],
        on_close: Callable[[str], None],
        peers: Collection[str] | None = None,
    ) -> None:
        self.path = path
        self._peers = peers
        self._reads = reads
        self._greeting = greeting
        self._on_open = on_open
        self._on_message = on_message
        self._on_close = on_close
        self._task: asyncio.Task[None] | None = None
        self.link: Link | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._keep(), name=f"link {self.path}")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self.link is not None:
            self.link.close("stopped")

    async def _keep(self) -> None:
        loop = asyncio.get_running_loop()
        pause = BACKOFF_S[0]
        while True:
            closed = loop.create_future()
            opened = False

            def on_open(peer: Hello) -> None:
                nonlocal opened
                opened = True
                self._on_open(peer)

            def on_close(reason: str, closed: asyncio.Future[str] = closed) -> None:
                self.link = None
                if not closed.done():
                    closed.set_result(reason)

            link = Link(self._reads, self._greeting, on_open=on_open, on_message=self._on_message, on_close=on_close, peers=self._peers)
            self.link = link  # before the connection: on_open may want to send
            try:
                await loop.create_unix_connection(lambda link=link: link, self.path)  # type: ignore[misc]
            except OSError:
                self.link = None
            else:
                reason = await closed
                if opened:
                    pause = BACKOFF_S[0]
                    self._on_close(reason)
            await asyncio.sleep(pause * (0.5 + random.random()))
            pause = min(2 * pause, BACKOFF_S[1])


async def adopt(
    sock: socket.socket,
    reads: Any,
    greeting: Hello,
    *,
    on_open: Callable[[Hello], None],
    on_message: Callable[[Message], None],
    on_close: Callable[[str], None],
    peers: Collection[str] | None = None,
) -> Link:
    """A link over a connected socket that this process inherited."""
    link = Link(reads, greeting, on_open=on_open, on_message=on_message, on_close=on_close, peers=peers)
    sock.setblocking(False)
    await asyncio.get_running_loop().create_connection(lambda: link, sock=sock)
    return link
