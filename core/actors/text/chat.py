"""Chat messages, made ready for a template.

What it is: `Shape`, what a template takes; checks and plain forms, so that the template gets what it takes: content as a string or as parts,
arguments of earlier tool calls as an object or as the client's text, an empty content beside tool calls as null or as "", legacy function calls
as tool calls; media are refused by name, and so is text that the template would leave out; and the mark that finds the end of a message to be
continued.
What it does not know: Jinja, tokenizers, HTTP, how a template's shape is found.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from penstock.core.protocol.errors import InvalidRequest, UnsupportedFeature
from penstock.core.protocol.wording import LONGEST_NAME, squash

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
"""Who may speak, as OpenAI names them."""
FIELDS = frozenset({"role", "content", "name", "tool_calls", "tool_call_id", "function_call", "refusal"}) | frozenset(
    {"prefix", "partial", "audio", "images", "videos", "attachments", "tools"}  # refused before, where they ask for something
)
CALL_FIELDS = frozenset({"id", "type", "function", "name", "arguments"})
_SPELLED = {squash(name): name for name in FIELDS | CALL_FIELDS}
TEXT_PARTS = frozenset({"text", "input_text", "output_text"})

Form = Literal["text", "part", "parts"]
"""Content as a string, as a list of one part, as a list of any number of parts."""
Empty = Literal["null", "text", "part", "absent"]
"""Content of a message that has tool calls and no text: null, "", one part with "", no key."""


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """What a template takes. As it stands: strings and objects, the way of most."""

    content: Mapping[str, frozenset[Form]] = {}
    """By role, the forms whose text comes out. A role that is not there gets the user's."""
    lost: frozenset[str] = frozenset()
    """Roles that the template does not refuse, but whose text it leaves out in every form."""
    lost_later: frozenset[str] = frozenset()
    """Roles whose text comes out only in the first message."""
    instead: Mapping[str, str] = {}
    """The role that the template knows by another name: developer as system, function as tool."""
    arguments: Literal["object", "text"] = "object"
    """Of earlier tool calls."""
    loose: bool = True
    """With objects: arguments that are none may be a string (`| tojson`, `is string`), else (`.items()`, `['name']`) they must be wrapped in one."""
    unclear: bool = False
    """It only asks what a text and an object both answer, and not alike (`| first`, `| length`, `'x' in`, `for`)."""
    places: bool = False
    """With objects: it asks for places of the text too (`[0]`, `[-1]`)."""
    empty: tuple[Empty, ...] = ()
    """The contents beside which tool calls come out, the best first; none: calls are not shown, and no text is like any other."""
    calls_alone: bool = False
    """Tool calls come out only without text beside them."""
    function_call: bool = False
    """The legacy field comes out by itself."""


PLAIN = Shape()


def prepare(messages: list[dict[str, Any]], shape: Shape = PLAIN) -> list[dict[str, Any]]:
    """A copy of `messages` as the template takes them. Raises InvalidRequest or UnsupportedFeature with param "messages"."""
    out: list[dict[str, Any]] = []
    legacy: list[str] = []
    for index, message in enumerate(messages):
        out += _message(index, message, shape, legacy)
    return out


def _message(index: int, message: dict[str, Any], shape: Shape, legacy: list[str]) -> list[dict[str, Any]]:
    """`legacy`: the ids given so far to calls in the legacy field, newest last."""
    where = f"messages[{index}]"
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidRequest(f"{where}.role must be a string such as 'user'.", param="messages")
    out = _given(message)
    _check_names(where, out, FIELDS)
    out["role"] = role = shape.instead.get(role, role)
    calls = _calls(where, out, shape, legacy)
    content = _content(where, message, role)
    out.pop("refusal", None)
    if role == "tool" and message["role"] == "function" and legacy:
        out.setdefault("tool_call_id", legacy[-1])
    text = (content if isinstance(content, str) else "".join(content)).strip()
    if text and (role in shape.lost or (index and role in shape.lost_later)):
        raise InvalidRequest(
            f"{where}: this model's chat template leaves out what the role {message['role']!r} says"
            f"{'' if role in shape.lost else ' after the first message'}. Say it in another role, or start the server with another"
            " --chat-template.",
            param="messages",
        )
    forms = shape.content.get(role) or shape.content.get("user") or frozenset({"text"})
    out["content"] = formed(content, forms)
    if not calls:
        return [out]
    if not any(content) or (shape.calls_alone and not text):
        return [{**_with_empty(out, message, shape), "tool_calls": calls}]
    if shape.calls_alone and shape.empty:
        return [out, {**_with_empty({"role": role}, {}, shape), "tool_calls": calls}]
    return [{**out, "tool_calls": calls}]


def _given(fields: dict[str, Any]) -> dict[str, Any]:
    """Without nulls: a null is what is not there, as clients write it who dump all fields; templates ask `is defined`, or `in message`."""
    return {name: value for name, value in fields.items() if value is not None}


def _check_names(where: str, given: Mapping[str, Any], known: frozenset[str]) -> None:
    """What nobody knows may be there for the template. Raises UnsupportedFeature for a field in another spelling (toolCalls), which no template
    would find."""
    for name in given.keys() - known:
        right = _SPELLED.get(squash(name)) if len(name) <= LONGEST_NAME else None
        if right in known:
            raise UnsupportedFeature(f"{where}.{name} is not supported here. Its name here is {right}.", param="messages")


def _content(where: str, message: dict[str, Any], role: str) -> str | list[str]:
    """The text, or the texts of the parts. A refusal is what the assistant said."""
    content = message.get("content")
    refusal = message.get("refusal") if role == "assistant" else None
    if refusal is not None and not isinstance(refusal, str):
        raise InvalidRequest(f"{where}.refusal must be a string.", param="messages")
    if content is None:
        if not _may_be_without(message):
            raise InvalidRequest(f"{where}.content is required.", param="messages")
        return refusal or ""
    if isinstance(content, list):
        content = [_part(f"{where}.content[{number}]", part, role) for number, part in enumerate(content)]
    elif not isinstance(content, str):
        raise InvalidRequest(f"{where}.content must be a string or a list of parts.", param="messages")
    if not refusal:
        return content
    if not any(content):
        return refusal
    return [content, refusal] if isinstance(content, str) else [*content, refusal]


def _may_be_without(message: dict[str, Any]) -> bool:
    """Is it a message without content? Of the assistant, null is one that said nothing, as clients send back what they were sent."""
    if message["role"] == "assistant":
        return "content" in message or any(message.get(name) is not None for name in ("tool_calls", "function_call", "refusal"))
    return bool(message["role"] == "function")


def _part(where: str, part: Any, role: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise InvalidRequest(f"{where} must be an object with a type.", param="messages")
    kind = part.get("type")
    field = "refusal" if kind == "refusal" and role == "assistant" else "text"
    if field == "text" and not (isinstance(kind, str) and kind in TEXT_PARTS):
        raise UnsupportedFeature(f"{where} is of type {kind!r}, but this server takes text only so far.", param="messages")
    text = part.get(field)
    if not isinstance(text, str):
        raise InvalidRequest(f"{where}.{field} must be a string.", param="messages")
    return text


def formed(content: str | list[str], forms: frozenset[Form]) -> str | list[dict[str, str]]:
    """A text, or the texts of parts, in the form that is nearest to what the client chose. Parts that must be one are joined by newlines."""
    if isinstance(content, list):
        if "parts" in forms or ("part" in forms and len(content) == 1):
            return [{"type": "text", "text": text} for text in content]
        content = "\n".join(content)
    if "text" in forms or not forms:
        return content
    return [{"type": "text", "text": content}]


def _with_empty(out: dict[str, Any], message: dict[str, Any], shape: Shape) -> dict[str, Any]:
    """Content beside tool calls that have no text: as the client has it if the calls come out so, else as the template wants it."""
    if not shape.empty:
        return out
    given = message.get("content")
    own: Empty = "null" if given is None else "text" if isinstance(given, str) else "part"
    empty = own if own in shape.empty else shape.empty[0]
    return with_empty(out, empty)


def with_empty(message: dict[str, Any], empty: Empty) -> dict[str, Any]:
    """The message with that kind of empty content."""
    rest = {name: value for name, value in message.items() if name != "content"}
    if empty == "absent":
        return rest
    return {**rest, "content": None if empty == "null" else formed("", frozenset({empty}))}


# ------------------------------------------------------------------ tool calls


def _calls(where: str, out: dict[str, Any], shape: Shape, legacy: list[str]) -> list[Any]:
    """The message's calls, taken out of it."""
    calls = out.pop("tool_calls", None)
    if calls is None:
        calls = []
    if not isinstance(calls, list):
        raise InvalidRequest(f"{where}.tool_calls must be a list.", param="messages")
    calls = [_tool_call(f"{where}.tool_calls[{number}]", call, shape) for number, call in enumerate(calls)]
    if "function_call" in out:
        call = _function(f"{where}.function_call", out["function_call"], shape)
        if shape.function_call:
            out["function_call"] = call
        else:
            del out["function_call"]
            if not calls:  # a client that sends both says one thing twice
                legacy.append(f"call{len(legacy):05d}")  # nine letters and digits, as some templates demand
                calls = [{"id": legacy[-1], "type": "function", "function": call}]
    return calls


def _tool_call(where: str, call: Any, shape: Shape) -> Any:
    if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
        raise InvalidRequest(f"{where} must be an object with a function.", param="messages")
    _check_names(where, call, CALL_FIELDS)
    return {**_given(call), "function": _function(f"{where}.function", call["function"], shape)}


def _function(where: str, function: Any, shape: Shape) -> dict[str, Any]:
    if not isinstance(function, dict):
        raise InvalidRequest(f"{where} must be an object with a name and arguments.", param="messages")
    _check_names(where, function, CALL_FIELDS)
    arguments = function.get("arguments")
    if arguments is not None and not isinstance(arguments, (str, dict)):
        raise InvalidRequest(f"{where}.arguments must be a string of JSON, or an object.", param="messages")
    return {**_given(function), "arguments": _arguments(arguments, shape)}


def _arguments(arguments: str | dict[str, Any] | None, shape: Shape) -> str | dict[str, Any]:
    """OpenAI's clients send the text that the model wrote. It may be no JSON (cut off by max_tokens), or no object: then it is passed on as it
    is; a template that can only look into an object finds it there."""
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        arguments = {}
    if shape.arguments == "text":
        return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    if isinstance(arguments, dict):
        return Spelled(arguments, json.dumps(arguments, ensure_ascii=False)) if shape.places else arguments
    try:
        decoded = msgspec.json.decode(arguments)
    except (msgspec.DecodeError, ValueError, RecursionError):
        decoded = None
    if isinstance(decoded, dict):
        return Spelled(decoded, arguments) if shape.places else decoded
    return arguments if shape.loose else PassedOn(arguments)


class Spelled(dict[str, Any]):
    """An object with the text that it is of, for a template that looks for the object's fields, and for places of the text."""

    def __init__(self, fields: dict[str, Any], text: str) -> None:
        super().__init__(fields)
        self._text = text

    def __missing__(self, key: Any) -> str:
        if isinstance(key, (int, slice)):
            return self._text[key]
        raise KeyError(key)

    def __repr__(self) -> str:
        return self._text

    __str__ = __repr__


class _Whole(str):
    """The text in PassedOn, for a template that looks further into it."""

    def __getitem__(self, key: Any) -> str:
        return super().__getitem__(key) if isinstance(key, (int, slice)) else self

    def get(self, key: Any, default: Any = None) -> str:
        return self

    def keys(self) -> list[str]:
        return ["arguments"]

    def values(self) -> list[str]:
        return [self]

    def items(self) -> list[tuple[str, str]]:
        return [("arguments", self)]


class PassedOn(dict[str, str]):
    """A text that is no object, for a template that takes objects: an object with it as the one item. Whatever else a template asks it for is
    that text too: it was written for arguments that have what it asks for, and nobody can mend a history."""

    def __init__(self, text: str) -> None:
        super().__init__(arguments=_Whole(text))

    def __missing__(self, key: Any) -> str:
        whole = self["arguments"]
        return whole[key] if isinstance(key, (int, slice)) else whole

    def __repr__(self) -> str:
        return self["arguments"]

    __str__ = __repr__

    def get(self, key: Any, default: Any = None) -> Any:
        return self["arguments"]

    def copy(self) -> dict[str, str]:
        return self


# ------------------------------------------------------------------ continuing


MARK = "\u2063continue-here\u2063"
"""Appended to the message that continue_final_message goes on with, so that its end is found whatever the template does around it."""


def mark_final(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`messages` with the last one's text marked. Raises InvalidRequest if there is no text to continue."""
    last = dict(messages[-1]) if messages else {}
    content = last.get("content")
    if isinstance(content, str) and content.strip():
        last["content"] = content + MARK + " "
    elif isinstance(content, list) and any(part["text"].strip() for part in content):
        last["content"] = [*content[:-1], {**content[-1], "text": content[-1]["text"] + MARK + " "}]
    else:
        raise InvalidRequest("continue_final_message needs a last message with text.", param="continue_final_message")
    return [*messages[:-1], last]


def cut_at_mark(rendered: str) -> str:
    """The prompt up to the end of the marked message; where the template strips messages, its trailing space goes too."""
    at = rendered.rfind(MARK)
    if at < 0:
        raise InvalidRequest(
            "continue_final_message: the chat template does not keep the final message's text, so it cannot be continued.",
            param="continue_final_message",
        )
    kept_space = rendered.startswith(MARK + " ", at)
    return rendered[:at] if kept_space else rendered[:at].rstrip()
