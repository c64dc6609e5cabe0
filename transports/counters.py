"""What an edge counts.

What it is: flat cumulative counters as EdgeStats carries them (text adds them up over all edges for /metrics), the HTTP request counts and
durations, which become names only when somebody reads them, and what there is of something now.
What it does not know: links, routes, Prometheus beyond its flat names.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Protocol

DURATION_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class CounterSource(Protocol):
    """Counts that are put into names only when somebody reads them; `changed` since they were read."""

    @property
    def changed(self) -> bool: ...

    def __call__(self) -> dict[str, float]: ...


class Counters:
    """Flat cumulative counters, name{labels} -> number, as EdgeStats carries them."""

    def __init__(self) -> None:
        self._values: dict[str, float] = {}
        self._changed = False
        self.sources: list[CounterSource] = []

    def add(self, name: str, amount: float = 1) -> None:
        self._values[name] = self._values.get(name, 0) + amount
        self._changed = True

    @property
    def changed(self) -> bool:
        return self._changed or any(source.changed for source in self.sources)

    def touch(self) -> None:
        """Whoever read before knows nothing any more."""
        self._changed = True

    def read(self) -> dict[str, float]:
        self._changed = False
        out = dict(self._values)
        for source in self.sources:
            out |= source()
        return out

    def text(self) -> str:
        return "".join(f"{name} {value:g}\n" for name, value in sorted(self.read().items()))


class Gauges:
    """`now` tells how many there are, by flat name; it is asked each second, and must take no time."""

    def __init__(self, now: Callable[[], dict[str, float]]) -> None:
        self._now = now
        self._told: dict[str, float] = {}

    @property
    def changed(self) -> bool:
        return self._now() != self._told

    def __call__(self) -> dict[str, float]:
        self._told = self._now()
        return dict(self._told)


class RequestCounts:
    """http_requests_total and http_request_duration_seconds, kept as numbers until somebody reads them."""

    def __init__(self) -> None:
        self._statuses: dict[tuple[str, str, int], int] = {}
        self._durations: dict[tuple[str, str], list[float]] = {}  # counts per bucket, one more above, then the sum
        self.changed = False

    def observe(self, handler: str, method: str, status: int, seconds: float) -> None:
        key = (handler, method, status)
        self._statuses[key] = self._statuses.get(key, 0) + 1
        row = self._durations.get((handler, method))
        if row is None:
            row = self._durations[handler, method] = [0] * (len(DURATION_BUCKETS) + 2)
        row[bisect_left(DURATION_BUCKETS, seconds)] += 1
        row[-1] += seconds
        self.changed = True

    def __call__(self) -> dict[str, float]:
        self.changed = False
        out: dict[str, float] = {}
        for (handler, method, status), count in self._statuses.items():
            out[f'http_requests_total{{handler="{handler}",method="{method}",status="{status}"}}'] = count
        for (handler, method), row in self._durations.items():
            labels = f'handler="{handler}",method="{method}"'
            total = 0.0
            for bound, number in zip((*DURATION_BUCKETS, "+Inf"), row[:-1], strict=True):
                total += number
                out[f'http_request_duration_seconds_bucket{{{labels},le="{bound}"}}'] = total
            out[f"http_request_duration_seconds_sum{{{labels}}}"] = row[-1]
            out[f"http_request_duration_seconds_count{{{labels}}}"] = total
        return out
