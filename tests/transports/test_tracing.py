"""Spans: the trace context goes in and out, the edge's spans tile their part of the request, and nothing happens when nothing is configured."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
from edge_kit import Edge, MakeEdge
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from penstock.core.protocol.messages import Submit
from penstock.transports import tracing
from penstock.transports.tracing import OtelTracing

CHAT: dict[str, Any] = {"model": "brook", "messages": [{"role": "user", "content": "hi"}]}
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def traced(make_edge: MakeEdge) -> tuple[Edge, InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return make_edge(tracing=OtelTracing(provider)), exporter


def test_spans_of_a_request(make_edge: MakeEdge) -> None:
    edge, exporter = traced(make_edge)
    with edge.http() as http:
        for stream in (False, True):
            exporter.clear()
            reply = http.post(
                "/v1/chat/completions",
                json=CHAT | {"stream": stream, "temperature": 0.5, "max_tokens": 9, "seed": 3, "stop": ["x"]},
                headers={"traceparent": PARENT, "tracestate": "a=b"},
            )
            edge.wait(lambda: any(s.kind is SpanKind.SERVER for s in exporter.get_finished_spans()), "the span")
            spans = {s.name: s for s in exporter.get_finished_spans()}
            assert set(spans) == {"chat brook", "receive", "send"}
            server = spans["chat brook"]
            assert server.parent is not None
            assert (server.parent.trace_id, server.parent.span_id) == (0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331)
            assert reply.headers["traceparent"] == f"00-0af7651916cd43dd8448eb211c80319c-{server.context.span_id:016x}-01"
            submit = edge.text.wait_for(Submit)[-1]
            assert (submit.traceparent, submit.tracestate) == (reply.headers["traceparent"], "a=b")
            for child in ("receive", "send"):
                assert spans[child].parent is not None
                assert spans[child].parent.span_id == server.context.span_id
                assert server.start_time <= spans[child].start_time <= spans[child].end_time <= server.end_time
            assert spans["receive"].start_time == server.start_time
            assert spans["send"].end_time == server.end_time
            assert spans["receive"].end_time == submit.sent_ns + submit.to_wall_ns
            assert spans["receive"].end_time <= spans["send"].start_time
            assert (
                dict(server.attributes or {}).items()
                >= {
                    "gen_ai.operation.name": "chat",
                    "gen_ai.provider.name": "penstock",
                    "gen_ai.request.model": "brook",
                    "gen_ai.request.temperature": 0.5,
                    "gen_ai.request.max_tokens": 9,
                    "gen_ai.request.seed": 3,
                    "gen_ai.request.stop_sequences": ("x",),
                    "gen_ai.request.stream": stream,
                    "gen_ai.response.model": "brook",
                    "gen_ai.response.finish_reasons": ("stop",),
                    "gen_ai.usage.input_tokens": 3,
                    "gen_ai.usage.output_tokens": 2,
                    "http.request.method": "POST",
                    "http.route": "/v1/chat/completions",
                    "http.response.status_code": 200,
                }.items()
            )


def test_a_refused_request_has_a_span_with_its_error(make_edge: MakeEdge) -> None:
    edge, exporter = traced(make_edge)
    with edge.http() as http:
        http.post("/v1/chat/completions", json={})
        http.get("/health")
        http.get("/metrics")
    edge.wait(lambda: bool(exporter.get_finished_spans()), "the span")
    (span,) = exporter.get_finished_spans()
    assert span.parent is None
    assert span.name == "POST /v1/chat/completions"
    assert dict(span.attributes or {}) == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "url.scheme": "http",
        "url.path": "/v1/chat/completions",
        "http.response.status_code": 400,
        "error.type": "400",
    }


@pytest.mark.parametrize(
    ("method", "path", "name", "route"),
    [
        ("GET", "/v1/models", "GET /v1/models", "/v1/models"),
        ("HEAD", "/v1/models", "HEAD /v1/models", "/v1/models"),
        ("GET", "/v1/models/brook?x=1", "GET /v1/models/{model_id}", "/v1/models/{model_id}"),
        ("GET", "/nothing/here", "GET", None),
        ("PROPFIND", "/v1/models", "HTTP", None),
    ],
)
def test_other_requests_are_named_by_method_and_route(make_edge: MakeEdge, method: str, path: str, name: str, route: str | None) -> None:
    edge, exporter = traced(make_edge)
    with edge.http() as http:
        reply = http.request(method, path)
    edge.wait(lambda: bool(exporter.get_finished_spans()), "the span")
    (span,) = exporter.get_finished_spans()
    attributes = dict(span.attributes or {})
    assert span.name.split(" ")[0] == name.split(" ")[0]
    assert attributes["http.request.method"] == ("_OTHER" if method == "PROPFIND" else method)
    assert attributes["url.path"] == path.partition("?")[0]
    assert attributes["http.response.status_code"] == reply.status_code
    if method != "PROPFIND":  # whether a 405 has a route is the router's business
        assert span.name == name
        assert attributes.get("http.route") == route


def test_a_request_keeps_its_clock_when_the_systems_time_is_set(make_edge: MakeEdge, monkeypatch: pytest.MonkeyPatch) -> None:
    edge, exporter = traced(make_edge)
    readings = itertools.count()
    real = tracing.time.time_ns

    class Jumpy:
        """Every reading of the wall clock is a second later than the one before."""

        monotonic_ns = staticmethod(tracing.time.monotonic_ns)

        @staticmethod
        def time_ns() -> int:
            return real() + next(readings) * 1_000_000_000

    monkeypatch.setattr(tracing, "time", Jumpy)
    with edge.http() as http:
        http.post("/v1/chat/completions", json=CHAT)
    edge.wait(lambda: any(s.kind is SpanKind.SERVER for s in exporter.get_finished_spans()), "the span")
    spans = {s.name: s for s in exporter.get_finished_spans()}
    assert spans["send"].end_time == spans["chat brook"].end_time
    assert (spans["chat brook"].end_time or 0) - (spans["chat brook"].start_time or 0) < 900_000_000
    submit = edge.text.wait_for(Submit)[-1]
    assert spans["receive"].end_time == submit.sent_ns + submit.to_wall_ns


def test_untraced_requests_pass_the_context_on(shared_edge: Edge) -> None:
    with shared_edge.http() as http:
        reply = http.post("/v1/chat/completions", json=CHAT, headers={"traceparent": PARENT})
        assert shared_edge.text.wait_for(Submit)[-1].traceparent == PARENT
        assert reply.headers["traceparent"] == PARENT
        reply = http.post("/v1/chat/completions", json=CHAT, headers={"traceparent": "00-nonsense", "tracestate": "x"})
        assert shared_edge.text.wait_for(Submit)[-1].traceparent == ""
        assert "traceparent" not in reply.headers
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-01", PARENT)
