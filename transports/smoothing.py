"""Streams that come evenly (stream_smoothing_ms).

What it is: `Smoothing`, which stands before a reply's sinks. Where a step brings several tokens of an answer at once (speculation), it passes the first of them at once and the others evenly over the
time until the next step, as long as steps were apart lately; none waits longer than the bound. The first row of an answer, and its end, wait for nothing: what is before them goes first,
at once. All rows of a request stay in one order, so that a stream that is kept has the same events with and without.
What it does not know: what a reply makes of rows, tokens, drafts, who asked.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from penstock.core.protocol.errors import PenstockError
from penstock.core.protocol.messages import Finished
from penstock.transports.gateway import Batch, Sink

RECENT = 0.5
"""How much the last time between two steps counts against those before it."""


class Timer(Protocol):
    def cancel(self) -> None: ...


class Smoothing:
    """`most_s`: a row waits no longer. `wrong(raised)` is told what a sink raises when its turn has come; then nothing more is passed. `now()` in seconds;
    `later(seconds, call)` calls once."""

    __slots__ = (
        "_arrived",
        "_behind",
        "_due",
        "_gap",
        "_later",
        "_most",
        "_now",
        "_pace",
        "_seen",
        "_several",
        "_step",
        "_timer",
        "_waiting",
        "_wrong",
    )

    def __init__(
        self,
        most_s: float,
        wrong: Callable[[BaseException], None],
        *,
        now: Callable[[], float],
        later: Callable[[float, Callable[[], None]], Timer],
    ) -> None:
        self._most = most_s
        self._wrong = wrong
        self._now = now
        self._later = later
        self._waiting: deque[tuple[float, Callable[[], None]]] = deque()
        """When it leaves at the latest, and how."""
        self._timer: Timer | None = None
        self._step: Any = None
        """The delta that brought the last rows: what comes with one is of one step."""
        self._arrived = 0.0
        self._gap = 0.0
        """How far apart steps are."""
        self._seen: set[tuple[object, int]] = set()
        """Whose rows the step brought."""
        self._several = False
        """Did it bring several of one answer?"""
        self._behind = False
        """Were some of an earlier step still waiting when it came? They go first, in their time."""
        self._pace = self._due = 0.0
        """Between two that leave; when the next one leaves."""

    def sink(self, inner: Sink) -> Sink:
        """In the place of `inner`."""
        return _Smoothed(self, inner)

    def row(self, whose: tuple[object, int], at_once: bool, batch: Batch, call: Callable[[], None]) -> None:
        """`at_once`: it is the answer's first, or its end."""
        now = self._now()
        if batch.delta is not self._step:
            self._begin(batch.delta, now)
        self._several = self._several or whose in self._seen
        self._seen.add(whose)
        if at_once:
            self.flush()
            call()
        elif not self._waiting and len(self._seen) == 1 and not self._several:
            call()
        else:
            self._waiting.append((now + self._most, call))
            if self._timer is None:
                self._timer = self._later(0.0, self._arrange)

    def _begin(self, step: Any, now: float) -> None:
        if self._step is not None:
            gap = now - self._arrived
            self._gap = gap if not self._gap else RECENT * gap + (1 - RECENT) * self._gap
        self._step, self._arrived = step, now
        self._seen.clear()
        self._several = False
        self._behind = bool(self._waiting)
        if self._timer is not None:  # arranged anew with what comes now
            self._timer.cancel()
            self._timer = self._later(0.0, self._arrange)

    def _arrange(self) -> None:
        """All rows of a step are here."""
        self._timer = None
        if not (self._several or self._behind):  # one of each answer: there is nothing to be spread
            self._leave_all()
            return
        now = self._now()
        self._pace = min(self._most, self._gap) / (len(self._waiting) + 1)
        self._due = min(self._due, now + self._pace) if self._behind else now + self._pace
        self._wait(now)

    def _wait(self, now: float) -> None:
        if self._waiting:
            self._timer = self._later(max(0.0, min(self._due, self._waiting[0][0]) - now), self._leave)

    def _leave(self) -> None:
        self._timer = None
        now = self._now()
        try:
            while self._waiting and min(self._due, self._waiting[0][0]) <= now:
                self._due = max(self._due, now - self._pace) + self._pace
                self._waiting.popleft()[1]()
        except BaseException as raised:
            self.clear()
            self._wrong(raised)
            return
        self._wait(now)

    def _leave_all(self) -> None:
        try:
            self.flush()
        except BaseException as raised:
            self._wrong(raised)

    def flush(self) -> None:
        """Pass all that waits. Raises what a sink raises; then the rest is forgotten."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        try:
            while self._waiting:
                self._waiting.popleft()[1]()
        except BaseException:
            self.clear()
            raise

    def clear(self) -> None:
        """Nobody listens any more."""
        self._waiting.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Smoothed:
    __slots__ = ("_begun", "_inner", "_smoothing")

    def __init__(self, smoothing: Smoothing, inner: Sink) -> None:
        self._smoothing = smoothing
        self._inner = inner
        self._begun: set[int] = set()

    def row(self, choice: int, text: str, reason: str, row: int, batch: Batch) -> None:
        at_once = bool(reason) or choice not in self._begun
        self._begun.add(choice)
        call = functools.partial(self._inner.row, choice, text, reason, row, batch)
        self._smoothing.row((self, choice), at_once, batch, call)

    def finished(self, message: Finished) -> None:
        self._smoothing.flush()
        self._inner.finished(message)

    def failed(self, error: PenstockError) -> None:
        self._smoothing.flush()
        self._inner.failed(error)

    def said(self, error: Exception) -> str:
        said = getattr(self._inner, "said", None)
        return str(error) if said is None else str(said(error))
