"""What stands around the payloads of a stream.

What it is: `Frame`, the bytes that make payloads a stream of their kind; `Sse` and `TypedSse`, server-sent events, and `NdJson`, lines; `chosen`, what a client's Accept asks for. A frame is asked before the stream begins for what
goes around the text of plain rows, so that such a row is one JSON string and one append.
What it does not know: what a payload says (voice.py), who sends it (stream.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from penstock.transports.request import Header, JsonReply, RequestContext

CARRIER = "carrier"
"""Key in scope["state"] of a request that no HTTP response answers: its Carrier."""


class Frame(Protocol):
    """One kind of stream. It has no state: one object serves all streams of a surface."""

    headers: Sequence[Header]
    """Of the response."""
    keep_alive: bytes
    """What an idle stream sends, so that nobody on the way takes it for dead. Clients skip it."""

    tells_numbers: bool
    """Does `numbered` say the number? Else a client counts what it gets, so that none may be left out."""

    def wrap(self, payload: bytes) -> bytes:
        """A payload as it goes out; b"": not at all."""
        ...

    def numbered(self, number: int, message: bytes) -> bytes:
        """What `wrap` gave, as event `number` of a stream that can be resumed; from 1."""
        ...

    def around(self, before: bytes, after: bytes) -> tuple[bytes, bytes]:
        """(head, tail), so that head + text + tail == wrap(before + text + after) for every JSON string `text`."""
        ...


class Carrier(Protocol):
    """What a reply goes to where that is no HTTP response. Its streams' messages have numbers, and its `frame` goes before that of a surface."""

    @property
    def frame(self) -> Frame: ...

    def begun(self, context: RequestContext) -> None:
        """The request runs."""
        ...

    def broke(self, reply: JsonReply) -> None:
        """Its stream ended with this error, which comes behind what was said."""
        ...

    def cut(self) -> None:
        """Its stream was cut: too much of it is not taken."""
        ...


class Sse:
    """Server-sent events (the HTML standard's `text/event-stream`), one data line each. Payloads hold no line breaks: JSON needs none."""

    headers: Sequence[Header] = (
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),
    )
    keep_alive = b": keep-alive\n\n"
    tells_numbers = True

    def wrap(self, payload: bytes) -> bytes:
        return b"data: " + payload + b"\n\n"

    def numbered(self, number: int, message: bytes) -> bytes:
        return b"id: %d\n" % number + message

    def around(self, before: bytes, after: bytes) -> tuple[bytes, bytes]:
        return b"data: " + before, after + b"\n\n"


class TypedSse(Sse):
    """The same where each event is named after the type that its payload says first: payloads begin with `{"type":"NAME"`."""

    keep_alive = b'event: ping\ndata: {"type":"ping"}\n\n'

    def wrap(self, payload: bytes) -> bytes:
        return self._named(payload) + super().wrap(payload)

    def around(self, before: bytes, after: bytes) -> tuple[bytes, bytes]:
        head, tail = super().around(before, after)
        return self._named(before) + head, tail

    def _named(self, payload: bytes) -> bytes:
        start = len(b'{"type":"')
        return b"event: " + payload[start : payload.index(b'"', start)] + b"\n"


class NdJson:
    """A payload a line, and nothing else: the mark of the end is the end. An event's number is that of its line; empty ones do not count."""

    headers: Sequence[Header] = (
        (b"content-type", b"application/x-ndjson"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),
    )
    keep_alive = b"\n"
    tells_numbers = False

    def wrap(self, payload: bytes) -> bytes:
        return b"" if payload == DONE else payload + b"\n"

    def numbered(self, number: int, message: bytes) -> bytes:
        return message

    def around(self, before: bytes, after: bytes) -> tuple[bytes, bytes]:
        return before, after + b"\n"


DONE = b"[DONE]"
"""What ends a stream of OpenAI's, where that is told."""
NDJSON = b"application/x-ndjson"
_ndjson = NdJson()


def chosen(accept: bytes | None, usual: Frame) -> Frame:
    """The frame for the header Accept: lines where they are asked for by name, and not less than server-sent events."""
    if accept is None or NDJSON not in accept.lower():
        return usual
    wanted = weights(accept)
    return _ndjson if wanted.get(NDJSON, 0.0) > 0 and wanted[NDJSON] >= wanted.get(b"text/event-stream", 0.0) else usual


def weights(accept: bytes) -> dict[bytes, float]:
    """What the header Accept names, in lower case, and its q."""
    wanted: dict[bytes, float] = {}
    for part in accept.lower().split(b","):
        name, *parameters = (piece.strip() for piece in part.split(b";"))
        wanted.setdefault(name, next((_weight(one[2:]) for one in parameters if one.startswith(b"q=")), 1.0))
    return wanted


def _weight(text: bytes) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
