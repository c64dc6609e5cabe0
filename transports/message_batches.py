"""Anthropic's message batches: /v1/messages/batches.

What it is: the routes. A batch is a row as OpenAI's batches are, of another kind, and the same runner works at it; its requests are contents of the server's own, and its
results are shown together when it has ended.
What it does not know: how requests are run (batch_runner.py), what a result looks like (batch_forms.py).
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl

import msgspec
from litestar import Request, delete, get, post
from litestar.types import ASGIApp

from penstock.core.protocol.errors import InvalidRequest, NotFound
from penstock.transports import listing
from penstock.transports.anthropic_replies import MessageBatch, MessageBatchCounts
from penstock.transports.anthropic_schema import refuse_unknown
from penstock.transports.anthropic_voice import MessagesVoice
from penstock.transports.batch_forms import CANCELED, EXPIRED
from penstock.transports.batches import MESSAGES, MOST, OPEN, WINDOW, WINDOW_S, Conflict, Private, Record, cancelling, meta_of, tell
from penstock.transports.files import READ_BYTES, Files
from penstock.transports.folder import new_id, write
from penstock.transports.gateway import Gateway
from penstock.transports.openai_schema import declare, decode
from penstock.transports.openapi import BODY
from penstock.transports.request import JsonReply, Receive, Scope, Send, context_of
from penstock.transports.storage_schema import Batch, RequestCounts
from penstock.transports.store import StoreFull
from penstock.transports.surface import Surface
from penstock.transports.voice import VOICE

PATH = "/v1/messages/batches"
URL = "/v1/messages"
FIELDS_OF_ALL = 10_000_000
"""Of all requests together; each is looked at again when its turn comes, as a request of its own."""
PAGE, LARGEST_PAGE = 20, 1000
QUERY: dict[str, dict[str, Any]] = {
    "limit": {"type": "integer", "minimum": 1, "maximum": LARGEST_PAGE, "default": PAGE, "description": "Most that come."},
    "after_id": {"type": "string", "description": "The last one of the page before: older ones come."},
    "before_id": {"type": "string", "description": "The first one of the page behind: newer ones come."},
}
_CUSTOM_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}")

AnyRequest = Request[Any, Any, Any]


class MessageBatchEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One request."""

    custom_id: str
    params: Annotated[msgspec.Raw, msgspec.Meta(extra_json_schema={"type": "object"})]


class MessageBatchRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/messages/batches."""

    requests: list[MessageBatchEntry]


declare(MessageBatchRequest, {})


def parse_batch(body: bytes, most: int) -> tuple[int, bytes]:
    """How many requests, and their lines as the runner reads them. Raises InvalidRequest naming the field: what is within `params` is not looked at yet, as in
    Anthropic's own API, where each request has its own error."""
    asked, _, unknown = decode(body, MessageBatchRequest, None, FIELDS_OF_ALL)
    refuse_unknown(unknown)
    entries: list[MessageBatchEntry] = asked.requests
    if not 1 <= len(entries) <= most:
        raise InvalidRequest(f"requests must hold 1 to {most} requests (--max-batch-lines), but holds {len(entries)}.", param="requests")
    lines: list[bytes] = []
    ids: set[str] = set()
    for index, entry in enumerate(entries):
        where = f"requests[{index}]"
        if not _CUSTOM_ID.fullmatch(entry.custom_id):
            raise InvalidRequest(
                f"{where}.custom_id must have 1 to 64 letters, digits, hyphens and underscores, but is {entry.custom_id[:80]!r}.",
                param=f"{where}.custom_id",
            )
        if entry.custom_id in ids:
            raise InvalidRequest(f"{where}.custom_id {entry.custom_id!r} was given before.", param=f"{where}.custom_id")
        ids.add(entry.custom_id)
        params = bytes(entry.params)
        if params[:1] != b"{":
            raise InvalidRequest(f"{where}.params must be an object.", param=f"{where}.params")
        if b"\n" in params:
            params = msgspec.json.format(params, indent=-1)
        lines.append(b'{"custom_id":"%s","method":"POST","url":"%s","body":%s}\n' % (entry.custom_id.encode(), URL.encode(), params))
    return len(lines), b"".join(lines)


def _when(seconds: int | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def shown(record: Record, base: str) -> MessageBatch:
    """The batch as Anthropic's clients know it; `base` is the server's own URL, without a slash at its end."""
    batch, tally = record.batch, record.private.tally
    over = batch.status not in OPEN
    total, succeeded = batch.request_counts.total, batch.request_counts.completed
    counts = MessageBatchCounts(processing=0 if over else total, succeeded=0, errored=0, canceled=0, expired=0)
    if over:
        counts.succeeded, counts.canceled, counts.expired = succeeded, tally.get(CANCELED, 0), tally.get(EXPIRED, 0)
        counts.errored = total - succeeded - counts.canceled - counts.expired
    status: Literal["in_progress", "canceling", "ended"] = "ended" if over else "canceling" if batch.cancelling_at else "in_progress"
    return MessageBatch(
        id=batch.id,
        type="message_batch",
        processing_status=status,
        request_counts=counts,
        ended_at=_when(batch.completed_at or batch.cancelled_at or batch.expired_at or batch.failed_at),
        created_at=_when(batch.created_at) or "",
        expires_at=_when(batch.expires_at) or "",
        archived_at=None,
        cancel_initiated_at=_when(batch.cancelling_at),
        results_url=f"{base}{PATH}/{batch.id}/results" if over else None,
    )


def own_url(scope: Scope, root_path: str) -> str:
    """The server's URL as the client of this request knows it, without a slash at its end; "" for one that does not say. A proxy that ended TLS says so in
    x-forwarded-proto: whoever else says it misleads only itself."""
    headers = context_of(scope).headers
    host, proto = (headers.get(name, b"").decode("latin-1") for name in (b"host", b"x-forwarded-proto"))
    scheme = "https" if proto.partition(",")[0].strip().lower() == "https" else scope["scheme"]
    return f"{scheme}://{host}{root_path.rstrip('/')}" if host else root_path.rstrip("/")


class Query:
    """What a list is asked for. Raises InvalidRequest naming the field."""

    def __init__(self, scope: Scope) -> None:
        given = dict(parse_qsl(scope["query_string"].decode("latin-1")[: listing.LONGEST], keep_blank_values=True))
        given.pop("beta", None)  # Anthropic's client says so of all that stands in its namespace beta
        for name in given:
            if name not in QUERY:
                raise InvalidRequest(f"{name[:100]!r} is not known here. The query may have {', '.join(QUERY)}.", param=name[:100])
        limit = given.get("limit", str(PAGE))
        if not (limit.isascii() and limit.isdecimal() and len(limit) < 5 and 1 <= int(limit) <= LARGEST_PAGE):
            raise InvalidRequest(f"limit must be a number from 1 to {LARGEST_PAGE}.", param="limit")
        self.limit = int(limit)
        self.after, self.before = given.get("after_id"), given.get("before_id")
        if self.after is not None and self.before is not None:
            raise InvalidRequest("after_id and before_id cannot both be given.", param="before_id")


class Results:
    """The lines of files, one after the other, read as they are sent. An ASGI application."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        descriptors: list[int] = []
        try:
            for path in self._paths:
                descriptors.append(await asyncio.to_thread(os.open, path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW))
            size = sum(os.fstat(one).st_size for one in descriptors)
            headers = [(b"content-type", b"application/x-jsonl"), (b"content-length", b"%d" % size)]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            for descriptor in descriptors:
                while data := await asyncio.to_thread(os.read, descriptor, READ_BYTES):
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except FileNotFoundError:  # deleted since it was found
            raise NotFound("This message batch is no longer there.", param="message_batch_id") from None
        finally:
            for descriptor in descriptors:
                os.close(descriptor)


def message_batch_routes(gateway: Gateway, surface: Surface) -> list[Any]:
    """Handlers that share one gateway. Without a store there are none."""
    store, config = gateway.store, gateway.config
    if store is None:
        return []
    files = Files(store, config)

    async def find(request: AnyRequest) -> Record:
        id = str(request.path_params["message_batch_id"])
        row = await store.row(MESSAGES, context_of(request.scope).tenant, id)
        if row is None:
            raise NotFound(f"There is no message batch {id[:200]!r}.", param="message_batch_id")
        return Record(store, row, MESSAGES)

    def reply(request: AnyRequest, record: Record) -> JsonReply:
        return JsonReply(msgspec.json.encode(shown(record, own_url(request.scope, config.root_path))))

    def keep_requests(id: str, lines: bytes) -> None:
        descriptor = files.folder.create(id)
        try:
            write(descriptor, lines)
        finally:
            os.close(descriptor)
        files.folder.finish(id)

    @post(
        PATH,
        summary="Have requests answered when there is time (Anthropic)",
        tags=["storage"],
        status_code=200,
        opt={BODY: MessageBatchRequest, VOICE: MessagesVoice},
    )
    async def create(request: AnyRequest) -> ASGIApp:
        count, lines = await surface.understood(await surface.body(request), parse_batch, config.max_batch_lines)
        tenant = context_of(request.scope).tenant
        if await store.count(MESSAGES, tenant) >= MOST:
            raise StoreFull(f"There are {MOST} message batches already. Delete some first.")
        await files.check_bytes()
        now = int(time.time())
        batch = Batch(
            id=new_id("msgbatch_"),
            endpoint=URL,
            input_file_id="",
            completion_window=WINDOW,
            status="in_progress",
            created_at=now,
            in_progress_at=now,
            expires_at=now + WINDOW_S,
            request_counts=RequestCounts(total=count),
        )
        private = Private(output_id=new_id("file-"), error_id=new_id("file-"), input_id=new_id("file-"))
        try:
            await files.disk(keep_requests, private.input_id, lines)
            body, extra = msgspec.json.encode(batch), msgspec.json.encode(private)
            await store.put(MESSAGES, tenant, batch.id, body, extra=extra, meta=meta_of(batch), keep=True)
        except BaseException:
            files.folder.remove(private.input_id)
            raise
        await tell(files, gateway)
        row = await store.row(MESSAGES, tenant, batch.id)
        assert row is not None  # it was put with keep
        return reply(request, Record(store, row, MESSAGES))

    @get(PATH, summary="The message batches that are kept (Anthropic)", tags=["storage"], opt={listing.QUERY: QUERY, VOICE: MessagesVoice})
    async def batches(request: AnyRequest) -> ASGIApp:
        asked, tenant = Query(request.scope), context_of(request.scope).tenant
        beside, name = (asked.after, "after_id") if asked.before is None else (asked.before, "before_id")
        if beside is not None and await store.row(MESSAGES, tenant, beside) is None:
            raise InvalidRequest(f"{name}: there is no message batch {beside[:200]!r}.", param=name)
        rows = await store.list(MESSAGES, tenant, after=beside, limit=asked.limit + 1, order="desc" if asked.before is None else "asc")
        more, rows = len(rows) > asked.limit, rows[: asked.limit]
        if asked.before is not None:
            rows.reverse()
        base = own_url(request.scope, config.root_path)
        page = {
            "data": [shown(Record(store, row, MESSAGES), base) for row in rows],
            "has_more": more,
            "first_id": rows[0].id if rows else None,
            "last_id": rows[-1].id if rows else None,
        }
        return JsonReply(msgspec.json.encode(page))

    @get(
        PATH + "/{message_batch_id:str}",
        summary="How a message batch is getting on (Anthropic)",
        tags=["storage"],
        opt={VOICE: MessagesVoice},
    )
    async def one(request: AnyRequest) -> ASGIApp:
        return reply(request, await find(request))

    @get(
        PATH + "/{message_batch_id:str}/results",
        summary="Its results, a line each (Anthropic)",
        tags=["storage"],
        opt={VOICE: MessagesVoice},
    )
    async def results(request: AnyRequest) -> ASGIApp:
        record = await find(request)
        if record.batch.status in OPEN:
            raise NotFound(f"The message batch {record.id} has not ended: there are no results yet.", param="message_batch_id")
        return Results([files.folder.of(id) for id in (record.batch.output_file_id, record.batch.error_file_id) if id])

    @post(
        PATH + "/{message_batch_id:str}/cancel",
        summary="End a message batch (Anthropic)",
        tags=["storage"],
        status_code=200,
        opt={VOICE: MessagesVoice},
    )
    async def cancel(request: AnyRequest) -> ASGIApp:
        record = await find(request)
        await record.change(cancelling)
        await tell(files, gateway)
        return reply(request, record)

    @delete(
        PATH + "/{message_batch_id:str}",
        summary="Forget a message batch (Anthropic)",
        tags=["storage"],
        status_code=200,
        opt={VOICE: MessagesVoice},
    )
    async def forget(request: AnyRequest) -> ASGIApp:
        record = await find(request)
        if record.batch.status in OPEN:
            raise Conflict(f"The message batch {record.id} has not ended. Cancel it first, and wait for its end.")
        await store.delete(MESSAGES, record.tenant, record.id)
        for id in record.private.contents():
            await files.disk(files.folder.remove, id)
        return JsonReply(msgspec.json.encode({"id": record.id, "type": "message_batch_deleted"}))

    return [create, batches, one, results, cancel, forget]
