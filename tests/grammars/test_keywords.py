"""What JSON schema keyword is obeyed and what is refused: nothing is ignored. The table is ours; test_suite.py has the official one."""

from __future__ import annotations

import json
from typing import Any

import jsonschema_rs
import pytest

from penstock.core.protocol.calling import Offered, calling_of
from penstock.core.protocol.errors import InvalidRequest, PenstockError, UnsupportedFeature
from penstock.plugins.grammars.keywords import MOST_OPTIONAL, MOST_PROPERTIES, NAMED, check_schema
from penstock.plugins.grammars.llguidance import LlGuidance

BYTES = LlGuidance([bytes([byte]) for byte in range(256)], [])

DRAFT_7 = "http://json-schema.org/draft-07/schema#"
WORKS: list[tuple[Any, list[Any], list[Any]]] = [
    (True, [1, "a", None, {}], []),
    ({}, [1.5, "a", [1, {"x": None}]], []),
    ({"type": "integer"}, [0, -5, 123], ["1", 1.5, None]),
    ({"type": "number"}, [0.5, -1, 2], ["a"]),
    ({"type": ["string", "null"]}, ["a", None], [1]),
    ({"type": "boolean"}, [True, False], ["true", 0]),
    ({"type": "integer", "minimum": 3, "maximum": 12}, [3, 12], [2, 13]),
    ({"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 5}, [4], [3, 5]),
    ({"type": "integer", "multipleOf": 5}, [0, 15], [7]),
    ({"type": "string", "minLength": 2, "maxLength": 3}, ["ab", "äöü"], ["a", "abcd"]),
    ({"type": "string", "pattern": "^[ab]+$"}, ["abba"], ["c", ""]),
    ({"type": "string", "pattern": "x"}, ["axb"], ["ab"]),
    ({"type": "string", "format": "date"}, ["2026-02-28"], ["2026-2-3", "x"]),
    ({"type": "string", "format": "uuid"}, ["123e4567-e89b-12d3-a456-426614174000"], ["123"]),
    ({"type": "string", "format": "ipv4"}, ["127.0.0.1"], ["1.2.3"]),
    ({"enum": [1, "a", None, {"x": [2]}]}, [1, "a", None, {"x": [2]}], [2, "b"]),
    ({"const": {"a": 1}}, [{"a": 1}], [{"a": 2}, {}]),
    ({"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2}, [[1], [1, 2]], [[], [1, 2, 3], ["a"]]),
    ({"type": "array", "prefixItems": [{"type": "integer"}, {"type": "null"}], "items": False}, [[1, None]], [[1, 2], [1, None, 3]]),
    ({"properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False, "type": "object"}, [{"a": 1}], [{}, {"a": 1, "b": 2}]),
    ({"type": "object", "additionalProperties": {"type": "null"}}, [{}, {"x": None}], [{"x": 1}]),
    ({"type": "object", "patternProperties": {"^x": {"type": "integer"}}, "additionalProperties": False}, [{"xy": 1}], [{"y": 1}, {"x": "a"}]),
    ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, [1, None], ["a"]),
    ({"oneOf": [{"type": "integer"}, {"type": "null"}]}, [1, None], ["a"]),
    ({"allOf": [{"type": "integer", "minimum": 2}, {"maximum": 3}]}, [2, 3], [1, 4]),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "null"}}}, [None], [1]),
    ({"definitions": {"n": {"type": "object", "properties": {"n": {"$ref": "#/definitions/n"}}, "additionalProperties": False}}, "$ref": "#/definitions/n"}, [{}, {"n": {"n": {}}}], [{"m": 1}]),
    ({"type": ["integer", "null"], "minimum": 5, "maximum": 3}, [None], [4]),
    ({"type": ["string", "null"], "minimum": 10, "exclusiveMaximum": 0}, [None, "a"], [4]),
    ({"type": "string", "minimum": 10, "maximum": 1e300}, ["a"], [11]),
    ({"minimum": 10, "exclusiveMaximum": 0}, [None, "a", [], {}, True], [4]),
    ({"enum": [4, "a"], "minimum": 5, "maximum": 3}, ["a"], [4]),
    ({"anyOf": [{"type": "integer", "minimum": 5.5, "maximum": 5.7}, {"type": "null"}]}, [None], [5]),
    ({"type": "array", "items": {"type": "number", "minimum": 5, "maximum": 3}, "maxItems": 2}, [[]], [[4]]),
    ({"type": "array", "prefixItems": [{"type": "number", "minimum": 5, "maximum": 3}]}, [[]], [[4]]),
    ({"type": "object", "properties": {"a": {"type": "integer", "minimum": 5, "maximum": 3}}, "additionalProperties": False}, [{}], [{"a": 4}]),
    ({"anyOf": [{"$ref": "#/$defs/x"}, {"type": "null"}], "$defs": {"x": {"type": "integer", "minimum": 5, "maximum": 3}}}, [None], [4]),
    ({"anyOf": [{"$ref": "#/$defs/x"}, {"type": "null"}], "$defs": {"x": {"$ref": "#/$defs/y"}, "y": {"type": "string", "minLength": 5, "maxLength": 3}}}, [None], ["abcd"]),
    ({"$schema": DRAFT_7, "$ref": "#/definitions/a", "type": "string", "definitions": {"a": {"type": "integer"}}}, [1], ["a"]),
    ({"$schema": DRAFT_7, "type": "object", "properties": {"x": {"$ref": "#/definitions/a", "type": "null"}}, "required": ["x"], "additionalProperties": False, "definitions": {"a": {"type": "integer"}}}, [{"x": 1}], [{"x": None}]),
    ({"$schema": DRAFT_7, "type": "object", "properties": {"$ref": {"type": "string"}, "type": {"type": "null"}}, "required": ["$ref"], "additionalProperties": False}, [{"$ref": "a", "type": None}], [{"$ref": 1}]),
    ({"type": "string", "title": "t", "description": "d", "default": "x", "examples": ["y"], "$comment": "c"}, ["a"], [1]),
]  # fmt: skip


def accepts(schema: Any, text: str) -> bool:
    matcher = BYTES.matcher(BYTES.compile("json", json.dumps(schema)))
    return all(matcher.consume(byte) for byte in text.encode()) and matcher.may_end()


@pytest.mark.parametrize(("schema", "right", "wrong"), WORKS, ids=lambda value: json.dumps(value)[:40])
def test_what_works(schema: Any, right: list[Any], wrong: list[Any]) -> None:
    """A wrong value that is let through would be a false accept: there are none. The second implementation says the same of each."""
    validator = jsonschema_rs.validator_for(schema, validate_formats=True)
    for value in right:
        assert validator.is_valid(value)
        for text in (json.dumps(value, ensure_ascii=False), json.dumps(value, ensure_ascii=False, separators=(",", ":"))):
            assert accepts(schema, text), text
    for value in wrong:
        assert not validator.is_valid(value)
        assert not accepts(schema, json.dumps(value, ensure_ascii=False)), value


def wide(count: int, required: int = 0, prefix: str = "p") -> dict[str, Any]:
    names = {f"{prefix}{i}": {"type": "integer"} for i in range(count)}
    return {"type": "object", "properties": names, "required": list(names)[:required], "additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        (wide(MOST_OPTIONAL), ""),
        (wide(MOST_PROPERTIES, MOST_PROPERTIES - MOST_OPTIONAL), ""),
        (
            wide(MOST_OPTIONAL + 1),
            f"The object at / has {MOST_OPTIONAL + 1} properties that are not required, but may have {MOST_OPTIONAL}.",
        ),
        (wide(MOST_PROPERTIES + 1, MOST_PROPERTIES), f"The schema has {MOST_PROPERTIES + 1} properties, but may have {MOST_PROPERTIES}."),
        ({"items": {"anyOf": [{}, wide(MOST_OPTIONAL + 5, 2)]}}, f"The object at /items/anyOf/1 has {MOST_OPTIONAL + 3} properties"),
        (
            {"prefixItems": [wide(MOST_OPTIONAL), {"$defs": {"a": wide(MOST_OPTIONAL)}}, wide(1)]},
            f"The schema has {2 * MOST_OPTIONAL + 1} properties",
        ),
    ],
)
def test_a_schema_that_is_too_large_is_refused_by_its_numbers(schema: Any, says: str) -> None:
    if not says:
        check_schema(schema)
        return
    with pytest.raises(InvalidRequest) as error:
        check_schema(schema)
    assert error.value.message.startswith(says)


REFUSED = {
    "not": {"type": "null"},
    "if": {},
    "then": {},
    "else": {},
    "uniqueItems": True,
    "contains": {},
    "minContains": 1,
    "maxContains": 1,
    "propertyNames": {},
    "dependentRequired": {"a": ["b"]},
    "dependentSchemas": {},
    "dependencies": {},
    "unevaluatedProperties": False,
    "unevaluatedItems": False,
    "additionalItems": False,
    "contentEncoding": "base64",
    "contentMediaType": "a/b",
    "$anchor": "a",
    "$dynamicRef": "#a",
    "$dynamicAnchor": "a",
    "$recursiveRef": "#",
    "$vocabulary": {},
    "nullable": True,
    "x-guidance": {"lenient": True},
    "typo": 1,
}


@pytest.mark.parametrize("keyword", REFUSED)
@pytest.mark.parametrize("around", ["", "properties", "items", "anyOf", "$defs", "additionalProperties"])
def test_what_is_refused_is_named_wherever_it_stands(keyword: str, around: str) -> None:
    bad: Any = {"type": "array", keyword: REFUSED[keyword]}
    if around:
        bad = {around: {"p": bad} if around in NAMED else [bad] if around == "anyOf" else bad}
    with pytest.raises(UnsupportedFeature, match=repr(keyword).replace("$", r"\$")):
        check_schema(bad)


@pytest.mark.parametrize("draft", [{}, {"$schema": DRAFT_7}])
def test_arguments_are_an_object_whatever_their_schema_refers_to(draft: dict[str, Any]) -> None:
    """In draft 7 nothing may stand beside the $ref of a function's parameters."""
    parameters = {**draft, "$ref": "#/definitions/a", "definitions": {"a": {"type": ["object", "string"], "maxProperties": 0}}}
    calling = calling_of([Offered("f", parameters, True)], "required")
    assert calling is not None
    schema = json.loads(calling.functions[0].schema)
    assert accepts(schema, "{}")
    assert not accepts(schema, '"a"')


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "http://example.org/a"},
        {"$ref": 5},
        {"format": "weird", "type": "string"},
        {"format": 3},
        {"items": [{"type": "integer"}]},
        {"$schema": "http://json-schema.org/draft-04/schema#"},
        {"type": "string", "pattern": "(?=a)b"},
        {"type": "string", "pattern": "("},
        {"oneOf": [{"type": "integer"}, {"type": "number"}]},
        {"enum": []},
        {"type": "integer", "minimum": 5, "maximum": 3},
        {"type": ["integer", "number"], "minimum": 5, "maximum": 3},
        {"type": "object", "properties": {"a": {"type": "integer", "minimum": 5, "maximum": 3}}, "required": ["a"]},
        {"$ref": "#/$defs/x", "$defs": {"x": {"type": "integer", "minimum": 5, "maximum": 3}}},
        {"$ref": "#/$defs/x", "type": "string", "$defs": {"x": {"type": "integer"}}},
        {"type": "integer", "exclusiveMinimum": True},
        {"type": "int"},
        {"type": 5},
        {"anyOf": []},
        {"properties": []},
        {"properties": {"a": 1}},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
        {"$ref": "#/nowhere"},
        False,
        [],
        "x",
    ],
)
def test_what_is_wrong_or_cannot_be_is_refused(schema: Any) -> None:
    with pytest.raises((PenstockError, ValueError)):
        BYTES.compile("json", json.dumps(schema))


def test_deep_schemas() -> None:
    schema: Any = {}
    for _ in range(100):
        schema = {"items": schema}
    with pytest.raises(UnsupportedFeature, match="nested"):
        check_schema(schema)
    with pytest.raises(InvalidRequest, match="not valid JSON"):
        BYTES.compile("json", "{")
