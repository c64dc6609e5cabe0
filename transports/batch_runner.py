"""The batch runner: which batches run when.

What it is: `BatchRunner`, a task of the first edge: it finds the batches that are not over, those of an earlier life of the server among them, and sees each to its end.
What it does not know: what running one is (batch_work.py), requests, HTTP.

Of each tenant one batch runs at a time, the oldest first; tenants take turns. Requests of batches have the lowest priority; and, as a policy may look
at none, only so many run at once (`Places`): fewer while others ask.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time

import msgspec
from litestar import Litestar

from penstock.core.protocol.errors import PenstockError
from penstock.transports import files
from penstock.transports.batch_work import Bench, Work, failed, now_s
from penstock.transports.batches import KIND, MESSAGES, Gone, Private, Record
from penstock.transports.files import Files
from penstock.transports.gateway import Gateway
from penstock.transports.places import Places
from penstock.transports.storage_schema import BatchError
from penstock.transports.store import Store

log = logging.getLogger("penstock.edge.batches")

KINDS = (KIND, MESSAGES)
NEWS_S = 1.0
"""How often the first edge looks whether another one took a batch."""
SWEEP_S = 600.0
ORPHAN_S = 3600.0
"""Contents that no file owns for so long are removed: of clients that left, of files whose time is over."""
TROUBLE_S = 5.0
"""Pause after the store or the disk failed."""


class BatchRunner:
    """`start` and `stop` on the loop; between them it works by itself. `app` answers the requests."""

    def __init__(self, gateway: Gateway, app: Litestar, store: Store) -> None:
        config = gateway.config
        self.gateway = gateway
        self.store = store
        self.files = Files(store, config)
        places = Places(gateway, config.batch_in_flight or max(1, config.max_num_seqs // 4))
        self._bench = Bench(gateway, app, self.files, places)
        self._shared = config.edge_workers > 1
        self._lasting = store.place.lasting
        self._main: asyncio.Task[None] | None = None
        self._works: dict[str, asyncio.Task[None]] = {}
        self._busy: dict[str, str] = {}
        """Tenant -> the batch of theirs whose turn it is."""

    def start(self) -> None:
        self._main = asyncio.get_running_loop().create_task(self._run(), name="batches")

    async def stop(self) -> None:
        """Leave everything as it is: a store that stays has it all."""
        tasks = [*self._works.values(), *([self._main] if self._main is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- which batches

    async def _run(self) -> None:
        swept = time.monotonic() - SWEEP_S
        if not (self._lasting or self._shared):
            await self._news(None)
        while True:
            seen = self.files.folder.news()
            try:
                await self._look()
                if time.monotonic() - swept >= SWEEP_S:
                    swept = time.monotonic()
                    await self._sweep()
            except PenstockError as error:
                log.error("batches cannot be looked at: %s", error.message)
            except Exception:
                log.exception("batches cannot be looked at")
            if not self._shared:
                await self._news(SWEEP_S)
                continue
            while not await self._news(NEWS_S) and self.files.folder.news() == seen and time.monotonic() - swept < SWEEP_S:
                pass

    async def _news(self, seconds: float | None) -> bool:
        """Wait for news, or so long. Were there any?"""
        news = self.gateway.batch_news
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await news.wait()
        there = news.is_set()
        news.clear()
        return there

    async def _look(self) -> None:
        """Start what can be started, tell what was cancelled."""
        rows = [(row, kind) for kind in KINDS for row in await self.store.list(kind, None, limit=100_000, order="asc", where={"open": "1"})]
        for row, kind in sorted(rows, key=lambda one: one[0].created):
            if row.id in self._works:
                continue
            record = Record(self.store, row, kind)
            batch = record.batch
            ending = batch.status in ("finalizing", "cancelling") or now_s() >= batch.expires_at
            if not ending and row.tenant in self._busy:
                continue
            if not ending:
                self._busy[row.tenant] = row.id
            task = asyncio.get_running_loop().create_task(self._drive(record), name=row.id)
            self._works[row.id] = task
            task.add_done_callback(functools.partial(self._over, row.id, row.tenant))

    def _over(self, id: str, tenant: str, _: asyncio.Task[None]) -> None:
        self._works.pop(id, None)
        if self._busy.get(tenant) == id:
            del self._busy[tenant]
        self.gateway.batch_news.set()

    async def _sweep(self) -> None:
        await self.store.sweep()
        known = {row.id for row in await self.store.list(files.KIND, None, limit=10_000_000)}
        for kind, where in ((KIND, {"open": "1"}), (MESSAGES, {})):  # the results of the latter are in no list of files
            for row in await self.store.list(kind, None, limit=10_000_000, where=where):
                known |= msgspec.json.decode(row.extra, type=Private).contents()
        await self.files.disk(self.files.folder.sweep, known, time.time() - ORPHAN_S)

    async def _drive(self, record: Record) -> None:
        """One batch to its end, whatever is in the way."""
        while True:
            try:
                await Work(self._bench, record).run()
                return
            except Gone:  # its time in the store is over
                await self._forget(record)
                return
            except PenstockError as error:
                log.error("batch %s has to wait: %s", record.id, error.message)
            except Exception:
                log.exception("batch %s failed", record.id)
                with contextlib.suppress(Gone, PenstockError):
                    wrong = BatchError(code="internal_error", message="The server made an error. It is logged.", param=None, line=None)
                    await record.change(failed([wrong]))
                    await self._forget(record)
                    return
            await asyncio.sleep(TROUBLE_S)
            with contextlib.suppress(Gone, PenstockError):
                await record.read()

    async def _forget(self, record: Record) -> None:
        for id in record.private.contents():
            with contextlib.suppress(PenstockError):
                await self.files.disk(self.files.folder.remove, id)
