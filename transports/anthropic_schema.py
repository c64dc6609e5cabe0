"""The structs of Anthropic's request bodies.

What it is: /v1/messages and /v1/messages/count_tokens as msgspec structs, and `decode_strictly`: as Anthropic's own API does, it refuses every field that
it does not know, so that nothing is left out of an answer in silence; `values_of` and `text_of` do so within blocks, tools and other objects.
What it does not know: what the fields mean (anthropic_turns.py, anthropic_options.py), replies, HTTP.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import msgspec

from penstock.core.actors.text.bounds import TRANSLATED_FIELDS
from penstock.core.protocol.errors import InvalidRequest
from penstock.core.protocol.messages import Limits
from penstock.transports.openai_schema import declare, decode
from penstock.transports.refused import Refused


class InputMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One turn. Content blocks are objects, looked at one by one (anthropic_turns.py), so that errors can name them."""

    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


class CountTokensRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/messages/count_tokens. null means "not given"."""

    model: str
    messages: list[InputMessage]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    output_format: dict[str, Any] | None = None
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
    # Penstock's own
    stream_smoothing_ms: float | None = None


ANTHROPIC_REQUESTS: tuple[type[CountTokensRequest], ...] = (MessagesRequest, CountTokensRequest)

NOT_YET: dict[str, Refused] = {
    "mcp_servers": Refused((None, []), "No tools run on this server: leave it out."),
    "container": Refused((None,), "No tools run on this server: leave it out."),
    "context_management": Refused(
        (None, {}, {"edits": []}, *({"edits": [{"type": "clear_thinking_20251015", "keep": every}]} for every in ("all", {"type": "all"}))),
        "Nothing is edited out of a conversation here: leave it out.",
    ),
    "compaction": Refused((None,)),
    "thread": Refused((None,), "No conversation is kept here: leave it out, and send all messages."),
    "fallbacks": Refused((None, [])),
    "fallback_credit_token": Refused((None,)),
    "billing_policy": Refused((None,)),
    "diagnostics": Refused((None, {})),
    "user_profile_id": Refused((None,)),
    "workspace_id": Refused((None,)),
    "speed": Refused((None, "standard")),
    "inference_geo": Refused((None,)),
}
"""Fields of Anthropic's that ask for what does not exist here, with the values that ask for nothing."""

for _kind in ANTHROPIC_REQUESTS:
    declare(_kind, NOT_YET)

Kind = TypeVar("Kind", bound=CountTokensRequest)


def decode_strictly(body: bytes, kind: type[Kind], limits: Limits | None) -> Kind:
    """Raises InvalidRequest or UnsupportedFeature naming the field; RequestTooLarge."""
    request, _, unknown = decode(body, kind, limits, TRANSLATED_FIELDS)  # of the client's own, before anything is made of them
    refuse_unknown(unknown)
    assert isinstance(request, kind)
    return request


def refuse_unknown(names: list[str]) -> None:
    """Of fields: raises InvalidRequest naming the first."""
    if names:
        raise InvalidRequest(f"{names[0][:80]} is not a field of this endpoint. Leave it out.", param=names[0][:80])


def values_of(given: dict[str, Any], where: str, *known: str, kind: str, typed: bool = True) -> None:
    """Look at an object's fields: only `known` ones (and its type, if `typed`), `cache_control` an object. Raises InvalidRequest naming the other."""
    for name in given:
        if name not in known and not (typed and name == "type"):
            raise InvalidRequest(f"{where}.{name[:80]} is not a field of {kind}. Leave it out.", param=f"{where}.{name[:80]}")
    check_cache(given.get("cache_control"), f"{where}.cache_control")


TTLS = ("5m", "1h")


def check_cache(given: Any, where: str) -> None:
    """A `cache_control`, which has no effect. Raises InvalidRequest."""
    if given is None:
        return
    if not isinstance(given, dict):
        raise InvalidRequest(f"{where} must be an object.", param=where)
    if given.get("type") != "ephemeral":
        raise InvalidRequest(f"{where}.type must be 'ephemeral'.", param=f"{where}.type")
    if given.get("ttl") not in (None, *TTLS):
        raise InvalidRequest(f"{where}.ttl must be {' or '.join(map(repr, TTLS))}.", param=f"{where}.ttl")
    for name in given:
        if name not in ("type", "ttl"):
            raise InvalidRequest(f"{where}.{name[:80]} is not a field of cache_control. Leave it out.", param=f"{where}.{name[:80]}")


def text_of(given: dict[str, Any], where: str, name: str, *, empty: bool = False) -> str:
    """A field that must be there. Raises InvalidRequest."""
    text = given.get(name)
    if not isinstance(text, str) or not (text or empty):
        raise InvalidRequest(f"{where}.{name} must be a text{'' if empty else ', and not an empty one'}.", param=f"{where}.{name}")
    return text
