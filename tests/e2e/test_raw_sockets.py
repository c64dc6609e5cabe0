"""Whatever comes over a socket: a real server answers it or hangs up, and nobody else notices.

Each test lets many wild clients loose at once while a neighbour streams; the neighbour's text is that of a quiet server, and afterwards everything that was taken is given back. At the end the log has no error, no request was
a fault of the server's, and its memory is what it was.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "transports"))  # pytest's importlib mode does not

from socket_kit import HANDSHAKE, frame

# The cache of 64 MB does not hold what all these streams may draw.
FLAGS = (
    "--no-admission-forecast",
    "--receive-timeout-s",
    "1.5",
    "--keep-alive-s",
    "1",
    "--stream-stall-s",
    "2",
    "--max-socket-streams",
    "200",
)
BODY = b'{"prompt":"Once upon a time","max_tokens":4,"temperature":0}'
LONG = b'{"prompt":"Once upon a time","max_tokens":3000,"temperature":0,"ignore_eos":true,"stream":true}'
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
ASK = POST + LENGTH + b"\r\n" + BODY
STREAM = POST + b"Content-Length: %d\r\n\r\n" % len(LONG) + LONG
GET = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"
LAST = b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
MEMORY = 96 << 20


class Neighbour:
    """Streams one answer after the other until it is told that it is enough, at least one; each must be the same, to the byte."""

    def __init__(self, server: Any, whole: str) -> None:
        self._server = server
        self._whole = whole
        self._enough = threading.Event()
        self.wrong: list[str] = []
        self.count = 0
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self.count or not self._enough.is_set():
            text = stream(self._server)
            if text != self._whole:
                self.wrong.append(text)
            self.count += 1

    def __enter__(self) -> Neighbour:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        self._thread.join(60)
        assert not self._thread.is_alive()
        assert self.wrong == []


def stream(server: Any) -> str:
    body = {"prompt": "The river", "max_tokens": 300, "temperature": 0, "ignore_eos": True, "stream": True}
    with server.client.stream("POST", "/v1/completions", json=body) as reply:
        events = [line[6:] for line in reply.iter_lines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])


@pytest.fixture(scope="module")
def quiet(server: Any) -> Iterator[str]:
    """What the neighbour is to hear. Behind the last test: what is left of all of them."""
    whole = stream(server)
    assert whole
    before, known = memory(server), faults(server)
    yield whole
    rest(server)
    assert server.until(lambda: memory(server) < before + MEMORY, 10), f"{before >> 20} MiB became {memory(server) >> 20}"
    assert faults(server) == known
    log = server.log.read_text()
    assert [line for line in log.splitlines() if re.search(r'Traceback|"level": "(error|critical)"', line)] == []


def faults(server: Any) -> list[str]:
    """How often the server said that something was its own fault, or that it was not ready (at its start)."""
    lines = server.client.get("/metrics").text.splitlines()
    return sorted(line for line in lines if re.match(r'http_requests_total\{.*status="5(?!01)', line))


def memory(server: Any) -> int:
    children = server.children()
    return sum(process.memory_info().rss for role in ("edge", "text") for process in children[role])


def rest(server: Any) -> None:
    """Everything that was taken is given back."""

    def idle() -> bool:
        sums = [
            server.metric("penstock_edge_streams"),
            server.metric("penstock_requests"),
            server.metric("penstock_kv_blocks", 'state="used"'),
            server.metric("penstock_edge_connections", 'kind="websocket"'),
        ]
        return not any(sums) and server.metric("penstock_edge_connections", 'kind="http"') <= 2  # the neighbour's

    page = "\n".join(
        line for line in server.client.get("/metrics").text.splitlines() if re.match("penstock_(edge|requests|kv_blocks)", line)
    )
    assert server.until(idle, 20), page


@pytest.fixture(autouse=True)
def neighbour(server: Any, quiet: str) -> Iterator[None]:
    with Neighbour(server, quiet):
        yield
    for conn in _open:
        conn.close()
    _open.clear()
    rest(server)


_open: list[socket.socket] = []
"""What the running test dialled."""


def dial(server: Any) -> socket.socket:
    _open.append(socket.create_connection(("127.0.0.1", server.port), timeout=10))
    return _open[-1]


def heard(conn: socket.socket) -> bytes:
    """All that comes, until the server hangs up."""
    out = b""
    with contextlib.suppress(ConnectionError):
        while data := conn.recv(1 << 16):
            out += data
    return out


def say_all(server: Any, said: dict[str, bytes]) -> dict[str, bytes]:
    """What each of these connections hears, all of which are there at once."""
    conns = {name: dial(server) for name in said}
    for name, data in said.items():
        with contextlib.suppress(ConnectionError):
            conns[name].sendall(data)
    out = {name: heard(conn) for name, conn in conns.items()}
    for conn in conns.values():
        conn.close()
    return out


def statuses(data: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", data)]


def errors_are_ours(data: bytes) -> bool:
    """Is the last reply's body an error with a sentence?"""
    said = json.loads(data.rpartition(b"\r\n\r\n")[2])
    error = said["error"]
    return isinstance(error if isinstance(error, str) else error["message"], str)


# ------------------------------------------------------------------ shapes of requests

FRAMED = {  # how long is the body? Each has a request behind it, which nobody may answer
    "length and chunks": LENGTH + CHUNKED,
    "chunks and length": CHUNKED + LENGTH,
    "identity, then chunked": b"Transfer-Encoding: identity\r\n" + CHUNKED,
    "no coding": b"Transfer-Encoding: xchunked\r\n",
    "a space before the colon": b"Transfer-Encoding : chunked\r\n",
    "a vertical tab": b"Transfer-Encoding: \x0bchunked\r\n",
    "quotes": b'Transfer-Encoding: "chunked"\r\n',
    "a folded coding": b"Transfer-Encoding:\r\n chunked\r\n",
    "behind a bare line feed": b"X: y\nTransfer-Encoding: chunked\r\n",
    "behind a bare carriage return": b"X: y\rTransfer-Encoding: chunked\r\n",
    "chunked and nothing": b"Transfer-Encoding: chunked,\r\n",
    "chunked twice": b"Transfer-Encoding: chunked, chunked\r\n",
    "an empty coding": b"Transfer-Encoding:\r\n" + LENGTH,
    "two lengths": LENGTH + b"Content-Length: 3\r\n",
    "one length twice": LENGTH + LENGTH,
    "a list of lengths": b"Content-Length: 5, 5\r\n",
    "a plus": b"Content-Length: +5\r\n",
    "a minus": b"Content-Length: -5\r\n",
    "hexadecimal": b"Content-Length: 0x5\r\n",
    "a fraction": b"Content-Length: 5.0\r\n",
    "an underscore": b"Content-Length: 1_0\r\n",
    "a space inside": b"Content-Length: 1 0\r\n",
    "no number": b"Content-Length: \r\n",
    "other digits": "Content-Length: \u0665\r\n".encode(),
    "beyond 64 bits": b"Content-Length: 18446744073709551616\r\n",
    "a length with a space before the colon": b"Content-Length : 5\r\n",
    "a folded line": b"X: y\r\n z\r\n" + LENGTH,
    "NUL in a name": b"X\x00: y\r\n" + LENGTH,
    "NUL in a value": b"X: y\x00z\r\n" + LENGTH,
    "a line without a colon": b"X\r\n" + LENGTH,
    "a line without a name": b": y\r\n" + LENGTH,
    "a name with a space": b"X y: z\r\n" + LENGTH,
}
SIZES = {  # chunks, of which the first size is wrong
    "a plus": b"+%x\r\n%b\r\n",
    "0x": b"0x%x\r\n%b\r\n",
    "a minus": b"-%x\r\n%b\r\n",
    "a space before": b" %x\r\n%b\r\n",
    "a space behind": b"%x \r\n%b\r\n",
    "an underscore": b"0_%x\r\n%b\r\n",
    "beyond 64 bits": b"100000000000000%02x\r\n%b\r\n",
    "a line feed alone": b"%x\n%b\r\n",
    "an extension with NUL": b"%x;\x00\r\n%b\r\n",
    "an extension that ends in a line feed alone": b"%x;a\n%b\r\n",
    "no end": b"%x\r\n%b",
    "another end": b"%x\r\n%bXX",
}
WILD = {
    "nothing that is HTTP": b"NONSENSE\r\n\r\n",
    "HTTP/0.9": b"GET /version\r\n\r\n",
    "HTTP/2 without a word": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
    "HTTP/2.0 in letters": GET.replace(b"1.1", b"2.0"),
    "HTTP/1.2": GET.replace(b"1.1", b"1.2"),
    "http in small letters": GET.replace(b"HTTP", b"http"),
    "a method in small letters": GET.replace(b"GET", b"get"),
    "a method without end": b"A" * 100_000,
    "TLS": b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03" + b"a" * 160,
    "CONNECT": b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n" + GET,
    "no slash": GET.replace(b"/version", b"version"),
    "a query alone": GET.replace(b"/version", b"?a"),
    "letters in the path": GET.replace(b"/version", "/versi\u00f6n".encode()),
    "no host in the address": GET.replace(b"/version", b"http:///version"),
    "a port that is none": GET.replace(b"/version", b"http://x:99999/version"),
    "line feeds alone": ASK.replace(b"\r\n", b"\n"),
    "a line feed alone at the end of the head": POST + LENGTH + b"\n" + BODY,
    "a first line that is folded": b"GET /version HTTP/1.1\r\n Host: x\r\n\r\n",
}


def test_a_request_whose_end_can_be_disputed_is_the_last_one(server: Any) -> None:
    said = {name: POST + lines + b"\r\n" + CHUNKS + LAST for name, lines in FRAMED.items()}
    said |= {f"chunks: {name}": POST + CHUNKED + b"\r\n" + shape % (len(BODY), BODY) + b"0\r\n\r\n" + LAST for name, shape in SIZES.items()}
    said |= {
        "forbidden trailers": POST + CHUNKED + b"\r\n%x\r\n%b\r\n0\r\nContent-Length: 5\r\n\r\n" % (len(BODY), BODY) + LAST,
        "chunks in HTTP/1.0": POST.replace(b"1.1", b"1.0") + CHUNKED + b"\r\n" + CHUNKS + LAST,
        **WILD,
    }
    answers = say_all(server, said)
    assert {name: statuses(data) for name, data in answers.items() if statuses(data) != [400]} == {
        "identity, then chunked": [501],  # RFC 9112, section 6.1
        "chunks in HTTP/1.0": [200],
    }
    for name, data in answers.items():
        assert b"\r\nconnection: close\r\n" in data, name
        assert statuses(data) == [200] or errors_are_ours(data), name


def test_what_is_odd_but_right_is_answered_and_so_is_what_follows(server: Any) -> None:
    offers = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
    socket_offer = b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
    said = {
        "a tab before the value": POST + b"Transfer-Encoding:\tchunked\r\n\r\n" + CHUNKS,
        "zeros before the length": POST + b"Content-Length: 000%d\r\n\r\n" % len(BODY) + BODY,
        "extensions": POST + CHUNKED + b'\r\n%x;a=b;c="d"\r\n%b\r\n0;e\r\n\r\n' % (len(BODY), BODY),
        "trailers": POST + CHUNKED + b"\r\n%x\r\n%b\r\n0\r\nX-T: 1\r\n\r\n" % (len(BODY), BODY),
        "a body of GET": GET[:-2] + b"Content-Length: 5\r\n\r\nhello",
        "empty lines before": b"\r\n\r\n" + GET,
        "an offer of HTTP/2": GET[:-2] + offers + b"\r\n",
        "an offer of HTTP/2 with a body": POST + offers + LENGTH + b"\r\n" + BODY,
        "an offer of HTTP/2 with chunks": POST + offers + CHUNKED + b"\r\n" + CHUNKS,
        "an offer of a WebSocket elsewhere": POST + socket_offer + LENGTH + b"\r\n" + BODY,
        "one after the other": ASK + GET + ASK,
        "thousands of small ones": GET * 3000,
    }
    answers = say_all(server, {name: data + LAST for name, data in said.items()})
    wanted = dict.fromkeys(said, 1) | {"one after the other": 3, "thousands of small ones": 3000}
    assert {name: (statuses(data).count(200), len(statuses(data))) for name, data in answers.items()} == {
        name: (count + 1, count + 1) for name, count in wanted.items()
    }


def test_an_offer_of_another_protocol_may_come_in_two_parts(server: Any) -> None:
    with dial(server) as conn:
        conn.sendall(POST + b"Connection: Upgrade, close\r\nUpgrade: h2c\r\n" + LENGTH + b"\r\n")
        time.sleep(0.05)
        conn.sendall(BODY)
        assert statuses(heard(conn)) == [200]


def test_what_is_no_text_is_named(server: Any) -> None:
    def get(path: bytes, *headers: bytes) -> bytes:
        return (
            b"GET " + path + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + b"".join(header + b"\r\n" for header in headers) + b"\r\n"
        )

    def post(body: bytes, *headers: bytes) -> bytes:
        lines = b"".join(header + b"\r\n" for header in headers)
        return POST + b"Connection: close\r\nContent-Length: %d\r\n" % len(body) + lines + b"\r\n" + body

    said: dict[str, tuple[bytes, int]] = {
        "bytes in the path": (get(b"/%ff%fe"), 404),
        "half a pair in the path": (get(b"/%ed%a0%80"), 404),
        "NUL in the path": (get(b"/version%00"), 404),
        "line ends in the path": (get(b"/v1/models/%0d%0ax:y"), 404),
        "half an escape": (get(b"/%zz%1"), 404),
        "up and up": (get(b"/../../version"), 404),
        "bytes in the query": (get(b"/v1/streams/x?after=%ff"), 400),
        "half a pair in the query": (get(b"/v1/files?limit=%ed%a0%80"), 400),
        "a query of thousands": (get(b"/v1/files?" + b"&".join(b"a%d=1" % i for i in range(3000))), 400),
        "bytes in a header": (
            get(b"/version", b"X: \xff\xfe", b"Cookie: \xff=\xff", b"traceparent: \xff", b"tracestate: \xff", b"X-Request-Id: \xff"),
            200,
        ),
        "bytes in a key": (get(b"/v1/models", b"Authorization: Bearer \xff"), 200),
        "a number that is none": (get(b"/v1/streams/x", "Last-Event-Id: \u00b2".encode("latin-1")), 400),
        "bytes in a content type": (POST.replace(b"application/json", b"\xff") + LENGTH + b"Connection: close\r\n\r\n" + BODY, 415),
        "bytes in a coding": (post(BODY, b"Content-Encoding: \xff"), 415),
        "too many codings": (post(BODY, b"Content-Encoding: " + b"gzip, " * 200 + b"gzip"), 415),
        "no gzip": (post(BODY, b"Content-Encoding: gzip"), 400),
        "wild weights": (post(BODY, b"Accept: \xff;q=\xff, application/x-ndjson;q=nan, */*;q=1e999"), 200),
        "no time": (post(BODY, b"x-penstock-retain: nan"), 400),
        "bytes in a body": (post(b'{"prompt":"\xff"}'), 400),
        "half a pair as bytes": (post(b'{"prompt":"\xed\xa0\x80"}'), 400),
        "half a pair as an escape": (post(b'{"prompt":"\\ud800 "}'), 400),
        "NUL for JSON": (post(b"{\x00}"), 400),
        "another encoding": (post('{"prompt":"a"}'.encode("utf-16")), 400),
    }
    answers = say_all(server, {name: data for name, (data, _) in said.items()})
    assert {name: statuses(data) for name, data in answers.items()} == {name: [status] for name, (_, status) in said.items()}
    for name, data in answers.items():
        assert statuses(data) == [200] or errors_are_ours(data), name


def test_floods_of_headers_and_giant_addresses_are_431(server: Any) -> None:
    said = {
        "a long address": b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        "a long value": GET[:-2] + b"X: " + b"y" * 200_000 + b"\r\n\r\n",
        "a long name": GET[:-2] + b"x" * 200_000 + b": y\r\n\r\n",
        "many headers": GET[:-2] + b"".join(b"X%d: y\r\n" % i for i in range(20_000)) + b"\r\n",
        "headers without end, behind a request": GET + GET[:-2] + b"X: y\r\n" * 40_000,
    }
    answers = say_all(server, {f"{name} {i}": data for name, data in said.items() for i in range(4)})
    for name, data in answers.items():  # a reset may have taken the answer along
        assert statuses(data) in ([], [431], [200], [200, 431]), name
    assert any(431 in statuses(data) for data in answers.values())


# ------------------------------------------------------------------ time


def test_who_sends_in_drops_is_let_go(server: Any) -> None:
    """Heads, bodies and chunks, a byte at a time, many at once: none lives much longer than --receive-timeout-s."""
    kinds = {
        "head": (b"", b"GET /version HTTP/1.1\r\nX-Slow: " + b"y" * 1000),
        "body": (POST + b"Content-Length: 9000\r\n\r\n", b"{" * 9000),
    }
    kinds["chunks"] = (POST + CHUNKED + b"\r\n", b"1\r\n{\r\n" * 1000)
    conns = [(name, dial(server), data) for name, (first, data) in kinds.items() for _ in range(30) if (first, data)]
    for name, conn, _ in conns:
        conn.sendall(kinds[name][0])
    at = 0
    deadline = time.monotonic() + 15
    answers: dict[str, list[int]] = {name: [] for name in kinds}
    while conns:
        assert time.monotonic() < deadline, f"{len(conns)} are still there"
        left = []
        for name, conn, data in conns:
            try:
                conn.sendall(data[at : at + 3])
                conn.setblocking(False)
                came = conn.recv(4096)
            except BlockingIOError:
                conn.setblocking(True)
                left.append((name, conn, data))
                continue
            except ConnectionError:
                came = b""
            answers[name] += statuses(came) or [0]
            conn.close()
        conns = left
        at += 3
        time.sleep(0.05)
    assert {name: set(found) <= {408, 0} for name, found in answers.items()} == dict.fromkeys(kinds, True)
    assert all(408 in found for found in answers.values())


# ------------------------------------------------------------------ leaving


def fin(conn: socket.socket) -> None:
    conn.close()


def rst(conn: socket.socket) -> None:
    conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    conn.close()


def half(conn: socket.socket) -> None:
    """And read on, to the end."""
    conn.shutdown(socket.SHUT_WR)
    heard(conn)
    conn.close()


def first_event(conn: socket.socket) -> None:
    while b"data: " not in conn.recv(4096):
        pass


PHASES: dict[str, tuple[bytes, Callable[[socket.socket], object]]] = {
    "before anything": (b"", lambda conn: None),
    "in the head": (POST[:30], lambda conn: None),
    "before the body": (POST + LENGTH + b"\r\n", lambda conn: None),
    "in the body": (ASK[:-9], lambda conn: None),
    "in a chunk": (POST + CHUNKED + b"\r\n" + CHUNKS[:20], lambda conn: None),
    "before the answer": (STREAM, lambda conn: None),
    "in the stream": (STREAM, first_event),
    "behind the answer": (GET, lambda conn: conn.recv(4096)),
    "with more behind it": (STREAM + GET + ASK[:-3], first_event),
}


@pytest.mark.parametrize("leave", [fin, rst, half])
def test_who_leaves_takes_nothing_along(server: Any, leave: Callable[[socket.socket], None]) -> None:
    conns = []
    for data, wait in PHASES.values():
        for _ in range(5):
            conn = dial(server)
            conn.sendall(data)
            conns.append((conn, wait))
    for conn, wait in conns:
        wait(conn)
    for conn, _ in conns:
        leave(conn)


# ------------------------------------------------------------------ WebSockets


def upgrade(server: Any, more: bytes = b"") -> socket.socket:
    conn = dial(server)
    conn.sendall(HANDSHAKE % more)
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += conn.recv(1)
    assert head.startswith(b"HTTP/1.1 101")
    return conn


def start(id: str, body: bytes = LONG) -> bytes:
    data = b'{"op":"start","id":"%b","path":"/v1/completions","body":%b}' % (id.encode(), body)
    return b"\x81\xfe" + struct.pack("!H", len(data)) + bytes(4) + data


def code_of(conn: socket.socket) -> int | None:
    """The code with which the server closes a WebSocket; None: it hung up without."""

    def exactly(size: int) -> bytes:
        out = b""
        while len(out) < size:
            part = conn.recv(size - len(out))
            if not part:
                raise ConnectionError
            out += part
        return out

    with contextlib.suppress(ConnectionError):
        while True:
            opcode, size = exactly(2)
            if size >= 126:
                size = int.from_bytes(exactly(2 if size == 126 else 8), "big")
            data = exactly(size)
            if opcode == 0x88:
                return int.from_bytes(data[:2], "big")
    return None


FRAMES: dict[str, tuple[bytes, int]] = {
    "not masked": (b"\x81\x02{}", 1002),
    "a reserved bit": (b"\xc1" + frame(1, b"{}")[1:], 1002),
    "all reserved bits": (b"\xf1" + frame(1, b"{}")[1:], 1002),
    "an opcode that is none": (frame(3), 1002),
    "a control opcode that is none": (frame(11), 1002),
    "a part of nothing": (frame(0, b"x"), 1002),
    "a message in a message": (frame(1, b"{", fin=False) + frame(1, b"}"), 1002),
    "a ping in parts": (frame(9, b"x", fin=False), 1002),
    "a giant ping": (b"\x89\xfe\xff\xff" + bytes(4) + b"x" * 65535, 1002),
    "a giant close": (b"\x88\xfe\x00\x80" + bytes(4) + b"x" * 128, 1002),
    "a length beyond 63 bits": (b"\x81\xff" + b"\xff" * 8 + bytes(4), 1009),
    "a length of a terabyte": (b"\x81\xff" + (1 << 40).to_bytes(8, "big") + bytes(4), 1009),
    "a close of one byte": (frame(8, b"x"), 1002),
    "a close code that is reserved": (frame(8, (1005).to_bytes(2, "big")), 1002),
    "a close code below all": (frame(8, (3).to_bytes(2, "big")), 1002),
    "a reason that is no text": (frame(8, (1000).to_bytes(2, "big") + b"\xff"), 1007),
    "a text that is none": (frame(1, b"\xff\xfe"), 1007),
    "half a pair": (frame(1, b'"\xed\xa0\x80"'), 1007),
    "text without an object": (frame(1, b"[]"), 1007),
    "bytes": (frame(2, b"x"), 1003),
    "parts for ever": (frame(1, b"", fin=False) + frame(0, b"", fin=False) * 6000, 1008),
    "a close, and then some": (frame(8, (1000).to_bytes(2, "big")) * 500 + frame(1, b"{}") * 500, 1000),
    "HTTP": (GET * 20, 1002),
}


def test_wild_frames_end_their_socket_with_the_right_code(server: Any) -> None:
    conns = {(name, i): upgrade(server) for name in FRAMES for i in range(3)}
    for (name, i), conn in conns.items():
        with contextlib.suppress(ConnectionError):
            conn.sendall((start("a") if i == 2 else b"") + FRAMES[name][0])
    codes: dict[str, set[int | None]] = {}  # None: a reset took it along
    for (name, _), conn in conns.items():
        codes.setdefault(name, set()).add(code_of(conn))
        conn.close()
    assert {name: found - {None} for name, found in codes.items()} == {name: {code} for name, (_, code) in FRAMES.items()}


def test_handshakes_that_are_none(server: Any) -> None:
    good = HANDSHAKE % b""
    said = {
        "no key": (re.sub(rb"Sec-WebSocket-Key: .*?\r\n", b"", good), 400),
        "a key that is none": (re.sub(rb"Key: .*?\r\n", b"Key: x\r\n", good), 400),
        "two keys": (re.sub(rb"(Sec-WebSocket-Key: .*?\r\n)", rb"\1\1", good), 400),
        "another version": (good.replace(b"Version: 13", b"Version: 12"), 400),
        "no version": (re.sub(rb"Sec-WebSocket-Version: 13\r\n", b"", good), 400),
        "another subprotocol": (good.replace(b"penstock.v1", b"other"), 400),
        "a subprotocol of bytes": (good.replace(b"penstock.v1", b"\xff\xfe"), 400),
        "a body": (good[:-2] + b"Content-Length: 5\r\n\r\nhello", 400),
        "HTTP/1.0": (good.replace(b"1.1", b"1.0"), 426),
        "bytes in a header": (good[:-2] + b"X: \xff\r\n\r\n", 101),
        "another path": (good.replace(b"/v1/stream", b"/x/v1/stream"), 404),
    }
    conns = {name: dial(server) for name in said}
    for name, conn in conns.items():
        conn.sendall(said[name][0])
    found = {}
    for name, conn in conns.items():
        found[name] = statuses(conn.recv(65536))
        conn.close()
    assert found == {name: [status] for name, (_, status) in said.items()}


def test_floods_that_nobody_reads_the_answers_of(server: Any) -> None:
    """Pings, pongs, messages that are none of ours, and a thousand streams on one socket, of a client that reads nothing."""
    floods = {
        "pings": frame(9, b"x" * 125) * 20_000,
        "pongs": frame(10, b"x" * 125) * 20_000,
        "unknown": frame(1, b'{"op":"x","id":"a"}') * 20_000,
        "starts": b"".join(start(f"s{i}") for i in range(1000)),
        "the same start": start("a") * 1000,
        "controls of nothing": frame(1, b'{"op":"pause","id":"a"}') * 20_000,
    }
    conns = {name: upgrade(server) for name in floods}

    def send(conn: socket.socket, data: bytes) -> None:
        conn.settimeout(3)
        with contextlib.suppress(OSError):
            conn.sendall(data)

    threads = [threading.Thread(target=send, args=(conns[name], data)) for name, data in floods.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert server.client.get("/health").status_code == 200
    for number, conn in enumerate(conns.values()):
        (rst if number % 2 else fin)(conn)


def test_a_thousand_starts_are_answered_in_their_order(server: Any) -> None:
    """200 may run at once (--max-socket-streams); the others are told so, and all that run come to their end."""
    with upgrade(server) as conn:
        threading.Thread(target=conn.sendall, args=(b"".join(start(f"s{i}", BODY) for i in range(1000)),), daemon=True).start()
        ended, refused = set(), set()
        buffer = b""
        while len(ended) + len(refused) < 1000:
            data = conn.recv(1 << 16)
            assert data
            buffer += data
            for id in re.findall(rb'\{"id":"(s\d+)","done":true\}', buffer):
                ended.add(id)
            for id in re.findall(rb'\{"id":"(s\d+)","op":"start","error"', buffer):
                refused.add(id)
            buffer = buffer[-4096:]
    assert len(ended) >= 200
    assert not ended & refused


@pytest.mark.parametrize("leave", [fin, rst, half])
def test_who_leaves_a_socket_ends_its_streams(server: Any, leave: Callable[[socket.socket], None]) -> None:
    conns = [upgrade(server) for _ in range(12)]
    for number, conn in enumerate(conns):
        conn.sendall(b"".join(start(f"s{i}") for i in range(number % 4)) + (start("t")[:20] if number % 3 else b""))
        if number % 4 and number % 2:
            conn.recv(64)
    for conn in conns:
        leave(conn)
