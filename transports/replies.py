"""A generation request answered in one piece.

What it is: `WholeReply`, the Job that gathers all rows and answers with one JSON body.
What it does not know: event streams (sse.py is the other Job), routes, how rows arrive.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from penstock.core.protocol.errors import PenstockError
from penstock.core.protocol.messages import Finished, TokenLogprobs
from penstock.transports.gateway import Batch, Gateway
from penstock.transports.job import Job, Prompt, error_fields, row_error, watch
from penstock.transports.logprobs import TextOffsets, chat_logprobs, completion_logprobs, prompt_logprobs_json
from penstock.transports.openai import Call
from penstock.transports.request import JsonReply, Receive, RequestContext, Scope, Send, error_reply, ignored_header


class _Choice:
    __slots__ = ("logprobs", "pieces", "reason", "stop_reason", "tokens")

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.reason = ""
        self.stop_reason: int | str | None = None


class _WholeLeg:
    __slots__ = ("_base", "_job", "choices", "prompt")

    def __init__(self, job: WholeReply, index: int, n: int) -> None:
        self._job = job
        self._base = index * n
        self.choices = [_Choice() for _ in range(n)]
        self.prompt = Prompt()

    def row(self, choice: int, text: str, reason: str, row: int, batch: Batch) -> None:
        mine = self.choices[choice]
        if text:
            mine.pieces.append(text)
        if self._job.call.return_token_ids:
            mine.tokens += batch.tokens(row)
        extra = batch.extra(row)
        if extra is not None:
            self.prompt.take(extra)
            if extra.logprobs:
                mine.logprobs += extra.logprobs
        if reason:
            mine.reason = reason
            if extra is not None:
                mine.stop_reason = extra.stop_reason
            if reason in ("error", "abort"):
                self._job.choice_failed(self._base + choice, row_error(extra))

    def finished(self, message: Finished) -> None:
        self._job.leg_finished(message)

    def failed(self, error: PenstockError) -> None:
        self._job.leg_failed(error)


class WholeReply(Job):
    """Gathers everything, then answers once. An ASGI application; raises what `begin` raises before it sends anything."""

    def __init__(self, gateway: Gateway, call: Call, context: RequestContext) -> None:
        super().__init__(gateway, call, context)
        self._legs = [_WholeLeg(self, index, call.n) for index in range(len(call.prompts))]
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def leg(self, index: int) -> _WholeLeg:
        return self._legs[index]

    def complete(self) -> None:
        if not self._done.done():
            self._done.set_result(None)

    def broken(self, error: PenstockError) -> None:
        if not self._done.done():
            self._done.set_result(None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.gateway.soon_ready(self.model)
        self.begin()
        watcher = asyncio.get_running_loop().create_task(watch(receive))
        watcher.add_done_callback(self._gone)
        try:
            await self._done
        finally:
            watcher.cancel()
            self.cancel("disconnect")  # of what still runs, if this was cancelled
            self.gateway.leave()
        if self.context.status == 499:
            return
        if self.error is not None:
            await error_reply(self.error)(scope, receive, send)
            return
        await JsonReply(self._body(), headers=ignored_header(self.call.ignored))(scope, receive, send)

    def _gone(self, watcher: asyncio.Task[None]) -> None:
        if not watcher.cancelled() and not self._done.done():
            self.context.status = 499
            self.cancel("disconnect")
            self._done.set_result(None)

    def _body(self) -> bytes:
        call = self.call
        chat = call.kind == "chat"
        choices = [
            self._choice_json(i * call.n + j, leg, choice) for i, leg in enumerate(self._legs) for j, choice in enumerate(leg.choices)
        ]
        body: dict[str, Any] = {
            "id": self.id,
            "object": "chat.completion" if chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "usage": self.usage(),
            "system_fingerprint": self.door.fingerprint,
        }
        if chat:
            prompt = self._legs[0].prompt
            if call.prompt_logprobs:
                body["prompt_logprobs"] = prompt_logprobs_json(prompt.logprobs)
            if call.return_token_ids:
                body["prompt_token_ids"] = prompt.ids
        if self.context.include_metrics:
            body["metrics"] = self.timings()
        self.summarize([c["finish_reason"] for c in choices])
        return msgspec.json.encode(body)

    def _choice_json(self, index: int, leg: _WholeLeg, choice: _Choice) -> dict[str, Any]:
        call = self.call
        text = "".join(choice.pieces)
        if call.kind == "chat":
            out: dict[str, Any] = {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None if call.top_logprobs is None else chat_logprobs(choice.logprobs, call.tokens_as_ids),
                "finish_reason": choice.reason,
            }
        else:
            before = leg.prompt.text if call.echo else ""
            logprobs = None
            if call.top_logprobs is not None:
                positions = [*(leg.prompt.echoed() if call.echo else ()), *choice.logprobs]
                offsets = [*(leg.prompt.offsets if call.echo else ()), *TextOffsets(len(before)).of(choice.logprobs)]
                end = len(before) + len(text)  # tokens that stopped the answer are no part of it
                logprobs = completion_logprobs(positions, call.tokens_as_ids, [min(offset, end) for offset in offsets])
            out = {
                "index": index,
                "text": before + text,
                "logprobs": logprobs,
                "finish_reason": choice.reason,
            }
            if call.prompt_logprobs:
                out["prompt_logprobs"] = prompt_logprobs_json(leg.prompt.logprobs)
            if call.return_token_ids:
                out["prompt_token_ids"] = leg.prompt.ids
        out["stop_reason"] = choice.stop_reason
        if index in self.failed:
            out["error"] = error_fields(self.failed[index])
        if call.return_token_ids:
            out["token_ids"] = choice.tokens
        return out
