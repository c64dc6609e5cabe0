"""The structs of the request bodies of OpenAI's Responses API.

What it is: /v1/responses and /v1/responses/input_tokens as msgspec structs, with the further fields that vLLM takes there, and the fields that are refused by
name.
What it does not know: what the fields mean (responses.py), items (responses_items.py), replies, HTTP.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from penstock.transports import refused
from penstock.transports.openai_schema import ChatRequest, CompletionRequest, LogitBias, declare
from penstock.transports.refused import Refused


class ReasoningOptions(msgspec.Struct, frozen=True):
    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class TextFormat(msgspec.Struct, frozen=True):
    type: str
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = msgspec.field(default=None, name="schema")
    strict: bool | None = None


class TextOptions(msgspec.Struct, frozen=True):
    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ResponseStreamOptions(msgspec.Struct, frozen=True):
    include_obfuscation: bool | None = None


class InputTokensRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/responses/input_tokens. null means "not given". Items and tools are objects, looked at one by one (responses_items.py), so that errors can name
    them."""

    model: str | None = None
    input: str | list[dict[str, Any]] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    reasoning: ReasoningOptions | None = None
    text: TextOptions | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class ResponsesRequest(InputTokensRequest, frozen=True, kw_only=True):
    """POST /v1/responses."""

    background: bool | None = None
    include: list[str] | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    metadata: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    temperature: float | None = None
    top_logprobs: int | None = None
    top_p: float | None = None
    user: str | None = None
    # vLLM's extras, which mean what they mean on chat
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: LogitBias | None = None
    top_k: int | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    priority: int | None = None
    cache_salt: str | None = None
    retain_s: float | None = None
    on_disconnect: str | None = None
    stream_interval: int | None = None
    stream_smoothing_ms: float | None = None
    spec_decode: bool | str | None = None
    request_id: str | None = None


RESPONSES_REQUESTS: tuple[type[InputTokensRequest], ...] = (ResponsesRequest, InputTokensRequest)

LIKE_CHAT = (
    "temperature",
    "top_p",
    "parallel_tool_calls",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "logit_bias",
    "top_k",
    "min_p",
    "min_tokens",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
    "priority",
    "cache_salt",
    "retain_s",
    "on_disconnect",
    "stream_interval",
    "stream_smoothing_ms",
    "spec_decode",
    "request_id",
)
"""Fields that chat has under the same name and with the same meaning."""

_NONE = Refused((None,))
_OUTPUT = Refused((None,), "Use max_output_tokens.")

PROMPT: dict[str, Refused] = {
    "conversation": Refused((None,), "Use previous_response_id, or send the items."),
    "prompt": Refused((None,), "Send its text as instructions or input."),
    "context_management": Refused((None, [])),
    "image": _NONE,
    "personality": _NONE,
    "messages": Refused((None, []), "Use input, or /v1/chat/completions."),
    "reasoning_effort": Refused((None,), "Use reasoning.effort."),
}
ANSWER: dict[str, Refused] = {
    "moderation": _NONE,
    "access_programs": _NONE,
    "background_options": _NONE,
    "modalities": Refused((None, ["text"])),
    "n": Refused((None, 1)),
    "logprobs": Refused((None, False), "Use include with message.output_text.logprobs."),
    "max_tokens": _OUTPUT,
    "max_completion_tokens": _OUTPUT,
    "response_format": Refused((None, {}), "Use text.format."),
    "verbosity": Refused((None, "medium"), "Use text.verbosity."),
}
"""Fields that ask for what does not exist here, or that have another name here, besides those that chat refuses: what the model reads, and what becomes of
it."""

_OTHERS: dict[str, Refused] = {
    name: Refused((None, False, [], {}, ""), "It is a field of /v1/chat/completions.")
    for name in (*ChatRequest.__struct_fields__, *CompletionRequest.__struct_fields__)
    if name not in ResponsesRequest.__struct_fields__
}
"""What chat knows and this API does not would change the answer here, too."""

REFUSED: dict[type[InputTokensRequest], dict[str, Refused]] = {
    ResponsesRequest: _OTHERS | refused.APART | PROMPT | ANSWER,
    InputTokensRequest: refused.PROMPT | PROMPT,
}

declare(ResponsesRequest, REFUSED[ResponsesRequest], refused.FAMILIES)
declare(InputTokensRequest, REFUSED[InputTokensRequest])
