"""The part of the HTTP page about the APIs beside OpenAI's.

What it is: `apis(asked)`, lines for make_http.py: what each API does here, and, by `asked`, the tables of its requests' fields.
What it does not know: replies (make_http.py lists all), how anything is answered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from penstock.transports.anthropic_schema import NOT_YET, CountTokensRequest, InputMessage, MessagesRequest
from penstock.transports.anthropic_statuses import NESTED
from penstock.transports.message_batches import MessageBatchEntry, MessageBatchRequest
from penstock.transports.openai_schema import MetadataRequest
from penstock.transports.refused import Refused
from penstock.transports.responses_schema import (
    ANSWER,
    PROMPT,
    InputTokensRequest,
    ReasoningOptions,
    ResponsesRequest,
    ResponseStreamOptions,
    TextFormat,
    TextOptions,
)
from penstock.transports.storage_schema import BatchRequest, ExpiresAfter, FileUpload
from penstock.transports.tgi_schema import GenerateParameters, GenerateRequest, RootRequest
from penstock.transports.tokens_schema import IDLE, OF_RENDERING, TokensRequest, TokensSampling


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


def tokens(asked: Callable[[type[msgspec.Struct]], list[str]]) -> list[str]:
    return [
        "## Tokens in, tokens out",
        "",
        "`POST /inference/v1/generate`, with vLLM's fields: ids go in, ids come out, with log-probabilities by id, streamed or not. Nothing is rendered, tokenised or"
        " detokenised, which is for callers that have the tokenizer themselves: trainers, routers, gateways.",
        "",
        "- token_ids is computed as it is, and token_ids of a choice are all that was drawn, the token that ended it too.",
        "- Settings that are left out are neutral (temperature 1, no top_p), as in vLLM: the model's own defaults do not count, but for max_new_tokens.",
        "- Log-probabilities have chat's shape, with `token_id:ID` for a token and null for its bytes.",
        "- In a stream each choice has chunks with its new tokens, then one with none and the finish_reason; with include_usage one with no choices and the usage;"
        " then `data: [DONE]`. The pieces put together are what comes without stream.",
        "- Errors have OpenAI's shape; `param` is `token_ids[7]` or `sampling_params.top_p`.",
        f"- Without effect: {', '.join(f'`{name}`' for name in IDLE)} of sampling_params, and {', '.join(f'`{name}`' for name in OF_RENDERING)}, which vLLM's"
        " rendering adds. Refused by name: `features`, `kv_transfer_params`, stop strings, and whatever the other generation requests refuse.",
        "- `DELETE /v1/requests/{request_id}` ends it.",
        "",
        "### TokensRequest",
        "",
        *asked(TokensRequest),
        "### TokensSampling",
        "",
        *asked(TokensSampling),
    ]


def apis(asked: Callable[[type[msgspec.Struct]], list[str]]) -> list[str]:
    return [
        *storage(asked),
        "## Anthropic's messages",
        "",
        "`POST /v1/messages` and `POST /v1/messages/count_tokens`, for Anthropic's clients: their base URL is this server, without `/v1`. The key comes as"
        " `x-api-key` or `Authorization: Bearer`. `anthropic-version` may be missing or any but 2023-01-01, whose streams were others; sampling settings work with"
        " each, also where Anthropic's 2026-10-21 has none. `anthropic-beta` may be there and changes nothing: what a field asks for is done or refused. Every reply"
        " has the header `request-id`.",
        "",
        "- The request becomes a chat like any other, and the chat template says how it looks. `system` is a system message, as are turns of the role system. If"
        " the last turn is the assistant's, the answer continues it.",
        "- Tools are those of chat completions: `tool_use` blocks are calls, `tool_result` blocks messages of the role tool. As in Anthropic's API each call has"
        ' its result in the turn that follows, before any text of that turn. Arguments that are no object come as `{"arguments": ...}`.',
        "- What a model says to itself is a `thinking` block, whether `thinking` was asked for or not, where its format is known (`--reasoning-parser`). A model"
        " that never thinks takes `thinking` all the same: there are no such blocks then.",
        f"- As Anthropic's own API does, it refuses every field that it does not know (400 `invalid_request_error` with its name), and these: {refused(NOT_YET)}.",
        "- Streams have Anthropic's events: message_start; of each block content_block_start, content_block_delta and content_block_stop; message_delta with"
        " stop_reason and usage, message_stop; while nothing happens ping, and error if the stream fails.",
        '- Errors are `{"type": "error", "error": {"type", "message"}}`. A server that is full, starts or drains answers 529 `overloaded_error` with'
        " `retry-after`; Anthropic's clients then try again. That `thread` is refused has the code by which they send the whole conversation instead.",
        "- The prefix cache works by itself; `cache_read_input_tokens` says how much it saved, and `input_tokens` is the rest, so that the prompt has as many as both.",
        "- `GET /v1/models` and `GET /v1/models/{model_id}` answer in Anthropic's shape, with its pages and `lifecycle`, where the header anthropic-version is sent. Any other query is a 400.",
        "- Errors of these, and of paths where there is nothing, then have Anthropic's shape, too. Its Files API is not served: at `/v1/files` its clients get a 404.",
        "- `cache_control` is taken without effect, in the request, in blocks and in tools: prefixes are cached by themselves, and nothing pins one for a time."
        " `cache_creation_input_tokens` is 0.",
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
        "### Message batches",
        "",
        "`/v1/messages/batches`, as Anthropic has it, on the machinery of [OpenAI's batches](#what-is-kept): the same lowest priority, the same `--batch-in-flight`, the same"
        " store, so that with `--store` a restart goes on where the server was. A batch of a tenant is seen by that tenant alone. With `--no-store` there are none.",
        "",
        "- Each request is answered as a POST to /v1/messages would be, and may name its own model; what is wrong within params is that request's result. 429 and 529 are tried again"
        " until the batch's time is over, after 24 hours.",
        '- A result is a line `{"custom_id", "result": {"type", ...}}` of the type `succeeded` (with `message`), `errored` (with `error`, in Anthropic\'s shape), `canceled` or `expired`, in'
        " any order. They are there once processing_status is `ended`, until the batch is deleted or `--store-ttl-s` has passed since it was made.",
        "- Cancelling ends what runs; what has been answered stays. A batch that has not ended cannot be deleted (409).",
        "- The list has `limit` (1 to 1000), `after_id` and `before_id` in its query, the newest first.",
        "",
        "### MessageBatchRequest",
        "",
        *asked(MessageBatchRequest),
        "### MessageBatchEntry",
        "",
        *asked(MessageBatchEntry),
        "### Within Anthropic's fields",
        "",
        "| what | status | note |",
        "|---|---|---|",
        *(f"| `{name}` | {status.word} | {status.why} |" for name, status in NESTED.items()),
        "",
        "## OpenAI's Responses",
        "",
        "`POST /v1/responses`: a conversation goes in as items, and the answer comes out as items: reasoning, messages, calls. It is told the model as a chat is"
        " (the same template, tools, grammars and checks); errors have OpenAI's shape and name the fields of this API.",
        "",
        "- Items that follow each other and are the assistant's (reasoning, a message, calls) are one message of the chat. `instructions` is a system message.",
        "- Streams have OpenAI's events, numbered, without `[DONE]`; the deltas put together are the response that comes in one piece. What fails after the first"
        " event ends with response.failed, before it with a plain error, or with the event error where a comment has been sent.",
        "- With `store` (the default) the response and its input are kept, under an id that cannot be guessed, for the keys of one tenant alone: see"
        " `--store`, `--store-ttl-s` and `--no-store`. What fails or is left by its client is not kept, unless it is in the background. If nothing more can be"
        " kept the answer comes all the same, with `store` false. Prompts are in no log, and on a disk only where `--store` puts them.",
        "- `previous_response_id` puts the input and output of that response, and of those before it, before the input; each time the whole is rendered anew (and"
        " found in the prefix cache).",
        "- `background` answers at once and goes on without a connection. `GET /v1/responses/{id}` tells how far it is; with stream, too,"
        " `GET /v1/responses/{id}?stream=true&starting_after=N` has its events from any HTTP process; `POST /v1/responses/{id}/cancel` ends it: its stream's last event is then response.failed, with a response whose status is `cancelled`, as OpenAI has no event for that. One whose process"
        " was lost has failed.",
        "- `GET /v1/responses/{id}/input_items` lists the items of the request itself, not those of previous_response_id.",
        f"- Refused by name: {refused(PROMPT | ANSWER)}, and whatever chat refuses.",
        "",
        "### ResponsesRequest",
        "",
        *asked(ResponsesRequest),
        "### InputTokensRequest",
        "",
        "`POST /v1/responses/input_tokens`.",
        "",
        *asked(InputTokensRequest),
        *(
            line
            for kind in (ReasoningOptions, TextOptions, TextFormat, ResponseStreamOptions)
            for line in (f"### {kind.__name__}", "", *asked(kind))
        ),
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
        " `x-penstock-warning`.",
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
        *tokens(asked),
    ]


def refused(rows: Mapping[str, Refused]) -> str:
    return ", ".join(f"`{name}`" for name in rows)
