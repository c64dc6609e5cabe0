"""uvicorn's WebSocket protocol with Penstock's limits.

What it is: a subclass of uvicorn's protocol over `websockets` (sans I/O). It writes many messages in one go, bounds what a client can make it hold (pongs, empty fragments), says
1007 to broken UTF-8 without a log full of traces, and leaves it to the application when a socket is closed at the end of the server. The application finds it in
`scope["state"][HANDLE]`.
What it does not know: what messages say, streams, keys.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState
from websockets.frames import Frame
from websockets.protocol import State

from penstock.core.protocol.errors import PenstockError

HANDLE = "socket"
"""Key in scope["state"]."""
MOST_FRAGMENTS = 4096
"""Of one message: they may be empty, and are held until it is complete."""
MOST_PONGS = 1 << 20
"""Bytes that wait for a client while it sends pings."""

_quiet = logging.getLogger("penstock.edge.websocket")
_quiet.setLevel(logging.WARNING)

_WRONG = b'{"error":{"message":"This is not a valid WebSocket handshake.","type":"invalid_request_error","param":null,"code":null}}'
_NO_HANDSHAKE = (
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(_WRONG) + _WRONG
)

_SHORT = [bytes((0x81, size)) for size in range(126)]


def framed(lines: bytes) -> bytes:
    """Each line (behind it a line feed) as a text message, as a server sends it (RFC 6455, section 5.2)."""
    parts: list[bytes] = []
    for line in lines.split(b"\n"):
        size = len(line)
        if size < 126:
            if size:
                parts += (_SHORT[size], line)
        elif size < 1 << 16:
            parts += (b"\x81\x7e", size.to_bytes(2, "big"), line)
        else:
            parts += (b"\x81\x7f", size.to_bytes(8, "big"), line)
    return b"".join(parts)


class PenstockSocket(WebSocketsSansIOProtocol):
    """`going`: told once when the server ends; who sets it closes the socket in good time."""

    def __init__(
        self, config: Config, server_state: ServerState, app_state: dict[str, Any], _loop: asyncio.AbstractEventLoop | None = None
    ) -> None:
        super().__init__(config, server_state, {**app_state, HANDLE: self}, _loop)
        self.logger = _quiet
        self.going: Callable[[], None] | None = None

    async def send(self, message: Any) -> None:
        await super().send(message)
        if message["type"] == "websocket.http.response.body" and not message.get("more_body", False):
            self.handshake_complete = True  # it was refused, which is an end too: uvicorn would call it an error of the application's

    def bound(self, message_bytes: int) -> None:
        """From the next message on; a larger one is a 1009."""
        self.conn.max_message_size = message_bytes

    async def write(self, lines: bytes) -> None:
        """Send each line as a message, once the client has taken enough of what came before. A socket that is closed takes nothing."""
        while not self.put(lines):
            await self.writable.wait()

    def put(self, lines: bytes) -> bool:
        """The same at once; False: the client must take something first."""
        if not self.writable.is_set():
            return False
        if not (self.disconnected or self.close_sent) and self.conn.state is State.OPEN:
            self.transport.write(framed(lines))
        return True

    # --- the end

    def shutdown(self) -> None:
        if self.handshake_complete and not self.close_sent and self.going is not None:
            self.going()
        else:
            self.hang_up(1001, "The server is shutting down.")

    def refuse(self, error: PenstockError) -> None:
        """The server cannot wait any longer."""
        self.hang_up(1001, "The server is shutting down.")

    def hang_up(self, code: int, reason: str) -> None:
        """Close without waiting for anybody."""
        if self.conn.state is State.OPEN and not self.close_sent:
            self.conn.fail(code, reason)
            self.handle_parser_exception()
        else:
            self.transport.close()

    # --- what comes

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self.handshake_initiated:  # the head is none that a handshake may have; what `websockets` says of it waits to be sent
            self.transport.write(b"".join(self.conn.data_to_send()) or _NO_HANDSHAKE)
            self.transport.close()

    def send_receive_event_to_app(self) -> None:
        if self.curr_msg_data_type == "text" and not self.close_sent:
            try:
                b"".join(self.frames).decode()
            except UnicodeDecodeError:
                self.frames = []
                self.hang_up(1007, "A text message must be UTF-8.")
                return
        super().send_receive_event_to_app()

    def handle_cont(self, event: Frame) -> None:
        if len(self.frames) >= MOST_FRAGMENTS:
            self.hang_up(1008, f"A message has at most {MOST_FRAGMENTS} fragments.")
            return
        super().handle_cont(event)

    def handle_ping(self) -> None:
        super().handle_ping()
        if self.transport.get_write_buffer_size() > MOST_PONGS:
            self.transport.abort()
