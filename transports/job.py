"""The life of one generation request at the edge.

What it is: `Job` submits one Submit a prompt, collects how they end, and cancels them; `Prompt` is what comes back about a prompt itself.
replies.py and sse.py say what a client gets to see of it.
What it does not know: bodies, events, routes, how rows arrive.
"""

from __future__ import annotations

import abc
import time
from typing import Any

from penstock.core.protocol.errors import EngineFailure, EngineUnavailable, InvalidRequest, PenstockError
from penstock.core.protocol.messages import Finished, RowExtra, Submit, TokenLogprobs
from penstock.core.telemetry.traces import gen_ai_attributes
from penstock.transports.gateway import CancelCause, Gateway
from penstock.transports.ids import public_id
from penstock.transports.openai import Call
from penstock.transports.request import Receive, RequestContext, sane_id


def row_error(extra: RowExtra | None) -> PenstockError:
    """The error of a row that ended its choice with "error" or with an "abort" that the client did not ask for."""
    message = (extra.error if extra else None) or "The engine failed while this request ran."
    code = (extra.error_code if extra else None) or "engine_failure"
    if code in ("engine_unavailable", "draining", "queue_full"):
        return EngineUnavailable(message, code=code, retry_after_s=1.0)
    if code == InvalidRequest.default_code:  # the request's own settings made it impossible to go on
        return InvalidRequest(message)
    return EngineFailure(message, code=code)


def error_fields(error: PenstockError) -> dict[str, Any]:
    """What a choice that failed alone says about itself."""
    return {"message": error.message, "type": error.type, "code": error.code}


def usage_of(prompt: int, output: int, cached: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


class Prompt:
    """What came back about one prompt itself, with the first row(s) of whichever choice."""

    __slots__ = ("first", "ids", "logprobs", "offsets", "text")

    def __init__(self) -> None:
        self.ids: list[int] | None = None
        self.logprobs: list[TokenLogprobs | None] = []
        self.offsets: list[int] = []
        self.first = b""
        self.text = ""

    def take(self, extra: RowExtra) -> None:
        if extra.prompt_token_ids is not None:
            self.ids = extra.prompt_token_ids.tolist()
        if extra.prompt_logprobs:
            self.logprobs += extra.prompt_logprobs
        if extra.prompt_text:
            self.text = extra.prompt_text
        if extra.prompt_offsets:
            self.offsets = extra.prompt_offsets
            self.first = extra.prompt_first

    def echoed(self) -> list[TokenLogprobs | None]:
        """The prompt's positions for an echo; the first one, which nothing predicts, has its token alone."""
        positions = list(self.logprobs)
        if positions and positions[0] is None:
            token = self.ids[0] if self.ids else -1
            text = self.first.decode("utf-8", "replace")
            positions[0] = TokenLogprobs(ids=[token], logprobs=[], ranks=[], texts=[text], bytes_=[self.first])
        return positions


class Job(abc.ABC):
    """One HTTP request: as many keys as prompts. Subclasses say what happens with rows and at the end."""

    def __init__(self, gateway: Gateway, call: Call, context: RequestContext) -> None:
        self.gateway = gateway
        self.call = call
        self.context = context
        rid = sane_id(call.request_id) if call.request_id and b"x-request-id" not in context.headers else None
        if rid is not None:
            context.rid = rid
        self.model = call.model or gateway.model_name
        self.door = gateway.door(self.model)
        self.id = public_id("chatcmpl-" if call.kind == "chat" else "cmpl-", context.rid, self.door.pool.text)
        self.created = time.time_ns() // 1_000_000_000
        self.keys: list[int] = []
        self.ended: list[Finished] = []
        self.error: PenstockError | None = None
        self.failed: dict[int, PenstockError] = {}
        """Choices (by their index in the reply) that failed for the client's reasons; the others go on."""

    def begin(self) -> None:
        """Take a place and submit every prompt. Raises the error to answer with; then nothing is left behind."""
        gateway, call, context = self.gateway, self.call, self.context
        gateway.enter(self.model)
        sent_ns = time.monotonic_ns()
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
                    tenant=context.tenant,
                    traceparent=context.span.traceparent,
                    tracestate=context.span.tracestate,
                    received_ns=context.started_ns,
                    sent_ns=sent_ns,
                    to_wall_ns=context.span.to_wall_ns,
                    **call.fields,
                    **prompt,
                )
                gateway.submit(submit, self.leg(index))
                self.keys.append(submit.key)
        except BaseException:
            self.cancel("client")
            gateway.leave()
            raise
        context.span.submitted(sent_ns)
        if gateway.tracing.enabled:
            self._name_span()

    def _name_span(self) -> None:
        operation = "chat" if self.call.kind == "chat" else "text_completion"
        attributes = gen_ai_attributes(self.call.kind, self.model, self.call.sampling, stream=self.call.stream)
        self.context.span.name(f"{operation} {self.model}", {**attributes, "gen_ai.output.type": "text"})

    @abc.abstractmethod
    def leg(self, index: int) -> Any:
        """The sink of prompt `index`."""

    def leg_finished(self, message: Finished) -> None:
        self.ended.append(message)
        if len(self.ended) == len(self.call.prompts):
            self.context.span.answered(message.done_ns or time.monotonic_ns())
            if len(self.failed) == self.choices:
                self.error = self.failed[0]
                self.broken(self.error)
            elif self.error is None:
                self.complete()

    @property
    def choices(self) -> int:
        return self.call.n * len(self.call.prompts)

    def choice_failed(self, index: int, error: PenstockError) -> bool:
        """A row ended its choice with an error. What the client can mend ends that choice alone (True), unless nothing else is left; anything
        else ends the request."""
        if error.status < 500:
            self.failed[index] = error
            return True
        self.leg_failed(error)
        return False

    def leg_failed(self, error: PenstockError) -> None:
        """The first failure ends the whole request."""
        if self.error is None:
            self.error = error
            self.cancel("client")
            self.broken(error)

    @abc.abstractmethod
    def complete(self) -> None:
        """Every prompt is answered."""

    @abc.abstractmethod
    def broken(self, error: PenstockError) -> None:
        """The request failed; its keys are cancelled."""

    def cancel(self, cause: CancelCause) -> None:
        for key in self.keys:
            self.gateway.cancel(key, cause)

    def usage(self) -> dict[str, Any]:
        return usage_of(
            sum(m.prompt_tokens for m in self.ended),
            sum(m.output_tokens for m in self.ended),
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
