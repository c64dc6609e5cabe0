"""A load generator for OpenAI servers.

What it is: streamed completions over plain asyncio sockets with httptools as the parser (a general HTTP client costs more per event than
some servers do, and would measure itself). Records the arrival of every token. What it does not know: workloads, statistics.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools


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
    """One OpenAI server. `url` without /v1."""

    def __init__(self, url: str, *, model: str | None = None, key: str | None = None, timeout_s: float = 600.0) -> None:
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
        body = json.dumps(
            {
                "model": self.model,
                "prompt": prompt,
                "max_tokens": output,
                "temperature": 0,
                "stream": True,
                "ignore_eos": True,
                "return_token_ids": True,
                "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            }
        ).encode()
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
        reader, writer = await asyncio.open_connection(self.host, self.port, ssl=self.tls, limit=1 << 20)
        try:
            writer.write(self._head("POST", "/v1/completions", len(body)) + body)
            response = _Response()
            parser = httptools.HttpResponseParser(response)
            ended = False
            while not response.complete:
                data = await reader.read(1 << 18)
                if not data:
                    break
                parser.feed_data(data)
                now = time.perf_counter() - start
                record.status = parser.get_status_code()
                if record.status != 200:
                    continue
                for line in response.lines:
                    ended = self._event(record, line, now) or ended
                response.lines.clear()
            if record.status != 200:
                record.error = b"\n".join(response.lines).decode(errors="replace")[:500]
            elif not ended and record.error is None:
                record.error = "the stream ended without [DONE]"
        finally:
            writer.close()

    @staticmethod
    def _event(record: Record, line: bytes, now: float) -> bool:
        """Take one SSE line; True at the end mark. Tokens are counted from token_ids, else from usage, else one a chunk."""
        if not line.startswith(b"data: "):
            return False
        payload = line[6:].strip()
        if payload == b"[DONE]":
            return True
        event = json.loads(payload)
        if "error" in event:
            record.error = str(event["error"])
            return False
        usage = event.get("usage") or {}
        if usage:
            record.prompt_tokens = usage.get("prompt_tokens") or record.prompt_tokens
            record.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or record.cached_tokens
        for choice in event.get("choices") or []:
            if choice.get("text"):
                record.text.append(choice["text"])
            if choice.get("token_ids") is not None:
                record.tokens += [now] * len(choice["token_ids"])
            elif usage.get("completion_tokens"):
                record.tokens += [now] * (usage["completion_tokens"] - len(record.tokens))
            elif choice.get("text"):
                record.tokens.append(now)
        return False
