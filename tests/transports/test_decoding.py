"""Compressed request bodies (RFC 9110, section 8.4), and what pretends to be one."""

from __future__ import annotations

import gzip
import tracemalloc
import zlib
from collections.abc import Callable

import brotli
import pytest
import zstandard
from edge_kit import MakeEdge
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.protocol.errors import InvalidRequest, RequestTooLarge
from penstock.transports.decoding import DECODERS, UnsupportedEncoding, decode_body

PLAIN = b'{"model":"brook","messages":[{"role":"user","content":"hi"}]}'
LIMIT = 1 << 20


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


ENCODERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "deflate": zlib.compress,
    "br": brotli.compress,
    "zstd": zstandard.ZstdCompressor().compress,
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
        with pytest.raises(RequestTooLarge):
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


@pytest.mark.parametrize("header", [b"compress", b"gzip, snappy", b"gzip,gzip,gzip,gzip,gzip", b"\xff"])
def test_unknown_encodings(header: bytes) -> None:
    with pytest.raises(UnsupportedEncoding) as caught:
        decode_body(b"x", header, LIMIT)
    assert (caught.value.status, caught.value.param) == (415, "content-encoding")


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
