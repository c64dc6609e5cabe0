"""What Anthropic's clients get to see.

What it is: `MessagesVoice`, the replies of /v1/messages in one piece or as events, and Anthropic's error shape with its types and statuses.
What it does not know: requests' fields and their checks (anthropic.py), how rows arrive, what makes a payload an event (frame.TypedSse, which finds an
event's name at the beginning of its payload).

Order of a stream: message_start, content_block_start, content_block_delta for each piece of text, content_block_stop, message_delta with the
stop_reason and the usage, message_stop. A failed stream ends with an error event; idle ones have pings.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec

from penstock.core.protocol.errors import PenstockError
from penstock.transports.gateway import Batch
from penstock.transports.request import Header, JsonReply, error_headers
from penstock.transports.voice import Choice, Head, Prompt, Usage

OVERLOADED = 529
"""Anthropic's status for a server that cannot take the request now; its clients try again."""
BUSY = frozenset({"queue_full", "too_many_streams", "engine_unavailable", "draining"})
"""Codes of errors that are the server's state and nobody's mistake."""

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
}

_json = msgspec.json.Encoder().encode


def status_of(error: PenstockError) -> int:
    return OVERLOADED if error.code in BUSY else error.status


def error_payload(error: PenstockError) -> bytes:
    """Anthropic's error shape, of replies and of events."""
    status = status_of(error)
    kind = "overloaded_error" if status == OVERLOADED else _TYPES.get(status) or ("api_error" if status >= 500 else "invalid_request_error")
    return _json({"type": "error", "error": {"type": kind, "message": error.message}})


def usage_json(usage: Usage) -> dict[str, int]:
    """input_tokens are those that no cache had."""
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.output,
    }


def _stop(reason: str, stop_reason: int | str | None) -> dict[str, str | None]:
    if reason == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if isinstance(stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": stop_reason}
    return {"stop_reason": "end_turn", "stop_sequence": None}


class MessagesVoice:
    """/v1/messages: one prompt, one choice, one block of text."""

    plain = True

    def __init__(self) -> None:
        self._stop: dict[str, str | None] = {}

    def begin(self, head: Head) -> str:
        self._id = f"msg_{head.rid}"
        self._head = {"id": self._id, "type": "message", "role": "assistant", "model": head.model}
        return self._id

    def whole(self, prompts: Sequence[Prompt], choices: Sequence[Choice], usage: Usage, timings: dict[str, Any] | None) -> bytes:
        (choice,) = choices
        content = [{"type": "text", "text": "".join(choice.pieces)}]
        more = {} if timings is None else {"metrics": timings}
        return _json(
            {**self._head, "content": content, **_stop(choice.reason, choice.stop_reason), "usage": usage_json(usage), **more},
        )

    def around(self, index: int) -> tuple[bytes, bytes]:
        return b'{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":', b"}}"

    def opened(self, index: int, prompt: Prompt, row: int, batch: Batch) -> Iterator[bytes]:
        usage = usage_json(Usage.at(row, batch)._replace(output=0))
        message: dict[str, Any] = {**self._head, "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
        yield _json({"type": "message_start", "message": message})
        yield _json({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}})

    def piece(self, index: int, text: str, row: int, batch: Batch) -> Iterator[bytes]:
        before, after = self.around(index)
        yield before + _json(text) + after

    def closed(self, index: int, reason: str, error: PenstockError | None, row: int, batch: Batch) -> Iterator[bytes]:
        extra = batch.extra(row)
        self._stop = _stop(reason, extra.stop_reason if extra else None)
        yield _json({"type": "content_block_stop", "index": 0})

    def ended(self, usage: Usage, timings: dict[str, Any] | None) -> Iterator[bytes]:
        more = {} if timings is None else {"metrics": timings}
        yield _json({"type": "message_delta", "delta": self._stop, "usage": usage_json(usage), **more})
        yield _json({"type": "message_stop"})

    def broken(self, error: PenstockError) -> Iterable[bytes]:
        return (error_payload(error),)

    @staticmethod
    def refuse(error: PenstockError, headers: Iterable[Header] = ()) -> JsonReply:
        return JsonReply(error_payload(error), status_of(error), [*error_headers(error), *headers])
