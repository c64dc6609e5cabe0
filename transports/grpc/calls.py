"""One call: a request that the edge answers, and a reply that leaves as messages of gRPC.

What it is: `StreamCall`, whose payloads become Events as they are made (`EventFrame`), and `WholeCall`, which gathers one reply.
What it does not know: services, connections, how the edge answers (carried.py), what payloads say.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from grpclib.server import Stream

from penstock.core.contract.transports import Application
from penstock.core.protocol.errors import Cancelled, InvalidRequest, PenstockError, RequestTooLarge
from penstock.transports.carried import CARRIED, Carried, error_of
from penstock.transports.frame import DONE, Frame
from penstock.transports.grpc.statuses import Failed
from penstock.transports.request import Header, Scope, error_fields

STREAMS = (b"text/event-stream", b"application/x-ndjson")


def varint(number: int) -> bytes:
    """As protobuf writes whole numbers."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def framed(message: bytes) -> bytes:
    """As gRPC sends it."""
    return b"\0" + len(message).to_bytes(4, "big") + message


_SHORT = [varint(number) for number in range(1 << 14)]


class EventFrame:
    """A Frame whose messages are Events, each behind the five bytes that gRPC puts before a message: what is pushed leaves as it is, many at once."""

    headers: Sequence[Header] = ((b"content-type", CARRIED),)
    keep_alive = b""  # connections have pings
    tells_numbers = True

    def wrap(self, payload: bytes) -> bytes:
        return b"" if payload == DONE else payload

    def numbered(self, number: int, message: bytes) -> bytes:
        size = len(message)
        if not size:
            return b""
        seq = _SHORT[number] if number < 1 << 14 else varint(number)
        length = _SHORT[size] if size < 1 << 14 else varint(size)
        return b"\0%b\x08%b\x12%b%b" % ((size + len(seq) + len(length) + 2).to_bytes(4, "big"), seq, length, message)

    def around(self, before: bytes, after: bytes) -> tuple[bytes, bytes]:
        return before, after


EVENTS = EventFrame()


class StreamCall(Carried):
    """`stream` is the call's. What is not taken waits in the reply's Outbox, which parks and cuts as it does for everybody."""

    def __init__(self, stream: Stream[Any, Any], app: Application, frame: Frame) -> None:
        super().__init__(frame, app)
        self._stream = stream
        self._writer: asyncio.Task[Any] | None = None
        self._over = False

    async def greet(self, rid: str) -> None:
        await self._careful(self._stream.send_initial_metadata(metadata={"x-request-id": rid}))

    async def ignored(self, names: bytes) -> None:
        """The trailers do."""

    async def write(self, data: bytes) -> None:
        await self._careful(self._stream._stream.send_data(data))

    async def _careful(self, sending: Any) -> None:
        """Nothing more is sent to a call that is over, and what waits for its client then does not wait any longer."""
        if self._over:
            sending.close()
            return
        self._writer = task = asyncio.current_task()
        try:
            await sending
        except asyncio.CancelledError:
            if not self._over or task is None:
                raise
            task.uncancel()
        except Exception:
            self._writer = None
            if not gone(self._stream):
                raise
            self.leave()
        finally:
            self._writer = None

    def leave(self) -> None:
        super().leave()
        self._end()

    def cut(self) -> None:
        super().cut()
        self._end()

    def _end(self) -> None:
        self._over = True
        if self._writer is not None:
            self._writer.cancel()

    def trailers(self) -> list[tuple[str, str]]:
        """Behind a run. Raises Failed."""
        if self.error is None and not self.complete:
            cancelled = Cancelled("The request was cancelled.")
            self.status, self.error = cancelled.status, error_fields(cancelled)
        if self.error is not None:
            raise Failed(self.status, self.error, self.headers.items())
        names = (b"x-penstock-ignored-fields", b"x-penstock-warning")
        return [(name.decode(), self.headers[name].decode("latin-1")) for name in names if name in self.headers]


class WholeCall:
    """An ASGI client that gathers one reply of at most `limit` bytes."""

    def __init__(self, app: Application, limit: int) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self._app = app
        self._limit = limit
        self._parts: list[bytes] = []
        self._size = 0
        self._wrong: PenstockError | None = None
        self._gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self, scope: Scope, body: bytes) -> None:
        request = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            if request:
                return request.pop()
            await asyncio.shield(self._gone)
            return {"type": "http.disconnect"}

        await self._app(scope, receive, self._send)

    def leave(self) -> None:
        if not self._gone.done():
            self._gone.set_result(None)

    def body(self) -> bytes:
        """Behind a run. Raises Failed."""
        if self._wrong is not None:
            raise Failed.by(self._wrong)
        whole = b"".join(self._parts)
        if not self.status:
            raise Failed.by(Cancelled("The request was cancelled."))
        if self.status >= 400:
            raise Failed(self.status, error_of(whole), self.headers.items())
        return whole

    async def _send(self, message: Any) -> None:
        if self._wrong is not None:
            return
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.lower(): value for name, value in message["headers"]}
            if self.headers.get(b"content-type", b"").split(b";")[0] in STREAMS:
                self._refuse(InvalidRequest("The reply is a stream: ask for it by the method Stream.", param="stream"))
            return
        self._size += len(message.get("body", b""))
        if self._size > self._limit:
            self._refuse(
                RequestTooLarge(
                    f"The reply is larger than {self._limit} bytes (--max-body-bytes). Fetch it over HTTP.", code="reply_too_large"
                )
            )
            return
        self._parts.append(message.get("body", b""))

    def _refuse(self, error: PenstockError) -> None:
        self._parts.clear()
        self._wrong = error
        self.leave()


def gone(stream: Stream[Any, Any]) -> bool:
    """Is there nobody any more who could be told something? Who tries then gets any of many exceptions."""
    return not stream._stream.closable


async def followed(task: asyncio.Task[None], call: StreamCall | WholeCall) -> None:
    """Return when the run of a call is over. If its client leaves meanwhile, the request learns of it and comes to its own end."""
    try:
        await asyncio.shield(task)
    except BaseException:
        call.leave()
        raise


async def end(stream: Stream[Any, Any], failed: Failed) -> None:
    """Say so, if anybody is there."""
    status, message, metadata = failed.failure
    try:
        await stream.send_trailing_metadata(status=status, status_message=message, metadata=metadata)
    except Exception:
        if not gone(stream):
            raise
