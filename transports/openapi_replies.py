"""What replies look like, for the OpenAPI document.

What it is: msgspec structs of the reply bodies, and which endpoint gives which with which status and content type. Tests hold real replies
against them; nothing is encoded from them.
What it does not know: how replies are made (openai_voice.py, http.py, text's queries).
It is long because every endpoint of every API has its entry here.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import msgspec

from penstock.transports.anthropic_replies import (
    CountTokensReply,
    MessageBatch,
    MessageBatchGone,
    MessageBatchList,
    MessageError,
    MessageEvent,
    MessageModel,
    MessageModelList,
    MessageReply,
)
from penstock.transports.responses_replies import InputTokensReply, ResponseEvent, ResponseGone, ResponseItems, ResponseReply
from penstock.transports.storage_replies import BatchList, FileGone, FileList, StoredChat, StoredChatGone, StoredChatList, StoredMessageList
from penstock.transports.storage_schema import Batch, FileObject
from penstock.transports.tgi_replies import GenerateError, GenerateEvent, GenerateReply, InfoReply
from penstock.transports.tokens_replies import TokensChunk, TokensReply

JSON = "application/json"
SSE = "text/event-stream"
NDJSON = "application/x-ndjson"
"""The same, an event's data a line, for who asks for it."""
PLAIN = "text/plain"
HTML = "text/html"
BYTES = "application/octet-stream"
JSONL = "application/x-jsonl"


class ErrorFields(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str


class ErrorReply(msgspec.Struct):
    """OpenAI's error shape, of every error but those of other APIs."""

    error: ErrorFields


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct):
    reasoning_tokens: int


class Usage(msgspec.Struct, omit_defaults=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | None = None


class Metrics(msgspec.Struct, omit_defaults=True):
    """With the request header `x-include-metrics: 1`. Milliseconds."""

    queue_ms: float
    prefill_ms: float
    decode_ms: float
    total_ms: float
    preemptions: int
    time_to_first_token_ms: float | None = None


class CalledFunction(msgspec.Struct):
    name: str
    arguments: str


class CalledTool(msgspec.Struct):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(msgspec.Struct, omit_defaults=True):
    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[CalledTool] | None = None


class ChatChoice(msgspec.Struct, omit_defaults=True):
    index: int
    message: AssistantMessage
    logprobs: dict[str, Any] | None
    finish_reason: str
    stop_reason: int | str | None = None
    matched_stop: int | str | None = None
    token_ids: list[int] | None = None
    error: ErrorFields | None = None


class ChatReply(msgspec.Struct, omit_defaults=True):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None = None
    prompt_logprobs: list[Any] | None = None
    prompt_token_ids: list[int] | None = None
    metrics: Metrics | None = None


class FunctionDelta(msgspec.Struct, omit_defaults=True):
    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(msgspec.Struct, omit_defaults=True):
    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta | None = None
    done: bool | None = None


class ChatDelta(msgspec.Struct, omit_defaults=True):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class JsonValue(msgspec.Struct, omit_defaults=True):
    path: str
    index: int | None = None
    value: Any = None
    too_large: bool | None = None


class ChatChunkChoice(msgspec.Struct, omit_defaults=True):
    index: int
    delta: ChatDelta
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    matched_stop: int | str | None = None
    token_ids: list[int] | None = None
    json_value: JsonValue | None = None
    error: ErrorFields | None = None


class ChatChunk(msgspec.Struct, omit_defaults=True):
    """The data of one event; the last event's data is [DONE], that of a failed stream an ErrorReply."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    system_fingerprint: str | None = None
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None
    metrics: Metrics | None = None
    obfuscation: str | None = None


class TextChoice(msgspec.Struct, omit_defaults=True):
    index: int
    text: str
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    matched_stop: int | str | None = None
    prompt_logprobs: list[Any] | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None
    json_value: JsonValue | None = None
    error: ErrorFields | None = None


class CompletionReply(msgspec.Struct, omit_defaults=True):
    """Whole, or the data of one event."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    system_fingerprint: str | None = None
    usage: Usage | None = None
    metrics: Metrics | None = None
    obfuscation: str | None = None


class Model(msgspec.Struct, omit_defaults=True):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str | None = None
    parent: str | None = None
    max_model_len: int | None = None


class ModelList(msgspec.Struct):
    object: Literal["list"]
    data: list[Model]


class TokenizeReply(msgspec.Struct, omit_defaults=True):
    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeReply(msgspec.Struct):
    prompt: str


class ReadyReply(msgspec.Struct, omit_defaults=True):
    status: Literal["ready", "not ready"]
    reason: str | None = None
    ages_s: dict[str, float] = {}
    """Seconds since each process that answers depend on was last heard of."""


class LiveReply(msgspec.Struct):
    status: Literal["live"]


class VersionReply(msgspec.Struct):
    version: str


class Scheduling(msgspec.Struct):
    policy: str
    priority: Literal["lower first"]
    itl_target_ms: float | None
    mixed_prefill_tokens: int | None


class PoolInfo(msgspec.Struct):
    version: str
    model: str
    models: list[str]
    fingerprint: str
    engine: dict[str, Any] | None
    epoch: int
    limits: dict[str, int]


class ServerInfoReply(msgspec.Struct):
    version: str
    model: str
    scheduling: Scheduling
    pools: list[PoolInfo]


class CancelReply(msgspec.Struct):
    id: str
    object: Literal["request"]
    cancelled: bool


class ControlReply(msgspec.Struct):
    id: str
    object: Literal["request"]
    done: Literal["pause", "resume", "stop"]


class Answer(NamedTuple):
    """One status of an endpoint: content type -> the body's struct (None: free text; dict: any object)."""

    status: int
    content: dict[str, Any]
    what: str
    also: Any = None
    """Another struct that JSON may be, for clients of another API at the same path."""

    @property
    def kinds(self) -> list[Any]:
        """Of its bodies."""
        return [kind for kind in (*self.content.values(), self.also) if kind is not None]


EVERYWHERE = (400, 405, 408, 431, 501)
"""Errors of every endpoint: what arrives is no valid HTTP, has another method, comes too slowly, or has too large headers."""
_READING = (401, 403, 500, 503)
_ASKING = (401, 403, 404, 413, 415, 429, 500, 503)
_GENERATING = (*_ASKING, 409, 499)
_ANTHROPIC = (401, 403, 404, 413, 415, 429, 500, 529)
_ANTHROPIC_KEPT = (401, 403, 404, 500, 529)
_TGI = (401, 403, 409, 413, 415, 422, 424, 429, 499, 500, 503)

REPLIES: dict[str, tuple[list[Answer], tuple[int, ...]]] = {
    "/v1/chat/completions": ([Answer(200, {JSON: ChatReply, SSE: ChatChunk}, "The answer; with stream true as events.")], _GENERATING),
    "/v1/chat/completions/{completion_id}": ([Answer(200, {JSON: StoredChat}, "The answer.")], (*_READING, 404)),
    "/v1/chat/completions/{completion_id}/messages": ([Answer(200, {JSON: StoredMessageList}, "A page of them.")], (*_READING, 404)),
    "/v1/files": ([Answer(200, {JSON: FileObject}, "The file is kept.")], _ASKING),
    "/v1/files/{file_id}": ([Answer(200, {JSON: FileObject}, "The file.")], (*_READING, 404)),
    "/v1/files/{file_id}/content": ([Answer(200, {BYTES: None}, "Its contents.")], (*_READING, 404)),
    "/v1/batches": ([Answer(200, {JSON: Batch}, "The batch, which is going to be validated.")], _ASKING),
    "/v1/batches/{batch_id}": ([Answer(200, {JSON: Batch}, "The batch.")], (*_READING, 404)),
    "/v1/batches/{batch_id}/cancel": ([Answer(200, {JSON: Batch}, "It is being cancelled.")], (*_READING, 404, 409)),
    "/v1/completions": ([Answer(200, {JSON: CompletionReply, SSE: CompletionReply}, "The text; with stream true as events.")], _GENERATING),
    "/inference/v1/generate": (
        [Answer(200, {JSON: TokensReply, SSE: TokensChunk}, "The tokens; with stream true as events.")],
        _GENERATING,
    ),
    "/v1/messages": (
        [Answer(200, {JSON: MessageReply, SSE: MessageEvent}, "The answer; with stream true as events.")],
        (*_ANTHROPIC, 409, 499),
    ),
    "/v1/messages/count_tokens": ([Answer(200, {JSON: CountTokensReply}, "How many tokens.")], _ANTHROPIC),
    "/v1/messages/batches": ([Answer(200, {JSON: MessageBatch}, "The batch, which has begun.")], _ANTHROPIC),
    "/v1/messages/batches/{message_batch_id}": ([Answer(200, {JSON: MessageBatch}, "The batch.")], _ANTHROPIC_KEPT),
    "/v1/messages/batches/{message_batch_id}/results": ([Answer(200, {JSONL: None}, "A result a line.")], _ANTHROPIC_KEPT),
    "/v1/messages/batches/{message_batch_id}/cancel": (
        [Answer(200, {JSON: MessageBatch}, "It is being cancelled.")],
        (*_ANTHROPIC_KEPT, 409),
    ),
    "/v1/responses": ([Answer(200, {JSON: ResponseReply, SSE: ResponseEvent}, "The answer; with stream true as events.")], _GENERATING),
    "/v1/responses/input_tokens": ([Answer(200, {JSON: InputTokensReply}, "How many tokens.")], _ASKING),
    "/v1/responses/{response_id}": (
        [Answer(200, {JSON: ResponseReply, SSE: ResponseEvent}, "The response; with stream true its events.")],
        (*_READING, 404),
    ),
    "/v1/responses/{response_id}/cancel": ([Answer(200, {JSON: ResponseReply}, "The response, which is over.")], (*_READING, 404)),
    "/v1/responses/{response_id}/input_items": ([Answer(200, {JSON: ResponseItems}, "A page of them.")], (*_READING, 404)),
    "/generate": ([Answer(200, {JSON: GenerateReply}, "The text.")], _TGI),
    "/generate_stream": ([Answer(200, {SSE: GenerateEvent}, "The text as events.")], _TGI),
    "/": ([Answer(200, {JSON: list[GenerateReply], SSE: GenerateEvent}, "The text, in a list of one; with stream true as events.")], _TGI),
    "/info": ([Answer(200, {JSON: InfoReply}, "Model and limits.")], _READING),
    "/v1/models": (
        [Answer(200, {JSON: ModelList}, "Every name that requests may use; for Anthropic's clients a page of them.", MessageModelList)],
        (*_READING, 529),
    ),
    "/v1/models/{model_id}": ([Answer(200, {JSON: Model}, "The model.", MessageModel)], (*_READING, 404, 529)),
    "/tokenize": ([Answer(200, {JSON: TokenizeReply}, "The tokens.")], _ASKING),
    "/detokenize": ([Answer(200, {JSON: DetokenizeReply}, "The text.")], _ASKING),
    "/tokenizer_info": ([Answer(200, {JSON: dict[str, Any]}, "The tokenizer's configuration.")], _READING),
    "/health": ([Answer(200, {JSON: ReadyReply}, "All is up."), Answer(503, {JSON: ReadyReply}, "Something is missing.")], ()),
    "/health/ready": ([Answer(200, {JSON: ReadyReply}, "All is up."), Answer(503, {JSON: ReadyReply}, "Something is missing.")], ()),
    "/health/live": ([Answer(200, {JSON: LiveReply}, "This process runs its loop.")], ()),
    "/health/decode": (
        [
            Answer(200, {JSON: dict[str, Any]}, "Running requests make progress."),
            Answer(503, {JSON: dict[str, Any]}, "They do not, or nobody can say."),
        ],
        (),
    ),
    "/server_info": ([Answer(200, {JSON: ServerInfoReply}, "What is served.")], _READING),
    "/v1/requests/{request_id}": ([Answer(200, {JSON: CancelReply}, "It is cancelled.")], (*_READING, 404)),
    "/v1/streams/{stream_id}": (
        [
            Answer(200, {SSE: None}, "Its events from there on, as the endpoint that it was asked of sends them."),
            Answer(204, {}, "There is nothing more: it is over."),
        ],
        (*_READING, 404, 409, 410, 499),
    ),
    "/version": ([Answer(200, {JSON: VersionReply}, "Penstock's version.")], (401,)),
    "/metrics": ([Answer(200, {PLAIN: None}, "Prometheus text format.")], _READING),
    "/schema": ([Answer(200, {HTML: None}, "This API as a page.")], (401, 500)),
    "/schema/openapi.json": ([Answer(200, {JSON: dict[str, Any]}, "This API as OpenAPI 3.1.")], (401, 500)),
}
"""path -> (its own answers, statuses of errors besides those of EVERYWHERE)."""

OF_METHODS: dict[str, tuple[list[Answer], tuple[int, ...]]] = {
    "GET /v1/files": ([Answer(200, {JSON: FileList}, "A page of them.")], (*_READING, 404)),
    "DELETE /v1/files/{file_id}": ([Answer(200, {JSON: FileGone}, "It is gone.")], (*_READING, 404)),
    "POST /v1/requests/{request_id}": ([Answer(200, {JSON: ControlReply}, "It is so.")], (*_READING, 404)),
    "GET /v1/batches": ([Answer(200, {JSON: BatchList}, "A page of them.")], _READING),
    "GET /v1/messages/batches": ([Answer(200, {JSON: MessageBatchList}, "A page of them.")], _ANTHROPIC_KEPT),
    "DELETE /v1/messages/batches/{message_batch_id}": ([Answer(200, {JSON: MessageBatchGone}, "It is gone.")], (*_ANTHROPIC_KEPT, 409)),
    "GET /v1/chat/completions": ([Answer(200, {JSON: StoredChatList}, "A page of them.")], _READING),
    "POST /v1/chat/completions/{completion_id}": ([Answer(200, {JSON: StoredChat}, "The answer.")], _ASKING),
    "DELETE /v1/chat/completions/{completion_id}": ([Answer(200, {JSON: StoredChatGone}, "It is gone.")], (*_READING, 404)),
    "DELETE /v1/responses/{response_id}": ([Answer(200, {JSON: ResponseGone}, "It is gone.")], (*_READING, 404)),
}
"""The same of methods that answer otherwise than their path's entry in REPLIES says: "METHOD path" -> ..."""


def replies_at(path: str, method: str) -> tuple[list[Answer], tuple[int, ...]]:
    """`method` in any case."""
    return OF_METHODS.get(f"{method.upper()} {path}") or REPLIES[path]


def every_answer() -> list[Answer]:
    return [answer for answers, _ in (*REPLIES.values(), *OF_METHODS.values()) for answer in answers]


SUMMARIES = {"/schema": "This API as a page", "/schema/openapi.json": "This API as OpenAPI 3.1"}
"""Of paths that Litestar leaves out of its document."""


OWN_ERRORS: dict[str, type[msgspec.Struct]] = {
    **dict.fromkeys((path for path in REPLIES if path.startswith("/v1/messages")), MessageError),
    **dict.fromkeys(("/generate", "/generate_stream", "/", "/info"), GenerateError),
}
"""Of endpoints whose errors have another shape than ErrorReply."""
TWO_APIS = ("/v1/models", "/v1/files")
"""Paths, and what is below them, whose errors have Anthropic's shape for Anthropic's clients."""
BEFORE_A_ROUTE = (400, 408)
"""Statuses of what is no HTTP, or comes too slowly: they have OpenAI's shape at every path."""


def error_bodies(path: str, status: int) -> list[type[msgspec.Struct]]:
    """The shapes that an error of that status may have there."""
    own = OWN_ERRORS.get(path)
    if own is None:
        return [ErrorReply, MessageError] if path.startswith(TWO_APIS) else [ErrorReply]
    return [own, ErrorReply] if status in BEFORE_A_ROUTE else [own]


def errors_of(path: str, method: str = "") -> list[int]:
    """Every status with which an error may come from there."""
    return sorted({*replies_at(path, method)[1], *EVERYWHERE})


OWN_STATUSES: dict[int, str] = {
    422: "The request is wrong: the message names the field.",
    424: "The engine failed on this very request.",
    529: "The server is busy, starting or draining; Retry-After says when to come back.",
}
"""Statuses of other APIs' errors."""

ERRORS: dict[int, str] = {
    400: "The request is wrong (`param` names the field), or no valid HTTP.",
    401: "A valid API key is needed.",
    403: "The key is not good for this endpoint.",
    404: "No such model, or nothing at this path.",
    405: "This method is not allowed here.",
    408: "The request did not arrive in time.",
    409: "What is over cannot be changed; or a stream has this id already, or has another reader now.",
    410: "The stream is not kept any more.",
    413: "The request is too large.",
    415: "The content type or content encoding is not understood.",
    429: "The server is busy; Retry-After says when to come back.",
    431: "The request's headers are too large.",
    499: "The request was cancelled by DELETE /v1/requests.",
    500: "The server made an error.",
    501: "The transfer coding is not understood.",
    503: "The server is starting, draining, or lost a process; Retry-After says when to come back.",
}
