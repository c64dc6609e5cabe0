"""The port on which gRPC is spoken.

What it is: `GrpcListener`, a transport's Listener: grpclib's server on the socket that root bound, with Penstock's limits (`Connection`, `Patient`), which grpclib lacks: how large a message may be and how long one may
take, what a client may make the server hold without reading, signs of life, unknown frames. It leans on inner names of grpclib, hence the bound on its version.
What it does not know: services (service.py), requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Iterable
from typing import Any

import grpclib.server
from grpclib.config import Configuration
from grpclib.events import RecvRequest, listen
from grpclib.protocol import AbstractHandler, Buffer, H2Protocol, Stream
from grpclib.reflection.service import ServerReflection
from h2.config import H2Configuration
from h2.errors import ErrorCodes
from h2.events import AlternativeServiceAvailable, UnknownFrameReceived
from h2.exceptions import H2Error
from h2.settings import SettingCodes

from penstock.core.contract.transports import Application
from penstock.core.protocol.config import Config
from penstock.core.protocol.errors import RequestTooLarge, Unauthorized
from penstock.transports.gateway import Gateway
from penstock.transports.grpc.service import HealthService, PenstockService
from penstock.transports.grpc.statuses import Failed
from penstock.transports.keyring import KEY_NEEDED
from penstock.transports.protocol import SLOWEST_BODY, UNSENT_BYTES, TooSlow

BACKLOG = 2048
MOST_UNREAD = 4 << 20
"""Bytes that wait for a client which asks (pings, resets) and does not read: as much as 256 streams may have on their way, a frame each."""
ENVELOPE = 64 << 10
"""Bytes of a message beside the body in it, and of one from somebody who brings no key."""

# It logs what clients do wrong, with tracebacks; what our own calls do wrong they log themselves.
logging.getLogger("grpclib").setLevel(logging.CRITICAL)


class Patient(Buffer):
    """What a client sends of one call. No message is larger than it may be, and none is waited for longer than --receive-timeout-s and what its size needs at 1 KiB/s. Raises Failed."""

    def __init__(self, acknowledge: Callable[[int], None], config: Config, *, known: bool) -> None:
        super().__init__(acknowledge)
        self._limit = ENVELOPE + (config.max_body_bytes if known else 0)
        self._patience_s = config.receive_timeout_s
        self._known = known

    async def read(self, size: int) -> bytes:
        if size > self._limit:
            large = f"The message has {size} bytes, more than {self._limit} (--max-body-bytes). Send less."
            raise Failed.by(RequestTooLarge(large) if self._known else Unauthorized(KEY_NEEDED))
        try:
            async with asyncio.timeout(self._patience_s + size / SLOWEST_BODY):
                return await super().read(size)
        except TimeoutError:
            raise Failed.by(TooSlow("message", self._patience_s)) from None


class Bounded(AbstractHandler):
    """grpclib's handler of a connection's calls, which read no more than they may."""

    def __init__(self, handler: AbstractHandler, config: Config, app: Application) -> None:
        self._handler = handler
        self._config = config
        self._app = app

    def accept(self, stream: Stream, headers: Any, release_stream: Callable[[], None]) -> None:
        if not {":method", ":path"} <= {name for name, _ in headers}:  # malformed (RFC 9113, section 8.3.1)
            if stream.closable:
                stream.reset_nowait(ErrorCodes.PROTOCOL_ERROR)
            release_stream()
            return
        known = self._app.known({name.encode("latin-1"): value.encode("latin-1") for name, value in headers})
        stream.buffer = Patient(stream.buffer._ack_callback, self._config, known=known)
        # Nobody uses binary metadata, and grpclib leaves a call whose are broken without an answer.
        plain = [header for header in headers if not header[0].endswith("-bin")]
        self._handler.accept(stream, plain, release_stream)

    def cancel(self, stream: Stream) -> None:
        self._handler.cancel(stream)

    def close(self) -> None:
        self._handler.close()


class Connection(H2Protocol):
    """One client. `all` holds those that are open."""

    def __init__(self, handler: Bounded, config: Configuration, h2_config: H2Configuration, limits: Config, all: set[Connection]) -> None:
        super().__init__(handler, config, h2_config)
        self._limits = limits
        self._all = all
        self._transport: Any = None
        self._heard = 0.0
        self._beat: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        sock = transport.get_extra_info("socket")
        if sock is not None:
            with contextlib.suppress(OSError):  # it is none of TCP
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        super().connection_made(transport)
        self._transport = transport
        self._all.add(self)
        settings = {
            SettingCodes.MAX_CONCURRENT_STREAMS: self._limits.max_socket_streams,
            SettingCodes.MAX_HEADER_LIST_SIZE: self._limits.max_header_bytes,
        }
        self.connection._connection.decoder.max_header_list_size = self._limits.max_header_bytes  # at once, whether or not it agrees
        self.say(lambda h2: h2.update_settings(settings))
        for kind in (UnknownFrameReceived, AlternativeServiceAvailable):  # to be ignored (RFC 9113, section 4.1)
            self.processor.processors[kind] = lambda event: None
        self._heard = asyncio.get_running_loop().time()
        self._next_beat()

    def data_received(self, data: bytes) -> None:
        self._heard = asyncio.get_running_loop().time()
        super().data_received(data)
        if self._transport.get_write_buffer_size() > MOST_UNREAD:
            self._transport.abort()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._all.discard(self)
        if self._beat is not None:
            self._beat.cancel()
        super().connection_lost(exc)

    # --- signs of life

    def _next_beat(self) -> None:
        self._beat = asyncio.get_running_loop().call_later(self._limits.keep_alive_s, self._ping)

    def _ping(self) -> None:
        """Ask for a sign of life. Who gives none for --stream-stall-s, reads nothing, or never said that it speaks HTTP/2, is gone."""
        silent = asyncio.get_running_loop().time() - self._heard
        if silent > self._limits.keep_alive_s + self._limits.stream_stall_s or self._transport.is_closing():
            self._transport.abort()
            return
        if silent >= self._limits.keep_alive_s:
            self.say(lambda h2: h2.ping(b"penstock"))
        self._next_beat()

    def say(self, what: Callable[[Any], None]) -> None:
        """Something about the connection itself."""
        with contextlib.suppress(H2Error):
            what(self.connection._connection)
            self.connection.flush()

    def goodbye(self) -> None:
        """Nothing runs on it any more (or what does is cut): say so, and close."""
        if not self._transport.is_closing():
            self.say(lambda h2: h2.close_connection())
            self._transport.close()

    def abort(self) -> None:
        self._transport.abort()


class _Server(grpclib.server.Server):
    def __init__(self, services: Iterable[Any], limits: Config, app: Application) -> None:
        super().__init__(list(services))
        self._app = app
        self._h2_config.header_encoding = "latin-1"  # as HTTP's are read; what is no ASCII would else end the connection
        self.connections: set[Connection] = set()
        self._limits = limits

    def _protocol_factory(self) -> H2Protocol:
        made = super()._protocol_factory()
        handler = Bounded(made.handler, self._limits, self._app)
        return Connection(handler, made.config, made.h2_config, self._limits, self.connections)

    def refuse(self) -> None:
        """Accept no more connections; what runs goes on (which grpclib's own `close` would end)."""
        if self._server is not None:
            self._server.close()


class GrpcListener:
    """See Listener."""

    name = "grpc"

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._service: PenstockService | None = None
        self._server: _Server | None = None

    async def start(self, sock: socket.socket | None, app: Application) -> None:
        assert sock is not None, "root binds --grpc-port"
        self._service = service = PenstockService(app, self._gateway)
        self._server = _Server(ServerReflection.extend([service, HealthService(self._gateway)]), self._gateway.config, app)
        listen(self._server, RecvRequest, service.reflects)
        sock.setblocking(False)
        await self._server.start(sock=sock, backlog=BACKLOG)

    async def stop(self, limit_s: float) -> None:
        if self._server is None or self._service is None:
            return
        self._server.refuse()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while self._service.tasks:  # each has its last word to say
                    await asyncio.wait(set(self._service.tasks))
                    await asyncio.sleep(0.01)
                for connection in list(self._server.connections):
                    connection.goodbye()
                while self._server.connections:
                    await asyncio.sleep(0.01)
        for connection in list(self._server.connections):
            connection.abort()
