"""How two servers compare over rounds.

What it is: ratios pair by pair (the two figures of one round were measured within seconds, so what slows the machine slows both), their median, and an interval of it by the
bootstrap. What it does not know: what the figures are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """`low` and `high` are None where a single pair says nothing about the spread."""

    median: float
    low: float | None
    high: float | None
    pairs: int


def ratio(ours: Sequence[float | None], theirs: Sequence[float | None], *, more_is_better: bool) -> Ratio | None:
    """How many times as fast ours is: above 1, ours is ahead, whether the figures are rates or times. A round counts where both have a figure; None: no round does."""
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} rounds of one and {len(theirs)} of the other are no pairs")
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    if not pairs:
        return None
    each = [a / b if more_is_better else b / a for a, b in pairs]
    low, high = interval(each) if len(each) > 1 else (None, None)
    return Ratio(median=float(np.median(each)), low=low, high=high, pairs=len(each))


def interval(values: Sequence[float], *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """The bootstrap's percentile interval of the median: of how the median moves when rounds are drawn again with replacement. With five rounds or fewer it is nearly
    their whole range, which is as it should be."""
    drawn = np.random.default_rng(seed).choice(np.asarray(values, dtype=np.float64), size=(resamples, len(values)))
    tail = (1 - level) / 2
    low, high = np.quantile(np.median(drawn, axis=1), (tail, 1 - tail))
    return float(low), float(high)
