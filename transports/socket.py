"""WebSockets: many requests on one connection.

What it is: the transport "websocket" (`GET /v1/stream`, subprotocol `penstock.v1`): `Sockets` makes the handshake (origin, subprotocol, key), `Socket` reads one client's messages and starts, attaches and
steers streams, whose messages leave in turn, so that none holds the others up. Any POST endpoint of the edge may be asked, in its own words.
What it does not know: how a stream is answered (socket_stream.py), what messages look like (socket_messages.py), frames of WebSockets (socket_protocol.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

from litestar import get
from litestar.types import ASGIApp

from penstock.core.actors.text.bounds import SMALL
from penstock.core.protocol.config import Config
from penstock.core.protocol.errors import FinalError, Forbidden, InvalidRequest, NotFound, PenstockError, Unauthorized
from penstock.transports.blame import beside
from penstock.transports.carried import request_scope
from penstock.transports.gateway import Gateway
from penstock.transports.keyring import Keyring
from penstock.transports.request import Header, JsonReply, Receive, Scope, Send, error_body, error_fields, error_headers
from penstock.transports.server_routes import SCOPE
from penstock.transports.socket_messages import (
    BAD_DATA,
    BAD_TYPE,
    KEY,
    NO_KEY,
    PATH,
    PROTOCOL,
    Malformed,
    Misunderstood,
    Said,
    StreamExistsHere,
    TooManyHere,
    encode,
    line,
    understood,
)
from penstock.transports.socket_protocol import HANDLE, PenstockSocket
from penstock.transports.socket_schema import ASYNCAPI
from penstock.transports.socket_stream import SocketStream

SOCKETS = "sockets"
"""The key in a handler's `opt`: WebSockets are served at its path."""


LARGEST_KEY = 4096
"""Bytes of a message from somebody of whom nothing is known yet."""


class UpgradeRequired(FinalError):
    status = 426
    type = "invalid_request_error"
    default_code = "upgrade_required"
    headers: tuple[Header, ...] = ((b"upgrade", b"websocket"), (b"sec-websocket-protocol", PROTOCOL.encode()))


def socket_routes(gateway: Gateway) -> list[Any]:
    """The route is for who comes without a WebSocket; it also says that they are served."""

    @get(PATH, opt={SOCKETS: True, SCOPE: None}, include_in_schema=False)  # /schema/asyncapi.json has it
    async def stream() -> ASGIApp:
        raise UpgradeRequired(f"This is a WebSocket: connect to it with the subprotocol {PROTOCOL} (docs/streams.md).")

    @get("/schema/asyncapi.json", opt={SCOPE: None}, include_in_schema=False)
    async def asyncapi() -> ASGIApp:
        return JsonReply(encode(ASYNCAPI))

    return [stream, asyncapi]


class Offer(NamedTuple):
    """What a handshake says of who it is. `key`: in a header or a subprotocol; None: it comes in the first message."""

    key: bytes | None
    headers: list[Header]


class Sockets:
    """`app` answers what is asked on them; one an edge."""

    def __init__(self, app: ASGIApp, gateway: Gateway, keyring: Keyring, *, served: bool) -> None:
        self._app = app
        self._gateway = gateway
        self._keyring = keyring
        self._served = served
        self.open = 0
        """Sockets that are open, after their handshakes."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """`scope["path"]` is below --root-path."""
        headers: dict[bytes, bytes] = dict(scope["headers"])
        offered: list[str] = scope["subprotocols"]
        await receive()  # websocket.connect
        try:
            if not self._served or scope["path"] != PATH:
                raise NotFound(f"No WebSocket is served at {scope['path'][:200]!r}.")
            check_origin(headers, self._gateway.config, locked=self._keyring.locked)
            if PROTOCOL not in offered:
                raise InvalidRequest(f"Offer the subprotocol {PROTOCOL}.", param="sec-websocket-protocol")
            credentials = credentials_of(headers, offered)
            if credentials and self._keyring.locked and self._keyring.find(dict(credentials)) is None:
                raise Unauthorized("The API key is not valid.")
        except PenstockError as error:
            await reject(error, send)
            return
        await send({"type": "websocket.accept", "subprotocol": PROTOCOL, "headers": []})
        self.open += 1
        try:
            await Socket(self._app, self._gateway, self._keyring, scope, credentials).run(receive, send)
        finally:
            self.open -= 1


def credentials_of(headers: Mapping[bytes, bytes], offered: list[str]) -> list[Header]:
    """As headers of a request; [] where none were given."""
    found = [(name, headers[name]) for name in (b"authorization", b"x-api-key") if name in headers]
    key = next((name.removeprefix(KEY) for name in offered if name.startswith(KEY)), None)
    return [*found, *([(b"x-api-key", key.encode("latin-1", "replace"))] if key and not found else [])]


def check_origin(headers: Mapping[bytes, bytes], config: Config, *, locked: bool) -> None:
    """Browsers let any page connect, and say which it is. Pages of --allowed-origins may; so may the server's own, but where no key is needed its name must be an address or
    localhost: any other name may have been pointed at this server by the page's owner. Raises Forbidden."""
    origin = headers.get(b"origin")
    if origin is None:
        return
    said = origin.decode("latin-1")
    if said in config.allowed_origins or "*" in config.allowed_origins:
        return
    host = headers.get(b"host", b"").decode("latin-1").lower()
    try:
        page = urlsplit(said)
        own = bool(host) and page.netloc.lower() == host
        named = page.hostname or ""
    except ValueError:
        own, named = False, ""
    if not own or not (locked or _is_address(named)):
        raise Forbidden(f"Pages of {said[:200]!r} may not connect: name that origin in --allowed-origins.", param="origin")


def _is_address(name: str) -> bool:
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    return name == "localhost"


async def reject(error: PenstockError, send: Send) -> None:
    """The answer to a handshake."""
    body = error_body(error)
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *error_headers(error)]
    await send({"type": "websocket.http.response.start", "status": error.status, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": body})


class _Closed(Exception):
    """The socket is to be closed, and why."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class Socket:
    """One connection, after its handshake."""

    def __init__(self, app: ASGIApp, gateway: Gateway, keyring: Keyring, scope: Scope, credentials: list[Header]) -> None:
        self._app = app
        self._gateway = gateway
        self._keyring = keyring
        self._credentials = credentials
        self._scope = scope
        self._handle: PenstockSocket = scope["state"][HANDLE]
        self._turn = asyncio.Lock()  # first come, first served: streams take turns
        self._waiting = 0
        self._streams: dict[str, SocketStream] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._may = not keyring.locked or bool(credentials)
        self._going = False
        self._send: Send | None = None

    async def write(self, lines: bytes) -> None:
        """Send each line as a message, when it is this caller's turn."""
        if not self._waiting and self._handle.put(lines):  # most of the time
            return
        self._waiting += 1
        try:
            async with self._turn:
                await self._handle.write(lines)
        finally:
            self._waiting -= 1

    async def run(self, receive: Receive, send: Send) -> None:
        self._handle.going = self._leave_soon
        self._send = send
        late = None
        if not self._may:
            self._handle.bound(LARGEST_KEY)
            loop = asyncio.get_running_loop()
            late = loop.call_later(self._gateway.config.receive_timeout_s, self._handle.hang_up, NO_KEY, "No API key came in time.")
        try:
            while True:
                message = await receive()
                if message["type"] != "websocket.receive":
                    return
                await self._take(message)
                if self._may and late is not None:
                    late.cancel()
                    late = None
        except _Closed as closed:
            await send({"type": "websocket.close", "code": closed.code, "reason": closed.reason})
        finally:
            self._handle.going = None
            if late is not None:
                late.cancel()
            for stream in list(self._streams.values()):
                stream.leave()
            if self._tasks:
                await asyncio.wait(set(self._tasks))

    async def _take(self, message: Any) -> None:
        """Do what one message says. Raises _Closed."""
        text: str | None = message.get("text")
        if text is None:
            raise _Closed(BAD_TYPE, "Messages are JSON text.")
        try:
            said = await self._understood(text)
            if said.op == "auth":
                await self._auth(said)
                return
            if not self._may:
                raise _Closed(NO_KEY, 'An API key is needed: {"op": "auth", "key": KEY} comes first.')
            if said.op in ("start", "attach"):
                self._begin(said)
            else:
                self._steer(said)
        except Malformed:
            raise _Closed(BAD_DATA, "A message must be a JSON object.") from None
        except Misunderstood as wrong:
            if not self._may:
                raise _Closed(NO_KEY, "An API key is needed.") from None
            # A message with "op" is about what was asked, and ends no stream.
            op = wrong.op or "unknown"
            await self.write(line(id=wrong.id, op=op, error=error_fields(wrong.error), status=wrong.error.status))

    async def _understood(self, text: str) -> Said:
        """Large messages are parsed on a thread, one at a time in the whole process, as large bodies are."""
        if len(text) <= SMALL:
            return understood(text)
        async with self._gateway.parsing:
            return await beside(lambda: understood(text))

    async def _auth(self, said: Said) -> None:
        key = said.key.encode("utf-8", "replace")
        if self._keyring.locked:
            if self._keyring.find({b"x-api-key": key}) is None:
                raise _Closed(NO_KEY, "The API key is not valid.")
            self._credentials = [(b"x-api-key", key.strip())]
        self._may = True
        self._handle.bound(self._gateway.config.max_body_bytes)
        await self.write(b'{"op":"auth","ok":true}\n')

    def _begin(self, said: Said) -> None:
        """Raises Misunderstood."""
        most = self._gateway.config.max_socket_streams
        if said.id in self._streams:
            raise Misunderstood(said.id, said.op, StreamExistsHere(f"A stream {said.id!r} runs on this socket.", param="id"))
        if len(self._streams) >= most:
            told = f"This socket has {most} streams (--max-socket-streams)."
            raise Misunderstood(said.id, said.op, TooManyHere(told))
        stream = self._streams[said.id] = SocketStream(said.id, self._app, self._gateway, self.write)
        task = asyncio.get_running_loop().create_task(self._run(stream, said), name="socket stream")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, stream: SocketStream, said: Said) -> None:
        body = bytes(said.body)
        path, _, query = said.path.partition("?")
        if said.op == "attach":
            path, query, method = f"/v1/streams/{quote(said.stream)}", f"after={said.after}", "GET"
            headers: list[Header] = []
        else:
            method = "POST"
            headers = [(name.lower().encode(), value.encode("latin-1")) for name, value in said.headers.items()]
        outer = {name: self._scope[name] for name in ("client", "server")}
        outer["scheme"] = {"ws": "http", "wss": "https"}.get(self._scope["scheme"], self._scope["scheme"])
        host = [(name, value) for name, value in self._scope["headers"] if name == b"host"]
        scope = request_scope(method, path, query, headers=[*host, *self._credentials, *headers], body=body, outer=outer)
        try:
            await stream.run(scope, body)
        finally:
            del self._streams[stream.id]
            await stream.close()
            if self._going and not self._streams:
                await self._goodbye()

    def _steer(self, said: Said) -> None:
        """Raises Misunderstood."""
        stream = self._streams.get(said.id)
        if stream is None:
            raise Misunderstood(said.id, said.op, NotFound(f"No stream {said.id!r} is running on this socket.", param="id"))
        if not stream.steer(said.op):
            raise Misunderstood(said.id, said.op, TooManyHere(f"Too much is asked of the stream {said.id!r} at once.", param="id"))

    # --- the end of the server

    def _leave_soon(self) -> None:
        self._going = True
        if not self._streams:
            task = asyncio.get_running_loop().create_task(self._goodbye(), name="socket goodbye")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _goodbye(self) -> None:
        if self._send is not None and self._handle.conn.state.name == "OPEN":
            await self._send({"type": "websocket.close", "code": 1001, "reason": "The server is shutting down."})
