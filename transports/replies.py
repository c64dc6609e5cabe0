"""A generation request answered in one piece.

What it is: `WholeReply`, the Job that gathers all rows and answers with one body.
What it does not know: what the body says (its Voice), streams (stream.py is the other Job), routes, how rows arrive.
"""

from __future__ import annotations

import asyncio
import functools

from penstock.core.protocol.errors import PenstockError
from penstock.core.protocol.messages import Finished
from penstock.transports.blame import beside, must, refusal
from penstock.transports.gateway import Batch, Gateway
from penstock.transports.generation import Generation
from penstock.transports.job import Job, row_error, watch
from penstock.transports.request import JsonReply, Receive, RequestContext, Scope, Send, ignored_header
from penstock.transports.voice import Choice, Prompt, Voice

LONG = 1000
"""Positions with log-probabilities from which on a body is made on another thread: others wait for it no longer than threads take turns."""


class _WholeLeg:
    __slots__ = ("_base", "_job", "choices", "prompt")

    def __init__(self, job: WholeReply, index: int, n: int) -> None:
        self._job = job
        self._base = index * n
        self.choices = [Choice() for _ in range(n)]
        self.prompt = Prompt()

    def row(self, choice: int, text: str, reason: str, row: int, batch: Batch) -> None:
        mine = self.choices[choice]
        if text and batch.channels is None:
            mine.pieces.append(text)
        elif batch.channels is not None:
            mine.take(text, row, batch)
        if self._job.generation.want_ids:
            mine.tokens += batch.tokens(row)
        extra = batch.extra(row)
        if extra is not None:
            self.prompt.take(extra)
            if extra.logprobs:
                mine.logprobs += extra.logprobs
        if reason:
            mine.reason = reason
            if extra is not None:
                mine.stop_reason, mine.unfinished = extra.stop_reason, extra.unfinished
            if reason in ("error", "abort"):
                self._job.choice_failed(self._base + choice, row_error(extra))

    def finished(self, message: Finished) -> None:
        self._job.leg_finished(message)

    def failed(self, error: PenstockError) -> None:
        self._job.leg_failed(error)

    def said(self, error: Exception) -> str:
        return f"request {self._job.context.rid}: {self._job.said(error)}"


class WholeReply(Job):
    """Gathers everything, then answers once. An ASGI application; raises what `begin` raises before it sends anything."""

    def __init__(self, gateway: Gateway, generation: Generation, voice: Voice, context: RequestContext) -> None:
        super().__init__(gateway, generation, voice, context)
        self._legs = [_WholeLeg(self, index, generation.sampling.n) for index in range(len(generation.prompts))]
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
        self.handler = scope.get("route_handler")
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
            await refusal(scope.get("route_handler"), self.error, voice=self.voice)(scope, receive, send)
            return
        await self.send(await self._body(), scope, receive, send)

    async def send(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        """The answer is known: give it to the client."""
        await JsonReply(body, headers=ignored_header(self.generation.ignored))(scope, receive, send)

    def _gone(self, watcher: asyncio.Task[None]) -> None:
        if not watcher.cancelled() and not self._done.done():
            self.context.status = 499
            self.cancel("disconnect")
            self._done.set_result(None)

    async def _body(self) -> bytes:
        choices = [choice for leg in self._legs for choice in leg.choices]
        for index, error in self.failed.items():
            choices[index].error = error
        self.introduce()
        prompts = [leg.prompt for leg in self._legs]
        make = functools.partial(self.voice.whole, prompts, choices, self.usage(), self.timings())
        positions = sum(len(prompt.logprobs) for prompt in prompts) + sum(len(choice.logprobs) for choice in choices)
        body = must(make() if positions < LONG else await beside(make), bytes, "whole")
        self.summarize([choice.reason for choice in choices])
        return body
