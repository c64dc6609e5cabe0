"""Batches: /v1/batches.

What it is: the routes, and `Record`, a batch in the store as routes and runner change it: each change is made to the newest version, whoever else changes it.
What it does not know: how requests are run (batch_runner.py), what is in files (batch_lines.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec
from litestar import Litestar, Request, get, post
from litestar.types import ASGIApp

from penstock.core.protocol.errors import FinalError, InvalidRequest, NotFound
from penstock.transports import files as filing
from penstock.transports import listing
from penstock.transports.files import Files, seconds_of
from penstock.transports.folder import new_id
from penstock.transports.gateway import Gateway
from penstock.transports.metadata import check_metadata, row_meta
from penstock.transports.openai_schema import check_unknown, declare, decode
from penstock.transports.openapi import BODY
from penstock.transports.request import JsonReply, context_of, ignored_header
from penstock.transports.storage_schema import Batch, BatchRequest
from penstock.transports.store import Row, Store, StoreFull
from penstock.transports.surface import Surface

KIND, MESSAGES = "batch", "message_batch"
"""Of rows: OpenAI's batches, and Anthropic's, which the runner sees to as well."""
CANDIDATES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings")
"""Endpoints that batches may be for, where they are served."""
WINDOW = "24h"
WINDOW_S = 24 * 3600
MOST = 1000
"""Batches of a tenant that are kept."""
OPEN = ("validating", "in_progress", "finalizing", "cancelling")
"""States that do not last."""

AnyRequest = Request[Any, Any, Any]

declare(BatchRequest, {})


class Conflict(FinalError):
    status = 409
    type = "invalid_request_error"
    default_code = "batch_over"


class Private(msgspec.Struct, kw_only=True):
    """What is kept of a batch beside what clients see."""

    output_id: str
    """Of the file that answers go to; it is there once the batch is over, if there were any."""
    error_id: str
    output_ttl_s: float | None = None
    final: str = ""
    """The state in which it ends, once that is known."""
    input_id: str = ""
    """Of contents of the server's own that hold the requests, instead of a client's file; they go with the batch's end."""
    tally: dict[str, int] = {}
    """Of a batch that is over: how many requests ended how, where its form tells them apart."""

    def contents(self) -> set[str]:
        """Ids of what it has in the folder."""
        return {self.output_id, self.error_id, *([self.input_id] if self.input_id else [])}


class Gone(Exception):
    """The batch is no longer in the store."""


class Record:
    """A batch in the store, as it was when it was last read or written."""

    def __init__(self, store: Store, row: Row, kind: str = KIND) -> None:
        self._store = store
        self.kind = kind
        self.tenant = row.tenant
        self.id = row.id
        self._take(row)

    def _take(self, row: Row) -> None:
        self.batch = msgspec.json.decode(row.body, type=Batch)
        self.private = msgspec.json.decode(row.extra, type=Private)
        self._version = row.version

    async def read(self) -> None:
        """Raises Gone."""
        row = await self._store.row(self.kind, self.tenant, self.id)
        if row is None:
            raise Gone
        self._take(row)

    async def change(self, change: Callable[[Batch, Private], None]) -> None:
        """Have `change` change the newest version; it may be called again. Raises Gone, or what `change` raises."""
        while True:
            change(self.batch, self.private)
            body, extra = msgspec.json.encode(self.batch), msgspec.json.encode(self.private)
            if await self._store.update(
                self.kind, self.tenant, self.id, body, extra=extra, meta=meta_of(self.batch), version=self._version
            ):
                self._version += 1
                return
            await self.read()


def meta_of(batch: Batch) -> dict[str, str]:
    return row_meta(batch.metadata or {}, open=str(int(batch.status in OPEN)))


def served(app: Litestar) -> list[str]:
    """The endpoints that batches may be for."""
    paths = {route.path for route in app.routes if "POST" in getattr(route, "methods", ())}
    return [path for path in CANDIDATES if path in paths]


async def tell(files: Files, gateway: Gateway) -> None:
    """There is something to do for whichever edge sees to batches."""
    await files.disk(files.folder.touch_news)
    gateway.batch_news.set()


def batch_routes(gateway: Gateway, surface: Surface) -> list[Any]:
    """Handlers that share one gateway. Without a store there are none."""
    store = gateway.store
    if store is None:
        return []
    files = Files(store, gateway.config)

    async def find(request: AnyRequest) -> Record:
        id = str(request.path_params["batch_id"])
        row = await store.row(KIND, context_of(request.scope).tenant, id)
        if row is None:
            raise NotFound(f"There is no batch {id[:200]!r}.", param="batch_id")
        return Record(store, row)

    async def made(request: AnyRequest, asked: BatchRequest) -> Batch:
        """The batch that a request asks for. Raises InvalidRequest naming the field."""
        endpoints = served(request.app)
        if asked.endpoint not in endpoints:
            raise InvalidRequest(f"endpoint must be one of {', '.join(endpoints)}, but is {asked.endpoint[:100]!r}.", param="endpoint")
        if asked.completion_window != WINDOW:
            raise InvalidRequest(
                f"completion_window must be {WINDOW}, but is {asked.completion_window[:100]!r}.", param="completion_window"
            )
        file = await files.find(context_of(request.scope).tenant, asked.input_file_id)
        if file is None:
            raise InvalidRequest(f"input_file_id: there is no file {asked.input_file_id[:100]!r}.", param="input_file_id")
        if file.purpose != filing.BATCH:
            raise InvalidRequest(f"input_file_id: the purpose of that file is {file.purpose}, not batch.", param="input_file_id")
        now = int(time.time())
        return Batch(
            id=new_id("batch_"),
            endpoint=asked.endpoint,
            input_file_id=asked.input_file_id,
            completion_window=WINDOW,
            status="validating",
            created_at=now,
            expires_at=now + WINDOW_S,
            metadata=check_metadata(asked.metadata) if asked.metadata is not None else None,
        )

    @post("/v1/batches", summary="Have the requests of a file answered", tags=["storage"], status_code=200, opt={BODY: BatchRequest})
    async def create(request: AnyRequest) -> ASGIApp:
        asked, _, ignored = await surface.understood(await surface.body(request), decode, BatchRequest)
        check_unknown(ignored, strict=gateway.config.strict_fields)
        after = asked.output_expires_after
        ttl_s = None if after is None else seconds_of(after.seconds, after.anchor, "output_expires_after")
        batch = await made(request, asked)
        tenant = context_of(request.scope).tenant
        if await store.count(KIND, tenant) >= MOST:
            raise StoreFull(f"There are {MOST} batches already. The oldest must end first (--store-ttl-s).")
        private = Private(output_id=new_id("file-"), error_id=new_id("file-"), output_ttl_s=ttl_s)
        body = msgspec.json.encode(batch)
        await store.put(KIND, tenant, batch.id, body, extra=msgspec.json.encode(private), meta=meta_of(batch), keep=True)
        await tell(files, gateway)
        return JsonReply(body, headers=ignored_header(ignored))

    @get(
        "/v1/batches",
        summary="The batches that are kept",
        tags=["storage"],
        opt={listing.QUERY: listing.fields(limit=20, most=100, order=None)},
    )
    async def batches(request: AnyRequest) -> ASGIApp:
        page = listing.read_page(request.scope, limit=20, most=100, order="desc", orders=False)
        tenant = context_of(request.scope).tenant
        rows = await store.list(KIND, tenant, after=page.after, limit=page.limit + 1, order="desc")
        return JsonReply(listing.page_body([row.body for row in rows], [row.id for row in rows], page.limit))

    @get("/v1/batches/{batch_id:str}", summary="How a batch is getting on", tags=["storage"])
    async def one(request: AnyRequest) -> ASGIApp:
        return JsonReply(msgspec.json.encode((await find(request)).batch))

    @post("/v1/batches/{batch_id:str}/cancel", summary="End a batch", tags=["storage"], status_code=200)
    async def cancel(request: AnyRequest) -> ASGIApp:
        record = await find(request)
        await record.change(cancelling)
        await tell(files, gateway)
        return JsonReply(msgspec.json.encode(record.batch))

    return [create, batches, one, cancel]


def cancelling(batch: Batch, _: Private) -> None:
    """Raises Conflict for one that is over."""
    if batch.status not in OPEN:
        raise Conflict(f"This batch is {batch.status} already: it cannot be cancelled.")
    if batch.status in ("validating", "in_progress"):
        batch.status = "cancelling"
        batch.cancelling_at = int(time.time())
