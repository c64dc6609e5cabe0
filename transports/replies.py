"""The life of one generation request at the edge, and its reply in one piece.

What it is: `Job` (submits one Submit a prompt, collects how they end, cancels), and `WholeReply`, the Job that gathers everything and
answers with one JSON body; the two shapes of log-probabilities.
What it does not know: SSE (sse.py is the other Job), routes, how rows arrive.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec

from penstock.core.errors import EngineFailure, EngineUnavailable, PenstockError
from penstock.core.messages import Finished, RowExtra, Submit, TokenLogprobs
from penstock.core.telemetry_traces import gen_ai_attributes
from penstock.transports.gateway import Batch, CancelCause, Gateway
from penstock.transports.openai import Call
from penstock.transports.request import (
    JsonReply,
    Receive,
    RequestContext,
    Scope,
    Send,
    error_reply,
    ignored_header,
    sane_id,
)

LOWEST_LOGPROB = -9999.0
"""JSON has no -inf."""


def row_error(extra: RowExtra | None) -> PenstockError:
    """The error of a row that ended its choice with "error" or with an "abort" that the client did not ask for."""
    message = (extra.error if extra else None) or "The engine failed while this request ran."
    code = (extra.error_code if extra else None) or "engine_failure"
    if code in ("engine_unavailable", "draining", "queue_full"):
        return EngineUnavailable(message, code=code, retry_after_s=1.0)
    return EngineFailure(message, code=code)


def usage_of(prompt: int, output: int, cached: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


# ------------------------------------------------------------------ log-probabilities


def _name(position: TokenLogprobs, i: int, as_ids: bool) -> str:
    return f"token_id:{position.ids[i]}" if as_ids else position.texts[i]


def chat_logprobs(positions: list[TokenLogprobs], as_ids: bool) -> dict[str, Any]:
    """Chat's shape: {"content": [{token, logprob, bytes, top_logprobs}], "refusal": null}."""
    content = []
    for p in positions:
        entries = [
            {"token": _name(p, i, as_ids), "logprob": max(p.logprobs[i], LOWEST_LOGPROB), "bytes": list(p.bytes_[i])}
            for i in range(len(p.ids))
        ]
        content.append({**entries[0], "top_logprobs": entries[1:]})
    return {"content": content, "refusal": None}


def completion_logprobs(positions: list[TokenLogprobs | None], as_ids: bool, offset: int) -> tuple[dict[str, Any], int]:
    """Completions' shape: parallel lists; `offset` is where the first token begins in the text. Returns the end offset too.

    A position without log-probabilities (the first of a prompt) has null ones.
    """
    tokens: list[str] = []
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for p in positions:
        offsets.append(offset)
        if p is None or not p.logprobs:
            tokens.append(_name(p, 0, as_ids) if p is not None and p.ids else "")
            values.append(None)
            tops.append(None)
            offset += len(p.texts[0]) if p is not None and p.texts else 0
            continue
        tokens.append(_name(p, 0, as_ids))
        values.append(max(p.logprobs[0], LOWEST_LOGPROB))
        top = {_name(p, i, as_ids): max(p.logprobs[i], LOWEST_LOGPROB) for i in range(1, len(p.ids))}
        top.setdefault(tokens[-1], values[-1] or 0.0)
        tops.append(top)
        offset += len(p.texts[0])
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}, offset


def prompt_logprobs_json(positions: list[TokenLogprobs | None]) -> list[dict[str, Any] | None]:
    """vLLM's shape: per prompt token null or {token id: {logprob, rank, decoded_token}}."""
    return [
        None
        if p is None or not p.logprobs
        else {
            str(p.ids[i]): {
                "logprob": max(p.logprobs[i], LOWEST_LOGPROB),
                "rank": p.ranks[i] if i < len(p.ranks) else None,
                "decoded_token": p.texts[i],
            }
            for i in range(len(p.ids))
        }
        for p in positions
    ]


# ------------------------------------------------------------------ the request's life


class Job:
    """One HTTP request: as many keys as prompts. Subclasses say what happens with rows and at the end."""

    def __init__(self, gateway: Gateway, call: Call, context: RequestContext) -> None:
        self.gateway = gateway
        self.call = call
        self.context = context
        rid = sane_id(call.request_id) if call.request_id and b"x-request-id" not in context.headers else None
        if rid is not None:
            context.rid = rid
        self.id = ("chatcmpl-" if call.kind == "chat" else "cmpl-") + context.rid
        self.created = time.time_ns() // 1_000_000_000
        self.model = call.model or gateway.model_name
        self.keys: list[int] = []
        self.ended: list[Finished] = []
        self.error: PenstockError | None = None

    def begin(self) -> None:
        """Take a place and submit every prompt. Raises the error to answer with; then nothing is left behind."""
        gateway, call, context = self.gateway, self.call, self.context
        gateway.enter()
        try:
            for index, prompt in enumerate(call.prompts):
                submit = Submit(
                    key=gateway.next_key(),
                    edge=gateway.edge,
                    rid=context.rid,
                    kind=call.kind,
                    model=self.model,
                    sampling=call.sampling,
                    explicit=call.explicit,
                    traceparent=context.span.traceparent,
                    tracestate=context.span.tracestate,
                    received_ns=context.started_ns,
                    **call.fields,
                    **prompt,
                )
                gateway.submit(submit, self.leg(index))
                self.keys.append(submit.key)
        except BaseException:
            self.cancel("client")
            gateway.leave()
            raise
        context.span.submitted()
        if gateway.tracing.enabled:
            self._name_span()

    def _name_span(self) -> None:
        operation = "chat" if self.call.kind == "chat" else "text_completion"
        attributes = gen_ai_attributes(self.call.kind, self.model, self.call.sampling, stream=self.call.stream)
        self.context.span.name(f"{operation} {self.model}", {**attributes, "gen_ai.output.type": "text"})

    def leg(self, index: int) -> Any:
        """The sink of prompt `index`."""
        raise NotImplementedError

    def leg_finished(self, message: Finished) -> None:
        self.ended.append(message)
        if len(self.ended) == len(self.call.prompts):
            self.context.span.answered()
            self.complete()

    def leg_failed(self, error: PenstockError) -> None:
        """The first failure ends the whole request."""
        if self.error is None:
            self.error = error
            self.cancel("client")
            self.broken(error)

    def complete(self) -> None:
        """Every prompt is answered."""
        raise NotImplementedError

    def broken(self, error: PenstockError) -> None:
        """The request failed; its keys are cancelled."""
        raise NotImplementedError

    def cancel(self, cause: CancelCause) -> None:
        for key in self.keys:
            self.gateway.cancel(key, cause)

    def usage(self) -> dict[str, Any]:
        dropped = sum(m.output_tokens for m in self.ended) if self.call.echo_only else 0
        return usage_of(
            sum(m.prompt_tokens for m in self.ended),
            sum(m.output_tokens for m in self.ended) - dropped,
            sum(m.cached_tokens for m in self.ended),
        )

    def summarize(self, reasons: list[str]) -> None:
        """Span attributes of the whole reply."""
        if self.gateway.tracing.enabled:
            usage = self.usage()
            self.context.summary = {
                "gen_ai.response.id": self.id,
                "gen_ai.response.model": self.model,
                "gen_ai.response.finish_reasons": reasons,
                "gen_ai.usage.input_tokens": usage["prompt_tokens"],
                "gen_ai.usage.output_tokens": usage["completion_tokens"],
                "gen_ai.usage.cache_read.input_tokens": usage["prompt_tokens_details"]["cached_tokens"],
            }

    def timings(self) -> dict[str, Any]:
        """For `x-include-metrics: 1`. Seconds; of several prompts the longest."""
        start = self.context.started_ns
        first = [m.first_token_ns for m in self.ended if m.first_token_ns]
        return {
            "queue_s": max(m.queue_ns for m in self.ended) / 1e9,
            "prefill_s": max(m.prefill_ns for m in self.ended) / 1e9,
            "decode_s": max(m.decode_ns for m in self.ended) / 1e9,
            "time_to_first_token_s": (min(first) - start) / 1e9 if first else None,
            "total_s": (time.monotonic_ns() - start) / 1e9,
            "preemptions": sum(m.preemptions for m in self.ended),
        }


async def watch(receive: Receive) -> None:
    """Return when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


# ------------------------------------------------------------------ the whole reply


class Prompt:
    """What came back about one prompt itself, with the first row(s) of whichever choice."""

    __slots__ = ("ids", "logprobs", "text")

    def __init__(self) -> None:
        self.ids: list[int] | None = None
        self.logprobs: list[TokenLogprobs | None] = []
        self.text = ""

    def take(self, extra: RowExtra) -> None:
        if extra.prompt_token_ids is not None:
            self.ids = extra.prompt_token_ids.tolist()
        if extra.prompt_logprobs:
            self.logprobs += extra.prompt_logprobs
        if extra.prompt_text:
            self.text = extra.prompt_text

    def echoed(self) -> list[TokenLogprobs | None]:
        """The prompt's positions for an echo; the first one, which nothing predicts, gets the text that the others leave over."""
        positions = list(self.logprobs)
        if positions and positions[0] is None:
            rest = sum(len(p.texts[0]) for p in positions[1:] if p is not None and p.texts)
            first = self.text[: max(0, len(self.text) - rest)]
            token = self.ids[0] if self.ids else -1
            positions[0] = TokenLogprobs(ids=[token], logprobs=[], ranks=[], texts=[first], bytes_=[first.encode()])
        return positions


class _Choice:
    __slots__ = ("logprobs", "pieces", "reason", "stop_reason", "tokens")

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.reason = ""
        self.stop_reason: int | str | None = None


class _WholeLeg:
    __slots__ = ("_job", "choices", "prompt")

    def __init__(self, job: WholeReply, n: int) -> None:
        self._job = job
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
                self._job.leg_failed(row_error(extra))

    def finished(self, message: Finished) -> None:
        self._job.leg_finished(message)

    def failed(self, error: PenstockError) -> None:
        self._job.leg_failed(error)


class WholeReply(Job):
    """Gathers everything, then answers once. An ASGI application; raises what `begin` raises before it sends anything."""

    def __init__(self, gateway: Gateway, call: Call, context: RequestContext) -> None:
        super().__init__(gateway, call, context)
        self._legs = [_WholeLeg(self, call.n) for _ in call.prompts]
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
            "system_fingerprint": self.gateway.fingerprint,
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
            positions = leg.prompt.echoed() if call.echo else []
            if call.echo_only:
                text = leg.prompt.text
            else:
                positions += choice.logprobs
                text = leg.prompt.text + text if call.echo else text
            out = {
                "index": index,
                "text": text,
                "logprobs": None if call.top_logprobs is None else completion_logprobs(positions, call.tokens_as_ids, 0)[0],
                "finish_reason": "length" if call.echo_only else choice.reason,
            }
            if call.prompt_logprobs:
                out["prompt_logprobs"] = prompt_logprobs_json(leg.prompt.logprobs)
            if call.return_token_ids:
                out["prompt_token_ids"] = leg.prompt.ids
        out["stop_reason"] = None if call.echo_only else choice.stop_reason
        if call.return_token_ids:
            out["token_ids"] = [] if call.echo_only else choice.tokens
        return out
