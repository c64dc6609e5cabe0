"""What the replies of the routes about kept things look like, for the OpenAPI document.

What it is: msgspec structs of what is kept: chat completions, files, batches, and lists of them.
What it does not know: how they are made (stored_chats.py, files.py, batches.py).
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from penstock.transports.storage_schema import Batch, FileObject


class StoredChat(msgspec.Struct, omit_defaults=True):
    """A chat completion that is kept: the reply as it was, and what was asked."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: dict[str, Any]
    request_id: str
    metadata: dict[str, str]
    system_fingerprint: str | None = None
    prompt_logprobs: list[Any] | None = None
    prompt_token_ids: list[int] | None = None
    metrics: dict[str, Any] | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None


class StoredChatList(msgspec.Struct):
    object: Literal["list"]
    data: list[StoredChat]
    first_id: str | None
    last_id: str | None
    has_more: bool


class StoredMessage(msgspec.Struct, omit_defaults=True):
    """A message of the request."""

    id: str
    role: str
    content: str | None
    content_parts: list[dict[str, Any]] | None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class StoredMessageList(msgspec.Struct):
    object: Literal["list"]
    data: list[StoredMessage]
    first_id: str | None
    last_id: str | None
    has_more: bool


class StoredChatGone(msgspec.Struct):
    object: Literal["chat.completion.deleted"]
    id: str
    deleted: bool


class FileList(msgspec.Struct):
    object: Literal["list"]
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileGone(msgspec.Struct):
    id: str
    object: Literal["file"]
    deleted: bool


class BatchList(msgspec.Struct):
    object: Literal["list"]
    data: list[Batch]
    first_id: str | None
    last_id: str | None
    has_more: bool
