"""Traces: the OpenTelemetry SDK, set up once a process (edge and text), or not at all.

What it is: `configure` reads the standard OTEL_* variables and the server's own option; without an endpoint it returns NO_TRACES, and the SDK
is never imported. Spans are exported over OTLP/HTTP in batches from the SDK's own thread; what the collector took and what failed is
counted. `Traces.child` makes spans after the fact from timestamps, under a W3C parent, so that nothing of tracing is near the step loop.
What it does not know: requests, which spans make sense.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from penstock.core.protocol.errors import ConfigError
from penstock.core.protocol.sampling import SamplingParams

Attributes = Mapping[str, Any]


class Traces:
    """Nothing is recorded. `provider` is an OpenTelemetry TracerProvider in an active one."""

    active = False
    provider: Any = None
    exported = 0
    failed = 0

    def context(self, traceparent: str, tracestate: str) -> Any:
        """The parent's context, or None if it is missing, malformed or not sampled."""
        return None

    def child(
        self,
        context: Any,
        name: str,
        start_ns: int,
        end_ns: int,
        attributes: Attributes | None = None,
        events: Sequence[tuple[str, int]] = (),
        *,
        error: str | None = None,
    ) -> None:
        """A finished span; times in ns since the Unix epoch."""

    def flush(self) -> None:
        """Send what waits (blocking; at the end of a process or a test)."""

    def shutdown(self) -> None:
        """Flush and stop the exporting thread."""


NO_TRACES = Traces()


class _Counting:
    """A SpanExporter around another that counts."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.exported = 0
        self.failed = 0

    def export(self, spans: Sequence[Any]) -> Any:
        from opentelemetry.sdk.trace.export import SpanExportResult

        try:
            result = self._inner.export(spans)
        except Exception:  # a broken collector must not end the exporting thread
            result = SpanExportResult.FAILURE
        if result is SpanExportResult.SUCCESS:
            self.exported += len(spans)
        else:
            self.failed += len(spans)
        return result

    def shutdown(self) -> None:
        self._inner.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return bool(self._inner.force_flush(timeout_millis))


class OtelTraces(Traces):
    """`exporter` is any SpanExporter; `batch=False` exports at once (tests)."""

    active = True

    def __init__(self, exporter: Any, *, role: str, service_name: str = "penstock", batch: bool = True) -> None:
        from opentelemetry import trace
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        attributes: dict[str, str] = {"penstock.role": role}
        if not os.environ.get("OTEL_SERVICE_NAME") and "service.name=" not in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", ""):
            attributes["service.name"] = service_name
        self._exporter = _Counting(exporter)
        provider = TracerProvider(resource=Resource.create(attributes))
        provider.add_span_processor((BatchSpanProcessor if batch else SimpleSpanProcessor)(self._exporter))  # type: ignore[arg-type]
        self.provider = provider
        self._trace = trace
        self._tracer = provider.get_tracer(f"penstock.{role}")
        self._propagator = TraceContextTextMapPropagator()

    @property
    def exported(self) -> int:  # type: ignore[override]
        return self._exporter.exported

    @property
    def failed(self) -> int:  # type: ignore[override]
        return self._exporter.failed

    def context(self, traceparent: str, tracestate: str) -> Any:
        if not traceparent:
            return None
        context = self._propagator.extract({"traceparent": traceparent, "tracestate": tracestate})
        parent = self._trace.get_current_span(context).get_span_context()
        return context if parent.is_valid and parent.trace_flags.sampled else None

    def child(
        self,
        context: Any,
        name: str,
        start_ns: int,
        end_ns: int,
        attributes: Attributes | None = None,
        events: Sequence[tuple[str, int]] = (),
        *,
        error: str | None = None,
    ) -> None:
        span = self._tracer.start_span(name, context=context, start_time=start_ns, attributes=dict(attributes or {}))
        for event, at_ns in events:
            span.add_event(event, timestamp=at_ns)
        if error is not None:
            span.set_attribute("error.type", error)
            span.set_status(self._trace.Status(self._trace.StatusCode.ERROR))
        span.end(end_time=max(start_ns, end_ns))

    def flush(self) -> None:
        self.provider.force_flush()

    def shutdown(self) -> None:
        self.provider.shutdown()


def endpoint_of(option: str | None, environ: Mapping[str, str]) -> tuple[bool, str | None]:
    """(active?, explicit endpoint or None where the SDK reads its own variables). Raises ConfigError for a protocol that is not there."""
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or environ.get("OTEL_TRACES_EXPORTER", "").lower() == "none":
        return False, None
    from_env = environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    if not from_env and not option:
        return False, None
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        protocol = environ.get(name, "")
        if protocol:
            if protocol != "http/protobuf":
                raise ConfigError(f"{name}={protocol} is not supported: spans are exported by OTLP over HTTP (http/protobuf).", param=name)
            break
    if from_env or option is None:
        return True, None
    bare = option.rstrip("/")
    return True, bare if bare.count("/") > 2 else bare + "/v1/traces"


def configure(
    role: str, *, endpoint: str | None = None, service_name: str = "penstock", environ: Mapping[str, str] | None = None
) -> Traces:
    """The traces of this process. `endpoint` is --otlp-traces-endpoint; the OTEL_* variables win."""
    active, explicit = endpoint_of(endpoint, os.environ if environ is None else environ)
    if not active:
        return NO_TRACES
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OtelTraces(OTLPSpanExporter(endpoint=explicit), role=role, service_name=service_name)


def gen_ai_attributes(
    kind: str, model: str, params: SamplingParams, *, max_tokens: int | None = None, stream: bool = False
) -> dict[str, Any]:
    """The request's attributes by OpenTelemetry's generative AI conventions (status: development)."""
    out: dict[str, Any] = {
        "gen_ai.operation.name": "chat" if kind == "chat" else "text_completion",
        "gen_ai.provider.name": "penstock",
        "gen_ai.request.model": model,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.choice.count": params.n,
        "gen_ai.request.stream": stream,
        "gen_ai.request.frequency_penalty": params.frequency_penalty,
        "gen_ai.request.presence_penalty": params.presence_penalty,
    }
    limit = max_tokens if max_tokens is not None else params.max_tokens
    if limit is not None:
        out["gen_ai.request.max_tokens"] = limit
    if params.top_k > 0:
        out["gen_ai.request.top_k"] = params.top_k
    if params.seed is not None:
        out["gen_ai.request.seed"] = params.seed
    if params.stop:
        out["gen_ai.request.stop_sequences"] = list(params.stop)
    return out
