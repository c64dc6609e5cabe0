"""When the server sent what it sent.

What it is: for a stream that was asked for with the header `x-penstock-trace-chunks`, a comment before each write that says how long after the request's arrival it left here, so that a client can tell what
happened to it on the way (`penstock doctor stream`); and the reply's header of that name, which says in which version of HTTP the request arrived.
What it does not know: what is written, who reads it.
"""

from __future__ import annotations

import time
from typing import Any

from penstock.transports.frame import Frame, Sse
from penstock.transports.request import Header, RequestContext, Scope, Send

TRACE = b"x-penstock-trace-chunks"


def stamped(context: RequestContext, frame: Frame) -> bool:
    """Are there to be stamps? Lines have no comments, so that there are none in them."""
    return context.headers.get(TRACE) in (b"1", b"true") and isinstance(frame, Sse)


def trace_header(scope: Scope) -> Header:
    return TRACE, b"HTTP/" + scope["http_version"].encode()


def with_stamps(send: Send, context: RequestContext) -> Send:
    """`send` for the body of a stream, each part of which is a write of whole events."""

    async def stamping(message: Any) -> None:
        if message["body"]:
            seconds = (time.monotonic_ns() - context.started_ns) / 1e9
            message["body"] = b": sent %.6f\n\n" % seconds + message["body"]
        await send(message)

    return stamping
