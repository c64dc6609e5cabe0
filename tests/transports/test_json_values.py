"""Values within JSON that comes in pieces, against parsing it whole."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.transports.json_values import DEPTH, MOST_CHARS, JsonValues, Value

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
NAMES = st.text(max_size=4) | st.sampled_from(["a/b", "~1", "~", "", '"', "\\", "é😀"])
DOCUMENTS = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4), max_leaves=24)


def expected(value: Any, path: str = "", depth: int = 0) -> list[tuple[str, Any]]:
    """(path, value) of all that is told, in the order in which it ends."""
    out: list[tuple[str, Any]] = []
    if depth < DEPTH:
        members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for name, member in members:
            below = f"{path}/{str(name).replace('~', '~0').replace('/', '~1')}"
            out += [*expected(member, below, depth + 1), (below, member)]
    return out


def told(pieces: list[str]) -> list[Value]:
    values = JsonValues()
    return [value for piece in pieces for value in values.feed(piece)]


@settings(max_examples=400, deadline=None)
@given(document=DOCUMENTS, ascii=st.booleans(), indent=st.sampled_from([None, 0, 2]), data=st.data())
def test_random_json_in_random_pieces_tells_what_the_whole_does(
    document: Any, ascii: bool, indent: int | None, data: st.DataObject
) -> None:
    text = json.dumps(document, ensure_ascii=ascii, indent=indent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    found = told(pieces)
    assert [(value.path, json.loads(value.text or "")) for value in found] == expected(document)
    assert found == told(list(text))
    for value in found:
        direct = isinstance(document, list) and value.path.count("/") == 1
        assert value.item == (int(value.path[1:]) if direct else None)
        assert value.text == json.dumps(json.loads(value.text or ""), ensure_ascii=ascii, separators=(",", ":"))


def test_a_value_is_told_with_the_character_that_completes_it() -> None:
    values = JsonValues()
    steps = [(piece, [(v.path, v.text) for v in values.feed(piece)]) for piece in ['{"a": 1', "2", "e1", ', "b": "x', "\\u00", 'e9"', "}"]]
    assert steps == [
        ('{"a": 1', []),
        ("2", []),
        ("e1", []),
        (', "b": "x', [("/a", "12e1")]),
        ("\\u00", []),
        ('e9"', [("/b", '"x\\u00e9"')]),
        ("}", []),
    ]


def test_half_a_surrogate_pair_is_mended() -> None:
    assert told(list('["\\ud83d\\ude00", "\\ud83d", "\\\\ud83d", "\\ude00\\ud83d"]'))[0].text == '"\\ud83d\\ude00"'
    assert [value.text for value in told(['["\\ud83d", "\\\\ud83d"]'])] == ['"\\ufffd"', '"\\\\ud83d"']


@pytest.mark.parametrize(
    "text",
    ["hello", "[1 2]", "[1,]", '{"a" 1}', "{1: 2}", '["\n"]', '["\\x"]', '["\\u12g4"]', "[01]", "[nul]", "[}", '{"a":1]', "]", "[+]"],
)
def test_of_what_is_no_json_nothing_more_is_told(text: str) -> None:
    values = JsonValues()
    values.feed(text)
    assert values.feed("[1, 2, 3]") == values.feed('{"a": 1}') == []


def test_what_comes_behind_the_root_is_nothing() -> None:
    assert [value.text for value in told(["[1]", " [2, 3]"])] == ["1"]


def test_a_giant_is_told_without_its_text_and_held_by_nobody() -> None:
    values = JsonValues()
    values.feed('{"small": 1, "big": ["')
    tracemalloc.start()
    for _ in range(200):
        assert values.feed("x" * (MOST_CHARS // 8)) == []
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 4 * MOST_CHARS
    rest = values.feed('", 5, {"a": [6]}], "next": 7}')
    assert [tuple(value) for value in rest] == [
        ("/big/0", None, None),
        ("/big/1", None, "5"),
        ("/big/2/a/0", None, "6"),
        ("/big/2/a", None, "[6]"),
        ("/big/2", None, '{"a":[6]}'),
        ("/big", None, None),
        ("/next", None, "7"),
    ]


def test_depth_is_bounded() -> None:
    deepest = told(["[" * 10 + "1" + "]" * 10])
    assert [value.path for value in deepest] == ["/0" * depth for depth in range(DEPTH, 0, -1)]
    assert deepest[0].text == "[" * (10 - DEPTH) + "1" + "]" * (10 - DEPTH)
    assert told(["[" * 5000]) == []
