"""/v1/models for Anthropic's clients.

What it is: OpenAI and Anthropic list models at one path. `speaks_anthropic` tells who asks: Anthropic's clients send anthropic-version. `models_page` and
`model_json` are the replies for them.
What it does not know: which models there are, routes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from penstock.core.protocol.errors import InvalidRequest

MOST = 1000
"""Of models on a page."""


def speaks_anthropic(headers: Mapping[bytes, bytes]) -> bool:
    return b"anthropic-version" in headers


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


def models_page(entries: Sequence[Mapping[str, Any]], asked: Mapping[str, Any]) -> dict[str, Any]:
    """The page that the query parameters ask for. Raises InvalidRequest naming one."""
    limit = str(asked.get("limit", 20))
    if not limit.isascii() or not limit.isdecimal() or not 1 <= len(limit) <= 4 or not 1 <= int(limit) <= MOST:
        raise InvalidRequest(f"limit must be a number from 1 to {MOST}.", param="limit")
    names = [entry["id"] for entry in entries]
    start, end = 0, len(names)
    for param in ("after_id", "before_id"):
        if (name := asked.get(param)) is None:
            continue
        if name not in names:
            raise InvalidRequest(f"{param} is no model here.", param=param)
        start, end = (names.index(name) + 1, end) if param == "after_id" else (start, names.index(name))
    if asked.get("before_id") is not None and asked.get("after_id") is None:
        cut = max(start, end - int(limit))
        data, more = entries[cut:end], cut > start
    else:
        cut = min(end, start + int(limit))
        data, more = entries[start:cut], cut < end
    shown = [model_json(entry) for entry in data]
    return {"data": shown, "has_more": more, "first_id": shown[0]["id"] if shown else None, "last_id": shown[-1]["id"] if shown else None}
