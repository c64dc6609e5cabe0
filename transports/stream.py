"""A generation request answered row by row.

What it is: `StreamReply`, the Job whose rows leave as they come. Built for speed: everything around the text is encoded once a choice; a plain row
costs one JSON string and one append; rows that arrive together leave in one write.
What it does not know: what payloads say (its Voice), what stands around them (its Frame), how rows arrive, routes, slow clients beyond calling their
outbox.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec

from penstock.core.protocol.config import Config
from penstock.core.protocol.errors import PenstockError, SlowClient
from penstock.core.protocol.messages import Finished
from penstock.transports.backlog import Backlog
from penstock.transports.blame import refusal
from penstock.transports.frame import Frame
from penstock.transports.gateway import Batch, CancelCause, Gateway, Sink
from penstock.transports.generation import Generation
from penstock.transports.job import Job, row_error, watch
from penstock.transports.outbox import CutCause, Outbox, Pulse
from penstock.transports.request import Receive, RequestContext, Scope, Send, ignored_header
from penstock.transports.smoothing import Smoothing
from penstock.transports.stamps import stamped, trace_header, with_stamps
from penstock.transports.voice import Pieces, Prompt, Voice

log = logging.getLogger("penstock.edge.stream")

_json = msgspec.json.Encoder().encode

MOST_PIECES = 1 << 16
"""Events that something large about a prompt may be made of: more than there ever are."""


def cut_error(why: CutCause, config: Config, *, kept: bool) -> SlowClient:
    """The last event of a stream whose client does not read. `kept`: the stream can be resumed."""
    what = (
        f"Nothing of this stream was read for {config.stream_stall_s:g} s (--stream-stall-s), so it ends here."
        if why == "stalled"
        else f"More than {config.stream_max_bytes} bytes of this stream waited to be read (--stream-max-bytes), so it ends here."
    )
    return SlowClient(
        what
        + (
            " It can be resumed behind the last event that you have, unless it is too long to be kept."
            if kept
            else " Read faster, or ask with retain_s."
        )
    )


def _unsaid(_: bytes) -> None:
    """Where an error stands outside of the stream."""


class _StreamLeg:
    """One prompt's rows as payloads."""

    __slots__ = ("_base", "_job", "_opened", "_prompt", "_push")

    def __init__(self, job: StreamReply, index: int) -> None:
        n = job.generation.sampling.n
        self._job = job
        self._base = index * n
        self._push = job.push
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

    def finished(self, message: Finished) -> None:
        self._job.leg_finished(message)

    def failed(self, error: PenstockError) -> None:
        self._job.lost(error)

    def said(self, error: Exception) -> str:
        return f"request {self._job.context.rid}: {self._job.said(error)}"


class StreamReply(Job):
    """Answers with a stream. An ASGI application; raises what `begin` raises before it sends anything."""

    def __init__(self, gateway: Gateway, generation: Generation, voice: Voice, frame: Frame, context: RequestContext, pulse: Pulse) -> None:
        super().__init__(gateway, generation, voice, context)
        carrier = context.carrier
        self._carrier = carrier
        self._frame = frame if carrier is None else carrier.frame
        self._began_in = frame
        """As it began, whatever carries it now: are its numbers told, or counted?"""
        self._pulse = pulse
        self.outbox = Outbox(gateway.config, self._park, self._unpark, self._cut, keep_alive=self._frame.keep_alive)
        again = context.again
        self.push: Callable[[bytes], None] = self.outbox.push
        self._counted = self.retention is not None or carrier is not None
        if self._counted:
            self.push = self._push_numbered
        self._number = 0
        self._after = 0 if again is None else again.after
        """Events up to this one are not sent."""
        self._backlog = Backlog(self.outbox, gateway.config.stream_park_bytes, self._not_said) if again is not None else None
        self._started = again is not None
        """Is an error an event of the stream? Before anything was sent it is a reply of its own; of one that is resumed, an error that its rows tell is an event in any case."""
        self._replied = False
        """Has the reply begun?"""
        self._reasons: list[str] = []
        self._left = False
        """Has the client gone?"""
        self._linger: asyncio.TimerHandle | None = None
        """Once the stream was cut: its last word must leave until then."""
        self.alone = generation.choices == 1
        """Is the request's fate that of its only choice?"""
        self._smoothing: Smoothing | None = None
        if generation.smoothing_ms and again is None and not context.background:  # what is resumed comes as fast as it is read
            loop = asyncio.get_running_loop()
            self._smoothing = Smoothing(generation.smoothing_ms / 1e3, self._unsayable, now=loop.time, later=loop.call_later)
        self.introduce()
        self.frames = [self.around(index) if voice.plain else None for index in range(generation.choices)]
        """What stands before and after the text of a plain row, by choice; None: no row is plain (now)."""
        self.moves = voice.plain and None in self.frames
        """May that change?"""

    def around(self, index: int) -> tuple[bytes, bytes] | None:
        around = self.voice.around(index)
        return None if around is None else self._frame.around(*around)

    def say(self, payloads: Iterable[bytes | Pieces]) -> None:
        for payload in payloads:
            if isinstance(payload, Pieces):
                self._say_later(payload)
            elif message := self._frame.wrap(payload):
                self.push(message)

    def _say_later(self, pieces: Pieces) -> None:
        if self.retention is not None and not self._began_in.tells_numbers:
            self.say(pieces.payloads)
            return
        messages: Iterator[bytes] = map(self._frame.wrap, pieces.payloads)
        if self._counted:  # how many they are is known once they are made: they have numbers to spare
            messages = self._numbered(messages, self._number)
            self._number += MOST_PIECES
        self.outbox.push_later(messages)

    def _numbered(self, messages: Iterable[bytes], before: int) -> Iterator[bytes]:
        for number, message in enumerate(messages, before + 1):
            if number > self._after:
                yield self._frame.numbered(number, message)

    def _push_numbered(self, message: bytes) -> None:
        self._number += 1
        if self._number > self._after:
            self.outbox.push(self._frame.numbered(self._number, message))

    def behind(self, sink: Any) -> Any:
        """See Job."""
        return sink if self._backlog is None else self._backlog.sink(sink)

    def _unsayable(self, raised: BaseException) -> None:
        log.error("request %s: its stream could not go on: %s", self.context.rid, self.said(raised), exc_info=raised)
        self.lost(PenstockError("The server made an error while it sent the answer."))

    def _not_said(self, raised: BaseException) -> None:
        log.error("request %s: its stream could not be resumed: %s", self.context.rid, self.said(raised), exc_info=raised)
        self.lost(PenstockError("The server made an error while it sent the answer."))

    def close_choice(self, index: int, reason: str, row: int, batch: Batch) -> None:
        self._reasons.append(reason)
        self.say(self.voice.closed(index, reason, self.failed.get(index), row, batch))

    # --- Job

    def leg(self, index: int) -> _StreamLeg:
        return _StreamLeg(self, index)

    def evened(self, sink: Sink) -> Sink:
        """See Job."""
        return sink if self._smoothing is None else self._smoothing.sink(sink)

    def complete(self) -> None:
        try:
            self.say(self.voice.ended(self.usage(), self.timings()))
        except BaseException as raised:  # a voice's mistake is this request's end, not the link's
            log.error("request %s: the end of its stream could not be said: %s", self.context.rid, self.said(raised), exc_info=raised)
            self.leg_failed(PenstockError("The server made an error while it sent the answer."))
            return
        self.summarize(self._reasons)
        self.outbox.close()

    def lost(self, error: PenstockError) -> None:
        if self.error is None:  # what no row says is no part of the stream: before anything else was sent it has its status
            self._started = self._replied
        # Whoever resumes the stream finds no such event in it.
        self.push = self.outbox.push if self._carrier is None else _unsaid
        if self.retention is not None:
            self.cancel("disconnect")
        super().lost(error)

    def broken(self, error: PenstockError) -> None:
        if not self._started:
            self.outbox.drop()
            return
        try:
            self.say(self.voice.broken(error))
        except BaseException as raised:
            log.error("request %s: the error of its stream could not be said: %s", self.context.rid, self.said(raised), exc_info=raised)
        if self._carrier is not None:
            self._carrier.broke(refusal(self.handler, error, voice=self.voice))
        self.outbox.close()

    # --- a slow or lost client

    def _park(self) -> None:
        self.gateway.counters.add("penstock_edge_parks_total")
        for key in self.keys:
            self.gateway.park(key)

    def _unpark(self) -> None:
        for key in self.keys:
            self.gateway.unpark(key)

    def _cut(self, why: CutCause) -> None:
        """The request ends, and with it what waits here; of what the socket has already comes the rest, if it is read at all, and then why."""
        if self._linger is not None:
            return
        outbox, seconds = self.outbox, self.gateway.config.stream_stall_s
        if self._backlog is not None:
            self._backlog.clear()
        self._calm()
        log.warning("request %s: the client reads too slowly, the stream is cut with %d bytes unsent", self.context.rid, outbox.unsent)
        self.gateway.counters.add(f'penstock_edge_cuts_total{{why="{why}"}}')
        if self._carrier is not None:
            self._abandon("slow_client")
            self._carrier.cut()
            return
        self._linger = asyncio.get_running_loop().call_later(seconds, self._abort)
        self._pulse.discard(outbox)
        self.cancel("slow_client")
        self.gateway.leave()  # nobody is to wait for this client
        self.push = outbox.push  # as in `lost`
        outbox.forget()
        self._started = True
        self.broken(cut_error(why, self.gateway.config, kept=self.retention is not None))

    def _abort(self) -> None:
        if self.context.abort is not None:
            self.context.abort()

    def _hang_up(self) -> None:
        """The last word of a stream that was cut is written: its connection closes once that has left."""
        if self._linger is not None and self.context.hang_up is not None:
            self.context.hang_up(max(0.0, self._linger.when() - asyncio.get_running_loop().time()))

    def _gone(self, watcher: asyncio.Task[None]) -> None:
        if not watcher.cancelled():
            self._abandon("disconnect")

    def _calm(self) -> None:
        if self._smoothing is not None:
            self._smoothing.clear()

    def _abandon(self, cause: CancelCause) -> None:
        self._left = True
        self._calm()
        self.context.status = 499
        self.cancel(cause)
        self.outbox.drop()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        outbox = self.outbox
        self.handler = scope.get("route_handler")
        await self.gateway.soon_ready(self.model)
        self.begin()
        watcher = asyncio.get_running_loop().create_task(watch(receive))
        watcher.add_done_callback(self._gone)
        self._pulse.add(outbox)
        try:
            await outbox.wait()
            if self._left:
                return
            if self.error is not None and not self._started:
                await refusal(scope.get("route_handler"), self.error, voice=self.voice)(scope, receive, send)
                return
            ahead = await self._first() if self._after else b""
            if self._left:
                return
            if (
                self._after and not ahead and outbox.last and not outbox.unsent
            ):  # it has all of it (and, as the HTML standard says, need not come again)
                self._replied = True
                await send({"type": "http.response.start", "status": 204, "headers": []})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                return
            self._started = self._replied = True
            headers = [*self._frame.headers, *ignored_header(self.generation.ignored)]
            raw = self.context.raw_send
            if stamped(self.context, self._frame):
                headers.append(trace_header(scope))
                raw = with_stamps(raw, self.context)
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            if ahead:
                await raw({"type": "http.response.body", "body": ahead, "more_body": True})
            await self._write(raw)
        finally:
            watcher.remove_done_callback(self._gone)
            watcher.cancel()
            self._pulse.discard(outbox)
            self._calm()
            outbox.drop()
            self.cancel("disconnect")  # of what still runs, if this was cancelled
            if self._linger is None:
                self.gateway.leave()
            else:
                self._linger.cancel()
                self.context.status = 499

    async def _first(self) -> bytes:
        """Of what is made while it leaves, the first that the client does not have; b"" where other things come first, or nothing."""
        outbox, data = self.outbox, b""
        while not data and not self._left and outbox.later is not None:
            data = await self._made(outbox.later)
            if not data:
                await outbox.wait()
        return data

    async def _write(self, send: Send) -> None:
        outbox = self.outbox
        while True:
            if self._backlog is not None:
                self._backlog.refill()
            await outbox.wait()
            if outbox.later is not None:
                data, made = await self._made(outbox.later), True
            else:
                data, made = outbox.take(), False
            last = outbox.last
            if self._left:
                return
            if not data and not last:
                continue
            await send({"type": "http.response.body", "body": data, "more_body": not last})
            if last:
                self._hang_up()
                return
            outbox.sent(0 if made else len(data))

    async def _made(self, later: Iterator[bytes]) -> bytes:
        """The next of what is made while it leaves; b"" behind its last."""
        try:
            data = await asyncio.to_thread(next, later, b"")
        except Exception:  # a voice's mistake: what would come behind it makes no sense without it
            log.exception("request %s: what comes before its answer could not be said", self.context.rid)
            self.outbox.forget()
            self.leg_failed(PenstockError("The server made an error while it sent the answer."))
            return b""
        if not data:
            self.outbox.no_more(later)
        return data
