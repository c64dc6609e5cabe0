"""A request that the edge answers, but not as an HTTP response.

What it is: `Carried`, which has the edge's own application answer a request as if it had come over HTTP, takes the reply apart and gives it, payload by payload, to what carries it: a StreamReply's
payloads as they are made, other event streams taken apart, other bodies whole; `request_scope`, what the application is shown.
What it does not know: what carries payloads and how its messages look (socket_stream.py, grpc/), what payloads say.
"""

from __future__ import annotations

import abc
import asyncio
import logging
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote, unquote

import msgspec
from litestar.types import ASGIApp

from penstock.core.protocol.errors import FinalError, InvalidRequest, PenstockError, tamed
from penstock.transports.blame import ours
from penstock.transports.frame import CARRIER, Frame
from penstock.transports.request import Header, JsonReply, RequestContext, Scope, error_fields

log = logging.getLogger("penstock.edge.carried")

CARRIED = b"application/vnd.penstock.carried"
"""The content type of what a carrier's own Frame made: it goes out as it is."""


class SlowClient(FinalError):
    """A stream whose client takes nothing."""

    status = 499
    type = "cancelled_error"
    default_code = "slow_client"


def wrong_path(path: str) -> InvalidRequest | None:
    """What is wrong with a path that a client named."""
    if path.startswith("/") and path.isascii() and path.isprintable() and " " not in path:
        return None
    return InvalidRequest("path must be that of an endpoint, such as /v1/chat/completions.", param="path")


def request_scope(method: str, path: str, query: str = "", *, headers: Sequence[Header], body: bytes = b"", outer: Scope = None) -> Scope:
    """An ASGI scope. `path` may be percent-encoded; `outer` (scheme, client, server) is that of the connection. With a `body` it is JSON."""
    if body:
        headers = [*headers, (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "client": None,
        "server": None,
        **(outer or {}),
        "path": unquote(path),
        "raw_path": quote(path, safe="/%:._~!$&'()*+,;=@-").encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": list(headers),
        "extensions": {},
        "state": {},
    }


class Carried(abc.ABC):
    """A Carrier (frame.py) of one request. Behind `run`, `complete` says that it was answered in full, and `error`, `status` and `headers` how it failed."""

    def __init__(self, frame: Frame, app: ASGIApp) -> None:
        self.frame = frame
        self.error: Any = None
        """The error object of the API that was asked."""
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        """Of the reply; names in lower case."""
        self.complete = False
        self.context: RequestContext | None = None
        """Once it runs."""
        self._app = app
        self._body: list[Any] = []
        self._gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._greeting: asyncio.Task[None] | None = None
        self._kind = b""
        self._reply = 0
        """The status that it began with."""
        self._parts: list[bytes] = []
        self._number = 0

    @abc.abstractmethod
    async def greet(self, rid: str) -> None:
        """Say first of all that it runs, and under which id."""

    @abc.abstractmethod
    async def ignored(self, names: bytes) -> None:
        """Say which fields of the body nobody knows; `names` is the header."""

    @abc.abstractmethod
    async def write(self, data: bytes) -> None:
        """Send what the frame made, once there is room for it."""

    # --- what the reply tells

    def begun(self, context: RequestContext) -> None:
        self.context = context
        self._greet(context.rid)

    def broke(self, reply: JsonReply) -> None:
        self.status = reply.status
        self.error = error_of(reply.body)

    def cut(self) -> None:
        self.fail(SlowClient("The stream was cut: its messages were not read in time, or fast enough."))

    def fail(self, error: PenstockError) -> None:
        self.status = error.status
        self.error = error_fields(error)

    # --- the request

    async def run(self, scope: Scope, body: bytes) -> None:
        """Have it answered."""
        scope["state"][CARRIER] = self
        self._body = [{"type": "http.request", "body": body, "more_body": False}]
        try:
            await self._app(scope, self._receive, self._send)
        except BaseException as raised:
            if ours(raised):
                raise
            log.error("a request to %s failed", scope["path"], exc_info=tamed(raised))
            self.fail(PenstockError("The server made an error."))

    def leave(self) -> None:
        """Nobody is there any more."""
        if not self._gone.done():
            self._gone.set_result(None)

    @property
    def left(self) -> bool:
        return self._gone.done()

    async def greeted(self) -> None:
        """Return once it is said that it runs, if it does."""
        if self._greeting is not None:
            await self._greeting

    async def _receive(self) -> Any:
        if self._body:
            return self._body.pop()
        await asyncio.shield(self._gone)
        return {"type": "http.disconnect"}

    def _greet(self, rid: str) -> asyncio.Task[None]:
        """Its first message: whatever comes next waits for it."""
        if self._greeting is None:
            self._greeting = asyncio.get_running_loop().create_task(self.greet(rid))
        return self._greeting

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self._reply = message["status"]
            if self.error is None:  # else it is known already how it ended: what is attached to comes all at once
                self.status = self._reply
            self.headers = {name.lower(): value for name, value in message["headers"]}
            self._kind = self.headers.get(b"content-type", b"").split(b";")[0]
            if self._reply < 400:
                await self._greet(self.headers.get(b"x-request-id", b"").decode("latin-1"))
                names = self.headers.get(b"x-penstock-ignored-fields")
                if names is not None:
                    await self.ignored(names)
            return
        data: bytes = message.get("body", b"")
        last = not message.get("more_body", False)
        if self._kind == CARRIED:
            if data:
                await self.write(data)
        elif data:
            self._parts.append(data)
        if self._reply < 400 and self._kind == b"text/event-stream":
            await self._events(last)
        elif last and self._kind != CARRIED:
            await self._whole(b"".join(self._parts))
        self.complete = last

    async def _events(self, last: bool) -> None:
        """Server-sent events that somebody made himself."""
        *events, rest = b"".join(self._parts).split(b"\n\n")
        self._parts = [rest] if rest and not last else []
        payloads = [part[5:].strip() for event in events for part in event.split(b"\n") if part.startswith(b"data:")]
        for payload in payloads:
            self._number += 1
            if data := self.frame.numbered(self._number, self.frame.wrap(payload)):
                await self.write(data)

    async def _whole(self, body: bytes) -> None:
        if self._reply >= 400:
            self.error = error_of(body)
        elif not body:
            return
        elif self._kind == b"application/json" or self._kind.endswith(b"+json"):
            data = msgspec.json.format(body, indent=-1) if b"\n" in body else body
            await self.write(self.frame.numbered(1, self.frame.wrap(data)))
        else:
            self.fail(InvalidRequest("What this endpoint answers is no JSON: ask for it over HTTP.", param="path"))


def error_of(body: bytes) -> Any:
    """The error object in an error's body, whichever API's it is."""
    try:
        said = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return {"message": body[:1000].decode("utf-8", "replace")}
    if isinstance(said, dict) and isinstance(said.get("error"), dict):
        return said["error"]
    return said
