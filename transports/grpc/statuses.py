"""How a call fails: HTTP's statuses as those of gRPC.

What it is: `status_of`, and `failure`, the status, message and trailing metadata that tell an API's error; `Failed`, an error that ends a call so.
What it does not know: calls, connections, who found the error.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from penstock.core.protocol.errors import PenstockError, StreamTaken
from penstock.transports import ratelimits
from penstock.transports.request import Header, error_fields, error_headers

STATUS = "penstock-status"
ERROR = "penstock-error-bin"
TOLD = frozenset({b"retry-after", b"x-request-id", b"x-should-retry", *(name.encode() for name in ratelimits.NAMES)})
"""Headers of an error that are told, too."""
LONGEST_MESSAGE = 1024
"""Bytes. Three times as many where all are percent-encoded; clients take 8 KiB of metadata."""
LARGEST_ERROR = 3072
"""Bytes, of which base64 makes a third more."""

_STATUSES = {
    401: Status.UNAUTHENTICATED,
    403: Status.PERMISSION_DENIED,
    404: Status.NOT_FOUND,
    405: Status.UNIMPLEMENTED,
    408: Status.DEADLINE_EXCEEDED,
    409: Status.ALREADY_EXISTS,
    410: Status.FAILED_PRECONDITION,
    413: Status.RESOURCE_EXHAUSTED,
    426: Status.UNIMPLEMENTED,
    429: Status.RESOURCE_EXHAUSTED,
    431: Status.RESOURCE_EXHAUSTED,
    499: Status.CANCELLED,
    501: Status.UNIMPLEMENTED,
    503: Status.UNAVAILABLE,
    504: Status.DEADLINE_EXCEEDED,
    529: Status.UNAVAILABLE,
}


def status_of(status: int, code: object = None) -> Status:
    """`code` is the error's own, where it has one."""
    if code == StreamTaken.default_code:  # it goes on, elsewhere
        return Status.ABORTED
    return _STATUSES.get(status, Status.INVALID_ARGUMENT if 400 <= status < 500 else Status.INTERNAL)


class Failure(NamedTuple):
    """What the trailers say."""

    status: Status
    message: str
    metadata: list[tuple[str, str | bytes]]


class Failed(GRPCError):
    """The call ends with this error. Without our own calls (calls.py), which tell all of it, grpclib tells status and message."""

    def __init__(self, status: int, error: Any, headers: Iterable[Header] = ()) -> None:
        self.failure = failure(status, error, headers)
        super().__init__(self.failure.status, self.failure.message)

    @classmethod
    def by(cls, error: PenstockError) -> Failed:
        return cls(error.status, error_fields(error), error_headers(error))


def failure(status: int, error: Any, headers: Iterable[Header]) -> Failure:
    """Of an API's error object, whichever API's it is, and the status and headers that HTTP would have had (names in lower case)."""
    fields = error if isinstance(error, dict) else {}
    said = next((text for name in ("message", "error", "detail") if isinstance(text := fields.get(name), str)), "The request failed.")
    message = said.encode("utf-8", "replace")[:LONGEST_MESSAGE].decode("utf-8", "ignore")
    metadata: list[tuple[str, str | bytes]] = [(STATUS, str(status))]
    body = msgspec.json.encode(error)
    if len(body) <= LARGEST_ERROR:
        metadata.append((ERROR, body))
    metadata += [(name.decode(), value.decode("latin-1")) for name, value in headers if name in TOLD]
    return Failure(status_of(status, fields.get("code")), message, metadata)
