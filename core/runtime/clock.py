"""Time as a dependency.

What it is: the monotonic and wall clocks that actors and hosts are handed, and a clock that tests move by hand.
What it does not know: sleeping, loops, time zones.
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    def now_ns(self) -> int:
        """Monotonic nanoseconds, comparable between the processes of one host (CLOCK_MONOTONIC)."""
        ...

    def wall_ns(self) -> int:
        """Nanoseconds since the Unix epoch."""
        ...


class SystemClock:
    def now_ns(self) -> int:
        return time.monotonic_ns()

    def wall_ns(self) -> int:
        return time.time_ns()


class FakeClock:
    """A clock that stands still until `advance` is called."""

    def __init__(self, start_ns: int = 1_000_000_000, wall_ns: int = 1_700_000_000_000_000_000) -> None:
        self._now = start_ns
        self._wall = wall_ns

    def now_ns(self) -> int:
        return self._now

    def wall_ns(self) -> int:
        return self._wall

    def advance(self, seconds: float) -> None:
        if seconds < 0:
            raise ValueError("a monotonic clock does not go back")
        step = round(seconds * 1e9)
        self._now += step
        self._wall += step
