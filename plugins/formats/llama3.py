"""Calls as bare JSON, as Llama 3 writes them: {"name": ..., "parameters": {...}}, several separated by semicolons, perhaps after <|python_tag|>.

What it is: the spec `llama3_json`.
What it does not know: other formats.
"""

from __future__ import annotations

from typing import Any

from penstock.core.contract.formats import Opening, Spelling
from penstock.core.contract.hookspecs import API_LEVEL, FormatSpec
from penstock.plugins.formats.scanner import State, TableSplitter, probe, read_text, table
from penstock.plugins.formats.schemas import MAX_DEPTH, resolved
from penstock.plugins.formats.values import read_object

TABLE = table(
    start=State(probe, {"<|python_tag|>": "call"}, skip=" \t\r\n", chars={"{": "call"}),
    call=State(read_object, {"<|python_tag|>": "call"}, after="between", bare=True),
    between=State(probe, {"<|python_tag|>": "call"}, skip=" \t\r\n;,", chars={"{": "call"}),
    content=State(read_text, {"<|python_tag|>": "call"}),
)


def matches(template: str) -> bool:
    return "<|python_tag|>" in template or ("<|eot_id|>" in template and '"parameters"' in template)


def _make(opening: Opening) -> TableSplitter:
    return TableSplitter(TABLE, "start", opening.tools)


def told(schema: Any) -> str:
    """See Spelling: an object with a name and arguments is a call."""
    names = _members(schema, schema, 0)
    if names is None:
        return "an object could not be told from a call unless the schema says which members there are (additionalProperties false)"
    called = "name" in names and ("parameters" in names or "arguments" in names)
    return "an object with name and parameters could not be told from a call" if called else ""


def _members(schema: Any, root: Any, depth: int) -> set[str] | None:
    """All members that an object can have; None: any. Nothing else than an object is taken for one."""
    if schema is False:
        return set()
    if not isinstance(schema, dict) or depth > MAX_DEPTH:
        return None
    kind = schema.get("type")
    if kind is not None and "object" not in (kind if isinstance(kind, list) else [kind]):
        return set()
    if "enum" in schema or "const" in schema:
        values = schema["enum"] if isinstance(schema.get("enum"), list) else [schema.get("const")]
        return {name for value in values if isinstance(value, dict) for name in value}
    if schema.get("additionalProperties") is False and "patternProperties" not in schema:
        properties = schema.get("properties", {})
        return set(properties) if isinstance(properties, dict) else None
    ways = [schema[word] for word in ("anyOf", "oneOf") if isinstance(schema.get(word), list)]
    if "$ref" in schema:
        ways.append([resolved(str(schema["$ref"]), root)])
    for way in ways:
        each = [_members(one, root, depth + 1) for one in way]
        if None not in each:
            return set().union(*(one for one in each if one is not None))
    return None


SPELLING = Spelling(
    before='{"name": "', between='", "parameters": ', after="}", separator="; ", hides=["<|python_tag|>"], first="{", told=told
)

LLAMA3_JSON = FormatSpec(
    name="llama3_json",
    api_level=API_LEVEL["output_formats"],
    doc="Bare JSON (Llama 3).",
    role="tools",
    aliases=["llama3", "llama4_json"],
    marks=["<|python_tag|>"],
    matches=matches,
    factory=_make,
    spelling=lambda template: SPELLING,
)
