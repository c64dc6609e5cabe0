"""Anthropic's conversations as the chat that text knows.

What it is: `chat_of`: the system prompt becomes a system message, turns of one role in a row are one, tool_use blocks become the assistant's tool_calls,
tool_result blocks messages of the role tool, and thinking reasoning_content. What a block may hold is checked here, so that errors name its place.
What it does not know: JSON decoding (anthropic_schema.py), other fields (anthropic_options.py), chat templates.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from penstock.core.protocol.errors import InvalidRequest, UnsupportedFeature
from penstock.transports.anthropic_schema import CountTokensRequest, text_of, values_of
from penstock.transports.anthropic_thinking import unsealed

FAILED = "Error: "
"""Before the text of a tool_result with is_error: chats have no field for it, and the model should know."""

_ID = re.compile(r"[a-zA-Z0-9_.:-]+")
"""Of a call. Anthropic's have no dots and colons, those of models that count their calls (functions.f:0) do."""

_spaced = json.JSONEncoder(ensure_ascii=False).encode
"""JSON with the spaces that models write: some templates take a call's arguments as they are."""

Block = dict[str, Any]


class Placed(NamedTuple):
    """A block and what it is called in errors."""

    where: str
    block: Block


class Turn(NamedTuple):
    role: str
    blocks: list[Placed]


class Chat(NamedTuple):
    messages: list[dict[str, Any]]
    continued: str
    """What the assistant's final words are called, which the answer goes on with; "": there are none."""


def chat_of(request: CountTokensRequest) -> Chat:
    """Raises InvalidRequest or UnsupportedFeature naming the block."""
    turns = _turns(request)
    continued = ""
    if turns[-1].role == "assistant":
        continued = f"messages[{len(request.messages) - 1}].content"
        _check_last(turns[-1], continued)
    messages: list[dict[str, Any]] = []
    asked: dict[str, tuple[str, str]] = {}
    for turn in turns:
        if turn.role == "assistant":
            message, asked = _assistant(turn)
            messages.append(message)
            continue
        messages += _user(turn, asked) if turn.role == "user" else [{"role": "system", "content": _content(_texts(turn.blocks))}]
        for where, _ in asked.values():
            raise InvalidRequest(f"{where}: this tool_use has no tool_result in the turn that follows it.", param=where)
    return Chat(messages, continued)


def _turns(request: CountTokensRequest) -> list[Turn]:
    if not request.messages:
        raise InvalidRequest("messages must not be empty.", param="messages")
    turns: list[Turn] = []
    if request.system:
        turns.append(Turn("system", _placed(request.system, "system")))
    for index, message in enumerate(request.messages):
        if not message.content:
            if index == len(request.messages) - 1 > 0 and message.role == "assistant":
                break  # as there: an answer that begins with nothing
            where = f"messages[{index}].content"
            raise InvalidRequest(f"{where} must not be empty, but for that of a last message of the assistant.", param=where)
        blocks = _placed(message.content, f"messages[{index}].content")
        if turns and turns[-1].role == message.role:
            turns[-1].blocks.extend(blocks)
        else:
            turns.append(Turn(message.role, blocks))
    return turns


def _placed(content: str | list[Block], where: str) -> list[Placed]:
    if isinstance(content, str):
        return [Placed(where, {"type": "text", "text": content})]
    return [Placed(f"{where}[{index}]", block) for index, block in enumerate(content)]


def _check_last(turn: Turn, where: str) -> None:
    last = turn.blocks[-1].block if turn.blocks else {}
    text = last.get("text") if last.get("type") == "text" else None
    if any(block.get("type") == "tool_use" for _, block in turn.blocks):
        raise InvalidRequest(f"{where}: the last turn has a tool_use; its tool_result must follow.", param=where)
    if not isinstance(text, str) or not text or text[-1].isspace():
        raise InvalidRequest(
            f"{where}: the assistant's final words are continued, so they must be text, and must not be empty or end with white space.",
            param=where,
        )


def _content(texts: list[str]) -> str | list[dict[str, str]]:
    return texts[0] if len(texts) == 1 else [{"type": "text", "text": text} for text in texts]


def _texts(blocks: list[Placed], *, empty: bool = False) -> list[str]:
    for where, block in blocks:
        _kind(where, block, {"text"})
    return [_text(where, block, empty=empty) for where, block in blocks]


def _kind(where: str, block: Block, kinds: set[str]) -> str:
    kind = block.get("type")
    if not isinstance(kind, str):
        raise InvalidRequest(f"{where}.type must be a text such as 'text'.", param=f"{where}.type")
    if kind in kinds:
        return kind
    if kind in _BLOCKS:
        raise InvalidRequest(f"{where}: a block of type {kind!r} has no place here.", param=where)
    raise UnsupportedFeature(f"{where}: content of type {kind[:80]!r} is not supported here: this server takes text only.", param=where)


# ------------------------------------------------------------------ blocks


def _text(where: str, block: Block, *, empty: bool = False) -> str:
    values_of(block, where, "text", "cache_control", "citations", kind="a block of text")
    if block.get("citations"):
        raise UnsupportedFeature(f"{where}.citations is not supported here. Leave it out.", param=f"{where}.citations")
    return text_of(block, where, "text", empty=empty)


def _said_text(where: str, block: Block) -> str:
    """Of the assistant, whose answers here have an empty one where they say nothing."""
    return _text(where, block, empty=True)


def _thinking(where: str, block: Block) -> str:
    values_of(block, where, "thinking", "signature", "cache_control", kind="a block of thinking")
    text = text_of(block, where, "thinking", empty=True)
    return _unsealed(f"{where}.signature", block.get("signature")) or text


def _redacted(where: str, block: Block) -> str:
    values_of(block, where, "data", "cache_control", kind="a block of redacted_thinking")
    return _unsealed(f"{where}.data", text_of(block, where, "data", empty=True)) or ""


def _unsealed(where: str, signature: Any) -> str | None:
    if signature is None:
        return None
    if not isinstance(signature, str):
        raise InvalidRequest(f"{where} must be a text.", param=where)
    try:
        return unsealed(signature)
    except ValueError:
        raise InvalidRequest(f"{where} was changed: send it back as it came.", param=where) from None


_SAID: dict[str, Callable[[str, Block], str]] = {"text": _said_text, "thinking": _thinking, "redacted_thinking": _redacted}
_BLOCKS = {*_SAID, "tool_use", "tool_result"}


def _assistant(turn: Turn) -> tuple[dict[str, Any], dict[str, tuple[str, str]]]:
    """The message, and of the calls in it: id -> (what it is called in errors, the function's name)."""
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    asked: dict[str, tuple[str, str]] = {}
    for where, block in turn.blocks:
        kind = _kind(where, block, {*_SAID, "tool_use"})
        if kind == "tool_use":
            call = _tool_use(where, block)
            if call["id"] in asked:
                raise InvalidRequest(f"{where}.id {call['id'][:80]!r} is another tool_use's.", param=f"{where}.id")
            asked[call["id"]] = where, call["function"]["name"]
            calls.append(call)
        elif said := _SAID[kind](where, block):
            (texts if kind == "text" else thoughts).append(said)
        elif kind == "text" and len(turn.blocks) == 1:
            texts.append(said)
    message: dict[str, Any] = {"role": "assistant", "content": _content(texts)}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    if not texts and (thoughts or calls):
        message["content"] = None
    return message, asked


def _tool_use(where: str, block: Block) -> dict[str, Any]:
    values_of(block, where, "id", "name", "input", "cache_control", "caller", "toolset_name", kind="a tool_use")
    if block.get("caller") not in (None, {"type": "direct"}) or block.get("toolset_name") is not None:
        name = f"{where}.{'toolset_name' if block.get('toolset_name') is not None else 'caller'}"
        raise UnsupportedFeature(f"{name} is not supported here: no tools run on this server.", param=name)
    given = block.get("input")
    if not isinstance(given, dict):
        raise InvalidRequest(f"{where}.input must be an object.", param=f"{where}.input")
    function = {"name": text_of(block, where, "name"), "arguments": _spaced(given)}
    if _ID.fullmatch(text_of(block, where, "id")) is None:
        raise InvalidRequest(f"{where}.id must be letters, digits, underscores, hyphens, dots and colons.", param=f"{where}.id")
    return {"id": block["id"], "type": "function", "function": function}


def _user(turn: Turn, asked: dict[str, tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """Takes out of `asked` what is answered."""
    texts: list[str] = []
    answered: set[str] = set()
    for where, block in turn.blocks:
        if _kind(where, block, {"text", "tool_result"}) == "text":
            texts.append(_text(where, block))
            continue
        if texts:
            raise InvalidRequest(f"{where}: a tool_result must stand before the text of its turn.", param=where)
        yield _tool_result(where, block, asked, answered)
    if texts or not answered:
        yield {"role": "user", "content": _content(texts)}


def _tool_result(where: str, block: Block, asked: dict[str, tuple[str, str]], answered: set[str]) -> dict[str, Any]:
    values_of(block, where, "tool_use_id", "content", "is_error", "cache_control", "toolset_name", kind="a tool_result")
    if block.get("toolset_name") is not None:
        raise UnsupportedFeature(f"{where}.toolset_name is not supported here: no tools run on this server.", param=f"{where}.toolset_name")
    asked_by = asked.pop(text_of(block, where, "tool_use_id"), None)
    if asked_by is None:
        name = block["tool_use_id"]
        why = "is no tool_use of the turn before" if asked or answered else "answers nothing: the turn before has no tool_use"
        why = "has a tool_result already" if name in answered else why
        raise InvalidRequest(f"{where}.tool_use_id {name[:80]!r} {why}.", param=f"{where}.tool_use_id")
    answered.add(block["tool_use_id"])
    content = block.get("content")
    if not isinstance(content, str | list | None) or (isinstance(content, list) and not all(isinstance(one, dict) for one in content)):
        raise InvalidRequest(f"{where}.content must be a text or a list of blocks.", param=f"{where}.content")
    texts = _texts(_placed(content or "", f"{where}.content"), empty=True) or [""]
    failed = block.get("is_error")
    if not isinstance(failed, bool | None):
        raise InvalidRequest(f"{where}.is_error must be true or false.", param=f"{where}.is_error")
    if failed and not texts[0].lower().startswith("error"):
        texts[0] = FAILED + texts[0]
    return {"role": "tool", "tool_call_id": block["tool_use_id"], "name": asked_by[1], "content": _content(texts)}
