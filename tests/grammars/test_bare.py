"""Strings without quotes: what a schema asks of them, and what a reader would take for something else."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from penstock.core.contract.layouts import Bare, Obey, encode, leaves
from penstock.core.protocol.errors import UnsupportedFeature

sys.path.insert(0, str(Path(__file__).parent))  # for layout_kit.py: pytest's importlib mode does not

from layout_kit import VOCABULARIES, follows

TEXTS = [
    "",
    "a",
    "b",
    "ab",
    "ba",
    "a1",
    "٣",
    "é",
    "_",
    "-",
    " ",
    "\n",
    "\u2003",
    "/a",
    "x",
    "xy",
    "AB",
    "&",
    "(",
    "$",
    "^",
    "a\n",
    "1-2",
    "null",
    "[]",
    "12",
]


def allowed(text: str, schema: Any, **more: Any) -> bool:
    vocabulary = VOCABULARIES[False]
    bare = Bare(schema=json.dumps(schema), then="|", without=["|"], **more)
    matcher = vocabulary.grammars.matcher(vocabulary.grammars.compile("layout", encode(bare)))
    return follows(vocabulary, matcher, text + "|") and matcher.may_end()


@pytest.mark.parametrize(
    "pattern",
    ["^a$", "a", "^a", "b$", r"\d+", r"^[\d-]+$", r"[^\w]", r"\s", r"[^\s]", r"\S\S", r"^\/a", "^(?:x|y)$", "x|y", r"\u0041\x42", "[a&&b]", "^[(/]", r"\$$", "^$", ""],
)  # fmt: skip
def test_patterns_mean_what_json_schema_says(pattern: str) -> None:
    """The backend's words for the same, over texts in which they differ; where it allows less, that is the white space of other scripts."""
    validator = jsonschema_rs.validator_for({"pattern": pattern})
    for text in TEXTS:
        may = allowed(text, {"pattern": pattern})
        assert may == validator.is_valid(text) or (text == "\u2003" and not may), text


@pytest.mark.parametrize("pattern", ["a(?=b)", "(?i)a", r"\bfoo", r"(a)\1", r"\p{L}", "^a|b$", "a^b", "(a$)", r"[\D]"])
def test_patterns_that_mean_something_else_to_the_backend_are_refused(pattern: str) -> None:
    with pytest.raises(UnsupportedFeature) as raised:
        allowed("a", {"pattern": pattern}, field="tools[0]")
    assert raised.value.param == "tools[0]"


@pytest.mark.parametrize(
    ("schema", "more", "may"),
    [
        ({"minLength": 2, "maxLength": 3}, {}, {"ab", "ba", "a1", "/a", "xy", "AB", "a\n", "1-2", "[]", "12"}),
        ({"enum": ["a", "", 1, "$"]}, {}, {"a", "", "$"}),
        ({"const": "a"}, {"words": ["null"]}, {"a", "null"}),
        ({"const": "a"}, {"trimmed": True}, {"a", "a\n"}),
        ({"anyOf": [{"const": "a"}, {"pattern": "^x", "maxLength": 1}]}, {}, {"a", "x"}),
        ({"allOf": [{"pattern": "a"}, {"pattern": "b"}]}, {}, {"ab", "ba"}),
        ({}, {"unlike": ["number"]}, set(TEXTS) - {"٣", "-", "1-2", "12"}),
        ({}, {"unlike": ["null", "nested"], "words": ["null"]}, set(TEXTS) - {"(", "[]"}),
    ],
)
def test_which_texts_there_may_be(schema: Any, more: Any, may: set[str]) -> None:
    assert {text for text in TEXTS if allowed(text, schema, **more)} == may


def test_what_is_checked_of_it_is_its_schema() -> None:
    assert list(leaves(Bare(schema="{}", then="|", without=[], field="f"))) == [Obey("json", "{}", "f")]
