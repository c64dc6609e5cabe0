"""The part of the HTTP page about the APIs beside OpenAI's.

What it is: `apis(asked)`, lines for make_http.py: what each API does here, and, by `asked`, the tables of its requests' fields.
What it does not know: replies (make_http.py lists all), how anything is answered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from penstock.transports.anthropic_schema import NOT_YET, CountTokensRequest, InputMessage, MessagesRequest
from penstock.transports.refused import Refused


def apis(asked: Callable[[type[msgspec.Struct]], list[str]]) -> list[str]:
    return [
        "## Anthropic's messages",
        "",
        "`POST /v1/messages` and `POST /v1/messages/count_tokens`, for Anthropic's clients: their base URL is this server, without `/v1`. The key comes as"
        " `x-api-key`; `anthropic-version` and `anthropic-beta` may be there and change nothing.",
        "",
        "- The text becomes a chat like any other: `system` is a system message, and the chat template says how it looks. If the last turn is the"
        " assistant's, the answer continues it.",
        f"- As Anthropic's own API does, it refuses every field that it does not know (400 `invalid_request_error` with its name), and these: {refused(NOT_YET)}.",
        "- Streams have Anthropic's events: message_start, content_block_start, content_block_delta, content_block_stop, message_delta with stop_reason and usage,"
        " message_stop; while nothing happens ping, and error if the stream fails.",
        '- Errors are `{"type": "error", "error": {"type", "message"}}`. A server that is full, starts or drains answers 529 `overloaded_error` with'
        " `retry-after`; Anthropic's clients then try again.",
        "- The prefix cache works by itself; `cache_read_input_tokens` says how much it saved, and `input_tokens` is the rest, so that the prompt has as many as both.",
        "",
        "### MessagesRequest",
        "",
        *asked(MessagesRequest),
        "### CountTokensRequest",
        "",
        *asked(CountTokensRequest),
        "### InputMessage",
        "",
        *asked(InputMessage),
    ]


def refused(rows: Mapping[str, Refused]) -> str:
    return ", ".join(f"`{name}`" for name in rows)
