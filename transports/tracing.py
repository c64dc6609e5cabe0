"""Spans of a request at the edge.

What it is: a SERVER span per request with W3C trace context in and out and the `gen_ai.*` attributes, and its children `receive` (request
start to Submit) and `send` (last answer from text to last byte); text makes the ones in between from Submit.traceparent. `NO_TRACING` costs
nothing: OpenTelemetry is imported only when an exporter is configured.
What it does not know: how spans are exported (core/telemetry_traces.py), what a request is.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

Attributes = Mapping[str, Any]


class RequestSpan:
    """Nothing is recorded. `traceparent` is what goes to text and back to the client."""

    __slots__ = ("traceparent", "tracestate")

    def __init__(self, traceparent: str = "", tracestate: str = "") -> None:
        self.traceparent = traceparent
        self.tracestate = tracestate

    def name(self, name: str, attributes: Attributes) -> None:
        """Called once the request is understood."""

    def submitted(self, at_ns: int) -> None:
        """`receive` ends (CLOCK_MONOTONIC, as all moments here)."""

    def answered(self, at_ns: int) -> None:
        """`send` begins: text was done at that moment."""

    def end(self, status: int, attributes: Attributes) -> None:
        """The last byte is written (or the client is gone: 499)."""


class Tracing:
    """Makes request spans. This one passes the client's trace context on and records nothing."""

    enabled = False

    def begin(self, traceparent: str, tracestate: str) -> RequestSpan:
        return RequestSpan(traceparent, tracestate)


NO_TRACING = Tracing()


def _wall_ns(at_ns: int) -> int:
    """A moment on CLOCK_MONOTONIC as nanoseconds since the Unix epoch."""
    return time.time_ns() - time.monotonic_ns() + at_ns


class _OtelSpan(RequestSpan):
    __slots__ = ("_context", "_mark", "_send", "_span", "_tracer")

    def __init__(self, tracer: Any, span: Any, context: Any, traceparent: str, tracestate: str, start_ns: int) -> None:
        super().__init__(traceparent, tracestate)
        self._tracer = tracer
        self._span = span
        self._context = context
        self._mark = start_ns
        self._send = 0

    def name(self, name: str, attributes: Attributes) -> None:
        self._span.update_name(name)
        self._span.set_attributes(attributes)

    def submitted(self, at_ns: int) -> None:
        self._tracer.start_span("receive", context=self._context, start_time=self._mark).end(end_time=_wall_ns(at_ns))

    def answered(self, at_ns: int) -> None:
        self._send = _wall_ns(at_ns)

    def end(self, status: int, attributes: Attributes) -> None:
        from opentelemetry.trace import Status, StatusCode

        now = time.time_ns()
        if self._send:
            self._tracer.start_span("send", context=self._context, start_time=self._send).end(end_time=now)
        self._span.set_attribute("http.response.status_code", status)
        self._span.set_attributes(attributes)
        if status >= 500:
            self._span.set_status(Status(StatusCode.ERROR))
        if status >= 400:
            self._span.set_attribute("error.type", str(status))
        self._span.end(end_time=now)


class OtelTracing(Tracing):
    """`tracer_provider` is an OpenTelemetry TracerProvider, as core/telemetry_traces.py configures it."""

    enabled = True

    def __init__(self, tracer_provider: Any) -> None:
        from opentelemetry.trace import SpanKind, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._tracer = tracer_provider.get_tracer("penstock.edge")
        self._kind = SpanKind.SERVER
        self._in_context = set_span_in_context
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, traceparent: str, tracestate: str) -> RequestSpan:
        carrier = {"traceparent": traceparent, "tracestate": tracestate} if traceparent else {}
        parent = self._propagator.extract(carrier)
        now = time.time_ns()
        span = self._tracer.start_span("request", context=parent, kind=self._kind, start_time=now)
        context = self._in_context(span, parent)
        out: dict[str, str] = {}
        self._propagator.inject(out, context=context)
        return _OtelSpan(self._tracer, span, context, out.get("traceparent", ""), out.get("tracestate", ""), now)
