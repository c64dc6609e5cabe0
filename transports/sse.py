"""Server-sent events of a generation request, exactly as OpenAI's clients expect them.

What it is: `StreamReply`, the Job that encodes rows as events. Built for speed: everything around the text is encoded once a choice; a plain row
costs one JSON string and one append; rows that arrive together leave in one write.
What it does not know: how rows arrive, routes, slow clients beyond calling their outbox.

Order of a stream: per choice a chunk with the role (chat), content chunks, one chunk with an empty delta and the finish_reason; then, if asked
for, a chunk with no choices and the usage; then [DONE]. A failed stream ends with an error event and without [DONE].
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import msgspec

from penstock.core.protocol.errors import PenstockError
from penstock.core.protocol.messages import Finished, RowExtra
from penstock.transports.gateway import Batch, CancelCause, Gateway
from penstock.transports.job import Job, Prompt, error_fields, row_error, usage_of, watch
from penstock.transports.logprobs import TextOffsets, chat_logprobs, completion_logprobs
from penstock.transports.openai import Call
from penstock.transports.outbox import Outbox, Pulse
from penstock.transports.request import Receive, RequestContext, Scope, Send, error_body, error_reply, ignored_header

log = logging.getLogger("penstock.edge.sse")

DONE = b"data: [DONE]\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]

_json = msgspec.json.Encoder().encode


class _StreamLeg:
    """One prompt's rows as events. `_plain` marks streams whose content chunks carry nothing but text."""

    __slots__ = ("_base", "_job", "_offsets", "_opened", "_plain", "_prompt", "_push")

    def __init__(self, job: StreamReply, index: int) -> None:
        call = job.call
        self._job = job
        self._base = index * call.n
        self._push = job.outbox.push
        self._opened = [False] * call.n
        self._offsets = [TextOffsets() for _ in range(call.n)]
        self._prompt = Prompt()
        self._plain = not (call.return_token_ids or call.continuous_usage or call.top_logprobs is not None)

    def row(self, choice: int, text: str, reason: str, row: int, batch: Batch) -> None:
        job = self._job
        extra = batch.extra(row)
        if extra is not None:
            self._prompt.take(extra)
        index = self._base + choice
        if (reason == "error" or reason == "abort") and (not job.choice_failed(index, row_error(extra)) or (job.choices == 1 and not text)):
            return
        if not self._opened[choice]:
            self._opened[choice] = True
            job.open_choice(index, self._prompt, batch, row)
            if job.call.echo:
                self._echo(index, choice, row, batch)
        if self._plain:
            if text:
                head, tail = job.frames[index]
                self._push(head + _json(text) + tail)
        else:
            self._rich(index, choice, text, row, batch, extra)
        if reason and not (job.choices == 1 and index in job.failed):  # that one's error is the request's, and comes next
            job.close_choice(index, reason, extra, self._usage(row, batch))

    def _echo(self, index: int, choice: int, row: int, batch: Batch) -> None:
        logprobs = None
        self._offsets[choice] = TextOffsets(len(self._prompt.text))
        if self._job.call.top_logprobs is not None:
            logprobs = completion_logprobs(self._prompt.echoed(), self._job.call.tokens_as_ids, self._prompt.offsets)
        self._push(self._job.content(index, self._prompt.text, logprobs, None, self._usage(row, batch)))

    def _rich(self, index: int, choice: int, text: str, row: int, batch: Batch, extra: RowExtra | None) -> None:
        call = self._job.call
        logprobs: dict[str, Any] | None = None
        if call.top_logprobs is not None and extra is not None and extra.logprobs:
            if call.kind == "chat":
                logprobs = chat_logprobs(extra.logprobs, call.tokens_as_ids)
            else:
                logprobs = completion_logprobs(extra.logprobs, call.tokens_as_ids, self._offsets[choice].of(extra.logprobs))
        tokens = batch.tokens(row) if call.return_token_ids else None
        if text or logprobs or tokens:
            self._push(self._job.content(index, text, logprobs, tokens, self._usage(row, batch)))

    def _usage(self, row: int, batch: Batch) -> dict[str, Any] | None:
        if not self._job.call.continuous_usage:
            return None
        return usage_of(batch.column("prompt_tokens")[row], batch.column("output_tokens")[row], batch.column("cached_tokens")[row])

    def finished(self, message: Finished) -> None:
        self._job.leg_finished(message)

    def failed(self, error: PenstockError) -> None:
        self._job.leg_failed(error)


class StreamReply(Job):
    """Answers with an event stream. An ASGI application; raises what `begin` raises before it sends anything."""

    def __init__(self, gateway: Gateway, call: Call, context: RequestContext, pulse: Pulse) -> None:
        super().__init__(gateway, call, context)
        self._pulse = pulse
        self.outbox = Outbox(gateway.config, self._park, self._unpark, self._cut)
        self._started = False
        self._reasons: list[str] = []
        chat = call.kind == "chat"
        self._object = "chat.completion.chunk" if chat else "text_completion"
        head = {
            "id": self.id,
            "object": self._object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.door.fingerprint,
        }
        self._head = b"data: " + _json(head)[:-1]
        self._tail = b',"usage":null}\n\n' if call.include_usage else b"}\n\n"
        self.frames = [self._frame(index) for index in range(call.n * len(call.prompts))]

    def _frame(self, index: int) -> tuple[bytes, bytes]:
        """What stands before and after the text of a plain content chunk."""
        if self.call.kind == "chat":
            return (
                self._head + b',"choices":[{"index":%d,"delta":{"content":' % index,
                b'},"logprobs":null,"finish_reason":null}]' + self._tail,
            )
        return (
            self._head + b',"choices":[{"index":%d,"text":' % index,
            b',"logprobs":null,"finish_reason":null,"stop_reason":null}]' + self._tail,
        )

    # --- events

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None, **more: Any) -> bytes:
        body = self._head + b',"choices":' + _json(choices)
        for name, value in more.items():
            body += b',"%s":%s' % (name.encode(), _json(value))
        return body + (b',"usage":%s}\n\n' % _json(usage) if usage is not None else self._tail)

    def open_choice(self, index: int, prompt: Prompt, batch: Batch, row: int) -> None:
        """Chat: the role chunk. Both: the prompt's ids with the first chunk, if asked for."""
        want_ids = self.call.return_token_ids
        if self.call.kind == "chat":
            choice = {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            usage = None
            if self.call.continuous_usage:
                usage = usage_of(batch.column("prompt_tokens")[row], 0, batch.column("cached_tokens")[row])
            more = {"prompt_token_ids": prompt.ids} if want_ids and index == 0 else {}
            self.outbox.push(self._event([choice], usage, **more))
        elif want_ids:
            choice = {"index": index, "text": "", "logprobs": None, "finish_reason": None, "stop_reason": None}
            choice |= {"prompt_token_ids": prompt.ids, "token_ids": []}
            self.outbox.push(self._event([choice], None))

    def content(
        self, index: int, text: str, logprobs: dict[str, Any] | None, tokens: list[int] | None, usage: dict[str, Any] | None
    ) -> bytes:
        choice: dict[str, Any] = {"index": index}
        if self.call.kind == "chat":
            choice["delta"] = {"content": text}
        else:
            choice["text"] = text
        choice |= {"logprobs": logprobs, "finish_reason": None}
        if self.call.kind == "completion":
            choice["stop_reason"] = None
        if tokens is not None:
            choice["token_ids"] = tokens
        return self._event([choice], usage)

    def close_choice(self, index: int, reason: str, extra: RowExtra | None, usage: dict[str, Any] | None) -> None:
        """The one chunk with a finish_reason; it carries no content."""
        self._reasons.append(reason)
        choice: dict[str, Any] = {"index": index}
        choice["delta" if self.call.kind == "chat" else "text"] = {} if self.call.kind == "chat" else ""
        choice |= {"logprobs": None, "finish_reason": reason, "stop_reason": extra.stop_reason if extra else None}
        if index in self.failed:
            choice["error"] = error_fields(self.failed[index])
        self.outbox.push(self._event([choice], usage))

    # --- Job

    def leg(self, index: int) -> _StreamLeg:
        return _StreamLeg(self, index)

    def complete(self) -> None:
        if self.call.include_usage:
            more = {"metrics": self.timings()} if self.context.include_metrics else {}
            self.outbox.push(self._event([], self.usage(), **more))
        self.outbox.push(DONE)
        self.summarize(self._reasons)
        self.outbox.close()

    def broken(self, error: PenstockError) -> None:
        if self._started:
            self.outbox.push(b"data: " + error_body(error) + b"\n\n")
            self.outbox.close()
        else:
            self.outbox.drop()

    # --- a slow or lost client

    def _park(self) -> None:
        self.gateway.counters.add("penstock_edge_parks_total")
        for key in self.keys:
            self.gateway.park(key)

    def _unpark(self) -> None:
        for key in self.keys:
            self.gateway.unpark(key)

    def _cut(self) -> None:
        log.warning("request %s: the client reads too slowly, the stream is cut with %d bytes unsent", self.context.rid, self.outbox.unsent)
        self.gateway.counters.add("penstock_edge_cuts_total")
        self._abandon("slow_client")
        if self.context.abort is not None:
            self.context.abort()

    def _gone(self, watcher: asyncio.Task[None]) -> None:
        if not watcher.cancelled() and self.context.status != 499:
            self._abandon("disconnect")

    def _abandon(self, cause: CancelCause) -> None:
        self.context.status = 499
        self.cancel(cause)
        self.outbox.drop()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        outbox = self.outbox
        await self.gateway.soon_ready(self.model)
        self.begin()
        watcher = asyncio.get_running_loop().create_task(watch(receive))
        watcher.add_done_callback(self._gone)
        self._pulse.add(outbox)
        try:
            await outbox.wait()
            if self.context.status == 499:
                return
            if self.error is not None:
                await error_reply(self.error)(scope, receive, send)
                return
            self._started = True
            await send({"type": "http.response.start", "status": 200, "headers": HEADERS + ignored_header(self.call.ignored)})
            await self._write(self.context.raw_send)
        finally:
            watcher.remove_done_callback(self._gone)
            watcher.cancel()
            self._pulse.discard(outbox)
            outbox.drop()
            self.cancel("disconnect")  # of what still runs, if this was cancelled
            self.gateway.leave()

    async def _write(self, send: Send) -> None:
        outbox = self.outbox
        while True:
            await outbox.wait()
            data = outbox.take()
            last = outbox.last
            if self.context.status == 499:
                return
            await send({"type": "http.response.body", "body": data, "more_body": not last})
            if last:
                return
            outbox.sent(len(data))
