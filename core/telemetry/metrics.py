"""The metrics of a server, in one place: the text process.

What it is: plain counters and histograms that cost a dictionary or bisect operation to feed, and their exposition as
Prometheus text under Penstock's own names and, for dashboards that exist, under vLLM's (`vllm:*`). A histogram is kept once, with the
union of both sets of buckets, and projected onto each when it is read. Cumulative counters of edges and engines survive the restart of
the process that sent them. Names are API: tests/text keeps the list.
It is long because a third of it is the table of names.
What it does not know: HTTP, when somebody scrapes, what a request is.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from penstock.core.protocol.messages import EngineFacts, EngineStats

LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 20, 40, 80, 160)
GAP = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5)
DURATION = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1, 1.5, 2, 3, 5, 10, 15, 20, 30, 60, 120, 240, 480, 960, 1920)
COUNT = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000, 500000, 1000000)
SMALL = (1, 2, 5, 10, 20)
BATCH = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)

VLLM_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
VLLM_ITL = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
VLLM_LATENCY = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)

# attribute -> (own name, own buckets, vLLM's name, vLLM's buckets, help)
HISTOGRAMS: dict[str, tuple[str, tuple[float, ...], str, tuple[float, ...], str]] = {
    "ttft": ("time_to_first_token_seconds", LATENCY, "time_to_first_token_seconds", VLLM_TTFT, "From arrival to the first token."),
    "itl": ("inter_token_latency_seconds", GAP, "inter_token_latency_seconds", VLLM_ITL, "Between two tokens of a sequence."),
    "tpot": ("time_per_output_token_seconds", GAP, "request_time_per_output_token_seconds", VLLM_ITL, "Mean gap of a finished request."),
    "e2e": ("request_duration_seconds", DURATION, "e2e_request_latency_seconds", VLLM_LATENCY, "From arrival to the last token."),
    "encode": ("encode_seconds", LATENCY, "", (), "Template and tokenizer, waiting for them included."),
    "queue": ("queue_seconds", LATENCY, "request_queue_time_seconds", VLLM_LATENCY, "From accepted to the first step."),
    "prefill": ("prefill_seconds", LATENCY, "request_prefill_time_seconds", VLLM_LATENCY, "From the first step to the first token."),
    "decode": ("decode_seconds", DURATION, "request_decode_time_seconds", VLLM_LATENCY, "From the first token to the last."),
    "inference": ("inference_seconds", DURATION, "request_inference_time_seconds", VLLM_LATENCY, "From the first step to the last token."),
    "prompt": ("prompt_tokens", COUNT, "request_prompt_tokens", COUNT, "Prompt tokens of a request."),
    "output": ("output_tokens", COUNT, "request_generation_tokens", COUNT, "Output tokens of a request, all choices."),
    "longest": ("longest_output_tokens", COUNT, "request_max_num_generation_tokens", COUNT, "Output tokens of its longest choice."),
    "params_n": ("requested_choices", SMALL, "request_params_n", SMALL, "n of a request."),
    "params_max": ("requested_max_tokens", COUNT, "request_params_max_tokens", COUNT, "max_tokens of a request that gave it."),
    "computed": ("prefill_computed_tokens", COUNT, "request_prefill_kv_computed_tokens", COUNT, "Prompt tokens that no cache had."),
    "preempted": ("request_preemptions", SMALL, "request_num_preemptions", SMALL, "Preemptions of a request."),
    "batch": ("step_tokens", BATCH, "iteration_tokens_total", BATCH, "Tokens of a step."),
}

# own name -> (labels, help)
COUNTERS: dict[str, tuple[tuple[str, ...], str]] = {
    "requests_finished": (("reason",), "Choices that ended, by finish reason."),
    "requests_rejected": (("code",), "Requests that were refused, by error code."),
    "admission_rejections": (("reason",), "Requests that admission refused."),
    "cancellations": (
        ("cause",),
        "Prompts that text dropped before they were done: their client left (or its edge died), read too slowly, or gave them up"
        " (with the other prompts of a failed request); drain: the server shut down.",
    ),
    "tokens": (("source",), "Tokens: prompt_computed, prompt_cached, generated, replayed."),
    "replays": ((), "Requests that were re-admitted after an engine died."),
    "requests_condemned": ((), "Requests that were failed because engines died under them again and again."),
    "engine_losses": (("engine",), "Engines that died."),
    "dropped_rows": (("why",), "Token rows that were not accepted: stale (dead epoch), duplicate, gap."),
    "hook_errors": (("hook",), "Plugins' request hooks that raised."),
    "otel_spans_exported": ((), "Spans that the collector took."),
    "otel_spans_failed": ((), "Spans that could not be exported."),
}
# Label values that are known before anything happened: a rate over a series needs its zero.
KNOWN: dict[str, tuple[str, ...]] = {
    "requests_finished": ("stop", "length", "abort", "error"),
    "admission_rejections": ("queue_requests", "queue_tokens"),
    "cancellations": ("disconnect", "slow_client", "timeout", "drain", "client"),
    "tokens": ("prompt_computed", "prompt_cached", "generated", "replayed"),
    "dropped_rows": ("stale", "duplicate", "gap"),
}
ENGINE_COUNTERS: dict[str, tuple[str, str]] = {
    "engine_steps": ("steps", "Steps of the engine."),
    "preemptions": ("preemptions", "Sequences that were preempted."),
    "prefix_cache_queries": ("prefix_queries", "Prompt tokens looked up in the prefix cache."),
    "prefix_cache_hits": ("prefix_hits", "Prompt tokens found in the prefix cache."),
    "engine_prompt_computed": ("prompt_computed", "Prompt tokens computed, recomputation included."),
}
GAUGES: dict[str, tuple[tuple[str, ...], str]] = {
    "ready": ((), "1 while requests are accepted."),
    "pending_requests": ((), "Accepted requests that have not had their first step."),
    "pending_prompt_tokens": ((), "Their prompt tokens."),
    "requests": (("state",), "Requests in the server, by state."),
    "engine_up": (("engine",), "1 while the engine can take requests."),
    "engine_epoch": (("engine",), "How often the engine was started."),
    "sequences": (("engine", "state"), "Sequences in the engine, by state."),
    "kv_blocks": (("engine", "state"), "KV blocks, by state."),
    "kv_usage_ratio": (("engine",), "Share of KV blocks that running sequences hold."),
    "startup_phase_seconds": (("role", "phase"), "How long each phase of the start took."),
    "uptime_seconds": ((), "Since the text process began."),
}

# flat name that edges send -> (kind, labels, help)
EDGE_METRICS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "http_requests_total": ("counter", ("handler", "method", "status"), "HTTP requests; 499: the client left."),
    "http_request_duration_seconds": ("histogram", ("handler", "method"), "HTTP request duration."),
    "penstock_edge_parks_total": ("counter", (), "Streams that were parked because their client read too slowly."),
    "penstock_edge_cuts_total": (
        "counter",
        (),
        "Streams that were cut because their client did not read; each of their prompts is a cancellation too.",
    ),
    "penstock_edge_refused_total": ("counter", (), "Requests refused with 429 because the edge had --max-streams in progress."),
}
_PAIR = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\.)*"'
_FLAT = re.compile(rf"[a-zA-Z_:][a-zA-Z0-9_:]*(?:\{{{_PAIR}(?:,{_PAIR})*\}})?\Z")
_BOUND = re.compile(r',?\ble="([^"]*)"')


class Histogram:
    """Counts by upper bound (le), fed with a value and a weight."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, *bounds: Iterable[float]) -> None:
        self.bounds = sorted({float(bound) for some in bounds for bound in some})
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, weight: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += weight
        self.sum += value * weight

    @property
    def count(self) -> int:
        return sum(self.counts)

    def buckets(self, bounds: Iterable[float]) -> list[tuple[str, float]]:
        """Cumulative counts at `bounds` (a subset of the histogram's own) and +Inf, as text and number."""
        total, at = 0, 0
        out: list[tuple[str, float]] = []
        for bound in bounds:
            while at < len(self.bounds) and self.bounds[at] <= bound:
                total += self.counts[at]
                at += 1
            out.append((str(float(bound)), total))
        out.append(("+Inf", self.count))
        return out


class Cumulative:
    """Sums of counters whose senders may restart from zero: a value that falls begins a new life on top of the old one."""

    def __init__(self) -> None:
        self._base: dict[str, float] = {}
        self._last: dict[str, float] = {}

    def update(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            last = self._last.get(name, 0.0)
            if value < last:
                self._base[name] = self._base.get(name, 0.0) + last
            self._last[name] = value

    def totals(self) -> dict[str, float]:
        return {name: value + self._base.get(name, 0.0) for name, value in self._last.items()}


class Load(NamedTuple):
    """What runs now, over all engines. kv_usage 0 to 1."""

    running: int
    kv_usage: float


class _Engine:
    __slots__ = ("base", "epoch", "facts", "stats", "up")

    def __init__(self) -> None:
        self.up = False
        self.epoch = 0
        self.stats = EngineStats()
        self.base = dict.fromkeys(ENGINE_COUNTERS, 0)
        self.facts: EngineFacts | None = None


class Metrics:
    """Feed it from the text actor; `render()` for a scrape. `compat` adds the vllm:* names."""

    ttft: Histogram
    itl: Histogram
    tpot: Histogram
    e2e: Histogram
    encode: Histogram
    queue: Histogram
    prefill: Histogram
    decode: Histogram
    inference: Histogram
    prompt: Histogram
    output: Histogram
    longest: Histogram
    params_n: Histogram
    params_max: Histogram
    computed: Histogram
    preempted: Histogram
    batch: Histogram

    def __init__(self, model: str, *, compat: bool = True) -> None:
        self.model = model
        self.compat = compat
        for name, (_, own, _, theirs, _) in HISTOGRAMS.items():
            setattr(self, name, Histogram(own, theirs))
        self._counts: dict[str, dict[tuple[str, ...], float]] = {name: {} for name in COUNTERS}
        self._gauges: dict[str, dict[tuple[str, ...], float]] = {name: {} for name in GAUGES}
        for name, (labels, _) in COUNTERS.items():
            if not labels:
                self._counts[name][()] = 0.0
            for value in KNOWN.get(name, ()):
                self._counts[name][value,] = 0.0
        self._edges: dict[int, Cumulative] = {}
        self._engines: dict[int, _Engine] = {}

    # --- feeding

    def count(self, name: str, *labels: str, by: float = 1) -> None:
        series = self._counts[name]
        series[labels] = series.get(labels, 0.0) + by

    def put(self, name: str, value: float, *labels: str) -> None:
        """Set a counter to what its owner counted."""
        self._counts[name][labels] = value

    def set(self, name: str, value: float, *labels: str) -> None:
        self._gauges[name][labels] = value

    def value(self, name: str, *labels: str) -> float:
        """A counter's or gauge's value, for tests and answers."""
        family = self._counts.get(name)
        return (self._gauges[name] if family is None else family).get(labels, 0.0)

    def edge(self, edge: int, counters: Mapping[str, float]) -> None:
        self._edges.setdefault(edge, Cumulative()).update(counters)

    def engine_up(self, engine: int, epoch: int, facts: EngineFacts) -> None:
        entry = self._engines.setdefault(engine, _Engine())
        for name, (field, _) in ENGINE_COUNTERS.items():
            entry.base[name] += getattr(entry.stats, field)
        entry.stats = EngineStats(blocks_total=facts.num_blocks)
        entry.up, entry.epoch, entry.facts = True, epoch, facts

    def engine_down(self, engine: int) -> None:
        self._engines.setdefault(engine, _Engine()).up = False
        self.count("engine_losses", str(engine))

    def engine_stats(self, engine: int, stats: EngineStats) -> None:
        entry = self._engines.get(engine)
        if entry is not None:
            entry.stats = stats
            self.batch.observe(stats.batch_tokens)

    # --- reading

    def load(self) -> Load:
        live = [entry.stats for entry in self._engines.values() if entry.up]
        used, total = sum(stats.blocks_used for stats in live), sum(stats.blocks_total for stats in live)
        return Load(sum(stats.running for stats in live), used / total if total else 0.0)

    def render(self) -> bytes:
        """Prometheus text exposition format."""
        page = _Page()
        self._own(page)
        if self.compat:
            self._vllm(page)
        self._from_edges(page)
        return page.bytes()

    def _own(self, page: _Page) -> None:
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
        for name, (labels, text) in GAUGES.items():
            page.family(f"penstock_{name}", "gauge", text, labels, self._gauges[name])
        for name, (labels, text) in COUNTERS.items():
            page.family(f"penstock_{name}_total", "counter", text, labels, self._counts[name])
        for name, (_, text) in ENGINE_COUNTERS.items():
            totals = {(str(engine),): self._engine_total(engine, name) for engine in self._engines}
            page.family(f"penstock_{name}_total", "counter", text, ("engine",), totals)
        for attribute, (name, bounds, _, _, text) in HISTOGRAMS.items():
            page.histogram(f"penstock_{name}", text, ("model",), (self.model,), getattr(self, attribute), bounds)

    def _engine_total(self, engine: int, name: str) -> float:
        entry = self._engines[engine]
        return float(entry.base[name] + getattr(entry.stats, ENGINE_COUNTERS[name][0]))

    def _vllm(self, page: _Page) -> None:
        labels = ("model_name", "engine")
        engines = self._engines or {0: _Engine()}
        first = (self.model, "0")

        def gauge(name: str, text: str, values: Mapping[Any, float], *more: str) -> None:
            page.family(f"vllm:{name}", "gauge", text, (*labels, *more), {(self.model, *key): value for key, value in values.items()})

        def counter(name: str, text: str, values: Mapping[Any, float], *more: str) -> None:
            page.family(f"vllm:{name}_total", "counter", text, (*labels, *more), {(*first, *key): value for key, value in values.items()})

        pending = self.value("pending_requests")
        gauge("num_requests_running", "Sequences running.", {(str(i),): e.stats.running for i, e in engines.items()})
        # vLLM's queue is in the engine; ours begins before it: what text still holds counts as waiting too.
        gauge("num_requests_waiting", "Requests waiting.", {(str(i),): pending if i == 0 else 0.0 for i in engines})
        waiting = {("0", "capacity"): pending, ("0", "deferred"): self.value("requests", "replaying")}
        gauge("num_requests_waiting_by_reason", "Requests waiting.", waiting, "reason")
        gauge("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", {(str(i),): _usage(e.stats) for i, e in engines.items()})
        self._cache_info(page)
        tokens = self._counts["tokens"]
        computed, cached = tokens["prompt_computed",], tokens["prompt_cached",]
        counter("prompt_tokens", "Prompt tokens.", {(): computed + cached})
        by_source = {("local_compute",): computed, ("local_cache_hit",): cached, ("external_kv_transfer",): 0.0}
        counter("prompt_tokens_by_source", "Prompt tokens by source.", by_source, "source")
        counter("prompt_tokens_cached", "Prompt tokens from the prefix cache.", {(): cached})
        counter("generation_tokens", "Generated tokens.", {(): tokens["generated",]})
        for name, ours in (
            ("prefix_cache_queries", "prefix_cache_queries"),
            ("prefix_cache_hits", "prefix_cache_hits"),
            ("num_preemptions", "preemptions"),
        ):
            counter(name, ENGINE_COUNTERS[ours][1], {(): sum((self._engine_total(i, ours) for i in self._engines), 0.0)})
        counter("request_success", "Finished choices.", self._counts["requests_finished"], "finished_reason")
        counter("corrupted_requests", "Choices that failed.", {(): self._counts["requests_finished"]["error",]})
        counter("admission_rejections", "Requests refused by admission.", self._counts["admission_rejections"], "reason")
        for attribute, (_, _, name, bounds, text) in HISTOGRAMS.items():
            if name:
                page.histogram(f"vllm:{name}", text, labels, first, getattr(self, attribute), bounds)

    def _cache_info(self, page: _Page) -> None:
        names = ("engine", "block_size", "num_gpu_blocks", "cache_dtype", "enable_prefix_caching")
        rows: dict[tuple[str, ...], float] = {}
        for engine, entry in self._engines.items():
            facts = entry.facts
            if facts is not None:
                rows[str(engine), str(facts.block_size), str(facts.num_blocks), facts.dtype, str(facts.enable_prefix_caching)] = 1.0
        page.family("vllm:cache_config_info", "gauge", "The KV cache.", names, rows)

    def _from_edges(self, page: _Page) -> None:
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
            page.lines += sorted(lines, key=_series_order) if kind == "histogram" else sorted(lines)


class _Page:
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

    def histogram(
        self, name: str, text: str, labels: tuple[str, ...], values: tuple[str, ...], kept: Histogram, bounds: Iterable[float]
    ) -> None:
        self.head(name, "histogram", text)
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


def _series_order(line: str) -> tuple[str, str, float]:
    """A histogram's lines as the format wants them: series by series, buckets ascending, then sum and count."""
    name, _, rest = line.partition("{")
    labels = rest.rpartition("}")[0]
    bound = _BOUND.search(labels)
    kind = {"bucket": "0", "sum": "1", "count": "2"}[name.rpartition("_")[2].split(" ")[0]]
    return _BOUND.sub("", labels).strip(","), kind, float(bound[1].replace("+Inf", "inf")) if bound else 0.0


def _usage(stats: EngineStats) -> float:
    return stats.blocks_used / stats.blocks_total if stats.blocks_total else 0.0
