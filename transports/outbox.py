"""The bounded buffer of one stream.

What it is: `Outbox` holds the bytes that a client has not taken yet: it parks the request when they become many, and cuts the stream when they are
too many or do not move; `Pulse` ticks all outboxes of an edge (keep-alives, stalls).
What it does not know: what the bytes say, HTTP, requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from penstock.core.protocol.config import Config

WRITE_BYTES = 64 << 10
"""At most so much is handed to the server in one write, so that the rest stays where it is counted."""


class Outbox:
    """Bytes of one stream that the socket has not taken yet.

    `park()` is called when they reach park_bytes, `unpark()` when they are down to half of it, `cut()` when they exceed max_bytes or nothing
    moved for stall_s. `keep_alive` is what leaves when nothing else does. One writer takes, anybody on the loop pushes.
    """

    __slots__ = (
        "_cut",
        "_half",
        "_keep_alive",
        "_loop",
        "_max",
        "_park",
        "_park_at",
        "_parts",
        "_unpark",
        "_waker",
        "closed",
        "moved",
        "parked",
        "unsent",
    )

    def __init__(
        self, config: Config, park: Callable[[], None], unpark: Callable[[], None], cut: Callable[[], None], *, keep_alive: bytes
    ) -> None:
        self._park_at = config.stream_park_bytes
        self._half = config.stream_park_bytes // 2
        self._max = config.stream_max_bytes
        self._park = park
        self._unpark = unpark
        self._cut = cut
        self._keep_alive = keep_alive
        self._loop = asyncio.get_running_loop()
        self._parts: list[bytes] = []
        self._waker: asyncio.Future[None] | None = None
        self.unsent = 0
        self.parked = False
        self.closed = False
        self.moved = self._loop.time()
        """When bytes last left, or when there were none: seconds of the loop's clock."""

    def push(self, data: bytes) -> None:
        if self.closed:
            return
        if not self.unsent:
            self.moved = self._loop.time()
        self._parts.append(data)
        self.unsent += len(data)
        if self.unsent >= self._park_at:
            if self.unsent > self._max:
                self._cut()
            elif not self.parked:
                self.parked = True
                self._park()
        if self._waker is not None:
            self._wake()

    def close(self) -> None:
        """Nothing more is pushed; what is here still leaves."""
        self.closed = True
        self._wake()

    def drop(self) -> None:
        """Forget what is here and close."""
        self._parts.clear()
        self.unsent = 0
        self.close()

    def _wake(self) -> None:
        waker, self._waker = self._waker, None
        if waker is not None and not waker.done():
            waker.set_result(None)

    async def wait(self) -> None:
        """Return when there is something to take, or nothing will come any more."""
        if not self._parts and not self.closed:
            self._waker = self._loop.create_future()
            await self._waker

    def take(self) -> bytes:
        """The next bytes to write; they count as unsent until `sent`."""
        parts = self._parts
        if len(parts) == 1:
            data = parts[0]
            parts.clear()
            return data
        size = count = 0
        for part in parts:
            if size and size + len(part) > WRITE_BYTES:
                break
            size += len(part)
            count += 1
        data = b"".join(parts[:count])
        del parts[:count]
        return data

    @property
    def last(self) -> bool:
        """Was what `take` gave the last of the stream?"""
        return self.closed and not self._parts

    def sent(self, size: int) -> None:
        self.unsent = max(0, self.unsent - size)
        self.moved = self._loop.time()
        if self.parked and self.unsent <= self._half:
            self.parked = False
            self._unpark()

    def tick(self, now: float, keep_alive_s: float, stall_s: float) -> None:
        """From the pulse: `now` in seconds of the loop's clock."""
        if self.closed and not self.unsent:
            return
        if self.unsent:
            if now - self.moved > stall_s:
                self._cut()
        elif now - self.moved >= keep_alive_s:
            self.push(self._keep_alive)


class Pulse:
    """Ticks every open outbox; sleeps while there is none."""

    def __init__(self, config: Config) -> None:
        self._keep_alive_s = config.keep_alive_s
        self._stall_s = config.stream_stall_s
        self._period = max(0.01, min(0.5, config.keep_alive_s / 4, config.stream_stall_s / 4))
        self._boxes: set[Outbox] = set()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, outbox: Outbox) -> None:
        self._boxes.add(outbox)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._period, self._beat)

    def discard(self, outbox: Outbox) -> None:
        self._boxes.discard(outbox)

    def _beat(self) -> None:
        self._timer = None
        loop = asyncio.get_running_loop()
        now = loop.time()
        for outbox in list(self._boxes):
            outbox.tick(now, self._keep_alive_s, self._stall_s)
        if self._boxes:
            self._timer = loop.call_later(self._period, self._beat)
