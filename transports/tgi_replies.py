"""What the replies of TGI's API look like, for the OpenAPI document.

What it is: msgspec structs of the reply bodies, as openapi_replies.py has them of the others; tests hold real replies against them.
What it does not know: how replies are made (tgi_voice.py), which endpoint gives which.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class PrefillToken(msgspec.Struct):
    id: int
    text: str
    logprob: float | None


class GeneratedToken(msgspec.Struct):
    id: int
    text: str
    logprob: float | None
    special: bool


class BestOfSequence(msgspec.Struct, omit_defaults=True, kw_only=True):
    generated_text: str
    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[GeneratedToken]
    top_tokens: list[list[GeneratedToken]] | None = None


class GenerateDetails(msgspec.Struct, omit_defaults=True):
    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[GeneratedToken]
    top_tokens: list[list[GeneratedToken]] | None = None
    best_of_sequences: list[BestOfSequence] | None = None


class GenerateReply(msgspec.Struct, omit_defaults=True):
    generated_text: str
    details: GenerateDetails | None = None
    metrics: dict[str, Any] | None = None


class GenerateStreamDetails(msgspec.Struct):
    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    generated_tokens: int
    input_length: int
    seed: int | None


class GenerateEvent(msgspec.Struct, omit_defaults=True):
    """The data of one event: one token. That of a failed stream is a GenerateError."""

    index: int
    token: GeneratedToken
    generated_text: str | None
    details: GenerateStreamDetails | None
    top_tokens: list[GeneratedToken] | None = None


class GenerateError(msgspec.Struct):
    """TGI's error shape."""

    error: str
    error_type: str


class InfoReply(msgspec.Struct):
    model_id: str
    model_dtype: str | None
    model_device_type: str | None
    model_pipeline_tag: Literal["text-generation"]
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int | None
    max_total_tokens: int | None
    router: Literal["penstock"]
    version: str
