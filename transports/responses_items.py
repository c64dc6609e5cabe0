"""Items of OpenAI's Responses API as a conversation.

What it is: `items_of`, which checks the items of a request and gives them the form in which they are kept and listed; `Conversation`, which makes chat messages of
items and knows which item each message came from; tools and tool choices in chat's form.
What it does not know: chat templates, stores, HTTP.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable
from typing import Any

from penstock.core.protocol.errors import InvalidRequest, UnsupportedFeature
from penstock.transports.refused import Table, check_value

Item = dict[str, Any]

SEAL = "pk1."
"""What encrypted_content of this server begins with. The rest is the reasoning's text in base64: it says no more than `content` beside it does, and stays
readable to whoever holds it."""

FOREIGN = frozenset(
    [
        "file_search_call",
        "computer_call",
        "computer_call_output",
        "web_search_call",
        "image_generation_call",
        "code_interpreter_call",
        "local_shell_call",
        "local_shell_call_output",
        "shell_call",
        "shell_call_output",
        "apply_patch_call",
        "apply_patch_call_output",
        "mcp_list_tools",
        "mcp_approval_request",
        "mcp_approval_response",
        "mcp_call",
        "custom_tool_call",
        "custom_tool_call_output",
        "tool_search_call",
        "tool_search_output",
        "additional_tools",
        "compaction",
        "compaction_trigger",
        "program",
        "program_output",
        "configuration_update",
    ]
)
"""Items of tools, and of other things, that do not exist here."""
MEDIA = frozenset({"input_image", "input_file", "input_audio", "computer_screenshot", "image_url"})

_ROLES = ("user", "assistant", "system", "developer")
_ANYWHERE = frozenset({"id", "type", "status"})
_FIELDS: dict[str, frozenset[str]] = {
    "message": _ANYWHERE | {"role", "content", "phase"},
    "function_call": _ANYWHERE | {"call_id", "name", "arguments"},
    "function_call_output": _ANYWHERE | {"call_id", "output", "name"},
    "reasoning": _ANYWHERE | {"summary", "content", "encrypted_content"},
    "item_reference": _ANYWHERE,
}
_SPELLINGS = {kind: Table({}, names - (_ANYWHERE - {"type"}) - {"phase"}) for kind, names in _FIELDS.items()}
"""Who writes callId means call_id."""
_PART_FIELDS = frozenset({"type", "text", "refusal", "annotations", "logprobs", "prompt_cache_breakpoint"})
_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}

_ITEM_ID = re.compile(r"(?:msg|fc|fco|rs)_([0-9a-z]{1,64})_(i?)([0-9]{1,9})")


def item_id(kind: str, core: str, number: int, *, given: bool = False) -> str:
    """Of item `number` of the response `resp_CORE`: of its output, or of its input (`given`)."""
    return f"{_PREFIXES[kind]}_{core}_{'i' if given else ''}{number}"


def place_of(name: str) -> tuple[str, bool, int] | None:
    """The inverse: the response's id, whether it is an item of its input, and its number. None for what is no item's id of this server."""
    found = _ITEM_ID.fullmatch(name)
    return None if found is None else (f"resp_{found.group(1)}", bool(found.group(2)), int(found.group(3)))


def seal(text: str) -> str:
    return SEAL + base64.urlsafe_b64encode(text.encode("utf-8", "replace")).decode()


def unseal(text: str) -> str | None:
    """None: it is none of ours."""
    if not text.startswith(SEAL):
        return None
    try:
        return base64.b64decode(text[len(SEAL) :], b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        return None


# ------------------------------------------------------------------ what a request brings


def items_of(given: str | list[dict[str, Any]], core: str, ignored: list[str]) -> list[Item]:
    """As they are kept: with ids, and content in parts. References stay references. Names of fields that nobody knows are added to `ignored`. Raises
    InvalidRequest or UnsupportedFeature naming the field."""
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not given:
        raise InvalidRequest("input must not be empty.", param="input")
    return [_item(item, f"input[{number}]", core, number, ignored) for number, item in enumerate(given)]


def _item(item: dict[str, Any], where: str, core: str, number: int, ignored: list[str]) -> Item:
    kind = item.get("type")
    if kind is None:
        kind = "message" if "role" in item or "content" in item else "item_reference"
    if not isinstance(kind, str):
        raise InvalidRequest(f"{where}.type must be a text such as 'message'.", param=f"{where}.type")
    if kind in FOREIGN:
        raise UnsupportedFeature(f"{where}: items of type {kind!r} are not supported here.", param=f"{where}.type")
    if kind not in _FIELDS:
        raise InvalidRequest(f"{where}.type must be one of {', '.join(_FIELDS)}, but is {kind[:80]!r}.", param=f"{where}.type")
    for name in ("caller", "namespace", "async"):
        if item.get(name) not in (None, False, {"type": "direct"}):
            raise UnsupportedFeature(f"{where}.{name} is not supported here. Leave it out.", param=f"{where}.{name}")
    for name in sorted(item.keys() - _FIELDS[kind] - {"caller", "namespace", "async"}):
        if not check_value(_SPELLINGS[kind], name, item[name], f"{where}.") and len(ignored) < 256:
            ignored.append(f"{where}.{name}"[:200])
    if kind == "item_reference":
        return {"type": kind, "id": _text(item, "id", where)}
    found = {"id": item_id(kind, core, number, given=True), "type": kind, **_MAKERS[kind](item, where)}
    return found if kind == "reasoning" else {**found, "status": "completed"}


def _text(item: dict[str, Any], name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise InvalidRequest(f"{where}.{name} {'is required' if value is None else 'must be a text'}.", param=f"{where}.{name}")
    return value


def _message(item: dict[str, Any], where: str) -> Item:
    role = _text(item, "role", where)
    if role not in _ROLES:
        raise InvalidRequest(f"{where}.role must be one of {', '.join(_ROLES)}, but is {role[:80]!r}.", param=f"{where}.role")
    return {"role": role, "content": _parts(item.get("content"), role, f"{where}.content")}


def _parts(content: Any, role: str, where: str) -> list[Item]:
    if isinstance(content, str):
        return [text_part(content, role)]
    if not isinstance(content, list):
        raise InvalidRequest(f"{where} {'is required' if content is None else 'must be a text or a list of parts'}.", param=where)
    return [_part(part, role, f"{where}[{number}]") for number, part in enumerate(content)]


def text_part(text: str, role: str) -> Item:
    return {"type": "output_text", "text": text, "annotations": []} if role == "assistant" else {"type": "input_text", "text": text}


_PARTS = {"assistant": ("output_text", "text", "refusal"), "tool": ("input_text", "output_text", "text")}
"""Types of parts by role; of all others input_text and text."""


def _part(part: Any, role: str, where: str) -> Item:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        raise InvalidRequest(f"{where} must be an object with a type.", param=where)
    if kind in MEDIA:
        raise UnsupportedFeature(f"{where}: content of type {kind!r} is not supported: this server takes text only.", param=f"{where}.type")
    known = _PARTS.get(role, ("input_text", "text"))
    if kind not in known:
        raise InvalidRequest(f"{where}.type must be one of {', '.join(known)}, but is {kind[:80]!r}.", param=f"{where}.type")
    for name in part.keys() - _PART_FIELDS:
        raise InvalidRequest(f"{where}.{name[:80]} is not a field of a part. Leave it out.", param=f"{where}.{name[:80]}")
    if kind == "refusal":
        return {"type": "refusal", "refusal": _text(part, "refusal", where)}
    return text_part(_text(part, "text", where), role)


def _call(item: dict[str, Any], where: str) -> Item:
    return {name: _text(item, name, where) for name in ("call_id", "name", "arguments")}


def _result(item: dict[str, Any], where: str) -> Item:
    output = item.get("output")
    if not isinstance(output, str):
        output = _parts(output, "tool", f"{where}.output")
    return {"call_id": _text(item, "call_id", where), "output": output}


def _reasoning(item: dict[str, Any], where: str) -> Item:
    summary = _notes(item.get("summary"), "summary_text", f"{where}.summary")
    content = _notes(item.get("content"), "reasoning_text", f"{where}.content")
    sealed = item.get("encrypted_content")
    if sealed is not None and not isinstance(sealed, str):
        raise InvalidRequest(f"{where}.encrypted_content must be a text.", param=f"{where}.encrypted_content")
    if sealed and not content:
        text = unseal(sealed)
        if text is None and not summary:
            raise InvalidRequest(
                f"{where}.encrypted_content is not of this server, and there is nothing beside it. Leave the item out.",
                param=f"{where}.encrypted_content",
            )
        content = [{"type": "reasoning_text", "text": text}] if text is not None else []
    return {"summary": summary, "content": content}


def _notes(given: Any, kind: str, where: str) -> list[Item]:
    if given is None:
        return []
    if not isinstance(given, list):
        raise InvalidRequest(f"{where} must be a list.", param=where)
    out = []
    for number, part in enumerate(given):
        if not isinstance(part, dict) or part.get("type") != kind:
            raise InvalidRequest(f"{where}[{number}] must be an object of type {kind!r}.", param=f"{where}[{number}]")
        out.append({"type": kind, "text": _text(part, "text", f"{where}[{number}]")})
    return out


_MAKERS = {"message": _message, "function_call": _call, "function_call_output": _result, "reasoning": _reasoning}


# ------------------------------------------------------------------ chat messages


class Conversation:
    """Chat messages, made of items in their order. Reasoning, words and calls of the assistant that follow each other are one message, as chat has them."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.places: list[str] = []
        """What each message came from, as the client names it."""
        self._open: dict[str, Any] | None = None
        self._calls: set[str] = set()
        self._unanswered: dict[str, str] = {}
        """Calls that have no output so far, with what they came from."""
        self._given: set[str] = set()
        """Calls of the request's own items."""

    def instruct(self, text: str) -> None:
        """The request's instructions."""
        self._add({"role": "system", "content": text}, "instructions")

    def take(self, items: Iterable[Item], where: str) -> None:
        """`where`: what the items are called; with "input" they are numbered. Raises InvalidRequest."""
        for number, item in enumerate(items):
            self._take(item, f"{where}[{number}]" if where == "input" else where)

    def _take(self, item: Item, where: str) -> None:
        kind = item["type"]
        if kind == "message":
            content = _content(item["content"])
            if item["role"] != "assistant":
                self._add({"role": item["role"], "content": content}, where)
                return
            if self._open is None or self._open["content"] is not None or "tool_calls" in self._open:
                self._begin(where)
            self._last["content"] = content
        elif kind == "reasoning":
            text = "\n".join(part["text"] for part in item["content"] or item["summary"])
            if text:
                if self._open is None or len(self._open) > 2 or self._open["content"] is not None:
                    self._begin(where)
                self._last["reasoning_content"] = text
        elif kind == "function_call":
            if self._open is None:
                self._begin(where)
            function = {"name": item["name"], "arguments": item["arguments"]}
            self._last.setdefault("tool_calls", []).append({"id": item["call_id"], "type": "function", "function": function})
            self._called(item, where)
        else:
            if item["call_id"] not in self._calls:
                raise InvalidRequest(
                    f"{where}.call_id: there is no function call {item['call_id'][:80]!r} before it in the conversation.",
                    param=f"{where}.call_id",
                )
            if item["call_id"] not in self._unanswered:
                raise InvalidRequest(
                    f"{where}.call_id: the function call {item['call_id'][:80]!r} has an output already.", param=f"{where}.call_id"
                )
            del self._unanswered[item["call_id"]]
            output = item["output"]
            text_or_parts = output if isinstance(output, str) else _content(output)
            self._add({"role": "tool", "tool_call_id": item["call_id"], "content": text_or_parts}, where)

    def _called(self, item: Item, where: str) -> None:
        name, own = item["call_id"], where.startswith("input")
        if name in self._unanswered or (own and name in self._given):
            raise InvalidRequest(f"{where}.call_id: there is a function call {name[:80]!r} already.", param=f"{where}.call_id")
        if own:
            self._given.add(name)
        self._calls.add(name)
        if item.get("status") != "incomplete":  # one that was cut off cannot be run
            self._unanswered[name] = where

    def check(self) -> None:
        """All has been taken. Raises InvalidRequest if a call has no output."""
        for name in self._unanswered:
            raise InvalidRequest(f"No tool output found for function call {name[:80]}.", param="input")

    @property
    def _last(self) -> dict[str, Any]:
        assert self._open is not None
        return self._open

    def _add(self, message: dict[str, Any], where: str) -> None:
        self.messages.append(message)
        self.places.append(where)
        self._open = None

    def _begin(self, where: str) -> None:
        self._add({"role": "assistant", "content": None}, where)
        self._open = self.messages[-1]


def _content(parts: list[Item]) -> str | list[Item]:
    if len(parts) == 1 and parts[0]["type"] != "refusal":
        text: str = parts[0]["text"]
        return text
    return [
        {"type": "refusal", "refusal": part["refusal"]} if part["type"] == "refusal" else {"type": "text", "text": part["text"]}
        for part in parts
    ]


# ------------------------------------------------------------------ tools

_TOOL_FIELDS = frozenset({"type", "name", "description", "parameters", "strict"})
_TOOL_HINTS: dict[str, tuple[Any, ...]] = {
    "async": (None, False),
    "defer_loading": (None, False),
    "allowed_callers": (None, [], ["direct"]),
    "output_schema": (None,),
}
"""Further fields of a function, with the values that ask for nothing."""


def chat_tools(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Raises InvalidRequest or UnsupportedFeature naming the field."""
    return [_tool(tool, f"tools[{number}]") for number, tool in enumerate(tools)]


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    kind = tool.get("type")
    if not isinstance(kind, str):
        raise InvalidRequest(f"{where}.type must be 'function'.", param=f"{where}.type")
    if kind != "function":
        raise UnsupportedFeature(
            f"{where}: tools of type {kind[:80]!r} are not supported here: no tools run on this server, and only functions may be called.",
            param=f"{where}.type",
        )
    if "function" in tool and "name" not in tool:
        raise InvalidRequest(
            f"{where}: here a function's name and parameters stand beside its type, not within 'function'.", param=f"{where}.name"
        )
    for name in tool.keys() - _TOOL_FIELDS:
        if name not in _TOOL_HINTS:
            raise InvalidRequest(f"{where}.{name[:80]} is not a field of a function. Leave it out.", param=f"{where}.{name[:80]}")
        if tool[name] not in _TOOL_HINTS[name]:
            raise UnsupportedFeature(f"{where}.{name} is not supported here. Leave it out.", param=f"{where}.{name}")
    function = {name: tool[name] for name in ("name", "description", "parameters", "strict") if tool.get(name) is not None}
    return {"type": "function", "function": function}


def tool_echo(tool: dict[str, Any]) -> dict[str, Any]:
    """The tool as replies show it."""
    return {"type": "function", "name": tool["name"], "description": None, "parameters": None, "strict": False, **tool}


_CHOICE_FIELDS = {"function": frozenset({"type", "name"}), "allowed_tools": frozenset({"type", "mode", "tools"})}


def chat_choice(choice: str | dict[str, Any], where: str = "tool_choice") -> str | dict[str, Any]:
    """Raises InvalidRequest or UnsupportedFeature."""
    if isinstance(choice, str):
        return choice
    kind = choice.get("type")
    for name in sorted(choice.keys() - _CHOICE_FIELDS.get(str(kind), choice.keys())):
        raise InvalidRequest(f"{where}.{name[:80]} is not a field of a tool choice. Leave it out.", param=f"{where}.{name[:80]}")
    if kind == "function":
        return {"type": "function", "function": {"name": _text(choice, "name", where)}}
    if kind == "allowed_tools" and where == "tool_choice":
        tools = choice.get("tools")
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise InvalidRequest("tool_choice.tools must be a list of tools.", param="tool_choice.tools")
        allowed = [chat_choice(tool, f"tool_choice.tools[{number}]") for number, tool in enumerate(tools)]
        return {"type": "allowed_tools", "allowed_tools": {"mode": _text(choice, "mode", where), "tools": allowed}}
    if not isinstance(kind, str):
        words = "'function' or 'allowed_tools'" if where == "tool_choice" else "'function'"
        raise InvalidRequest(f"{where}.type must be {words}.", param=f"{where}.type")
    raise UnsupportedFeature(f"{where} of type {kind[:80]!r} is not supported here: only functions may be called.", param=where)
