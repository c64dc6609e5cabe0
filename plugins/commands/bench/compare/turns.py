"""Rounds of turns: one server works, the others are idle or not there.

What it is: `Turns`, which brings entrants up, asks each case of each of them in every round, in an order that turns round with the rounds, keeps what was found in a `Comparison`
that can be read at any time, and ends what it started whatever happens. An entrant that fails is told at once and left out, the rest goes on.
What it does not know: how entrants are started and asked, what figures mean, ratios.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from penstock.plugins.commands.bench.compare.cases import WARMING, Asked, Case, NotMeasured, Turn, figures
from penstock.plugins.commands.bench.compare.peers import Entrant, Peer, PeerFailed

SETTLE_S = 0.3
IDLE_CORES = 0.05
PATIENCE_S = 15.0
"""Before a turn the others' processor time is looked at for so long, again and again until they are idle: threads that wait actively for their next work keep a core for a second or
more after the last (vLLM's do), and whoever came next would be measured beside them."""
LEAST_S = 0.05
"""Processor time is counted in hundredths of a second: less than a few of them says nothing."""


@dataclass(kw_only=True)
class Comparison:
    """`found` has a figure a round, None where there is none, by (case, label, entrant)."""

    names: list[str]
    cases: list[Case]
    rounds: int
    about: dict[str, str] = field(default_factory=dict)
    found: dict[tuple[str, str, str], list[float | None]] = field(default_factory=dict)
    failures: list[tuple[str, str]] = field(default_factory=list)
    """(entrant, what happened)."""
    ready_s: dict[str, float] = field(default_factory=dict)
    """Of the first start."""
    memory_bytes: dict[str, int] = field(default_factory=dict)
    """After the last turn, of those whose processes are ours to look at."""
    restless: dict[str, float] = field(default_factory=dict)
    """Cores that an entrant used at most while another was asked, where that is enough to matter."""
    cut: str = ""
    """Why rounds are missing."""

    def __post_init__(self) -> None:
        for case in self.cases:
            for figure in case.figures:
                for name in self.names:
                    self.found[case.name, figure.label, name] = [None] * self.rounds


def order(names: Sequence[str], round_: int) -> list[str]:
    """Reversed every other round: a drift of the machine's speed within a round favours each side in turn."""
    return list(names) if round_ % 2 == 0 else list(reversed(names))


class Turns:
    def __init__(
        self,
        peers: Sequence[Peer],
        cases: Sequence[Case],
        asked: Asked,
        *,
        rounds: int,
        start: Callable[[Peer], Entrant],
        say: Callable[[str], None],
        one_at_a_time: bool = False,
        limit_s: float = float("inf"),
        settle_s: float = SETTLE_S,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.result = Comparison(names=[peer.name for peer in peers], cases=list(cases), rounds=rounds)
        self._peers = {peer.name: peer for peer in peers}
        self._asked, self._start, self._say, self._now = asked, start, say, now
        self._alone, self._settle_s = one_at_a_time, settle_s
        self._limit_s, self._deadline = limit_s, now() + limit_s
        self._up: dict[str, Entrant] = {}
        self._gone: set[str] = set()
        self._out: set[tuple[str, str]] = set()

    def run(self) -> None:
        """All rounds, or as many as the limit has room for."""
        names = self.result.names
        try:
            if not self._alone:
                for name in names:
                    self._bring_up(name)
                for case in self.result.cases:
                    for name in names:
                        self._warm(case, name)
            for round_ in range(self.result.rounds):
                if self._late():
                    break
                self._say(f"round {round_ + 1} of {self.result.rounds}")
                self._round(round_)
        except KeyboardInterrupt:
            self.result.cut = "interrupted"
            raise
        finally:
            self._end(list(self._up))

    def _round(self, round_: int) -> None:
        names = order(self.result.names, round_)
        if not self._alone:
            for case in self.result.cases:
                for name in names:
                    self._turn(case, name, round_)
            return
        for name in names:
            if name not in self._up:
                self._end(list(self._up))
                self._bring_up(name)
                for case in self.result.cases:
                    self._warm(case, name)
            for case in self.result.cases:
                self._turn(case, name, round_)

    def _late(self) -> bool:
        if self._now() >= self._deadline:
            self.result.cut = f"no turn begins after {self._limit_s:.0f} s"
        return bool(self.result.cut)

    def _bring_up(self, name: str) -> None:
        if name in self._gone or self._late():
            return
        self._say(f"{name}: starting")
        begun = self._now()
        try:
            self._up[name] = self._start(self._peers[name])
        except PeerFailed as error:
            self._lost(name, f"not started: {error}")
            return
        took = self._now() - begun
        self.result.about[name] = self._up[name].about
        self.result.ready_s.setdefault(name, took)
        self._say(f"{name}: ready after {took:.1f} s ({self._up[name].about})")

    def _warm(self, case: Case, name: str) -> None:
        """Not counted: first requests of a shape pay for compiling, for first touches of memory and files."""
        self._measured(case, name, WARMING)

    def _turn(self, case: Case, name: str, round_: int) -> None:
        for label, value in self._measured(case, name, round_).items():
            self.result.found[case.name, label, name][round_] = value

    def _measured(self, case: Case, name: str, round_: int | str) -> dict[str, float]:
        """Nothing where it is not up, is out of this case or fails now."""
        entrant = self._up.get(name)
        if entrant is None or (case.name, name) in self._out or self._late():
            return {}
        load = self._asked.load(case, round_)
        others = [one for one in self._up.values() if one is not entrant]
        self._settle(others)
        before = [one.busy_s() for one in others]
        try:
            records, wall = entrant.answer(load)
            self._watch(others, before, wall)
            if memory := entrant.memory_bytes():
                self.result.memory_bytes[name] = memory
            return figures(case, Turn(load=load, records=records, wall=wall))
        except NotMeasured as error:
            self._out.add((case.name, name))
            self._told(name, f"left out of {case.name} from here on: {error}")
        except PeerFailed as error:
            self._lost(name, f"left out from {case.name} on: {error}")
        return {}

    def _settle(self, others: list[Entrant]) -> None:
        begun = self._now()
        while True:
            before = sum(one.busy_s() for one in others)
            time.sleep(self._settle_s)
            if sum(one.busy_s() for one in others) - before <= IDLE_CORES * self._settle_s or self._now() - begun >= PATIENCE_S:
                return

    def _watch(self, others: list[Entrant], before: list[float], wall: float) -> None:
        """Who was not idle while another worked is told, with the figures."""
        for one, used in zip(others, before, strict=True):
            seconds = one.busy_s() - used
            if seconds > LEAST_S and seconds / wall > IDLE_CORES:
                self.result.restless[one.name] = max(seconds / wall, self.result.restless.get(one.name, 0.0))

    def _lost(self, name: str, why: str) -> None:
        self._gone.add(name)
        self._told(name, why)
        self._end([name])

    def _told(self, name: str, why: str) -> None:
        self.result.failures.append((name, why))
        self._say(f"{name}: {why}")

    def _end(self, names: list[str]) -> None:
        """Each of them, even if ending another is interrupted."""
        with contextlib.ExitStack() as stack:
            for name in names:
                if name in self._up:
                    stack.callback(self._up.pop(name).stop)
