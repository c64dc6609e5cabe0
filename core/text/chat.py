"""Chat messages, made ready for a template.

What it is: checks and plain forms: text parts are joined where a template expects strings, media are refused by name, arguments of earlier
tool calls become objects; and the mark that finds the end of a message to be continued.
What it does not know: Jinja, tokenizers, HTTP.
"""

from __future__ import annotations

from typing import Any

import msgspec

from penstock.core.errors import InvalidRequest, UnsupportedFeature

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
"""Who may speak, as OpenAI names them."""
TEXT_PARTS = frozenset({"text", "input_text", "output_text"})


def prepare(messages: list[dict[str, Any]], *, native_parts: bool) -> list[dict[str, Any]]:
    """A copy of `messages` as templates expect them. Raises InvalidRequest or UnsupportedFeature with param "messages"."""
    return [_message(index, message, native_parts) for index, message in enumerate(messages)]


def _message(index: int, message: dict[str, Any], native_parts: bool) -> dict[str, Any]:
    where = f"messages[{index}]"
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidRequest(f"{where}.role must be a string such as 'user'.", param="messages")
    out = dict(message)
    content = message.get("content")
    if content is None:
        # Templates print what is there; a missing content (a message of tool calls only) must not come out as "None".
        out["content"] = ""
    elif isinstance(content, list):
        texts = [_part(f"{where}.content[{number}]", part) for number, part in enumerate(content)]
        out["content"] = [{"type": "text", "text": text} for text in texts] if native_parts else "\n".join(texts)
    elif not isinstance(content, str):
        raise InvalidRequest(f"{where}.content must be a string or a list of parts.", param="messages")
    calls = message.get("tool_calls")
    if isinstance(calls, list):
        out["tool_calls"] = [_tool_call(f"{where}.tool_calls[{number}]", call) for number, call in enumerate(calls)]
    elif calls is None:
        out.pop("tool_calls", None)
    else:
        raise InvalidRequest(f"{where}.tool_calls must be a list.", param="messages")
    return out


def _part(where: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise InvalidRequest(f"{where} must be an object with a type.", param="messages")
    kind = part.get("type")
    if kind not in TEXT_PARTS:
        raise UnsupportedFeature(f"{where} is of type {kind!r}, but this server takes text only so far.", param="messages")
    text = part.get("text")
    if not isinstance(text, str):
        raise InvalidRequest(f"{where}.text must be a string.", param="messages")
    return text


def _tool_call(where: str, call: Any) -> Any:
    if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
        raise InvalidRequest(f"{where} must be an object with a function.", param="messages")
    function = dict(call["function"])
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        # OpenAI clients send a JSON string; templates want the object.
        try:
            function["arguments"] = msgspec.json.decode(arguments) if arguments.strip() else {}
        except msgspec.DecodeError as error:
            raise InvalidRequest(f"{where}.function.arguments is not valid JSON ({error}).", param="messages") from None
    return {**call, "function": function}


MARK = "\u2063continue-here\u2063"
"""Appended to the message that continue_final_message goes on with, so that its end is found whatever the template does around it."""


def mark_final(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`messages` with the last one's text marked. Raises InvalidRequest if there is no text to continue."""
    last = dict(messages[-1]) if messages else {}
    content = last.get("content")
    if isinstance(content, str) and content.strip():
        last["content"] = content + MARK + " "
    elif isinstance(content, list) and content:
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
