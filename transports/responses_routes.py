"""OpenAI's Responses API: its routes.

What it is: /v1/responses, and what is asked of a response that is kept: itself, its events, its input, its end.
What it does not know: what requests mean (responses.py), how responses run (responses_jobs.py, responses_background.py), what they say (responses_voice.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl

import msgspec
from litestar import Request, delete, get, post
from litestar.types import ASGIApp

from penstock.core.protocol.errors import InvalidRequest, NotFound, PenstockError
from penstock.transports.gateway import Gateway
from penstock.transports.ids import SHARDS
from penstock.transports.listing import LONGEST, QUERY, fields
from penstock.transports.openapi import BODY
from penstock.transports.outbox import Pulse
from penstock.transports.questions import failure_of, find_model
from penstock.transports.request import JsonReply, RequestContext, Scope, context_of, ignored_header, new_rid, sane_id
from penstock.transports.responses import INCLUDABLE, Asked, parse, parse_count
from penstock.transports.responses_background import Background, Follow, Hub
from penstock.transports.responses_jobs import StreamedResponse, WholeResponse
from penstock.transports.responses_schema import InputTokensRequest, ResponsesRequest
from penstock.transports.responses_store import Record, Records
from penstock.transports.responses_voice import EventSse, ResponsesVoice
from penstock.transports.surface import Surface
from penstock.transports.voice import VOICE

AnyRequest = Request[Any, Any, Any]

MOST_LISTED = 100
CANCEL_S = 5.0
"""So long a cancel waits for the response to be over."""
LOOK_S = 0.02
"""So often it looks."""

_INCLUDE = {
    "include": {
        "type": "string",
        "enum": sorted(INCLUDABLE),
        "description": "No effect: log-probabilities and sealed reasoning are there if the response was asked for with them.",
    }
}
RETRIEVE: dict[str, dict[str, Any]] = {
    "stream": {"type": "boolean", "default": False, "description": "Its events, if it was created with background and stream."},
    "starting_after": {"type": "integer", "minimum": 0, "description": "With stream: the events behind this sequence_number alone."},
    "include_obfuscation": {"type": "boolean", "default": False, "description": "Only false: events are kept as they were sent."},
    **_INCLUDE,
}
ITEMS: dict[str, dict[str, Any]] = {**fields(limit=20, most=MOST_LISTED, order="desc"), **_INCLUDE}
"""Fields of queries."""

_json = msgspec.json.Encoder().encode


class _Length(msgspec.Struct):
    count: int
    max_model_len: int | None = None


def responses_routes(gateway: Gateway) -> list[Any]:
    """Litestar handlers that share one gateway."""
    config = gateway.config
    surface = Surface(gateway, EventSse())
    pulse = Pulse(config)
    records = Records(gateway.store) if gateway.store is not None else None
    hub = Hub()

    def kept() -> Records:
        if records is None:
            raise NotFound("This server keeps no responses (--no-store).", param="response_id")
        return records

    async def length(question: bytes, model: str) -> tuple[int, int | None]:
        if model:
            await find_model(gateway, model)
        answer = await gateway.query("tokenize", question, model=model)
        if answer.status != 200:
            raise failure_of(answer)
        found = msgspec.json.decode(answer.body, type=_Length)
        return found.count, found.max_model_len

    @post(
        "/v1/responses",
        summary="Answer a conversation (OpenAI's Responses)",
        tags=["generate"],
        status_code=200,
        opt={BODY: ResponsesRequest, VOICE: ResponsesVoice},
    )
    async def create(request: AnyRequest) -> ASGIApp:
        body = await surface.body(request)
        context = context_of(request.scope)
        own = sane_id(context.headers.get(b"x-request-id", b"").decode("latin-1")) is None
        rid = context.inner or (context.rid if own else new_rid())  # a client's own id can be guessed, and may come twice
        context.inner = rid
        asked = await parse(
            body,
            config,
            gateway.limits,
            rid=rid,
            core=lambda model: rid + SHARDS[gateway.door(model).pool.text],  # which text process has it
            tenant=context.tenant,
            records=records,
            length=length,
            work=surface.worked,
        )
        if asked.background:
            return await in_background(asked, context)
        if asked.stream:
            return StreamedResponse(gateway, asked, records, surface.framed(context), context, pulse)
        return WholeResponse(gateway, asked, records, context)

    async def in_background(asked: Asked, context: RequestContext) -> ASGIApp:
        if asked.stream:
            hub.check(config.max_streams)
        asked.call.request_id = None
        span = gateway.tracing.begin(context.span.traceparent, context.span.tracestate)
        alone = RequestContext(asked.rid, span, {}, context.raw_send, None)
        alone.principal, alone.peer = context.principal, context.peer
        try:
            queued = await Background(gateway, asked, kept(), alone, hub).start()
        except PenstockError as error:
            raise asked.renamed(error) from None
        if asked.stream:
            return Follow(gateway, kept(), surface.framed(context), hub, context.tenant, asked.id, -1, ignored_header(asked.call.ignored))
        return JsonReply(_json(queued), headers=ignored_header(asked.call.ignored))

    @post(
        "/v1/responses/input_tokens",
        summary="How many tokens a conversation has (OpenAI's Responses)",
        tags=["tokens"],
        status_code=200,
        opt={BODY: InputTokensRequest},
    )
    async def input_tokens(request: AnyRequest) -> ASGIApp:
        body = await surface.body(request)
        tenant = context_of(request.scope).tenant
        count, ignored = await parse_count(body, config, gateway.limits, tenant=tenant, records=records, length=length, work=surface.worked)
        return JsonReply(_json({"object": "response.input_tokens", "input_tokens": count}), headers=ignored_header(ignored))

    @get(
        "/v1/responses/{response_id:str}",
        summary="A response that is kept; with stream its events",
        tags=["responses"],
        opt={QUERY: RETRIEVE},
    )
    async def retrieve(request: AnyRequest) -> ASGIApp:
        response_id = str(request.path_params["response_id"])
        query = _query(request.scope, RETRIEVE)
        stream = _flag(query, "stream")
        after = _number(query, "starting_after", -1, 0, 2**53)
        if _flag(query, "include_obfuscation"):
            raise InvalidRequest(
                "include_obfuscation: events are kept as they were sent. Ask for it in stream_options.", param="include_obfuscation"
            )
        context = context_of(request.scope)
        tenant = context.tenant
        record = await kept().get(tenant, response_id)
        if not stream:
            if "starting_after" in query:
                raise InvalidRequest("starting_after is only allowed when stream is true.", param="starting_after")
            return JsonReply(record.body)
        if not (record.kept.background and record.kept.stream):
            raise InvalidRequest(
                "stream: only responses that were created with both background and stream have events to be followed.", param="stream"
            )
        if record.final and after >= 0 and after >= (count := await kept().count_events(tenant, response_id)):
            raise InvalidRequest(
                f"starting_after must be less than {count}: there are no more events, and none will come.", param="starting_after"
            )
        return Follow(gateway, kept(), surface.framed(context), hub, tenant, response_id, after)

    @delete("/v1/responses/{response_id:str}", summary="Delete a response; one in the background ends", tags=["responses"], status_code=200)
    async def remove(request: AnyRequest) -> ASGIApp:
        response_id = str(request.path_params["response_id"])
        tenant = context_of(request.scope).tenant
        record = await kept().get(tenant, response_id)
        if not record.final:
            await end(tenant, response_id, record)
        if not await kept().delete(tenant, response_id):
            await kept().get(tenant, response_id)
        return JsonReply(_json({"id": response_id, "object": "response", "deleted": True}))

    @post("/v1/responses/{response_id:str}/cancel", summary="End a response in the background", tags=["responses"], status_code=200)
    async def cancel(request: AnyRequest) -> ASGIApp:
        response_id = str(request.path_params["response_id"])
        tenant = context_of(request.scope).tenant
        record = await kept().get(tenant, response_id)
        if not record.kept.background:
            raise InvalidRequest("Only responses that were created with background can be cancelled.", param="response_id")
        if not record.final:
            record = await end(tenant, response_id, record)
        return JsonReply(record.body)

    async def end(tenant: str, response_id: str, record: Record) -> Record:
        """Have it end, wherever it runs. The record afterwards. Raises NotFound where it is gone."""
        job = hub.running.get((tenant, response_id))
        if job is not None:
            job.stop()
        question = _json({"rid": record.kept.rid, "tenant": tenant})
        loop = asyncio.get_running_loop()
        deadline = loop.time() + CANCEL_S
        told = job is not None
        while not record.final and loop.time() < deadline:
            if not told:  # text may not have it yet: it came by another process
                answer = await gateway.query("cancel", question, model=record.kept.model)
                if answer.status not in (200, 404):
                    raise failure_of(answer)
                told = answer.status == 200
            await asyncio.sleep(LOOK_S)
            record = await kept().get(tenant, response_id)
        return record

    @get("/v1/responses/{response_id:str}/input_items", summary="The items of a response's input", tags=["responses"], opt={QUERY: ITEMS})
    async def input_items(request: AnyRequest) -> ASGIApp:
        response_id = str(request.path_params["response_id"])
        query = _query(request.scope, ITEMS)
        limit = _number(query, "limit", 20, 1, MOST_LISTED)
        order = query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise InvalidRequest(f"order must be 'asc' or 'desc', but is {order[:80]!r}.", param="order")
        record = await kept().get(context_of(request.scope).tenant, response_id)
        items = await surface.worked(record.size, lambda: record.input)
        if order == "desc":
            items.reverse()
        after = query.get("after")
        if after is not None:
            at = next((number for number, item in enumerate(items) if item["id"] == after), None)
            if at is None:
                raise InvalidRequest(f"after: there is no item {after[:200]!r} in this input.", param="after")
            items = items[at + 1 :]
        shown = items[:limit]
        body = {
            "object": "list",
            "data": shown,
            "first_id": shown[0]["id"] if shown else None,
            "last_id": shown[-1]["id"] if shown else None,
            "has_more": len(items) > limit,
        }
        return JsonReply(_json(body))

    return [create, input_tokens, retrieve, remove, cancel, input_items]


def _query(scope: Scope, known: Mapping[str, Any]) -> dict[str, str]:
    """What the query asks for, but for `include`, which finds nothing more than there is. Raises InvalidRequest naming the field."""
    text = scope["query_string"].decode("latin-1")
    if len(text) > LONGEST:
        raise InvalidRequest(f"The query has more than {LONGEST} characters.")
    found: dict[str, str] = {}
    for name, value in parse_qsl(text, keep_blank_values=True):
        if name in ("include", "include[]"):
            if value not in INCLUDABLE:
                raise InvalidRequest(f"include: {value[:80]!r} is none of {', '.join(sorted(INCLUDABLE))}.", param="include")
        elif name in found:
            raise InvalidRequest(f"{name} is given more than once.", param=name)
        elif name not in known:
            raise InvalidRequest(f"{name[:80]!r} is not known here. The query may have {', '.join(known)}.", param=name[:80])
        else:
            found[name] = value
    return found


def _flag(query: Mapping[str, str], name: str) -> bool:
    value = query.get(name, "false")
    if value not in ("true", "false"):
        raise InvalidRequest(f"{name} must be true or false, but is {value[:80]!r}.", param=name)
    return value == "true"


def _number(query: Mapping[str, str], name: str, default: int, least: int, most: int) -> int:
    value = query.get(name)
    if value is None:
        return default
    if not (value.isascii() and value.isdecimal() and len(value) < 17 and least <= int(value) <= most):
        raise InvalidRequest(f"{name} must be from {least} to {most}, but is {value[:80]!r}.", param=name)
    return int(value)
