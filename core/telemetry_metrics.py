"""The metrics of a server, in one place: the text process.

What it is: plain counters and histograms that cost a dictionary or bisect operation to feed, and their exposition through
prometheus_client under Penstock's own names and, for dashboards that exist, under vLLM's (`vllm:*`). A histogram is kept once, with the
union of both sets of buckets, and projected onto each when it is read. Cumulative counters of edges and engines survive the restart of
the process that sent them. Names are API: tests/text keeps the list.
What it does not know: HTTP, when somebody scrapes, what a request is.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from penstock.core.messages import EngineFacts, EngineStats

if TYPE_CHECKING:
    from prometheus_client.core import Metric

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
    "cancellations": (("cause",), "Requests that ended because their client went away."),
    "tokens": (("source",), "Tokens: prompt_computed, prompt_cached, generated, replayed."),
    "replays": ((), "Requests that were re-admitted after an engine died."),
    "engine_losses": (("engine",), "Engines that died."),
    "dropped_rows": (("why",), "Token rows that were not accepted: stale (dead epoch), duplicate, gap."),
    "hook_errors": (("hook",), "Plugins' request hooks that raised."),
    "otel_spans_exported": ((), "Spans that the collector took."),
    "otel_spans_failed": ((), "Spans that could not be exported."),
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

EDGE_HELP = {
    "http_requests": "HTTP requests.",
    "http_request_duration_seconds": "HTTP request duration.",
    "http_request_size_bytes": "HTTP request body size.",
    "http_response_size_bytes": "HTTP response size.",
}
_FLAT = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})?\Z")
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"')


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
        """Cumulative counts at `bounds` (a subset of the histogram's own) and +Inf, as prometheus_client wants them."""
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
        self._edges: dict[int, Cumulative] = {}
        self._engines: dict[int, _Engine] = {}
        self._registry: Any = None

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

    def render(self) -> bytes:
        """Prometheus text exposition format."""
        from prometheus_client import CollectorRegistry, generate_latest  # late: 0.1 s that a start need not pay

        if self._registry is None:
            self._registry = CollectorRegistry(auto_describe=False)
            self._registry.register(self)
        return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        yield from self._own()
        if self.compat:
            yield from self._vllm()
        yield from self._from_edges()

    def _own(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

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
            self.set("kv_usage_ratio", stats.blocks_used / stats.blocks_total if stats.blocks_total else 0.0, label)
        for name, (labels, text) in GAUGES.items():
            gauge = GaugeMetricFamily(f"penstock_{name}", text, labels=labels)
            for values, value in self._gauges[name].items():
                gauge.add_metric(values, value)
            yield gauge
        for name, (labels, text) in COUNTERS.items():
            counter = CounterMetricFamily(f"penstock_{name}", text, labels=labels)
            for values, value in self._counts[name].items():
                counter.add_metric(values, value)
            yield counter
        for name, (_, text) in ENGINE_COUNTERS.items():
            counter = CounterMetricFamily(f"penstock_{name}", text, labels=("engine",))
            for engine in self._engines:
                counter.add_metric((str(engine),), self._engine_total(engine, name))
            yield counter
        for attribute, (name, bounds, _, _, text) in HISTOGRAMS.items():
            kept: Histogram = getattr(self, attribute)
            histogram = HistogramMetricFamily(f"penstock_{name}", text, labels=("model",))
            histogram.add_metric((self.model,), kept.buckets(bounds), kept.sum)
            yield histogram

    def _engine_total(self, engine: int, name: str) -> float:
        entry = self._engines[engine]
        return float(entry.base[name] + getattr(entry.stats, ENGINE_COUNTERS[name][0]))

    def _vllm(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        labels = ("model_name", "engine")
        engines = self._engines or {0: _Engine()}
        first = (self.model, "0")

        def gauge(name: str, text: str, values: Mapping[int, float]) -> Metric:
            family = GaugeMetricFamily(f"vllm:{name}", text, labels=labels)
            for engine, value in values.items():
                family.add_metric((self.model, str(engine)), value)
            return family

        def counter(name: str, text: str, values: Mapping[tuple[str, ...], float], *more: str) -> Metric:
            family = CounterMetricFamily(f"vllm:{name}", text, labels=(*labels, *more))
            for extra, value in values.items():
                family.add_metric((*first, *extra), value)
            return family

        yield gauge("num_requests_running", "Sequences running.", {i: e.stats.running for i, e in engines.items()})
        # vLLM's queue is in the engine; ours begins before it: what text still holds counts as waiting too.
        yield gauge("num_requests_waiting", "Requests waiting.", {i: self.value("pending_requests") if i == 0 else 0 for i in engines})
        waiting = GaugeMetricFamily("vllm:num_requests_waiting_by_reason", "Requests waiting.", labels=(*labels, "reason"))
        waiting.add_metric((*first, "capacity"), self.value("pending_requests"))
        waiting.add_metric((*first, "deferred"), self.value("requests", "replaying"))
        yield waiting
        usage = {i: e.stats.blocks_used / e.stats.blocks_total if e.stats.blocks_total else 0.0 for i, e in engines.items()}
        yield gauge("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", usage)
        yield self._cache_info()
        tokens = self._counts["tokens"]
        computed, cached = tokens.get(("prompt_computed",), 0.0), tokens.get(("prompt_cached",), 0.0)
        yield counter("prompt_tokens", "Prompt tokens.", {(): computed + cached})
        by_source: dict[tuple[str, ...], float] = {
            ("local_compute",): computed,
            ("local_cache_hit",): cached,
            ("external_kv_transfer",): 0.0,
        }
        yield counter("prompt_tokens_by_source", "Prompt tokens by source.", by_source, "source")
        yield counter("prompt_tokens_cached", "Prompt tokens from the prefix cache.", {(): cached})
        yield counter("generation_tokens", "Generated tokens.", {(): tokens.get(("generated",), 0.0)})
        for name, ours in (
            ("prefix_cache_queries", "prefix_cache_queries"),
            ("prefix_cache_hits", "prefix_cache_hits"),
            ("num_preemptions", "preemptions"),
        ):
            total: dict[tuple[str, ...], float] = {(): sum((self._engine_total(i, ours) for i in self._engines), 0.0)}
            yield counter(name, ENGINE_COUNTERS[ours][1], total)
        reasons = {(reason,): 0.0 for reason in ("stop", "length", "abort", "error")} | self._counts["requests_finished"]
        yield counter("request_success", "Finished choices.", reasons, "finished_reason")
        yield counter("corrupted_requests", "Choices that failed.", {(): self._counts["requests_finished"].get(("error",), 0.0)})
        yield counter("admission_rejections", "Requests refused by admission.", self._counts["admission_rejections"], "reason")
        for attribute, (_, _, name, bounds, text) in HISTOGRAMS.items():
            if name:
                kept: Histogram = getattr(self, attribute)
                histogram = HistogramMetricFamily(f"vllm:{name}", text, labels=labels)
                histogram.add_metric(first, kept.buckets(bounds), kept.sum)
                yield histogram

    def _cache_info(self) -> Metric:
        from prometheus_client.core import GaugeMetricFamily

        names = ("engine", "block_size", "num_gpu_blocks", "cache_dtype", "enable_prefix_caching")
        family = GaugeMetricFamily("vllm:cache_config_info", "The KV cache.", labels=names)
        for engine, entry in self._engines.items():
            facts = entry.facts
            if facts is not None:
                values = (str(engine), str(facts.block_size), str(facts.num_blocks), facts.dtype, str(facts.enable_prefix_caching))
                family.add_metric(values, 1)
        return family

    def _from_edges(self) -> Iterator[Metric]:
        """The edges' flat counters, summed over edges and grouped into families."""
        from prometheus_client.core import Metric

        sums: dict[str, float] = {}
        for cumulative in self._edges.values():
            for flat, value in cumulative.totals().items():
                sums[flat] = sums.get(flat, 0.0) + value
        families: dict[str, Metric] = {}
        bases = {flat.split("{")[0].removesuffix("_bucket") for flat in sums if flat.split("{")[0].endswith("_bucket")}
        for flat in sorted(sums):
            match = _FLAT.match(flat)
            if match is None:
                continue
            name = match[1]
            base = next((b for b in (name.removesuffix(s) for s in ("_bucket", "_sum", "_count")) if b in bases and b != name), None)
            if base is not None:
                family, kind = base, "histogram"
            elif name.endswith("_total"):
                family, kind = name.removesuffix("_total"), "counter"
            else:
                family, kind = name, "gauge"
            if family not in families:
                families[family] = Metric(family, EDGE_HELP.get(family, "From the edges."), kind)
            labels = {key: _unescape(value) for key, value in _LABEL.findall(match[2] or "")}
            families[family].add_sample(name, labels, sums[flat])
        yield from families.values()


def _unescape(value: str) -> str:
    return value.replace("\\n", "\n").replace('\\"', '"').replace("\\\\", "\\")
