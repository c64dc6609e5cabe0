"""The edge's HTTP application.

What it is: the outer ASGI application (request ids, keys, header limit, trace context, metrics, last-resort errors) around a Litestar
application with the routes that are always there (health, metrics, version, OpenAPI) and those of the transports. Every error leaves in
OpenAI's shape. A path is protected unless it is named in PUBLIC: what is added later is protected without anybody thinking of it.
What it does not know: what the transports' routes do, sockets, processes.
"""

from __future__ import annotations

import hmac
import logging
import re
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec
from litestar import Litestar, Request, get
from litestar.exceptions import HTTPException, MethodNotAllowedException
from litestar.openapi.config import OpenAPIConfig
from litestar.types import ASGIApp

from penstock.core.errors import EngineUnavailable, FinalError, InvalidRequest, NotFound, PenstockError, Unauthorized
from penstock.transports.gateway import Gateway
from penstock.transports.openapi import SchemaPage
from penstock.transports.protocol import HEADERS_TOO_LARGE, HeadersTooLarge
from penstock.transports.request import (
    CONTEXT,
    Disconnected,
    JsonReply,
    NoReply,
    Receive,
    RequestContext,
    Scope,
    Send,
    error_reply,
    new_rid,
    sane_id,
)
from penstock.transports.tracing import NO_TRACING
from penstock.version import __version__

log = logging.getLogger("penstock.edge.http")

PUBLIC = frozenset({"/health", "/health/live", "/health/ready", "/health/decode"})
"""Paths that need no key."""

UNTRACED = PUBLIC | {"/metrics"}
"""Paths that are asked every few seconds and of which a span says nothing."""

DURATION_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_PLAIN = b"text/plain; version=0.0.4; charset=utf-8"


class MethodNotAllowed(FinalError):
    status = 405
    type = "invalid_request_error"
    default_code = "method_not_allowed"


class Edge:
    """The outer application."""

    def __init__(self, gateway: Gateway, app: Litestar) -> None:
        self.gateway = gateway
        self.app = app
        self._keys = [key.encode() for key in gateway.config.api_key]
        self._tracing = gateway.tracing
        self._requests = RequestCounts()
        gateway.counters.sources.append(self._requests)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"The edge serves HTTP, not {scope['type']}.")
        state = scope["state"]
        headers = dict(scope["headers"])
        rid = sane_id(headers.get(b"x-request-id", b"").decode("latin-1")) or new_rid()
        traceparent = headers.get(b"traceparent", b"")
        if not _TRACEPARENT.fullmatch(traceparent):
            traceparent = b""
        tracing = NO_TRACING if scope["path"] in UNTRACED else self._tracing
        span = tracing.begin(traceparent.decode(), headers.get(b"tracestate", b"").decode("latin-1") if traceparent else "")
        context = RequestContext(rid, span, headers, send, state.get("abort"))
        state[CONTEXT] = context

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                context.status = message["status"]
                extra = [(b"x-request-id", context.rid.encode()), (b"openai-processing-ms", b"%d" % context.elapsed_ms())]
                if span.traceparent:
                    extra.append((b"traceparent", span.traceparent.encode()))
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        try:
            error = self._refusal(scope, headers)
            if error is not None:
                await error_reply(error, CLOSE if error.status == 431 else ())(scope, receive, send_with_headers)
            else:
                await self.app(scope, receive, send_with_headers)
        finally:
            self._done(scope, context)

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> PenstockError | None:
        limit = scope["state"].get(HEADERS_TOO_LARGE)
        if limit is not None:
            return HeadersTooLarge(limit)
        if self._keys and scope["path"] not in PUBLIC and not self._authorized(headers):
            return Unauthorized("A valid API key is needed: send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'.")
        return None

    def _authorized(self, headers: dict[bytes, bytes]) -> bool:
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        offered = [given.strip()] if scheme.lower() == b"bearer" else []
        if b"x-api-key" in headers:
            offered.append(headers[b"x-api-key"].strip())
        # No early exit: the time taken must not tell which key, or how much of it, was right.
        return sum(hmac.compare_digest(one, key) for one in offered for key in self._keys) > 0

    def _done(self, scope: Scope, context: RequestContext) -> None:
        seconds = (time.monotonic_ns() - context.started_ns) / 1e9
        handler = scope.get("path_template") or "other"
        method = scope["method"] if scope["method"] in ("GET", "POST", "OPTIONS", "HEAD", "DELETE", "PUT", "PATCH") else "other"
        self._requests.observe(handler, method, context.status, seconds)
        context.span.end(context.status, context.summary)


CLOSE = ((b"connection", b"close"),)


class RequestCounts:
    """http_requests_total and http_request_duration_seconds, kept as numbers until somebody reads them."""

    def __init__(self) -> None:
        self._statuses: dict[tuple[str, str, int], int] = {}
        self._durations: dict[tuple[str, str], list[float]] = {}  # counts per bucket, one more above, then the sum
        self.changed = False

    def observe(self, handler: str, method: str, status: int, seconds: float) -> None:
        key = (handler, method, status)
        self._statuses[key] = self._statuses.get(key, 0) + 1
        row = self._durations.get((handler, method))
        if row is None:
            row = self._durations[handler, method] = [0] * (len(DURATION_BUCKETS) + 2)
        row[bisect_left(DURATION_BUCKETS, seconds)] += 1
        row[-1] += seconds
        self.changed = True

    def __call__(self) -> dict[str, float]:
        self.changed = False
        out: dict[str, float] = {}
        for (handler, method, status), count in self._statuses.items():
            out[f'http_requests_total{{handler="{handler}",method="{method}",status="{status}"}}'] = count
        for (handler, method), row in self._durations.items():
            labels = f'handler="{handler}",method="{method}"'
            total = 0.0
            for bound, number in zip((*DURATION_BUCKETS, "+Inf"), row[:-1], strict=True):
                total += number
                out[f'http_request_duration_seconds_bucket{{{labels},le="{bound}"}}'] = total
            out[f"http_request_duration_seconds_sum{{{labels}}}"] = row[-1]
            out[f"http_request_duration_seconds_count{{{labels}}}"] = total
        return out


# ------------------------------------------------------------------ errors


def _error_response(request: Request[Any, Any, Any], error: Exception) -> Any:
    """Every exception of a route, and Litestar's own, as OpenAI's error."""
    if isinstance(error, PenstockError):
        return error_reply(error, CLOSE if error.status == 413 else ())
    if isinstance(error, Disconnected):
        request.scope["state"][CONTEXT].status = 499
        return NoReply()
    if isinstance(error, MethodNotAllowedException):
        methods = _methods_of(request.app, request.scope["path"])
        wrong = MethodNotAllowed(f"{request.method} is not allowed here. Use {' or '.join(methods) or 'another method'}.")
        return error_reply(wrong, [(b"allow", ", ".join(methods).encode())])
    if isinstance(error, HTTPException) and error.status_code == 404:
        return error_reply(NotFound(f"There is nothing at {request.scope['path'][:200]!r}. See /schema for what there is."))
    if isinstance(error, HTTPException) and error.status_code < 500:
        return error_reply(InvalidRequest(error.detail))
    log.error("request %s failed", request.scope["state"][CONTEXT].rid, exc_info=error)
    return error_reply(PenstockError("The server made an error. It is logged with the request id."))


def _methods_of(app: Litestar, path: str) -> list[str]:
    """What may be done at a path that has routes."""
    for route in app.routes:
        pattern = re.sub(r"\\{[^}]*:path\\}", ".+", re.escape(route.path))
        if re.fullmatch(re.sub(r"\\{[^}]*\\}", "[^/]+", pattern), path.rstrip("/") or "/"):
            return sorted(str(m) for m in getattr(route, "methods", []))
    return []


# ------------------------------------------------------------------ routes that are always there


def house_routes(gateway: Gateway) -> list[Any]:
    """Health, metrics, version."""

    def readiness() -> JsonReply:
        ready, reason = gateway.readiness()
        if ready:
            return JsonReply(b'{"status":"ready"}')
        return JsonReply(msgspec.json.encode({"status": "not ready", "reason": reason}), 503, [(b"retry-after", b"1")])

    @get(["/health", "/health/ready"], summary="Can requests be accepted now?", tags=["health"])
    async def health() -> ASGIApp:
        return readiness()

    @get("/health/live", summary="Does this process run its loop?", tags=["health"])
    async def live() -> ASGIApp:
        return JsonReply(b'{"status":"live"}')

    @get("/health/decode", summary="Do running requests make progress?", tags=["health"])
    async def decode() -> ASGIApp:
        try:
            answer = await gateway.query("health", timeout=2.0)
        except PenstockError as error:
            return JsonReply(msgspec.json.encode({"status": "not ready", "reason": error.message}), 503, [(b"retry-after", b"1")])
        return JsonReply(answer.body, answer.status)

    @get("/version", summary="Penstock's version", tags=["server"])
    async def version() -> ASGIApp:
        return JsonReply(msgspec.json.encode({"version": __version__}))

    @get("/metrics", summary="Prometheus text of the whole server", tags=["server"])
    async def metrics() -> ASGIApp:
        gateway.flush_stats()  # on the same lane as the query: the answer holds this edge's newest counts
        try:
            answer = await gateway.query("metrics", timeout=5.0)
            return JsonReply(answer.body, answer.status, media_type=_PLAIN)
        except EngineUnavailable:  # better this edge's counts than nothing
            return JsonReply(gateway.counters.text().encode(), media_type=_PLAIN)

    return [health, live, decode, version, metrics]


def make_app(gateway: Gateway, factories: Iterable[Callable[[Gateway], Sequence[Any]]] = ()) -> Edge:
    """The whole application: `factories` are TransportSpec.factory of the allowed transports."""
    routes: list[Any] = house_routes(gateway)
    for factory in factories:
        routes += factory(gateway)
    app = Litestar(
        route_handlers=routes,
        exception_handlers={Exception: _error_response, HTTPException: _error_response, PenstockError: _error_response},
        openapi_config=OpenAPIConfig(
            title="Penstock",
            version=__version__,
            description="An LLM inference server. Errors have OpenAI's shape.",
            path="/schema",
            render_plugins=[SchemaPage("json"), SchemaPage("html")],
        ),
        logging_config=None,
        request_max_body_size=None,
        debug=False,
        pdb_on_exception=False,
    )
    return Edge(gateway, app)
