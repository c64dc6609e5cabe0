"""What is llguidance's own: masks made together, limits that are reached, and what costs too much."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import llguidance
import numpy as np
import pytest

from penstock.core.protocol.errors import InvalidRequest, UnsupportedFeature
from penstock.plugins.grammars import llguidance as backend
from penstock.plugins.grammars import trial
from penstock.plugins.grammars.llguidance import LlGuidance
from tests.grammars.test_backends import SPECIAL, TOKENS, allowed, wide

GRAMMARS = LlGuidance(TOKENS, [SPECIAL])


@pytest.mark.parametrize("threads", [1, 3])
def test_many_at_once_get_what_each_alone_gets(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """On threads too, with rows of different grammars, of which one is over and one is refused a token."""
    schemas = [
        {"type": "integer"},
        {"enum": ["a", "bc"]},
        {"type": "array", "items": {"type": "string"}},
        {"type": "string", "maxLength": 9},
    ]
    sources = [("json", json.dumps(schema)) for schema in schemas] + [("regex", "[a-z]{0,40}"), ("choice", '["x", "yy"]')]
    monkeypatch.setattr(GRAMMARS, "_threads", threads)
    alone, together = ([GRAMMARS.matcher(GRAMMARS.compile(*source)) for source in sources] for _ in range(2))
    rng = random.Random(5)
    words = -(-len(TOKENS) // 32)
    live = list(range(len(sources)))
    for step in range(30):
        out = np.full((len(live), words), -1, np.int32)
        assert not GRAMMARS.masks([together[i] for i in live], out)
        tokens = []
        for at, i in enumerate(live):
            one = np.zeros(words, np.int32)
            alone[i].mask(one)
            assert out[at].tolist() == one.tolist()
            tokens.append(rng.choice(np.flatnonzero(np.unpackbits(one.view(np.uint8), bitorder="little")).tolist() or [SPECIAL]))
        if step == 4:
            tokens[0] = TOKENS.index(b"}}")  # a number does not go on so
        fine = [alone[i].consume(token) for i, token in zip(live, tokens, strict=True)]
        assert [together[i].consume(token) for i, token in zip(live, tokens, strict=True)] == fine
        live = [i for i, one in zip(live, fine, strict=True) if one]
    assert 0 not in live
    assert live


@pytest.mark.parametrize("limits", [{"max_items_in_row": 100}, {"step_max_items": 300}, {"max_lexer_states": 60}, {"step_lexer_fuel": 60}])
def test_a_limit_that_is_reached_blames_the_grammar(monkeypatch: pytest.MonkeyPatch, limits: dict[str, int]) -> None:
    """While it is compiled, or else in the midst of an answer: never a mask, or a no, that is not true."""
    monkeypatch.setattr(backend, "_limits", lambda: llguidance.LLParserLimits(verbose_errors=False, **limits))
    source, answer = wide(100, required=False)
    small = LlGuidance(TOKENS, [SPECIAL])
    out = np.zeros(-(-len(TOKENS) // 32), np.int32)

    def walk() -> None:
        matcher = small.matcher(small.compile("json", source))
        for byte in answer:
            matcher.mask(out)
            assert matcher.consume(byte)

    with pytest.raises(InvalidRequest, match=r"too (large|big|many|complex)"):
        walk()
    (matcher := GRAMMARS.matcher(GRAMMARS.compile("json", '{"type":"integer"}'))).mask(out)
    assert not matcher.consume(ord("x"))


def test_a_token_that_may_not_follow_is_no_limit() -> None:
    matcher = GRAMMARS.matcher(GRAMMARS.compile("json", wide(500, required=False)[0]))
    assert matcher.consume(ord("{"))
    assert not matcher.consume(ord("x"))
    over = GRAMMARS.matcher(GRAMMARS.compile("choice", '["a limit"]'))
    assert all(over.consume(byte) for byte in b"a limit")
    assert not allowed(over)
    assert not over.consume(ord("x"))
    other = GRAMMARS.matcher(GRAMMARS.compile("choice", '["a limit, too many"]'))
    assert all(other.consume(byte) for byte in b"a limit, too ")
    assert not other.consume(ord("x"))
    assert not GRAMMARS.matcher(GRAMMARS.compile("choice", '["a"]')).consume(TOKENS.index(b"limit"))


@pytest.mark.parametrize(
    ("kind", "source", "says", "supported"),
    [
        ("regex", r"\bfoo", r"The expression /\bfoo/ has \b where", False),
        ("regex", r"fo\Bo" * 100, r"The expression /fo\Bo", False),
        ("regex", "a^b", "The expression /a^b/ has ^ where", False),
        ("regex", "a$b", "The expression /a$b/ has $ where", False),
        ("regex", '(?="a)b', 'The expression /(?="a)b/ cannot be read: look-around', False),
        ("regex", "a(", "The expression /a(/ cannot be read: unclosed group.", True),
        ("regex", r"[^\x00-\u{10ffff}]", "Nothing can satisfy it.", True),
        ("grammar", r"start: /\bfoo/", r"The expression /\bfoo/ has \b where", False),
        ("json", {"allOf": [{"$ref": "#/$defs/x"}, {"$ref": "#/$defs/y"}], "$defs": {n: {"type": "object", "properties": {"a": {"$ref": f"#/$defs/{n}"}}} for n in "xy"}}, "write out what they are together", False),
        ("json", {"type": "object", "properties": {"a": {"allOf": [{"$ref": "#"}, {"minProperties": 1}]}}}, "'$ref' leads back to itself", False),
        ("json", {"type": "array", "prefixItems": [{"$ref": "#"}], "minItems": 2}, "refers to itself without end", True),
        ("json", {"type": "array", "items": {"$ref": "#/$defs/a"}, "minItems": 1, "$defs": {"a": {"type": "object", "properties": {"b": {"$ref": "#"}}, "required": ["b"]}}}, "refers to itself without end", True),
        ("json", {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"allOf": [{"$ref": "#/$defs/b"}]}, False]}, "b": {"type": "object", "additionalProperties": {"$ref": "#/$defs/a"}, "required": ["c"]}}}, "refers to itself without end", True),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_a_refusal_names_what_was_sent_and_what_to_do(kind: str, source: Any, says: str, supported: bool) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(says)) as caught:
        GRAMMARS.compile(kind, source if isinstance(source, str) else json.dumps(source))
    assert isinstance(caught.value, UnsupportedFeature) is not supported
    assert "keyword 'pattern'" not in caught.value.message


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"type": "array", "prefixItems": [{"$ref": "#"}]}, ["[]", "[[]]", "[[[]]]"], ["[1]"]),
        ({"type": "object", "properties": {"a": {"$ref": "#/$defs/x"}}, "additionalProperties": False, "$defs": {"x": {"type": "object", "properties": {"a": {"$ref": "#/$defs/x"}}, "required": ["a"]}}}, ["{}"], ['{"a": {"a": {']),
        ({"$ref": "#/$defs/n", "$defs": {"n": {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]}}, "required": ["next"], "additionalProperties": False}}}, ['{"next": null}', '{"next": {"next": null}}'], ["{}"]),
        ({"type": ["object", "null"], "properties": {"a": {"$ref": "#"}}, "required": ["a"], "additionalProperties": False}, ["null", '{"a": null}'], ["{}"]),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_what_can_come_to_an_end_may_and_nothing_begins_that_cannot(schema: Any, right: list[str], wrong: list[str]) -> None:
    def goes(text: str) -> tuple[bool, bool]:
        matcher = GRAMMARS.matcher(GRAMMARS.compile("json", json.dumps(schema)))
        return all(matcher.consume(byte) for byte in text.encode()), matcher.may_end()

    assert all(goes(text) == (True, True) for text in right)
    assert not any(goes(text) == (True, True) or (text.endswith("{") and goes(text)[0]) for text in wrong)


def test_what_a_limit_is_said_with_is_no_half_sentence() -> None:
    said = backend._limit("Too many items (limit 1000000; try avoiding repetition)").message
    assert said == "It is too large or too complex: Too many items. Make it smaller."


@pytest.mark.parametrize(("budget", "says"), [("PREPARE_S", "seconds to be prepared"), ("STEP_S", "seconds for a token")])
def test_a_grammar_that_would_hold_up_others_is_refused(monkeypatch: pytest.MonkeyPatch, budget: str, says: str) -> None:
    monkeypatch.setattr(trial, budget, 0.0)
    with pytest.raises(InvalidRequest, match=says):
        LlGuidance(TOKENS, [SPECIAL]).compile("json", wide(600, required=False)[0])
