"""The structs of the request of tokens in, tokens out, with vLLM's names.

What it is: /inference/v1/generate as msgspec structs, and `decode_tokens`, which looks at `sampling_params` as `decode` does at a request: fields that ask for
what does not exist here are refused by name, others that nobody knows are named in a header.
What it does not know: what the fields mean together (tokens.py), replies, HTTP.
"""

from __future__ import annotations

from typing import Any

import msgspec

from penstock.core.actors.text.bounds import check_fields
from penstock.core.protocol.messages import Limits
from penstock.transports.openai_schema import (
    HINTS,
    ChatRequest,
    CompletionRequest,
    LogitBias,
    StreamOptions,
    StructuredOutputs,
    check_options,
    declare,
    decode,
    fields_of,
)
from penstock.transports.refused import FAMILIES, GENERATION, Refused, Table, check

SAMPLING = "sampling_params"
WITHIN = f"Give it within {SAMPLING}."


class TokensSampling(msgspec.Struct, frozen=True, kw_only=True):
    """null means "not given"."""

    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: LogitBias | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    structured_outputs: StructuredOutputs | None = None
    # Of texts, of which there are none here
    stop: str | list[str] | None = None
    detokenize: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    # vLLM's own business
    output_kind: int | None = None


class TokensRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /inference/v1/generate."""

    token_ids: list[int]
    sampling_params: TokensSampling | None = None
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: str | None = None
    priority: int | None = None
    stream_smoothing_ms: float | None = None
    spec_decode: bool | str | None = None
    request_id: str | None = None
    # Refused where they ask for something
    features: Any = None
    kv_transfer_params: Any = None


IDLE: dict[str, str] = {
    "detokenize": "No text is made in any case.",
    "skip_special_tokens": "No text is made.",
    "spaces_between_special_tokens": "No text is made.",
    "include_stop_str_in_output": "The token that ended the answer is always the last of token_ids.",
    "output_kind": "stream says it.",
}
"""Fields of sampling_params that change nothing: why."""

_OF_OTHERS: dict[str, Refused] = {
    **{name: Refused((None,)) for kind in (ChatRequest, CompletionRequest) for name in kind.__struct_fields__ if name not in HINTS},
    **{name: Refused(entry.neutral) for name, entry in GENERATION.items()},
}
"""What neither the request nor its sampling_params may hold, unless it is a field there. What would do instead has another name there, so nothing is said."""
OF_RENDERING = ("token_offsets", "assistant_tokens_mask")
"""What vLLM's rendering adds to such a request for its readers: nothing of an answer depends on it, and it may be as long as the prompt."""

declare(
    TokensRequest,
    {
        **_OF_OTHERS,
        "text": Refused((None, ""), "Give token_ids."),
        **dict.fromkeys(("prompt", "messages", "input_ids", "prompt_token_ids"), Refused((None, [], ""), "Give token_ids.")),
        **{name: Refused((None,), WITHIN) for name in TokensSampling.__struct_fields__},
    },
    FAMILIES,
)
_sampling = Table(_OF_OTHERS, TokensSampling.__struct_fields__, FAMILIES)


def decode_tokens(body: bytes, limits: Limits | None) -> tuple[TokensRequest, dict[str, msgspec.Raw], list[str]]:
    """The request, the raw fields of its sampling_params, and the names of fields that nobody understands. Raises InvalidRequest or UnsupportedFeature naming
    the field; RequestTooLarge."""
    request, raw, unknown = decode(body, TokensRequest, limits)
    assert isinstance(request, TokensRequest)
    unknown = [name for name in unknown if name not in OF_RENDERING]
    if request.stream_options is not None:
        unknown += check_options(raw["stream_options"])
    if request.sampling_params is None:
        return request, {}, unknown
    given = fields_of(raw[SAMPLING], SAMPLING)
    check_fields(len(given), SAMPLING)
    strange = given.keys() - set(TokensSampling.__struct_fields__)
    unknown += sorted(
        f"{SAMPLING}.{name}" for name in strange if not check(_sampling, name, given[name], f"{SAMPLING}.") and name not in HINTS
    )
    return request, given, unknown
