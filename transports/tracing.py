"""Spans of a request at the edge.

What it is: a SERVER span per request with W3C trace context in and out, the HTTP and `gen_ai.*` attributes, and its children `receive` (request
start to Submit) and `send` (last answer from text to last byte); text makes the ones in between from Submit.traceparent, with the edge's
clock (Submit.to_wall_ns), so that the children touch. Generations are named by operation and model, other requests by method and route.
`NO_TRACING` costs nothing: OpenTelemetry is imported only when an exporter is configured.
What it does not know: how spans are exported (core/telemetry/traces.py), what a request is.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

Attributes = Mapping[str, Any]
PATH_CHARS = 200
"""Of a path in `url.path`."""


class RequestSpan:
    """Nothing is recorded. `traceparent` is what goes to text and back to the client; `to_wall_ns` plus a moment on CLOCK_MONOTONIC is its
    time since the Unix epoch in every span of the request, whichever process makes it."""

    __slots__ = ("to_wall_ns", "traceparent", "tracestate")

    def __init__(self, traceparent: str = "", tracestate: str = "", to_wall_ns: int = 0) -> None:
        self.traceparent = traceparent
        self.tracestate = tracestate
        self.to_wall_ns = to_wall_ns

    def name(self, name: str, attributes: Attributes) -> None:
        """Called once the request is understood."""

    def http(self, method: str, route: str, scheme: str, path: str) -> None:
        """Before the end: what was asked. `method` is "other" for an unknown one, `route` is a template or "" where there is none."""

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


def wall_offset_ns() -> int:
    """CLOCK_REALTIME minus CLOCK_MONOTONIC. Two readings differ by what the clocks' reading takes, and when the system's time is set: spans
    that are to touch need one and the same."""
    return time.time_ns() - time.monotonic_ns()


class _OtelSpan(RequestSpan):
    __slots__ = ("_context", "_named", "_send_ns", "_span", "_start_ns", "_tracer")

    def __init__(self, tracer: Any, span: Any, context: Any, traceparent: str, tracestate: str, *, start_ns: int, to_wall_ns: int) -> None:
        super().__init__(traceparent, tracestate, to_wall_ns)
        self._tracer = tracer
        self._span = span
        self._context = context
        self._named = False
        self._start_ns = start_ns
        self._send_ns = 0

    def _child(self, name: str, start_ns: int, end_ns: int) -> None:
        span = self._tracer.start_span(name, context=self._context, start_time=start_ns + self.to_wall_ns)
        span.end(end_time=end_ns + self.to_wall_ns)

    def name(self, name: str, attributes: Attributes) -> None:
        self._named = True
        self._span.update_name(name)
        self._span.set_attributes(attributes)

    def http(self, method: str, route: str, scheme: str, path: str) -> None:
        known = method != "other"
        self._span.set_attributes(
            {"http.request.method": method if known else "_OTHER", "url.scheme": scheme, "url.path": path[:PATH_CHARS]}
        )
        if route:
            self._span.set_attribute("http.route", route)
        if not self._named:
            self._span.update_name(f"{method if known else 'HTTP'} {route}".rstrip())

    def submitted(self, at_ns: int) -> None:
        self._child("receive", self._start_ns, at_ns)

    def answered(self, at_ns: int) -> None:
        self._send_ns = at_ns

    def end(self, status: int, attributes: Attributes) -> None:
        from opentelemetry.trace import Status, StatusCode

        now = time.monotonic_ns()
        if self._send_ns:
            self._child("send", self._send_ns, now)
        self._span.set_attribute("http.response.status_code", status)
        self._span.set_attributes(attributes)
        if status >= 500:
            self._span.set_status(Status(StatusCode.ERROR))
        if status >= 400:
            self._span.set_attribute("error.type", str(status))
        self._span.end(end_time=now + self.to_wall_ns)


class OtelTracing(Tracing):
    """`tracer_provider` is an OpenTelemetry TracerProvider, as core/telemetry/traces.py configures it."""

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
        now, to_wall_ns = time.monotonic_ns(), wall_offset_ns()
        span = self._tracer.start_span("request", context=parent, kind=self._kind, start_time=now + to_wall_ns)
        context = self._in_context(span, parent)
        out: dict[str, str] = {}
        self._propagator.inject(out, context=context)
        return _OtelSpan(
            self._tracer, span, context, out.get("traceparent", ""), out.get("tracestate", ""), start_ns=now, to_wall_ns=to_wall_ns
        )
