"""Unknown fields within the objects of a request of OpenAI's Responses API.

What it is: `unknown_within`, their paths (`reasoning.depth`), as openai_nested.py has those of chat; what would change the answer is refused by name.
What it does not know: unknown fields of the request itself (openai_schema.py), of items, tools and choices (responses_items.py), what becomes of the names.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from penstock.core.protocol.errors import UnsupportedFeature
from penstock.transports import refused
from penstock.transports.openai_schema import fields_of
from penstock.transports.refused import Refused, Table
from penstock.transports.responses_schema import InputTokensRequest, ReasoningOptions, ResponseStreamOptions, TextFormat, TextOptions

FORMATS = ("text", "json_object", "json_schema")
"""Types of text.format."""

_OFF = Refused((None, False))
_ROWS: dict[type[msgspec.Struct], dict[str, Refused]] = {
    ReasoningOptions: {"context": Refused((None, "auto")), "mode": Refused((None, "standard"))},
    ResponseStreamOptions: {
        "include_usage": Refused((None, True, False)),  # the last event has it in any case
        "continuous_usage_stats": _OFF,
        "tool_calls_done": _OFF,
        "events": Refused((None, [])),
    },
}
_OBJECTS: dict[str, type[msgspec.Struct]] = {"reasoning": ReasoningOptions, "text": TextOptions, "stream_options": ResponseStreamOptions}
_TABLES = {name: Table(_ROWS.get(kind, {}), kind.__struct_fields__) for name, kind in _OBJECTS.items()}
_FORMAT = Table(
    {"json_schema": Refused((None, {}), "What chat has within it stands beside type here: schema, name, strict.")},
    TextFormat.__struct_encode_fields__,
)


def unknown_within(request: InputTokensRequest, raw: Mapping[str, msgspec.Raw]) -> list[str]:
    """Of a request that was understood. Raises UnsupportedFeature."""
    out: list[str] = []
    for name, table in _TABLES.items():
        if getattr(request, name, None) is None:
            continue
        given = fields_of(raw[name], name)
        unknown = given.keys() - set(_OBJECTS[name].__struct_fields__)
        out += [f"{name}.{inner}"[:200] for inner in sorted(unknown) if not refused.check(table, inner, given[inner], f"{name}.")]
        if name == "text" and request.text is not None and request.text.format is not None:
            out += _within_format(request.text.format.type, given["format"])
    return out


def _within_format(kind: str, raw: msgspec.Raw) -> list[str]:
    """As chat has it: what is no schema has nothing beside its type."""
    given = fields_of(raw, "text.format")
    if kind not in FORMATS:
        raise _unsupported(f"type {kind[:80]!r}")
    unknown: list[str] = []
    for name in sorted(given.keys() - {"type"}):
        if kind != "json_schema":
            if not refused.neutral(given[name]):
                raise _unsupported(f"type {kind!r} with {name[:80]!r}")
        elif name not in TextFormat.__struct_encode_fields__ and not refused.check(_FORMAT, name, given[name], "text.format."):
            unknown.append(f"text.format.{name}"[:200])
    return unknown


def _unsupported(what: str) -> UnsupportedFeature:
    return UnsupportedFeature(f"text.format of {what} is not supported. Its types here are {', '.join(FORMATS)}.", param="text.format")
