"""Which of some tiles is the fastest, and whether it may take the place of those in use: the search by itself.

What it is: `search`. A candidate that is wrong is out before its time is looked at. The few that were fastest alone then meet the tiles in use in rounds,
one after the other in changing order, so that a card that slows down (heat, power, a neighbour) slows all of them: who wins is at least MARGIN faster
in two rounds of three, and no load is more than SLOWER slower. Otherwise what is in use stays. Time, and what runs, are given.
What it does not know: kernels, devices, torch, files.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

Tile = dict[str, int]
Tiles = Mapping[str, Tile]
"""Tiles by the name of their table: what is chosen together."""

MARGIN = 0.98
SLOWER = 1.05
ROUNDS, LEAST_ROUNDS = 9, 5
FINALISTS, DOUBT = 3, 1.02
"""So many go on, if alone they were not slower than this: the card may have slowed down since."""
CHUNK = 8
"""Candidates that are compiled together, between looks at the clock."""


class Stand(Protocol):
    """Where candidates run."""

    @property
    def loads(self) -> Sequence[str]:
        """What is timed, by name."""

    def prepare(self, candidates: Sequence[Tiles]) -> None:
        """Compile them, wrong ones too."""

    def check(self, candidate: Tiles) -> str | None:
        """What is wrong with it, if anything is. Raises Lost where nothing can be measured any more."""

    def time(self, candidate: Tiles, load: int) -> float:
        """Seconds, once; of a candidate that was checked."""


class Lost(Exception):
    """The device gave up under a candidate: nothing more can be run in this process."""


class Outcome(NamedTuple):
    """What came of a section."""

    tiles: Tiles | None
    """The winner; None: what is in use stays."""
    before: dict[str, float]
    """Seconds of what was in use, by load; empty where it could not run."""
    after: dict[str, float]
    """Of the winner in the same rounds, else as `before`."""
    tried: int
    """Candidates of which the time is known."""
    wrong: list[tuple[Tiles, str]]
    """Those that were out, and why."""
    whole: bool
    """Whether all candidates were tried, and all rounds run."""


def key_of(tiles: Tiles) -> str:
    """Of a candidate, for tables and texts."""
    return json.dumps(tiles, sort_keys=True)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Geometric mean of ours to theirs, load by load."""
    return math.exp(statistics.fmean(math.log(a / b) for a, b in zip(ours, theirs, strict=True)))


def search(
    stand: Stand,
    present: Tiles,
    candidates: Sequence[Tiles],
    *,
    clock: Callable[[], float],
    until: float,
    tell: Callable[[int, str], None] = lambda done, what: None,
) -> Outcome:
    """`tell(candidates done, what goes on)`. Raises Lost. The clock is looked at between measurements: a look may come late by one of them."""
    loads = range(len(stand.loads))
    others = [candidate for candidate in candidates if candidate != present]
    wrong: list[tuple[Tiles, str]] = []
    tell(0, "compiling")
    stand.prepare([present, *others[:CHUNK]])
    fault = stand.check(present)
    if fault is not None:
        wrong.append((present, fault))
    quick: list[tuple[float, Tiles]] = []
    done = 0
    base = [1.0] * len(loads)
    for first in range(0, len(others), CHUNK):
        chunk = others[first : first + CHUNK]
        if clock() >= until:
            break
        if first:
            tell(done, "compiling")
            stand.prepare(chunk)
        if fault is None:
            base = [stand.time(present, load) for load in loads]
        for candidate in chunk:
            if clock() >= until:
                break
            tell(done, "checking and timing")
            reason = stand.check(candidate)
            if reason is None:
                quick.append((ratio([stand.time(candidate, load) for load in loads], base), candidate))
            else:
                wrong.append((candidate, reason))
            done += 1
    finalists = [
        candidate for score, candidate in sorted(quick, key=lambda pair: pair[0])[:FINALISTS] if score < DOUBT or fault is not None
    ]
    runners = finalists if fault is not None else [present, *finalists]
    if not runners:
        return Outcome(None, {}, {}, len(quick), wrong, done == len(others))
    rounds: list[list[list[float]]] = []  # [round][runner][load]
    while len(rounds) < ROUNDS and (clock() < until or not rounds):
        tell(done, "comparing")
        times: dict[int, list[float]] = {}
        for turn in range(len(runners)):
            runner = (turn + len(rounds)) % len(runners)
            times[runner] = [stand.time(runners[runner], load) for load in loads]
        rounds.append([times[runner] for runner in range(len(runners))])
    whole = done == len(others) and len(rounds) == ROUNDS
    medians = [[statistics.median(one[runner][load] for one in rounds) for load in loads] for runner in range(len(runners))]

    def seconds(runner: int) -> dict[str, float]:
        return dict(zip(stand.loads, medians[runner], strict=True))

    if fault is not None:  # anything that is right is better
        best = min(range(len(runners)), key=lambda runner: ratio(medians[runner], medians[0]))
        return Outcome(runners[best], {}, seconds(best), len(quick), wrong, whole)
    best, least = 0, 1.0
    for runner in range(1, len(runners)):
        ratios = [ratio(one[runner], one[0]) for one in rounds]
        won = sum(value <= MARGIN for value in ratios)
        even = all(ours <= SLOWER * theirs for ours, theirs in zip(medians[runner], medians[0], strict=True))
        if len(rounds) >= LEAST_ROUNDS and 3 * won >= 2 * len(rounds) and even and statistics.median(ratios) < least:
            best, least = runner, statistics.median(ratios)
    return Outcome(runners[best] if best else None, seconds(0), seconds(best), len(quick), wrong, whole)
