"""The metrics of a server, in one place: the text process.

What it is: counters, gauges and histograms, and their exposition as Prometheus text under Penstock's own names and, for dashboards that exist, under vLLM's
(`vllm:*`). What happens to requests is kept by pool and class (`of`), what happens to processes by their number. A histogram is kept once, with the union
of both sets of buckets, and projected onto each when it is read. Cumulative counters of edges and engines survive the restart of the process that
sent them.
What it does not know: names (names.py), the text format (exposition.py), HTTP, when somebody scrapes, what a request is.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from penstock.core.protocol.control import Quality
from penstock.core.protocol.messages import EngineFacts, EngineStats, SpeculationStats
from penstock.core.telemetry.exposition import Page, series_order
from penstock.core.telemetry.names import COUNTERS, EDGE_METRICS, ENGINE_COUNTERS, GAUGES, HISTOGRAMS, OF_REQUESTS, PLACES, STEP_TOKENS
from penstock.core.telemetry.series import Counts, Histogram, Series, histogram_of, zeros

STANDARD = "standard"
"""The class of requests whose tenant has none."""

_PAIR = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\.)*"'
_FLAT = re.compile(rf"[a-zA-Z_:][a-zA-Z0-9_:]*(?:\{{{_PAIR}(?:,{_PAIR})*\}})?\Z")


_COUNTS = ("_total", "_bucket", "_sum", "_count")
"""What names of counts end with; any other is a gauge's."""


class Cumulative:
    """Sums of counters whose senders may restart from zero: a value that falls begins a new life on top of the old one. A gauge's value is its last one."""

    def __init__(self) -> None:
        self._base: dict[str, float] = {}
        self._last: dict[str, float] = {}

    def update(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            last = self._last.get(name, 0.0)
            if value < last and name.split("{")[0].endswith(_COUNTS):
                self._base[name] = self._base.get(name, 0.0) + last
            self._last[name] = value

    def totals(self) -> dict[str, float]:
        return {name: value + self._base.get(name, 0.0) for name, value in self._last.items()}


class Load(NamedTuple):
    """What runs now, over all engines. kv_usage 0 to 1."""

    running: int
    kv_usage: float


class _Engine:
    __slots__ = ("base", "epoch", "facts", "places", "pool", "stats", "up")

    def __init__(self, pool: str) -> None:
        self.pool = pool
        self.up = False
        self.epoch = 0
        self.stats = EngineStats()
        self.base: dict[str, float] = dict.fromkeys(ENGINE_COUNTERS, 0)
        self.places: list[int] = []
        """Of accepted drafts by place, in former lives."""
        self.facts: EngineFacts | None = None

    def total(self, name: str) -> float:
        """One of ENGINE_COUNTERS, over all lives."""
        return float(self.base[name] + getattr(self.stats, ENGINE_COUNTERS[name][0]))

    def by_place(self) -> list[int]:
        """Accepted drafts by place, over all lives."""
        now = [] if self.stats.speculation is None else self.stats.speculation.places
        return [sum(pair) for pair in itertools.zip_longest(self.places, now, fillvalue=0)]


class Metrics:
    """Feed it from the text actor; `render()` for a scrape. `compat` adds the vllm:* names.

    `pools` are the models' served names, the default one first, `classes` those that requests may be of: what is not named here cannot become a label, and
    never anything that a client says. Counters and vLLM's names show the classes of a pool together.
    """

    def __init__(self, pools: Sequence[str], *, classes: Sequence[str] = (STANDARD,), compat: bool = True) -> None:
        self.compat = compat
        self._series = {pool: {name: Series() for name in classes} for pool in pools}
        self._steps = {pool: histogram_of(STEP_TOKENS) for pool in pools}
        self._counts: dict[str, Counts] = {name: zeros(name) for name in COUNTERS.keys() - OF_REQUESTS}
        self._gauges: dict[str, Counts] = {name: {} for name in GAUGES}
        self._edges: dict[int, Cumulative] = {}
        self._engines: dict[int, _Engine] = {}

    # --- feeding

    def know(self, class_: str) -> None:
        """Requests may be of this class from now on; what was counted of it stays."""
        for some in self._series.values():
            some.setdefault(class_, Series())

    def forget(self, gauge: str) -> None:
        """It has no values any more."""
        self._gauges[gauge].clear()

    def of(self, pool: str, class_: str = STANDARD) -> Series:
        """Raises KeyError for what was not named."""
        return self._series[pool][class_]

    def count(self, name: str, *labels: str, by: float = 1) -> None:
        """What is no request's: a name of COUNTERS without OF_REQUESTS."""
        series = self._counts[name]
        series[labels] = series.get(labels, 0.0) + by

    def put(self, name: str, value: float, *labels: str) -> None:
        """Set a counter to what its owner counted."""
        self._counts[name][labels] = value

    def set(self, name: str, value: float, *labels: str) -> None:
        self._gauges[name][labels] = value

    def value(self, name: str, *labels: str) -> float:
        """A counter's or gauge's value, for tests and answers."""
        return (self._gauges[name] if name in self._gauges else self._total(name)).get(labels, 0.0)

    def edge(self, edge: int, counters: Mapping[str, float]) -> None:
        self._edges.setdefault(edge, Cumulative()).update(counters)

    def engine_up(self, pool: str, engine: int, epoch: int, facts: EngineFacts) -> None:
        entry = self._engines.setdefault(engine, _Engine(pool))
        for name, (field, _) in ENGINE_COUNTERS.items():
            entry.base[name] += getattr(entry.stats, field)
        entry.places = entry.by_place()
        entry.stats = EngineStats(blocks_total=facts.num_blocks)
        entry.up, entry.epoch, entry.facts = True, epoch, facts
        self._quality(str(engine), facts.quality)

    def _quality(self, engine: str, quality: Quality | None) -> None:
        """In place of what an earlier life of the engine told."""
        for name in ("quality_info", "quality_kl_mean_nats", "quality_top1_ratio"):
            self._gauges[name] = {labels: value for labels, value in self._gauges[name].items() if labels[0] != engine}
        if quality is None:
            return
        self.set("quality_info", 1.0, engine, quality.scheme, quality.status, quality.record)
        for name, figure in (("quality_kl_mean_nats", quality.kl_mean), ("quality_top1_ratio", quality.top1)):
            if figure is not None:
                self.set(name, figure, engine)

    def engine_down(self, engine: int) -> None:
        self._engines[engine].up = False
        self.count("engine_losses", str(engine))

    def engine_stats(self, engine: int, stats: EngineStats) -> None:
        entry = self._engines[engine]
        entry.stats = stats
        self._steps[entry.pool].observe(stats.batch_tokens)

    # --- reading

    def load(self) -> Load:
        live = [entry.stats for entry in self._engines.values() if entry.up]
        used, total = sum(stats.blocks_used for stats in live), sum(stats.blocks_total for stats in live)
        return Load(sum(stats.running for stats in live), used / total if total else 0.0)

    def drafts(self) -> tuple[float, float, float] | None:
        """Rows that computed drafts along, these drafts, and the right ones; None where no engine has drafters."""
        if not any(entry.stats.speculation for entry in self._engines.values()):
            return None
        names = ("spec_decode_drafts", "spec_decode_draft_tokens", "spec_decode_accepted_tokens")
        rows, drafted, accepted = (sum(entry.total(name) for entry in self._engines.values()) for name in names)
        return rows, drafted, accepted

    def render(self) -> bytes:
        """Prometheus text exposition format."""
        page = Page()
        self._own(page)
        if self.compat:
            self._vllm(page)
        self._from_edges(page)
        return page.bytes()

    def _own(self, page: Page) -> None:
        for engine, entry in self._engines.items():
            stats, label = entry.stats, str(engine)
            self.set("engine_up", float(entry.up), label)
            self.set("engine_epoch", entry.epoch, label)
            for state in ("running", "waiting", "parked"):
                self.set("sequences", getattr(stats, state) if entry.up else 0, label, state)
            self.set("kv_blocks", stats.blocks_used, label, "used")
            self.set("kv_blocks", stats.blocks_cached, label, "cached")
            self.set("kv_blocks", stats.quarantined, label, "quarantined")
            self.set("kv_blocks", stats.blocks_total, label, "total")
            self.set("kv_usage_ratio", _usage(stats), label)
            if stats.pace is not None:
                self.set("itl_target_seconds", stats.pace.limit_ns / 1e9, label)
                self.set("mixed_prefill_tokens", stats.pace.prompt_tokens, label)
            if stats.speculation is not None:
                self._speculation(entry, stats.speculation, label)
        for name, (labels, text) in GAUGES.items():
            page.family(f"penstock_{name}", "gauge", text, labels, self._gauges[name])
        for name, (labels, text) in COUNTERS.items():
            page.family(f"penstock_{name}_total", "counter", text, labels, self._total(name))
        for name, (_, text) in ENGINE_COUNTERS.items():
            totals = {(str(engine),): entry.total(name) for engine, entry in self._engines.items()}
            page.family(f"penstock_{name}_total", "counter", text, ("engine",), totals)
        places = {(str(e), str(place)): n for e, entry in self._engines.items() for place, n in enumerate(entry.by_place())}
        page.family(f"penstock_{PLACES[0]}_total", "counter", PLACES[1], ("engine", "position"), places)
        for attribute, (name, bounds, _, _, text) in HISTOGRAMS.items():
            if attribute == STEP_TOKENS:
                page.histogram(f"penstock_{name}", text, ("model",), {(pool,): self._steps[pool] for pool in self._series}, bounds)
                continue
            kept = {(pool, of): getattr(series, attribute) for pool, some in self._series.items() for of, series in some.items()}
            page.histogram(f"penstock_{name}", text, ("model", "class"), kept, bounds)

    def _speculation(self, entry: _Engine, stats: SpeculationStats, label: str) -> None:
        methods = entry.facts.drafters if entry.facts is not None else []
        for method, state in zip(methods, stats.states, strict=False):
            self.set("spec_decode_state", state if entry.up else 0, label, method)
        self.set("spec_decode_width", stats.width if entry.up else 0, label)
        self.set("spec_decode_chosen_width", stats.chosen if entry.up else 0, label)
        self.set("spec_decode_accepted_length", 1 + stats.accepted / stats.drafts if stats.drafts else 1, label)

    def _total(self, name: str, pool: str | None = None) -> Counts:
        """A counter over all classes, and all pools if none is named."""
        if name not in OF_REQUESTS:
            return self._counts[name]
        out: Counts = {}
        for series in (series for one, some in self._series.items() if pool in (None, one) for series in some.values()):
            for labels, value in series.counts[name].items():
                out[labels] = out.get(labels, 0.0) + value
        return out

    def _histogram(self, pool: str, attribute: str) -> Histogram:
        """Over all classes."""
        if attribute == STEP_TOKENS:
            return self._steps[pool]
        return Histogram.total([getattr(series, attribute) for series in self._series[pool].values()])

    def _vllm(self, page: Page) -> None:
        """vLLM counts in its engines: what text counts of a pool stands with the pool's first engine, what it counts of all pools with that of the first."""
        labels = ("model_name", "engine")
        engines = {(entry.pool, str(engine)): entry for engine, entry in self._engines.items()}
        first: dict[str, tuple[str, str]] = {}
        for pool in self._series:
            first[pool] = next((key for key in engines if key[0] == pool), (pool, "0"))
            engines.setdefault(first[pool], _Engine(pool))  # before the first engine is up its zeros are there
        lead = next(iter(first.values()))

        def gauge(name: str, text: str, values: Mapping[Any, float], *more: str) -> None:
            page.family(f"vllm:{name}", "gauge", text, (*labels, *more), values)

        def counter(name: str, text: str, values: Mapping[str, Mapping[Any, float]], *more: str) -> None:
            rows = {(*first[pool], *key): value for pool, some in values.items() for key, value in some.items()}
            page.family(f"vllm:{name}_total", "counter", text, (*labels, *more), rows)

        pending = self.value("pending_requests")
        gauge("num_requests_running", "Sequences running.", {key: e.stats.running for key, e in engines.items()})
        # vLLM's queue is in the engine; ours begins before it: what text still holds counts as waiting too.
        gauge("num_requests_waiting", "Requests waiting.", {key: pending if key == lead else 0.0 for key in engines})
        waiting = {(*lead, "capacity"): pending, (*lead, "deferred"): self.value("requests", "replaying")}
        gauge("num_requests_waiting_by_reason", "Requests waiting.", waiting, "reason")
        gauge("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", {key: _usage(e.stats) for key, e in engines.items()})
        self._cache_info(page)
        tokens = {pool: self._total("tokens", pool) for pool in first}
        prompts = {pool: (some["prompt_computed",], some["prompt_cached",]) for pool, some in tokens.items()}
        by_source = {
            pool: {("local_compute",): computed, ("local_cache_hit",): cached, ("external_kv_transfer",): 0.0}
            for pool, (computed, cached) in prompts.items()
        }
        counter("prompt_tokens", "Prompt tokens.", {pool: {(): sum(both)} for pool, both in prompts.items()})
        counter("prompt_tokens_by_source", "Prompt tokens by source.", by_source, "source")
        counter(
            "prompt_tokens_cached", "Prompt tokens from the prefix cache.", {pool: {(): cached} for pool, (_, cached) in prompts.items()}
        )
        counter("generation_tokens", "Generated tokens.", {pool: {(): some["generated",]} for pool, some in tokens.items()})
        for name, ours in (
            ("prefix_cache_queries", "prefix_cache_queries"),
            ("prefix_cache_hits", "prefix_cache_hits"),
            ("num_preemptions", "preemptions"),
            ("spec_decode_num_drafts", "spec_decode_drafts"),
            ("spec_decode_num_draft_tokens", "spec_decode_draft_tokens"),
            ("spec_decode_num_accepted_tokens", "spec_decode_accepted_tokens"),
        ):
            sums = {pool: {(): sum(e.total(ours) for e in engines.values() if e.pool == pool)} for pool in first}
            counter(name, ENGINE_COUNTERS[ours][1], sums)
        places: dict[str, dict[tuple[str], float]] = {pool: {} for pool in first}
        for entry in engines.values():
            for place, count in enumerate(entry.by_place()):
                mine = places[entry.pool]
                mine[str(place),] = mine.get((str(place),), 0.0) + count
        counter("spec_decode_num_accepted_tokens_per_pos", PLACES[1], places, "position")
        ended = {pool: self._total("requests_finished", pool) for pool in first}
        counter("request_success", "Finished choices.", ended, "finished_reason")
        counter("corrupted_requests", "Choices that failed.", {pool: {(): some["error",]} for pool, some in ended.items()})
        refused = {lead[0]: self._total("admission_rejections")}
        counter("admission_rejections", "Requests refused by admission.", refused, "reason")
        for attribute, (_, _, name, bounds, text) in HISTOGRAMS.items():
            if name:
                kept = {first[pool]: self._histogram(pool, attribute) for pool in first}
                page.histogram(f"vllm:{name}", text, labels, kept, bounds)

    def _cache_info(self, page: Page) -> None:
        names = ("engine", "block_size", "num_gpu_blocks", "cache_dtype", "enable_prefix_caching")
        rows: dict[tuple[str, ...], float] = {}
        for engine, entry in self._engines.items():
            facts = entry.facts
            if facts is not None:
                rows[str(engine), str(facts.block_size), str(facts.num_blocks), facts.dtype, str(facts.enable_prefix_caching)] = 1.0
        page.family("vllm:cache_config_info", "gauge", "The KV cache.", names, rows)

    def _from_edges(self, page: Page) -> None:
        """The edges' flat counters, summed over edges and grouped into families."""
        sums: dict[str, float] = {}
        for cumulative in self._edges.values():
            for flat, value in cumulative.totals().items():
                sums[flat] = sums.get(flat, 0.0) + value
        histograms = {name.removesuffix("_bucket") for flat in sums if (name := flat.split("{")[0]).endswith("_bucket")}
        families: dict[tuple[str, str], list[str]] = {}
        for flat, value in sums.items():
            if not _FLAT.match(flat):
                continue  # a line that we would not write must not spoil the page
            name = flat.split("{")[0]
            base = next((name.removesuffix(end) for end in ("_bucket", "_sum", "_count") if name.endswith(end)), name)
            if base in histograms:
                family, kind = base, "histogram"
            else:
                family, kind = name, "counter" if name.endswith("_total") else "gauge"
            families.setdefault((family, kind), []).append(f"{flat} {value!r}")
        for (family, kind), lines in sorted(families.items()):
            page.head(family, kind, EDGE_METRICS[family][2] if family in EDGE_METRICS else "From the edges.")
            page.lines += sorted(lines, key=series_order) if kind == "histogram" else sorted(lines)


def _usage(stats: EngineStats) -> float:
    return stats.blocks_used / stats.blocks_total if stats.blocks_total else 0.0
