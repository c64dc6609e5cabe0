"""What the replies of OpenAI's Responses API look like, for the OpenAPI document.

What it is: msgspec structs of the reply bodies and events; tests hold real replies against them.
What it does not know: how replies are made (responses_voice.py), which endpoint gives which.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class ResponsePart(msgspec.Struct, omit_defaults=True):
    """A part of an item's content."""

    type: Literal["output_text", "input_text", "reasoning_text", "refusal", "summary_text"]
    text: str | None = None
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    refusal: str | None = None


class ResponseItem(msgspec.Struct, omit_defaults=True):
    """An item of an answer, or of an input."""

    id: str
    type: Literal["message", "reasoning", "function_call", "function_call_output"]
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    role: str | None = None
    content: list[ResponsePart] | None = None
    summary: list[ResponsePart] | None = None
    encrypted_content: str | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[ResponsePart] | None = None


class InputTokensDetails(msgspec.Struct):
    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(msgspec.Struct):
    reasoning_tokens: int


class ResponseUsage(msgspec.Struct):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseFailure(msgspec.Struct):
    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
    message: str


class IncompleteDetails(msgspec.Struct):
    reason: Literal["max_output_tokens", "stop"]


class ResponseReply(msgspec.Struct, omit_defaults=True):
    """A response."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete", "failed", "cancelled", "in_progress", "queued"]
    completed_at: int | None
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[ResponseItem]
    usage: ResponseUsage | None
    background: bool
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: dict[str, Any]
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: bool
    temperature: float | None
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float | None
    truncation: Literal["auto", "disabled"]
    user: str | None
    metrics: dict[str, Any] | None = None


class ResponseEvent(msgspec.Struct, omit_defaults=True):
    """The data of one event, whose name is its type: response.created, .queued, .in_progress, .completed, .incomplete and .failed (response),
    response.output_item.added and .done (output_index, item), response.content_part.added and .done (part), response.output_text.delta and .done,
    response.reasoning_text.delta and .done, response.function_call_arguments.delta and .done, error (code, message, param)."""

    type: str
    sequence_number: int
    response: ResponseReply | None = None
    item: ResponseItem | None = None
    part: ResponsePart | None = None
    item_id: str | None = None
    output_index: int | None = None
    content_index: int | None = None
    delta: str | None = None
    text: str | None = None
    name: str | None = None
    arguments: str | None = None
    logprobs: list[Any] | None = None
    obfuscation: str | None = None
    code: str | None = None
    message: str | None = None
    param: str | None = None


class ResponseItems(msgspec.Struct):
    """A page of a response's input."""

    object: Literal["list"]
    data: list[ResponseItem]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ResponseGone(msgspec.Struct):
    id: str
    object: Literal["response"]
    deleted: bool


class InputTokensReply(msgspec.Struct):
    object: Literal["response.input_tokens"]
    input_tokens: int
