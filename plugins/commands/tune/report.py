"""How `penstock tune` shows what it would do, does, and has found.

What it is: tables, a bar, and sentences.
What it does not know: devices, files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.kernels.tuning.search import Outcome, ratio

if TYPE_CHECKING:
    from penstock.kernels.tables import Identity
    from penstock.kernels.tuning.run import Ended, Job

CROWD = 1 << 30
"""Bytes in use on the card from which it is not ours alone."""
Rows = Sequence[tuple["Job", Outcome, bool]]


def planned(console: Any, card: Identity | None, jobs: Sequence[Job], cores: int, limit_s: float) -> None:
    """What would be timed."""
    from rich.table import Table

    table = Table(title=None if card is None else f"{card.name}, {card.processors} processors, {card.memory_gb_s} GB/s")
    for name in ("section", "of", "candidates", "loads", "about"):
        table.add_column(name, justify="right" if name in ("candidates", "about") else "left")
    for job in jobs:
        table.add_row(job.name, job.what, str(len(job.candidates)), "; ".join(job.loads), f"{job.seconds(cores):.0f} s")
    console.print(table)
    total = sum(job.seconds(cores) for job in jobs)
    enough = (
        "" if total <= limit_s else f" More than --limit-s {limit_s:.0f}: each section then tries fewer candidates, the first of its list."
    )
    console.print(f"{len(jobs)} sections, about {total:.0f} s with {cores} cores to compile.{enough}")


class Told:
    """Where the tuning is: called by it, and `said` for a line that stays."""

    def __init__(self, update: Callable[[int, str], None], say: Callable[[str], None]) -> None:
        self._update, self.said = update, say

    def __call__(self, done: int, job: Job, candidates: int, what: str) -> None:
        self._update(done, f"{job.name}: {what}, {candidates} of {len(job.candidates)}")


@contextlib.contextmanager
def progress(jobs: Sequence[Job]) -> Iterator[Told]:
    """A bar on a terminal; the lines that stay, everywhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, highlight=False)
    columns = (MofNCompleteColumn(), BarColumn(24), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(jobs))
        yield Told(lambda done, what: bar.update(task, completed=done, description=what), lambda text: console.print(text, soft_wrap=True))


def gain(outcome: Outcome) -> float:
    """After to before, over all loads."""
    return ratio(list(outcome.after.values()), list(outcome.before.values())) if outcome.before and outcome.after else 1.0


def verdict(outcome: Outcome) -> str:
    """What became of a section."""
    if outcome.tiles is None:
        found = "no right tile found" if not outcome.before else "stays"
    else:
        found = "new" if outcome.before else "new: the tile in use does not run"
    return found + ("" if outcome.whole else ", out of time")


def line(job: Job, outcome: Outcome) -> str:
    """Of one section, as soon as it is known."""
    change = f" {gain(outcome) - 1:+.1%}" if outcome.tiles is not None and outcome.before else ""
    return f"{job.name}: {verdict(outcome)}{change} ({outcome.tried} timed, {len(outcome.wrong)} wrong)"


def show(console: Any, rows: Rows) -> None:
    """Everything, microseconds of all loads together."""
    from rich.table import Table

    table = Table()
    for name in ("section", "before us", "after us", "change", "timed", "wrong", "", "tile"):
        table.add_column(name, justify="right" if name not in ("section", "", "tile") else "left")
    for job, outcome, other_bits in rows:
        before, after = (f"{sum(times.values()) * 1e6:.1f}" if times else "-" for times in (outcome.before, outcome.after))
        tile = "" if outcome.tiles is None else " ".join(f"{name}={value}" for name, value in outcome.tiles[job.name].items())
        change = f"{gain(outcome) - 1:+.1%}" if outcome.tiles is not None and outcome.before else ""
        table.add_row(
            job.name,
            before,
            after,
            change,
            str(outcome.tried),
            str(len(outcome.wrong)),
            verdict(outcome) + (", other bits" if other_bits else ""),
            tile,
        )
    console.print(table)


def end(say: Callable[[str], None], path: Path, *, used: bool, rows: Rows, ended: Ended | None) -> None:
    """What is in the file, what is not, and what that means."""
    if ended is None:
        say("Interrupted: what is known is kept.")
    elif ended.lost is not None:
        say(
            f"The GPU gave up under a candidate, and nothing more can be measured in this process: {ended.lost}. What is known is kept; leave that section out (--sections)."
        )
    elif ended.skipped:
        say(f"Not measured: {', '.join(ended.skipped)}. Run it again to go on there, or with a larger --limit-s.")
    new = [job.name for job, outcome, _ in rows if outcome.tiles is not None]
    say(f"{path}: {len(new)} of {len(rows)} sections have new tiles{': ' + ', '.join(new) if new else ''}.")
    if any(other_bits for _, _, other_bits in rows):
        say(
            "Some give other last bits than before (deterministic mode, too, is deterministic with one table): answers may differ, and system_fingerprint says so."
        )
    say("Servers use it from their next start on." if used else f"Servers use it where PENSTOCK_TILES={path} is set.")


def crowd(say: Callable[[str], None], in_use: int) -> None:
    """Whether somebody else is on the card."""
    if in_use > CROWD:
        say(f"{in_use >> 20} MiB of the card are in use by another process: what it does meanwhile is in the times. Better stop it first.")
