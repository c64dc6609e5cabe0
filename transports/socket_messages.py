"""What is said over a WebSocket.

What it is: `Said`, a client's message, and `understood`, which makes one of its text; the lines that the server says; the names and numbers of the protocol `penstock.v1`.
What it does not know: sockets, streams, who may say what.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from penstock.core.protocol.errors import FinalError, InvalidRequest, PenstockError
from penstock.transports.carried import wrong_path

PATH = "/v1/stream"
PROTOCOL = "penstock.v1"
KEY = "penstock.key."
"""Beginning of the subprotocol that holds a key: a browser's WebSocket can send no header."""

LONGEST_ID = 64
BAD_DATA, BAD_TYPE, NO_KEY, TOO_LATE = 1007, 1003, 4401, 1008
CONTROLS = ("cancel", "pause", "resume", "stop")
OPS = ("start", "attach", "auth", *CONTROLS)
OURS = re.compile(
    r"(accept|authorization|connection|content-.*|cookie|expect|host|keep-alive|origin|proxy-.*|sec-.*|te|trailer|transfer-encoding|upgrade|x-api-key)",
    re.I,
)
"""Headers that a start cannot bring: they are the connection's, or say what the message is."""
_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")

encode = msgspec.json.Encoder().encode


class StreamExistsHere(FinalError):
    status = 409
    type = "invalid_request_error"
    default_code = "id_in_use"


class TooManyHere(FinalError):
    status = 429
    type = "rate_limit_error"
    default_code = "too_many_streams"


class Malformed(Exception):
    """It is no JSON object: there is nobody to tell but the socket itself."""


class Misunderstood(Exception):
    """`id` and `op` as far as they can be read."""

    def __init__(self, id: str | None, op: str | None, error: PenstockError) -> None:
        super().__init__(error.message)
        self.id = id
        self.op = op
        self.error = error


class Said(msgspec.Struct, forbid_unknown_fields=True):
    op: str
    id: str = ""
    path: str = ""
    body: msgspec.Raw = msgspec.Raw()
    headers: dict[str, str] = {}
    stream: str = ""
    after: int = 0
    key: str = ""


class _Loose(msgspec.Struct):
    op: Any = None
    id: Any = None


_said = msgspec.json.Decoder(Said).decode
_loose = msgspec.json.Decoder(_Loose).decode


def understood(text: str | bytes) -> Said:
    """Raises Malformed, or Misunderstood."""
    try:
        said = _said(text)
    except msgspec.ValidationError as wrong:
        try:
            loose = _loose(text)
        except (msgspec.DecodeError, RecursionError):
            raise Malformed from None
        found = {
            name: value if isinstance(value, str) and len(value) <= LONGEST_ID else None
            for name, value in (("id", loose.id), ("op", loose.op))
        }
        raise Misunderstood(found["id"], found["op"], InvalidRequest(f"The message is not understood: {wrong}.")) from None
    except (msgspec.DecodeError, RecursionError):
        raise Malformed from None
    problem = _problem(said)
    if problem is not None:
        raise Misunderstood(said.id if 0 < len(said.id) <= LONGEST_ID else None, said.op[:LONGEST_ID], problem)
    return said


def _problem(said: Said) -> InvalidRequest | None:
    if said.op not in OPS:
        return InvalidRequest(f"op must be one of {', '.join(OPS)}, but is {said.op[:80]!r}.", param="op")
    if said.op == "auth":
        return None
    if not 1 <= len(said.id) <= LONGEST_ID:
        return InvalidRequest(f"id must have 1 to {LONGEST_ID} characters.", param="id")
    if said.op == "start":
        if (wrong := wrong_path(said.path)) is not None:
            return wrong
        if not bytes(said.body):
            return InvalidRequest("body is missing: the JSON that the endpoint takes.", param="body")
        return _problem_of(said.headers)
    if said.op == "attach":
        if not said.stream:
            return InvalidRequest("stream is missing: the id of a stream that is kept.", param="stream")
        if not 0 <= said.after < 1 << 53:
            return InvalidRequest("after must be the seq of a message of this stream, 0 or more.", param="after")
    return None


def _problem_of(headers: dict[str, str]) -> InvalidRequest | None:
    for name, value in headers.items():
        where = f"headers.{name[:80]}"
        if not _TOKEN.fullmatch(name) or OURS.fullmatch(name):
            return InvalidRequest(f"{where} is no header that a message may bring.", param=where)
        if len(value) > 4096 or not (value.isascii() and (value.isprintable() or not value)):
            return InvalidRequest(f"{where} must be at most 4096 printable ASCII characters.", param=where)
    return None


def line(**fields: Any) -> bytes:
    """One message. Fields that are None are left out, but for `id`."""
    return encode({name: value for name, value in fields.items() if value is not None or name == "id"}) + b"\n"
