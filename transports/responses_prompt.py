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

from penstock.core.actors.text.bounds import ALL_FIELDS, COUNTED
from penstock.core.protocol.config import Config
from penstock.core.protocol.errors import InvalidRequest, PenstockError, RequestTooLarge, UnsupportedFeature
from penstock.core.protocol.messages import Limits
from penstock.transports.openai import Call, parse_chat
from penstock.transports.responses_fit import fitted
from penstock.transports.responses_items import Conversation, Item, chat_choice, chat_tools, items_of
from penstock.transports.responses_schema import InputTokensRequest, TextOptions
from penstock.transports.responses_store import Record, Records, items_among

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


Work = Callable[[int, Callable[[], Any]], Awaitable[Any]]
"""(bytes that are read, what reads them) -> what that gives, without holding others up: Surface.worked."""
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
    """The part of a request that the model reads, as fields of chat's: read when it is made, then `fetch`, `gather` and `call`. `core` is that of its items' ids, `kept`: there is a
    store. Only `fetch` waits for it. Raises InvalidRequest or UnsupportedFeature naming the field; names that nobody knows are added to `ignored`."""

    def __init__(self, request: InputTokensRequest, core: str, ignored: list[str], config: Config, *, kept: bool) -> None:
        self.request = request
        self.conversation = Conversation()
        self.input: list[Item] = []
        self.fields: dict[str, Any] = {}
        self.fetched = 0
        """Bytes of what is kept of the conversation."""
        self._config = config
        self._history: list[Record] = []
        self._sources: list[Record] = []
        given = request.input
        if request.previous_response_id and not kept:
            raise InvalidRequest(
                "previous_response_id: this server keeps no responses (--no-store). Send the items.", param="previous_response_id"
            )
        need(given is not None or bool(request.previous_response_id), "input is required.", "input")
        if given is not None:
            need(
                isinstance(given, str) or len(given) <= config.max_messages,
                f"input has {len(given)} items; this server takes at most {config.max_messages} (--max-messages). Send fewer.",
                "input",
            )
            self.input = items_of(given, core, ignored)
        self._referred = [number for number, item in enumerate(self.input) if item["type"] == "item_reference"]
        self._names = [(self.input[number]["id"], f"input[{number}]") for number in self._referred]
        if self._names and not kept:
            where = self._names[0][1]
            raise InvalidRequest(f"{where}: this server keeps no items (--no-store). Send it whole.", param=where)

    @property
    def whole(self) -> bool:
        """Nothing of it has to be fetched, nor left out: there is nothing to wait for."""
        return not (self.request.previous_response_id or self._names or self.request.truncation == "auto")

    async def fetch(self, records: Records | None, tenant: str) -> None:
        """What it speaks of, from the store. Raises InvalidRequest, or RequestTooLarge."""
        most = self._config.max_body_bytes
        if records is not None and self.request.previous_response_id:
            self._history = await records.history(tenant, self.request.previous_response_id, self._config.max_messages, most)
        if records is not None and self._names:
            self._sources = await records.sources(tenant, [name for name, _ in self._names], most)
        self.fetched = sum(record.size for record in (*self._history, *self._sources))

    def gather(self) -> None:
        """Make chat's fields of it. Raises InvalidRequest, UnsupportedFeature or RequestTooLarge."""
        conversation = self.conversation
        if self.request.instructions:
            conversation.instruct(self.request.instructions)
        count = sum(record.fields(ALL_FIELDS) for record in self._history)
        if count > ALL_FIELDS:
            raise RequestTooLarge(
                f"previous_response_id: what is kept of that conversation has {count} fields; this server takes at most {ALL_FIELDS}. Begin a new one.",
                param="previous_response_id",
            )
        for record in self._history:
            conversation.take(record.input, "previous_response_id")
            conversation.take(record.output, "previous_response_id")
        for number, item in zip(self._referred, items_among(self._sources, self._names), strict=True):
            self.input[number] = item
        conversation.take(self.input, "input")
        conversation.check()
        self.fields["messages"] = conversation.messages
        self._options()

    @property
    def places(self) -> list[str]:
        return self.conversation.places

    def call(self, limits: Limits | None) -> Call:
        """What chat makes of it."""
        try:
            return self._chat(self.fields, limits)
        except PenstockError as error:
            raise renamed(error, self.places) from None

    def _chat(self, fields: dict[str, Any], limits: Limits | None) -> Call:
        return parse_chat(msgspec.json.encode(fields), self._config, limits, most=COUNTED)

    async def fit(self, limits: Limits | None, length: Length, room: int, work: Work, size: int) -> None:
        """With truncation `auto` leave out what does not leave `room` tokens of the context. `size` in bytes, of the request and what was fetched. Raises as `call`,
        and what `length` raises."""

        async def fits(messages: list[dict[str, Any]]) -> bool:
            def asked() -> bytes:
                return question(self._chat({**self.fields, "messages": messages}, None))

            count, context = await length(await work(size, asked), self.request.model or "")
            return context is None or count + room <= context

        await work(size, lambda: self.call(limits))  # what is wrong, or too large for anybody, is said first
        conversation = self.conversation
        instructed = int(bool(self.request.instructions))
        try:
            conversation.messages, conversation.places = await fitted(conversation.messages, conversation.places, instructed, fits)
        except PenstockError as error:
            raise renamed(error, self.places) from None
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
    asked["model_has"] = "input"
    if said["template_kwargs"]:
        asked["chat_template_kwargs"] = msgspec.Raw(said["template_kwargs"])
    if "tools" in said:
        asked["tools"] = msgspec.Raw(said["tools"])
    return msgspec.json.encode(asked)
