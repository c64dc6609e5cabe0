"""Forms with a file in them (multipart/form-data), read piece by piece.

What it is: `read_form`, which gives small fields as texts and the bytes of the file to whoever takes them, as they come: a file is never whole in memory.
What it does not know: what the fields mean, where the file's bytes go.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple

from multipart import MultipartError, MultipartSegment, ParserLimitReached, PushMultipartParser, parse_options_header

from penstock.core.protocol.errors import InvalidRequest, RequestTooLarge
from penstock.transports.decoding import UnsupportedEncoding, encodings_of
from penstock.transports.request import Disconnected, Receive, Scope, WrongContentType, context_of

FILE = "file"
"""The name of the one field that is a file."""
FIELD_BYTES = 4096
"""Longest of the others."""
FIELDS = 16
"""Most fields."""
AROUND = 1 << 16
"""Bytes of a body that may be none of the file's."""


class Form(NamedTuple):
    fields: dict[str, str]
    filename: str | None
    """What the client calls the file; None: there was none."""
    size: int
    """Its bytes."""


async def read_form(scope: Scope, receive: Receive, limit: int, take: Callable[[bytes], Awaitable[None]], *, flag: str) -> Form:
    """Read a form to its end; each piece of its file goes to `take`. Raises InvalidRequest (415 for another content type), RequestTooLarge for a file beyond
    `limit` bytes (the option `flag`), UnsupportedEncoding, Disconnected."""
    context = context_of(scope)
    kind, options = parse_options_header(context.headers.get(b"content-type", b"").decode("latin-1"))
    if kind.lower() != "multipart/form-data":
        raise WrongContentType(f"The content type must be multipart/form-data, not {kind[:80]!r}.")
    boundary = options.get("boundary", "")
    if not 1 <= len(boundary) <= 256:
        raise InvalidRequest("The content type must name a boundary of 1 to 256 characters.")
    if encodings_of(value for name, value in scope["headers"] if name == b"content-encoding"):
        raise UnsupportedEncoding("content-encoding: files are taken plain only.", param="content-encoding")
    too_large = RequestTooLarge(f"The file is larger than {limit} bytes ({flag}). Send less.", param=FILE)
    declared = context.headers.get(b"content-length", b"")
    if declared.isdigit() and int(declared) > limit + AROUND:
        raise too_large
    try:
        parser = PushMultipartParser(boundary, max_segment_count=FIELDS)
        return await _Reader(parser, limit, take, too_large).read(receive)
    except ParserLimitReached as error:
        raise InvalidRequest(f"The form cannot be read: {error}. It may have {FIELDS} fields.") from None
    except MultipartError as error:
        raise InvalidRequest(f"The form cannot be read: {error}.") from None


class _Reader:
    def __init__(
        self, parser: PushMultipartParser, limit: int, take: Callable[[bytes], Awaitable[None]], too_large: RequestTooLarge
    ) -> None:
        self._parser = parser
        self._limit = limit
        self._take = take
        self._too_large = too_large
        self._around = 0
        self._fields: dict[str, bytearray] = {}
        self._filename: str | None = None
        self._size = 0
        self._part: MultipartSegment | None = None

    async def read(self, receive: Receive) -> Form:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Disconnected
            before = self._size
            chunk = message.get("body", b"")
            if chunk:
                for event in self._parser.parse(chunk):
                    await self._on(event)
            self._around += len(chunk) - (self._size - before)
            if self._around > AROUND + len(chunk):
                raise InvalidRequest(f"The form has more than {AROUND} bytes beside its file.")
            if not message.get("more_body", False):
                break
        self._parser.close()
        try:
            fields = {name: bytes(value).decode() for name, value in self._fields.items()}
        except UnicodeDecodeError:
            raise InvalidRequest("A field of the form is not UTF-8.") from None
        return Form(fields, self._filename, self._size)

    async def _on(self, event: MultipartSegment | bytes | bytearray | None) -> None:
        if isinstance(event, MultipartSegment):
            self._begin(event)
        elif event is None:
            self._part = None
        elif self._part is not None and self._part.name == FILE:
            self._size += len(event)
            if self._size > self._limit:
                raise self._too_large
            await self._take(bytes(event))
        elif self._part is not None:
            name = self._part.name or ""
            field = self._fields[name]
            field += event
            if len(field) > FIELD_BYTES:
                raise InvalidRequest(f"{name} may have at most {FIELD_BYTES} bytes.", param=name)

    def _begin(self, part: MultipartSegment) -> None:
        name = part.name or ""
        if name in self._fields or (name == FILE and self._filename is not None):
            raise InvalidRequest(f"{name[:100]} is given more than once.", param=name[:100])
        self._part = part
        if name == FILE:
            self._filename = part.filename or ""
        else:
            self._fields[name] = bytearray()
