"""The structs of TGI's request bodies (Hugging Face's Text Generation Inference).

What it is: /generate, /generate_stream and / as msgspec structs, and `decode_generate`. TGI ignores fields that it does not know; here those that ask for
something, in the request or within `parameters`, are refused by name: fields of OpenAI's API and of other servers, and TGI's own in the wrong place.
What it does not know: what the fields mean together (tgi.py), replies, HTTP.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from penstock.core.actors.text.bounds import check_fields
from penstock.core.protocol.messages import Limits
from penstock.transports.openai_schema import HINTS, ChatRequest, CompletionRequest, declare, decode, fields_of
from penstock.transports.refused import FAMILIES, GENERATION, Refused, Table, check


class GenerateParameters(msgspec.Struct, frozen=True, kw_only=True):
    """null means "not given"."""

    max_new_tokens: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: list[str] | None = None
    truncate: int | None = None
    return_full_text: bool | None = None
    details: bool | None = None
    decoder_input_details: bool | None = None
    best_of: int | None = None
    top_n_tokens: int | None = None
    grammar: Any = None
    stream_smoothing_ms: float | None = None
    # Refused where they ask for something
    typical_p: float | None = None
    watermark: bool | None = None
    adapter_id: str | None = None


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /generate and /generate_stream."""

    inputs: str
    parameters: GenerateParameters | None = None


class RootRequest(GenerateRequest, frozen=True, kw_only=True):
    """POST /, which is either."""

    stream: bool | None = None


TGI_REQUESTS: tuple[type[GenerateRequest], ...] = (GenerateRequest, RootRequest)

OF_OTHERS: dict[str, Refused] = {
    **{name: Refused((None,)) for kind in (ChatRequest, CompletionRequest) for name in kind.__struct_fields__ if name not in HINTS},
    **{name: Refused(entry.neutral) for name, entry in GENERATION.items()},
}
"""What no request or its parameters may hold, unless it is a field there. What would do instead has another name there, so nothing is said."""

_MISPLACED: dict[str, Refused] = {
    **OF_OTHERS,
    **{name: Refused((None,), "Give it within parameters.") for name in GenerateParameters.__struct_fields__},
}
declare(GenerateRequest, {**_MISPLACED, "stream": Refused((None, False), "Use /generate_stream.")}, FAMILIES)
declare(RootRequest, _MISPLACED, FAMILIES)
_parameters = Table(OF_OTHERS, GenerateParameters.__struct_fields__, FAMILIES)

Kind = TypeVar("Kind", bound=GenerateRequest)


def decode_generate(body: bytes, kind: type[Kind], limits: Limits | None) -> tuple[Kind, list[str]]:
    """The request, and the names of fields that nobody understands and that ask for nothing known. Raises InvalidRequest or UnsupportedFeature naming the
    field; RequestTooLarge."""
    request, raw, unknown = decode(body, kind, limits)
    assert isinstance(request, kind)
    if request.parameters is not None:
        given = fields_of(raw["parameters"], "parameters")
        check_fields(len(given), "parameters")
        strange = given.keys() - set(GenerateParameters.__struct_fields__)
        unknown += sorted(
            f"parameters.{name}" for name in strange if not check(_parameters, name, given[name], "parameters.") and name not in HINTS
        )
    return request, unknown
