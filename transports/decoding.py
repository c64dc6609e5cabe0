"""Compressed request bodies.

What it is: `decode_body`, which undoes the Content-Encoding of a body (RFC 9110, section 8.4: gzip, deflate, br, zstd, in any order, up to MOST
of them). Each encoding is a stage that takes pieces and gives pieces; what comes out of any stage is bounded, and so is the number of members
that it may be cut into, so that neither memory nor time can be had for a few bytes.
What it does not know: how bodies arrive, what they mean, which thread it runs on.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Generator, Iterable, Iterator

from penstock.core.protocol.errors import InvalidRequest, RequestTooLarge

PIECE = 256 << 10
"""Most bytes that come out of a stage at once, where its library can be told."""
SLICE = 16 << 10
"""Most bytes that go into one at once: what a library leaves over is copied, which must not be done to a whole body each time."""
ZSTD_SLICE = 256
"""zstd's cannot be told. Four bytes can stand for a block of 128 KiB: no more than 8 MiB come out of so many."""
ZSTD_WINDOW = 8 << 20
"""The largest that a zstd content encoding may need (RFC 9659)."""
MOST = 4
"""Encodings on top of each other; nobody has a reason for more than one."""
MEMBERS = 10_000
"""Most gzip members or zstd frames of one body: a new one costs time, and may hold nothing."""

ACCEPTED = b"gzip, deflate, br, zstd"

Pieces = Iterator[bytes]
Step = Callable[[bytes], Generator[bytes, None, bytes | None]]
"""Within a member: yields what comes out of some data, and returns what is left over at the member's end (None: it goes on)."""


class UnsupportedEncoding(InvalidRequest):
    status = 415


class _Bad(ValueError):
    """Not what the header says."""


def _slices(pieces: Iterable[bytes], size: int) -> Pieces:
    for piece in pieces:
        for start in range(0, len(piece), size):
            yield piece[start : start + size]


def _members(pieces: Pieces, size: int, begin: Callable[[], Step]) -> Pieces:
    """What stands in one member after the other. `begin` is called for each."""
    step: Step | None = None
    count = 0
    for data in _slices(pieces, size):
        rest: bytes | None = data
        while rest:
            if step is None:
                count += 1
                if count > MEMBERS:
                    raise _Bad(f"it has more than {MEMBERS} parts")
                step = begin()
            rest = yield from step(rest)
            if rest is not None:
                step = None
    if step is not None:
        raise _Bad("it ends too early")


def _inflating(wbits: int) -> Step:
    inflater = zlib.decompressobj(wbits)

    def step(data: bytes) -> Generator[bytes, None, bytes | None]:
        piece = b""
        while not inflater.eof and (data or len(piece) == PIECE):  # a full piece: there may be more within
            piece = inflater.decompress(data, PIECE)
            data = inflater.unconsumed_tail
            yield piece
        return inflater.unused_data if inflater.eof else None

    return step


def _gzip(pieces: Pieces) -> Pieces:
    """RFC 1952; section 2.2 allows several members."""
    return _members(pieces, SLICE, lambda: _inflating(31))


def _deflate(pieces: Pieces) -> Pieces:
    """zlib's wrapper by the RFC; some clients send the bare stream."""
    head = b""
    for piece in pieces:
        head += piece
        if len(head) >= 2:
            break
    wrapped = len(head) >= 2 and head[0] & 0x0F == 8 and (head[0] << 8 | head[1]) % 31 == 0
    begun = False

    def begin() -> Step:
        nonlocal begun
        if begun:
            raise _Bad("something follows its end")
        begun = True
        return _inflating(15 if wrapped else -15)

    def whole() -> Pieces:
        yield head
        yield from pieces

    return _members(whole(), SLICE, begin)


def _brotli(pieces: Pieces) -> Pieces:
    import brotli

    unpacker = brotli.Decompressor()
    try:
        for data in _slices(pieces, SLICE):
            piece = unpacker.process(data, output_buffer_limit=PIECE)
            yield piece
            while not unpacker.is_finished() and (piece or not unpacker.can_accept_more_data()):  # what it holds back, it does not tell
                piece = unpacker.process(b"", output_buffer_limit=PIECE)
                yield piece
    except brotli.error as error:
        raise _Bad(str(error)) from None
    if not unpacker.is_finished():
        raise _Bad("it ends too early")


def _zstd(pieces: Pieces) -> Pieces:
    """RFC 8878: one frame after the other."""
    import zstandard

    unpacker = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW)

    def begin() -> Step:
        frame = unpacker.decompressobj()

        def step(data: bytes) -> Generator[bytes, None, bytes | None]:
            yield frame.decompress(data)
            return frame.unused_data if frame.eof else None

        return step

    try:
        yield from _members(pieces, ZSTD_SLICE, begin)
    except zstandard.ZstdError as error:
        raise _Bad(str(error)) from None


DECODERS: dict[str, Callable[[Pieces], Pieces]] = {"gzip": _gzip, "x-gzip": _gzip, "deflate": _deflate, "br": _brotli, "zstd": _zstd}


def encodings_of(lines: Iterable[bytes]) -> list[str]:
    """The encodings that Content-Encoding's lines name, in the order in which they were applied. Raises UnsupportedEncoding (415)."""
    parts = [part.strip().lower() for line in lines for part in line.decode("latin-1").split(",")]
    names = [name for name in parts if name and name != "identity"]
    unknown = next((name for name in names if name not in DECODERS), None)
    if unknown is not None or len(names) > MOST:
        what = f"{unknown[:80]!r} is not understood" if unknown is not None else f"{len(names)} encodings on top of each other are too many"
        raise UnsupportedEncoding(
            f"content-encoding: {what}. Send the body plain, or as one of {ACCEPTED.decode()}.", param="content-encoding"
        )
    return names


def packed_limit(limit: int) -> int:
    """How large an encoded body may be, of which `limit` bytes may come out: what cannot be compressed becomes a little larger."""
    return limit + limit // 64 + 1024


def decode_body(body: bytes, names: list[str], limit: int) -> bytes:
    """The body without its encodings, the last applied first. Raises InvalidRequest for data that is not what the header says, RequestTooLarge
    as soon as more than `limit` bytes come out."""
    pieces: Pieces = iter((body,))
    for name in reversed(names):
        pieces = _stage(name, pieces, limit)
    out: list[bytes] = []
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > limit:
            raise _too_large(limit)
        out.append(piece)
    return b"".join(out)


def _stage(name: str, pieces: Pieces, limit: int) -> Pieces:
    most = packed_limit(limit)  # it may be the input of another stage
    size = 0
    try:
        for piece in DECODERS[name](pieces):
            size += len(piece)
            if size > most:
                raise _too_large(limit)
            if piece:
                yield piece
    except (zlib.error, _Bad) as error:
        raise InvalidRequest(f"The request body is not valid {name}: {error}."[:300], param="content-encoding") from None


def _too_large(limit: int) -> RequestTooLarge:
    return RequestTooLarge(f"The request body has more than {limit} bytes when decoded (--max-body-bytes). Send less.")
