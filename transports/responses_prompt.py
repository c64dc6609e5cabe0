"""The part of a request of OpenAI's Responses API that the model reads, as chat has it.

What it is: `Prompt`, which puts a conversation together (instructions, what previous responses left, items) and has chat's parser make a Call of it; `renamed`, chat's errors
in this API's names.
What it does not know: settings of answers (responses.py), what items are (responses_items.py), where responses are kept, HTTP.
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
from penstock.transports.responses_fit import fitted
from penstock.transports.responses_items import Conversation, Item, chat_choice, chat_tools, items_of
from penstock.transports.responses_schema import InputTokensRequest, TextOptions
from penstock.transports.responses_store import Records

LOGPROBS = "message.output_text.logprobs"
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


def need(ok: bool, message: str, param: str) -> None:
    if not ok:
        raise InvalidRequest(message, param=param)


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


class Prompt:
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
            for record in await records.history(tenant, previous, config.max_messages, config.max_body_bytes):
                conversation.take(record.input, "previous_response_id")
                conversation.take(record.response["output"], "previous_response_id")
        given = request.input
        need(given is not None or bool(previous), "input is required.", "input")
        if given is not None:
            need(
                isinstance(given, str) or len(given) <= config.max_messages,
                f"input has {len(given)} items; this server takes at most {config.max_messages} (--max-messages). Send fewer.",
                "input",
            )
            items = items_of(given, core, ignored)
            referred = [(number, f"input[{number}]") for number, item in enumerate(items) if item["type"] == "item_reference"]
            if referred:
                if records is None:
                    where = referred[0][1]
                    raise InvalidRequest(f"{where}: this server keeps no items (--no-store). Send it whole.", param=where)
                names = [(items[number]["id"], where) for number, where in referred]
                for (number, _), item in zip(referred, await records.items(tenant, names, config.max_body_bytes), strict=True):
                    items[number] = item
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
    need(given.schema_ is not None, "text.format of type json_schema needs text.format.schema.", "text.format.schema")
    more = {name: value for name in ("name", "description", "strict") if (value := getattr(given, name)) is not None}
    return {"type": "json_schema", "json_schema": {"schema": given.schema_, **more}}


def question(call: Call) -> bytes:
    """The body of text's "tokenize" about a chat."""
    (said,) = call.prompts
    asked: dict[str, Any] = {"messages": msgspec.Raw(said["messages"]), "add_generation_prompt": True, "add_special_tokens": False}
    if said["template_kwargs"]:
        asked["chat_template_kwargs"] = msgspec.Raw(said["template_kwargs"])
    if "tools" in said:
        asked["tools"] = msgspec.Raw(said["tools"])
    return msgspec.json.encode(asked)
