"""Who listens to what runs.

What it is: what happens when a reader comes, leaves, is slow or says wait: a request is parked while there is a reason for it (`hold`), and the engine hears of the first
reason and the last; a retained stream goes from edge to edge, and without a reader ends, goes on or waits, as its client said. Streams whose time is over are forgotten.
What it does not know: rows (retained.py keeps them), how requests end (ending.py), links.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from penstock.core.actors.text.desk import Desk, Outbound, rejected
from penstock.core.actors.text.ending import Ending
from penstock.core.actors.text.ledger import ADMITTED, Request
from penstock.core.actors.text.retained import Kept
from penstock.core.protocol.errors import StreamNotFound, StreamTaken, StreamTooLong
from penstock.core.protocol.messages import Attach, Attached, Detach, Park, ParkCause, Unpark
from penstock.core.runtime.actor import To


class Readers:
    def __init__(self, desk: Desk, ending: Ending) -> None:
        self._desk = desk
        self._streams = desk.streams
        self._ending = ending

    def hold(self, request: Request, why: ParkCause, on: bool) -> Iterable[Outbound]:
        """A reason to produce nothing for it comes or goes."""
        before = request.parked
        request.parked = before | {why} if on else before - {why}
        if bool(before) is bool(request.parked):
            return ()
        if on:
            request.series.count("parks", why)
        if request.traced:
            request.events.append(("parked" if on else "resumed", self._desk.clock.now_ns()))
        if request.state != ADMITTED or request.lane is None:
            return ()
        return (To(Park(key=request.key, why=why) if on else Unpark(key=request.key, why=why), request.lane.engine),)

    def attach(self, message: Attach) -> Iterator[Outbound]:
        """Everything so far goes to the new reader, and then what comes."""
        yield To(Attached(mark=message.mark), message.edge)
        kept = self._streams.find(message.rid, message.tenant)
        if kept is None or kept.log is None or kept.keys != message.keys:
            gone = kept is None or kept.keys != message.keys
            for key in message.keys:
                yield To(rejected(key, StreamNotFound(message.rid) if gone else StreamTooLong()), message.edge)
            return
        if kept.edge is not None and kept.edge != message.edge:
            for key in kept.requests:
                yield To(rejected(key, StreamTaken()), kept.edge)
        kept.edge = message.edge
        for request in kept.requests.values():
            request.edge = message.edge
        yield from kept.again()
        for request in kept.requests.values():
            yield from self.hold(request, "slow", False)  # that was another connection
            yield from self.hold(request, "detached", False)

    def detach(self, message: Detach) -> Iterator[Outbound]:
        kept = self._streams.of_key(message.key)
        if kept is None:  # it could not be retained: as any other
            request = self._desk.ledger.requests.get(message.key)
            if request is not None and request.kept is None:
                yield from self._ending.drop(request, message.cause)
        elif kept.edge == message.edge:
            yield from self._left(kept, message.cause)

    def lose(self, edge: int) -> Iterator[Outbound]:
        """An edge is gone, with all its connections."""
        for kept in self._streams:
            if kept.edge == edge:
                yield from self._left(kept, "disconnect")

    def _left(self, kept: Kept, cause: str) -> Iterator[Outbound]:
        """Nobody listens to it any more."""
        kept.edge = None
        kept.since_ns = self._desk.clock.now_ns()
        for request in list(kept.requests.values()):
            yield from self.hold(request, "slow", False)  # that was the connection
            if kept.on_disconnect == "cancel" or kept.log is None:
                yield from self._ending.revoke(request, cause)
            elif kept.on_disconnect == "park" or kept.full:
                yield from self.hold(request, "detached", True)

    def told(self, out: Iterable[Outbound]) -> Iterator[Outbound]:
        """What a step brought. Streams without a reader that it made too long wait for one from here on."""
        yield from out
        while self._streams.filled:
            yield from self._wait(self._streams.filled.pop())

    def _wait(self, kept: Kept) -> Iterator[Outbound]:
        """For a reader, if it has none."""
        if kept.edge is None:
            for request in kept.requests.values():
                yield from self.hold(request, "detached", True)

    def tend(self, now_ns: int) -> Iterator[Outbound]:
        """Time passes: who cannot be kept any longer without a reader waits for one, and whose time is over is forgotten."""
        crowded = not self._streams.make_room()
        for kept in self._streams:
            if crowded or kept.full:
                yield from self._wait(kept)
        for kept in self._streams.overdue(now_ns):
            for request in list(kept.requests.values()):
                yield from self._ending.revoke(request, "timeout")
            self._streams.forget(kept)
