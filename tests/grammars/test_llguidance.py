"""The built-in grammar backend: whatever a model draws under its masks is of the grammar, and ends."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.protocol.errors import PenstockError
from penstock.plugins.grammars.bounds import LONGEST_NUMBER
from penstock.plugins.grammars.llguidance import LlGuidance

WORDS = [b"hello", b'{"', b'":', b"123", b"0000", b"1e5", b"9e", b" 5E3", b", ", b"true", b"}}", b"\n  ", "ü".encode(), b"<end>", b""]
TOKENS = [bytes([byte]) for byte in range(256)] + WORDS
SPECIAL = TOKENS.index(b"<end>")
GRAMMARS = LlGuidance(TOKENS, [SPECIAL])


def allowed(matcher: Any) -> list[int]:
    out = np.zeros(-(-len(TOKENS) // 32), np.int32)
    matcher.mask(out)
    found: list[int] = np.flatnonzero(np.unpackbits(out.view(np.uint8), bitorder="little")).tolist()
    return found


def draw(kind: str, source: str, seed: int = 0, *, like: bytes = b"", most: int = 400) -> tuple[bytes, bool]:
    """A random model's answer, which prefers tokens that begin with one of the bytes `like`: (what it said, did it end)."""
    rng = random.Random(seed)
    matcher = GRAMMARS.matcher(GRAMMARS.compile(kind, source))
    said = b""
    for _ in range(most):
        ids = allowed(matcher)
        assert SPECIAL not in ids
        assert all(id < len(TOKENS) and TOKENS[id] for id in ids)
        if matcher.may_end() and (not ids or (not like and rng.random() < 0.3)):
            return said, True
        assert ids, said
        token = rng.choice([id for id in ids if like and TOKENS[id][0] in like] or ids)
        assert matcher.consume(token)
        said += TOKENS[token]
    return said, False


leaves = st.one_of(
    st.just({}),
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more}, st.integers(-50, 50), st.integers(0, 100)),
    st.just({"type": "number"}),
    st.builds(lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more}, st.integers(0, 3), st.integers(0, 5)),
    st.builds(lambda values: {"enum": values}, st.lists(st.one_of(st.integers(0, 99), st.text("ab \"\\ü", max_size=4)), min_size=1, max_size=4)),
    st.just({"type": "string", "pattern": "^[a-c]{2}x?$"}),
)  # fmt: skip
schemas = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(lambda items, most: {"type": "array", "items": items, "maxItems": most}, inner, st.integers(0, 3)),
        st.builds(
            lambda parts, needed: {
                "type": "object",
                "properties": parts,
                "required": sorted(parts)[:needed],
                "additionalProperties": False,
            },
            st.dictionaries(st.text("abc", min_size=1, max_size=3), inner, max_size=3),
            st.integers(0, 3),
        ),
        st.builds(lambda one, two: {"anyOf": [one, two]}, inner, inner),
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(schemas, st.integers(0, 2**32))
def test_every_finished_answer_validates(schema: dict[str, Any], seed: int) -> None:
    said, ended = draw("json", json.dumps(schema), seed)
    if ended:
        answer = json.loads(said)
        assert jsonschema_rs.validator_for(schema).is_valid(answer), (schema, said)


@pytest.mark.parametrize("schema", ["{}", '{"type":"number"}', '{"type":"integer"}', '{"type":"object"}', '{"type":"array"}'])
@pytest.mark.parametrize("like", [b"0123456789", b"-.eE0", b" \n\t\r"])
def test_numbers_and_white_space_end(schema: str, like: bytes) -> None:
    """A model that loves digits, or white space, gets only so far with each."""
    for seed in range(3):
        said, _ = draw("json", schema, seed, like=like, most=200)
        outside = re.sub(rb'"(\\.|[^"\\])*("|$)', b'""', said)
        assert max(map(len, re.findall(rb"[0-9.eE+-]+", outside)), default=0) <= LONGEST_NUMBER + 5
        assert max(map(len, re.findall(rb"\s+", outside)), default=0) <= 40
        assert not re.search(rb"[0-9.][eE]", outside)


def test_a_schemas_own_lengths_count() -> None:
    assert draw("json", '{"type":"string","minLength":60,"pattern":"^[0-9]+$"}', like=b"0123456789", most=90)[0][1:60].isdigit()
    assert draw("json", '{"const":"12345678901234567890123456789012345"}')[0] == b'"12345678901234567890123456789012345"'


@pytest.mark.parametrize(
    ("kind", "source", "pattern"),
    [
        ("regex", "[a-z]{3}", "[a-z]{3}"),
        ("regex", "^[0-9]{2}$", "[0-9]{2}"),
        ("regex", "^a|b$", "a|b"),
        ("choice", '["yes", "no"]', "yes|no"),
        ("choice", '["<a>", "b>c"]', "<a>|b>c"),
        ("choice", '["a+b [c]", "x/y\\n", "ü-!#\\"", "(", "\\\\d"]', r"a\+b \[c\]|x/y\n|ü-!#\"|\(|\\d"),
        ("grammar", 'root ::= "a" [0-9]', "a[0-9]"),
        ("grammar", 'start: "x" NUMBER | "y"\nNUMBER: /[0-9]{1,3}/', "x[0-9]{1,3}|y"),
    ],
)
def test_other_kinds(kind: str, source: str, pattern: str) -> None:
    for seed in range(12):
        said, ended = draw(kind, source, seed)
        assert ended
        assert re.fullmatch(pattern, said.decode()), said


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("regex", "("),
        ("regex", "(?=a)b"),
        ("regex", "(?!a)b"),
        ("grammar", "nonsense"),
        ("grammar", "start: unknown"),
        ("grammar", '%llguidance {}\nstart: "a"'),
        ("grammar", 'start: %json {"x-guidance": {"lenient": true}}'),
        ("grammar", "root ::= missing"),
    ],
)
def test_what_is_no_grammar(kind: str, source: str) -> None:
    with pytest.raises((PenstockError, ValueError)):
        GRAMMARS.compile(kind, source)


def test_matchers_of_one_grammar_are_apart() -> None:
    compiled = GRAMMARS.compile("regex", "ab")
    one, two = GRAMMARS.matcher(compiled), GRAMMARS.matcher(compiled)
    assert one.consume(ord("a"))
    assert not one.may_end()
    assert not two.consume(ord("b"))
    assert one.consume(ord("b"))
    assert one.may_end()
