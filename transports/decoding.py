"""Compressed request bodies.

What it is: `decode_body`, which undoes the Content-Encoding of a body (RFC 9110, section 8.4: gzip, deflate, br, zstd, in any order and number up
to MOST) a bounded piece at a time, so that no body can become larger in memory than the limit that holds for plain ones.
What it does not know: how bodies arrive, what they mean.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterator

from penstock.core.protocol.errors import InvalidRequest, RequestTooLarge

PIECE = 256 << 10
MOST = 4
"""Encodings on top of each other; nobody has a reason for more than one."""


class UnsupportedEncoding(InvalidRequest):
    status = 415


def _inflate(data: bytes, wbits: int) -> Iterator[bytes]:
    """gzip and zlib streams; a gzip body may have several members (RFC 1952, section 2.2)."""
    while data:
        inflater = zlib.decompressobj(wbits)
        while not inflater.eof:
            piece = inflater.decompress(data, PIECE)
            data = inflater.unconsumed_tail
            if not piece and not data and not inflater.eof:
                raise ValueError("it ends too early")
            yield piece
        data = inflater.unused_data if wbits > 15 else b""


def _gzip(data: bytes) -> Iterator[bytes]:
    return _inflate(data, 31)


def _deflate(data: bytes) -> Iterator[bytes]:
    """zlib's wrapper by the RFC; some clients send the bare stream."""
    wrapped = len(data) >= 2 and data[0] & 0x0F == 8 and (data[0] << 8 | data[1]) % 31 == 0
    return _inflate(data, 15 if wrapped else -15)


def _brotli(data: bytes) -> Iterator[bytes]:
    import brotli

    unpacker = brotli.Decompressor()
    piece = unpacker.process(data, output_buffer_limit=PIECE)
    while piece:
        yield piece
        piece = unpacker.process(b"", output_buffer_limit=PIECE)
    if not unpacker.is_finished():
        raise ValueError("it ends too early")


def _zstd(data: bytes) -> Iterator[bytes]:
    import zstandard

    unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(io.BytesIO(data), read_across_frames=True)
    size = 0
    while piece := unpacker.read(PIECE):
        size += len(piece)
        yield piece
    if data and not size and zstandard.frame_content_size(data) != 0:
        raise ValueError("it ends too early")


DECODERS: dict[str, Callable[[bytes], Iterator[bytes]]] = {
    "gzip": _gzip,
    "x-gzip": _gzip,
    "deflate": _deflate,
    "br": _brotli,
    "zstd": _zstd,
}
ACCEPTED = b"gzip, deflate, br, zstd"


def decode_body(body: bytes, encodings: bytes, limit: int) -> bytes:
    """The body without its encodings, the last applied first. Raises UnsupportedEncoding (415), InvalidRequest for data that is not what the
    header says, RequestTooLarge as soon as more than `limit` bytes come out."""
    names = [name for name in (part.strip().lower() for part in encodings.decode("latin-1").split(",")) if name and name != "identity"]
    unknown = next((name for name in names if name not in DECODERS), None)
    if unknown is not None or len(names) > MOST:
        what = f"{unknown[:80]!r} is not understood" if unknown is not None else f"{len(names)} encodings on top of each other are too many"
        raise UnsupportedEncoding(
            f"content-encoding: {what}. Send the body plain, or as one of {ACCEPTED.decode()}.", param="content-encoding"
        )
    for name in reversed(names):
        pieces: list[bytes] = []
        size = 0
        try:
            for piece in DECODERS[name](body):
                size += len(piece)
                if size > limit:
                    raise RequestTooLarge(f"The request body has more than {limit} bytes when decoded (--max-body-bytes). Send less.")
                pieces.append(piece)
        except RequestTooLarge:
            raise
        except Exception as error:  # each library has errors of its own
            raise InvalidRequest(f"The request body is not valid {name}: {error}."[:300], param="content-encoding") from None
        body = b"".join(pieces)
    return body
