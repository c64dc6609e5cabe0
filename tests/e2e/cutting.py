"""A client that loses its connection again and again, at any byte, and goes on with the stream that it was reading.

What it is: `Torn`, one stream read over raw sockets: as server-sent events, as lines or over a WebSocket, each connection up to some byte and then left in one of several ways; what came in whole events
is kept, and the next connection goes on behind it. It does what docs/streams.md tells a client to do, and fails where an event comes twice or is left out.
What it does not know: what payloads say, how the server keeps streams.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

_KEY = "dGhlIHNhbXBsZSBub25jZQ=="
WAYS = ("close", "reset", "half", "stay")
"""How a client leaves: FIN, RST, its sending side alone, not at all (another connection takes the stream over)."""
DONE = b"[DONE]"
TAKEN = b'"code":"stream_taken"'
"""What a reader hears whose stream another one resumes."""


class Event(NamedTuple):
    """`number`: None for an error that is no event of the stream."""

    number: int | None
    payload: bytes


class Heard(NamedTuple):
    """What the bytes of a connection hold so far. `status`: 0 until the head is complete."""

    status: int
    events: list[Event]
    over: bool
    body: bytes


def dechunked(raw: bytes) -> tuple[bytes, bool]:
    """What came of a chunked body, and whether that is all of it."""
    body = b""
    while True:
        size, found, rest = raw.partition(b"\r\n")
        if not found:
            return body, False
        length = int(size, 16)
        if not length:
            return body, rest.startswith(b"\r\n")
        body += rest[:length]
        if len(rest) < length + 2:
            return body, False
        raw = rest[length + 2 :]


def of_http(raw: bytes, after: int) -> Heard:
    head, found, rest = raw.partition(b"\r\n\r\n")
    if not found:
        return Heard(0, [], False, b"")
    status, lower = int(head.split(b" ", 2)[1]), head.lower()
    if b"\r\ntransfer-encoding: chunked" not in lower:
        return Heard(status, [], status == 204, rest)
    body, over = dechunked(rest)
    if status != 200:
        return Heard(status, [], False, body)
    lines = b"\r\ncontent-type: application/x-ndjson" in lower
    return Heard(status, list(lines_of(body, after) if lines else sse(body)), over, body)


def lines_of(body: bytes, after: int) -> Iterator[Event]:
    number = after
    for line in body.split(b"\n")[:-1]:
        if line:
            number += 1
            yield Event(number, line)


def sse(body: bytes) -> Iterator[Event]:
    for block in body.split(b"\n\n")[:-1]:
        pairs = (line.partition(b":") for line in block.split(b"\n"))
        fields = {name: value.removeprefix(b" ") for name, _, value in pairs if name}
        if b"id" in fields or (b"data" in fields and fields.get(b"event") != b"ping"):
            yield Event(int(fields[b"id"]) if b"id" in fields else None, fields[b"data"])


def of_socket(raw: bytes) -> Heard:
    """Messages of a server: whole, not masked (RFC 6455)."""
    head, found, rest = raw.partition(b"\r\n\r\n")
    if not found:
        return Heard(0, [], False, b"")
    status = int(head.split(b" ", 2)[1])
    if status != 101:
        return Heard(status, [], False, rest)
    events: list[Event] = []
    while len(rest) >= 2:
        size, start = rest[1], 2
        if size >= 126:
            start += 2 if size == 126 else 8
            size = int.from_bytes(rest[2:start], "big")
        if len(rest) < start + size:
            break
        opcode, text, rest = rest[0] & 15, rest[start : start + size], rest[start + size :]
        if opcode != 1:
            continue
        said = json.loads(text)
        if "seq" in said:
            begin = b'{"id":"a","seq":%d,"data":' % said["seq"]
            assert text.startswith(begin), text
            events.append(Event(said["seq"], text[len(begin) : -1]))
        elif "done" in said:
            return Heard(200, events, True, b"")
        elif "error" in said:
            return Heard(said["status"], events, False, text)
    return Heard(200, events, False, b"")


def message(said: dict[str, Any]) -> bytes:
    """A client's: masked, with a mask that changes nothing."""
    data = json.dumps(said).encode()
    size = bytes((0x80 | len(data),)) if len(data) < 126 else bytes((0xFE,)) + len(data).to_bytes(2, "big")
    return b"\x81" + size + bytes(4) + data


class Torn:
    """`headers` are those of the request that begins the stream. `payloads` is what came, in order; `cuts` how often it was cut."""

    def __init__(
        self, port: int, rng: random.Random, path: str, body: dict[str, Any], headers: dict[str, str], *, begin: str = "http"
    ) -> None:
        self.rid = f"{rng.getrandbits(128):032x}"
        self.payloads: list[bytes] = []
        self.over = False
        self.cuts = self.resumed = 0
        self._port = port
        self._rng = rng
        self._path = path
        self._body = body
        self._headers = headers
        self._begin = begin
        self._begun = False
        self._behind: list[socket.socket] = []

    def close(self) -> None:
        for sock in self._behind:
            sock.close()

    # --- what is asked

    def _question(self) -> tuple[bytes, bytes, Callable[[bytes], Heard]]:
        """What is sent, what more once the server has answered that with a head, and how to understand what comes."""
        after = len(self.payloads)
        if not self._begun and self._begin == "http":
            return self._post(), b"", lambda raw: of_http(raw, 0)
        if not self._begun or self._rng.random() < 0.3:
            shake = "GET /v1/stream HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-version: 13\r\n"
            shake += f"sec-websocket-key: {_KEY}\r\nsec-websocket-protocol: penstock.v1\r\n\r\n"
            said: dict[str, Any] = {"op": "attach", "id": "a", "stream": self.rid, "after": after}
            if not self._begun:
                said = {
                    "op": "start",
                    "id": "a",
                    "path": self._path,
                    "body": self._body,
                    "headers": self._headers | {"x-request-id": self.rid},
                }
            return shake.encode(), message(said), of_socket
        query, header = ("", f"last-event-id: {after}\r\n") if self._rng.random() < 0.5 else (f"?after={after}", "")
        asked = f"GET /v1/streams/{self.rid}{query} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{header}\r\n"
        return asked.encode(), b"", lambda raw: of_http(raw, after)

    def _post(self) -> bytes:
        data = json.dumps(self._body).encode()
        headers = self._headers | {"x-request-id": self.rid, "content-type": "application/json", "content-length": str(len(data))}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return f"POST {self._path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{lines}\r\n".encode() + data

    # --- one connection

    def read(self, limit: int | None, on_the_way: Callable[[int], None] | None = None) -> None:
        """Up to so many bytes (None: to the end), then leave. `on_the_way(port)`, told the connection's own port, before it leaves."""
        sock = socket.socket()
        if self._rng.random() < 0.5:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(4)
        raw = b""
        asked, then, understood = self._question()
        try:
            sock.connect(("127.0.0.1", self._port))
            sock.sendall(asked)
            while limit is None or len(raw) < limit:
                data = sock.recv(1 << 16 if limit is None else limit - len(raw))
                raw += data
                if then and b"\r\n\r\n" in raw:
                    sock.sendall(then)
                    then = b""
                if not data or b'"done":true' in raw or b'"error":' in raw[-4096:]:
                    break
            if on_the_way is not None:
                on_the_way(sock.getsockname()[1])
        except ConnectionError:  # the process at the other end was killed, or is not there yet
            time.sleep(0.01)
        self._leave(sock)
        self._take(understood(raw))

    def _leave(self, sock: socket.socket) -> None:
        way = self._rng.choice(WAYS)
        if way in ("half", "stay"):
            if way == "half":
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_WR)
            self._behind.append(sock)
            return
        if way == "reset":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()

    def _take(self, heard: Heard) -> None:
        """Every event is the next one. A question of an earlier connection, left unread, may reach the server through another process after this one's, and take the stream over: then it is
        taken back."""
        resumed, taken = self._begun, False
        if heard.status in (200, 409) or heard.events:  # 409: it had begun, and the reply to that was lost
            self._begun = True
        elif heard.status == 404 and not self.payloads:  # or it never did: ask again, which cannot run twice
            self._begun = False
        elif heard.status == 0:
            self._begun = True  # perhaps: look before it is asked again
        else:
            assert heard.status == 204, (heard.status, heard.body)
        self.resumed += resumed and bool(heard.events)
        for event in heard.events:
            if TAKEN in event.payload:
                taken = True
                break
            assert event.number is not None, event.payload
            assert event.number == len(self.payloads) + 1, f"event {event.number} came behind {len(self.payloads)}"
            self.payloads.append(event.payload)
        if heard.status in (200, 204) and heard.over and not taken:
            self.over = True

    # --- all of them

    def run(self, cuts: int, size: int, expected: int, on_the_way: Callable[[int], None] | None) -> None:
        """Cut so often, about evenly over a stream of `expected` events of some `size` bytes; then read to the end. `on_the_way` from the middle on."""
        rng = self._rng
        while self.cuts < cuts and not self.over:
            left = max(1, expected - len(self.payloads)) / (cuts - self.cuts)
            limit = rng.randrange(0, 320) if rng.random() < 0.15 else 300 + round(rng.uniform(0, 1.5 * left * size))
            self.read(limit, on_the_way if self.cuts >= cuts // 2 else None)
            self.cuts += 1
        for _ in range(500):
            if self.over:
                return
            self.read(None)
        raise AssertionError(f"nobody answers: {len(self.payloads)} events came")


def normal(payloads: list[bytes]) -> list[bytes]:
    """Without what is the request's own or the clock's, and without the mark of the end, which some carriers leave out."""
    out = []
    for payload in payloads:
        if payload != DONE:
            text = re.sub(rb"[0-9a-f]{24,}[0-9a-z]?", b"ID", payload)
            text = re.sub(rb'"(created|created_at|completed_at|cached_tokens|cache_read_input_tokens)":\d+', rb'"\1":0', text)
            out.append(text)
    return out
