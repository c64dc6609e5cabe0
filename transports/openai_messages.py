"""What can be said about a chat's messages and tools without a template.

What it is: `check_messages`, which looks at contents, and at calls and their results; `check_tools`, at names of functions; `check_hints`, at the values of fields
without effect. Errors name the part.
What it does not know: JSON decoding (openai_schema.py), settings of answers (openai.py), templates.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from penstock.core.actors.text import bounds
from penstock.core.protocol.errors import InvalidRequest, UnsupportedFeature
from penstock.transports import refused
from penstock.transports.metadata import check_metadata
from penstock.transports.openai_schema import ChatMessage, Tool

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
"""What reasoning_effort may be; what it does is up to the chat template."""
TIERS = frozenset({"auto", "default", "flex", "scale", "priority", "fast", "ultrafast"})

LONGEST_NAME = 64
"""Characters of a function's name, as OpenAI has it."""
_NAME = re.compile(r"[a-zA-Z0-9_-]+")


def need(ok: bool, message: str, param: str) -> None:
    """Raises InvalidRequest."""
    if not ok:
        raise InvalidRequest(message, param=param)


def check_messages(messages: list[ChatMessage], most: int) -> None:
    """At most `most` of them. Raises InvalidRequest or UnsupportedFeature naming the part."""
    need(bool(messages), "messages must not be empty.", "messages")
    bounds.check_messages(len(messages), most)
    for i, message in enumerate(messages):
        refused.check_message(message, f"messages[{i}]")
        content = message.content
        if isinstance(content, list):
            for j, part in enumerate(content):
                if part.type == "refusal" and message.role == "assistant":
                    need(part.refusal is not None, "A refusal part needs its refusal.", f"messages[{i}].content[{j}].refusal")
                    continue
                if part.type not in ("text", "input_text", "output_text"):
                    raise UnsupportedFeature(
                        f"Content of type {part.type!r} is not supported: this server takes text only.",
                        param=f"messages[{i}].content[{j}].type",
                    )
                need(part.text is not None, "A text part needs its text.", f"messages[{i}].content[{j}].text")
        elif not isinstance(content, str):
            need(_may_be_without(message), f"messages[{i}].content is required.", f"messages[{i}].content")
    _check_results(messages)


def _may_be_without(message: ChatMessage) -> bool:
    """Is it a message without content? Of the assistant, null is one that said nothing, as clients send back what they were sent."""
    if message.role == "assistant":
        said = message.tool_calls, message.function_call, message.refusal
        return message.content is None or any(one is not None for one in said)
    return message.role == "function"


def _check_results(messages: list[ChatMessage]) -> None:
    """A result is one of a call before it. Calls without an id, which other servers take, may have results of any; calls may have none."""
    known: set[str] = set()
    called = nameless = False
    for i, message in enumerate(messages):
        if message.role == "assistant":
            for call in message.tool_calls or ():
                called = True
                nameless = nameless or not call.id
                known.add(call.id or "")
        elif message.role == "tool":
            field = f"messages[{i}].tool_call_id"
            need(
                called,
                f"messages[{i}]: a message with the role tool must come after an assistant's with tool_calls.",
                f"messages[{i}].role",
            )
            if not nameless:
                id = message.tool_call_id
                need(bool(id), f"{field} is required.", field)
                need(id in known, f"{field}: no message before it has a call with the id {(id or '')[:80]!r}.", field)


class _Kind(msgspec.Struct, frozen=True):
    type: str | None = None


class _Kinds(msgspec.Struct, frozen=True):
    tools: list[_Kind]


def check_kinds(body: bytes) -> None:
    """Of a request whose tools are none of chat's: raises UnsupportedFeature if they are of another type."""
    try:
        tools = msgspec.json.decode(body, type=_Kinds).tools
    except msgspec.ValidationError:
        return
    for i, tool in enumerate(tools):
        if tool.type not in (None, "function"):
            field = f"tools[{i}].type"
            raise UnsupportedFeature(
                f"{field}: tools of type {tool.type[:80]!r} are not supported here: only functions may be called.", param=field
            )


def check_tools(tools: Sequence[Tool], longest: int = LONGEST_NAME) -> None:
    """Names of at most `longest` characters that can be called. Raises InvalidRequest."""
    names: set[str] = set()
    for i, tool in enumerate(tools):
        name, field = tool.function.name, f"tools[{i}].function.name"
        need(
            _NAME.fullmatch(name) is not None and len(name) <= longest,
            f"{field} must be 1 to {longest} letters (a to z, A to Z), digits, underscores and hyphens, but is {name[:80]!r}.",
            field,
        )
        need(name not in names, f"{field}: there are two functions {name[:80]!r}.", field)
        names.add(name)


_TEXTS = ("safety_identifier", "prompt_cache_key", "prompt_cache_retention")
"""Hints that are texts."""


class _Prediction(msgspec.Struct, frozen=True):
    type: str
    content: str | list[dict[str, Any]]


def check_hints(raw: Mapping[str, msgspec.Raw]) -> None:
    """Fields that have no effect, but a form: whoever sends another means something else. Raises InvalidRequest naming the field."""
    for name in _TEXTS:
        if name in raw:
            need(_read(raw[name], str | None, name) is not ..., f"{name} must be a text.", name)
    tier = _read(raw.get("service_tier"), str | None, "service_tier")
    need(tier is None or tier in TIERS, f"service_tier must be one of {', '.join(sorted(TIERS))}.", "service_tier")
    prediction = _read(raw.get("prediction"), _Prediction | None, "prediction")
    good = prediction is None or (isinstance(prediction, _Prediction) and prediction.type == "content")
    need(good, "prediction must be an object of the type 'content' with a content.", "prediction")
    options = _read(raw.get("prompt_cache_options"), dict[str, Any] | None, "prompt_cache_options")
    need(options is not ..., "prompt_cache_options must be an object.", "prompt_cache_options")
    metadata = _read(raw.get("metadata"), dict[str, Any] | None, "metadata")
    need(metadata is not ..., "metadata must be an object.", "metadata")
    check_metadata(metadata)


def check_effort(effort: str | None) -> None:
    """Raises InvalidRequest."""
    need(effort is None or effort in EFFORTS, f"reasoning_effort must be one of {', '.join(EFFORTS)}.", "reasoning_effort")


def _read(raw: msgspec.Raw | None, kind: Any, name: str) -> Any:
    """`...` for what is something else."""
    if raw is None:
        return None
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError:
        return ...
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{name} cannot be read: {error}."[:300], param=name) from None
