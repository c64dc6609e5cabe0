"""The part of the HTTP page about the APIs beside OpenAI's.

What it is: `apis(asked)`, lines for make_http.py: what each API does here, and, by `asked`, the tables of its requests' fields.
What it does not know: replies (make_http.py lists all), how anything is answered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from penstock.transports.anthropic_schema import NOT_YET, CountTokensRequest, InputMessage, MessagesRequest
from penstock.transports.openai_schema import MetadataRequest
from penstock.transports.refused import Refused
from penstock.transports.storage_schema import BatchRequest, ExpiresAfter, FileUpload
from penstock.transports.tgi_schema import GenerateParameters, GenerateRequest, RootRequest


def storage(asked: Callable[[type[msgspec.Struct]], list[str]]) -> list[str]:
    return [
        "## What is kept",
        "",
        "Chat completions with `store: true`, files, and batches, as OpenAI has them; [storage](storage.md) says where it is and for how long. Nothing of one tenant"
        " ([tables](tables.md)) is seen by another. With `--no-store` none of these endpoints is there.",
        "",
        "- A list has `after` (the id of the last one before), `limit` and, but for batches, `order` in its query; chat completions also `model` and"
        " `metadata[KEY]`, files `purpose`. A field that is not known is a 400: without it the list would be another.",
        "- A streamed answer is kept as the whole reply that it would have been. It is in the store before the last event leaves. The same id again takes the"
        " place of the first.",
        "- A batch reads a file of lines such as"
        ' `{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...]}}`; all are for one endpoint and one model. Each'
        " is answered as a request of its own would be, never as a stream. Answers are lines of the output file, in the order in which they came;"
        " those with another status than 200 are in the error file. 429 and 503 are tried again until the batch's time is over.",
        "- Requests of batches wait for those of others: they have the lowest priority, and at most `--batch-in-flight` of them run at once, a single one"
        " while somebody else asks: the others stand still meanwhile.",
        "",
        "### MetadataRequest",
        "",
        *asked(MetadataRequest),
        "### FileUpload",
        "",
        "A form (`multipart/form-data`), read as it comes.",
        "",
        *asked(FileUpload),
        "### BatchRequest",
        "",
        *asked(BatchRequest),
        "### ExpiresAfter",
        "",
        *asked(ExpiresAfter),
    ]


def apis(asked: Callable[[type[msgspec.Struct]], list[str]]) -> list[str]:
    return [
        *storage(asked),
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
        "## TGI's generate",
        "",
        "`POST /generate`, `POST /generate_stream`, `POST /` (either, by `stream`) and `GET /info`, for clients of Hugging Face's Text Generation Inference:"
        " their base URL is this server. They use the default model.",
        "",
        "- Defaults are TGI's: an answer is greedy unless a parameter asks for sampling, the model's own sampling defaults do not count, and a stop text stays in the"
        " answer.",
        "- Streams have an event a token, and the whole text with the last one; there is no `[DONE]`. Each has its log-probability.",
        '- Errors are `{"error", "error_type"}`: 422 `validation`, 424 `generation`, 429 `overloaded`, 503 `unhealthy`.',
        "- Fields of other APIs that would change the answer are refused by name, within parameters and beside them; others are ignored and named in"
        " `x-penstock-ignored-fields`.",
        "",
        "### GenerateRequest",
        "",
        *asked(GenerateRequest),
        "### RootRequest",
        "",
        *asked(RootRequest),
        "### GenerateParameters",
        "",
        *asked(GenerateParameters),
    ]


def refused(rows: Mapping[str, Refused]) -> str:
    return ", ".join(f"`{name}`" for name in rows)
