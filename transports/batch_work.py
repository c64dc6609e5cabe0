"""One batch, from validating to its end.

What it is: `Work`. It asks the application as a client would (inside.py) and appends each answer to the batch's output or error file as it comes; those files are
the journal, so that a server that was killed goes on where it was, and no line comes twice or is missing.
What it does not know: which batches there are and whose turn it is (batch_runner.py); what the files' lines look like (batch_lines.py, batch_forms.py); HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
from litestar import Litestar

from penstock.core.protocol.errors import ModelNotFound, UnsupportedFeature, described, tamed
from penstock.transports import batch_lines, files, folder
from penstock.transports.batch_forms import FORMS
from penstock.transports.batches import Private, Record
from penstock.transports.files import Files
from penstock.transports.gateway import Gateway
from penstock.transports.inside import Reply, ask
from penstock.transports.places import Places
from penstock.transports.questions import find_model
from penstock.transports.storage_schema import Batch, BatchError, BatchErrors, BatchUsage

log = logging.getLogger("penstock.edge.batches")

PROGRESS_S = 1.0
"""How often a running batch is looked at: counts are told, a cancel and the end of its time are seen."""
FRAME_BYTES = 4096
"""What a line of contents of the server's own has around a request."""
BUSY = (429, 503, 529)
"""Statuses of what the server could not take now."""
RETRY_S = (1.0, 10.0)
"""Pause before a request that the server could not take is asked again: the first, and the longest."""


def now_s() -> int:
    return int(time.time())


class Bench(NamedTuple):
    """What every batch is worked at with."""

    gateway: Gateway
    app: Litestar
    files: Files
    places: Places


def failed(errors: list[BatchError]) -> Callable[[Batch, Private], None]:
    def change(batch: Batch, _: Private) -> None:
        batch.status, batch.failed_at = "failed", now_s()
        batch.errors = BatchErrors(object="list", data=errors)

    return change


class Work:
    """One batch in hand."""

    def __init__(self, bench: Bench, record: Record) -> None:
        self._bench = bench
        self._record = record
        self._form = FORMS[record.kind]
        self._files = bench.files
        self._config = bench.gateway.config
        self._done: set[str] = set()
        self._counts = record.batch.request_counts
        self._writing = asyncio.Lock()
        self._output = self._errors = -1
        self._end = ""
        """Why no more is to be run: cancelled or expired."""
        self._trouble: BaseException | None = None
        """A line could not be written: nothing more is."""
        self._asking: set[asyncio.Task[None]] = set()
        self._waiting: set[asyncio.Task[Any]] = set()
        """Those of them that wait for an answer: the batch's end cancels these, and no other, which would lose its line."""

    async def run(self) -> None:
        """Raises Gone, or PenstockError where the store or the disk fails; then it may be run again."""
        batch = self._record.batch
        if batch.status == "validating":
            await self._validate()
        if batch.status in ("in_progress", "cancelling") and not self._record.private.final:
            await self._work()
        if self._record.batch.status in ("finalizing", "cancelling"):
            await self._finish()

    def _over(self) -> str:
        batch = self._record.batch
        if batch.status == "cancelling":
            return "cancelled"
        return "expired" if now_s() >= batch.expires_at else ""

    # --- validating

    async def _validate(self) -> None:
        config, batch = self._config, self._record.batch
        check = batch_lines.Check(batch.endpoint, config.max_batch_lines, config.max_body_bytes)
        reader = await self._reader()
        if reader is None:
            return
        try:
            while not (reader.over or check.hopeless):
                await self._files.disk(lambda: check.take(reader.window()))
        finally:
            reader.close()
        check.end()
        if check.model and not check.errors:
            try:
                await find_model(self._bench.gateway, check.model)
            except ModelNotFound as error:
                check.wrong("model_not_found", error.message, "body.model", 1)
        if check.errors:
            await self._record.change(failed(check.errors))
            return

        def go(batch: Batch, _: Private) -> None:
            batch.model = check.model
            batch.request_counts.total = check.total
            if batch.status == "validating":
                batch.status, batch.in_progress_at = "in_progress", now_s()

        await self._record.change(go)

    async def _reader(self) -> batch_lines.Reader | None:
        """Of the input file. Without it the batch fails."""
        batch, own = self._record.batch, self._record.private.input_id
        try:
            if own:
                return await asyncio.to_thread(batch_lines.Reader, self._files.folder.of(own), self._config.max_body_bytes + FRAME_BYTES)
            file = await self._files.find(self._record.tenant, batch.input_file_id)
            if file is not None:
                return await asyncio.to_thread(batch_lines.Reader, self._files.folder.of(file.id), self._config.max_body_bytes)
        except FileNotFoundError:
            pass
        wrong = BatchError(code="file_not_found", message="The input file is no longer there.", param="input_file_id", line=None)
        await self._record.change(failed([wrong]))
        return None

    # --- running

    async def _work(self) -> None:
        place, private = self._files.folder, self._record.private
        output = await self._files.disk(batch_lines.finished_lines, place.writing(private.output_id))
        errors = await self._files.disk(batch_lines.finished_lines, place.writing(private.error_id))
        self._done = output | errors
        self._counts = self._record.batch.request_counts
        self._counts.completed, self._counts.failed = len(output), len(errors)
        reader = await self._reader()
        if reader is None:
            return
        watcher = asyncio.get_running_loop().create_task(self._watch())
        try:
            self._output = await self._files.disk(place.create, private.output_id)
            self._errors = await self._files.disk(place.create, private.error_id)
            self._end = self._over()
            await self._all(reader, watcher)
        finally:
            watcher.cancel()
            for task in self._asking:
                task.cancel()
            await asyncio.gather(watcher, *self._asking, return_exceptions=True)
            reader.close()
            for descriptor in (self._output, self._errors):
                if descriptor >= 0:
                    os.close(descriptor)
            self._output = self._errors = -1

        def end(batch: Batch, private: Private) -> None:
            batch.request_counts = self._counts
            private.final = "cancelled" if batch.status == "cancelling" else self._end or "completed"
            if batch.status == "in_progress":
                batch.status, batch.finalizing_at = "finalizing", now_s()

        await self._record.change(end)

    async def _all(self, reader: batch_lines.Reader, watcher: asyncio.Task[None]) -> None:
        """Every line that has no answer yet; raises what the watcher found."""
        places = self._bench.places
        while not reader.over:
            for _, raw in await self._files.disk(reader.window):
                assert raw is not None  # or it had not been validated
                if self._done and batch_lines.id_of(raw) in self._done:
                    continue
                if self._end:
                    await self._leave(raw)
                    continue
                await places.take(lambda: bool(self._end) or watcher.done() or self._trouble is not None)
                if watcher.done() or self._trouble is not None:
                    places.give()
                    break
                if self._end:
                    places.give()
                    await self._leave(raw)
                    continue
                task = asyncio.get_running_loop().create_task(self._one(raw))
                self._asking.add(task)
                task.add_done_callback(self._asked)
            silent = self._end == "cancelled" and not self._form.tells_cancelled
            if watcher.done() or silent or self._trouble is not None:
                break
        while self._asking and not watcher.done() and self._trouble is None:
            await asyncio.wait([*self._asking, watcher], return_when=asyncio.FIRST_COMPLETED)
        if watcher.done():
            await watcher
        if self._trouble is not None:
            raise self._trouble

    def _asked(self, task: asyncio.Task[None]) -> None:
        self._asking.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._trouble = task.exception()
        self._bench.places.give()

    async def _leave(self, raw: bytes) -> None:
        """The batch ends without an answer to this one."""
        line = self._form.left(batch_lines.id_of(raw), self._end)
        if line:
            await self._write(line, ok=False)

    async def _one(self, raw: bytes) -> None:
        """One request, until it has an answer or the batch's end came first."""
        line = batch_lines.read_line(raw)
        if self._end:
            await self._leave(raw)
            return
        mine = asyncio.current_task()
        assert mine is not None
        self._waiting.add(mine)
        try:
            try:
                reply = await self._answer(line.url, bytes(line.body))
            finally:
                self._waiting.discard(mine)
        except asyncio.CancelledError:
            if self._end:
                await self._leave(raw)
            raise
        except BaseException as raised:
            log.error("a request of batch %s failed: %s", self._record.id, described(tamed(raised)), exc_info=raised)
            said = "The server made an error. It is logged."
            await self._write(self._form.failed(line.custom_id, said), ok=False)
            return
        written = self._form.answered(line.custom_id, reply.status, reply.request_id, reply.body)
        await self._write(written, ok=reply.status == 200)

    async def _answer(self, url: str, body: bytes) -> Reply:
        wrong = unfit(body)
        if wrong is not None:
            return Reply(400, {}, self._form.error(wrong), "")
        pause, longest = RETRY_S
        while True:
            reply = await ask(self._bench.app, url, body, self._record.tenant, self._bench.places.asking)
            if not reply.headers.get(b"content-type", b"").startswith(b"application/json"):
                raise RuntimeError(f"{url} did not answer in JSON")
            if reply.status not in BUSY or b'"store_full"' in reply.body or reply.headers.get(b"x-should-retry") == b"false":
                return reply
            told = reply.headers.get(b"retry-after", b"")
            await asyncio.sleep(max(pause, min(float(told), 60.0) if told.isdigit() else 0.0))
            pause = min(2 * pause, longest)

    async def _write(self, line: bytes, *, ok: bool) -> None:
        async with self._writing:
            if self._trouble is not None:
                raise self._trouble
            write = asyncio.get_running_loop().create_task(self._files.disk(folder.write, self._output if ok else self._errors, line))
            cancelled = False
            while not write.done():
                try:
                    await asyncio.wait([write])
                except asyncio.CancelledError:  # a line is written whole
                    cancelled = True
            self._trouble = write.exception()
            write.result()
            if ok:
                self._counts.completed += 1
            else:
                self._counts.failed += 1
            if cancelled:
                raise asyncio.CancelledError

    async def _watch(self) -> None:
        """Tell the counts, see a cancel, see that the time is over. Ends with an exception only."""
        told = (-1, -1)
        record, counts = self._record, self._counts

        def tell(batch: Batch, _: Private) -> None:
            batch.request_counts = counts

        while True:
            if (counts.completed, counts.failed) != told:
                told = counts.completed, counts.failed
                await record.change(tell)
            else:
                await record.read()
            end = self._over()
            if end and not self._end:
                self._end = end
                for task in self._waiting:
                    task.cancel()
            await self._bench.places.look()
            await asyncio.sleep(PROGRESS_S)

    # --- finishing

    async def _finish(self) -> None:
        record, private = self._record, self._record.private
        found: dict[str, str] = {}
        tally: dict[str, int] = {}
        usage = BatchUsage() if self._form.files else None
        for name, id in (("output", private.output_id), ("error", private.error_id)):
            size = await self._files.disk(self._files.folder.finish, id)
            if not size:
                await self._files.disk(self._files.folder.remove, id)
                continue
            if self._form.files:
                if name == "output":
                    usage = await self._files.disk(batch_lines.usage_of, self._files.folder.of(id))
                await self._files.put(record.tenant, id, f"{record.id}_{name}.jsonl", files.OUTPUT, size, private.output_ttl_s)
            else:
                tally |= await self._files.disk(self._form.tally, self._files.folder.of(id))
            found[name] = id

        def end(batch: Batch, private: Private) -> None:
            batch.status = private.final  # type: ignore[assignment]
            batch.output_file_id, batch.error_file_id = found.get("output"), found.get("error")
            setattr(batch, f"{private.final}_at", now_s())
            private.tally, private.input_id, batch.usage = tally, "", usage

        own = private.input_id
        await record.change(end)
        if own:
            await self._files.disk(self._files.folder.remove, own)
        log.info("batch %s is %s: %s", record.id, private.final, record.batch.request_counts)


_UNFIT = {"stream": "Answers of a batch come whole.", "background": "A batch is in the background anyway."}


def unfit(body: bytes) -> UnsupportedFeature | None:
    """Why no batch can have this request answered; None: it can."""
    fields: dict[str, Any] = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    for name, why in _UNFIT.items():
        if name in fields and bytes(fields[name]) not in (b"null", b"false"):
            return UnsupportedFeature(f"{name} is not supported in a batch. {why} Leave it out.", param=name)
    return None
