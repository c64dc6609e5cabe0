"""Mailboxes of actors that have a task each.

What it is: a bounded FIFO that trio tasks wait at, and the one-shot place where the answer to a question arrives.
What it does not know: actors, hosts.
"""

from __future__ import annotations

from collections import deque

import trio

from penstock.core.protocol.control import Message


class OneShot:
    """Where one answer arrives."""

    __slots__ = ("done", "kind", "value")

    def __init__(self, kind: type[Message]) -> None:
        self.kind = kind
        self.value: Message | None = None
        self.done = trio.Event()


class Mailbox:
    """A bounded FIFO: `put` waits for room, `put_now` never does."""

    def __init__(self, capacity: int) -> None:
        self._items: deque[tuple[Message, OneShot | None]] = deque()
        self._capacity = capacity
        self._filled = trio.Event()
        self._room = trio.Event()

    def put_now(self, message: Message, reply: OneShot | None = None) -> None:
        self._items.append((message, reply))
        self._filled.set()

    async def wait_room(self) -> None:
        while len(self._items) >= self._capacity:
            self._room = trio.Event()
            await self._room.wait()

    async def get(self) -> tuple[Message, OneShot | None]:
        while not self._items:
            self._filled = trio.Event()
            await self._filled.wait()
        item = self._items.popleft()
        if len(self._items) < self._capacity:
            self._room.set()
        return item
