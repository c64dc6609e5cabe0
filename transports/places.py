"""How many requests of batches may run at once.

What it is: `Places`: all of them while nobody else asks, fewer the more others do, never none. Who waits for one gets it in turn.
What it does not know: batches, what is asked. A scheduling policy that knows priorities lets others go first anyhow; this holds with any.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator

import msgspec

from penstock.core.protocol.errors import PenstockError
from penstock.transports.gateway import Gateway

LOOK_S = 0.1
"""How soon it is seen that others came or left."""


class _Health(msgspec.Struct):
    requests: int = 0


class Places:
    """`most`: how many while nobody else asks."""

    def __init__(self, gateway: Gateway, most: int) -> None:
        self._gateway = gateway
        self.most = most
        self.taken = 0
        self._asking = 0
        self._elsewhere = 0
        """Requests of other edges, when it was last looked."""
        self._turn = asyncio.Lock()
        self._given = asyncio.Event()

    def limit(self) -> int:
        others = max(self._gateway.active - self._asking, self._elsewhere, 0)
        return max(1, self.most // (1 + others))

    async def take(self, over: Callable[[], bool]) -> None:
        """Wait for a place, or until `over()`: a place is taken in any case."""
        async with self._turn:
            while self.taken >= self.limit() and not over():
                self._given.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_S):
                        await self._given.wait()
        self.taken += 1

    def give(self) -> None:
        self.taken -= 1
        self._given.set()

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """Around a request that holds a place at the gateway."""
        self._asking += 1
        try:
            yield
        finally:
            self._asking -= 1

    async def look(self) -> None:
        """Ask text for what comes from other edges. (What comes from this one is known.)"""
        if self._gateway.config.edge_workers < 2:
            return
        try:
            answer = await self._gateway.query("health", timeout=2.0)
            self._elsewhere = msgspec.json.decode(answer.body, type=_Health).requests - self._asking
        except (PenstockError, msgspec.MsgspecError):
            self._elsewhere = 0
