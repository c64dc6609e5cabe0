"""A client of Penstock's WebSocket, for asyncio: many streams on one connection, which come back after it broke.

What it is: `Client` and `Stream`: start, iterate, pause, resume, stop, cancel, attach. A stream that is kept (`retain_s` in its body, or the header x-penstock-retain) goes on at the next message when the connection is lost.
What it does not know: what payloads say; anything of the server but the protocol `penstock.v1` (docs/streams.md).

    async with Client("http://127.0.0.1:8000") as client:
        async for chunk in await client.start("/v1/chat/completions", {"messages": [...], "stream": True, "retain_s": 60}):
            ...
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import secrets
from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake

PROTOCOL = "penstock.v1"
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 2.0


class StreamError(Exception):
    """The server's word that a stream has failed, or that something could not be done. `error`: the error object of the API that was asked; `status`: as over HTTP."""

    def __init__(self, error: dict[str, Any], status: int) -> None:
        super().__init__(str(error.get("message", error)))
        self.error = error
        self.status = status
        self.code = error.get("code")


class Stream:
    """Payloads of one request, as an asynchronous iterator, which raises StreamError where the stream fails, and ConnectionError where the connection was lost and the stream is not kept.
    `stream_id`: its x-request-id, "" until it is known; `seq`: of the last message that came. What is not read is kept here: pause a stream that is too quick."""

    def __init__(self, client: Client, id: str, start: dict[str, Any], *, kept: bool) -> None:
        self._client = client
        self._id = id
        self._start = start
        self._kept = kept
        self._seen = start["op"] == "attach"
        self._arrived: asyncio.Queue[Any] = asyncio.Queue()
        self._asked: deque[asyncio.Future[None]] = deque()
        self._over = False
        self.stream_id: str = start.get("stream") or start.get("headers", {}).get("x-request-id", "")
        self.seq: int = start.get("after", 0)

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        came = await self._arrived.get()
        if came is None or isinstance(came, Exception):
            self._arrived.put_nowait(came)  # who asks again hears it again
            raise came if came is not None else StopAsyncIteration
        return came

    async def pause(self) -> None:
        """Nothing is produced until `resume`. As the others: returns when it is so, or the stream has ended; raises StreamError."""
        await self._do("pause")

    async def resume(self) -> None:
        await self._do("resume")

    async def stop(self) -> None:
        """End it with what there is."""
        await self._do("stop")

    async def cancel(self) -> None:
        """End it with an error."""
        await self._do("cancel")

    async def _do(self, op: str) -> None:
        if self._over:
            return
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._asked.append(answer)
        await self._client._say({"op": op, "id": self._id})
        await answer

    # --- the client's side

    def _take(self, said: dict[str, Any]) -> bool:
        """Is that the last of it?"""
        if "op" in said:
            if said["op"] == "start":  # refused by the socket
                return self._end(StreamError(said["error"], said["status"]))
            if self._asked and not (answer := self._asked.popleft()).done():
                if "error" in said:
                    answer.set_exception(StreamError(said["error"], said["status"]))
                else:
                    answer.set_result(None)
        elif "data" in said:
            self.seq = said["seq"]
            self._arrived.put_nowait(said["data"])
        elif "stream" in said:
            self.stream_id, self._seen = said["stream"], True
        elif "error" in said:
            return self._end(StreamError(said["error"], said["status"]))
        elif "done" in said:
            return self._end(None)
        return False

    def _end(self, how: Exception | None) -> bool:
        self._over = True
        self._arrived.put_nowait(how)
        while self._asked:
            answer = self._asked.popleft()
            if not answer.done():
                answer.set_result(None)
        return True


class Client:
    """`url`: of the server, http:// or https://. `attempts`: to reach it again once a connection is lost. Other options are those of websockets.connect."""

    def __init__(self, url: str, *, key: str | None = None, attempts: int = 8, **options: Any) -> None:
        self._url = "ws" + url.removeprefix("http").rstrip("/") + "/v1/stream"
        self._attempts = attempts
        headers = {"authorization": f"Bearer {key}"} if key is not None else {}
        self._options: dict[str, Any] = {"subprotocols": [PROTOCOL], "additional_headers": headers, "max_size": None} | options
        self._ids = map(str, itertools.count(1))
        self._streams: dict[str, Stream] = {}
        self._ws: ClientConnection | None = None
        self._up = asyncio.Event()
        self._failed: Exception | None = None
        self._reader: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Client:
        self._ws = await connect(self._url, **self._options)
        self._up.set()
        self._reader = asyncio.get_running_loop().create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        if self._ws is not None:
            await self._ws.close()
        self._lose(ConnectionError("The client was closed."), everything=True)

    async def start(self, path: str, body: dict[str, Any], *, headers: Mapping[str, str] | None = None) -> Stream:
        """Have a POST endpoint answer `body`, as its API says it."""
        given = {name.lower(): value for name, value in (headers or {}).items()}
        kept = bool(body.get("retain_s") or body.get("on_disconnect") not in (None, "cancel") or "x-penstock-retain" in given)
        if kept:
            given.setdefault("x-request-id", secrets.token_hex(16))
        return await self._begin({"op": "start", "path": path, "body": body, "headers": given}, kept=kept)

    async def attach(self, stream_id: str, after: int = 0) -> Stream:
        """Go on with a stream that is kept, behind its message `after`."""
        return await self._begin({"op": "attach", "stream": stream_id, "after": after}, kept=True)

    async def _begin(self, message: dict[str, Any], *, kept: bool) -> Stream:
        await self._up.wait()
        if self._failed is not None:
            raise self._failed
        id = next(self._ids)
        message["id"] = id
        stream = self._streams[id] = Stream(self, id, message, kept=kept)
        await self._say(message)
        return stream

    async def _say(self, message: dict[str, Any]) -> None:
        if self._ws is not None:
            with contextlib.suppress(ConnectionClosed):  # the reader sees it too, and does what is to be done
                await self._ws.send(json.dumps(message))

    async def _read(self) -> None:
        while self._ws is not None:
            with contextlib.suppress(ConnectionClosed):
                async for text in self._ws:
                    said = json.loads(text)
                    stream = self._streams.get(said.get("id"))
                    if stream is None or self._once_more(stream, said):
                        continue
                    if stream._take(said):
                        del self._streams[stream._id]
            self._up.clear()
            error = ConnectionError("The connection to the server was lost.")
            self._lose(error, everything=False)
            await self._again(error)

    def _once_more(self, stream: Stream, said: dict[str, Any]) -> bool:
        """A start that was lost with the connection before the server saw it is said again; it cannot run twice."""
        lost = "op" not in said and "error" in said and not stream._seen and said["error"].get("code") == "stream_not_found"
        if lost:
            asyncio.get_running_loop().create_task(self._say(stream._start))
        return lost

    def _lose(self, error: Exception, *, everything: bool) -> None:
        for id, stream in list(self._streams.items()):
            if everything or not stream._kept:
                del self._streams[id]
                stream._end(error)

    async def _again(self, error: Exception) -> None:
        """Reach the server again, and go on with what it keeps."""
        pause = FIRST_PAUSE_S
        for _ in range(self._attempts):
            try:
                self._ws = await connect(self._url, **self._options)
            except (OSError, InvalidHandshake, TimeoutError):
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
                continue
            for stream in self._streams.values():
                while stream._asked:  # whether it was done is not known
                    answer = stream._asked.popleft()
                    if not answer.done():
                        answer.set_exception(error)
                await self._say({"op": "attach", "id": stream._id, "stream": stream.stream_id, "after": stream.seq})
            self._up.set()
            return
        self._ws = None
        self._failed = error
        self._lose(error, everything=True)
        self._up.set()
