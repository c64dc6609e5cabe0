"""Whose mistake it is: what a surface's own code does wrong carries its plugin's name to the log, and costs its request alone.

What it is: `Owned`, a transport's factory whose routes know whose they are; `must`, which checks what a voice gave; `said`, the log's sentence; `refusal`, an
error in a route's voice, or plainly where that voice fails; `failed`, the reply to a request whose route raised; `beside`, work on a thread.
What it does not know: plugins' hosts, which voices there are, what is said.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import traceback
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

from litestar import Router
from litestar.exceptions import LitestarException
from litestar.handlers.base import BaseRouteHandler

from penstock.core.contract.transports import Transport
from penstock.core.protocol.errors import PenstockError, PluginFault, described, tamed
from penstock.transports.gateway import Gateway
from penstock.transports.request import Header, JsonReply, Scope, context_of, error_reply
from penstock.transports.voice import VOICE, VOICES, Voice

log = logging.getLogger("penstock.edge.http")
T = TypeVar("T")

OWNER = "owner"
"""The key in a handler's `opt` that holds the Blame of the plugin that brought it. Built-in ones have none."""

Blame = Callable[[str, Exception | str], PluginFault]
"""(call, what went wrong) -> the fault that names plugin and package."""


class VoiceFault(Exception):
    """What `call` of a voice gave will not do. `what` goes on after the call's name: "returned 3, which ..."."""

    def __init__(self, call: str, what: str) -> None:
        super().__init__(f"{call}() {what}")
        self.call = call
        self.what = what


class Owned:
    """A TransportSpec.factory of a plugin. Raises PluginFault for a Transport that holds something else than routes and listeners."""

    def __init__(self, factory: Callable[[Gateway], Transport], blame: Blame) -> None:
        self._factory = factory
        self._blame = blame

    def __call__(self, gateway: Gateway) -> Transport:
        transport = self._factory(gateway)
        for name in ("routes", "listeners"):
            if not isinstance(found := getattr(transport, name), (list, tuple)):
                raise self._blame("factory", f"returned a transport whose {name} are {found!r:.80}, which must be a list")
        for listener in transport.listeners:
            lacking = [name for name in ("name", "start", "stop") if not hasattr(listener, name)]
            if lacking:
                raise self._blame("factory", f"returned the listener {listener!r:.80}, which has no {' and no '.join(lacking)}")
        for route in transport.routes:
            opt = getattr(route, "opt", None) or {}
            for key, voice in ((VOICE, opt.get(VOICE)), *((VOICES, one) for one in opt.get(VOICES, {}).values())):
                if wrong := wrong_voice(voice):
                    raise self._blame("factory", f"returned a route whose opt {key!r} {wrong}")
            if isinstance(route, (BaseRouteHandler, Router)):
                route.opt.setdefault(OWNER, self._blame)
            elif not isinstance(route, type):  # a Controller, which Litestar looks into
                raise self._blame("factory", f"returned a list with {route!r:.80} in it, which is no Litestar route handler")
        return transport


def wrong_voice(voice: Any) -> str | None:
    """What is wrong with what a route's opt names as its Voice, or None. A class is made into an object for each request, but for `refuse`, which is asked
    of the class, as there may be no request yet."""
    if voice is None:
        return None
    names = [name for name in vars(Voice) if not name.startswith("_") and callable(getattr(Voice, name))]
    lacking = [name for name in names if not callable(getattr(voice, name, None))]
    if lacking:
        return f"is {voice!r:.80}, which is no Voice: it has no {'() and no '.join(lacking)}()"
    if isinstance(voice, type) and not isinstance(inspect.getattr_static(voice, "refuse"), (staticmethod, classmethod)):
        return f"is {voice!r:.80}, whose refuse() must be a @staticmethod or @classmethod: it is called without an object"
    return None


def must(value: object, kind: type[T], call: str) -> T:
    """`value`, if it is of that kind. Raises VoiceFault."""
    if not isinstance(value, kind):
        raise VoiceFault(call, f"returned {value!r:.80}, which must be {kind.__name__}")
    return value


def said(handler: BaseRouteHandler | None, call: str, error: Exception) -> str:
    """What the log says of it. `call` is the function that failed, unless the error knows better."""
    what: Exception | str = error
    if isinstance(error, VoiceFault):
        call, what = error.call, error.what
    blame: Blame | None = None if handler is None else handler.opt.get(OWNER)
    return blame(call, what).message if blame is not None else f"{call}(): {described(error)}"


def refusal(
    handler: BaseRouteHandler | None, error: PenstockError, headers: Iterable[Header] = (), voice: type[Voice] | Voice | None = None
) -> JsonReply:
    """The reply that an error is, by `voice` or that of the route; OpenAI's shape where there is neither, or where it fails."""
    headers = list(headers)
    speaker = handler.opt.get(VOICE) if voice is None and handler is not None else voice
    if speaker is None:
        return error_reply(error, headers)
    try:
        return must(speaker.refuse(error, headers), JsonReply, "refuse")
    except BaseException as raised:
        log.error("an error could not be said in its route's voice: %s", said(handler, "refuse", tamed(raised)), exc_info=raised)
        return error_reply(error, headers)


def failed(scope: Scope, raised: BaseException) -> JsonReply:
    """The reply to a request whose route raised what it must not, which is logged."""
    handler: BaseRouteHandler | None = scope.get("route_handler")
    name = "route" if handler is None else handler.handler_name
    late = isinstance(raised, LitestarException)  # Litestar's word for what came after the answer had begun
    cause = raised.__cause__ if late and raised.__cause__ is not None else raised
    log.error("request %s failed: %s", context_of(scope).rid, said(handler, name, tamed(cause)), exc_info=raised)
    return refusal(handler, PenstockError("The server made an error. It is logged with the request id."))


def ours(raised: BaseException) -> bool:
    """Is it how a loop ends this very task, which is nobody's mistake?"""
    if isinstance(raised, GeneratorExit):
        return True
    task = asyncio.current_task()
    return isinstance(raised, asyncio.CancelledError) and task is not None and task.cancelling() > 0


def raised_in(raised: BaseException) -> str:
    """The innermost place that it came through, for the log."""
    frames = traceback.extract_tb(raised.__traceback__)
    return f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else "nobody knows where"


async def beside(work: Callable[[], T]) -> T:
    """`work` on a thread. What it raises is an Exception here: a future that is given something else ends the loop, or (StopIteration) is never done."""

    def kept() -> tuple[T | None, Exception | None]:
        try:
            return work(), None
        except BaseException as raised:
            return None, tamed(raised)

    found, error = await asyncio.to_thread(kept)
    if error is not None:
        raise error
    return cast(T, found)
