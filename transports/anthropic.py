"""Anthropic's API: /v1/messages and /v1/messages/count_tokens.

What it is: `parse_messages` and `parse_count`, which translate a conversation into the chat that text knows, and the routes. The system prompt becomes a
system message; turns of one role in a row are one turn; a conversation that ends with the assistant's words is continued, as there.
What it does not know: replies (anthropic_voice.py), how requests run, chat templates.
"""

from __future__ import annotations

from typing import Any

import msgspec
from litestar import Request, post
from litestar.types import ASGIApp

from penstock.core.actors.text.bounds import check_messages
from penstock.core.protocol.config import Config
from penstock.core.protocol.errors import InvalidRequest, UnsupportedFeature
from penstock.core.protocol.messages import Limits
from penstock.core.protocol.sampling import INT_LIMIT, SamplingParams, shorten
from penstock.transports.anthropic_schema import CountTokensRequest, MessagesRequest, decode_strictly
from penstock.transports.anthropic_voice import MessagesVoice
from penstock.transports.frame import TypedSse
from penstock.transports.gateway import Gateway
from penstock.transports.generation import Generation
from penstock.transports.openapi import BODY
from penstock.transports.questions import failure_of, find_model
from penstock.transports.request import JsonReply
from penstock.transports.surface import Surface
from penstock.transports.voice import VOICE

_BLOCK = frozenset({"type", "text", "cache_control", "citations"})
_SAMPLING = ("temperature", "top_p", "top_k", "max_tokens")


def parse_messages(body: bytes, config: Config, limits: Limits | None = None) -> Generation:
    """Raises InvalidRequest (or UnsupportedFeature) naming the field."""
    request = decode_strictly(body, MessagesRequest, limits)
    if not 1 <= request.max_tokens < INT_LIMIT:
        raise InvalidRequest(f"max_tokens must be from 1 to {INT_LIMIT - 1}, but is {shorten(request.max_tokens)}.", param="max_tokens")
    values: dict[str, Any] = {name: value for name in _SAMPLING if (value := getattr(request, name)) is not None}
    if request.stop_sequences:
        if len(request.stop_sequences) > config.max_stop or not all(request.stop_sequences):
            raise InvalidRequest(
                f"stop_sequences may hold at most {config.max_stop} texts (--max-stop), none of them empty.", param="stop_sequences"
            )
        values["stop"] = request.stop_sequences
    return Generation(
        kind="chat",
        prompts=[_chat(request, config)],
        sampling=SamplingParams(**values).validate(max_stop=config.max_stop),
        explicit=sorted(values),
        names={"stop": "stop_sequences"},
        model=request.model,
        add_special_tokens=False,
        stream=bool(request.stream),
    )


def parse_count(body: bytes, config: Config, limits: Limits | None = None) -> tuple[str, bytes]:
    """The model, and the body of text's "tokenize" question. Raises as `parse_messages`."""
    request = decode_strictly(body, CountTokensRequest, limits)
    chat = _chat(request, config)
    question = {**chat, "messages": msgspec.Raw(chat["messages"]), "add_special_tokens": False}
    return request.model, msgspec.json.encode(question)


def _chat(request: CountTokensRequest, config: Config) -> dict[str, Any]:
    """Submit's fields of the conversation."""
    check_messages(len(request.messages), config.max_messages)
    if not request.messages:
        raise InvalidRequest("messages must not be empty.", param="messages")
    turns: list[tuple[str, list[str]]] = []
    if request.system:
        turns.append(("system", _texts(request.system, "system")))
    for index, message in enumerate(request.messages):
        texts = _texts(message.content, f"messages[{index}].content")
        if turns and turns[-1][0] == message.role:
            turns[-1][1].extend(texts)
        else:
            turns.append((message.role, texts))
    role, last = turns[-1]
    continues = role == "assistant"
    if continues and (not last or not last[-1] or last[-1][-1].isspace()):
        where = f"messages[{len(request.messages) - 1}].content"
        raise InvalidRequest(
            f"{where}: the assistant's final words are continued, so they must not be empty or end with white space.", param=where
        )
    return {
        "messages": msgspec.json.encode([{"role": role, "content": _content(texts)} for role, texts in turns]),
        "add_generation_prompt": not continues,
        "continue_final_message": continues,
    }


def _content(texts: list[str]) -> str | list[dict[str, str]]:
    return texts[0] if len(texts) == 1 else [{"type": "text", "text": text} for text in texts]


def _texts(content: str | list[dict[str, Any]], where: str) -> list[str]:
    """Of a text, or of blocks."""
    return [content] if isinstance(content, str) else [_block(block, f"{where}[{index}]") for index, block in enumerate(content)]


def _block(block: dict[str, Any], where: str) -> str:
    kind = block.get("type")
    if not isinstance(kind, str):
        raise InvalidRequest(f"{where}.type must be a text such as 'text'.", param=f"{where}.type")
    if kind != "text":
        raise UnsupportedFeature(f"{where}: content of type {kind[:80]!r} is not supported here: this server takes text only.", param=where)
    text = block.get("text")
    if not isinstance(text, str):
        raise InvalidRequest(f"{where}.text must be a text.", param=f"{where}.text")
    if block.get("citations"):
        raise UnsupportedFeature(f"{where}.citations is not supported here. Leave it out.", param=f"{where}.citations")
    for name in block.keys() - _BLOCK:
        raise InvalidRequest(f"{where}.{name[:80]} is not a field of a block of text. Leave it out.", param=f"{where}.{name[:80]}")
    if not isinstance(block.get("cache_control"), dict | None):
        raise InvalidRequest(f"{where}.cache_control must be an object.", param=f"{where}.cache_control")
    return text


class _Count(msgspec.Struct):
    count: int


def anthropic_routes(gateway: Gateway) -> list[Any]:
    """TransportSpec.factory."""
    config = gateway.config
    surface = Surface(gateway, TypedSse())

    @post(
        "/v1/messages",
        summary="Answer a conversation (Anthropic)",
        tags=["generate"],
        status_code=200,
        opt={BODY: MessagesRequest, VOICE: MessagesVoice},
    )
    async def messages(request: Request[Any, Any, Any]) -> ASGIApp:
        generation = parse_messages(await surface.body(request), config, gateway.limits)
        return surface.answer(request, generation, MessagesVoice())

    @post(
        "/v1/messages/count_tokens",
        summary="How many tokens a conversation has (Anthropic)",
        tags=["tokens"],
        status_code=200,
        opt={BODY: CountTokensRequest, VOICE: MessagesVoice},
    )
    async def count_tokens(request: Request[Any, Any, Any]) -> ASGIApp:
        model, question = parse_count(await surface.body(request), config, gateway.limits)
        await find_model(gateway, model)
        answer = await gateway.query("tokenize", question, model=model)
        if answer.status != 200:
            raise failure_of(answer)
        return JsonReply(msgspec.json.encode({"input_tokens": msgspec.json.decode(answer.body, type=_Count).count}))

    return [messages, count_tokens]
