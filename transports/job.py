"""The life of one generation request at the edge.

What it is: `Job` submits one Submit a prompt, collects how they end, and cancels them. replies.py and stream.py are the two kinds; what a client gets to
see is up to the job's Voice.
What it does not know: APIs, bodies, events, routes, how rows arrive.
"""

from __future__ import annotations

import abc
import time
from typing import Any

from litestar.handlers.base import BaseRouteHandler

from penstock.core.protocol.errors import (
    Cancelled,
    EngineFailure,
    EngineUnavailable,
    InvalidRequest,
    PenstockError,
    StreamNotFound,
    Unauthorized,
    tamed,
)
from penstock.core.protocol.messages import Finished, RowExtra, Submit
from penstock.core.telemetry.traces import gen_ai_attributes
from penstock.transports.blame import must, said
from penstock.transports.gateway import CancelCause, Gateway
from penstock.transports.generation import Generation
from penstock.transports.ids import public_id
from penstock.transports.merging import Merging
from penstock.transports.request import Receive, RequestContext, sane_id
from penstock.transports.retained import Again, beginning_of
from penstock.transports.retention import retention
from penstock.transports.voice import Head, Usage, Voice

BACKGROUND = 1 << 20
"""The priority of what nobody waits for: lower ones go first."""


def row_error(extra: RowExtra | None) -> PenstockError:
    """The error of a row that ended its choice with "error" or with an "abort" that the client did not ask for."""
    message = (extra.error if extra else None) or "The engine failed while this request ran."
    code = (extra.error_code if extra else None) or "engine_failure"
    if code in ("engine_unavailable", "draining", "queue_full"):
        return EngineUnavailable(message, code=code, retry_after_s=1.0)
    if code == InvalidRequest.default_code:  # the request's own settings made it impossible to go on
        return InvalidRequest(message, param=extra.error_param if extra else None)
    if code == Cancelled.default_code:
        return Cancelled(message)
    if code == Unauthorized.default_code:
        return Unauthorized(message)
    return EngineFailure(message, code=code)


class Job(abc.ABC):
    """One HTTP request: as many keys as prompts. Subclasses say what happens with rows and at the end. Raises InvalidRequest where there is none."""

    def __init__(self, gateway: Gateway, generation: Generation, voice: Voice, context: RequestContext) -> None:
        if not generation.prompts:  # nothing would ever end it
            raise InvalidRequest("There is no prompt to answer.", param=generation.names.get("prompt", "prompt"))
        self.gateway = gateway
        self.generation = generation
        self.voice = voice
        self.context = context
        asked = generation.request_id
        rid = sane_id(asked) if asked and b"x-request-id" not in context.headers else None
        if rid is not None:
            context.rid = rid
        self.handler: BaseRouteHandler | None = None
        """The route's, which knows whose it is: for the log."""
        self.id = ""
        """The reply's, once its voice was told what to speak of."""
        self.model = generation.model or gateway.model_name
        self.door = gateway.door(self.model)
        again = context.again
        self._created = time.time_ns() // 1_000_000_000 if again is None else again.beginning.created
        self.retention = retention(generation, context.headers, gateway.config)
        """None: whoever leaves has left."""
        self._context = beginning_of(context, self._created) if self.retention is not None and again is None else b""
        context.body = b""
        self.keys: list[int] = []
        self._sinks: dict[int, Any] = {}
        """By key."""
        self.ended: list[Finished] = []
        self.error: PenstockError | None = None
        self.failed: dict[int, PenstockError] = {}
        """Choices (by their index in the reply) that failed for the client's reasons; the others go on."""

    def introduce(self) -> None:
        """Tell the voice what it speaks of; before anything else is asked of it."""
        rid = public_id("", self.context.rid, self.door.pool.text)
        self.id = must(self.voice.begin(Head(rid, self._created, self.model, self.door.fingerprint)), str, "begin")

    def begin(self) -> None:
        """Take a place and submit every prompt. Raises the error to answer with; then nothing is left behind."""
        gateway, context = self.gateway, self.context
        gateway.enter(self.model)
        context.keys = self.keys
        sent_ns = time.monotonic_ns()
        try:
            if context.again is not None:
                self._attach(context.again)
            else:
                for index in range(len(self.generation.prompts)):
                    submit = self._submit(index, sent_ns, gateway.next_key())
                    sink = self._sink(index)
                    self.door.submit(submit, sink, context.counted if gateway.config.tables is not None else None)
                    self.keys.append(submit.key)
                    self._sinks[submit.key] = sink
        except BaseException:
            self.cancel("client")
            gateway.leave()
            raise
        if context.carrier is not None:
            context.carrier.begun(context)
        context.span.submitted(sent_ns)
        if gateway.tracing.enabled:
            self._name_span()

    def _attach(self, again: Again) -> None:
        """Listen to what runs already."""
        if len(again.keys) != len(self.generation.prompts):
            raise StreamNotFound(again.rid)  # it is understood otherwise now than when it began
        self.keys += again.keys
        self._sinks = {key: self.behind(self._sink(index)) for index, key in enumerate(again.keys)}
        self.door.follow(again.rid, again.tenant, self._sinks)

    def _submit(self, index: int, sent_ns: int, key: int) -> Submit:
        gateway, generation, context = self.gateway, self.generation, self.context
        kept: dict[str, Any] = {}
        if self.retention is not None:
            kept = {"retain_s": self.retention.seconds, "on_disconnect": self.retention.on_disconnect}
            kept["context"] = b"" if index else self._context
        return Submit(
            key=key,
            edge=gateway.edge,
            rid=context.rid,
            kind=generation.kind,
            model=self.model,
            sampling=generation.sampling,
            explicit=generation.explicit,
            names=generation.names,
            priority=BACKGROUND if context.background else generation.priority,
            spec_decode=generation.spec_decode,
            cache_salt=generation.cache_salt,
            truncate_prompt_tokens=generation.truncate_prompt_tokens,
            add_special_tokens=generation.add_special_tokens,
            echo=generation.echo,
            want_ids=generation.want_ids,
            detokenize=generation.detokenize,
            stream=generation.stream,
            grammar=generation.grammar,
            split=generation.split,
            parallel_calls=generation.parallel_calls,
            calling=generation.calling,
            group=(self.keys or [key])[0] if len(generation.prompts) > 1 else 0,
            tells=generation.tells,
            tenant=context.tenant,
            key_mark=context.principal.mark,
            tables=context.principal.generation,
            peer=context.peer if "chat_template" in generation.prompts[index] else "",
            traceparent=context.span.traceparent,
            tracestate=context.span.tracestate,
            received_ns=context.started_ns,
            sent_ns=sent_ns,
            to_wall_ns=context.span.to_wall_ns,
            **kept,
            **generation.prompts[index],
        )

    def _name_span(self) -> None:
        generation = self.generation
        attributes = gen_ai_attributes(generation.kind, self.model, generation.sampling, stream=generation.stream)
        self.context.span.name(f"{attributes['gen_ai.operation.name']} {self.model}", {**attributes, "gen_ai.output.type": "text"})

    def _sink(self, index: int) -> Any:
        interval, sink = self.generation.stream_interval, self.evened(self.leg(index))
        if interval == 1 or not self.generation.stream:
            return sink
        return Merging(sink, interval, self.generation.sampling.n, tells_end=self.retention is None)

    @abc.abstractmethod
    def leg(self, index: int) -> Any:
        """The sink of prompt `index`."""

    def evened(self, sink: Any) -> Any:
        """In the place of a sink whose rows are to come one after the other."""
        return sink

    def behind(self, sink: Any) -> Any:
        """In the place of a sink that is told at once what was made over a long time."""
        return sink

    def leg_finished(self, message: Finished) -> None:
        self.ended.append(message)
        if len(self.ended) == len(self.generation.prompts):
            self.context.span.answered(message.done_ns or time.monotonic_ns())
            if len(self.failed) == self.generation.choices:
                self.error = self.failed[0]
                self.broken(self.error)
            elif self.error is None:
                self.complete()

    def choice_failed(self, index: int, error: PenstockError) -> bool:
        """A row ended its choice with an error. What the client can mend ends that choice alone (True), unless nothing else is left; anything
        else ends the request."""
        if isinstance(error, InvalidRequest):
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

    def lost(self, error: PenstockError) -> None:
        """The same of what no row says: the request was refused, or nobody can go on with it here."""
        self.leg_failed(error)

    @abc.abstractmethod
    def complete(self) -> None:
        """Every prompt is answered."""

    @abc.abstractmethod
    def broken(self, error: PenstockError) -> None:
        """The request failed; its keys are cancelled."""

    def said(self, raised: BaseException) -> str:
        """Whose mistake it is that something of this request raised that."""
        return said(self.handler, "route" if self.handler is None else self.handler.handler_name, tamed(raised))

    def cancel(self, cause: CancelCause) -> None:
        """Nobody here waits for it any more. A retained stream is left to whoever comes, unless it is ended on purpose."""
        keys = self.keys
        if self.retention is not None:  # somebody else may read it by now, even where it has ended and is still being sent here
            keys = [key for key in keys if self.door.listener(key) is self._sinks.get(key)]
        for key in keys:
            if self.retention is not None and cause in ("disconnect", "slow_client"):
                self.door.detach(key, cause)
            else:
                self.gateway.cancel(key, cause)

    def usage(self) -> Usage:
        return Usage(
            sum(m.prompt_tokens for m in self.ended),
            sum(m.output_tokens for m in self.ended),
            sum(m.cached_tokens for m in self.ended),
            sum(m.reasoning_tokens for m in self.ended),
        )

    def summarize(self, reasons: list[str]) -> None:
        """Span attributes of the whole reply."""
        if self.gateway.tracing.enabled:
            usage = self.usage()
            self.context.summary = {
                "gen_ai.response.id": self.id,
                "gen_ai.response.model": self.model,
                "gen_ai.response.finish_reasons": reasons,
                "gen_ai.usage.input_tokens": usage.prompt,
                "gen_ai.usage.output_tokens": usage.output,
                "gen_ai.usage.cache_read.input_tokens": usage.cached,
            }

    def timings(self) -> dict[str, Any] | None:
        """For `x-include-metrics: 1`; else None. Milliseconds; of several prompts the longest. Of a stream that is resumed they are those of its own time."""
        if not self.context.include_metrics:
            return None
        again = self.context.again
        start = self.context.started_ns if again is None else again.beginning.started_ns
        done = time.monotonic_ns() if again is None else max(m.done_ns for m in self.ended) or time.monotonic_ns()
        first = [m.first_token_ns for m in self.ended if m.first_token_ns]
        return {
            "queue_ms": max(m.queue_ns for m in self.ended) / 1e6,
            "prefill_ms": max(m.prefill_ns for m in self.ended) / 1e6,
            "decode_ms": max(m.decode_ns for m in self.ended) / 1e6,
            **({"time_to_first_token_ms": (min(first) - start) / 1e6} if first else {}),
            "total_ms": (done - start) / 1e6,
            "preemptions": sum(m.preemptions for m in self.ended),
        }


async def watch(receive: Receive) -> None:
    """Return when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
