"""The built-in transports: OpenAI's API over HTTP and SSE, and those of the files beside it.

What it is: a plugin of `penstock.edge` like any other; it names every transport here; `openai_routes` gives the routes of /v1/chat/completions, /v1/completions, /v1/models,
/tokenize, /detokenize and /tokenizer_info.
What it does not know: how requests run (gateway.py), the schema's rules (openai.py), replies (openai_voice.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from litestar import Request, get, post
from litestar.types import ASGIApp

from penstock.core.contract.hookspecs import API_LEVEL, TransportSpec, hookimpl
from penstock.core.contract.transports import Transport
from penstock.core.protocol.config import Config
from penstock.core.protocol.errors import InvalidRequest
from penstock.core.protocol.messages import Answer, Limits
from penstock.core.protocol.tables import Principal
from penstock.transports.anthropic import anthropic_routes
from penstock.transports.anthropic_models import ANTHROPICS, model_json, models_page, read_query, speaks_anthropic
from penstock.transports.anthropic_models import QUERY as MODELS_QUERY
from penstock.transports.batches import batch_routes
from penstock.transports.files import file_routes
from penstock.transports.frame import Sse
from penstock.transports.gateway import Gateway
from penstock.transports.grpc import grpc_transport
from penstock.transports.listing import QUERY
from penstock.transports.openai import parse_chat, parse_completion
from penstock.transports.openai_messages import check_messages
from penstock.transports.openai_schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest, check_unknown, decode
from penstock.transports.openai_voice import ChatVoice, CompletionVoice
from penstock.transports.openapi import BODY
from penstock.transports.playground.routes import playground_routes
from penstock.transports.questions import failure_of, find_model, models_for
from penstock.transports.request import JsonReply, context_of, error_reply, ignored_header
from penstock.transports.responses_routes import responses_routes
from penstock.transports.socket import socket_routes
from penstock.transports.stored_chats import answer_kept, stored_chat_routes
from penstock.transports.surface import Surface
from penstock.transports.tgi import tgi_routes
from penstock.transports.tokens import tokens_routes
from penstock.transports.voice import VOICE, VOICES

AnyRequest = Request[Any, Any, Any]


@hookimpl
def register_transports() -> list[TransportSpec]:
    return [
        _over_http("openai", "OpenAI's API over HTTP and SSE.", openai_routes),
        _over_http("anthropic", "Anthropic's messages over HTTP and SSE.", anthropic_routes),
        _over_http("responses", "OpenAI's Responses over HTTP and SSE.", responses_routes),
        _over_http("tokens", "Tokens in, tokens out (vLLM's) over HTTP and SSE.", tokens_routes),
        _over_http("websocket", "Any of them, many at once, over a WebSocket.", socket_routes),
        _over_http("tgi", "TGI's generate over HTTP and SSE.", tgi_routes),
        _over_http("playground", "A page to try the server in, at /.", playground_routes),
        TransportSpec(name="grpc", api_level=API_LEVEL["transports"], doc="Any of them over gRPC (--grpc-port).", factory=grpc_transport),
    ]


def _over_http(name: str, doc: str, routes: Callable[[Gateway], list[Any]]) -> TransportSpec:
    return TransportSpec(name=name, api_level=API_LEVEL["transports"], doc=doc, factory=lambda gateway: Transport(routes(gateway)))


def relay(answer: Answer) -> JsonReply:
    """A query's answer as the reply; an error in OpenAI's shape."""
    if answer.status == 200:
        return JsonReply(answer.body)
    return error_reply(failure_of(answer))


def parse_tokenize(body: bytes, config: Config, limits: Limits | None = None) -> tuple[str, bytes, list[str]]:
    """The model, the body of text's question, and the ignored fields. Raises InvalidRequest (or UnsupportedFeature) naming the field."""
    parsed, raw, ignored = decode(body, TokenizeRequest, limits)
    check_unknown(ignored, strict=config.strict_fields)
    if (parsed.prompt is None) == (parsed.messages is None):
        raise InvalidRequest("Give either prompt or messages.", param="prompt")
    if parsed.messages is not None:
        check_messages(parsed.messages, config.max_messages)
    return parsed.model or "", _question(TokenizeRequest, raw), ignored


def parse_detokenize(body: bytes, config: Config, limits: Limits | None = None) -> tuple[str, bytes, list[str]]:
    """As `parse_tokenize`."""
    parsed, raw, ignored = decode(body, DetokenizeRequest, limits)
    check_unknown(ignored, strict=config.strict_fields)
    return parsed.model or "", _question(DetokenizeRequest, raw), ignored


def _question(kind: type[msgspec.Struct], raw: Mapping[str, msgspec.Raw]) -> bytes:
    return msgspec.json.encode({name: value for name, value in raw.items() if name in kind.__struct_fields__})


def openai_routes(gateway: Gateway) -> list[Any]:
    """Litestar handlers that share one gateway."""
    config = gateway.config
    surface = Surface(gateway, Sse())

    @post(
        "/v1/chat/completions",
        summary="Answer a conversation",
        tags=["generate"],
        status_code=200,
        opt={BODY: ChatRequest, VOICE: ChatVoice},
    )
    async def chat_completions(request: AnyRequest) -> ASGIApp:
        call = await surface.understood(await surface.body(request), parse_chat, config, gateway.limits)
        if call.kept is not None:
            return answer_kept(gateway, surface, request, call)
        return surface.answer(request, call, ChatVoice(call))

    @post(
        "/v1/completions",
        summary="Continue a text",
        tags=["generate"],
        status_code=200,
        opt={BODY: CompletionRequest, VOICE: CompletionVoice},
    )
    async def completions(request: AnyRequest) -> ASGIApp:
        call = await surface.understood(await surface.body(request), parse_completion, config, gateway.limits)
        return surface.answer(request, call, CompletionVoice(call))

    @get("/v1/models", summary="The models that requests may name", tags=["models"], opt={QUERY: MODELS_QUERY, VOICES: ANTHROPICS})
    async def models(request: AnyRequest) -> ASGIApp:
        anthropic = speaks_anthropic(context_of(request.scope).headers)
        asked = read_query(request.scope, anthropic=anthropic)
        found = await models_for(gateway, context_of(request.scope).principal)
        return JsonReply(msgspec.json.encode(models_page(found, asked) if anthropic else {"object": "list", "data": found}))

    @get("/v1/models/{model_id:path}", summary="One model", tags=["models"], opt={VOICES: ANTHROPICS})
    async def model(request: AnyRequest) -> ASGIApp:
        found = await find_model(gateway, str(request.path_params["model_id"]).lstrip("/"), context_of(request.scope).principal)
        return JsonReply(msgspec.json.encode(model_json(found) if speaks_anthropic(context_of(request.scope).headers) else found))

    @post("/tokenize", summary="Text or messages to tokens", tags=["tokens"], status_code=200, opt={BODY: TokenizeRequest})
    async def tokenize(request: AnyRequest) -> ASGIApp:
        model, question, ignored = await surface.understood(await surface.body(request), parse_tokenize, config, gateway.limits)
        return await ask("tokenize", model, question, ignored, context_of(request.scope).principal)

    @post("/detokenize", summary="Tokens to text", tags=["tokens"], status_code=200, opt={BODY: DetokenizeRequest})
    async def detokenize(request: AnyRequest) -> ASGIApp:
        model, question, ignored = await surface.understood(await surface.body(request), parse_detokenize, config, gateway.limits)
        return await ask("detokenize", model, question, ignored, context_of(request.scope).principal)

    async def ask(what: str, model: str, question: bytes, ignored: list[str], principal: Principal) -> JsonReply:
        if model:
            await find_model(gateway, model, principal)
        return _with_ignored(relay(await gateway.query(what, question, model=model)), ignored)

    @get("/tokenizer_info", summary="The tokenizer's facts and chat template", tags=["tokens"])
    async def tokenizer_info() -> ASGIApp:
        return relay(await gateway.query("tokenizer_info"))

    stored = stored_chat_routes(gateway, surface)
    stored += [*file_routes(gateway), *batch_routes(gateway, surface)]
    return [chat_completions, *stored, completions, models, model, tokenize, detokenize, tokenizer_info]


def _with_ignored(reply: JsonReply, ignored: list[str]) -> JsonReply:
    reply.add_headers(ignored_header(ignored))
    return reply
