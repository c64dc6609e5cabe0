"""What comes faster than a client reads, and is not to be stopped.

What it is: `Backlog`, which takes the place of a reply's sinks and keeps what they are told while enough of it is unsent: a stream that is resumed gets all its rows at
once, and says them as its client takes what was said before.
What it does not know: rows, what a reply makes of them, who reads.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable

from penstock.core.protocol.errors import PenstockError
from penstock.core.protocol.messages import Finished
from penstock.transports.gateway import Batch, Sink
from penstock.transports.outbox import Outbox


class Backlog:
    """`most`: with so many bytes unsent, nothing more is said for now. `wrong(raised)` is told what a sink raises; then nothing more is said."""

    def __init__(self, outbox: Outbox, most: int, wrong: Callable[[BaseException], None]) -> None:
        self._outbox = outbox
        self._most = most
        self._wrong = wrong
        self._calls: deque[Callable[[], None]] = deque()

    def sink(self, inner: Sink) -> Sink:
        """In the place of `inner`. What belongs to several of them keeps its order."""
        return _Behind(self, inner)

    def add(self, call: Callable[[], None]) -> None:
        self._calls.append(call)
        self.refill()

    def clear(self) -> None:
        self._calls.clear()

    def refill(self) -> None:
        """Say as much as may wait to be sent."""
        while self._calls and self._outbox.unsent < self._most:
            call = self._calls.popleft()
            try:
                call()
            except BaseException as raised:
                self._calls.clear()
                self._wrong(raised)


class _Behind:
    def __init__(self, backlog: Backlog, inner: Sink) -> None:
        self._backlog = backlog
        self._inner = inner

    def row(self, choice: int, text: str, reason: str, row: int, batch: Batch) -> None:
        self._backlog.add(functools.partial(self._inner.row, choice, text, reason, row, batch))

    def finished(self, message: Finished) -> None:
        self._backlog.add(functools.partial(self._inner.finished, message))

    def failed(self, error: PenstockError) -> None:
        self._backlog.clear()  # whoever resumes the stream gets it again
        self._inner.failed(error)
