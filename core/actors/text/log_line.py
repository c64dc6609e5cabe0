"""The line of figures in the log while requests run.

What it is: `StatsLine` looks at the server's metrics every STATS_S seconds and logs what changed since: tokens a second, sequences, KV cache, prefix hits.
An idle server says nothing (but for one line at the end of work).
What it does not know: who counts, who calls it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from penstock.core.telemetry.metrics import Metrics

STATS_S = 10.0


class StatsLine:
    """`tick(now_ns)` as often as you like."""

    def __init__(self, metrics: Metrics, waiting: Callable[[], int], log: Any) -> None:
        self._metrics = metrics
        self._waiting = waiting
        self._log = log
        self._since_ns: int | None = None
        self._last: dict[str, float] = {}
        self._busy = False

    def tick(self, now_ns: int) -> None:
        if self._since_ns is None:
            self._since_ns, self._last = now_ns, self._counts()
            return
        seconds = (now_ns - self._since_ns) / 1e9
        if seconds < STATS_S:
            return
        counts = self._counts()
        delta = {name: value - self._last[name] for name, value in counts.items()}
        self._since_ns, self._last = now_ns, counts
        load, waiting = self._metrics.load(), self._waiting()
        busy = any(delta.values()) or load.running > 0 or waiting > 0
        if busy or self._busy:
            prompt = delta["prompt_computed"] + delta["prompt_cached"]
            self._log.info(
                "stats",
                prompt_tokens_per_s=round(prompt / seconds, 1),
                generated_tokens_per_s=round(delta["generated"] / seconds, 1),
                running=load.running,
                waiting=waiting,
                kv_usage_percent=round(100 * load.kv_usage, 1),
                prefix_hit_percent=round(100 * delta["prompt_cached"] / prompt, 1) if prompt else 0.0,
                **self._speculation(delta),
            )
        self._busy = busy

    def _counts(self) -> dict[str, float]:
        counts = {source: self._metrics.value("tokens", source) for source in ("prompt_computed", "prompt_cached", "generated")}
        return counts | dict(zip(("drafts", "drafted", "accepted"), self._metrics.drafts() or (0.0, 0.0, 0.0), strict=True))

    def _speculation(self, delta: dict[str, float]) -> dict[str, float]:
        """Where somebody drafts: how many drafts were right, and tokens a row that had some."""
        if self._metrics.drafts() is None:
            return {}
        drafts, drafted, accepted = delta["drafts"], delta["drafted"], delta["accepted"]
        return {
            "draft_acceptance_percent": round(100 * accepted / drafted, 1) if drafted else 0.0,
            "accepted_length": round(1 + accepted / drafts, 2) if drafts else 1.0,
        }
