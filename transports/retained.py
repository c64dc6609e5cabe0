"""Streams that can be resumed, at the edge.

What it is: `Beginning`, what text keeps so that any edge can answer the same stream again, and the routes that resume a stream, and that pause, resume or stop what runs. To resume, the request's body goes through its own route once more: the reply that comes of
it listens to the rows that are there instead of asking for new ones, numbers its events as the first one did, and leaves out those that the client has.
What it does not know: APIs, what a client may ask for (retention.py), rows, what a frame looks like, how text keeps a stream.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec
from litestar import Request, get, post
from litestar.types import ASGIApp

from penstock.core.protocol.errors import InvalidRequest, NotFound, StreamNotFound
from penstock.core.protocol.tables import ADMIN
from penstock.transports.gateway import Gateway
from penstock.transports.listing import QUERY
from penstock.transports.questions import failure_of, places_of
from penstock.transports.request import JsonReply, Receive, RequestContext, Scope, Send, context_of
from penstock.transports.retention import ON_DISCONNECT, RETAIN

_KEPT = (b"accept", b"x-include-metrics", b"anthropic-version", b"anthropic-beta", RETAIN, ON_DISCONNECT)
"""Headers that a reply may depend on."""
_PASSED = ("type", "asgi", "http_version", "scheme", "client", "server", "extensions", "state")
"""What of its scope a request that resumes shares with the one that began."""


CONTROLS = ("pause", "resume", "stop")
RESUME: dict[str, dict[str, Any]] = {
    "after": {
        "type": "integer",
        "minimum": 0,
        "default": 0,
        "description": "The events behind this one alone. The header Last-Event-ID goes before it.",
    }
}
"""Fields of the query."""


class Beginning(msgspec.Struct, frozen=True, array_like=True):
    """Where a stream began: which route answered which body, what of the request's headers counts, and what a voice is told (`created`, in seconds since the Unix epoch;
    `inner`, the id that the API's own ids are made of, "": the request's). `started_ns`: CLOCK_MONOTONIC, one clock for all edges."""

    path: str
    body: bytes
    headers: list[tuple[bytes, bytes]]
    created: int
    inner: str = ""
    started_ns: int = 0


class Again(NamedTuple):
    """What resumes: a stream of these keys, behind its event `after`."""

    beginning: Beginning
    rid: str
    tenant: str
    keys: list[int]
    after: int


_encode = msgspec.msgpack.Encoder().encode
_beginning = msgspec.msgpack.Decoder(Beginning).decode


class _Found(msgspec.Struct):
    """Text's answer to the question "stream"."""

    rid: str
    tenant: str
    keys: list[int]
    context: bytes


def beginning_of(context: RequestContext, created: int) -> bytes:
    """Of the request in hand, for Submit.context."""
    headers = [(name, context.headers[name]) for name in _KEPT if name in context.headers]
    return _encode(Beginning(context.path, context.body, headers, created, context.inner, context.started_ns))


class Resumed:
    """The reply to who resumes a stream: an ASGI application."""

    def __init__(self, app: ASGIApp, again: Again) -> None:
        self._app = app
        self._again = again

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = self._again.beginning
        context = context_of(scope)
        context.again = self._again
        context.rid = self._again.rid
        context.headers = dict(begun.headers)
        context.inner = begun.inner
        headers = [*begun.headers, (b"content-type", b"application/json"), (b"content-length", b"%d" % len(begun.body))]
        body = [{"type": "http.request", "body": begun.body, "more_body": False}]

        async def receive_body() -> Any:
            return body.pop() if body else await receive()

        inner: Scope = {key: value for key, value in scope.items() if key in _PASSED}
        inner |= {
            "method": "POST",
            "path": begun.path,
            "raw_path": begun.path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": headers,
        }
        await self._app(inner, receive_body, send)


def after_of(request: Request[Any, Any, Any]) -> int:
    """The last event that the client has: Last-Event-ID, or `?after=`; 0: none. Raises InvalidRequest."""
    for name, value in (("last-event-id", request.headers.get("last-event-id")), ("after", request.query_params.get("after"))):
        if value:
            if not (value.isascii() and value.isdigit() and len(value) < 19):
                raise InvalidRequest(f"{name} must be the number of an event of this stream, 0 or more.", param=name)
            return int(value)
    return 0


async def find_stream(gateway: Gateway, wanted: str, context: RequestContext, after: int) -> Again:
    """The retained stream of that id, wherever it began. Raises StreamNotFound (to other tenants it does not exist), or what text says of it."""
    for rid, door in places_of(gateway, wanted):
        answer = await door.query("stream", msgspec.json.encode({"rid": rid, "tenant": context.tenant}))
        if answer.status == 200:
            found = msgspec.json.decode(answer.body, type=_Found)
            return Again(_beginning(found.context), found.rid, found.tenant, found.keys, after)
        if answer.status != 404:
            raise failure_of(answer)
    raise StreamNotFound(wanted)


async def control(gateway: Gateway, wanted: str, context: RequestContext, do: str) -> None:
    """Have something done to what runs under an id: "cancel", "stop", "pause", "resume". Raises NotFound."""
    for rid, door in places_of(gateway, wanted):
        answer = await door.query("control", msgspec.json.encode({"rid": rid, "tenant": asker(context), "own": context.tenant, "do": do}))
        if answer.status == 200:
            return
        if answer.status != 404:
            raise failure_of(answer)
    raise NotFound(f"No request {wanted[:200]!r} is running.", param="id")


def asker(context: RequestContext) -> str | None:
    """In whose name; None: an administrator's."""
    return None if context.principal.may(ADMIN) else context.tenant


def stream_routes(gateway: Gateway) -> list[Any]:
    """Handlers that share one gateway."""

    @get("/v1/streams/{stream_id:path}", summary="Resume a retained stream", tags=["generate"], opt={QUERY: RESUME})
    async def resume(request: Request[Any, Any, Any]) -> ASGIApp:
        context = context_of(request.scope)
        wanted = str(request.path_params["stream_id"]).removeprefix("/")
        return Resumed(request.app, await find_stream(gateway, wanted, context, after_of(request)))

    @post(
        "/v1/requests/{request_id:path}",
        summary="Pause, resume or stop a running request: its id, then /pause, /resume or /stop",
        tags=["server"],
        status_code=200,
    )
    async def steer(request: Request[Any, Any, Any]) -> ASGIApp:
        wanted, _, do = str(request.path_params["request_id"]).removeprefix("/").rpartition("/")
        if not wanted or do not in CONTROLS:
            raise NotFound(f"What is to happen to the request? POST /v1/requests/ID/{' or /'.join(CONTROLS)}.", param="id")
        await control(gateway, wanted, context_of(request.scope), do)
        return JsonReply(msgspec.json.encode({"id": wanted, "object": "request", "done": do}))

    return [resume, steer]
