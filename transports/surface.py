"""What the routes of one API share.

What it is: `Surface`, which reads a route's JSON body, has it parsed without holding the loop up, and answers a Generation in a Voice: as a stream of the surface's Frame, or in one piece.
What it does not know: which API it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from litestar import Request
from litestar.types import ASGIApp

from penstock.core.actors.text.bounds import SMALL
from penstock.transports.blame import beside
from penstock.transports.frame import Frame, chosen
from penstock.transports.gateway import Gateway
from penstock.transports.generation import Generation
from penstock.transports.outbox import Pulse
from penstock.transports.replies import WholeReply
from penstock.transports.request import RequestContext, check_json, context_of, read_body
from penstock.transports.stream import StreamReply
from penstock.transports.voice import Voice

Result = TypeVar("Result")


class Surface:
    """One an API and edge, made by the factory of its routes; `frame` is that of its streams, unless they are asked for as lines."""

    def __init__(self, gateway: Gateway, frame: Frame) -> None:
        self._gateway = gateway
        self.frame = frame
        self.pulse = Pulse(gateway.config)

    async def body(self, request: Request[Any, Any, Any]) -> bytes:
        """The request's JSON, not parsed yet. Raises InvalidRequest (415 for another content type) or RequestTooLarge."""
        context = context_of(request.scope)
        check_json(context.headers)
        context.path = request.scope["path"]
        context.body = await read_body(request.scope, request.receive, self._gateway.config.max_body_bytes)
        return context.body

    async def understood(self, body: bytes, parse: Callable[..., Result], *arguments: Any, **named: Any) -> Result:
        """What `parse(body, ...)` gives or raises. A large body is parsed on a thread, so that the loop has its turns meanwhile, and one at a time in the
        whole process, so that the loop competes with one thread however many of them came; small ones go past it."""
        return await self.worked(len(body), functools.partial(parse, body, *arguments, **named))

    async def worked(self, size: int, work: Callable[[], Result]) -> Result:
        """The same of any work that reads `size` bytes. It must not wait for anything: all large bodies wait for it."""
        if size <= SMALL:
            return work()
        async with self._gateway.parsing:
            return await beside(work)

    def framed(self, context: RequestContext) -> Frame:
        """The frame of a stream that answers this request."""
        return chosen(context.headers.get(b"accept"), self.frame)

    def answer(self, request: Request[Any, Any, Any], generation: Generation, voice: Voice) -> ASGIApp:
        """What the route returns: it runs the generation and says in `voice` what came of it."""
        context = context_of(request.scope)
        if generation.stream:
            reply = StreamReply(self._gateway, generation, voice, self.framed(context), context, self.pulse)
            reply.handler = request.scope.get("route_handler")
            return reply
        return WholeReply(self._gateway, generation, voice, context)
