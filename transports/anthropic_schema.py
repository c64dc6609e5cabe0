"""The structs of Anthropic's request bodies.

What it is: /v1/messages and /v1/messages/count_tokens as msgspec structs, and `decode_strictly`: as Anthropic's own API does, it refuses every field that
it does not know, so that nothing is left out of an answer in silence.
What it does not know: what the fields mean (anthropic.py), replies, HTTP.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import msgspec

from penstock.core.protocol.errors import InvalidRequest
from penstock.core.protocol.messages import Limits
from penstock.transports.openai_schema import declare, decode
from penstock.transports.refused import Refused


class InputMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One turn. Content blocks are objects, looked at one by one (anthropic.py), so that errors can name them."""

    role: Literal["user", "assistant"]
    content: str | list[dict[str, Any]]


class CountTokensRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/messages/count_tokens. null means "not given"."""

    model: str
    messages: list[InputMessage]
    system: str | list[dict[str, Any]] | None = None
    cache_control: dict[str, Any] | None = None


class MessagesRequest(CountTokensRequest, frozen=True, kw_only=True):
    """POST /v1/messages."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: dict[str, Any] | None = None
    service_tier: Literal["auto", "standard_only"] | None = None


ANTHROPIC_REQUESTS: tuple[type[CountTokensRequest], ...] = (MessagesRequest, CountTokensRequest)

NOT_YET: dict[str, Refused] = {
    "tools": Refused((None, []), "Calls in the answer are not taken apart yet: leave it out."),
    "tool_choice": Refused((None, {"type": "none"}), "Tools are not supported yet: leave it out."),
    "thinking": Refused((None,), "Thinking is not taken apart from the answer: leave it out."),
    "mcp_servers": Refused((None, []), "No tools run on this server: leave it out."),
    "container": Refused((None,)),
    "context_management": Refused((None,)),
    "output_config": Refused((None,)),
    "output_format": Refused((None,)),
    "speed": Refused((None, "standard")),
    "inference_geo": Refused((None,)),
}
"""Fields of Anthropic's that ask for what does not exist here, with the values that ask for nothing."""

for _kind in ANTHROPIC_REQUESTS:
    declare(_kind, NOT_YET)

Kind = TypeVar("Kind", bound=CountTokensRequest)


def decode_strictly(body: bytes, kind: type[Kind], limits: Limits | None) -> Kind:
    """Raises InvalidRequest or UnsupportedFeature naming the field; RequestTooLarge."""
    request, _, unknown = decode(body, kind, limits)
    if unknown:
        name = unknown[0][:80]
        raise InvalidRequest(f"{name} is not a field of this endpoint. Leave it out.", param=name)
    assert isinstance(request, kind)
    return request
