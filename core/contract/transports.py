"""What a transport gives an edge.

What it is: `Transport`, which a TransportSpec's factory returns: routes of the HTTP application, and listeners; `Listener`, what an edge opens beside HTTP.
What it does not know: Litestar, sockets' protocols, what is said on them.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol


class Application(Protocol):
    """The edge's ASGI application. A scope's `state` may hold a Carrier (penstock.transports.frame), to which a stream then goes."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request."""
        ...

    def known(self, headers: Mapping[bytes, bytes]) -> bool:
        """Do these headers (names in lower case) bring a key, or is none needed? To be asked before much is read for somebody; every request is asked for its key in any case."""
        ...


class Listener(Protocol):
    """A port of its own, beside HTTP's. It has no way to the engine of its own: what it hears it asks the edge's application, as if it had come over HTTP, so that keys, limits,
    errors, counts and traces are those of every request."""

    name: str
    """Of its socket, which root binds and all edges inherit: what the option of its port names as `listener` (core/protocol/config.py)."""

    async def start(self, sock: socket.socket | None, app: Application) -> None:
        """The edge can answer: accept connections. `sock` listens already, shared with the other edges; None: no option speaks of that name, and the listener opens what it needs."""
        ...

    async def stop(self, limit_s: float) -> None:
        """The server ends, and whatever ran was told so: accept no more, let last words leave, close all connections, and return within about `limit_s` seconds. While the server
        drains (before this) connections are still accepted; `app` refuses what comes."""
        ...


class Transport(NamedTuple):
    """What one transport is made of, in one edge."""

    routes: Sequence[Any] = ()
    """Litestar route handlers, Routers or Controllers."""
    listeners: Sequence[Listener] = ()
    """Each is started once the edge has met text, and stopped when it ends."""
