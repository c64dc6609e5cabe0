"""Spans: off means off; on, they tile the request."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import pytest
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from penstock.core.protocol.columns import i32
from penstock.core.protocol.control import Quality
from penstock.core.protocol.errors import ConfigError
from penstock.core.protocol.messages import (
    ABORTED,
    LENGTH,
    RUNNING,
    Cancel,
    EngineStats,
    Park,
    SpeculationStats,
    Tick,
    Unpark,
    seq_of,
)
from penstock.core.protocol.sampling import SamplingParams
from penstock.core.telemetry.traces import NO_TRACES, OtelTraces, configure, endpoint_of

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def memory() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def traced(make_bench: Any, memory: InMemorySpanExporter) -> Any:
    traces = OtelTraces(memory, role="text", batch=False)
    bench = make_bench(traces=traces)
    yield bench
    traces.shutdown()


def test_spans_tile_the_request(traced: Any, memory: InMemorySpanExporter) -> None:
    traced.hold_encodes = True
    traced.submit(1, traceparent=PARENT, tracestate="vendor=x", sampling=SamplingParams(top_k=4))
    begin = traced.clock.wall_ns()
    traced.clock.advance(0.003)
    traced.release()
    traced.clock.advance(0.004)
    traced.scripts[seq_of(1, 0)] = [5, 6, 7, 8]
    traced.run()
    end = traced.clock.wall_ns()
    spans = sorted(memory.get_finished_spans(), key=lambda span: span.start_time or 0)
    assert [span.name for span in spans] == ["tokenize", "queue", "prefill", "decode", "detokenise"]
    assert spans[0].start_time == begin
    assert spans[-1].end_time == end
    for before, after in itertools.pairwise(spans):
        assert before.end_time == after.start_time
    covered = sum((span.end_time or 0) - (span.start_time or 0) for span in spans)
    assert covered >= 0.99 * (end - begin)
    assert all((span.end_time or 0) > (span.start_time or 0) for span in spans)
    for span in spans:
        assert span.parent is not None
        assert f"{span.parent.span_id:016x}" == "b7ad6b7169203331"
        assert span.context is not None
        assert f"{span.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
        assert span.attributes is not None
        assert span.attributes["gen_ai.response.id"] == "r1"
    decode = spans[3].attributes
    assert decode is not None
    assert decode["gen_ai.usage.output_tokens"] == 4
    assert decode["gen_ai.request.top_k"] == 4
    assert decode["gen_ai.response.finish_reasons"] == ("length",)
    assert spans[0].resource.attributes["service.name"] == "penstock"
    answer = traced.query("metrics").body
    assert b"penstock_otel_spans_exported_total 5.0" in answer
    assert b"penstock_otel_spans_failed_total 0.0" in answer


def test_a_span_tells_what_the_weights_lost(traced: Any, memory: InMemorySpanExporter) -> None:
    traced.up(quality=Quality(scheme="w4a16", status="measured", kl_mean=0.02, top1=0.9, record="ab"))
    traced.submit(1, traceparent=PARENT)
    traced.scripts[seq_of(1, 0)] = [5, 6]
    traced.run()
    (decode,) = (span.attributes for span in memory.get_finished_spans() if span.name == "decode")
    assert decode is not None
    told = {name: value for name, value in decode.items() if name.startswith("penstock.quality.")}
    assert told == {
        "penstock.quality.scheme": "w4a16", "penstock.quality.status": "measured", "penstock.quality.kl_mean": 0.02, "penstock.quality.top1": 0.9,
        "penstock.quality.record": "ab",
    }  # fmt: skip


def test_spans_are_told_in_the_edges_time(traced: Any, memory: InMemorySpanExporter) -> None:
    """Its clocks were read at another moment: where the edge's `receive` ends and its `send` begins is given by its own reading."""
    offset = traced.clock.wall_ns() - traced.clock.now_ns() - 142_857
    sent = traced.clock.now_ns() - 1_000
    traced.submit(1, traceparent=PARENT, sent_ns=sent, to_wall_ns=offset)
    traced.clock.advance(0.004)
    traced.scripts[seq_of(1, 0)] = [5, 6]
    traced.run()
    spans = memory.get_finished_spans()
    assert spans[0].start_time == sent + offset
    for before, after in itertools.pairwise(spans):
        assert before.end_time == after.start_time
    assert spans[-1].end_time == traced.finished[1].done_ns + offset


def test_events_lie_in_the_stage_where_they_happened(traced: Any, memory: InMemorySpanExporter) -> None:
    traced.submit(1, traceparent=PARENT)
    seq = seq_of(1, 0)
    traced.scripts[seq] = [5, 6, 7, 8]
    traced.step()
    traced.send(Park(key=1))
    traced.clock.advance(0.01)
    traced.send(Unpark(key=1))
    traced.rows([], preempted_seqs=_seqs(seq))
    traced.up()
    traced.run()
    [decode] = [span for span in memory.get_finished_spans() if span.name == "decode"]
    assert [event.name for event in decode.events] == ["parked", "resumed", "preempted", "replayed"]
    assert decode.attributes is not None
    assert decode.attributes["penstock.replays"] == 1
    assert decode.attributes["penstock.preemptions"] == 1


def test_acceptance_stands_with_the_request(traced: Any, memory: InMemorySpanExporter) -> None:
    traced.submit(1, traceparent=PARENT, sampling=SamplingParams(max_tokens=2))
    traced.submit(2, traceparent=PARENT, sampling=SamplingParams(max_tokens=1))
    rows = [(seq_of(1, 0), 0, 5, RUNNING), (seq_of(1, 0), 1, 6, LENGTH), (seq_of(2, 0), 0, 5, LENGTH)]
    lives = {seq: incarnation for seq, (incarnation, _) in traced.admitted.items()}
    told = {"drafted_seqs": _seqs(seq_of(1, 0)), "drafted": i32([4]), "accepted": i32([1])}
    traced.rows([(seq, lives[seq], offset, token, reason) for seq, offset, token, reason in rows], **told)
    found = {span.attributes["gen_ai.response.id"]: span.attributes for span in memory.get_finished_spans() if span.name == "decode"}
    names = ("drafted_tokens", "accepted_tokens", "acceptance")
    assert [found["r1"][f"penstock.speculation.{name}"] for name in names] == [4, 1, 0.25]
    assert not any("speculation" in name for name in found["r2"])


def ids_of(traced: Any, text: str) -> list[int]:
    found: list[int] = traced.tokenizer.encode_batch([text], add_special_tokens=False)[0].tolist()
    return found


def cut_by_a_stop_string(traced: Any, key: int = 1) -> tuple[int, int, int]:
    """A request that ended here, and of which the engine has not said so yet: seq, incarnation, tokens."""
    traced.up(lookahead=4, drafters=["ngram"])
    traced.submit(key, traceparent=PARENT, sampling=SamplingParams(stop=["water"]))
    seq = seq_of(key, 0)
    traced.scripts[seq] = [*ids_of(traced, "the water"), 5, 6, 7]
    incarnation = traced.admitted[seq][0]
    while key not in traced.finished:
        assert traced.step()
    return seq, incarnation, len(traced.scripts[seq]) - 3


def speculation_of(memory: InMemorySpanExporter) -> list[dict[str, Any]]:
    """Of each decode span so far."""
    decodes = [span.attributes or {} for span in memory.get_finished_spans() if span.name == "decode"]
    return [{name.split(".")[-1]: value for name, value in one.items() if "speculation" in name} for one in decodes]


def test_a_span_waits_for_what_the_engine_says_of_an_answer_that_was_cut(traced: Any, memory: InMemorySpanExporter) -> None:
    seq, incarnation, count = cut_by_a_stop_string(traced)
    end = traced.finished[1].done_ns
    assert not memory.get_finished_spans()
    traced.rows([(seq, incarnation, count, -1, ABORTED)], drafted_seqs=_seqs(seq), drafted=i32([8]), accepted=i32([6]))
    assert speculation_of(memory) == [{"drafted_tokens": 8, "accepted_tokens": 6, "acceptance": 0.75}]
    last = max(memory.get_finished_spans(), key=lambda span: span.end_time or 0)
    assert last.end_time == end + traced.clock.wall_ns() - traced.clock.now_ns(), "the wait is no part of the request"


def test_an_end_that_crosses_the_abort_tells_too(traced: Any, memory: InMemorySpanExporter) -> None:
    traced.up(lookahead=4, drafters=["ngram"])
    traced.submit(1, traceparent=PARENT, sampling=SamplingParams(stop=["water"]))
    seq, tokens = seq_of(1, 0), [*ids_of(traced, "the water"), 5]
    rows = [(seq, traced.admitted[seq][0], offset, token, RUNNING) for offset, token in enumerate(tokens)]
    rows[-1] = (*rows[-1][:4], LENGTH)
    traced.rows(rows, started=[(seq, 0)], drafted_seqs=_seqs(seq), drafted=i32([3]), accepted=i32([3]))
    assert traced.finished
    assert speculation_of(memory) == [{"drafted_tokens": 3, "accepted_tokens": 3, "acceptance": 1.0}]


def test_a_span_does_not_wait_for_an_engine_that_says_nothing(traced: Any, memory: InMemorySpanExporter) -> None:
    cut_by_a_stop_string(traced)
    for seconds, spans in ((1.0, 0), (1.0, 5)):
        traced.clock.advance(seconds)
        traced.send(Tick(now_ns=traced.clock.now_ns()))
        assert len(memory.get_finished_spans()) == spans
    memory.clear()
    cut_by_a_stop_string(traced, 2)
    traced.up()
    assert speculation_of(memory) == [{}], "the engine is another one now"


def test_a_drafter_that_is_off_stands_in_the_spans_of_whoever_ran(traced: Any, memory: InMemorySpanExporter) -> None:
    traced.up(lookahead=4, drafters=["suffix", "ngram"])
    for key, length in ((1, 5), (2, 2), (3, 3)):
        traced.submit(key, traceparent=PARENT)
        traced.scripts[seq_of(key, 0)] = [5] * length

    def told(*reasons: str) -> None:
        traced.stats = EngineStats(speculation=SpeculationStats(states=[0 if why else 1 for why in reasons], reasons=list(reasons)))
        traced.step()

    told()
    traced.stats = EngineStats(speculation=SpeculationStats(states=[1, 0], reasons=["", "3% were right"]))
    traced.rows([])
    told("", "3% were right")
    told()
    told()
    told()
    found = {span.attributes["gen_ai.response.id"]: span for span in memory.get_finished_spans() if span.name == "decode"}
    off = {name: span.attributes.get("penstock.speculation.switched_off") for name, span in found.items()}
    assert off == dict.fromkeys(("r1", "r2", "r3"), ("ngram: 3% were right",))
    assert [event.name for event in found["r1"].events] == ["drafter_off"]
    memory.clear()
    traced.submit(4, traceparent=PARENT)
    traced.scripts[seq_of(4, 0)] = [5, 6]
    traced.run()
    assert speculation_of(memory) == [{}]
    traced.submit(5, traceparent=PARENT)
    traced.scripts[seq_of(5, 0)] = [5]
    told("RuntimeError: no", "")
    assert speculation_of(memory)[1:] == [{"switched_off": ("suffix: RuntimeError: no",)}]


def _seqs(*seqs: int) -> Any:
    from penstock.core.protocol.columns import i64

    return i64(list(seqs))


def test_a_cancelled_request_ends_in_the_stage_it_was_in(traced: Any, memory: InMemorySpanExporter) -> None:
    traced.submit(1, traceparent=PARENT)
    traced.clock.advance(0.5)
    traced.send(Cancel(key=1))
    assert [span.name for span in memory.get_finished_spans()] == ["tokenize", "queue"]
    memory.clear()
    traced.submit(2, traceparent=PARENT)
    traced.scripts[seq_of(2, 0)] = [5, 6, 7]
    traced.step()
    traced.clock.advance(0.5)
    traced.send(Cancel(key=2))
    spans = memory.get_finished_spans()
    assert [span.name for span in spans] == ["tokenize", "queue", "prefill", "decode"]
    assert (spans[-1].end_time or 0) - (spans[-1].start_time or 0) >= 500_000_000


def test_an_unsampled_parent_is_respected(traced: Any, memory: InMemorySpanExporter) -> None:
    traced.submit(1, traceparent=PARENT[:-1] + "0")
    traced.scripts[seq_of(1, 0)] = [5]
    traced.run()
    assert memory.get_finished_spans() == ()


def test_failures_are_counted(make_bench: Any) -> None:
    class Broken(SpanExporter):
        def export(self, spans: Any) -> SpanExportResult:
            raise OSError("no collector")

    traces = OtelTraces(Broken(), role="text", batch=False)
    bench = make_bench(traces=traces)
    bench.submit(1, traceparent=PARENT)
    bench.scripts[seq_of(1, 0)] = [5]
    bench.run()
    assert b"penstock_otel_spans_failed_total 5.0" in bench.query("metrics").body
    traces.shutdown()


def test_without_an_endpoint_nothing_is_imported() -> None:
    code = (
        "import sys\n"
        "from penstock.core.telemetry.traces import NO_TRACES, configure\n"
        "import penstock.core.actors.text\n"
        "assert configure('text', environ={}) is NO_TRACES\n"
        "bad = [m for m in sys.modules if m.startswith(('opentelemetry', 'prometheus_client', 'torch', 'jinja2', 'tokenizers'))]\n"
        "assert not bad, bad\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert not NO_TRACES.active


@pytest.mark.parametrize(
    ("option", "environ", "expected"),
    [
        (None, {}, (False, None)),
        ("http://c:4318", {}, (True, "http://c:4318/v1/traces")),
        ("http://c:4318/v1/traces", {}, (True, "http://c:4318/v1/traces")),
        ("http://c:4318", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://d:4318"}, (True, None)),
        (None, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://d:4318/x"}, (True, None)),
        ("http://c:4318", {"OTEL_SDK_DISABLED": "true"}, (False, None)),
        ("http://c:4318", {"OTEL_TRACES_EXPORTER": "none"}, (False, None)),
    ],
)
def test_which_endpoint(option: str | None, environ: dict[str, str], expected: tuple[bool, str | None]) -> None:
    assert endpoint_of(option, environ) == expected


def test_a_protocol_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="http/protobuf"):
        configure("text", endpoint="http://c:4318", environ={"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})


def test_configured_traces_export_over_http() -> None:
    traces = configure("text", endpoint="http://127.0.0.1:9/v1/traces", environ={})
    assert traces.active
    assert traces.provider is not None
    traces.shutdown()


def test_the_step_path_makes_no_spans(traced: Any, memory: InMemorySpanExporter) -> None:
    traced.submit(1, traceparent=PARENT)
    traced.scripts[seq_of(1, 0)] = [5] * 50
    for _ in range(49):
        traced.step()
    assert memory.get_finished_spans() == ()
