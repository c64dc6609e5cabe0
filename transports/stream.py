"""A generation request answered row by row.

What it is: `StreamReply`, the Job whose rows leave as they come. Built for speed: everything around the text is encoded once a choice; a plain row
costs one JSON string and one append; rows that arrive together leave in one write.
What it does not know: what payloads say (its Voice), what stands around them (its Frame), how rows arrive, routes, slow clients beyond calling their
outbox.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

import msgspec

from penstock.core.protocol.errors import PenstockError
from penstock.core.protocol.messages import Finished
from penstock.transports.blame import refusal, said
from penstock.transports.frame import Frame
from penstock.transports.gateway import Batch, CancelCause, Gateway
from penstock.transports.generation import Generation
from penstock.transports.job import Job, row_error, watch
from penstock.transports.outbox import Outbox, Pulse
from penstock.transports.request import Receive, RequestContext, Scope, Send, ignored_header
from penstock.transports.voice import Prompt, Voice

log = logging.getLogger("penstock.edge.stream")

_json = msgspec.json.Encoder().encode


class _StreamLeg:
    """One prompt's rows as payloads."""

    __slots__ = ("_base", "_job", "_opened", "_prompt", "_push")

    def __init__(self, job: StreamReply, index: int) -> None:
        n = job.generation.sampling.n
        self._job = job
        self._base = index * n
        self._push = job.outbox.push
        self._opened = [False] * n
        self._prompt = Prompt()

    def row(self, choice: int, text: str, reason: str, row: int, batch: Batch) -> None:
        job = self._job
        extra = batch.extra(row)
        if extra is not None:
            self._prompt.take(extra)
        index = self._base + choice
        if (reason == "error" or reason == "abort") and (not job.choice_failed(index, row_error(extra)) or (job.alone and not text)):
            return
        if not self._opened[choice]:
            self._opened[choice] = True
            job.say(job.voice.opened(index, self._prompt, row, batch))
        frame = job.frames[index]
        if frame is not None and (batch.channels is None or not batch.channels[row]):
            if text:
                self._push(frame[0] + _json(text) + frame[1])
        else:
            job.say(job.voice.piece(index, text, row, batch))
            if job.moves:
                job.frames[index] = job.around(index)
        if reason and not (job.alone and index in job.failed):  # that one's error is the request's, and comes next
            job.close_choice(index, reason, row, batch)

    def told(self, error: Exception) -> str:
        """For the log: a row that its voice could not say."""
        job = self._job
        return f"request {job.context.rid}: a row could not be delivered: {said(job.handler, 'its voice', error)}"

    def finished(self, message: Finished) -> None:
        self._job.leg_finished(message)

    def failed(self, error: PenstockError) -> None:
        self._job.leg_failed(error)


class StreamReply(Job):
    """Answers with a stream. An ASGI application; raises what `begin` raises before it sends anything."""

    def __init__(self, gateway: Gateway, generation: Generation, voice: Voice, frame: Frame, context: RequestContext, pulse: Pulse) -> None:
        super().__init__(gateway, generation, voice, context)
        self._frame = frame
        self._pulse = pulse
        self.outbox = Outbox(gateway.config, self._park, self._unpark, self._cut, keep_alive=frame.keep_alive)
        self._started = False
        self._reasons: list[str] = []
        self.alone = generation.choices == 1
        """Is the request's fate that of its only choice?"""
        self.introduce()
        self.frames = [self.around(index) if voice.plain else None for index in range(generation.choices)]
        """What stands before and after the text of a plain row, by choice; None: no row is plain (now)."""
        self.moves = voice.plain and None in self.frames
        """May that change?"""

    def around(self, index: int) -> tuple[bytes, bytes] | None:
        around = self.voice.around(index)
        return None if around is None else self._frame.around(*around)

    def say(self, payloads: Iterable[bytes]) -> None:
        for payload in payloads:
            self.outbox.push(self._frame.wrap(payload))

    def close_choice(self, index: int, reason: str, row: int, batch: Batch) -> None:
        self._reasons.append(reason)
        self.say(self.voice.closed(index, reason, self.failed.get(index), row, batch))

    # --- Job

    def leg(self, index: int) -> _StreamLeg:
        return _StreamLeg(self, index)

    def complete(self) -> None:
        try:
            self.say(self.voice.ended(self.usage(), self.timings()))
        except Exception as error:  # a voice's mistake is this request's end, not the link's
            log.exception("request %s: the end of its stream could not be said: %s", self.context.rid, said(self.handler, "ended", error))
            self.leg_failed(PenstockError("The server made an error while it sent the answer."))
            return
        self.summarize(self._reasons)
        self.outbox.close()

    def broken(self, error: PenstockError) -> None:
        if not self._started:
            self.outbox.drop()
            return
        try:
            self.say(self.voice.broken(error))
        except Exception as wrong:
            log.exception(
                "request %s: the error of its stream could not be said: %s", self.context.rid, said(self.handler, "broken", wrong)
            )
        self.outbox.close()

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
                await refusal(scope.get("route_handler"), self.error, voice=self.voice)(scope, receive, send)
                return
            self._started = True
            headers = [*self._frame.headers, *ignored_header(self.generation.ignored)]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
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
