"""How requests of batches make way for others.

What it is: `Places`: so many of them run at once while nobody else asks. As soon as somebody does, the oldest of them goes on alone: the others are parked, as those of
clients that read too slowly are, so that they take part in no step and are the first to give their memory away; and no other is begun. Who waits for a place gets it in turn.
What it does not know: batches, what is asked. A scheduling policy that knows priorities lets others go first anyhow; this holds with any.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator

import msgspec

from penstock.core.protocol.errors import PenstockError
from penstock.transports.gateway import Gateway
from penstock.transports.request import RequestContext

LOOK_S = 0.1
"""How soon those that wait for a place see that others have left."""
QUIET_S = 0.1
"""Nobody else has asked for so long: those that were parked go on."""


class _Health(msgspec.Struct):
    requests: int = 0


class Places:
    """`most`: how many while nobody else asks."""

    def __init__(self, gateway: Gateway, most: int) -> None:
        self._gateway = gateway
        self.most = most
        self.taken = 0
        self._asking: dict[RequestContext, bool] = {}
        """Ours, the oldest first: is it parked?"""
        self._elsewhere = 0
        """Requests of other edges, when it was last looked."""
        self._timer: asyncio.TimerHandle | None = None
        self._turn = asyncio.Lock()
        self._given = asyncio.Event()

    def others(self) -> int:
        """Requests that are not ours."""
        mine = sum(1 for context in self._asking if context.keys)
        return max(self._gateway.active - mine, self._elsewhere, 0)

    def limit(self) -> int:
        return 1 if self._timer is not None or self.others() else self.most

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
    def asking(self, context: RequestContext) -> Iterator[None]:
        """Around a request of ours."""
        self._asking[context] = False
        self._gateway.entered = self._entered
        try:
            yield
        finally:
            del self._asking[context]
            if not self._asking:
                self._gateway.entered = None
            self._settle()

    # --- parking

    def _entered(self) -> None:
        """Somebody got in: who it was is known once it has keys."""
        asyncio.get_running_loop().call_soon(self._settle)

    def _settle(self) -> None:
        if self._timer is None and self.others():
            self._timer = asyncio.get_running_loop().call_later(QUIET_S, self._again)
        if self._timer is not None:
            for place, context in enumerate([one for one in self._asking if one.keys]):
                self._park(context, parked=place > 0)

    def _again(self) -> None:
        """Are the others gone?"""
        self._timer = None
        if self.others():
            self._settle()
            return
        for context in self._asking:
            self._park(context, parked=False)
        self._given.set()

    def _park(self, context: RequestContext, *, parked: bool) -> None:
        if self._asking[context] is not parked:
            self._asking[context] = parked
            for key in context.keys:
                (self._gateway.park if parked else self._gateway.unpark)(key)

    async def look(self) -> None:
        """Ask text for what comes from other edges. (What comes from this one is known.)"""
        if self._gateway.config.edge_workers < 2:
            return
        try:
            answer = await self._gateway.query("health", timeout=2.0)
            mine = sum(len(context.keys) for context in self._asking)
            self._elsewhere = max(0, msgspec.json.decode(answer.body, type=_Health).requests - mine)
        except (PenstockError, msgspec.MsgspecError):
            self._elsewhere = 0
        self._settle()
