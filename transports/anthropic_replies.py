"""What the replies of Anthropic's API look like, for the OpenAPI document.

What it is: msgspec structs of the reply bodies, as openapi_replies.py has them of the others; tests hold real replies against them.
What it does not know: how replies are made (anthropic_voice.py), which endpoint gives which.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class MessageBlock(msgspec.Struct, omit_defaults=True):
    """A block of the answer: text (text), thinking (thinking, signature) or tool_use (id, name, input)."""

    type: Literal["text", "thinking", "tool_use"]
    text: str | None = None
    thinking: str | None = None
    signature: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None


class MessageTokenDetails(msgspec.Struct):
    thinking_tokens: int


class MessageUsage(msgspec.Struct, omit_defaults=True):
    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: MessageTokenDetails | None = None


class MessageReply(msgspec.Struct, omit_defaults=True):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[MessageBlock]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None
    stop_sequence: str | None
    usage: MessageUsage
    metrics: dict[str, Any] | None = None


class MessageEvent(msgspec.Struct, omit_defaults=True):
    """The data of one event, whose name is its type: message_start (message), content_block_start (index, content_block), content_block_delta and
    content_block_stop (index), message_delta (delta, usage), message_stop, ping, error (error)."""

    type: str
    message: MessageReply | None = None
    index: int | None = None
    content_block: MessageBlock | None = None
    delta: dict[str, Any] | None = None
    usage: MessageUsage | None = None
    error: MessageErrorFields | None = None
    metrics: dict[str, Any] | None = None


class MessageErrorFields(msgspec.Struct, omit_defaults=True):
    type: str
    message: str
    details: dict[str, Any] | None = None


class MessageError(msgspec.Struct):
    """Anthropic's error shape."""

    type: Literal["error"]
    error: MessageErrorFields
    request_id: str | None = None


class CountTokensReply(msgspec.Struct):
    input_tokens: int


class MessageModel(msgspec.Struct):
    type: Literal["model"]
    id: str
    display_name: str
    created_at: str
    lifecycle: Literal["active"]
    max_input_tokens: int | None
    max_tokens: int | None


class MessageModelList(msgspec.Struct):
    data: list[MessageModel]
    has_more: bool
    first_id: str | None
    last_id: str | None


class MessageBatchCounts(msgspec.Struct):
    processing: int
    succeeded: int
    errored: int
    canceled: int
    expired: int


class MessageBatch(msgspec.Struct):
    id: str
    type: Literal["message_batch"]
    processing_status: Literal["in_progress", "canceling", "ended"]
    request_counts: MessageBatchCounts
    ended_at: str | None
    created_at: str
    expires_at: str
    archived_at: str | None
    cancel_initiated_at: str | None
    results_url: str | None


class MessageBatchList(msgspec.Struct):
    data: list[MessageBatch]
    has_more: bool
    first_id: str | None
    last_id: str | None


class MessageBatchGone(msgspec.Struct):
    id: str
    type: Literal["message_batch_deleted"]
