"""Prometheus' text format, written.

What it is: `Page`, to which families of counters, gauges and histograms are added.
What it does not know: names, where values come from.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from penstock.core.telemetry.series import Histogram

_BOUND = re.compile(r',?\ble="([^"]*)"')


class Page:
    """Lines of the text exposition format, https://prometheus.io/docs/instrumenting/exposition_formats/. Written by hand: a scrape must not
    hold up the streams of this process, and the client library takes 40 ms for what takes 1 ms here."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def head(self, name: str, kind: str, text: str) -> None:
        self.lines.append(f"# HELP {name} {text}")
        self.lines.append(f"# TYPE {name} {kind}")

    def family(self, name: str, kind: str, text: str, labels: tuple[str, ...], series: Mapping[Any, float]) -> None:
        self.head(name, kind, text)
        for values, value in series.items():
            self.lines.append(f"{name}{_labels(labels, values)} {float(value)!r}")

    def histogram(self, name: str, text: str, labels: tuple[str, ...], series: Mapping[Any, Histogram], bounds: Iterable[float]) -> None:
        self.head(name, "histogram", text)
        for values, kept in series.items():
            inside = _labels(labels, values)
            open_ = inside[:-1]
            for bound, count in kept.buckets(bounds):
                self.lines.append(f'{name}_bucket{open_},le="{bound}"}} {float(count)!r}')
            self.lines.append(f"{name}_sum{inside} {kept.sum!r}")
            self.lines.append(f"{name}_count{inside} {float(kept.count)!r}")

    def bytes(self) -> bytes:
        return ("\n".join(self.lines) + "\n").encode()


def _labels(names: tuple[str, ...], values: tuple[str, ...]) -> str:
    if not names:
        return ""
    return "{" + ",".join(f'{name}="{_escape(value)}"' for name, value in zip(names, values, strict=True)) + "}"


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def series_order(line: str) -> tuple[str, str, float]:
    """A histogram's lines as the format wants them: series by series, buckets ascending, then sum and count."""
    name, _, rest = line.partition("{")
    labels = rest.rpartition("}")[0]
    bound = _BOUND.search(labels)
    kind = {"bucket": "0", "sum": "1", "count": "2"}[name.rpartition("_")[2].split(" ")[0]]
    return _BOUND.sub("", labels).strip(","), kind, float(bound[1].replace("+Inf", "inf")) if bound else 0.0
