"""Suffix automata, in C and in Python, against a search that looks at everything."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.kernels.native import build
from penstock.kernels.suffixes import Suffixes, api, reference, suffixes
from penstock.kernels.suffixes.reference import BREAK

PYTHON = Suffixes(reference.Automaton, reference.Readers, 256)
BOTH = pytest.mark.parametrize("by", [PYTHON, suffixes()], ids=["python", "native"])


def column(tokens: list[int]) -> Any:
    return np.array(tokens, np.int32)


def longest(text: list[int], said: list[int]) -> tuple[int, int]:
    """The longest suffix of `said` in `text`, and where it ends first; in `said` itself it must end earlier."""
    for length in range(len(said), 0, -1):
        wanted = said[len(said) - length :]
        for end in range(length, len(text) + 1):
            if text[end - length : end] == wanted and not (text is said and end == len(said)):
                return length, end - 1
    return 0, -1


def behind(text: list[int], end: int, most: int) -> list[int]:
    found = text[end + 1 : end + 1 + most]
    return found[: found.index(BREAK)] if BREAK in found else found


def one_row(by: Suffixes, past: Any = None) -> tuple[Any, Any]:
    """(readers, the automaton of their row 0)."""
    readers, own = by.readers(), by.automaton()
    readers.begin(0, own, past)
    return readers, own


def said_by(readers: Any, token: int, most: int = 9, least: int = 1) -> list[int]:
    """What is proposed after one more token."""
    row = np.zeros(1, np.int64)
    readers.follow(row, column([1]), column([token]))
    counts, found = readers.propose(row, column([most]), least, 2)
    assert counts.tolist() == [found.size]
    return list(found.tolist())


@BOTH
@given(tokens=st.lists(st.integers(0, 3), max_size=40))
@settings(max_examples=150, deadline=None)
def test_the_longest_repeated_suffix_is_known_after_every_token(by: Suffixes, tokens: list[int]) -> None:
    readers, own = one_row(by)
    said: list[int] = []
    for token in tokens:
        said.append(token)
        length, end = longest(said, said)
        assert said_by(readers, token) == behind(said, end, min(9, 2 * length))
    assert own.since(0).tolist() == said
    assert len(own) == len(said)


@BOTH
@given(
    texts=st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=30), min_size=1, max_size=4),
    said=st.lists(st.integers(0, 8), max_size=25),
    data=st.data(),
)
@settings(max_examples=100, deadline=None)
def test_texts_before_also_while_some_are_added(by: Suffixes, texts: list[list[int]], said: list[int], data: st.DataObject) -> None:
    """Of what was there when the row began the longest match is known; of what came later none is claimed that is not there."""
    past = by.automaton()
    readers, _ = one_row(by, past)
    before: list[int] = []
    walked: list[int] = []
    grown = False
    for token in said:
        if texts and data.draw(st.booleans()):
            more = [*texts.pop(), BREAK]
            before += more
            grown = bool(walked)
            past.learn(column(more))
        walked.append(token)
        found = said_by(readers, token)
        mine, theirs = longest(walked, walked), longest(before, walked)
        wanted = behind(before, theirs[1], min(9, 2 * theirs[0])) if theirs[0] > mine[0] else behind(walked, mine[1], min(9, 2 * mine[0]))
        if not grown:
            assert found == wanted
        elif found != wanted and found != behind(walked, mine[1], min(9, 2 * mine[0])):
            assert any(before[end] == token and behind(before, end, len(found)) == found for end in range(len(before))), (
                "it follows the last token somewhere"
            )


def test_a_reference_and_c_agree_on_large_alphabets_and_many_rows() -> None:
    """Wide states live in a table that grows."""
    rng = np.random.default_rng(3)
    text = np.concatenate([np.minimum(rng.zipf(1.4, 3000), 400), rng.integers(0, 9, 400), rng.permutation(900)]).astype(np.int32)
    said = [text[at : at + 60] for at in rng.integers(0, text.size - 60, 20)]
    told: list[list[list[int]]] = []
    for by in (PYTHON, suffixes()):
        past = by.automaton()
        for at in range(0, text.size, 700):
            past.learn(text[at : at + 700])
        readers, rows = by.readers(), np.arange(20)[::-1].copy()
        own = [by.automaton() for _ in rows]
        for row in rows.tolist():
            readers.begin(row, own[row], past if row % 3 else None)
        mine = []
        for at in range(0, 60, 4):
            counts = (rows % 4 + 1).astype(np.int32)
            readers.follow(rows, counts, np.concatenate([said[row][at : at + count] for row, count in zip(rows, counts, strict=True)]))
            counts, found = readers.propose(rows, np.full(20, 6, np.int32), 2, 2)
            mine.append([*counts.tolist(), BREAK, *found.tolist()])
        told.append(mine)
        assert [one.since(0).size for one in own] == [15 * (row % 4 + 1) for row in range(20)]
    assert told[0] == told[1]
    assert sum(map(len, told[0])) > 15 * 21, "there were drafts"


@BOTH
def test_a_row_that_ended_may_begin_anew(by: Suffixes) -> None:
    readers, _ = one_row(by)
    for token in (1, 2, 1):
        found = said_by(readers, token)
    assert found == [2, 1]
    readers.end(0)
    with pytest.raises(KeyError):
        said_by(readers, 1)
    readers.begin(0, by.automaton(), None)
    assert said_by(readers, 1) == []
    for counts in ([2], [0], [-1]):
        with pytest.raises(ValueError, match="counts say another number"):
            readers.follow(np.zeros(1, np.int64), column(counts), column([1]))
    nobody = np.zeros(0, np.int64)
    readers.follow(nobody, column([]), column([]))
    assert readers.propose(nobody, column([]), 1, 2)[0].size == 0


def test_memory_is_flat_and_given_back() -> None:
    if suffixes() == PYTHON:
        pytest.skip("no C compiler")
    automaton = api.NativeAutomaton()
    automaton.learn(np.random.default_rng(1).integers(0, 32000, 1 << 14).astype(np.int32))
    assert automaton.bytes < 160 * len(automaton)
    assert automaton.shrink(1) == 0
    assert (automaton.bytes, len(automaton)) == (0, 0)
    automaton.shrink(1)


@pytest.fixture
def undecided() -> Iterator[None]:
    api._library.cache_clear()
    yield
    api._library.cache_clear()


@pytest.mark.usefixtures("undecided")
def test_without_a_compiler_it_is_python_and_said_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PENSTOCK_CC", str(tmp_path / "missing"))
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path))
    with caplog.at_level(logging.WARNING, "penstock.kernels"):
        assert suffixes() == PYTHON
        assert suffixes() == PYTHON
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "suffix automata in Python, which costs each step with drafts several times as much"
    ]


@pytest.mark.usefixtures("undecided")
def test_the_reference_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_KERNELS", "reference")
    assert suffixes() == PYTHON


def test_a_library_of_its_own_knows_no_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not build.compilers():
        pytest.skip("no C compiler")
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path))
    found = build.build(name="suffixes")
    assert found.name.startswith("suffixes-")
    assert build.build(name="suffixes") == found
