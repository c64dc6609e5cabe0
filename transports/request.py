"""What every HTTP request at the edge carries with it, and the small replies.

What it is: `RequestContext` (id, start time, span, the connection's handles), `JsonReply` (a finished body as an ASGI application), errors
as OpenAI's body with the right headers, and reading a body within its limit.
What it does not know: routes, the OpenAI schema, the gateway.
"""

from __future__ import annotations

import asyncio
import math
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec

from penstock.core.protocol.errors import InvalidRequest, PenstockError, RequestTooLarge
from penstock.core.protocol.standing import Standing
from penstock.core.protocol.tables import Principal
from penstock.transports.decoding import ACCEPTED, UnsupportedEncoding, decode_body, encodings_of, packed_limit
from penstock.transports.tracing import RequestSpan

if TYPE_CHECKING:
    from penstock.transports.frame import Carrier
    from penstock.transports.retained import Again

Scope: TypeAlias = Any
"""An ASGI scope: a dict, as the server made it. Litestar and uvicorn type it in ways that do not fit each other."""
Receive: TypeAlias = Callable[[], Awaitable[Any]]
Send: TypeAlias = Callable[[Any], Awaitable[None]]
Header = tuple[bytes, bytes]

CONTEXT = "penstock"
"""The key of the RequestContext in scope["state"]."""

MAX_NAMED = 1024
"""Bytes of the header that names ignored fields: some proxies take no more than 4 KiB of headers."""

PRIORITY = "priority"
"""The one known field whose name stands among the ignored ones: where the scheduling policy looks at none."""

_SANE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/+=-]{0,127}")


_FIELD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._:/+=\-\[\]]{0,199}")
"""The name of a field, or its path (`tools[0].function.foo`), if it can go into a header as it is."""


def sane_id(text: str | None) -> str | None:
    """A client's request id, if it can go into logs and headers as it is."""
    return text if text and _SANE_ID.fullmatch(text) else None


HOPELESS = ("rate_limit_exceeded", "budget_exceeded")
"""Codes of refusals that, if nothing says when, stay what they are: a prompt of more tokens than a minute has, a budget that is not renewed."""

ANYBODY = Principal()
"""Where no key is needed."""


class Disconnected(Exception):
    """The client went away before its request was complete."""


class RequestContext:
    """One HTTP request: `rid` (str, its id: the client's x-request-id, or a new one), `headers` (dict[bytes, bytes], names in lower case),
    `principal` (Principal: whose key it came with; `tenant`, a str, is its tenant), `started_ns` (CLOCK_MONOTONIC), `span` (its trace; `span.traceparent`, `span.tracestate`), `status` (what
    metrics count), `abort` (closes the connection at once, or None), `hang_up` (closes it once what was written has left, or after so many
    seconds; or None), `raw_send` (to the server directly, past the outer
    application, which adds headers)."""

    __slots__ = (
        "abort",
        "again",
        "background",
        "body",
        "carrier",
        "hang_up",
        "headers",
        "inner",
        "keys",
        "path",
        "peer",
        "principal",
        "raw_send",
        "rid",
        "span",
        "standing",
        "started_ns",
        "status",
        "summary",
    )

    def __init__(
        self,
        rid: str,
        span: RequestSpan,
        headers: dict[bytes, bytes],
        raw_send: Send,
        abort: Callable[[], None] | None,
        hang_up: Callable[[float], None] | None = None,
    ) -> None:
        self.rid = rid
        self.span = span
        self.headers = headers
        self.raw_send = raw_send
        self.abort = abort
        self.hang_up = hang_up
        self.started_ns = time.monotonic_ns()
        self.status = 0
        """What metrics count; 499 when the client left."""
        self.principal = ANYBODY
        self.standing: Standing | None = None
        """Where its tenant stands with its limits, once text has said so."""
        self.path = ""
        """Of the route."""
        self.body = b""
        """As it was read, until a reply is made of it."""
        self.inner = ""
        """What the reply's ids are made of, if that is not `rid`."""
        self.again: Again | None = None
        """The stream that it resumes."""
        self.peer = ""
        """The address that it came from; of a proxy, if there is one."""
        self.carrier: Carrier | None = None
        """Where the reply goes, if that is no HTTP response."""
        self.background = False
        """Others go first, whatever priority it asks for."""
        self.keys: Sequence[int] = ()
        """Of what text was asked for it (Submit.key)."""
        self.summary: dict[str, Any] = {}
        """Span attributes of the reply."""

    @property
    def tenant(self) -> str:
        """Who shares prefixes with whom (Submit.tenant)."""
        return self.principal.tenant

    @property
    def include_metrics(self) -> bool:
        """Does the reply tell its timings?"""
        return self.headers.get(b"x-include-metrics", b"") in (b"1", b"true")

    def counted(self, standing: Standing) -> None:
        self.standing = standing

    def elapsed_ms(self) -> int:
        return (time.monotonic_ns() - self.started_ns) // 1_000_000


def new_rid() -> str:
    return secrets.token_hex(16)


def context_of(scope: Scope) -> RequestContext:
    """What Penstock knows of the request of this ASGI scope."""
    context = scope["state"][CONTEXT]
    assert isinstance(context, RequestContext)
    return context


class JsonReply:
    """A whole response, as an ASGI application, which a Litestar handler annotated `-> ASGIApp` may return."""

    __slots__ = ("_headers", "body", "status")

    def __init__(self, body: bytes, status: int = 200, headers: Iterable[Header] = (), media_type: bytes = b"application/json") -> None:
        self.body = body
        self.status = status
        what = () if status == 204 else ((b"content-type", media_type), (b"content-length", b"%d" % len(body)))  # RFC 9110, section 8.6
        self._headers = [*what, *headers]

    def to_asgi_response(self, *_: Any, **__: Any) -> JsonReply:
        """Litestar asks this of what an exception handler returns."""
        return self

    def add_headers(self, headers: Iterable[Header]) -> None:
        self._headers += headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status, "headers": self._headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": False})


class NoReply:
    """For a client that has gone."""

    def to_asgi_response(self, *_: Any, **__: Any) -> NoReply:
        return self

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        return None


def error_fields(error: PenstockError) -> dict[str, Any]:
    """OpenAI's error object: of a whole request, and of one choice of several."""
    return {"message": error.message, "type": error.type, "param": error.param, "code": error.code}


def error_body(error: PenstockError) -> bytes:
    """OpenAI's error shape."""
    return msgspec.json.encode({"error": error_fields(error)})


def error_headers(error: PenstockError) -> list[Header]:
    """What HTTP wants beside the body: when to try again, what else would be accepted."""
    headers: list[Header] = []
    if error.status == 429 and error.retry_after_s is None and error.code in HOPELESS:
        headers.append((b"x-should-retry", b"false"))
    elif error.status in (429, 503):
        headers.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after_s or 1))))
    if isinstance(error, UnsupportedEncoding):
        headers.append((b"accept-encoding", ACCEPTED))
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    return headers


def error_reply(error: PenstockError, headers: Iterable[Header] = ()) -> JsonReply:
    """The reply that an error is. A route may as well raise it."""
    return JsonReply(error_body(error), error.status, [*error_headers(error), *headers])


def ignored_header(names: list[str]) -> list[Header]:
    """`x-penstock-ignored-fields`: unknown request fields, so that a typing error does not go unseen; and `x-penstock-warning`, the same for people."""
    if not names:
        return []
    text = _listed(names)
    unknown = [name for name in names if name != PRIORITY]
    warnings = [f"ignored, as nobody here knows them: {_listed(unknown)}"] if unknown else []
    if PRIORITY in names:
        warnings.append("priority has no effect without --scheduling-policy priority")
    return [(b"x-penstock-ignored-fields", text.encode()), (b"x-penstock-warning", "; ".join(warnings).encode())]


def _listed(names: list[str]) -> str:
    text = ", ".join(name if _FIELD.fullmatch(name) else "?" for name in names[:32])
    return text if len(text) <= MAX_NAMED else text[: text.rfind(", ", 0, MAX_NAMED - 3)] + ", ..."


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The request body, decoded; `limit` holds for what it is then. Raises RequestTooLarge (nothing more is kept than that), InvalidRequest,
    or Disconnected.

    A body that is somewhat too large is read to its end and dropped, so that the client gets to read the answer.
    """
    encodings = encodings_of(value for name, value in scope["headers"] if name == b"content-encoding")
    if not encodings:
        return await _read(scope, receive, limit)
    packed = await _read(scope, receive, packed_limit(limit))
    return await asyncio.to_thread(decode_body, packed, encodings, limit)  # a few bytes may be work for long


async def _read(scope: Scope, receive: Receive, limit: int) -> bytes:
    too_large = RequestTooLarge(f"The request body is larger than {limit} bytes (--max-body-bytes). Send less.")
    headers = context_of(scope).headers
    declared = headers.get(b"content-length")
    if declared is not None and declared.isdigit() and int(declared) > limit and (int(declared) > 2 * limit or b"expect" in headers):
        raise too_large
    kept: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        chunk = message.get("body", b"")
        size += len(chunk)
        if size <= limit:
            kept.append(chunk)
        elif size > 2 * limit:
            raise too_large
        else:
            kept.clear()
        if not message.get("more_body", False):
            break
    if size > limit:
        raise too_large
    return kept[0] if len(kept) == 1 else b"".join(kept)


def check_json(headers: dict[bytes, bytes]) -> None:
    """Only JSON bodies are understood; a missing content type is taken as JSON. Raises an InvalidRequest with status 415."""
    kind = headers.get(b"content-type")
    if kind is not None:
        media = kind.split(b";", 1)[0].strip().lower()
        if media and media != b"application/json" and not media.endswith(b"+json"):
            raise WrongContentType(
                f"The content type must be application/json, not {media.decode('latin-1')[:80]!r}. Set the header Content-Type: application/json."
            )


class WrongContentType(InvalidRequest):
    status = 415
