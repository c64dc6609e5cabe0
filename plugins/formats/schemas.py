"""What a function's schema says of its arguments' types, for formats that write values without quotes.

What it is: `kinds_of`, the JSON types of each argument of each of a request's tools (`kinds_in`: of one schema), and `converted`, a value's text as JSON of these types.
What it does not know: formats, how values stand in an answer.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import msgspec

Kinds = frozenset[str]
"""JSON Schema's names of types; empty: any."""
ANY: Kinds = frozenset()
TEXT: Kinds = frozenset({"string"})
TEXT_OR_NULL: Kinds = frozenset({"string", "null"})
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_NAMES = {
    "str": "string", "text": "string", "int": "integer", "float": "number", "double": "number", "bool": "boolean",
    "dict": "object", "list": "array", "none": "null",
}  # fmt: skip
"""As people write them who think in other languages."""
_KNOWN = frozenset({"string", "integer", "number", "boolean", "object", "array", "null"})
_UNQUOTED = frozenset({"null", "boolean", "object", "array"})
"""What else one of an unknown type may be, as Python has it."""
_FAILURES = (SyntaxError, ValueError, TypeError, RecursionError, MemoryError, OverflowError)
MAX_DEPTH = 8
"""Of schemas within schemas that are looked into."""
MAX_LITERAL = 1 << 16
"""Characters of a value that may be read as Python's."""


@lru_cache(maxsize=32)
def kinds_of(tools: bytes) -> Mapping[str, Mapping[str, Kinds]]:
    """By function and argument. `tools` are the request's, as JSON; whatever is wrong with them says nothing."""
    try:
        given = msgspec.json.decode(tools)
    except (msgspec.DecodeError, RecursionError):
        return {}
    out: dict[str, dict[str, Kinds]] = {}
    for tool in given if isinstance(given, list) else []:
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            continue
        schema = function.get("parameters")
        out[function["name"]] = {key: kinds_in(of, schema, 0) for key, of in _properties(schema).items()}
    return out


class _Named(msgspec.Struct, frozen=True):
    name: str


class _Tool(msgspec.Struct, frozen=True):
    function: _Named


_read_tools = msgspec.json.Decoder(list[_Tool]).decode


@lru_cache(maxsize=32)
def names_of(tools: bytes) -> frozenset[str]:
    """Of the functions of a request's `tools`, as JSON; none where they cannot be read."""
    try:
        return frozenset(tool.function.name for tool in _read_tools(tools))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return frozenset()


def _properties(schema: Any) -> dict[str, Any]:
    found = schema.get("properties") if isinstance(schema, dict) else None
    return found if isinstance(found, dict) else {}


def kinds_in(schema: Any, root: Any, depth: int) -> Kinds:
    if not isinstance(schema, dict) or depth > MAX_DEPTH:
        return ANY
    if isinstance(reference := schema.get("$ref"), str):
        return kinds_in(resolved(reference, root), root, depth + 1)
    named = schema.get("type")
    if named is not None:
        names = named if isinstance(named, list) else [named]
        kinds = frozenset(_NAMES.get(name, name) for name in names if isinstance(name, str))
        return kinds if kinds <= _KNOWN else ANY
    values = schema["enum"] if isinstance(schema.get("enum"), list) else [schema["const"]] if "const" in schema else []
    if values:
        return frozenset(map(kind_of, values))
    for word in ("anyOf", "oneOf"):
        if isinstance(members := schema.get(word), list) and members:
            each = [kinds_in(member, root, depth + 1) for member in members]
            return frozenset().union(*each) if all(each) else ANY
    for member in schema["allOf"] if isinstance(schema.get("allOf"), list) else []:
        if kinds := kinds_in(member, root, depth + 1):
            return kinds
    return frozenset({"object"}) if "properties" in schema else frozenset({"array"}) if "items" in schema else ANY


def resolved(reference: str, root: Any) -> Any:
    if not reference.startswith("#/"):
        return None
    at = root
    for step in reference[2:].split("/"):
        at = at.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(at, dict) else None
    return at


def kind_of(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
    return "object"


def converted(text: str, kinds: Kinds, loose: bool) -> str:
    """The JSON of a value that was written bare: of the first of the types that it can be, a string last. Of an unknown type (`kinds` empty)
    it is what JSON says it is if `loose`, else a string. What none of them can be is a string, which says as much as there is."""
    bare = text.strip()
    if not kinds and not loose:
        return _quoted(text)
    if not kinds and _decoded(bare) is not _NOTHING:
        return bare
    word = bare.lower()
    kinds = kinds or _UNQUOTED
    if "null" in kinds and word in ("null", "none"):
        return "null"
    if "boolean" in kinds and word in ("true", "false"):
        return word
    if ("integer" in kinds or "number" in kinds) and (number := _number(bare, "number" in kinds)) is not None:
        return number
    if "object" in kinds or "array" in kinds:
        types = tuple(type for name, type in (("object", dict), ("array", list)) if name in kinds)
        if isinstance(_decoded(bare), types):
            return bare
        literal = _literal(bare)
        if isinstance(literal, types):
            try:
                return json.dumps(literal, ensure_ascii=False, allow_nan=False)
            except _FAILURES:
                pass
    return _quoted(text if "string" in kinds or kinds is _UNQUOTED else bare)


def _number(bare: str, fractions: bool) -> str | None:
    if _NUMBER.fullmatch(bare) is not None:
        return bare
    try:
        value = float(bare)
        whole = str(int(bare)) if value.is_integer() and bare.lstrip("+-").isdigit() else None
    except _FAILURES:
        return None
    return whole or (repr(value) if fractions and math.isfinite(value) else None)


_NOTHING = object()


def _decoded(bare: str) -> Any:
    try:
        return msgspec.json.decode(bare)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return _NOTHING


def _literal(bare: str) -> Any:
    if len(bare) > MAX_LITERAL:
        return _NOTHING
    try:
        return ast.literal_eval(bare)
    except _FAILURES:
        return _NOTHING


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
