"""Chat completions that are kept: store true, and the routes that find them again.

What it is: `KeptWhole` and `KeptStream`, the two Jobs whose answer goes into the store before its last byte leaves (a stream is folded into the whole reply that it
would have been), and the routes to list, read, change and delete what is there.
What it does not know: how answers are made (replies.py, stream.py, openai_voice.py), what the store is made of.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from litestar import Request, delete, get, post
from litestar.types import ASGIApp

from penstock.core.protocol.errors import InvalidRequest, NotFound, PenstockError, UnsupportedFeature
from penstock.transports import listing
from penstock.transports.blame import refusal
from penstock.transports.elsewhere import instead_of
from penstock.transports.frame import Frame
from penstock.transports.gateway import Batch, Gateway
from penstock.transports.metadata import check_metadata, row_meta
from penstock.transports.openai import Call
from penstock.transports.openai_schema import MetadataRequest, check_unknown, decode
from penstock.transports.openai_voice import ChatVoice
from penstock.transports.openapi import BODY
from penstock.transports.outbox import Pulse
from penstock.transports.replies import WholeReply
from penstock.transports.request import Header, JsonReply, Receive, RequestContext, Scope, Send, context_of, ignored_header
from penstock.transports.store import Row, Store
from penstock.transports.stream import StreamReply
from penstock.transports.surface import Surface
from penstock.transports.voice import Choice, Head, Pieces, Prompt, Usage

log = logging.getLogger("penstock.edge.store")

KIND = "chat.completion"
LISTED = listing.fields(limit=20, most=100, order="asc", filters=("model", "metadata"))

AnyRequest = Request[Any, Any, Any]


def check_id(context: RequestContext) -> None:
    """Raises InvalidRequest for an id under which nothing could be found again."""
    if "/" in context.rid:
        raise InvalidRequest("A request whose answer is kept may have no '/' in its id (x-request-id, request_id).", param="request_id")


async def keep(store: Store, context: RequestContext, call: Call, id: str, body: bytes) -> None:
    """Put the reply into the store, with what was asked. Raises StoreFull or StoreUnavailable."""
    kept = call.kept
    assert kept is not None
    more = msgspec.json.encode({"request_id": context.rid, **kept.shown, "metadata": kept.metadata})
    model = msgspec.json.decode(body, type=_Named).model
    await store.put(KIND, context.tenant, id, body[:-1] + b"," + more[1:], extra=kept.messages, meta=row_meta(kept.metadata, model=model))


class _Named(msgspec.Struct):
    model: str


class KeptWhole(WholeReply):
    def __init__(self, gateway: Gateway, call: Call, context: RequestContext, store: Store) -> None:
        super().__init__(gateway, call, ChatVoice(call), context)
        self._call = call
        self._store = store
        check_id(context)

    async def send(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await keep(self._store, self.context, self._call, self.id, body)
        except PenstockError as error:
            await refusal(scope.get("route_handler"), error, voice=self.voice)(scope, receive, send)
        else:
            await super().send(body, scope, receive, send)


class KeptStream(StreamReply):
    def __init__(self, gateway: Gateway, call: Call, frame: Frame, context: RequestContext, pulse: Pulse, store: Store) -> None:
        self._fold = Folding(call)
        super().__init__(gateway, call, self._fold, frame, context, pulse)
        self._call = call
        self._store = store
        self._keeping: asyncio.Task[None] | None = None
        check_id(context)

    def complete(self) -> None:
        self._keeping = asyncio.get_running_loop().create_task(self._keep())

    async def _keep(self) -> None:
        try:
            body = self._fold.folded(self.usage(), self.timings())
            await keep(self._store, self.context, self._call, self.id, body)
        except PenstockError as error:
            self.leg_failed(error)
        except Exception:
            log.exception("request %s: its answer could not be kept", self.context.rid)
            self.leg_failed(PenstockError("The server made an error while it kept the answer."))
        else:
            super().complete()


class Folding:
    """A ChatVoice that remembers what it said. Its rows are never plain, so that it hears of all of them."""

    plain = False

    def __init__(self, call: Call) -> None:
        self._voice = ChatVoice(call)
        self._whole = ChatVoice(call)
        self._call = call
        self._prompt = Prompt()
        self._choices = [Choice() for _ in range(call.choices)]

    def begin(self, head: Head) -> str:
        self._whole.begin(head)
        return self._voice.begin(head)

    def whole(self, prompts: Sequence[Prompt], choices: Sequence[Choice], usage: Usage, timings: dict[str, Any] | None) -> bytes:
        return self._whole.whole(prompts, choices, usage, timings)

    def folded(self, usage: Usage, timings: dict[str, Any] | None) -> bytes:
        """The whole reply."""
        return self.whole([self._prompt], self._choices, usage, timings)

    def around(self, index: int) -> tuple[bytes, bytes]:
        return self._voice.around(index)

    def opened(self, index: int, prompt: Prompt, row: int, batch: Batch) -> Iterable[bytes | Pieces]:
        self._prompt = prompt
        return self._voice.opened(index, prompt, row, batch)

    def piece(self, index: int, text: str, row: int, batch: Batch) -> Iterable[bytes]:
        choice = self._choices[index]
        choice.take(text, row, batch)
        if self._call.want_ids:
            choice.tokens += batch.tokens(row)
        extra = batch.extra(row)
        if extra is not None and extra.logprobs:
            choice.logprobs += extra.logprobs
        return self._voice.piece(index, text, row, batch)

    def closed(self, index: int, reason: str, error: PenstockError | None, row: int, batch: Batch) -> Iterable[bytes]:
        choice = self._choices[index]
        choice.reason, choice.error = reason, error
        extra = batch.extra(row)
        if extra is not None:
            choice.stop_reason, choice.unfinished = extra.stop_reason, extra.unfinished
        return self._voice.closed(index, reason, error, row, batch)

    def ended(self, usage: Usage, timings: dict[str, Any] | None) -> Iterable[bytes]:
        return self._voice.ended(usage, timings)

    def broken(self, error: PenstockError) -> Iterable[bytes]:
        return self._voice.broken(error)

    @staticmethod
    def refuse(error: PenstockError, headers: Iterable[Header] = ()) -> JsonReply:
        return ChatVoice.refuse(error, headers)


def answer_kept(gateway: Gateway, surface: Surface, request: AnyRequest, call: Call) -> ASGIApp:
    """The reply to a chat completion with store true."""
    if gateway.store is None:
        raise UnsupportedFeature("store: this server keeps nothing (--no-store). Leave it out, or set it to false.", param="store")
    context = context_of(request.scope)
    if call.stream:
        return KeptStream(gateway, call, surface.framed(context), context, surface.pulse, gateway.store)
    return KeptWhole(gateway, call, context, gateway.store)


# ------------------------------------------------------------------ routes


def stored_chat_routes(gateway: Gateway, surface: Surface) -> list[Any]:
    """Handlers that share one gateway. Without a store there are none."""
    store = gateway.store
    if store is None:
        return []

    async def find(request: AnyRequest) -> tuple[str, Row]:
        tenant = context_of(request.scope).tenant
        row = await store.row(KIND, tenant, str(request.path_params["completion_id"]))
        if row is None:
            raise missing(request)
        return tenant, row

    @get("/v1/chat/completions", summary="The answers that are kept", tags=["storage"], opt={listing.QUERY: LISTED})
    async def stored(request: AnyRequest) -> ASGIApp:
        page = listing.read_page(request.scope, limit=20, most=100, order="asc", filters=("model", "metadata"))
        tenant = context_of(request.scope).tenant
        rows = await store.list(KIND, tenant, after=page.after, limit=page.limit + 1, order=page.order, where=page.where)
        return JsonReply(listing.page_body([row.body for row in rows], [row.id for row in rows], page.limit))

    @get("/v1/chat/completions/{completion_id:str}", summary="One of them", tags=["storage"])
    async def one(request: AnyRequest) -> ASGIApp:
        _, row = await find(request)
        return JsonReply(row.body)

    @post(
        "/v1/chat/completions/{completion_id:str}",
        summary="Change its metadata",
        tags=["storage"],
        status_code=200,
        opt={BODY: MetadataRequest},
    )
    async def change(request: AnyRequest) -> ASGIApp:
        raw = await surface.body(request)
        await find(request)  # what is not there need not be asked for properly
        parsed, _, ignored = await surface.understood(raw, decode, MetadataRequest)
        check_unknown(ignored, strict=gateway.config.strict_fields)
        metadata = check_metadata(parsed.metadata)
        while True:
            tenant, row = await find(request)
            said = msgspec.json.decode(row.body, type=dict[str, msgspec.Raw])
            said["metadata"] = msgspec.Raw(msgspec.json.encode(metadata))
            body = msgspec.json.encode(said)
            if await store.update(
                KIND, tenant, row.id, body, meta=row_meta(metadata, model=row.meta.get("model", "")), version=row.version
            ):
                return JsonReply(body, headers=ignored_header(ignored))

    @delete("/v1/chat/completions/{completion_id:str}", summary="Forget it", tags=["storage"], status_code=200)
    async def forget(request: AnyRequest) -> ASGIApp:
        id = str(request.path_params["completion_id"])
        if not await store.delete(KIND, context_of(request.scope).tenant, id):
            raise missing(request)
        return JsonReply(msgspec.json.encode({"object": "chat.completion.deleted", "id": id, "deleted": True}))

    @get(
        "/v1/chat/completions/{completion_id:str}/messages",
        summary="What was asked",
        tags=["storage"],
        opt={listing.QUERY: listing.fields(limit=20, most=100, order="asc")},
    )
    async def messages(request: AnyRequest) -> ASGIApp:
        page = listing.read_page(request.scope, limit=20, most=100, order="asc")
        _, row = await find(request)
        asked = [as_stored(row.id, i, message) for i, message in enumerate(msgspec.json.decode(row.extra, type=list[dict[str, Any]]))]
        if page.order == "desc":
            asked.reverse()
        ids = [message["id"] for message in asked]
        start = 0
        if page.after is not None:
            if page.after not in ids:
                raise InvalidRequest(f"after: there is no {page.after[:200]!r} here.", param="after")
            start = ids.index(page.after) + 1
        shown = slice(start, start + page.limit + 1)
        return JsonReply(listing.page_body([msgspec.json.encode(one) for one in asked[shown]], ids[shown], page.limit))

    return [stored, one, change, forget, messages]


def missing(request: AnyRequest) -> NotFound:
    path = request.scope["path"]
    if instead := instead_of(path):  # its last word is no id
        return NotFound(f"There is nothing at {path[:200]!r}. {instead}")
    return NotFound(f"No answer {str(request.path_params['completion_id'])[:200]!r} is kept.", param="completion_id")


def as_stored(id: str, index: int, message: dict[str, Any]) -> dict[str, Any]:
    """A message of a request as the list of a kept answer shows it: content is a text, or the parts stand beside it."""
    content = message.get("content")
    parts = content if isinstance(content, list) else None
    text = "".join(part.get("text") or "" for part in parts) if parts is not None else content
    return {**message, "id": f"{id}-{index}", "content": text, "content_parts": parts}
