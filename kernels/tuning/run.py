"""A whole tuning: section after section within a limit of time, each result handed over at once.

What it is: `Job`, what is to be done and about how long it takes, and `tune`, which does it. A section gets the share of the time left that its cost is of
all that wait; what it does not use is the others'.
What it does not know: devices (`stand_of` makes stands), files, the terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from penstock.kernels.tuning.search import ROUNDS, Lost, Outcome, Stand, Tiles, key_of, search

COMPILE_S = 2.0
"""Of one kernel on one core."""
TIME_S = 0.03
"""Of one load once, checks included."""
LEAST_S = 2.0
"""A section is not begun with less."""


class Job(NamedTuple):
    """A section, and what it needs."""

    name: str
    what: str
    present: Tiles
    candidates: Sequence[Tiles]
    loads: Sequence[str]

    def seconds(self, cores: int) -> float:
        """About how long it takes."""
        return 1 + len(self.candidates) * len(self.loads) * (COMPILE_S / cores + TIME_S) + ROUNDS * 4 * len(self.loads) * TIME_S / 2


class Closed(Stand, Protocol):
    """A stand that holds memory."""

    @property
    def other_bits(self) -> set[str]:
        """Candidates (`key_of`) with results other than those of what is in use."""

    def close(self) -> None:
        """Give it back."""


class Ended(NamedTuple):
    """How a tuning went."""

    skipped: list[str]
    """Sections for which no time was left, or no memory."""
    lost: str | None
    """Why the device could not go on, with the candidate under which it gave up."""


def tune(
    jobs: Sequence[Job],
    stand_of: Callable[[Job], Closed],
    *,
    clock: Callable[[], float],
    limit_s: float,
    cores: int,
    tell: Callable[[int, Job, int, str], None],
    keep: Callable[[Job, Outcome, bool], None],
) -> Ended:
    """`tell(jobs done, job, candidates done, what goes on)`; `keep(job, outcome, whether its results are other bits than before)`.

    What interrupts it (KeyboardInterrupt) passes through: what was kept until then is whole."""
    end = clock() + limit_s
    skipped: list[str] = []
    for index, job in enumerate(jobs):
        now = clock()
        share = job.seconds(cores) / sum(one.seconds(cores) for one in jobs[index:])
        until = now + (end - now) * share
        if until - now < min(LEAST_S, job.seconds(cores)):
            skipped.append(job.name)
            continue
        tell(index, job, 0, "making room")

        def told(done: int, what: str, index: int = index, job: Job = job) -> None:
            tell(index, job, done, what)

        try:
            stand = stand_of(job)
            try:
                outcome = search(stand, job.present, job.candidates, clock=clock, until=until, tell=told)
                keep(job, outcome, outcome.tiles is not None and key_of(outcome.tiles) in stand.other_bits)
            finally:
                stand.close()
        except MemoryError:
            skipped.append(f"{job.name} (its loads do not fit into the memory)")
        except Lost as lost:
            return Ended([*skipped, *(one.name for one in jobs[index:])], str(lost))
    return Ended(skipped, None)
