"""Compressed request bodies (RFC 9110, section 8.4), and what pretends to be one."""

from __future__ import annotations

import concurrent.futures
import gzip
import random
import socket
import threading
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import brotli
import pytest
import zstandard
from edge_kit import Edge, MakeEdge
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.protocol.errors import InvalidRequest, RequestTooLarge
from penstock.transports import decoding, request
from penstock.transports.decoding import DECODERS, UnsupportedEncoding, encodings_of

PLAIN = b'{"model":"brook","messages":[{"role":"user","content":"hi"}]}'
LIMIT = 1 << 20


def decode_body(body: bytes, header: bytes, limit: int) -> bytes:
    return decoding.decode_body(body, encodings_of([header]), limit)


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


ENCODERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "deflate": zlib.compress,
    "br": lambda data: brotli.compress(data, quality=5),
    "zstd": zstandard.ZstdCompressor(write_checksum=True).compress,
}


@pytest.mark.parametrize("name", sorted(ENCODERS))
@given(data=st.binary(max_size=2000))
def test_every_encoding_comes_back(name: str, data: bytes) -> None:
    assert decode_body(ENCODERS[name](data), name.upper().encode(), LIMIT) == data


@given(data=st.binary(max_size=500), names=st.lists(st.sampled_from([*sorted(ENCODERS), "identity"]), max_size=4))
def test_encodings_on_top_of_each_other(data: bytes, names: list[str]) -> None:
    packed = data
    for name in names:
        packed = packed if name == "identity" else ENCODERS[name](packed)
    assert decode_body(packed, ", ".join(names).encode(), LIMIT) == data


def test_members_frames_and_bare_streams() -> None:
    assert decode_body(gzip.compress(b"a") + gzip.compress(b"b"), b"gzip", LIMIT) == b"ab"
    assert decode_body(raw_deflate(PLAIN), b"deflate", LIMIT) == PLAIN
    pack = zstandard.ZstdCompressor(write_content_size=False).compress
    assert decode_body(pack(b"a") + pack(b"b"), b"zstd", LIMIT) == b"ab"
    assert decode_body(PLAIN, b"identity", LIMIT) == PLAIN
    assert decode_body(PLAIN, b" , ", LIMIT) == PLAIN


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_the_limit_holds_for_what_comes_out(name: str) -> None:
    assert len(decode_body(ENCODERS[name](bytes(LIMIT)), name.encode(), LIMIT)) == LIMIT
    with pytest.raises(RequestTooLarge, match=str(LIMIT)):
        decode_body(ENCODERS[name](bytes(LIMIT + 1)), name.encode(), LIMIT)


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_a_bomb_takes_no_memory(name: str) -> None:
    bomb = ENCODERS[name](bytes(256 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(RequestTooLarge, match=f" {LIMIT} bytes"):  # what --max-body-bytes is
            decode_body(bomb, name.encode(), LIMIT)
        assert tracemalloc.get_traced_memory()[1] < 16 * LIMIT
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", sorted(DECODERS))
@pytest.mark.parametrize("spoil", [lambda d: b"nonsense", lambda d: d[: len(d) // 2], lambda d: d[:-1]], ids=["other", "half", "but one"])
def test_what_is_not_what_the_header_says(name: str, spoil: Callable[[bytes], bytes]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode_body(spoil(ENCODERS[name](PLAIN * 50)), name.encode(), LIMIT)
    assert (caught.value.status, caught.value.param) == (400, "content-encoding")


@pytest.mark.parametrize("name", sorted(DECODERS))
@pytest.mark.parametrize("cut", [1, 2, 3, 4, 5, 8])
def test_a_body_that_ends_too_early_is_none(name: str, cut: int) -> None:
    """Also where all of its bytes have come out and only the checksum is missing."""
    with pytest.raises(InvalidRequest) as caught:
        decode_body(ENCODERS[name](PLAIN)[:-cut], name.encode(), LIMIT)
    assert (caught.value.status, caught.value.param) == (400, "content-encoding")


@pytest.mark.parametrize("name", sorted(DECODERS))
def test_a_body_with_something_behind_it_is_none(name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode_body(ENCODERS[name](PLAIN) + b"something", name.encode(), LIMIT)
    assert (caught.value.status, caught.value.param) == (400, "content-encoding")


@pytest.mark.parametrize("name", sorted(ENCODERS))
@pytest.mark.parametrize("size", [decoding.PIECE - 1, decoding.PIECE, decoding.PIECE + 1, decoding.SLICE, 3 * decoding.PIECE])
def test_sizes_around_the_pieces(name: str, size: int) -> None:
    for data in (bytes(size), random.Random(size).randbytes(size)):
        assert decode_body(ENCODERS[name](data), name.encode(), LIMIT) == data


def test_a_large_member_after_a_small_one() -> None:
    data = random.Random(1).randbytes(3 * decoding.PIECE)
    assert decode_body(gzip.compress(b"a") + gzip.compress(data), b"gzip", LIMIT) == b"a" + data
    pack = ENCODERS["zstd"]
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    assert decode_body(pack(b"a") + skippable + pack(data), b"zstd", LIMIT) == b"a" + data


@pytest.mark.parametrize("name", ["gzip", "zstd"])
def test_endless_members_that_hold_nothing_are_refused(name: str) -> None:
    """A million of them are 20 MB, which another encoding makes 50 KB of: work without a byte of body."""
    nothing = ENCODERS[name](b"")
    assert decode_body(nothing * 1000 + ENCODERS[name](b"x"), name.encode(), LIMIT) == b"x"
    packed = gzip.compress(nothing * (decoding.MEMBERS + 1))
    assert len(packed) < 8000
    with pytest.raises(InvalidRequest, match="parts"):
        decode_body(packed, b"%s, gzip" % name.encode(), LIMIT)


def test_what_comes_out_in_between_is_bounded_too() -> None:
    """Within an encoding whose bytes hold nothing for long: gzip's header may carry a comment of any length."""
    header = b"\x1f\x8b\x08\x10\0\0\0\0\0\x03"  # flag: a comment follows, up to a zero
    with pytest.raises(RequestTooLarge):
        decode_body(gzip.compress(header + b"x" * (64 << 20)), b"gzip, gzip", LIMIT)


def test_a_window_beyond_the_standards_is_refused() -> None:
    """RFC 9659: a content encoding may not need more than 8 MiB to be decoded."""
    parameters = zstandard.ZstdCompressionParameters(window_log=24, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    with pytest.raises(InvalidRequest, match="memory"):
        decode_body(packer.compress(PLAIN) + packer.flush(), b"zstd", LIMIT)


def test_what_cannot_be_compressed_may_be_as_large_as_if_it_came_plain() -> None:
    data = random.Random(2).randbytes(LIMIT)
    for name, encode in ENCODERS.items():
        packed = encode(data)
        assert LIMIT < len(packed) <= decoding.packed_limit(LIMIT)
        assert decode_body(packed, name.encode(), LIMIT) == data


@pytest.mark.parametrize("header", [b"compress", b"gzip, snappy", b"gzip,gzip,gzip,gzip,gzip", b"\xff"])
def test_unknown_encodings(header: bytes) -> None:
    with pytest.raises(UnsupportedEncoding) as caught:
        decode_body(b"x", header, LIMIT)
    assert (caught.value.status, caught.value.param) == (415, "content-encoding")


def test_lines_of_the_header_are_one_list(shared_edge: Edge) -> None:
    packed = zstandard.compress(gzip.compress(PLAIN))
    headers = [("content-type", "application/json"), ("content-encoding", "gzip"), ("content-encoding", "zstd")]
    assert shared_edge.kept.post("/v1/chat/completions", content=packed, headers=headers).status_code == 200


def test_an_unknown_encoding_is_refused_before_the_body_is_sent(shared_edge: Edge) -> None:
    with socket.create_connection(("127.0.0.1", shared_edge.port), timeout=10) as sock:
        sock.sendall(
            b"POST /tokenize HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-encoding: compress\r\ncontent-length: 100\r\n\r\n"
        )
        assert sock.recv(1 << 16).startswith(b"HTTP/1.1 415")


def test_decoding_keeps_nobody_waiting(make_edge: MakeEdge, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one body is decoded, others are served."""
    go = threading.Event()
    whole = request.decode_body

    def held(*arguments: Any) -> bytes:
        assert go.wait(20)
        return whole(*arguments)

    monkeypatch.setattr(request, "decode_body", held)
    edge = make_edge()
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    with concurrent.futures.ThreadPoolExecutor() as pool, edge.http() as http, edge.http() as other:
        answer = pool.submit(http.post, "/v1/chat/completions", content=gzip.compress(PLAIN), headers=headers)
        assert other.post("/v1/chat/completions", content=PLAIN, headers={"content-type": "application/json"}).status_code == 200
        assert not answer.done()
        go.set()
        assert answer.result(20).status_code == 200


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_over_http(make_edge: MakeEdge, name: str) -> None:
    edge = make_edge(max_body_bytes=LIMIT)
    headers = {"content-type": "application/json", "content-encoding": name}
    with edge.http() as http:
        good = http.post("/v1/chat/completions", content=ENCODERS[name](PLAIN), headers=headers)
        assert good.status_code == 200, good.text
        assert good.json()["choices"][0]["message"]["content"] == "Hello world"
        large = http.post("/v1/chat/completions", content=ENCODERS[name](bytes(LIMIT + 1)), headers=headers)
        assert (large.status_code, large.json()["error"]["code"]) == (413, "request_too_large")
        unknown = http.post("/v1/chat/completions", content=PLAIN, headers={**headers, "content-encoding": "compress"})
        assert unknown.status_code == 415
        assert unknown.json()["error"]["param"] == "content-encoding"
        assert "gzip" in unknown.headers["accept-encoding"]
        bad = http.post("/tokenize", content=PLAIN, headers=headers)
        assert (bad.status_code, bad.json()["error"]["param"]) == (400, "content-encoding")
