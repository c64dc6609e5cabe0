"""Requests that the server makes of itself.

What it is: `ask`, which has the application answer a POST as if a client had sent it, without a socket: the same routes, checks and errors. Whoever asks waits for
the whole answer; if that is cancelled, so is the request.
What it does not know: why it is asked, what the answer says.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from litestar.types import ASGIApp

from penstock.core.protocol.tables import INFERENCE, Principal
from penstock.transports.carried import request_scope
from penstock.transports.request import CONTEXT, RequestContext, new_rid
from penstock.transports.tracing import NO_TRACING


class Reply(NamedTuple):
    status: int
    headers: dict[bytes, bytes]
    body: bytes
    request_id: str


async def ask(app: ASGIApp, path: str, body: bytes, tenant: str, around: Callable[[RequestContext], AbstractContextManager[None]]) -> Reply:
    """In the background: of the lowest priority. It happens within `around(its context)`."""
    headers = {b"content-type": b"application/json", b"content-length": b"%d" % len(body), b"host": b"inside"}
    start: dict[str, Any] = {"status": 500, "headers": []}
    pieces: list[bytes] = []
    parts = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        if parts:
            return parts.pop()
        return await asyncio.get_running_loop().create_future()  # nobody leaves

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            start.update(message)
        else:
            pieces.append(message.get("body", b""))

    context = RequestContext(new_rid(), NO_TRACING.begin("", ""), headers, send, None)
    context.principal = Principal(tenant=tenant, scopes=frozenset({INFERENCE}))
    context.background = True
    scope = request_scope("POST", path, headers=list(headers.items()))
    scope["state"][CONTEXT] = context
    with around(context):
        await app(scope, receive, send)
    return Reply(start["status"], {name.lower(): value for name, value in start["headers"]}, b"".join(pieces), context.rid)
