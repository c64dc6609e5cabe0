"""The edge's HTTP application.

What it is: the outer ASGI application (request ids, keys, header limit, trace context, metrics, last-resort errors) around a Litestar
application with the routes that are always there (health, metrics, version, OpenAPI, and those of server_routes.py) and those of the transports. Every error leaves in
OpenAI's shape, or that of its route's voice, or of the client's. A path is protected unless it is named in PUBLIC: what is added later is protected without anybody thinking of it.
What it does not know: what the transports' routes do, sockets, processes.
"""

from __future__ import annotations

import functools
import logging
import re
import time
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from litestar import Litestar, Request, Router, get
from litestar.connection import ASGIConnection
from litestar.exceptions import HTTPException, MethodNotAllowedException
from litestar.handlers.base import BaseRouteHandler
from litestar.openapi.config import OpenAPIConfig
from litestar.openapi.spec import Server
from litestar.types import ASGIApp

from penstock.core.protocol.errors import (
    EngineUnavailable,
    FinalError,
    Forbidden,
    InvalidRequest,
    NotFound,
    PenstockError,
    Unauthorized,
    tamed,
)
from penstock.core.protocol.tables import INFERENCE, METRICS, Principal
from penstock.transports.blame import failed, ours, refusal
from penstock.transports.cors import Cors
from penstock.transports.counters import RequestCounts
from penstock.transports.elsewhere import instead_of
from penstock.transports.frame import CARRIER
from penstock.transports.gateway import Gateway
from penstock.transports.keyring import KEY_NEEDED, Keyring
from penstock.transports.openapi import SchemaPage
from penstock.transports.paths import Paths
from penstock.transports.protocol import BAD_HEAD, HEADERS, HEADERS_TOO_LARGE, REFUSED, HeadersTooLarge
from penstock.transports.ratelimits import limit_headers
from penstock.transports.request import (
    CONTEXT,
    Disconnected,
    Header,
    JsonReply,
    NoReply,
    Receive,
    RequestContext,
    Scope,
    Send,
    context_of,
    new_rid,
    sane_id,
)
from penstock.transports.server_routes import OPEN, SCOPE, server_routes
from penstock.transports.socket import SOCKETS, Sockets, UpgradeRequired
from penstock.transports.socket_messages import PATH as SOCKET_PATH
from penstock.transports.tracing import NO_TRACING
from penstock.version import __version__

log = logging.getLogger("penstock.edge.http")

PUBLIC = frozenset({"/health", "/health/live", "/health/ready", "/health/decode"})
"""Paths that need no key."""

UNTRACED = PUBLIC | {"/metrics"}
"""Paths that are asked every few seconds and of which a span says nothing."""

_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_PLAIN = b"text/plain; version=0.0.4; charset=utf-8"


class MethodNotAllowed(FinalError):
    status = 405
    type = "invalid_request_error"
    default_code = "method_not_allowed"

    def __init__(self, method: str, methods: list[str]) -> None:
        super().__init__(f"{method} is not allowed here. Use {' or '.join(methods) or 'another method'}.")
        self.headers: list[Header] = [(b"allow", ", ".join(methods).encode())]


def paths_of(app: Litestar) -> Paths:
    """Of its routes, which do not change."""
    paths = app.state.get("paths")
    if not isinstance(paths, Paths):
        paths = app.state["paths"] = Paths(app)
    return paths


class Edge:
    """The outer application."""

    def __init__(self, gateway: Gateway, app: Litestar, keyring: Keyring) -> None:
        self.gateway = gateway
        self.app = app
        self.keyring = keyring
        self._cors = Cors(gateway.config)
        self._root = gateway.config.root_path.rstrip("/")
        self._tracing = gateway.tracing
        self._paths = paths_of(app)
        self._open = self._paths.marked(OPEN)
        served = self._paths.handler(SOCKET_PATH, "GET")
        self.sockets = Sockets(self, gateway, keyring, served=served is not None and SOCKETS in served.opt)
        self._requests = RequestCounts()
        gateway.counters.sources.append(self._requests)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            raise RuntimeError(f"The edge serves HTTP and WebSockets, not {scope['type']}.")
        if self._root:
            scope = below(scope, self._root)
        if scope["type"] == "websocket":
            await self.sockets(scope, receive, send)
            return
        state = scope["state"]
        headers = dict(scope["headers"])
        rid = sane_id(headers.get(b"x-request-id", b"").decode("latin-1")) or new_rid()
        traceparent = headers.get(b"traceparent", b"")
        if not _TRACEPARENT.fullmatch(traceparent):
            traceparent = b""
        tracing = NO_TRACING if scope["path"] in UNTRACED else self._tracing
        span = tracing.begin(traceparent.decode(), headers.get(b"tracestate", b"").decode("latin-1") if traceparent else "")
        context = RequestContext(rid, span, headers, send, state.get("abort"), state.get("hang_up"))
        state[HEADERS] = functools.partial(self.headers, context)
        context.carrier = state.get(CARRIER)
        context.peer = scope["client"][0] if scope.get("client") else ""
        state[CONTEXT] = context

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                context.status = message["status"]
                if scope["method"] == "OPTIONS":  # Litestar's own answer knows of one handler's methods, and not of HEAD
                    allow = ", ".join(self._paths.methods(scope["path"])).encode()
                    message["headers"] = [(k, allow if allow and k.lower() == b"allow" else v) for k, v in message["headers"]]
                message["headers"] = [*message["headers"], *self.headers(context)]
            await send(message)

        # HEAD is GET without the body, which uvicorn leaves out (it looks at its own scope).
        inner: Scope = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        try:
            error = self._refusal(scope, context)
            preflight = self._cors.preflight(headers) if scope["method"] == "OPTIONS" else None
            if preflight is not None and error is None:
                await preflight(scope, receive, send_with_headers)
            elif error is None and scope["method"] == "OPTIONS" and scope["path"] == "*":  # of the server (RFC 9110, section 9.3.7)
                await JsonReply(b"", 204, [(b"allow", ", ".join(self._paths.everywhere()).encode())])(scope, receive, send_with_headers)
            elif error is not None:
                handler = self._paths.handler(scope["path"], inner["method"])
                more = error.headers if isinstance(error, MethodNotAllowed) else CLOSE if error.status != 401 else ()
                await refusal(handler, error, more, self._paths.voice(handler, headers))(scope, receive, send_with_headers)
            else:
                await self.app(inner, receive, send_with_headers)
        except BaseException as raised:  # what no handler of Litestar's sees: SystemExit, a panic, or an exception that came too late
            if ours(raised):
                raise
            reply = failed(inner, raised)
            if context.status:  # there is no other way to say it than to close the connection, which the server does for what is raised
                raise tamed(raised) from None
            await reply(scope, receive, send_with_headers)
        finally:
            context.body = b""  # an idle connection keeps its last request
            self._done(inner.get("path_template") or "other", scope, context)

    def known(self, headers: Mapping[bytes, bytes]) -> bool:
        """See Application."""
        return not self.keyring.locked or self.keyring.find(headers) is not None

    def headers(self, context: RequestContext) -> list[Header]:
        """What every reply has, whoever makes it."""
        own = context.rid.encode()
        found = [(b"x-request-id", own), (b"request-id", own), (b"openai-processing-ms", b"%d" % context.elapsed_ms())]
        if context.standing is not None:
            found += limit_headers(context.standing)
        found += self._cors.headers(context.headers.get(b"origin"))
        if context.span.traceparent:
            found.append((b"traceparent", context.span.traceparent.encode()))
        return found

    def _refusal(self, scope: Scope, context: RequestContext) -> PenstockError | None:
        limit = scope["state"].get(HEADERS_TOO_LARGE)
        if limit is not None:
            return HeadersTooLarge(limit)
        wrong: PenstockError | None = scope["state"].get(BAD_HEAD)
        if wrong is not None:
            return wrong
        for name in (b"authorization", b"x-api-key"):
            if self.keyring.locked and sum(given == name for given, _ in scope["headers"]) > 1:  # a proxy may have looked at the other one
                return Unauthorized(f"The header {name.decode()} is given more than once. Send one key.")
        if self.keyring.locked and not self._free(scope["path"], scope["method"]):
            principal = self.keyring.find(context.headers)
            if principal is None:
                methods = self._paths.methods(scope["path"])
                if methods and scope["method"] not in methods:  # which there are is no secret: OPTIONS tells them
                    return MethodNotAllowed(scope["method"], methods)
                return Unauthorized(KEY_NEEDED)
            context.principal = principal
        return None

    def _free(self, path: str, method: str) -> bool:
        """May anybody ask that, without a key? OPTIONS: browsers ask without credentials."""
        return path in PUBLIC or method == "OPTIONS" or (path in self._open and method in ("GET", "HEAD"))

    def _done(self, handler: str, scope: Scope, context: RequestContext) -> None:
        seconds = (time.monotonic_ns() - context.started_ns) / 1e9
        method, status = scope["method"], context.status or 499
        known = method if method in ("GET", "POST", "OPTIONS", "HEAD", "DELETE", "PUT", "PATCH") else "other"
        self._requests.observe(handler, known, status, seconds)
        context.span.http(known, handler if handler != "other" else "", scope["scheme"], scope["path"])
        if context.principal.key_id and self._tracing.enabled:
            context.summary |= attributes_of(context.principal)
        context.span.end(status, context.summary)


CLOSE = ((b"connection", b"close"),)


def attributes_of(principal: Principal) -> dict[str, str]:
    """What a span says about who asked."""
    named = {"penstock.tenant": principal.tenant, "penstock.key_id": principal.key_id, "penstock.tier": principal.tier}
    return {name: value for name, value in named.items() if value}


async def in_scope(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
    """A Litestar guard: may this key use this route? It is asked once the route is found, however its path was spelt. A route says by
    `opt={"scope": ...}` what it is; without a word it is inference, and None is anybody's who has a key. Raises Forbidden."""
    scope = handler.opt.get(SCOPE, INFERENCE)
    principal = context_of(connection.scope).principal
    if scope is not None and not principal.may(scope):
        raise Forbidden(f"This key is not good for {connection.scope['path'][:200]}: that needs the scope {scope!r}.")


def below(scope: Scope, root: str) -> Scope:
    """The scope as seen below --root-path, whether the proxy passed that path on or cut it off. From here on paths are the routes' own; Litestar
    is not told, as it would cut the first place out that looks like it."""
    path: str = scope["path"]
    return {**scope, "path": path[len(root) :] or "/"} if path == root or path.startswith(root + "/") else scope


# ------------------------------------------------------------------ errors


def _error_response(request: Request[Any, Any, Any], error: Exception) -> Any:
    """Every exception of a route, and Litestar's own, as an error of the route's API; OpenAI's where there is none."""
    handler, paths = request.scope.get("route_handler"), paths_of(request.app)
    headers = context_of(request.scope).headers

    def refused(handler: BaseRouteHandler | None, error: PenstockError, more: Iterable[Header] = ()) -> JsonReply:
        return refusal(handler, error, more, paths.voice(handler, headers))

    if isinstance(error, UpgradeRequired):
        return refused(handler, error, error.headers)
    if isinstance(error, PenstockError):
        return refused(handler, error, CLOSE if error.status == 413 else ())
    if isinstance(error, Disconnected):
        request.scope["state"][CONTEXT].status = request.scope["state"].get(REFUSED, 499)
        return NoReply()
    if isinstance(error, MethodNotAllowedException):
        path = request.scope["path"]
        if instead := instead_of(path):  # its last word is no id
            return refused(paths.handler(path, request.method), NotFound(f"There is nothing at {path[:200]!r}. {instead}"))
        unmeant = {"GET", "HEAD"} if handler is not None else set()  # a route's own word: it is for browsers, and this is none
        methods = [method for method in paths.methods(path) if method not in unmeant]
        if not unmeant or set(methods) - {"OPTIONS"}:
            wrong = MethodNotAllowed(request.method, methods)
            return refused(paths.handler(path, methods[-1] if unmeant else request.method), wrong, wrong.headers)
    if isinstance(error, HTTPException) and error.status_code in (404, 405):
        path = request.scope["path"]
        nothing = NotFound(f"There is nothing at {path[:200]!r}. {instead_of(path) or 'See /schema for what there is.'}")
        return refused(paths.nearest(path), nothing)
    if isinstance(error, HTTPException) and error.status_code < 500:
        return refused(handler, InvalidRequest(error.detail))
    return failed(request.scope, error)


# ------------------------------------------------------------------ routes that are always there


def house_routes(gateway: Gateway) -> list[Any]:
    """Health, metrics, version."""

    def readiness() -> JsonReply:
        ready, reason = gateway.readiness()
        word: dict[str, Any] = {"status": "ready"} if ready else {"status": "not ready", "reason": reason}
        body = msgspec.json.encode({**word, "ages_s": gateway.ages()})
        return JsonReply(body) if ready else JsonReply(body, 503, [(b"retry-after", b"1")])

    @get(["/health", "/health/ready"], summary="Is everything up that answers need?", tags=["health"], opt={SCOPE: None})
    async def health() -> ASGIApp:
        return readiness()

    @get("/health/live", summary="Does this process run its loop?", tags=["health"], opt={SCOPE: None})
    async def live() -> ASGIApp:
        return JsonReply(b'{"status":"live"}')

    @get("/health/decode", summary="Do running requests make progress?", tags=["health"], opt={SCOPE: None})
    async def decode() -> ASGIApp:
        try:
            answer = await gateway.query("health", timeout=2.0)
        except PenstockError as error:
            return JsonReply(msgspec.json.encode({"status": "not ready", "reason": error.message}), 503, [(b"retry-after", b"1")])
        return JsonReply(answer.body, answer.status)

    @get("/version", summary="Penstock's version", tags=["server"], opt={SCOPE: None})
    async def version() -> ASGIApp:
        return JsonReply(msgspec.json.encode({"version": __version__}))

    @get("/metrics", summary="Prometheus text of the whole server", tags=["server"], opt={SCOPE: METRICS})
    async def metrics() -> ASGIApp:
        gateway.flush_stats()  # on the same lane as the query: the answer holds this edge's newest counts
        try:
            answer = await gateway.query("metrics", timeout=5.0)
            return JsonReply(answer.body, answer.status, media_type=_PLAIN)
        except EngineUnavailable:  # better this edge's counts than nothing
            return JsonReply(gateway.counters.text().encode(), media_type=_PLAIN)

    return [health, live, decode, version, metrics]


def make_app(gateway: Gateway, routes: Iterable[Any] = (), keyring: Keyring | None = None) -> Edge:
    """The whole application: `routes` are those of the allowed transports; `keyring` by default has the configuration's keys."""
    keyring = keyring or Keyring(gateway.config)
    app = Litestar(
        route_handlers=[*house_routes(gateway), *server_routes(gateway), *routes],
        exception_handlers={Exception: _error_response, HTTPException: _error_response, PenstockError: _error_response},
        guards=[in_scope] if keyring.scoped else [],
        openapi_config=OpenAPIConfig(
            title="Penstock",
            version=__version__,
            description="An LLM inference server. Errors have OpenAI's shape, but for other APIs' endpoints, which have that of their API.",
            path="/schema",
            openapi_router=Router(path="/schema", route_handlers=[], include_in_schema=False, opt={SCOPE: None}),
            servers=[Server(url=gateway.config.root_path.rstrip("/") or "/")],
            render_plugins=[SchemaPage(kind, config=gateway.config, public=PUBLIC, locked=keyring.locked) for kind in ("json", "html")],
        ),
        logging_config=None,
        request_max_body_size=None,
        debug=False,
        pdb_on_exception=False,
    )
    return Edge(gateway, app, keyring)
