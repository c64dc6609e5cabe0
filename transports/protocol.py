"""uvicorn's HTTP/1.1 protocol with Penstock's limits and error bodies.

What it is: a subclass of uvicorn's httptools protocol that bounds the header block (431), finds heads that are none of HTTP/1.1, bounds the time that a client takes to send a request
(408), answers malformed HTTP with OpenAI's error shape, and gives the application `scope["state"]["abort"]`, which closes a connection without waiting for what it has not taken, and
`scope["state"]["hang_up"]`, which waits so many seconds for that.
What it does not know: the application.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import socket
import struct
import time
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from penstock.core.protocol.errors import InvalidRequest, PenstockError
from penstock.transports.request import error_body, error_headers
from penstock.transports.socket_messages import PATH
from penstock.transports.socket_protocol import PenstockSocket

log = logging.getLogger("penstock.edge.protocol")

SOCKET_PATH = PATH.encode()

HEADERS_TOO_LARGE = "headers_too_large"
"""Key in scope["state"]: the application answers 431."""
BAD_HEAD = "bad_head"
"""Key in scope["state"]: the application answers this error, and closes."""
REFUSED = "refused"
"""Key in scope["state"]: the status that a request got here while it was still being sent; the application finds its client disconnected."""
HEADERS = "headers"
"""Key in scope["state"]: the application's function for the headers that it gives to every reply, and that a request gets which is refused here after that."""
UNSENT_BYTES = 64 << 10
"""At most so much that the client's side has no room for waits in the kernel: it would take 4 MiB, and a client that reads nothing would be noticed that much later."""
PIECE = 16 << 10
"""Bytes that are parsed in one go; a head is found to be too large within so many bytes."""
MOST_WAITING = 16
"""Requests that are read while an earlier one of their connection is answered."""
LOG_PERIOD_S = 10.0
SLOWEST_BODY = 1024
"""Bytes per second: a body that comes in drops is late however often they fall."""


class HeadersTooLarge(InvalidRequest):
    status = 431
    default_code = "request_too_large"

    def __init__(self, limit: int) -> None:
        super().__init__(f"The request headers are larger than {limit} bytes (--max-header-bytes). Send fewer or shorter headers.")


class TooSlow(InvalidRequest):
    status = 408
    default_code = "request_timeout"

    def __init__(self, what: str, limit_s: float) -> None:
        super().__init__(f"The {what} did not arrive within {limit_s:g} s (--receive-timeout-s). Send it faster, or send less.")


class UnknownCoding(InvalidRequest):
    status = 501

    def __init__(self, given: str) -> None:
        super().__init__(
            f"transfer-encoding: {given[:80]!r} is not understood: 'chunked' alone is. Say how the body is compressed in content-encoding.",
            param="transfer-encoding",
        )


def wrong_head(headers: Sequence[tuple[bytes, bytes]], version: str) -> PenstockError | None:
    """What is wrong with the head of a request that the parser takes (RFC 9112, sections 2.3, 3.2 and 6.1)."""
    if version == "1.0":
        return None
    if version != "1.1":
        return InvalidRequest(f"HTTP/{version} is not spoken here. Send HTTP/1.1.")
    hosts = sum(name == b"host" for name, _ in headers)
    if hosts != 1:
        return InvalidRequest(f"An HTTP/1.1 request has one Host header, but this has {hosts}. Send one.", param="host")
    codings = [coding.strip().lower() for name, value in headers if name == b"transfer-encoding" for coding in value.split(b",")]
    if any(codings) and codings != [b"chunked"]:
        return UnknownCoding(b", ".join(codings).decode("latin-1"))
    return None


def until_closed(cycle: RequestResponseCycle) -> None:
    """Have it answer a client of HTTP/1.0, which knows no chunks (RFC 9112, section 6.1): a body whose length is not told ends with the connection."""
    send = cycle.send
    told = False

    async def unchunked(message: Any) -> None:
        nonlocal told
        if message["type"] == "http.response.start":
            told = any(name.lower() == b"content-length" for name, _ in message["headers"])
            cycle.chunked_encoding = None if told else False
        elif not told:
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    cycle.send = unchunked  # type: ignore[method-assign]


class Garbled:
    """Counts connections that brought no HTTP: one line in the log for all of some time, as anybody may send them by the thousand."""

    def __init__(self) -> None:
        self._count = 0
        self._told = -math.inf

    def __call__(self) -> None:
        self._count += 1
        now = time.monotonic()
        if now - self._told >= LOG_PERIOD_S:
            log.warning("a connection brought what is no HTTP/1.1 request (%d since the last such line)", self._count)
            self._count, self._told = 0, now


def protocol_class(max_header_bytes: int, receive_timeout_s: float) -> type[HttpToolsProtocol]:
    """The protocol with its limits: uvicorn makes instances itself.

    A client has `receive_timeout_s` to send a head, from its first byte (or from the connection's beginning), and as long for each pause in a
    body, which must come at SLOWEST_BODY or faster. Idle connections between requests are uvicorn's business (timeout_keep_alive).
    """

    piece = min(PIECE, max_header_bytes)
    garbled = Garbled()

    class PenstockProtocol(HttpToolsProtocol):
        _head_bytes = 0  # of a header block that is still incomplete
        _in_head = True
        _in_message = False  # between a request's first byte and its last
        _deadline: float | None = None
        _linger: asyncio.TimerHandle | None = None
        _running: RequestResponseCycle | None = None  # the request that is being answered, or was last; others may wait behind it
        _upgraded = False
        _ignored = False  # the head that was read asks for a protocol that is not spoken here
        _timer: asyncio.TimerHandle | None = None  # one a connection, looking at the deadline when it fires

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            sock = transport.get_extra_info("socket")
            if sock is not None:
                with contextlib.suppress(OSError):  # it is none of TCP
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
            self._expect()

        def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
            self._running = cycle
            super()._start_asgi_task(cycle, app)

        def _all_left(self) -> None:
            """uvicorn tells only the request that came last, but others may be running and waiting before it."""
            for cycle in (self._running, *(waiting for waiting, _ in self.pipeline)):
                if cycle is not None and not cycle.response_complete:
                    cycle.disconnected = True
                    cycle.message_event.set()
            self.pipeline.clear()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._all_left()
            self._deadline = None
            if self._timer is not None:
                self._timer.cancel()
            if self._linger is not None:
                self._linger.cancel()

        def eof_received(self) -> None:
            """Who sends no more has left, as from here a half-closed connection cannot be told from a closed one. The loop closes it once all that was written
            has left, which whoever waits for the answer must not wait for."""
            if self._answering():
                self._all_left()
                self.flow.resume_writing()
                self._hang_up(receive_timeout_s)

        def data_received(self, data: bytes) -> None:
            self._unset_keepalive_if_required()
            for at in range(0, len(data), piece):
                if not self._feed(data[at : at + piece] if len(data) > piece else data):
                    return
            if self._deadline is None and not self._in_message and not self._answering() and not self.transport.is_closing():
                self._expect()  # something that is no request yet (empty lines): it stopped uvicorn's idle timer

        def _feed(self, data: bytes) -> bool:
            """Have it parsed; False: nothing more of this connection is."""
            begun = self._in_head and self._in_message
            while True:
                try:
                    self.parser.feed_data(data)
                    break
                except httptools.HttpParserUpgrade as upgrade:
                    if self._should_upgrade():
                        self.handle_websocket_upgrade()
                        return False
                    if not self._ignored:
                        break
                    self._ignored = False
                    data = self._head_without_upgrade() + data[upgrade.args[0] :]
                    self.parser = httptools.HttpRequestParser(self)
                    self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
                except httptools.HttpParserError:
                    garbled()
                    self.send_400_response("")
                    return False
            if begun and self._in_head:  # what a head begins with may be the end of what came before it
                self._head_bytes += len(data)
                if self._head_bytes > max_header_bytes:
                    self.refuse(HeadersTooLarge(max_header_bytes))
            return not self.transport.is_closing()

        # --- another protocol on the same connection

        def _should_upgrade(self) -> bool:
            """Elsewhere an Upgrade header is ignored, as HTTP allows, and in HTTP/1.0 demands (RFC 9110, section 7.8)."""
            wanted = (
                self.parser.get_http_version() == "1.1"
                and self.parser.get_method() == b"GET"
                and self.url.partition(b"?")[0].endswith(SOCKET_PATH)
            )
            return wanted and super()._should_upgrade()

        def _ignores_upgrade(self) -> bool:
            return bool(self.parser.should_upgrade()) and self.parser.get_method() != b"CONNECT" and not self._should_upgrade()

        def _head_without_upgrade(self) -> bytes:
            """The parser leaves the rest to another protocol, body and all, where one is asked for; clients ask for HTTP/2 in this way (RFC 7540, section 3.2), and go on in HTTP/1.1 without it."""
            lines = b"".join(b"%b: %b\r\n" % header for header in self.headers if header[0] != b"upgrade")
            version = self.parser.get_http_version().encode()
            return b"%b %b HTTP/%b\r\n%b\r\n" % (self.parser.get_method(), self.url, version, lines)

        def handle_websocket_upgrade(self) -> None:
            state = self.scope["state"]
            wrong = HeadersTooLarge(max_header_bytes) if HEADERS_TOO_LARGE in state else state.get(BAD_HEAD)
            self._upgraded = True
            self._deadline = None  # the socket keeps its own time
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if wrong is not None:
                self.refuse(wrong)
                return
            super().handle_websocket_upgrade()

        # --- time

        def _expect(self) -> None:
            """The client must make progress until then."""
            self._deadline = self.loop.time() + receive_timeout_s
            if self._timer is None:
                self._timer = self.loop.call_later(receive_timeout_s, self._look)

        def _look(self) -> None:
            self._timer = None
            if self._deadline is None or self.transport.is_closing():
                return
            now = self.loop.time()
            if now >= self._deadline:
                if not (self.flow.read_paused or self.pipeline or (self._in_head and self._answering())):
                    self._give_up()
                    return
                self._deadline = now + receive_timeout_s  # it is not the client whom we wait for
            self._timer = self.loop.call_at(self._deadline, self._look)

        def _answering(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def _give_up(self) -> None:
            if not self._in_message or (not self._in_head and not self._answering()):
                self.transport.close()  # it never asked for anything, or has its answer already
                return
            self.refuse(TooSlow("request's head" if self._in_head else "request body", receive_timeout_s))

        # --- what the parser finds

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._in_head = self._in_message = True
            self._head_bytes = 0
            self.scope["state"]["abort"] = self._abort
            self.scope["state"]["hang_up"] = self._hang_up
            self._expect()

        def on_body(self, body: bytes) -> None:
            super().on_body(body)
            if self._deadline is not None:
                self._deadline = min(self._deadline + len(body) / SLOWEST_BODY, self.loop.time() + receive_timeout_s)

        def on_message_complete(self) -> None:
            if self._ignored:
                return
            super().on_message_complete()
            self._in_message = False
            self._deadline = None

        def _hang_up(self, seconds: float) -> None:
            """Close in order: what was written leaves first, if the client takes it within that time."""
            self.transport.close()
            if self._linger is None:
                self._linger = self.loop.call_later(seconds, self._abort)

        def timeout_keep_alive_handler(self) -> None:
            """Close an idle connection; one whose client has not even read its last answer, and does not begin to, is not kept for that."""
            super().timeout_keep_alive_handler()
            self._flush(-1)

        def _flush(self, before: int) -> None:
            left = self.transport.get_write_buffer_size()
            if left == before:
                self._abort()
            elif left:
                self._linger = self.loop.call_later(receive_timeout_s, self._flush, left)

        def _abort(self) -> None:
            sock = self.transport.get_extra_info("socket")
            if sock is not None:
                # Reset instead of an orderly end: the kernel too would keep what this client does not read, for minutes.
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()

        def on_headers_complete(self) -> None:
            if self._ignores_upgrade():
                self._ignored = True  # it is parsed once more
                return
            self._in_head = False
            size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if size > max_header_bytes:
                self.scope["state"][HEADERS_TOO_LARGE] = max_header_bytes
            if (wrong := wrong_head(self.headers, self.parser.get_http_version())) is not None:
                self.scope["state"][BAD_HEAD] = wrong
            self._expect()
            super().on_headers_complete()
            if self.scope["http_version"] == "1.0" and self.cycle is not None and self.cycle.scope is self.scope:
                until_closed(self.cycle)
            if 0 < len(self.pipeline) <= MOST_WAITING:  # who does not read does not see who leaves
                self.flow.resume_reading()

        def send_400_response(self, msg: str) -> None:
            self.refuse(InvalidRequest("This is not a valid HTTP/1.1 request."))

        def _unsupported_upgrade_warning(self) -> None:
            """An Upgrade header that nobody understands is ignored, as HTTP allows."""

        def refuse(self, error: PenstockError) -> None:
            """Answer with `error` and close, whatever the connection was doing."""
            if self.transport.is_closing():
                return
            running = self._running
            if running is not None and not running.response_complete and running.response_started:
                self.transport.abort()  # an answer is under way: nothing sensible can be said in between
                return
            more: list[tuple[bytes, bytes]] = []
            if self._answering():
                state = self.cycle.scope["state"]
                state[REFUSED] = error.status
                if HEADERS in state:
                    more = state[HEADERS]()
            body = error_body(error)
            head = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), (b"connection", b"close")]
            lines = b"".join(b"%s: %s\r\n" % header for header in head + error_headers(error) + more)
            self.transport.write(b"HTTP/1.1 %d %s\r\n%s\r\n%s" % (error.status, HTTPStatus(error.status).phrase.encode(), lines, body))
            self.transport.close()

    return PenstockProtocol


def server_options(
    max_header_bytes: int, receive_timeout_s: float, *, max_message_bytes: int = 1 << 20, ping_s: float = 20.0, pong_s: float = 20.0
) -> dict[str, Any]:
    """uvicorn.Config arguments that every Penstock server uses. A WebSocket is asked for a sign of life after each `ping_s`, and closed without one for `pong_s`."""
    return {
        "http": protocol_class(max_header_bytes, receive_timeout_s),
        "ws": PenstockSocket,
        "ws_max_size": max_message_bytes,
        "ws_ping_interval": ping_s,
        "ws_ping_timeout": pong_s,
        "ws_per_message_deflate": False,  # tokens are small, and a core's time is worth more
        "lifespan": "off",
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "date_header": True,
        "proxy_headers": False,
        "timeout_keep_alive": 75,
    }
