"""A load generator for OpenAI servers.

What it is: streamed completions over asyncio protocols with httptools as the parser (a general HTTP client costs more per event than
some servers do, and would measure itself). Records the arrival of every token. `run` drives it on uvloop.
What it does not know: workloads, statistics.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httptools
import msgspec
import uvloop


@dataclass(kw_only=True)
class Record:
    """What happened to one request. Times in seconds after the run's start; `tokens` holds one arrival time a token."""

    scheduled: float
    sent: float = 0.0
    done: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    want: int = 0
    tokens: list[float] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    status: int = 0
    error: str | None = None

    @property
    def ok(self) -> bool:
        return self.error is None and self.status == 200

    @property
    def ttft(self) -> float:
        return self.tokens[0] - self.sent

    @property
    def e2e(self) -> float:
        return self.done - self.sent

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in zip(self.tokens, self.tokens[1:], strict=False)]


T = TypeVar("T")


def run(work: Coroutine[Any, Any, T]) -> T:
    """asyncio.run on uvloop: half the cost of a chunk."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


class _Choice(msgspec.Struct, gc=False):
    text: str | None = None
    token_ids: list[int] | None = None


class _Cached(msgspec.Struct, gc=False):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Cached | None = None


class _Event(msgspec.Struct, gc=False):
    """What a chunk says that is counted; the rest is skipped without becoming objects."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode


class _Response:
    """httptools callbacks of one response; splits the body into SSE lines as they come."""

    def __init__(self) -> None:
        self.status = 0
        self.complete = False
        self.lines: list[bytes] = []
        self._rest = b""

    def on_status(self, status: bytes) -> None:
        pass

    def on_body(self, body: bytes) -> None:
        *lines, self._rest = (self._rest + body).split(b"\n")
        self.lines += lines

    def on_message_complete(self) -> None:
        self.complete = True
        if self._rest:
            self.lines.append(self._rest)


class Client:
    """One OpenAI server. `url` without /v1. `plain` asks for text alone, as most programs do: chunks count as tokens then, and the usage at the end
    must agree (a server may hold a token back until its text is whole: the rest arrives, and is counted, with the last chunk)."""

    def __init__(
        self, url: str, *, model: str | None = None, key: str | None = None, timeout_s: float = 600.0, plain: bool = False
    ) -> None:
        parts = urlsplit(url.rstrip("/").removesuffix("/v1"))
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is no http(s) URL")
        self.host = parts.hostname
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.tls = ssl.create_default_context() if parts.scheme == "https" else None
        self.base = parts.path
        self.model = model
        self.key = key
        self.timeout_s = timeout_s
        self.plain = plain

    def _head(self, method: str, path: str, length: int) -> bytes:
        auth = f"Authorization: Bearer {self.key}\r\n" if self.key else ""
        return (
            f"{method} {self.base}{path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nContent-Type: application/json\r\n"
            f"Accept: */*\r\n{auth}Connection: close\r\nContent-Length: {length}\r\n\r\n"
        ).encode()

    async def get(self, path: str) -> tuple[int, Any]:
        """Status and decoded JSON (or text)."""
        status, body = await self._whole("GET", path, b"")
        try:
            return status, json.loads(body)
        except ValueError:
            return status, body.decode(errors="replace")

    async def _whole(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        reader, writer = await asyncio.open_connection(self.host, self.port, ssl=self.tls)
        try:
            writer.write(self._head(method, path, len(body)) + body)
            response = _Response()
            parser = httptools.HttpResponseParser(response)
            while not response.complete:
                data = await asyncio.wait_for(reader.read(1 << 16), 30)
                if not data:
                    break
                parser.feed_data(data)
            return parser.get_status_code(), b"\n".join(response.lines)
        finally:
            writer.close()

    async def first_model(self) -> tuple[str, int | None]:
        """Name and context length (None where the server does not say) of the first model."""
        status, body = await self.get("/v1/models")
        if status != 200:
            raise ConnectionError(f"/v1/models answered {status}: {str(body)[:200]}")
        return str(body["data"][0]["id"]), body["data"][0].get("max_model_len")

    async def complete(self, record: Record, prompt: list[int] | str, output: int, start: float) -> Record:
        """One streamed completion of exactly `output` tokens (where the server honours ignore_eos)."""
        ask: dict[str, Any] = {"model": self.model, "prompt": prompt, "max_tokens": output, "temperature": 0}
        ask |= {"stream": True, "ignore_eos": True, "stream_options": {"include_usage": True}}
        if not self.plain:
            ask |= {"return_token_ids": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        body = json.dumps(ask).encode()
        record.want = output
        record.sent = time.perf_counter() - start
        try:
            async with asyncio.timeout(self.timeout_s):
                await self._stream(record, body, start)
        except (OSError, ValueError, TimeoutError, httptools.HttpParserError) as error:
            record.error = f"{type(error).__name__}: {error}"
        record.done = time.perf_counter() - start
        return record

    async def _stream(self, record: Record, body: bytes, start: float) -> None:
        loop = asyncio.get_running_loop()
        transport, stream = await loop.create_connection(lambda: _Stream(record, start), self.host, self.port, ssl=self.tls)
        try:
            transport.write(self._head("POST", "/v1/completions", len(body)) + body)
            await stream.done
        finally:
            transport.close()
        if record.status != 200:
            record.error = b"\n".join(stream.response.lines).decode(errors="replace")[:500] or "the connection closed without an answer"
        elif not stream.ended and record.error is None:
            record.error = "the stream ended without [DONE]"


class _Stream(asyncio.Protocol):
    """One answer, read where the loop hands over its bytes: a reader and a task for each of thousands of chunks a second would cost more than
    parsing them. `done` is set at the response's end, the connection's, or the first bytes that make no sense."""

    def __init__(self, record: Record, start: float) -> None:
        self.response = _Response()
        self.ended = False
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._record = record
        self._start = start
        self._parser = httptools.HttpResponseParser(self.response)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter() - self._start
        record, response = self._record, self.response
        try:
            self._parser.feed_data(data)
            record.status = self._parser.get_status_code()
            if record.status == 200:
                for line in response.lines:
                    self.ended = _take(record, line, now) or self.ended
                response.lines.clear()
        except (httptools.HttpParserError, msgspec.MsgspecError) as error:
            self._finish(ValueError(f"the answer makes no sense: {error}"))
        if response.complete:
            self._finish(None)

    def eof_received(self) -> None:
        self._finish(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._finish(exc)

    def _finish(self, error: Exception | None) -> None:
        if self.done.done():
            return
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(error)


def _take(record: Record, line: bytes, now: float) -> bool:
    """Take one SSE line; True at the end mark. Tokens are counted from token_ids, else from usage, else one a chunk."""
    if not line.startswith(b"data: "):
        return False
    payload = line[6:].strip()
    if payload == b"[DONE]":
        return True
    event = _decode(payload)
    if event.error is not None:
        record.error = str(event.error)
        return False
    usage = event.usage
    if usage is not None:
        record.prompt_tokens = usage.prompt_tokens or record.prompt_tokens
        if usage.prompt_tokens_details is not None:
            record.cached_tokens = usage.prompt_tokens_details.cached_tokens or record.cached_tokens
    for choice in event.choices:
        if choice.text:
            record.text.append(choice.text)
        if choice.token_ids is not None:
            record.tokens += [now] * len(choice.token_ids)
        elif usage is not None and usage.completion_tokens:
            record.tokens += [now] * (usage.completion_tokens - len(record.tokens))
        elif choice.text:
            record.tokens.append(now)
    if usage is not None and not event.choices and record.tokens:  # the end of a plain stream
        record.tokens += [now] * ((usage.completion_tokens or 0) - len(record.tokens))
    return False
