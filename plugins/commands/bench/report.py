"""Statistics of a benchmark run.

What it is: percentiles, standard deviation, goodput against SLOs, the JSON and the table. What it does not know: how records were made.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from penstock.plugins.commands.bench.client import Record


def percentile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between closest ranks, `share` in 0..1. NaN for no values."""
    if not values:
        return math.nan
    ordered = sorted(values)
    place = (len(ordered) - 1) * share
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread(values: Sequence[float], scale: float = 1e3) -> dict[str, float]:
    """mean, p50, p95, p99, max, std; seconds in, milliseconds out."""
    if not values:
        return {}
    return {
        "mean": statistics.fmean(values) * scale,
        "p50": percentile(values, 0.5) * scale,
        "p95": percentile(values, 0.95) * scale,
        "p99": percentile(values, 0.99) * scale,
        "max": max(values) * scale,
        "std": (statistics.pstdev(values) if len(values) > 1 else 0.0) * scale,
    }


def parse_slo(items: Sequence[str]) -> dict[str, float]:
    """("ttft:500", "itl:50", "e2e:3000") -> milliseconds by name."""
    out = {}
    for item in items:
        name, _, value = item.partition(":")
        if name not in ("ttft", "itl", "e2e"):
            raise ValueError(f"an SLO is ttft:MS, itl:MS or e2e:MS, not {item!r}")
        out[name] = float(value)
    return out


def meets(record: Record, slo: dict[str, float]) -> bool:
    """Does a request keep every objective: its TTFT, its mean ITL, its E2E?"""
    seen = {"ttft": record.ttft, "itl": statistics.fmean(record.gaps) if record.gaps else 0.0, "e2e": record.e2e}
    return all(seen[name] * 1e3 <= limit for name, limit in slo.items())


def summarise(records: Sequence[Record], wall: float, slo: dict[str, float]) -> dict[str, Any]:
    """The figures of one run. Requests that failed count in `failed` and in nothing else."""
    good = [r for r in records if r.ok and r.tokens]
    tokens_out = sum(len(r.tokens) for r in good)
    tokens_in = sum(r.prompt_tokens for r in good)
    out: dict[str, Any] = {
        "requests": len(records),
        "completed": len(good),
        "failed": len(records) - len(good),
        "short": sum(len(r.tokens) != r.want for r in good),
        "errors": sorted({(r.error or "no token")[:200] for r in records if not (r.ok and r.tokens)})[:5],
        "wall_s": wall,
        "prompt_tokens": tokens_in,
        "cached_tokens": sum(r.cached_tokens for r in good),
        "output_tokens": tokens_out,
        "requests_per_s": len(good) / wall if wall else math.nan,
        "output_tokens_per_s": tokens_out / wall if wall else math.nan,
        "total_tokens_per_s": (tokens_in + tokens_out) / wall if wall else math.nan,
        "ttft_ms": spread([r.ttft for r in good]),
        "itl_ms": spread([g for r in good for g in r.gaps]),
        "e2e_ms": spread([r.e2e for r in good]),
    }
    if slo:
        kept = sum(meets(r, slo) for r in good)
        out["slo_ms"] = slo
        out["goodput_requests_per_s"] = kept / wall if wall else math.nan
        out["goodput_share"] = kept / len(records) if records else math.nan
    return out


def show(title: str, result: dict[str, Any]) -> None:
    """The table on screen."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=title, title_justify="left")
    for name in ("", "mean", "p50", "p95", "p99", "max", "std"):
        table.add_column(name, justify="left" if not name else "right")
    for key, label in (("ttft_ms", "TTFT ms"), ("itl_ms", "ITL ms"), ("e2e_ms", "E2E ms")):
        row = result.get(key) or {}
        table.add_row(label, *(f"{row[c]:.2f}" if c in row else "-" for c in ("mean", "p50", "p95", "p99", "max", "std")))
    console.print(table)
    console.print(
        f"{result['completed']}/{result['requests']} requests in {result['wall_s']:.2f} s: {result['requests_per_s']:.2f} requests/s,"
        f" {result['output_tokens_per_s']:.1f} output tokens/s, {result['total_tokens_per_s']:.1f} tokens/s in all"
        f" ({result['cached_tokens']} of {result['prompt_tokens']} prompt tokens cached)"
    )
    if "goodput_share" in result:
        console.print(f"goodput: {result['goodput_requests_per_s']:.2f} requests/s keep {result['slo_ms']} ({result['goodput_share']:.0%})")
    if result["failed"] or result["short"]:
        console.print(f"[red]failed: {result['failed']}, shorter or longer than asked: {result['short']}; {result['errors']}[/red]")


def show_rows(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Figures of several runs, a run a row; what a figure holds itself is columns of its own."""
    from rich.console import Console
    from rich.table import Table

    flat = [dict(_flat(row)) for row in rows]
    table = Table(title=title, title_justify="left")
    for name in dict.fromkeys(name for row in flat for name in row):
        table.add_column(name, justify="right")
    for row in flat:
        table.add_row(*(f"{value:,.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=sum(max(len(name), 22 if name == "phase" else 12) + 3 for row in flat[:1] for name in row) + 2).print(table)


def _flat(row: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in row.items():
        if isinstance(value, dict):
            yield from ((f"{name} {inner}", one) for inner, one in value.items())
        else:
            yield name, value
