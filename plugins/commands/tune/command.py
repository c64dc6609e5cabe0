"""The command `penstock tune`.

What it is: options, progress and output; each section's result is in the file as soon as it is known.
What it does not know: what is measured (kernels/tuning), how a table is read at start (kernels/tables.py).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from penstock.kernels.tables import Identity
    from penstock.kernels.tuning.run import Ended, Job
    from penstock.kernels.tuning.search import Outcome
    from penstock.kernels.tuning.section import Room, Shape


@click.command()
@click.option("--device", type=click.IntRange(min=0), help="Number of the GPU; default: the first that CUDA shows.")
@click.option(
    "--model", "models", multiple=True, metavar="FOLDER|1B|8B",
    help="Sizes to tune for: those of a model (its config.json is read), or of a Llama; may be given again. Default: 1B and 8B.",
)  # fmt: skip
@click.option(
    "--sections", metavar="NAMES",
    help="Only these, divided by commas (linear, attention.split, w8a8, ...; all: quantised ones, too). Default: what a model in 16 bits uses.",
)  # fmt: skip
@click.option("--limit-s", type=click.FloatRange(0, min_open=True), default=300.0, show_default=True, help="Longest time.")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="The file to write; default: in the cache, where it is found at start."
)
@click.option("--dry-run", is_flag=True, help="Only say what would be timed, and about how long it takes.")
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
def tune(
    device: int | None, models: tuple[str, ...], sections: str | None, limit_s: float, out: Path | None, dry_run: bool, as_json: bool
) -> None:  # fmt: skip
    """Measure which tiles this GPU's kernels are fastest in, and keep them for every later start. Takes minutes, once for a kind of card; the card should do nothing
    else meanwhile. Interrupted (Ctrl-C), it keeps what is known; run again, it begins with what it did not reach."""
    import torch

    from penstock.kernels import gpu, tables
    from penstock.plugins.commands.tune import report

    shapes, narrow = _shapes(models)
    there = torch.cuda.is_available()
    if not there and not dry_run:
        raise click.ClickException("There is no GPU that CUDA shows. `penstock tune --dry-run` says what would be measured on one.")
    if there and not tables.triton_version():
        raise click.ClickException("Triton is not installed. Install penstock[gpu].")
    if there and device is not None:
        if device >= torch.cuda.device_count():
            raise click.UsageError(f"--device {device}: CUDA shows {torch.cuda.device_count()} GPUs, counted from 0.")
        torch.cuda.set_device(device)
        gpu.forget_tables()
    card = tables.identity()
    found = tables.own()
    jobs = _jobs(sections, shapes, narrow, set() if found.table is None else _reached(found.table.facts))
    if dry_run:
        report.planned(_console(), card, jobs, _cores(), limit_s)
        return
    assert card is not None
    if found.problem:
        click.echo(f"{found.problem} It is not taken into account.", err=True)
    path = _target(out, card)
    kept = Kept(path, card, dict(found.tiles), {} if found.table is None else dict(found.table.facts.get("measured") or {}))
    kept.save()  # better known now than in the end that it cannot be written
    ended = _run(jobs, shapes, limit_s, kept)
    if as_json:
        click.echo(path.read_text(encoding="utf-8"), nl=False)
    else:
        report.show(_console(), kept.rows)
    report.end(lambda text: click.echo(text, err=True), path, used=_used(path, card), rows=kept.rows, ended=ended)
    if ended is None or ended.lost is not None:
        sys.exit(130 if ended is None else 1)


class Kept:
    """What is known so far, and its file."""

    def __init__(self, path: Path, card: Identity, tiles: dict[str, dict[str, int]], measured: dict[str, Any]) -> None:
        self.path, self.card = path, card
        self.tiles, self.measured = tiles, measured
        self.rows: list[tuple[Job, Outcome, bool]] = []

    def take(self, job: Job, outcome: Outcome, other_bits: bool) -> None:
        """One section's result."""
        self.rows.append((job, outcome, other_bits))
        self.tiles.update(outcome.tiles or {})
        self.measured[job.name] = {
            "before_us": {load: round(seconds * 1e6, 2) for load, seconds in outcome.before.items()},
            "after_us": {load: round(seconds * 1e6, 2) for load, seconds in outcome.after.items()},
            "tried": outcome.tried,
            "wrong": len(outcome.wrong),
            "whole": outcome.whole,
        }
        self.save()

    def save(self) -> None:
        """Whole or not at all."""
        import torch

        from penstock.kernels import tables
        from penstock.version import __version__

        facts = {
            "penstock": __version__,
            "triton": tables.triton_version(),
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "measured": self.measured,
        }
        try:
            tables.write(self.path, self.card, self.tiles, facts)
        except OSError as error:
            raise click.ClickException(f"{self.path} cannot be written ({error.strerror}). Name another file with --out.") from None


def _run(jobs: Sequence[Job], shapes: Sequence[Shape], limit_s: float, kept: Kept) -> Ended | None:
    """None: it was interrupted."""
    import torch

    from penstock.kernels.tuning.run import tune as run
    from penstock.kernels.tuning.sections import SECTIONS
    from penstock.kernels.tuning.stand import DeviceStand, room_of
    from penstock.plugins.commands.tune import report

    rooms: list[Room] = []

    def stand_of(job: Job) -> DeviceStand:
        if not rooms:
            shared = torch.cuda.mem_get_info()
            report.crowd(lambda text: click.echo(text, err=True), shared[1] - shared[0])
            rooms.append(room_of(torch.device("cuda", torch.cuda.current_device())))
        torch.cuda.empty_cache()
        return DeviceStand(SECTIONS[job.name], shapes, rooms[0], job.present, kept.tiles)

    with report.progress(jobs) as tell:
        try:
            return run(jobs, stand_of, clock=time.monotonic, limit_s=limit_s, cores=_cores(), tell=tell, keep=_told(kept, tell.said))
        except KeyboardInterrupt:
            return None


def _told(kept: Kept, say: Callable[[str], None]) -> Callable[[Job, Outcome, bool], None]:
    from penstock.plugins.commands.tune import report

    def keep(job: Job, outcome: Outcome, other_bits: bool) -> None:
        kept.take(job, outcome, other_bits)
        say(report.line(job, outcome))

    return keep


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _console() -> Any:
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def _shapes(models: tuple[str, ...]) -> tuple[list[Shape], bool]:
    """And whether one of them has fewer than 16 bits."""
    from penstock.kernels.tuning.section import SHAPES
    from penstock.plugins.commands.tune.shapes import shape_of

    found, narrow = [], False
    for model in models or tuple(SHAPES):
        if model.lower() in SHAPES and not Path(model).exists():
            found.append(SHAPES[model.lower()])
        elif Path(model).exists():
            shape, fewer = shape_of(Path(model))
            found.append(shape)
            narrow |= fewer
        else:
            raise click.UsageError(f"--model {model}: there is no such folder, and the built-in sizes are {', '.join(SHAPES)}.")
    return list(dict.fromkeys(found)), narrow


def _jobs(words: str | None, shapes: Sequence[Shape], narrow: bool, reached: set[str]) -> list[Job]:
    """What was not reached before comes first."""
    import torch

    from penstock.kernels.tuning.sections import SECTIONS, chosen
    from penstock.kernels.tuning.stand import card_of, job_of

    card = card_of(torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu"))
    try:
        wanted = chosen([word.strip() for word in (words or "").split(",") if word.strip()], narrow_too=narrow)
    except KeyError as error:
        raise click.UsageError(f"--sections {error.args[0]}: there is none of that name. There are all, {', '.join(SECTIONS)}.") from None
    jobs = [job for job in (job_of(section, shapes, card) for section in wanted) if job.loads]
    return sorted(jobs, key=lambda job: job.name in reached)


def _reached(facts: dict[str, Any]) -> set[str]:
    measured = facts.get("measured")
    return (
        {name for name, one in measured.items() if isinstance(one, dict) and one.get("whole") is True}
        if isinstance(measured, dict)
        else set()
    )


def _target(out: Path | None, card: Identity) -> Path:
    """The file to write."""
    from penstock.kernels import cache, tables

    asked = os.environ.get(tables.VARIABLE, "")
    if out is not None or asked not in ("", tables.SHIPPED):
        return out or Path(asked)
    if cache.directory(tables.FOLDER) is None:
        raise click.ClickException(
            f"The cache {cache.root()} cannot be used: it must be a folder that you alone can write. Name another with PENSTOCK_CACHE, or a file with --out."
        )
    return tables.own_path(card)


def _used(path: Path, card: Identity) -> bool:
    """Whether it is what a server of this user finds at start."""
    from penstock.kernels import tables

    asked = os.environ.get(tables.VARIABLE, "")
    return path.absolute() == (Path(asked) if asked else tables.own_path(card)).absolute()
