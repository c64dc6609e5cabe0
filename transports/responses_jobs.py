"""How responses run whose clients wait for them.

What it is: `WholeResponse` and `StreamedResponse`, the jobs of replies.py and stream.py that keep what they made before they say that it is complete; `Leg`, which tells
the voice of a response its rows.
What it does not know: what the rows say (responses_voice.py), how requests are understood, the background (responses_background.py), what SQLite does.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

import msgspec

from penstock.core.protocol.errors import PenstockError
from penstock.core.protocol.messages import Finished
from penstock.transports.frame import Frame
from penstock.transports.gateway import Batch, Gateway
from penstock.transports.job import Job, row_error
from penstock.transports.outbox import Pulse
from penstock.transports.replies import WholeReply
from penstock.transports.request import RequestContext
from penstock.transports.responses import Asked
from penstock.transports.responses_store import Kept, Records
from penstock.transports.responses_voice import ResponsesVoice
from penstock.transports.stream import StreamReply
from penstock.transports.voice import Prompt

log = logging.getLogger("penstock.edge.responses")

_json = msgspec.json.Encoder().encode


def kept_of(asked: Asked, model: str) -> Kept:
    return Kept(
        input=msgspec.Raw(_json(asked.input)),
        rid=asked.rid,
        model=model,
        previous=asked.previous,
        background=asked.background,
        stream=asked.stream,
    )


class Leg:
    """The rows of the one answer, told to the voice; what it says of them goes to `say`."""

    def __init__(self, job: Job, voice: ResponsesVoice, say: Callable[[Iterable[bytes]], None]) -> None:
        self._job = job
        self._voice = voice
        self._say = say
        self._prompt = Prompt()
        self._opened = False
        self.reason = ""

    def row(self, choice: int, text: str, reason: str, row: int, batch: Batch) -> None:
        if reason in ("error", "abort") and (not self._job.choice_failed(0, row_error(batch.extra(row))) or not text):
            return
        if not self._opened:
            self._opened = True
            self._say(self._voice.opened(0, self._prompt, row, batch))
        self._say(self._voice.piece(0, text, row, batch))
        if reason and not self._job.failed:
            self.reason = reason
            self._say(self._voice.closed(0, reason, None, row, batch))

    def finished(self, message: Finished) -> None:
        self._job.leg_finished(message)

    def failed(self, error: PenstockError) -> None:
        self._job.lost(error)


def unheard(payloads: Iterable[bytes]) -> None:
    for _ in payloads:
        pass


async def keep(records: Records | None, asked: Asked, job: Job, voice: ResponsesVoice) -> None:
    """Keep the finished response, if it is to be kept. If it cannot be, the reply says that it was not (`store` is false)."""
    assert voice.final is not None
    if records is None or not asked.store:
        return
    try:
        await records.put(job.context.tenant, asked.id, _json(voice.final), kept_of(asked, job.model))
    except PenstockError as error:
        log.warning("response %s could not be kept: %s", asked.id, error.message)
        voice.final["store"] = False


def complete(
    job: Job, asked: Asked, records: Records | None, voice: ResponsesVoice, done: Callable[[], None], doing: str
) -> asyncio.Task[None]:
    """Make the finished response and keep it, then call `done`. `doing` is told if that fails."""

    async def work() -> None:
        try:
            voice.finish(job.usage(), job.timings())
            await keep(records, asked, job, voice)
        except Exception:
            log.exception("request %s: its response could not be made", job.context.rid)
            job.leg_failed(PenstockError(f"The server made an error while it {doing} the answer."))
            return
        done()

    return asyncio.get_running_loop().create_task(work())


class WholeResponse(WholeReply):
    """The response in one piece."""

    def __init__(self, gateway: Gateway, asked: Asked, records: Records | None, context: RequestContext) -> None:
        self._says = ResponsesVoice(asked.shown)
        super().__init__(gateway, asked.call, self._says, context)
        self._asked = asked
        self._records = records
        self._row = Leg(self, self._says, unheard)
        self._keeping: asyncio.Task[None] | None = None
        self.introduce()

    def leg(self, index: int) -> Leg:  # type: ignore[override]
        return self._row

    def leg_failed(self, error: PenstockError) -> None:
        super().leg_failed(self._asked.renamed(error))

    def complete(self) -> None:
        self._keeping = complete(self, self._asked, self._records, self._says, super().complete, "made")

    async def _body(self) -> bytes:
        self.summarize([self._row.reason])
        return _json(self._says.final)


class StreamedResponse(StreamReply):
    """The response as events."""

    def __init__(
        self, gateway: Gateway, asked: Asked, records: Records | None, frame: Frame, context: RequestContext, pulse: Pulse
    ) -> None:
        self._says = ResponsesVoice(asked.shown)
        super().__init__(gateway, asked.call, self._says, frame, context, pulse)
        self._asked = asked
        self._records = records
        self._row = Leg(self, self._says, self.say)
        self._keeping: asyncio.Task[None] | None = None

    def leg(self, index: int) -> Leg:  # type: ignore[override]
        return self._row

    def leg_failed(self, error: PenstockError) -> None:
        super().leg_failed(self._asked.renamed(error))

    def complete(self) -> None:
        self._reasons.append(self._row.reason)
        self._keeping = complete(self, self._asked, self._records, self._says, super().complete, "sent")
