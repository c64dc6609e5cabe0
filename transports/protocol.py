"""uvicorn's HTTP/1.1 protocol with Penstock's limits and error bodies.

What it is: a subclass of uvicorn's httptools protocol that bounds the header block (431), answers malformed HTTP with OpenAI's error shape, and
gives the application `scope["state"]["abort"]`, which closes a connection without waiting for what it has not taken.
What it does not know: the application.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from penstock.core.errors import InvalidRequest, PenstockError
from penstock.transports.request import error_body

HEADERS_TOO_LARGE = "headers_too_large"
"""Key in scope["state"]: the application answers 431."""


class HeadersTooLarge(InvalidRequest):
    status = 431
    default_code = "request_too_large"

    def __init__(self, limit: int) -> None:
        super().__init__(f"The request headers are larger than {limit} bytes (--max-header-bytes). Send fewer or shorter headers.")


def protocol_class(max_header_bytes: int) -> type[HttpToolsProtocol]:
    """The protocol with its limit: uvicorn makes instances itself."""

    class PenstockProtocol(HttpToolsProtocol):
        _head_bytes = 0  # of a header block that is still incomplete
        _in_head = True

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._in_head and self.parser is not None:
                self._head_bytes += len(data)
                if self._head_bytes > max_header_bytes:
                    self._refuse(HeadersTooLarge(max_header_bytes))

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._in_head = True
            self._head_bytes = 0
            self.scope["state"]["abort"] = self._abort

        def _abort(self) -> None:
            sock = self.transport.get_extra_info("socket")
            if sock is not None:
                # Reset instead of an orderly end: the kernel too would keep what this client does not read, for minutes.
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()

        def on_headers_complete(self) -> None:
            self._in_head = False
            size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if size > max_header_bytes:
                self.scope["state"][HEADERS_TOO_LARGE] = max_header_bytes
            super().on_headers_complete()

        def send_400_response(self, msg: str) -> None:
            self._refuse(InvalidRequest("This is not a valid HTTP/1.1 request."))

        def _unsupported_upgrade_warning(self) -> None:
            """An Upgrade header that nobody understands is ignored, as HTTP allows."""

        def _refuse(self, error: PenstockError) -> None:
            if self.transport.is_closing():
                return
            if self.cycle is not None and not self.cycle.response_complete and self.cycle.response_started:
                self.transport.abort()  # an answer is under way: nothing sensible can be said in between
                return
            body = error_body(error)
            reason = {400: b"Bad Request", 431: b"Request Header Fields Too Large"}.get(error.status, b"Error")
            self.transport.write(
                b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s"
                % (error.status, reason, len(body), body)
            )
            self.transport.close()

    return PenstockProtocol


def server_options(max_header_bytes: int) -> dict[str, Any]:
    """uvicorn.Config arguments that every Penstock server uses."""
    return {
        "http": protocol_class(max_header_bytes),
        "ws": "none",
        "lifespan": "off",
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "date_header": True,
        "proxy_headers": False,
        "timeout_keep_alive": 75,
    }
