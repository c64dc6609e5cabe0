"""Metrics: names are API; values are what happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from penstock.core.protocol.control import Quality
from penstock.core.protocol.messages import RUNNING, Cancel, EdgeStats, EngineFacts, EngineStats, SpeculationStats, seq_of
from penstock.core.protocol.sampling import SamplingParams
from penstock.core.telemetry.metrics import Metrics
from penstock.core.telemetry.names import HISTOGRAMS, VLLM_ITL, VLLM_TTFT
from penstock.core.telemetry.series import Histogram

NAMES = Path(__file__).parent / "metric_names.txt"


def scrape(bench: Any) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    answer = bench.query("metrics")
    assert answer.status == 200
    out: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(answer.body.decode()):
        for sample in family.samples:
            series = out.setdefault(sample.name, {})
            key = tuple(sorted(sample.labels.items()))
            assert key not in series, f"{sample.name}{key} twice"
            series[key] = sample.value
    return out


def run_some(bench: Any) -> None:
    for key, n in ((1, 1), (2, 2)):
        bench.submit(key, sampling=SamplingParams(n=n, max_tokens=20))
        for choice in range(n):
            bench.scripts[seq_of(key, choice)] = [5, 6, 7, 8]
    bench.submit(3)
    bench.scripts[seq_of(3, 0)] = [5] * 9
    bench.run()
    bench.submit(4)
    bench.send(Cancel(key=4))
    bench.submit(5, model="other")


def test_names_are_stable(bench: Any) -> None:
    """A dashboard breaks with every renamed metric: a name may be added here, never changed or dropped without two minor versions' notice."""
    run_some(bench)
    bench.send(EdgeStats(edge=0, counters={'http_requests_total{handler="/health",method="GET",status="200"}': 1}))
    found = sorted(
        f"{family.name} {family.type} {','.join(sorted({label for s in family.samples for label in s.labels}))}".strip()
        for family in text_string_to_metric_families(bench.query("metrics").body.decode())
    )
    assert found == NAMES.read_text().splitlines()


def test_tokens_of_one_step_have_no_gap_between_them(bench: Any) -> None:
    bench.submit(1, sampling=SamplingParams(max_tokens=6))
    seq = seq_of(1, 0)
    incarnation, _ = bench.admitted.pop(seq)
    tokens = bench.tokenizer.encode_batch(["the water of the sea"], add_special_tokens=False)[0].tolist()[:5]
    bench.rows([(seq, incarnation, n, token, RUNNING) for n, token in enumerate(tokens[:3])], started=[(seq, 0)])
    bench.rows([(seq, incarnation, n, token, RUNNING) for n, token in enumerate(tokens[3:], 3)])
    got = scrape(bench)
    assert got["penstock_tokens_total"][(("source", "generated"),)] == 5
    gaps = {
        name: got[f"penstock_inter_token_latency_seconds_{name}"][(("class", "standard"), ("model", "trained"))]
        for name in ("count", "sum")
    }
    assert gaps == {"count": 1, "sum": pytest.approx(0.01)}
    assert bench.received[1, 0].text == bench.tokenizer.decode(tokens, skip_special_tokens=True)


def test_values_are_what_happened(bench: Any) -> None:
    run_some(bench)
    got = scrape(bench)

    def value(name: str, **labels: str) -> float:
        return got[name][tuple(sorted(labels.items()))]

    own, vllm = {"model": "trained", "class": "standard"}, {"model_name": "trained", "engine": "0"}
    assert value("penstock_tokens_total", source="generated") == 4 + 8 + 9
    assert value("vllm:generation_tokens_total", **vllm) == 21
    prompt = sum(len(bench.tokenizer.encode_batch(["the water"], add_special_tokens=False)[0]) for _ in range(3))
    assert value("vllm:prompt_tokens_total", **vllm) == prompt
    assert value("vllm:prompt_tokens_by_source_total", source="local_compute", **vllm) == prompt
    assert value("penstock_requests_finished_total", reason="length") == 4
    assert value("penstock_requests_finished_total", reason="abort") == 1
    assert value("vllm:request_success_total", finished_reason="length", **vllm) == 4
    assert value("penstock_cancellations_total", cause="disconnect") == 1
    assert value("penstock_requests_rejected_total", code="model_not_found") == 1
    assert value("penstock_time_to_first_token_seconds_count", **own) == 3
    assert value("vllm:time_to_first_token_seconds_count", **vllm) == 3
    gaps = 3 + 2 * 3 + 8
    assert value("vllm:inter_token_latency_seconds_count", **vllm) == gaps
    assert value("vllm:inter_token_latency_seconds_sum", **vllm) == pytest.approx(gaps * 0.01)
    assert value("penstock_inter_token_latency_seconds_bucket", **own, le="0.0075") == 0
    assert value("penstock_inter_token_latency_seconds_bucket", **own, le="0.01") == gaps
    assert value("vllm:request_generation_tokens_sum", **vllm) == 21
    assert value("penstock_pending_requests") == 0
    assert value("penstock_ready") == 1


def test_gauges_follow_the_requests(bench: Any) -> None:
    bench.submit(1)
    bench.submit(2)
    bench.hold_encodes = True
    bench.submit(3)
    got = scrape(bench)
    states = {dict(k)["state"]: v for k, v in got["penstock_requests"].items()}
    assert states == {"encoding": 1, "queued": 2, "running": 0, "parked": 0, "replaying": 0}
    assert got["penstock_pending_requests"][()] == 3
    for key in (1, 2):
        bench.scripts[seq_of(key, 0)] = [5] * 9
    bench.stats = EngineStats(running=2, blocks_used=256, blocks_total=1024, blocks_cached=10)
    bench.step()
    got = scrape(bench)
    assert got["penstock_requests"][(("state", "running"),)] == 2
    assert got["vllm:num_requests_running"][(("engine", "0"), ("model_name", "trained"))] == 2
    assert got["vllm:kv_cache_usage_perc"][(("engine", "0"), ("model_name", "trained"))] == 0.25


def test_drafts_are_counted_over_an_engines_lives() -> None:
    metrics = Metrics(["trained"])
    facts = EngineFacts(
        model="m", architecture="A", dtype="float32", device="fake", attention="fake", vocab_size=8, max_model_len=8, block_size=4, num_blocks=2,
        max_num_seqs=1, max_num_batched_tokens=8, deterministic=False, fingerprint="", kv_layout="", weights_bytes=0, workspace_bytes=0,
        kv_bytes=0, slack_bytes=0, drafters=["ngram", "draft_model"], lookahead=3,
    )  # fmt: skip
    metrics.engine_up("trained", 0, 1, facts)
    assert metrics.drafts() is None
    one = SpeculationStats(drafts=10, drafted=30, accepted=15, places=[8, 5, 2], draft_ns=10**9, step_ns=4 * 10**9, width=2, states=[0, 2])
    metrics.engine_stats(0, EngineStats(speculation=one))
    metrics.engine_up("trained", 0, 2, facts)
    metrics.engine_stats(
        0, EngineStats(speculation=SpeculationStats(drafts=1, drafted=3, accepted=1, places=[1, 0, 0], width=3, states=[1, 2], chosen=4))
    )
    assert metrics.drafts() == (11, 33, 16)
    told = dict(line.rsplit(" ", 1) for line in metrics.render().decode().splitlines() if "spec_decode" in line and line[0] != "#")
    vllm = 'engine="0"'
    want = {
        'penstock_spec_decode_state{engine="0",method="ngram"}': 1,
        'penstock_spec_decode_state{engine="0",method="draft_model"}': 2,
        'penstock_spec_decode_width{engine="0"}': 3,
        'penstock_spec_decode_chosen_width{engine="0"}': 4,
        'penstock_spec_decode_accepted_length{engine="0"}': 2,
        'penstock_spec_decode_drafts_total{engine="0"}': 11,
        'penstock_spec_decode_draft_seconds_total{engine="0"}': 1,
        'penstock_spec_decode_step_seconds_total{engine="0"}': 4,
        'penstock_spec_decode_accepted_tokens_per_pos_total{engine="0",position="0"}': 9,
        'penstock_spec_decode_accepted_tokens_per_pos_total{engine="0",position="2"}': 2,
        f'vllm:spec_decode_num_drafts_total{{model_name="trained",{vllm}}}': 11,
        f'vllm:spec_decode_num_draft_tokens_total{{model_name="trained",{vllm}}}': 33,
        f'vllm:spec_decode_num_accepted_tokens_total{{model_name="trained",{vllm}}}': 16,
        f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{model_name="trained",{vllm},position="1"}}': 5,
    }
    assert {name: float(told[name]) for name in want} == want


def test_compat_names_can_be_left_out(make_bench: Any) -> None:
    from penstock.core.protocol.config import Config

    bench = make_bench(Config(metrics_compat="none"))
    names = scrape(bench)
    assert not any(name.startswith("vllm:") for name in names)
    assert "penstock_ready" in names


def test_edges_are_summed_and_survive_their_restart(bench: Any) -> None:
    hit = 'http_requests_total{handler="/v1/models",method="GET",status="200"}'
    bucket = 'http_request_duration_seconds_bucket{handler="a\\"b",le="0.1"}'
    bench.send(EdgeStats(edge=0, counters={hit: 5, bucket: 2, 'http_request_duration_seconds_sum{handler="a\\"b"}': 0.25}))
    bench.send(EdgeStats(edge=1, counters={hit: 7, "penstock_edge_streams": 5}))
    bench.send(EdgeStats(edge=1, counters={hit: 7, "penstock_edge_streams": 2}))  # a gauge may fall
    bench.send(EdgeStats(edge=0, counters={hit: 2, "penstock_edge_streams": 1}))  # it began again
    got = scrape(bench)
    assert got["http_requests_total"] == {(("handler", "/v1/models"), ("method", "GET"), ("status", "200")): 14}
    assert got["http_request_duration_seconds_bucket"] == {(("handler", 'a"b'), ("le", "0.1")): 2}
    assert got["penstock_edge_streams"][()] == 3
    assert b"# TYPE penstock_edge_streams gauge" in bench.query("metrics").body
    assert b"# TYPE http_requests_total counter" in bench.query("metrics").body
    assert b"# TYPE http_request_duration_seconds histogram" in bench.query("metrics").body


def test_an_edges_buckets_come_in_order(bench: Any) -> None:
    """An edge counts only buckets that were hit: a fast request after a slow one adds a smaller bound later."""
    counters: dict[str, float] = {}
    for seconds in (3.0, 0.001):
        for handler in ("b", "a"):
            for le in ("0.005", "0.1", "5", "+Inf"):
                if seconds <= float(le):
                    name = f'http_request_duration_seconds_bucket{{handler="{handler}",le="{le}"}}'
                    counters[name] = counters.get(name, 0) + 1
            counters[f'http_request_duration_seconds_sum{{handler="{handler}"}}'] = 3.001
            counters[f'http_request_duration_seconds_count{{handler="{handler}"}}'] = 2
    bench.send(EdgeStats(edge=0, counters=counters))
    lines = [line for line in bench.query("metrics").body.decode().splitlines() if line.startswith("http_request_duration")]
    assert [line.split("seconds_")[1] for line in lines] == [
        f'{kind}{{handler="{handler}"{more}}} {value}'
        for handler in "ab"
        for kind, more, value in (
            ("bucket", ',le="0.005"', "1.0"),
            ("bucket", ',le="0.1"', "1.0"),
            ("bucket", ',le="5"', "2.0"),
            ("bucket", ',le="+Inf"', "2.0"),
            ("sum", "", "3.001"),
            ("count", "", "2.0"),
        )
    ]


def test_engine_counters_survive_its_restart(bench: Any) -> None:
    bench.stats = EngineStats(steps=10, prefix_queries=100, prefix_hits=40, preemptions=3)
    bench.rows([])
    bench.up()
    bench.stats = EngineStats(steps=2, prefix_queries=7, prefix_hits=1)
    bench.rows([])
    got = scrape(bench)
    assert got["penstock_engine_steps_total"][(("engine", "0"),)] == 12
    assert got["vllm:prefix_cache_queries_total"][(("engine", "0"), ("model_name", "trained"))] == 107
    assert got["penstock_preemptions_total"][(("engine", "0"),)] == 3
    assert got["penstock_engine_epoch"][(("engine", "0"),)] == 2
    assert got["penstock_engine_losses_total"][(("engine", "0"),)] == 1


def test_a_histogram_projects_onto_both_sets_of_buckets() -> None:
    histogram = Histogram((0.001, 0.1, 1), (0.01, 0.1, 10))
    for value, weight in ((0.0005, 1), (0.001, 2), (0.005, 4), (0.1, 8), (0.5, 16), (99, 32)):
        histogram.observe(value, weight)
    assert histogram.buckets((0.001, 0.1, 1)) == [("0.001", 3), ("0.1", 15), ("1.0", 31), ("+Inf", 63)]
    assert histogram.buckets((0.01, 0.1, 10)) == [("0.01", 7), ("0.1", 15), ("10.0", 31), ("+Inf", 63)]
    assert histogram.count == 63
    assert histogram.sum == pytest.approx(0.0005 + 0.002 + 0.02 + 0.8 + 8 + 99 * 32)


def test_buckets_see_fast_servers_and_match_vllm() -> None:
    """A latency floor of 0.3 s hides every objective below it."""
    series = Metrics(["m"]).of("m")
    assert min(series.e2e.bounds) <= 0.005
    assert min(series.itl.bounds) <= 0.0005
    for attribute, theirs in (("ttft", VLLM_TTFT), ("itl", VLLM_ITL)):
        assert HISTOGRAMS[attribute][3] == theirs
        assert set(map(float, theirs)) <= set(getattr(series, attribute).bounds)


def test_hooks_hear_of_requests_and_their_mistakes_are_their_own(make_bench: Any) -> None:
    class Hooks:
        def __init__(self) -> None:
            self.heard: list[Any] = []

        def request_finished(self, summary: Any) -> None:
            self.heard.append(summary)
            raise RuntimeError("a plugin's mistake")

        def engine_ready(self, engine: int, epoch: int) -> None:
            self.heard.append(("ready", engine, epoch))

        def engine_lost(self, engine: int, epoch: int, reason: str) -> None:
            self.heard.append(("lost", engine, epoch))

    hooks = Hooks()
    bench = make_bench(hooks=hooks)
    bench.submit(1, tenant="t")
    bench.scripts[seq_of(1, 0)] = [5, 6]
    bench.run()
    bench.up()
    ready, summary, lost, again = hooks.heard
    assert (ready, lost, again) == (("ready", 0, 1), ("lost", 0, 1), ("ready", 0, 2))
    assert (summary.rid, summary.tenant, summary.output_tokens, summary.finish_reasons) == ("r1", "t", 2, ["length"])
    assert summary.total_s > 0
    assert bench.actor.metrics.value("hook_errors", "request_finished") == 1


# ------------------------------------------------------------------ pools and classes


def page(metrics: Metrics) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    out: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            out.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return out


def test_what_happens_to_requests_is_kept_by_pool_and_class() -> None:
    """Histograms show both; counters, and vLLM's names, the classes of a pool together."""
    metrics = Metrics(["small", "large"], classes=("standard", "batch"))
    for pool, class_, seconds in (("small", "standard", 0.1), ("small", "batch", 2), ("large", "batch", 30)):
        series = metrics.of(pool, class_)
        series.ttft.observe(seconds)
        series.count("tokens", "generated", by=10 * seconds)
        series.count("requests_finished", "stop")
    assert metrics.of("small", "batch") is metrics.of("small", "batch")
    assert metrics.value("tokens", "generated") == 321
    got = page(metrics)
    first = {
        name: {(dict(k)["model"], dict(k)["class"]): v for k, v in got[f"penstock_time_to_first_token_seconds_{name}"].items()}
        for name in ("count", "sum")
    }
    small, large = (("small", "standard"), ("small", "batch")), (("large", "standard"), ("large", "batch"))
    assert first["count"] == {small[0]: 1, small[1]: 1, large[0]: 0, large[1]: 1}
    assert first["sum"] == {small[0]: 0.1, small[1]: 2, large[0]: 0, large[1]: 30}
    assert {dict(k)["model_name"]: v for k, v in got["vllm:time_to_first_token_seconds_count"].items()} == {"small": 2, "large": 1}
    assert got["penstock_tokens_total"][(("source", "generated"),)] == 321
    assert {dict(k)["model_name"]: v for k, v in got["vllm:generation_tokens_total"].items()} == {"small": 21, "large": 300}
    stopped = {dict(k)["model_name"]: v for k, v in got["vllm:request_success_total"].items() if dict(k)["finished_reason"] == "stop"}
    assert stopped == {"small": 2, "large": 1}


def test_figures_of_a_pool_stand_with_its_first_engine(bench: Any) -> None:
    metrics = Metrics(["small", "large"])
    for pool, engine in (("small", 0), ("large", 3), ("large", 4)):
        metrics.engine_up(pool, engine, 1, bench.actor._pool.facts)
        metrics.engine_stats(engine, EngineStats(running=engine, prefix_queries=10 + engine, batch_tokens=engine, blocks_total=8))
    metrics.set("pending_requests", 5)
    got = page(metrics)

    def by_engine(name: str) -> dict[tuple[str, str], float]:
        return {(dict(k)["model_name"], dict(k)["engine"]): v for k, v in got[name].items()}

    assert by_engine("vllm:num_requests_running") == {("small", "0"): 0, ("large", "3"): 3, ("large", "4"): 4}
    assert by_engine("vllm:num_requests_waiting") == {("small", "0"): 5, ("large", "3"): 0, ("large", "4"): 0}
    assert by_engine("vllm:prefix_cache_queries_total") == {("small", "0"): 10, ("large", "3"): 27}
    assert by_engine("vllm:iteration_tokens_total_sum") == {("small", "0"): 0, ("large", "3"): 7}
    assert by_engine("vllm:admission_rejections_total").keys() == {("small", "0")}


def test_no_label_comes_from_a_client() -> None:
    metrics = Metrics(["m"])
    for pool, class_ in (("other", "standard"), ("m", "gold")):
        with pytest.raises(KeyError):
            metrics.of(pool, class_)


def test_rows_of_two_classes_in_one_step(make_bench: Any) -> None:
    metrics = Metrics(["trained"], classes=("standard", "batch"))
    bench = make_bench(metrics=metrics)
    standard, batch = metrics.of("trained", "standard"), metrics.of("trained", "batch")
    for key, series in ((1, standard), (2, batch), (3, batch), (4, standard)):
        bench.hold_encodes = True
        bench.submit(key)
        request = bench.actor.ledger.requests[key]
        assert request.series is standard  # the class of all, today
        request.series = series
        bench.release()
        bench.scripts[seq_of(key, 0)] = [5, 6, 7, 8, 9][: 2 + key // 2]
    bench.run()
    assert (standard.counts["tokens"]["generated",], batch.counts["tokens"]["generated",]) == (2 + 4, 3 + 3)
    assert (standard.itl.count, batch.itl.count) == (1 + 3, 2 + 2)
    assert standard.itl.sum == pytest.approx(0.04)
    assert (standard.ttft.count, batch.ttft.count) == (2, 2)
    assert batch.counts["requests_finished"]["length",] == 2


def test_an_engine_tells_the_quality_of_its_weights(bench: Any) -> None:
    assert "penstock_quality_info" not in scrape(bench)
    bench.up(quality=Quality(scheme='4 "bits"', status="measured", kl_mean=0.02, top1=0.9, record="ab"))
    found = scrape(bench)
    assert found["penstock_quality_info"] == {(("engine", "0"), ("record", "ab"), ("scheme", '4 "bits"'), ("status", "measured")): 1.0}
    assert found["penstock_quality_kl_mean_nats"] == {(("engine", "0"),): 0.02}
    assert found["penstock_quality_top1_ratio"] == {(("engine", "0"),): 0.9}
    bench.up(quality=Quality(scheme="int8", status="unmeasured"))
    found = scrape(bench)
    assert found["penstock_quality_info"] == {(("engine", "0"), ("record", ""), ("scheme", "int8"), ("status", "unmeasured")): 1.0}
    assert not {"penstock_quality_kl_mean_nats", "penstock_quality_top1_ratio"} & set(found)
