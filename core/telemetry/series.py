"""Figures of requests: histograms and counters that cost a dictionary or bisect operation to feed.

What it is: `Histogram`, and `Series`: all that is kept of the requests of one pool and class.
What it does not know: pools, classes, how figures are shown (metrics.py).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from penstock.core.telemetry.names import COUNTERS, HISTOGRAMS, KNOWN, OF_REQUESTS, STEP_TOKENS


class Histogram:
    """Counts by upper bound (le), fed with a value and a weight."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, *bounds: Iterable[float]) -> None:
        self.bounds = sorted({float(bound) for some in bounds for bound in some})
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    @classmethod
    def total(cls, parts: Sequence[Histogram]) -> Histogram:
        """Of histograms with the same bounds (one at least)."""
        if len(parts) == 1:
            return parts[0]
        out = cls(parts[0].bounds)
        out.counts = [sum(counts) for counts in zip(*(part.counts for part in parts), strict=True)]
        out.sum = sum(part.sum for part in parts)
        return out

    def observe(self, value: float, weight: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += weight
        self.sum += value * weight

    @property
    def count(self) -> int:
        return sum(self.counts)

    def buckets(self, bounds: Iterable[float]) -> list[tuple[str, float]]:
        """Cumulative counts at `bounds` (a subset of the histogram's own) and +Inf, as text and number."""
        total, at = 0, 0
        out: list[tuple[str, float]] = []
        for bound in bounds:
            while at < len(self.bounds) and self.bounds[at] <= bound:
                total += self.counts[at]
                at += 1
            out.append((str(float(bound)), total))
        out.append(("+Inf", self.count))
        return out


def histogram_of(attribute: str) -> Histogram:
    """An empty one of names.HISTOGRAMS."""
    _, own, _, theirs, _ = HISTOGRAMS[attribute]
    return Histogram(own, theirs)


Counts = dict[tuple[str, ...], float]


def zeros(name: str) -> Counts:
    """A counter's values before anything happened: a rate over a series needs its zero."""
    counts: Counts = {} if COUNTERS[name][0] else {(): 0.0}
    counts.update(((value,), 0.0) for value in KNOWN.get(name, ()))
    return counts


class Series:
    """What happened to the requests of one pool and class. A request keeps the one it belongs to."""

    ttft: Histogram
    itl: Histogram
    tpot: Histogram
    e2e: Histogram
    encode: Histogram
    queue: Histogram
    prefill: Histogram
    decode: Histogram
    inference: Histogram
    prompt: Histogram
    output: Histogram
    longest: Histogram
    params_n: Histogram
    params_max: Histogram
    computed: Histogram
    preempted: Histogram

    def __init__(self) -> None:
        for attribute in HISTOGRAMS.keys() - {STEP_TOKENS}:
            setattr(self, attribute, histogram_of(attribute))
        self.counts = {name: zeros(name) for name in OF_REQUESTS}

    def tally(self, generated: int, unsteady: int, gap_s: float) -> None:
        """Rows of a step: how many brought a token, and for how many of those the last one was not that of the step before, `gap_s` ago."""
        if generated > unsteady:
            self.itl.observe(gap_s, generated - unsteady)
        self.count("tokens", "generated", by=generated)

    def count(self, name: str, *labels: str, by: float = 1) -> None:
        """One of OF_REQUESTS."""
        counts = self.counts[name]
        counts[labels] = counts.get(labels, 0.0) + by
