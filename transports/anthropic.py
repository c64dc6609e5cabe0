"""Anthropic's API: /v1/messages and /v1/messages/count_tokens; message_batches.py has its batches.

What it is: `parse_messages` and `parse_count`, which translate a conversation into the chat that text knows, and the routes. The system prompt becomes a
system message; turns of one role in a row are one turn; a conversation that ends with the assistant's words is continued, as there.
What it does not know: replies (anthropic_voice.py), how requests run, chat templates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from litestar import Request, post
from litestar.types import ASGIApp

from penstock.core.actors.text.bounds import COUNTED, check_messages
from penstock.core.protocol.config import Config
from penstock.core.protocol.errors import InvalidRequest
from penstock.core.protocol.messages import Limits
from penstock.core.protocol.sampling import INT_LIMIT, shorten
from penstock.transports.anthropic_models import ANTHROPICS
from penstock.transports.anthropic_options import blamed, form_of, names_a_tool, omits_thinking, options_of, renamed
from penstock.transports.anthropic_schema import CountTokensRequest, MessagesRequest, check_cache, decode_strictly
from penstock.transports.anthropic_turns import chat_of
from penstock.transports.anthropic_voice import MessagesVoice
from penstock.transports.frame import TypedSse
from penstock.transports.gateway import Gateway
from penstock.transports.generation import Generation
from penstock.transports.message_batches import message_batch_routes
from penstock.transports.openai import parse_chat
from penstock.transports.openapi import BODY
from penstock.transports.questions import failure_of, find_model
from penstock.transports.request import JsonReply, context_of
from penstock.transports.surface import Surface
from penstock.transports.voice import VOICE, VOICES

OLD = b"2023-01-01"
"""The one version of the API (header anthropic-version) whose streams are others than here: each event repeats all of the text."""

LONGEST_NAME = 128
"""Characters of a tool's name."""

LONGEST_USER = 512
"""Characters of metadata.user_id."""

_SAMPLING = ("temperature", "top_p", "top_k", "max_tokens")


def parse_messages(body: bytes, config: Config, limits: Limits | None = None) -> tuple[Generation, MessagesVoice]:
    """Raises InvalidRequest (or UnsupportedFeature) naming the field."""
    request = decode_strictly(body, MessagesRequest, limits)
    if not 1 <= request.max_tokens < INT_LIMIT:
        raise InvalidRequest(f"max_tokens must be from 1 to {INT_LIMIT - 1}, but is {shorten(request.max_tokens)}.", param="max_tokens")
    if request.temperature is not None and not 0 <= request.temperature <= 1:
        raise InvalidRequest(f"temperature must be from 0 to 1, but is {request.temperature}.", param="temperature")
    _check_metadata(request.metadata)
    fields: dict[str, Any] = {name: value for name in _SAMPLING if (value := getattr(request, name)) is not None}
    if request.stop_sequences:
        if len(request.stop_sequences) > config.max_stop or not all(request.stop_sequences):
            raise InvalidRequest(
                f"stop_sequences may hold at most {config.max_stop} texts (--max-stop), none of them empty.", param="stop_sequences"
            )
        fields["stop"] = request.stop_sequences
    if request.stream_smoothing_ms is not None:
        fields["stream_smoothing_ms"] = request.stream_smoothing_ms
    generation = _understood(request, {**fields, "stream": bool(request.stream)}, config, request.max_tokens)
    return generation, MessagesVoice(omit_thinking=omits_thinking(request), tool_named=names_a_tool(request))


def _check_metadata(given: dict[str, Any] | None) -> None:
    for name in given or {}:
        if name != "user_id":
            raise InvalidRequest(f"metadata.{name[:80]} is not a field of metadata. Leave it out.", param=f"metadata.{name[:80]}")
    user = (given or {}).get("user_id")
    if user is not None and not (isinstance(user, str) and len(user) <= LONGEST_USER):
        raise InvalidRequest(f"metadata.user_id must be a text of at most {LONGEST_USER} characters.", param="metadata.user_id")


def parse_count(body: bytes, config: Config, limits: Limits | None = None) -> tuple[str, bytes]:
    """The model, and the body of text's "tokenize" question. Raises as `parse_messages`."""
    request = decode_strictly(body, CountTokensRequest, limits)
    (prompt,) = _understood(request, {}, config, None).prompts
    question: dict[str, Any] = {
        "messages": msgspec.Raw(prompt["messages"]),
        "add_generation_prompt": prompt["add_generation_prompt"],
        "continue_final_message": prompt["continue_final_message"],
        "add_special_tokens": False,
        "model_has": "messages",
    }
    if prompt.get("tools"):
        question["tools"] = msgspec.Raw(prompt["tools"])
    if prompt["template_kwargs"]:
        question["chat_template_kwargs"] = msgspec.Raw(prompt["template_kwargs"])
    return request.model, msgspec.json.encode(question)


def _understood(request: CountTokensRequest, fields: dict[str, Any], config: Config, max_tokens: int | None) -> Generation:
    """The request as a chat, of which the chat's own parser says what is possible. Raises InvalidRequest or UnsupportedFeature naming the field."""
    check_messages(len(request.messages), config.max_messages)
    check_cache(request.cache_control, "cache_control")
    form = form_of(request)
    try:
        chat = chat_of(request)
        fields |= options_of(request, max_tokens, chat.continued)
        fields |= {"model": request.model, "messages": chat.messages}
        fields |= {"add_generation_prompt": not chat.continued, "continue_final_message": bool(chat.continued)}
        body = msgspec.json.encode(fields)
    except RecursionError:
        raise InvalidRequest("The request body is nested too deeply: fewer levels of lists and objects are needed.") from None
    try:
        generation = parse_chat(body, config, most=COUNTED, longest_name=LONGEST_NAME)
    except InvalidRequest as error:
        param = None if error.param is None else renamed(error.param, form)
        raise type(error)(blamed(error, form), param=param, code=error.code) from None
    generation.names["stop"] = "stop_sequences"
    if generation.grammar is not None:
        generation.grammar = msgspec.structs.replace(generation.grammar, field=renamed(generation.grammar.field, form))
    return generation


def check_version(headers: Mapping[bytes, bytes]) -> None:
    """Of the header anthropic-version, which may be missing, or be of a version that is newer than this code. Raises InvalidRequest."""
    if headers.get(b"anthropic-version") == OLD:
        raise InvalidRequest("anthropic-version 2023-01-01 is not spoken here. Use 2023-06-01 or a newer one.", param="anthropic-version")


class _Count(msgspec.Struct):
    count: int


def anthropic_routes(gateway: Gateway) -> list[Any]:
    """Litestar handlers that share one gateway."""
    config = gateway.config
    surface = Surface(gateway, TypedSse())

    @post(
        "/v1/messages",
        summary="Answer a conversation (Anthropic)",
        tags=["generate"],
        status_code=200,
        opt={BODY: MessagesRequest, VOICE: MessagesVoice, VOICES: ANTHROPICS},
    )
    async def messages(request: Request[Any, Any, Any]) -> ASGIApp:
        check_version(context_of(request.scope).headers)
        generation, voice = await surface.understood(await surface.body(request), parse_messages, config, gateway.limits)
        return surface.answer(request, generation, voice)

    @post(
        "/v1/messages/count_tokens",
        summary="How many tokens a conversation has (Anthropic)",
        tags=["tokens"],
        status_code=200,
        opt={BODY: CountTokensRequest, VOICE: MessagesVoice},
    )
    async def count_tokens(request: Request[Any, Any, Any]) -> ASGIApp:
        check_version(context_of(request.scope).headers)
        model, question = await surface.understood(await surface.body(request), parse_count, config, gateway.limits)
        await find_model(gateway, model, context_of(request.scope).principal)
        answer = await gateway.query("tokenize", question, model=model)
        if answer.status != 200:
            raise failure_of(answer)
        return JsonReply(msgspec.json.encode({"input_tokens": msgspec.json.decode(answer.body, type=_Count).count}))

    return [messages, count_tokens, *message_batch_routes(gateway, surface)]
