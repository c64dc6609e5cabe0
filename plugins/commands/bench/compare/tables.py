"""A comparison as a table.

What it is: rows of a comparison (a server's median and range in a figure, and how many times as fast ours is), on the screen and as Markdown, under the machine's facts.
What it does not know: how it was measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from penstock.plugins.commands.bench.compare.peers import OURS
from penstock.plugins.commands.bench.compare.ratios import Ratio, ratio
from penstock.plugins.commands.bench.compare.turns import Comparison

HEADINGS = ("case", "server", "median", "range", "times as fast: median of pairs", "95 % interval")
READING = (
    "Times as fast: Penstock's figure over the other's (for times the other's over Penstock's), round by round; above 1, Penstock is ahead. The interval is the bootstrap's, of the"
    " median over rounds."
)


@dataclass(frozen=True, kw_only=True)
class Row:
    case: str
    figure: str
    server: str
    about: str
    values: list[float | None]
    ratio: Ratio | None
    """None in our own rows, and where no round has both figures."""

    @property
    def counted(self) -> list[float]:
        return [value for value in self.values if value is not None]

    def cells(self) -> list[str]:
        some = self.counted
        spread = f"{amount(min(some))}..{amount(max(some))}" if some else "-"
        times, interval = "-", "-"
        if self.ratio is not None:
            times = f"{self.ratio.median:.2f} (n={self.ratio.pairs})"
            if self.ratio.low is not None and self.ratio.high is not None:
                interval = f"{self.ratio.low:.2f}..{self.ratio.high:.2f}"
        named = f"{self.server} ({self.about})" if self.about else self.server
        return [f"{self.case}, {self.figure}", named, amount(statistics.median(some)) if some else "-", spread, times, interval]


def amount(value: float) -> str:
    """Three figures or more: what a decimal of a large number says is noise."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def rows(result: Comparison) -> list[Row]:
    """Case by case, figure by figure, in the order of the servers."""
    out = []
    for case in result.cases:
        for figure in case.figures:
            ours = result.found[case.name, figure.label, OURS]
            for name in result.names:
                values = result.found[case.name, figure.label, name]
                times = None if name == OURS else ratio(ours, values, more_is_better=figure.more_is_better)
                out.append(
                    Row(case=case.name, figure=figure.label, server=name, about=result.about.get(name, ""), values=values, ratio=times)
                )
    return out


def notes(result: Comparison) -> list[str]:
    """What a reader must know of what is missing."""
    said = [f"{name}: {why}" for name, why in result.failures]
    said += [
        f"{name} was not idle: it used up to {cores:.2f} cores while another was asked, whose figures are too low then. Try --one-at-a-time."
        for name, cores in result.restless.items()
    ]
    return [*said, f"Cut short: {result.cut}."] if result.cut else said


def upkeep(result: Comparison) -> list[str]:
    """What each takes besides time, a line each; nothing of those that somebody else runs."""
    return [
        f"{name}: ready after {result.ready_s[name]:.1f} s, {memory / 2**20:,.0f} MiB (PSS of all its processes) after its last turn"
        for name, memory in result.memory_bytes.items()
    ]


def markdown(result: Comparison, facts: Mapping[str, str], settings: Mapping[str, str]) -> str:
    lines = [", ".join(f"{name} {value}" for name, value in {**facts, **settings}.items()) + ".", ""]
    lines += [f"- *{case.name}*: {case.what}" for case in result.cases]
    lines += ["", f"| {' | '.join(HEADINGS)} |", f"|{'---|' * len(HEADINGS)}"]
    lines += [f"| {' | '.join(_cell(cell) for cell in row.cells())} |" for row in rows(result)]
    lines += ["", READING, "", *(f"- {line}" for line in upkeep(result))]
    for note in notes(result):
        first, _, rest = note.partition("\n")
        lines += ["", first, *(["", "```", rest.replace("```", "'''"), "```"] if rest else [])]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def show(result: Comparison, facts: Mapping[str, str], settings: Mapping[str, str]) -> None:
    """On the screen."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # in a file nothing need be folded
    table = Table(title=", ".join(f"{name} {value}" for name, value in {**facts, **settings}.items()), title_justify="left")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in ("case", "server") else "right")
    before = ""
    for row in rows(result):
        cells = row.cells()
        if before and cells[0] != before:
            table.add_section()
        table.add_row(*(Text(cell) for cell in cells))
        before = cells[0]
    console.print(table)
    for line in (READING, *upkeep(result)):
        console.print(line, highlight=False, markup=False)
    for note in notes(result):
        console.print(Text(note, style="red"))


def as_json(result: Comparison) -> dict[str, Any]:
    """Every round's figures, and the ratios."""
    figures = []
    for row in rows(result):
        one: dict[str, Any] = {"case": row.case, "figure": row.figure, "server": row.server, "values": row.values}
        if row.ratio is not None:
            one["times_as_fast"] = {"median": row.ratio.median, "low": row.ratio.low, "high": row.ratio.high, "pairs": row.ratio.pairs}
        figures.append(one)
    failures = [{"server": name, "why": why} for name, why in result.failures]
    rest = {"ready_s": result.ready_s, "memory_bytes": result.memory_bytes, "restless_cores": result.restless, "cut": result.cut}
    return {"servers": result.about, "figures": figures, "failures": failures, **rest}
