"""/v1/models for Anthropic's clients.

What it is: OpenAI and Anthropic list models at one path. `speaks_anthropic` tells who asks: Anthropic's clients send anthropic-version. `read_query` is what the
query asks for, read strictly, `models_page` and `model_json` are the replies for them.
What it does not know: which models there are, routes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, get_args
from urllib.parse import parse_qsl

import msgspec

from penstock.core.protocol.errors import InvalidRequest
from penstock.transports.anthropic_voice import MessagesVoice
from penstock.transports.listing import LONGEST
from penstock.transports.request import Scope

MOST = 1000
"""Of models on a page."""
HEADER = b"anthropic-version"
ANTHROPICS = {HEADER: MessagesVoice}
"""For VOICES of routes that both APIs have."""
Stage = Literal["active", "deprecated", "retired"]
STAGES: tuple[Stage, ...] = get_args(Stage)
"""Stages of a model's life. All that are served are active."""

_ONLY = " Only with the header anthropic-version."
QUERY: dict[str, dict[str, Any]] = {
    "limit": {"type": "integer", "minimum": 1, "maximum": MOST, "default": 20, "description": f"Most that come.{_ONLY}"},
    "after_id": {"type": "string", "description": f"Those behind this model.{_ONLY}"},
    "before_id": {"type": "string", "description": f"Those before this model.{_ONLY}"},
    "lifecycle": {
        "type": "array",
        "items": {"enum": [*STAGES]},
        "description": f"Stages (`lifecycle[]`, too): those alone. All models here are active.{_ONLY}",
    },
}


def speaks_anthropic(headers: Mapping[bytes, bytes]) -> bool:
    return HEADER in headers


class ModelsQuery(msgspec.Struct, frozen=True, kw_only=True):
    limit: int = 20
    after_id: str | None = None
    before_id: str | None = None
    lifecycle: tuple[str, ...] = STAGES


def read_query(scope: Scope, *, anthropic: bool) -> ModelsQuery:
    """Raises InvalidRequest naming the field."""
    found: dict[str, Any] = {}
    text = scope["query_string"].decode("latin-1")
    if len(text) > LONGEST:
        raise InvalidRequest(f"The query has more than {LONGEST} characters.")
    for given, value in parse_qsl(text, keep_blank_values=True):
        name = given.removesuffix("[]") if given == "lifecycle[]" else given
        if name not in QUERY or not anthropic:
            known = f"The query may have {', '.join(QUERY)}." if anthropic else "/v1/models takes no query but from Anthropic's clients."
            raise InvalidRequest(f"{given[:100]!r} is not known here. {known}", param=given[:100])
        if name == "lifecycle":
            if value not in STAGES:
                raise InvalidRequest(f"lifecycle must be of {', '.join(STAGES)}, but is {value[:40]!r}.", param=name)
            found[name] = (*found.get(name, ()), value)
            continue
        if name in found:
            raise InvalidRequest(f"{name} is given more than once.", param=name)
        found[name] = value
    if "limit" in found:
        limit = found["limit"]
        if not limit.isascii() or not limit.isdecimal() or not 1 <= len(limit) <= 4 or not 1 <= int(limit) <= MOST:
            raise InvalidRequest(f"limit must be a number from 1 to {MOST}.", param="limit")
        found["limit"] = int(limit)
    return ModelsQuery(**found)


def model_json(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Of an entry of OpenAI's list. Answer and prompt share the context, so that it bounds each."""
    context = entry.get("max_model_len")
    return {
        "type": "model",
        "id": entry["id"],
        "display_name": entry["id"],
        "created_at": datetime.fromtimestamp(entry["created"], UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "lifecycle": "active",
        "max_input_tokens": context,
        "max_tokens": context,
    }


def models_page(entries: Sequence[Mapping[str, Any]], asked: ModelsQuery) -> dict[str, Any]:
    """The page that is asked for. Raises InvalidRequest naming a field of the query."""
    names = [entry["id"] for entry in entries]
    start, end = 0, len(names)
    for param, name in (("after_id", asked.after_id), ("before_id", asked.before_id)):
        if name is None:
            continue
        if name not in names:
            raise InvalidRequest(f"{param} is no model here.", param=param)
        start, end = (names.index(name) + 1, end) if param == "after_id" else (start, names.index(name))
    if "active" not in asked.lifecycle:
        end = start
    if asked.before_id is not None and asked.after_id is None:
        cut = max(start, end - asked.limit)
        data, more = entries[cut:end], cut > start
    else:
        cut = min(end, start + asked.limit)
        data, more = entries[start:cut], cut < end
    shown = [model_json(entry) for entry in data]
    return {"data": shown, "has_more": more, "first_id": shown[0]["id"] if shown else None, "last_id": shown[-1]["id"] if shown else None}
