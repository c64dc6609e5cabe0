"""From a request of OpenAI's Responses API to what text is told.

What it is: `parse`, which checks the fields of a request, puts the conversation together and has chat's parser make a Call of it, so that what is true of chat is true
here; `Asked`, what came of it. Errors name the fields of this API.
What it does not know: items (responses_items.py), replies (responses_voice.py), routes, where responses are kept.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from penstock.core.protocol.config import Config
from penstock.core.protocol.errors import InvalidRequest, PenstockError, UnsupportedFeature
from penstock.core.protocol.messages import Limits
from penstock.transports.openai import Call, parse_chat
from penstock.transports.openai_schema import check_unknown, decode, fields_of
from penstock.transports.responses_fit import fitted
from penstock.transports.responses_items import Conversation, Item, chat_choice, chat_tools, items_of, tool_echo
from penstock.transports.responses_schema import (
    LIKE_CHAT,
    InputTokensRequest,
    ReasoningOptions,
    ResponsesRequest,
    ResponseStreamOptions,
    TextOptions,
)
from penstock.transports.responses_store import Records
from penstock.transports.responses_voice import Shown

LOGPROBS, SEALED = "message.output_text.logprobs", "reasoning.encrypted_content"
INCLUDABLE = frozenset(
    {
        LOGPROBS,
        SEALED,
        "file_search_call.results",
        "web_search_call.results",
        "web_search_call.action.sources",
        "message.input_image.image_url",
        "computer_call_output.output.image_url",
        "code_interpreter_call.outputs",
    }
)
"""Those of tools and images find nothing to include here."""
TIERS = frozenset({"auto", "default", "flex", "scale", "priority", "fast", "ultrafast"})
PAIRS, KEY_CHARS, VALUE_CHARS, ID_CHARS = 16, 64, 512, 512
"""Bounds of metadata, and of identifiers that are shown again."""

_RENAMED = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"response_format\.json_schema\.schema", "text.format.schema"),
        (r"response_format(\.json_schema)?", "text.format"),
        (r"max_completion_tokens", "max_output_tokens"),
        (r"reasoning_effort", "reasoning.effort"),
        (r"(tools\[[^\]]*\])\.function", r"\1"),
        (r"tool_choice\.function", "tool_choice"),
        (r"tool_choice\.allowed_tools", "tool_choice"),
        (r"top_logprobs needs logprobs to be true", f"top_logprobs needs {LOGPROBS} in include"),
    )
]
"""Chat's names -> those of this API."""
_MESSAGE = re.compile(r"messages\[(\d+)\]")


Length = Callable[[bytes, str], Awaitable[tuple[int, int | None]]]
"""(a "tokenize" question, the model) -> how many tokens that has, and how many the context has."""


class Asked(msgspec.Struct, kw_only=True):
    """One understood request."""

    call: Call
    shown: Shown
    places: list[str]
    """Where each message came from."""
    input: list[Item]
    """As it is kept."""
    rid: str
    """Unguessable; the response's id is made of it."""
    previous: str | None = None
    store: bool = False
    background: bool = False
    stream: bool = False

    @property
    def id(self) -> str:
        return self.shown.id

    def renamed(self, error: PenstockError) -> PenstockError:
        return renamed(error, self.places)


def renamed(error: PenstockError, places: list[str]) -> PenstockError:
    """An error of chat's in this API's names."""

    def place(found: re.Match[str]) -> str:
        number = int(found.group(1))
        return places[number] if number < len(places) else "input"

    def said(text: str) -> str:
        for pattern, name in _RENAMED:
            text = pattern.sub(name, text)
        return _MESSAGE.sub(place, text)

    error.message = said(error.message)
    if error.param is not None:
        error.param = said(error.param)
        if error.param == "messages":
            error.param = "input"
            error.message = re.sub(r"^messages\b", "input", error.message)
    return error


def decoded(
    body: bytes, kind: type[InputTokensRequest], config: Config, limits: Limits | None
) -> tuple[InputTokensRequest, dict[str, msgspec.Raw], list[str]]:
    """The request, its raw fields, and the names of fields that nobody knows. Raises InvalidRequest, UnsupportedFeature or RequestTooLarge."""
    request, raw, ignored = decode(body, kind, limits)
    assert isinstance(request, InputTokensRequest)
    parts: dict[str, type[msgspec.Struct]] = {"reasoning": ReasoningOptions, "text": TextOptions, "stream_options": ResponseStreamOptions}
    for name, struct in parts.items():
        if getattr(request, name, None) is not None:
            known = struct.__struct_fields__
            for inner, value in fields_of(raw[name], name).items():
                if inner not in known:
                    ignored.append(_neutral(f"{name}.{inner}", value))
    return request, raw, [name for name in ignored if name]


def _neutral(name: str, value: msgspec.Raw) -> str:
    """A field within an object: "" if its value asks for nothing, else the name of one that nobody knows. Raises UnsupportedFeature for a known one."""
    neutral = {"reasoning.context": (b"null", b'"auto"'), "reasoning.mode": (b"null", b'"standard"')}.get(name)
    if neutral is None:
        return name[:200]
    if bytes(value).strip() not in neutral:
        raise UnsupportedFeature(f"{name} is not supported here. Leave it out.", param=name)
    return ""


def _need(ok: bool, message: str, param: str) -> None:
    if not ok:
        raise InvalidRequest(message, param=param)


# ------------------------------------------------------------------ what is common to both endpoints


class _Prompt:
    """The part of a request that the model reads, as fields of chat's."""

    def __init__(self, request: InputTokensRequest) -> None:
        self.request = request
        self.conversation = Conversation()
        self.input: list[Item] = []
        self.fields: dict[str, Any] = {}

    async def gather(self, core: str, ignored: list[str], records: Records | None, tenant: str, config: Config) -> None:
        request, conversation = self.request, self.conversation
        if request.instructions:
            conversation.instruct(request.instructions)
        previous = request.previous_response_id
        if previous:
            if records is None:
                raise InvalidRequest(
                    "previous_response_id: this server keeps no responses (--no-store). Send the items.", param="previous_response_id"
                )
            for record in await records.history(tenant, previous, config.max_messages):
                conversation.take(record.input, "previous_response_id")
                conversation.take(record.response["output"], "previous_response_id")
        _need(request.input is not None or bool(previous), "input is required.", "input")
        if request.input is not None:
            items = items_of(request.input, core, ignored)
            _need(
                len(items) <= config.max_messages,
                f"input has {len(items)} items; this server takes at most {config.max_messages} (--max-messages). Send fewer.",
                "input",
            )
            for number, item in enumerate(items):
                if item["type"] == "item_reference":
                    if records is None:
                        raise InvalidRequest(
                            f"input[{number}]: this server keeps no items (--no-store). Send it whole.", param=f"input[{number}]"
                        )
                    items[number] = await records.item(tenant, item["id"], f"input[{number}]")
            conversation.take(items, "input")
            self.input = items
        self.fields["messages"] = conversation.messages
        self._options()

    @property
    def places(self) -> list[str]:
        return self.conversation.places

    async def call(self, config: Config, limits: Limits | None, length: Length, room: int) -> Call:
        """What chat makes of it. With truncation `auto` it leaves `room` tokens of the context."""
        try:
            if self.request.truncation == "auto":
                await self._fit(config, limits, length, room)
            return parse_chat(msgspec.json.encode(self.fields), config, limits)
        except PenstockError as error:
            raise renamed(error, self.places) from None

    async def _fit(self, config: Config, limits: Limits | None, length: Length, room: int) -> None:
        async def fits(messages: list[dict[str, Any]]) -> bool:
            call = parse_chat(msgspec.json.encode({**self.fields, "messages": messages}), config, None)
            count, context = await length(question(call), self.request.model or "")
            return context is None or count + room <= context

        parse_chat(msgspec.json.encode(self.fields), config, limits)  # what is wrong, or too large for anybody, is said first
        conversation = self.conversation
        instructed = int(bool(self.request.instructions))
        found = await fitted(conversation.messages, conversation.places, instructed, fits)
        conversation.messages, conversation.places = found
        self.fields["messages"] = conversation.messages

    def _options(self) -> None:
        request = self.request
        if request.model:
            self.fields["model"] = request.model
        if request.chat_template_kwargs:
            self.fields["chat_template_kwargs"] = request.chat_template_kwargs
        if request.tools:
            self.fields["tools"] = chat_tools(request.tools)
        choice = request.tool_choice
        if choice is not None and not (choice == "auto" and not request.tools):
            self.fields["tool_choice"] = chat_choice(choice)
        reasoning = request.reasoning
        if reasoning is not None:
            if reasoning.effort is not None:
                self.fields["reasoning_effort"] = reasoning.effort
            for name in ("summary", "generate_summary"):
                if getattr(reasoning, name) not in (None, "auto"):
                    raise UnsupportedFeature(
                        f"reasoning.{name} can only be 'auto' here: reasoning comes whole, as reasoning_text, and nothing sums it up.",
                        param=f"reasoning.{name}",
                    )
        if request.text is not None:
            if request.text.verbosity not in (None, "medium"):
                raise UnsupportedFeature(
                    "text.verbosity can only be 'medium' here. Say in instructions how long the answer should be.", param="text.verbosity"
                )
            if request.text.format is not None:
                self.fields["response_format"] = _format(request.text)


def _format(text: TextOptions) -> dict[str, Any]:
    given = text.format
    assert given is not None
    if given.type != "json_schema":
        return {"type": given.type}
    _need(given.schema_ is not None, "text.format of type json_schema needs text.format.schema.", "text.format.schema")
    more = {name: value for name in ("name", "description", "strict") if (value := getattr(given, name)) is not None}
    return {"type": "json_schema", "json_schema": {"schema": given.schema_, **more}}


# ------------------------------------------------------------------ /v1/responses


async def parse(
    body: bytes,
    config: Config,
    limits: Limits | None,
    *,
    rid: str,
    core: str,
    tenant: str,
    records: Records | None,
    length: Length,
) -> Asked:
    """The response's id is `resp_CORE`. Raises InvalidRequest (or UnsupportedFeature) naming the field."""
    request, _, ignored = decoded(body, ResponsesRequest, config, limits)
    assert isinstance(request, ResponsesRequest)
    _check(request, records)
    prompt = _Prompt(request)
    await prompt.gather(core, ignored, records, tenant, config)
    include = frozenset(request.include or ())
    fields = prompt.fields
    fields |= {name: value for name in LIKE_CHAT if (value := getattr(request, name)) is not None}
    if request.max_output_tokens is not None:
        fields["max_completion_tokens"] = request.max_output_tokens
    if LOGPROBS in include:
        fields["logprobs"] = True
    if request.top_logprobs is not None:
        fields["top_logprobs"] = request.top_logprobs
    if request.stream or request.background:  # of one in the background it is known how far it is
        fields["stream"] = True
    call = await prompt.call(config, limits, length, request.max_output_tokens or 1)
    places = prompt.places
    call.names = {**call.names, "max_tokens": "max_output_tokens"}
    call.ignored = check_unknown(sorted(ignored), strict=config.strict_fields)
    if call.grammar is not None:
        call.grammar = msgspec.structs.replace(
            call.grammar,
            field=call.grammar.field.replace("response_format.json_schema", "text.format").replace("response_format", "text.format"),
        )
    store = records is not None and request.store is not False
    options = request.stream_options
    shown = Shown(
        id=f"resp_{core}",
        echo=_echo(request, store),
        logprobs=LOGPROBS in include,
        sealed=SEALED in include,
        obfuscate=bool(options and options.include_obfuscation),
    )
    return Asked(
        call=call,
        shown=shown,
        places=places,
        input=prompt.input,
        rid=rid,
        previous=request.previous_response_id or None,
        store=store,
        background=bool(request.background),
        stream=bool(request.stream),
    )


def _check(request: ResponsesRequest, records: Records | None) -> None:
    """Fields that chat has not, or that only this API bounds."""
    for name in request.include or ():
        _need(name in INCLUDABLE, f"include: {name[:80]!r} is none of {', '.join(sorted(INCLUDABLE))}.", "include")
    if request.metadata:
        _need(len(request.metadata) <= PAIRS, f"metadata may have at most {PAIRS} pairs, but has {len(request.metadata)}.", "metadata")
        for key, value in request.metadata.items():
            _need(len(key) <= KEY_CHARS, f"metadata: keys may have at most {KEY_CHARS} characters.", "metadata")
            _need(len(value) <= VALUE_CHARS, f"metadata.{key}: values may have at most {VALUE_CHARS} characters.", f"metadata.{key}")
    for name in ("user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "previous_response_id"):
        value = getattr(request, name)
        _need(value is None or len(value) <= ID_CHARS, f"{name} may have at most {ID_CHARS} characters.", name)
    _need(
        request.service_tier is None or request.service_tier in TIERS,
        f"service_tier must be one of {', '.join(sorted(TIERS))}.",
        "service_tier",
    )
    _need(request.max_tool_calls is None or request.max_tool_calls >= 1, "max_tool_calls must be at least 1.", "max_tool_calls")
    _need(request.stream_options is None or bool(request.stream), "stream_options is only allowed when stream is true.", "stream_options")
    if request.background:
        _need(records is not None, "background needs a store, and this server has none (--no-store). Leave it out.", "background")
        _need(request.store is not False, "background needs store to be true: what becomes of it can only be kept.", "background")


def _echo(request: ResponsesRequest, store: bool) -> dict[str, Any]:
    """What the reply repeats of the request, as OpenAI's does. What was left out and is the model's to say is null."""
    text = request.text
    shape: dict[str, Any] = {"type": "text"}
    if text is not None and text.format is not None:
        given = text.format
        shape = {"type": given.type}
        if given.type == "json_schema":
            shape |= {
                "name": given.name or "",
                "description": given.description,
                "schema": given.schema_,
                "strict": given.strict is not False,
            }
    reasoning = request.reasoning
    return {
        "background": bool(request.background),
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": request.max_tool_calls,
        "metadata": request.metadata or {},
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": request.previous_response_id or None,
        "prompt_cache_key": request.prompt_cache_key,
        "reasoning": {"effort": reasoning and reasoning.effort, "summary": reasoning and reasoning.summary},
        "safety_identifier": request.safety_identifier,
        "service_tier": "default",
        "store": store,
        "temperature": request.temperature,
        "text": {"format": shape, "verbosity": "medium"},
        "tool_choice": request.tool_choice or "auto",
        "tools": [tool_echo(tool) for tool in request.tools or ()],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": request.top_p,
        "truncation": request.truncation or "disabled",
        "user": request.user,
    }


# ------------------------------------------------------------------ /v1/responses/input_tokens


async def parse_count(
    body: bytes, config: Config, limits: Limits | None, *, tenant: str, records: Records | None, length: Length
) -> tuple[int, list[str]]:
    """How many tokens the prompt has, and the ignored fields. Raises as `parse`, and what `length` raises."""
    request, _, ignored = decoded(body, InputTokensRequest, config, limits)
    prompt = _Prompt(request)
    await prompt.gather("0", ignored, records, tenant, config)
    check_unknown(sorted(ignored), strict=config.strict_fields)
    call = await prompt.call(config, limits, length, 1)
    try:
        count, _ = await length(question(call), request.model or "")
    except PenstockError as error:
        raise renamed(error, prompt.places) from None
    return count, sorted(ignored)


def question(call: Call) -> bytes:
    """The body of text's "tokenize" about a chat."""
    (said,) = call.prompts
    asked: dict[str, Any] = {"messages": msgspec.Raw(said["messages"]), "add_generation_prompt": True, "add_special_tokens": False}
    if said["template_kwargs"]:
        asked["chat_template_kwargs"] = msgspec.Raw(said["template_kwargs"])
    if "tools" in said:
        asked["tools"] = msgspec.Raw(said["tools"])
    return msgspec.json.encode(asked)
