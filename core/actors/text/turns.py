"""Whose turn it is, where few jobs run at once and somebody else's may take long: templates that requests bring.

What it is: `Turns`, a line of jobs that have an owner and a name (the template's digest). Jobs of a name that was quick lately have places that no other
job gets, so that they wait for each other alone, unless a job of their owner was slow in such a place lately (what is quick once may be slow with other
messages). Of the others one runs at a time: the owner who took the least time lately comes first, and of one owner's what was quick.
What it does not know: threads, what a job is, how long it may take, how many may wait (admission.py).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Container, Hashable
from typing import Generic, TypeVar

from penstock.core.runtime.clock import Clock

QUICK_S = 0.5
"""A name whose last job took no longer is quick."""
MISTRUST_S = 2.0
"""An owner whose slow jobs in places for quick ones took more lately gets none of those places."""
REMEMBERED = 1024
"""Names that are known to be quick; the one that was not seen for longest is forgotten."""
TAU_S = 30.0
"""Memory of the time that an owner took."""
NOTHING_S = 1e-3
"""An owner who took less lately is as good as new."""

Job = TypeVar("Job")


class _Waiting(Generic[Job]):
    __slots__ = ("job", "name", "owner", "started_ns", "strange")

    def __init__(self, job: Job, owner: str, name: Hashable) -> None:
        self.job = job
        self.owner = owner
        self.name = name
        self.started_ns = 0
        self.strange = True


class Turns(Generic[Job]):
    """`places`: jobs that run at once. All but one of them are for quick names, unless there is but one; the one is for the others first."""

    def __init__(self, places: int, clock: Clock) -> None:
        self._places = places
        self._clock = clock
        self._lines: dict[str, list[_Waiting[Job]]] = {}
        """By owner, each in the order in which they came; the owners in that of their turns."""
        self._running: dict[int, _Waiting[Job]] = {}
        self._quick: OrderedDict[Hashable, None] = OrderedDict()
        self._took: dict[str, float] = {}
        self._slow: dict[str, float] = {}
        """By owner: seconds of all jobs, and of slow ones in a place for quick ones, as they counted at `_at_ns`."""
        self._at_ns = clock.now_ns()

    def put(self, job: Job, owner: str, name: Hashable) -> None:
        """It waits."""
        self._lines.setdefault(owner, []).append(_Waiting(job, owner, name))

    def next(self) -> Job | None:
        """A job that may begin now; `done` is to be told when it is over. None: there is no place for any that waits."""
        if len(self._running) >= self._places:
            return None
        if self._places == 1:
            found = self._first((False, True))
        else:
            strange = any(one.strange for one in self._running.values())
            found = (None if strange else self._first((False,))) or self._first((True,))
        if found is None:
            return None
        line = self._lines.pop(found.owner)
        line.remove(found)
        if line:  # last of those who took as much
            self._lines[found.owner] = line
        found.started_ns = self._clock.now_ns()
        found.strange = not self._is_quick(found)
        self._running[id(found.job)] = found
        return found.job

    def done(self, job: Job, idle_s: float = 0.0) -> None:
        """It is over, however. So many of its seconds are not its own."""
        one = self._running.pop(id(job))
        now = self._clock.now_ns()
        self._decay(now)
        seconds = max((now - one.started_ns) / 1e9 - idle_s, 0.0)
        self._took[one.owner] = self._took.get(one.owner, 0.0) + seconds
        self._quick.pop(one.name, None)
        if seconds > QUICK_S:
            if not one.strange:
                self._slow[one.owner] = self._slow.get(one.owner, 0.0) + seconds
            return
        self._quick[one.name] = None
        if len(self._quick) > REMEMBERED:
            self._quick.popitem(last=False)

    def _decay(self, now: int) -> None:
        factor = math.exp((self._at_ns - now) / 1e9 / TAU_S)
        self._at_ns = now
        for seconds in (self._took, self._slow):
            for owner, taken in list(seconds.items()):
                if taken * factor < NOTHING_S:
                    del seconds[owner]
                else:
                    seconds[owner] = taken * factor

    def _is_quick(self, one: _Waiting[Job]) -> bool:
        return one.name in self._quick and self._slow.get(one.owner, 0.0) <= MISTRUST_S

    def _first(self, quick: Container[bool]) -> _Waiting[Job] | None:
        """The first whose name is quick, or not, in the line of the owner who took the least; those who took the same take turns."""
        now = self._clock.now_ns()
        self._decay(now)
        firsts = []
        for line in self._lines.values():
            mine = [one for one in line if self._is_quick(one) in quick]
            if mine:
                firsts.append(next((one for one in mine if one.name in self._quick), mine[0]))
        return min(firsts, key=lambda one: self._lately(one.owner, now), default=None)

    def _lately(self, owner: str, now: int) -> float:
        """Seconds that an owner took, with those of jobs that still run."""
        running = sum(now - one.started_ns for one in self._running.values() if one.owner == owner)
        return self._took.get(owner, 0.0) + running / 1e9
