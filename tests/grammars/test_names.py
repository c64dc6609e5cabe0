"""Objects in answers: no name twice, however much a model would like it, and as many names as the schema says."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema_rs
import numpy as np
import pytest

from penstock.plugins.grammars.keywords import free_names
from penstock.plugins.grammars.llguidance import LlGuidance

WORDS = [
    b'":',
    b'a":',
    b'"a',
    b'"a"',
    b'","',
    b'","a":',
    b'":1,"a":2',
    b'b"',
    b', "',
    b'{"',
    b'{"a":1,"a":',
    b"\\u0061",
    b'\\"',
    b'""',
    b'"}',
    b"},",
    b"u0061",
]
TOKENS = [bytes([byte]) for byte in range(256)] + WORDS
GRAMMARS = LlGuidance(TOKENS, [])
LIKED = [id for id, token in enumerate(TOKENS) if set(token) <= set(b'ab":,{} 1u\\06[]')]


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len(dict(pairs)) == len(pairs), pairs
    return dict(pairs)


def draw(source: str, seed: int, most: int = 100) -> bytes | None:
    """A model's that likes the names a and b, and says little else."""
    rng = random.Random(seed)
    matcher = GRAMMARS.matcher(GRAMMARS.compile("json", source))
    out = np.zeros(-(-len(TOKENS) // 32), np.int32)
    said = b""
    for _ in range(most):
        matcher.mask(out)
        ids = np.flatnonzero(np.unpackbits(out.view(np.uint8), bitorder="little")).tolist()
        if matcher.may_end() and (not ids or rng.random() < 0.4):
            return said
        assert ids, said
        token = rng.choice([id for id in ids if id in LIKED] or ids)
        assert matcher.consume(token)
        said += TOKENS[token]
    return None


SMALL = {"type": "integer", "minimum": 0, "maximum": 9}
SCHEMAS: list[dict[str, Any]] = [
    {},
    {"type": "object"},
    {"patternProperties": {"^[ab]$": SMALL}, "additionalProperties": False, "type": "object"},
    {"patternProperties": {"^[ab]$": SMALL}, "additionalProperties": False, "type": "object", "minProperties": 2},
    {"properties": {"a": SMALL}, "required": ["a"], "additionalProperties": {"type": "string", "maxLength": 1}, "minProperties": 3, "maxProperties": 3, "type": "object"},
    {"type": "object", "patternProperties": {"^[a-e]$": SMALL}, "additionalProperties": False, "minProperties": 5, "maxProperties": 5},
    {"type": "object", "patternProperties": {"^[a-e]$": SMALL}, "additionalProperties": False, "minProperties": 2, "maxProperties": 3},
    {"type": "object", "patternProperties": {"^[ab]{1,8}$": SMALL}, "additionalProperties": False, "minProperties": 5},
    {"type": "object", "patternProperties": {"^(a|b[ab]{7})$": SMALL}, "additionalProperties": False, "minProperties": 2},
    {"type": "object", "patternProperties": {"^[ab]{3}(aa|b|a[ab]{4})$": SMALL}, "additionalProperties": False, "minProperties": 4},
    {"type": "object", "patternProperties": {"^a[ab]{6}$": SMALL}, "additionalProperties": False, "minProperties": 6},
    {"type": "object", "properties": {"a": SMALL, "b": SMALL, "c": SMALL}, "additionalProperties": False, "minProperties": 2},
    {"type": "object", "properties": {"x\u0001": {"type": "null"}, "a": SMALL}, "additionalProperties": {"type": "object"}},
    {"type": "array", "items": {"type": "object", "additionalProperties": SMALL}, "maxItems": 3},
    {"type": "object", "additionalProperties": {"type": "object", "additionalProperties": SMALL}},
]  # fmt: skip


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:60])
def test_no_name_comes_twice(schema: dict[str, Any]) -> None:
    check = jsonschema_rs.validator_for(schema)
    ends = 0
    for seed in range(40):
        said = draw(json.dumps(schema), seed)
        if said is not None:
            ends += 1
            assert check.is_valid(json.loads(said, object_pairs_hook=once)), said
    assert ends > 5


def test_a_name_that_is_used_cannot_end_but_can_go_on() -> None:
    matcher = GRAMMARS.matcher(GRAMMARS.compile("json", '{"type":"object"}'))
    for byte in b'{"a":{"a":1},"':
        assert matcher.consume(byte)
    out = np.zeros(-(-len(TOKENS) // 32), np.int32)

    def may(token: bytes) -> bool:
        matcher.mask(out)
        id = TOKENS.index(token)
        return bool(out[id // 32] >> (id % 32) & 1)

    assert not may(b'a":')
    assert may(b'b"')
    assert may(b"a")
    assert matcher.consume(ord("a"))
    assert not may(b'"')
    assert not may(b'":')
    assert not may(b"\\u0061")
    assert may(b"a")
    assert matcher.consume(ord("\\"))
    assert not may(b"u")
    assert not may(b"u0061")
    assert matcher.consume(ord("n"))
    assert may(b'":')


@pytest.mark.parametrize(
    ("schema", "free"),
    [
        (True, True),
        ({}, True),
        (False, False),
        ({"type": "string"}, False),
        ({"type": ["object", "null"]}, True),
        ({"type": "object", "additionalProperties": False}, False),
        ({"type": "object", "properties": {"a": {"type": "array"}}, "additionalProperties": False}, True),
        ({"type": "object", "properties": {"a": {"type": "array", "items": {"type": "null"}}}, "additionalProperties": False}, False),
        ({"anyOf": [{"type": "null"}, {"$ref": "#/$defs/a"}], "$defs": {"a": {"type": "object"}}}, True),
        ({"anyOf": [{"type": "null"}, {"$ref": "#/$defs/a"}], "$defs": {"a": {"type": "string"}}}, False),
        ({"enum": [{"a": 1}]}, False),
    ],
)
def test_where_names_are_looked_at(schema: Any, free: bool) -> None:
    assert free_names(schema) is free
