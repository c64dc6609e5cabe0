"""What Anthropic's clients get to see.

What it is: `MessagesVoice`, the replies of /v1/messages in one piece or as events, `input_json`, a call's arguments as their object, and Anthropic's error
shape with its types and statuses.
What it does not know: requests' fields and their checks (anthropic.py), how rows arrive, what makes a payload an event (frame.TypedSse, which finds an
event's name at the beginning of its payload).

Order of a stream: message_start; of each block content_block_start, content_block_delta for each piece (the last of a thinking block has its signature) and
content_block_stop; message_delta with the stop_reason and the usage, message_stop. A failed stream ends with an error event; idle ones have pings.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec

from penstock.core.protocol.errors import PenstockError
from penstock.core.protocol.messages import ARGUMENTS, CONTENT, DONE, NAME, REASONING
from penstock.transports.anthropic_options import blamed
from penstock.transports.anthropic_thinking import UNSIGNED, sealed
from penstock.transports.gateway import Batch
from penstock.transports.request import CONTEXT, Header, JsonReply, Receive, Scope, Send, error_headers
from penstock.transports.voice import Choice, Head, Prompt, ToolCall, Usage

OVERLOADED = 529
"""Anthropic's status for a server that cannot take the request now; its clients try again."""
BUSY = frozenset({"queue_full", "too_many_streams", "engine_unavailable", "draining", "store_unavailable"})
"""Codes of errors that are the server's state and nobody's mistake."""

NO_THREADS = "thread_unsupported_request"
"""With this code of an error about the field `thread`, Anthropic's clients send the whole conversation without it."""

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
}

_WRAP = '{"arguments":'
"""Before arguments that are no object, which Anthropic's clients do not know; "}" goes after them."""

_json = msgspec.json.Encoder().encode


def status_of(error: PenstockError) -> int:
    return OVERLOADED if error.code in BUSY else error.status


def error_payload(error: PenstockError, request_id: str = "") -> bytes:
    """Anthropic's error shape, of replies and of events."""
    status = status_of(error)
    kind = "overloaded_error" if status == OVERLOADED else _TYPES.get(status) or ("api_error" if status >= 500 else "invalid_request_error")
    details = {"details": {"error_code": NO_THREADS}} if error.param == "thread" and status == 400 else {}
    return _json(
        {
            "type": "error",
            "error": {"type": kind, "message": blamed(error), **details},
            **({"request_id": request_id} if request_id else {}),
        }
    )


class _Refusal(JsonReply):
    """An error as a reply, whose body has the request's id."""

    __slots__ = ("_error", "_more")

    def __init__(self, error: PenstockError, headers: list[Header]) -> None:
        super().__init__(error_payload(error), status_of(error), headers)
        self._error, self._more = error, headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context = scope.get("state", {}).get(CONTEXT)
        if context is not None:
            super().__init__(error_payload(self._error, context.rid), status_of(self._error), self._more)
        await super().__call__(scope, receive, send)


def usage_json(usage: Usage) -> dict[str, Any]:
    """input_tokens are those that no cache had."""
    details = {} if usage.reasoning is None else {"output_tokens_details": {"thinking_tokens": usage.reasoning}}
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.output,
        **details,
    }


def _stop(reason: str, stop_reason: int | str | None, called: bool, unfinished: bool) -> dict[str, str | None]:
    """`called`: there is a call of the tool that the request names; chats say "stop" then, as OpenAI does. `unfinished`: the answer ended within a call, and
    chats say "length", so that nobody runs it. A stop sequence is named whenever one ended the answer: also where a complete call makes it `tool_use`."""
    sequence = stop_reason if isinstance(stop_reason, str) else None
    if reason == "length" and not unfinished:
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if reason == "tool_calls" or (called and reason == "stop"):
        return {"stop_reason": "tool_use", "stop_sequence": sequence}
    return {"stop_reason": "end_turn" if sequence is None else "stop_sequence", "stop_sequence": sequence}


def input_json(text: str) -> dict[str, Any]:
    """A call's arguments as an object. What is valid JSON, but none, is its only member, as in a stream (`_WRAP`). Of what is no JSON, as the model was cut
    off or made a mistake, there is as much as clients make of a stream's pieces: what has ended, and a number as far as it goes."""
    text = text.lstrip()
    if text and text[0] != "{":
        text = _WRAP + text + "}" if _read(text) is not None else _WRAP + text
    found = _read(text)
    if isinstance(found, dict):
        return found
    cut, closing, rest = _ended(text)
    found = _read(text + rest)
    if found is None:
        found = _read(text[:cut] + closing)
    return found if isinstance(found, dict) else {}


def _read(text: str) -> Any:
    """None for what is no JSON."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.MsgspecError, RecursionError, ValueError):
        return None


def _ended(text: str) -> tuple[int, str, str]:
    """How much of the beginning of a JSON text has ended, what closes it there, and what closes all of it."""
    open_: list[str] = []
    cut, closing = 0, ""
    quoted = escaped = False
    for at, char in enumerate(text):
        if quoted:
            quoted = escaped or char != '"'
            escaped = char == "\\" and not escaped
            continue
        match char:
            case '"':
                quoted = True
                continue
            case "{" | "[":
                open_.append("}" if char == "{" else "]")
                cut = at + 1
            case "}" | "]":
                if not open_ or open_.pop() != char:
                    break
                cut = at + 1
            case ",":
                cut = at
            case _:
                continue
        closing = "".join(reversed(open_))
    return cut, closing, "".join(reversed(open_))


class MessagesVoice:
    """/v1/messages: one prompt, one choice, its channels as blocks in their order; an empty block of text where there is nothing.
    `omit_thinking`: thinking blocks have no text, but it is in their signatures. `tool_named`: the request names the one tool that is to be called."""

    plain = True

    def __init__(self, *, omit_thinking: bool = False, tool_named: bool = False) -> None:
        self._omit = omit_thinking
        self._named = tool_named
        self._stop: dict[str, str | None] = {}
        self._called = False
        """The tool that was named."""
        self._index = -1
        """Of the last block that began."""
        self._open: int | None = None
        """The channel of the block that goes on."""
        self._hidden: list[str] = []
        self._input: str | None = None
        """What stands before the open call's arguments, once they have begun."""

    def begin(self, head: Head) -> str:
        self._id = f"msg_{head.rid}"
        self._head = {"id": self._id, "type": "message", "role": "assistant", "model": head.model}
        return self._id

    # --- in one piece

    def whole(self, prompts: Sequence[Prompt], choices: Sequence[Choice], usage: Usage, timings: dict[str, Any] | None) -> bytes:
        (choice,) = choices
        content = [self._block(channel, said) for channel, said in choice.parts()] or [_text("")]
        stop = _stop(choice.reason, choice.stop_reason, self._named and bool(choice.calls), choice.unfinished)
        more = {} if timings is None else {"metrics": timings}
        return _json(
            {**self._head, "content": content, **stop, "usage": usage_json(usage), **more},
        )

    # --- as events

    def around(self, index: int) -> tuple[bytes, bytes] | None:
        if self._open != CONTENT:
            return None
        return b'{"type":"content_block_delta","index":%d,"delta":{"type":"text_delta","text":' % self._index, b"}}"

    def opened(self, index: int, prompt: Prompt, row: int, batch: Batch) -> Iterator[bytes]:
        usage = usage_json(Usage.at(row, batch)._replace(output=0))
        message: dict[str, Any] = {**self._head, "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
        yield _json({"type": "message_start", "message": message})

    def piece(self, index: int, text: str, row: int, batch: Batch) -> Iterator[bytes]:
        channel, _ = batch.channel(row)
        if channel == NAME:
            extra = batch.extra(row)
            self._called = self._named
            yield from self._begin(NAME, {"type": "tool_use", "id": extra.call_id if extra else "", "name": text, "input": {}})
        elif channel == DONE:
            yield from self._end(done=True)
        elif not text:
            return
        elif channel == ARGUMENTS:
            yield from self._arguments(text)
        elif channel == REASONING:
            if self._open != REASONING:
                yield from self._begin(REASONING, {"type": "thinking", "thinking": "", "signature": ""})
            if self._omit:
                self._hidden.append(text)
            else:
                yield self._delta("thinking_delta", "thinking", text)
        else:
            if self._open != CONTENT:
                yield from self._begin(CONTENT, _text(""))
            yield self._delta("text_delta", "text", text)

    def closed(self, index: int, reason: str, error: PenstockError | None, row: int, batch: Batch) -> Iterator[bytes]:
        extra = batch.extra(row)
        self._stop = _stop(reason, extra.stop_reason if extra else None, self._called, bool(extra and extra.unfinished))
        if self._index < 0:
            yield from self._begin(CONTENT, _text(""))
        yield from self._end()

    def ended(self, usage: Usage, timings: dict[str, Any] | None) -> Iterator[bytes]:
        more = {} if timings is None else {"metrics": timings}
        yield _json({"type": "message_delta", "delta": self._stop, "usage": usage_json(usage), **more})
        yield _json({"type": "message_stop"})

    def broken(self, error: PenstockError) -> Iterable[bytes]:
        return (error_payload(error, self._id[len("msg_") : -1]),)

    @staticmethod
    def refuse(error: PenstockError, headers: Iterable[Header] = ()) -> JsonReply:
        return _Refusal(error, [*error_headers(error), *headers])

    # --- blocks

    def _block(self, channel: int, said: str | ToolCall) -> dict[str, Any]:
        if isinstance(said, ToolCall):
            return {"type": "tool_use", "id": said.id, "name": said.name, "input": input_json("".join(said.arguments))}
        if channel == CONTENT:
            return _text(said)
        return {"type": "thinking", "thinking": "" if self._omit else said, "signature": sealed(said) if self._omit else UNSIGNED}

    def _begin(self, channel: int, block: dict[str, Any]) -> Iterator[bytes]:
        yield from self._end()
        self._index += 1
        self._open = channel
        yield _json({"type": "content_block_start", "index": self._index, "content_block": block})

    def _end(self, *, done: bool = False) -> Iterator[bytes]:
        """Of the block that goes on, if one does. `done`: it is a call that is complete."""
        if self._open is None:
            return
        if self._open == REASONING:
            yield self._delta("signature_delta", "signature", sealed("".join(self._hidden)) if self._omit else UNSIGNED)
            self._hidden.clear()
        if done and self._input:
            yield self._delta("input_json_delta", "partial_json", "}")
        self._open = self._input = None
        yield _json({"type": "content_block_stop", "index": self._index})

    def _arguments(self, text: str) -> Iterator[bytes]:
        if self._open != NAME:
            return
        if self._input is None:
            text = text.lstrip()
            if not text:
                return
            self._input = "" if text[0] == "{" else _WRAP
            text = self._input + text
        yield self._delta("input_json_delta", "partial_json", text)

    def _delta(self, kind: str, field: str, text: str) -> bytes:
        return _json({"type": "content_block_delta", "index": self._index, "delta": {"type": kind, field: text}})


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}
