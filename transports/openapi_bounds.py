"""How large and how long the fields of requests may be, for the OpenAPI document.

What it is: `bounded`, which gives the schemas of requests their bounds: those that a field's line names (fields.py), with the options' values, and
those of texts and lists that stand here. A body that the document allows is not refused for one of these.
What it does not know: who obeys the bounds (tests hold them against the server), what fields mean together.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from penstock.core.actors.text.stops import MAX_STOP_CHARS
from penstock.core.protocol.config import OPTIONS, Config
from penstock.core.protocol.sampling import INT_LIMIT
from penstock.transports.fields import about

_RANGE = re.compile(r"(-1, or from )?(above )?(\S+) to (\S+)")
_MOST = re.compile(r"at most (\S+) \w+")
_POWER = re.compile(r"(-?)2\^(\d+)(-1)?")

TOKEN = {"minimum": 0, "maximum": INT_LIMIT - 1}
NOT_EMPTY = {"minLength": 1}
STOP = {"minLength": 1, "maxLength": MAX_STOP_CHARS}

HERE: dict[str, dict[str, Any]] = {
    "messages": {"minItems": 1},
    "tokens": {"items": TOKEN},
    "token_ids": {"minItems": 1, "items": TOKEN},
    "stop": {**STOP, "items": STOP},
    "stop_sequences": {"items": STOP},
    "stop_token_ids": {"items": TOKEN},
    "allowed_token_ids": {"minItems": 1, "items": TOKEN},
    "bad_words": {"items": {"pattern": r"\S"}},
    "logit_bias": {"propertyNames": {"pattern": r"^[0-9]{1,9}$"}},
    "guided_choice": {"minItems": 1},
    "choice": {"minItems": 1},
    "inputs": NOT_EMPTY,
}
"""Of fields of every request that has them."""

OWN: dict[tuple[str, str], dict[str, Any]] = {
    ("CompletionRequest", "prompt"): {
        **NOT_EMPTY,
        "minItems": 1,
        "items": {**NOT_EMPTY, **TOKEN, "minItems": 1, "items": TOKEN},
    },
    ("CompletionRequest", "max_tokens"): {"minimum": 0},
    ("ContentPart", "type"): {"enum": ["text", "input_text", "output_text", "refusal"]},
    ("ResponseFormat", "type"): {"enum": ["text", "json_object", "json_schema"]},
}
"""Of a field of one request, over what is said of it elsewhere."""

WHOLE: dict[str, dict[str, Any]] = {
    "TokenizeRequest": {
        "oneOf": [
            {"required": ["prompt"], "properties": {"prompt": {"type": "string"}}},
            {"required": ["messages"], "properties": {"messages": {"type": "array"}}},
        ]
    },
    "CompletionRequest": {
        "if": {"required": ["max_tokens"], "properties": {"max_tokens": {"const": 0}}},
        "then": {"required": ["echo"], "properties": {"echo": {"const": True}}},
    },
    "ChatMessage": {
        "if": {"properties": {"role": {"enum": ["assistant", "function"]}}},
        "else": {"required": ["content"], "properties": {"content": {"type": ["string", "array"]}}},
    },
    "ContentPart": {
        "if": {"properties": {"type": {"const": "refusal"}}},
        "then": {"required": ["refusal"], "properties": {"refusal": {"type": "string"}}},
        "else": {"required": ["text"], "properties": {"text": {"type": "string"}}},
    },
    "CountTokensRequest": {"additionalProperties": False},
    "MessagesRequest": {"additionalProperties": False},
}
"""Of requests: what has to be there."""


def bounded(components: dict[str, Any], kinds: Collection[str], config: Config) -> None:
    """`components` are schemas by the names of their structs, `kinds` those of requests."""
    for kind in kinds & components.keys():
        component = components[kind]
        for name, schema in component.get("properties", {}).items():
            bounds = _said(about(kind, name).allowed, config) | HERE.get(name, {}) | OWN.get((kind, name), {})
            if "$ref" not in schema:
                # Beside `anyOf`: a keyword says nothing of values that are of another type, null among them.
                component["properties"][name] = _merged(schema, bounds)
        component |= WHOLE.get(kind, {})


def _merged(schema: dict[str, Any], bounds: dict[str, Any]) -> dict[str, Any]:
    """`schema` and its bounds. The entries of a plain list have a schema already."""
    merged = {**schema, **bounds}
    if "items" in schema and "items" in bounds:
        merged["items"] = {**schema["items"], **bounds["items"]}
    return merged


def _said(allowed: str, config: Config) -> dict[str, Any]:
    """What a field's line allows, as a schema's keywords."""
    if (found := _RANGE.fullmatch(allowed)) is not None:
        low, high = number(found[3], config), number(found[4], config)
        if found[1]:
            return {"minimum": -1, "maximum": high, "not": {"const": 0}}
        return {"exclusiveMinimum" if found[2] else "minimum": low, "maximum": high}
    if (found := _MOST.fullmatch(allowed)) is not None:
        return {"maxItems": number(found[1], config)}
    return {}


def number(text: str, config: Config) -> float | int:
    """As the lines write it: 0.01, -2^31, 2^31-1, or an option's name, whose value it is."""
    if text.startswith("--"):
        return int(getattr(config, OPTIONS[text[2:].replace("-", "_")].name))
    power = _POWER.fullmatch(text)
    if power:
        return (-1 if power[1] else 1) * int(2 ** int(power[2])) - bool(power[3])
    return float(text) if "." in text else int(text)
