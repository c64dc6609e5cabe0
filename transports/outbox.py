"""The bounded buffer of one stream.

What it is: `Outbox` holds the bytes that a client has not taken yet: it parks the request when they become many, and cuts the stream when they are
too many or do not move; what the server itself has to say at once, however much, is not made before the client takes it; `Pulse` ticks all outboxes of an edge (keep-alives, stalls).
What it does not know: what the bytes say, HTTP, requests.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from typing import Literal

from penstock.core.protocol.config import Config

CutCause = Literal["stalled", "full"]

WRITE_BYTES = 64 << 10
"""At most so much is handed to the server in one write, so that the rest stays where it is counted."""


class Outbox:
    """Bytes of one stream that the socket has not taken yet, and what is made only when it takes them.

    `park()` is called when they reach park_bytes, `unpark()` when they are down to half of it, `cut("full")` when they exceed max_bytes, `cut("stalled")`
    when nothing moved for stall_s. `keep_alive` is what leaves when nothing else does. One writer takes, anybody on the loop pushes.
    """

    __slots__ = (
        "_behind",
        "_cut",
        "_half",
        "_keep_alive",
        "_loop",
        "_max",
        "_park",
        "_park_at",
        "_parts",
        "_tail",
        "_unpark",
        "_waker",
        "closed",
        "moved",
        "parked",
        "unsent",
    )

    def __init__(
        self, config: Config, park: Callable[[], None], unpark: Callable[[], None], cut: Callable[[CutCause], None], *, keep_alive: bytes
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
        self._behind: deque[tuple[Iterator[bytes], list[bytes]]] = deque()
        """Behind the parts: what is made while it leaves, each with the parts that were pushed behind it."""
        self._tail = self._parts
        """Where the next part goes."""
        self._waker: asyncio.Future[None] | None = None
        self.unsent = 0
        self.parked = False
        self.closed = False
        self.moved = self._loop.time()
        """When bytes last left, or when there were none: seconds of the loop's clock."""

    def push(self, data: bytes) -> None:
        if self.closed:
            return
        if not self.unsent and not self._behind:
            self.moved = self._loop.time()
        self._tail.append(data)
        self.unsent += len(data)
        if self.unsent >= self._park_at:
            if self.unsent > self._max:
                self._cut("full")
            elif not self.parked:
                self.parked = True
                self._park()
        if self._waker is not None:
            self._wake()

    def push_later(self, made: Iterator[bytes]) -> None:
        """What the writer is to make when it comes to it, part by part (`later`): it is never unsent, however large it is as a whole."""
        if self.closed:
            return
        if not self.unsent and not self._behind:
            self.moved = self._loop.time()
        self._tail = []
        self._behind.append((made, self._tail))
        if self._waker is not None:
            self._wake()

    @property
    def later(self) -> Iterator[bytes] | None:
        """What comes next, if that is to be made; until `no_more` of it."""
        return self._behind[0][0] if self._behind and not self._parts else None

    def no_more(self, made: Iterator[bytes]) -> None:
        """`later` is at its end: what was pushed behind it comes next."""
        if self._behind and self._behind[0][0] is made:
            _, self._parts = self._behind.popleft()

    def close(self) -> None:
        """Nothing more is pushed; what is here still leaves."""
        self.closed = True
        self._wake()

    def forget(self) -> None:
        """Forget what is here, and that it was too much."""
        self._behind.clear()
        self._parts.clear()
        self._tail = self._parts
        self.unsent = 0
        self.parked = False

    def drop(self) -> None:
        """Forget what is here and close."""
        self.forget()
        self.close()

    def _wake(self) -> None:
        waker, self._waker = self._waker, None
        if waker is not None and not waker.done():
            waker.set_result(None)

    async def wait(self) -> None:
        """Return when there is something to take, or nothing will come any more."""
        if not self._parts and not self._behind and not self.closed:
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
        return self.closed and not self._parts and not self._behind

    def sent(self, size: int) -> None:
        self.unsent = max(0, self.unsent - size)
        self.moved = self._loop.time()
        if self.parked and self.unsent <= self._half:
            self.parked = False
            self._unpark()

    def tick(self, now: float, keep_alive_s: float, stall_s: float) -> None:
        """From the pulse: `now` in seconds of the loop's clock."""
        if self.closed and not self.unsent and not self._behind:
            return
        if self.unsent or self._behind:
            if now - self.moved > stall_s:
                self._cut("stalled")
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
