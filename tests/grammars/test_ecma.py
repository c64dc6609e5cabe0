"""Patterns of ECMA-262 in the backend's words: what is drawn is what ECMA-262 allows, and what it has not is refused by name."""

from __future__ import annotations

import json
import random
import re

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.protocol.errors import UnsupportedFeature
from penstock.plugins.grammars.ecma import SPACE, translated, words
from penstock.plugins.grammars.llguidance import LlGuidance
from tests.grammars.test_backends import SPECIAL, TOKENS, draw

GRAMMARS = LlGuidance(TOKENS, [SPECIAL])


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("^[[:alpha:]]{2}$", "']'"),
        ("^[a-z&&[^b]]{2}$", "']'"),
        ("^[a[b]]$", "']'"),
        ("(?x)a", r"\(\?x"),
        ("(?U)a", r"\(\?U"),
        ("(?i:a)", r"\(\?i"),
        (r"\Aa", r"\\A"),
        (r"a\z", r"\\z"),
        (r"a\Z", r"\\Z"),
        (r"\x{41}", "x"),
        (r"\u41", "u"),
        (r"\u{110000}", "no character"),
        (r"\Qa\E", r"\\Q"),
        (r"\<a", r"\\<"),
        (r"\bword", "edge of a word"),
        (r"(a)\1", "reference"),
        (r"(?<n>a)\k<n>", "reference"),
        ("(?=a)b", "ahead or behind"),
        ("(?<!a)b", "ahead or behind"),
        ("a^b", "anchor"),
        ("(^a)*b", "anchor"),
        ("^{.*}$", "anchor"),
        ("a{b", r"'\{'"),
        ("a{3,1}", "out of order"),
        ("[z-a]", "out of order"),
        (r"[a-\d]", "range"),
        ("a**", "repeated"),
        ("a{1001}", "1000"),
        ("(a", "'\\('"),
        ("a)", "'\\)'"),
        ("[a", r"'\['"),
        ("\\", "not supported"),
        (r"\ud800", "surrogate"),
        ("(" * 60 + "a" + ")" * 60, "nested"),
    ],
)
def test_what_is_no_pattern_of_ecma_262_or_cannot_be_drawn_is_refused_by_name(pattern: str, names: str) -> None:
    with pytest.raises(UnsupportedFeature, match=names):
        translated(pattern)


@pytest.mark.parametrize(
    ("pattern", "allowed", "not_"),
    [
        (r"^[\x00-\x1f]{2}$", ["\n\t", "\x01\x02"], ['""', "ab"]),
        (r"^\s$", [chr(code) for first, last in SPACE for code in range(first, last + 1)], ["\x85", "\u200b", "a"]),
        (r"^\S$", ["a", "\x85", "\u200b"], ["\ufeff", " ", "\u2028"]),
        ("^.$", ["a", "\x85", "\U0001f600"], ["\n", "\r", "\u2028", "\u2029", "ab"]),
        (r"^\d\w$", ["0a", "9_"], ["\u0663a", "0é"]),
        (r"^[^\d\W]$", ["a", "_"], ["1", "-"]),
        (r"^\D$", ["a", "\u0663"], ["1"]),
        (r"^\cJ\t\v\f\r\n$", ["\n\t\v\f\r\n"], []),
        (r"^\u0041\x42\u{1f600}\ud83d\ude00$", ["AB\U0001f600\U0001f600"], ["AB"]),
        (r"^[a&&b~~-]$", ["a", "&", "b", "~", "-"], ["c"]),
        (r"^[[]\]\-\@\/$", ["[]-@/"], []),
        (r"^[^]$", ["a", "\n", "]"], [""]),
        (r"^(?<year>[0-9]{2,3}?)(?:a|bc)*?$", ["12", "123abca"], ["1", "1234"]),
        (r"^\p{Lu}\P{L}$", ["A1", "Ä-"], ["aB", "AB"]),
        ("a", ["xay", "a"], ["b", ""]),
        ("^a|b$", ["ax", "xb"], ["xa"]),
        ("^(?:ab)?$", ["", "ab"], ["a"]),
        ("^$", [""], ["a"]),
    ],
)
def test_what_a_pattern_means(pattern: str, allowed: list[str], not_: list[str]) -> None:
    compiled = GRAMMARS.compile("json", json.dumps({"type": "string", "pattern": pattern}))
    for text in [*allowed, *not_]:
        matcher = GRAMMARS.matcher(compiled)
        can = all(matcher.consume(byte) for byte in json.dumps(text, ensure_ascii=False).encode()) and matcher.may_end()
        assert can is (text in allowed), repr(text)


_atoms = st.sampled_from(
    [
        "a",
        "b",
        "[ab]",
        "[^a]",
        "\\d",
        "\\w",
        "\\s",
        "[\\s\\d-]",
        ".",
        "\\.",
        "\\n",
        "[a-c&]",
        "\\u0041",
        "\\x22",
        "\\\\",
        "é",
        "\\u2028",
        '[^"]',
        "[\\x00-\\x1f]",
        '[^"\\\\]',
        '"',
    ]
)
_patterns = st.recursive(
    _atoms,
    lambda inner: st.one_of(
        st.builds(lambda one, two: one + two, inner, inner),
        st.builds(lambda one, two: f"(?:{one}|{two})", inner, inner),
        st.builds(lambda one, sign: f"(?:{one}){sign}", inner, st.sampled_from(["?", "*", "+", "{2}", "{0,2}", "+?"])),
    ),
    max_leaves=6,
)
_PYTHON_SPACE = "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in SPACE)


def in_python(pattern: str) -> str:
    """The same for Python's re, an implementation of its own."""
    said = re.sub(r"\[\\s\\d-\]", f"[{_PYTHON_SPACE}0-9-]".replace("\\", r"\\"), pattern)
    said = said.replace("\\s", f"[{_PYTHON_SPACE}]")
    said = re.sub(r"(?<!\\)\.", "[^\\\\n\\\\r\\\\u2028\\\\u2029]", said)
    return said.replace("\\d", "[0-9]").replace("\\w", "[A-Za-z0-9_]")


@settings(max_examples=80, deadline=None)
@given(_patterns, st.integers(0, 2**32))
def test_whatever_is_drawn_matches(pattern: str, seed: int) -> None:
    schema = {"type": "string", "pattern": f"^{pattern}$", "maxLength": 30}
    said, ended = draw(GRAMMARS, "json", json.dumps(schema), seed)
    if ended:
        text = json.loads(said)
        assert re.fullmatch(in_python(pattern), text), (pattern, text)
        assert jsonschema_rs.validator_for(schema).is_valid(text), (pattern, text)


@pytest.mark.parametrize("inside", ['[^"]', r"[^\x5c]", r"[\x00-\x1f]", r"[\x00-\x10]|[\x11-\x1fx]", r"\p{Cc}", r"[^\p{L}\x22]", '[^"<>]'])
def test_a_class_with_all_control_characters_has_no_more(inside: str) -> None:
    schema = {"type": "string", "pattern": f"^(?:{inside}){{3}}$"}
    check = jsonschema_rs.validator_for(schema)
    for seed in range(20):
        said, ended = draw(GRAMMARS, "json", json.dumps(schema), seed, like=b'\\"nu0')
        assert not ended or check.is_valid(json.loads(said)), said


def test_words() -> None:
    assert words("^[a-c]$", 5) == ["a", "b", "c"]
    assert words("^(?:x|y[12]{0,1})$", 5) == ["x", "y", "y1", "y2"]
    assert words("^a$|^b$", 5) == ["a", "b"]
    for pattern in ("[ab]", "^a", "^a*$", "^.$", "^[a-z]$", "^a$|b"):
        assert words(pattern, 5) is None
    rng = random.Random(1)
    for _ in range(50):
        pattern = "^" + "".join(rng.choice(["a", "b?", "[cd]", "(?:e|fg)", "h{1,2}"]) for _ in range(rng.randint(1, 3))) + "$"
        found = words(pattern, 100)
        assert found is not None
        assert all(re.fullmatch(pattern, word) for word in found)
