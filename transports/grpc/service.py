"""The services that are spoken over gRPC.

What it is: `PenstockService` (penstock_v1.proto), whose calls become requests of the edge's application; `HealthService` (grpc.health.v1), which says what /health/ready says and asks for no
key.
What it does not know: connections, how a request is answered (calls.py), APIs.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar
from urllib.parse import quote

from google.protobuf.message import DecodeError
from grpclib.const import Cardinality, Handler, Status
from grpclib.events import RecvRequest
from grpclib.exceptions import GRPCError, StreamTerminatedError
from grpclib.health.v1.health_grpc import HealthBase
from grpclib.health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpclib.server import Stream

from penstock.core.contract.transports import Application
from penstock.core.protocol.errors import InvalidRequest, PenstockError, Unauthorized
from penstock.transports.carried import request_scope, wrong_path
from penstock.transports.frame import Frame
from penstock.transports.gateway import Gateway
from penstock.transports.grpc.calls import EVENTS, StreamCall, WholeCall, end, followed, gone
from penstock.transports.grpc.penstock_v1_pb2 import (
    AttachRequest,
    CallReply,
    CallRequest,
    ControlReply,
    ControlRequest,
    Event,
    GenerateReply,
    GenerateRequest,
    StreamRequest,
)
from penstock.transports.grpc.statuses import Failed
from penstock.transports.grpc.typed import PATH as COMPLETIONS
from penstock.transports.grpc.typed import REPLIES, body_of
from penstock.transports.keyring import KEY_NEEDED
from penstock.transports.request import Header, Scope, sane_id
from penstock.transports.socket_messages import OURS

log = logging.getLogger("penstock.edge.grpc")
T = TypeVar("T")

SERVICE = "penstock.v1.Penstock"
KEYS = ("authorization", "x-api-key")
METHODS = ("GET", "POST", "DELETE")
WATCH_S = 1.0
"""How often it is looked whether health has changed."""


class Compressed(InvalidRequest):
    status = 501


def headers_of(metadata: Any, request_id: str = "") -> list[Header]:
    """A call's metadata, as headers of a request; but for those that say what the message is, or are the connection's. Raises Failed."""
    found = [
        (name.encode("latin-1"), value.encode("latin-1"))
        for name, value in (metadata or {}).items()
        if isinstance(value, str) and (name in KEYS or not OURS.fullmatch(name))
    ]
    if request_id:
        if sane_id(request_id) is None:
            told = "id must be 1 to 128 letters, digits or any of ._:/+=-, of which the first is a letter or a digit."
            raise Failed.by(InvalidRequest(told, param="id"))
        found = [(b"x-request-id", request_id.encode()), *(header for header in found if header[0] != b"x-request-id")]
    return found


def outer_of(stream: Stream[Any, Any]) -> Scope:
    """What a scope says of the connection."""
    address = stream.peer.addr()
    return {"client": tuple(address[:2])} if isinstance(address, tuple) else {}


async def received(stream: Stream[T, Any], kind: type[T]) -> T:
    """The call's one message. Raises Failed."""
    try:
        message = await stream.recv_message()
    except DecodeError:
        raise Failed.by(InvalidRequest(f"The message is no {kind.__name__} (penstock_v1.proto).")) from None
    except AssertionError:  # grpclib's word for it
        raise Failed.by(InvalidRequest("The message ended before it was complete.")) from None
    except NotImplementedError:
        raise Failed.by(Compressed("Compressed messages are not understood. Send them as they are.")) from None
    if message is None:
        raise Failed.by(InvalidRequest(f"The call has no message: send a {kind.__name__}."))
    return message


class PenstockService:
    """One an edge. `app` is the edge's application."""

    def __init__(self, app: Application, gateway: Gateway) -> None:
        self._app = app
        self._limit = gateway.config.max_body_bytes
        self.tasks: set[asyncio.Task[None]] = set()
        """Requests that run, whether or not their clients are still there."""

    def __mapping__(self) -> dict[str, Handler]:
        """What grpclib calls by which path."""

        def handler(work: Callable[[Any], Awaitable[None]], kind: Cardinality, asked: type, answered: type) -> Handler:
            return Handler(functools.partial(self._told, work), kind, asked, answered)

        return {
            f"/{SERVICE}/Stream": handler(self._stream, Cardinality.UNARY_STREAM, StreamRequest, Event),
            f"/{SERVICE}/Attach": handler(self._attach, Cardinality.UNARY_STREAM, AttachRequest, Event),
            f"/{SERVICE}/Control": handler(self._control, Cardinality.UNARY_UNARY, ControlRequest, ControlReply),
            f"/{SERVICE}/Call": handler(self._call, Cardinality.UNARY_UNARY, CallRequest, CallReply),
            f"/{SERVICE}/Generate": handler(self._generate, Cardinality.UNARY_STREAM, GenerateRequest, GenerateReply),
        }

    async def _told(self, work: Callable[[Stream[Any, Any]], Awaitable[None]], stream: Stream[Any, Any]) -> None:
        """Whatever is wrong with a call is its status."""
        try:
            await work(stream)
        except Failed as failed:
            await end(stream, failed)
        except (GRPCError, StreamTerminatedError):
            raise
        except Exception:
            if gone(stream):
                return
            log.exception("a call failed")
            await end(stream, Failed.by(PenstockError("The server made an error.")))

    async def _stream(self, stream: Stream[StreamRequest, Event]) -> None:
        asked = await received(stream, StreamRequest)
        path, _, query = checked(asked.path).partition("?")
        if not asked.body:
            raise Failed.by(InvalidRequest("body is missing: the JSON that the endpoint takes.", param="body"))
        headers = headers_of(stream.metadata, asked.id)
        await self._events(stream, request_scope("POST", path, query, headers=headers, body=asked.body, outer=outer_of(stream)), asked.body)

    async def _attach(self, stream: Stream[AttachRequest, Event]) -> None:
        asked = await received(stream, AttachRequest)
        path = f"/v1/streams/{quote(named(asked.id))}"
        await self._events(
            stream, request_scope("GET", path, f"after={asked.after}", headers=headers_of(stream.metadata), outer=outer_of(stream))
        )

    async def _generate(self, stream: Stream[GenerateRequest, GenerateReply]) -> None:
        asked = await received(stream, GenerateRequest)
        try:
            body = body_of(asked)
        except InvalidRequest as wrong:
            raise Failed.by(wrong) from None
        scope = request_scope("POST", COMPLETIONS, headers=headers_of(stream.metadata, asked.id), body=body, outer=outer_of(stream))
        await self._events(stream, scope, body, REPLIES)

    async def _events(self, stream: Stream[Any, Any], scope: Scope, body: bytes = b"", frame: Frame = EVENTS) -> None:
        call = StreamCall(stream, self._app, frame)
        await followed(self._begun(call.run(scope, body)), call)
        await call.greeted()
        await stream.send_trailing_metadata(metadata=call.trailers())

    async def _control(self, stream: Stream[ControlRequest, ControlReply]) -> None:
        asked = await received(stream, ControlRequest)
        path = f"/v1/requests/{quote(named(asked.id))}"
        words = {ControlRequest.PAUSE: "pause", ControlRequest.RESUME: "resume", ControlRequest.STOP: "stop"}
        if asked.action == ControlRequest.CANCEL:
            await self._whole(stream, "DELETE", path)
        elif asked.action in words:
            await self._whole(stream, "POST", f"{path}/{words[asked.action]}")
        else:
            raise Failed.by(InvalidRequest("action must be PAUSE, RESUME, STOP or CANCEL.", param="action"))
        await stream.send_message(ControlReply())

    async def _call(self, stream: Stream[CallRequest, CallReply]) -> None:
        asked = await received(stream, CallRequest)
        path, _, query = checked(asked.path).partition("?")
        method = asked.method or ("POST" if asked.body else "GET")
        if method not in METHODS:
            raise Failed.by(InvalidRequest(f"method must be one of {', '.join(METHODS)}, but is {method[:80]!r}.", param="method"))
        call, body = await self._whole(stream, method, path, query, asked.body)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in call.headers.items()}
        await stream.send_message(CallReply(status=call.status, body=body, headers=headers))

    async def _whole(self, stream: Stream[Any, Any], method: str, path: str, query: str = "", body: bytes = b"") -> tuple[WholeCall, bytes]:
        """Raises Failed for an error."""
        call = WholeCall(self._app, self._limit)
        scope = request_scope(method, path, query, headers=headers_of(stream.metadata), body=body, outer=outer_of(stream))
        await followed(self._begun(call.run(scope, body)), call)
        return call, call.body()

    async def reflects(self, event: RecvRequest) -> None:
        """Before any method is called: reflection is for who has a key, where one is needed. Raises Failed."""
        if event.method_name.startswith("/grpc.reflection.") and not self._app.known(dict(headers_of(event.metadata))):
            raise Failed.by(Unauthorized(KEY_NEEDED))

    def _begun(self, run: Any) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(run, name="grpc call")
        self.tasks.add(task)
        task.add_done_callback(self._over)
        return task

    def _over(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever still follows it tells; where nobody does, the edge has logged it


def checked(path: str) -> str:
    """Raises Failed."""
    if (wrong := wrong_path(path)) is not None:
        raise Failed.by(wrong)
    return path


def named(id: str) -> str:
    """Raises Failed."""
    if not id:
        raise Failed.by(InvalidRequest("id is missing: the request's x-request-id.", param="id"))
    return id


class HealthService(HealthBase):
    """Of the server ("") and of `SERVICE`, which are the same."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def _status(self, service: str) -> Any:
        if service not in ("", SERVICE):
            return HealthCheckResponse.SERVICE_UNKNOWN
        return HealthCheckResponse.SERVING if self._gateway.readiness()[0] else HealthCheckResponse.NOT_SERVING

    async def Check(self, stream: Stream[HealthCheckRequest, HealthCheckResponse]) -> None:
        asked = await stream.recv_message()
        status = self._status(asked.service if asked is not None else "")
        if status == HealthCheckResponse.SERVICE_UNKNOWN:
            raise GRPCError(Status.NOT_FOUND, f"Services are {SERVICE} and the server as a whole: an empty name.")
        await stream.send_message(HealthCheckResponse(status=status))

    async def Watch(self, stream: Stream[HealthCheckRequest, HealthCheckResponse]) -> None:
        asked = await stream.recv_message()
        told = None
        while True:
            status = self._status(asked.service if asked is not None else "")
            if status != told:
                await stream.send_message(HealthCheckResponse(status=status))
                told = status
            await asyncio.sleep(WATCH_S)
