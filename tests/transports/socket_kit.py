"""WebSockets in tests: a client's words and ears, and raw frames."""

from __future__ import annotations

import contextlib
import json
import socket as sockets
from typing import Any

from edge_kit import Edge
from websockets.sync.client import ClientConnection, connect

from penstock.transports.socket_protocol import PenstockSocket

CHATS = "/v1/chat/completions"
HI: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
HANDSHAKE = (
    b"GET /v1/stream HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: penstock.v1\r\n%b\r\n"
)


def dial(edge: Edge, **options: Any) -> ClientConnection:
    options = {"subprotocols": ["penstock.v1"], "proxy": None, "max_size": None} | options
    return connect(f"ws://127.0.0.1:{edge.port}/v1/stream", **options)


def say(ws: ClientConnection, **message: Any) -> None:
    ws.send(json.dumps(message))


def hear(ws: ClientConnection) -> dict[str, Any]:
    said = json.loads(ws.recv(timeout=10))
    assert isinstance(said, dict)
    return said


def until_end(ws: ClientConnection, id: str = "a") -> list[dict[str, Any]]:
    """Messages of one stream, to its last one."""
    heard: list[dict[str, Any]] = []
    while not heard or not ("done" in heard[-1] or ("error" in heard[-1] and "op" not in heard[-1])):
        said = hear(ws)
        if said["id"] == id:
            heard.append(said)
    return heard


def sockets_of(edge: Edge) -> list[Any]:
    return [one for one in edge.server._state.connections if isinstance(one, PenstockSocket)]


def raw(edge: Edge, more: bytes = b"") -> tuple[sockets.socket, bytes]:
    conn = sockets.create_connection(("127.0.0.1", edge.port), timeout=10)
    conn.sendall(HANDSHAKE % more + b"hello" * (b"Length" in more))
    return conn, conn.recv(4096)


def frame(opcode: int, data: bytes = b"", fin: bool = True) -> bytes:
    assert len(data) < 126
    return bytes((opcode | (0x80 if fin else 0), 0x80 | len(data), 0, 0, 0, 0)) + data


def rest(conn: sockets.socket) -> bytes:
    out = b""
    with contextlib.suppress(ConnectionError):
        while data := conn.recv(65536):
            out += data
    return out
