"""What the replies of tokens in, tokens out look like, for the OpenAPI document.

What it is: msgspec structs of the reply bodies, as openapi_replies.py has them of the others; tests hold real replies against them.
What it does not know: how replies are made (tokens_voice.py), which endpoint gives which.
"""

from __future__ import annotations

from typing import Any

import msgspec


class TokenLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int] | None


class DrawnLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TokenLogprob]


class TokensLogprobs(msgspec.Struct):
    content: list[DrawnLogprob]


class TokensChoiceError(msgspec.Struct):
    message: str
    type: str
    code: str


class TokensChoice(msgspec.Struct, omit_defaults=True):
    index: int
    token_ids: list[int]
    logprobs: TokensLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None = None
    error: TokensChoiceError | None = None


class TokensUsage(msgspec.Struct, omit_defaults=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]
    completion_tokens_details: dict[str, int] | None = None


class TokensReply(msgspec.Struct, omit_defaults=True):
    request_id: str
    model: str
    system_fingerprint: str | None
    choices: list[TokensChoice]
    usage: TokensUsage
    prompt_logprobs: list[Any] | None = None
    metrics: dict[str, Any] | None = None


class TokensChunk(msgspec.Struct, omit_defaults=True):
    """The data of one event; the last event's data is [DONE], that of a failed stream an ErrorReply."""

    request_id: str
    choices: list[TokensChoice]
    usage: TokensUsage | None = None
    metrics: dict[str, Any] | None = None
