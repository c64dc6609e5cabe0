"""Links between processes, the trio side.

What it is: `Link` moves the frames of core/runtime/frames.py over a stream: one reader, and one writer task that sends all small frames that wait in
one call, control first. Bounds: `hold` stops reading while the consumer is full, `room` holds producers back, and a peer that takes nothing
until MAX_QUEUED bytes wait has lost the link.
What it does not know: what messages mean, who takes them, which processes exist.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import trio

from penstock.core.protocol.control import Hello, Message
from penstock.core.protocol.errors import ProtocolError
from penstock.core.runtime.frames import FrameDecoder as FrameDecoder
from penstock.core.runtime.frames import Outbox as Outbox
from penstock.core.runtime.frames import check_hello as check_hello
from penstock.core.runtime.frames import encode as encode
from penstock.core.runtime.frames import is_control as is_control
from penstock.core.runtime.frames import keys_of as keys_of
from penstock.core.runtime.frames import make_hello as make_hello
from penstock.core.runtime.frames import schema_fingerprint as schema_fingerprint

HIGH_WATER = 1 << 20
"""Bytes waiting on a link from which on `Link.room` holds producers back."""
MAX_QUEUED = 256 << 20
"""Bytes waiting on a link at which the peer counts as hung and the link is given up."""
GREETING_S = 30.0


class Link:
    """One connection to another process. `greet` first, then `run` until the link ends; `send` from anywhere on the trio thread."""

    def __init__(
        self,
        stream: trio.abc.Stream,
        receives: Any,
        hello: Hello,
        *,
        peers: Collection[str] | None = None,
        max_queued: int = MAX_QUEUED,
    ) -> None:
        """`peers`: the roles that the other side may have (None: any)."""
        self._stream = stream
        self._peers = peers
        self._decoder = FrameDecoder(receives)
        self._hello = hello
        self._outbox = Outbox()
        self._early: list[Any] = []
        self._max_queued = max_queued
        self._work = trio.Event()
        self._room = trio.Event()
        self._scope: trio.CancelScope | None = None
        self._closed = False
        self.peer: Hello | None = None
        self.ended = trio.Event()
        """Set when `run` is over."""

    @property
    def open(self) -> bool:
        return self.peer is not None and not self._closed

    @property
    def queued_bytes(self) -> int:
        return self._outbox.bytes

    async def greet(self, *, sent: bool = False) -> Hello:
        """Exchange Hellos (`sent`: ours is on its way already). Raises ProtocolError (also on silence, or when the peer leaves)."""
        with trio.move_on_after(GREETING_S):
            try:
                if not sent:
                    await self._stream.send_all(encode(self._hello))
                while not self._early:
                    data = await self._stream.receive_some(1 << 16)
                    if not data:
                        raise ProtocolError("The other side closed the link instead of greeting.")
                    self._early = self._decoder.feed(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise ProtocolError(f"The link broke while greeting: {error or type(error).__name__}.") from None
            self.peer = check_hello(self._hello, self._early.pop(0), self._peers)
            return self.peer
        raise ProtocolError(f"The other side of a link did not greet within {GREETING_S:g} s.")

    def send(self, message: Message) -> None:
        """Queue a frame; a closed link drops it (what was on its way is void, PeerDown says so). A peer that hangs loses the link."""
        if self._closed:
            return
        self._outbox.put(message)
        if self._outbox.bytes > self._max_queued:
            self.close()
            return
        self._work.set()

    async def room(self) -> None:
        """Wait until fewer than HIGH_WATER bytes wait here (or the link is closed)."""
        while not self._closed and self._outbox.bytes > HIGH_WATER:
            await self._room.wait()

    async def flush(self) -> None:
        """Wait until everything was handed to the socket (or the link is closed)."""
        while not self._closed and self._outbox:
            await self._room.wait()

    async def run(self, deliver: Callable[[list[Any]], Any], hold: Callable[[], Any] | None = None) -> None:
        """Read and write until either side closes. `deliver(messages)` is a plain call; before reading on, `await hold()`: that is how a
        full consumer holds back this peer. Raises ProtocolError on malformed frames."""
        try:
            with trio.CancelScope() as self._scope:
                if self._closed:
                    return
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write)
                    await self._read(deliver, hold)
                    nursery.cancel_scope.cancel()
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        except* ProtocolError as group:
            raise _first(group) from None
        finally:
            self.close()
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(self._stream)
            self.ended.set()

    async def _read(self, deliver: Callable[[list[Any]], Any], hold: Callable[[], Any] | None) -> None:
        early, self._early = self._early, []
        if early:
            deliver(early)
        while True:
            data = await self._stream.receive_some(1 << 18)
            if not data:
                return
            messages = self._decoder.feed(data)
            if messages:
                deliver(messages)
            if hold is not None:
                await hold()

    async def _write(self) -> None:
        outbox = self._outbox
        while True:
            if not outbox:
                self._room.set()
                self._room = trio.Event()
                await self._work.wait()
                self._work = trio.Event()
                continue
            await self._stream.send_all(outbox.take())
            if outbox.bytes <= HIGH_WATER:
                self._room.set()
                self._room = trio.Event()

    def close(self) -> None:
        """Drop the link at once. What waits is lost."""
        if not self._closed:
            self._closed = True
            self._outbox.clear()
            self._room.set()
            if self._scope is not None:
                self._scope.cancel()


def _first(group: BaseExceptionGroup[ProtocolError]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
