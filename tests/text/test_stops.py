"""Stop strings: what comes out does not depend on how the text was cut, and nothing of a stop string ever gets out early."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.actors.text.stops import StopMatcher, StopSet, cut


def stream(stops: list[str], chunks: list[str], wait: int = 0) -> tuple[str, str | None]:
    """The first `wait` chunks cannot be the end."""
    matcher = StopMatcher(StopSet(stops))
    out = ""
    for number, chunk in enumerate(chunks, 1):
        text, hit = matcher.feed(chunk, number > wait)
        out += text
        if hit is not None:
            return out, hit
        # Never let out the start of what may become a stop string; never hold back more than that.
        assert not any(out.endswith(stop[:k]) and k > 0 and matcher.held == "" for stop in stops for k in range(1, len(stop)))
        assert matcher.held == "" or any(stop.startswith(matcher.held) and stop != matcher.held for stop in stops)
    return out + matcher.flush(), None


letters = st.text(alphabet="ab", min_size=1, max_size=5)


@settings(max_examples=500, deadline=None)
@given(
    stops=st.lists(letters, min_size=1, max_size=4),
    text=st.text(alphabet="abc", max_size=40),
    cuts=st.lists(st.integers(0, 40), max_size=8),
)
def test_any_chunking_gives_the_reference_cut(stops: list[str], text: str, cuts: list[int]) -> None:
    edges = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    chunks = [text[a:b] for a, b in itertools.pairwise(edges)]
    assert stream(stops, chunks) == cut(text, stops)
    assert stream(stops, list(text)) == cut(text, stops)


def waiting_cut(stops: list[str], chunks: list[str], wait: int) -> tuple[str, str | None]:
    """The reference: every place is looked at, and the first one that ends a stop string after the chunks that may not end counts."""
    text = "".join(chunks)
    for end in range(len("".join(chunks[:wait])) + 1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return text, None


@settings(max_examples=1000, deadline=None)
@given(
    stops=st.lists(letters, min_size=1, max_size=4),
    chunks=st.lists(st.text(alphabet="ab", max_size=3), max_size=16),
    wait=st.integers(0, 12),
)
def test_what_is_completed_while_waiting_is_text_and_may_begin_the_end(stops: list[str], chunks: list[str], wait: int) -> None:
    expected = waiting_cut(stops, chunks, wait)
    assert stream(stops, chunks, wait) == expected
    assert cut("".join(chunks), stops, len("".join(chunks[:wait]))) == expected


def test_a_stop_string_may_begin_while_waiting() -> None:
    assert stream(["xxxx"], ["x"] * 20, 9) == ("xxxxxx", "xxxx")
    assert stream(["ab", "abab"], list("abababab"), 5) == ("ab", "abab")
    matcher = StopMatcher(StopSet(["ab"]))
    assert matcher.feed("ab", False) == ("ab", None)
    assert matcher.held == "", "it was completed: nothing of it can begin another"
    assert matcher.feed("b") == ("b", None)


def test_the_first_completed_wins_and_then_the_longest() -> None:
    assert stream(["cd", "bcd", "abcdef"], ["abcdef"]) == ("a", "bcd")
    assert stream(["aab", "ab"], list("aaab")) == ("a", "aab")
    assert stream(["ab\n", "\n"], ["x", "ab", "\ny"]) == ("x", "ab\n")


def test_what_was_held_comes_out_when_it_was_nothing() -> None:
    matcher = StopMatcher(StopSet(["STOP"]))
    assert matcher.feed("go ST") == ("go ", None)
    assert matcher.held == "ST"
    assert matcher.feed("AY") == ("STAY", None)
    assert matcher.feed("STO") == ("", None)
    assert matcher.flush() == "STO"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopSet([""])


def test_work_is_linear_in_the_text() -> None:
    """The automaton follows as many failure links as it made steps, whatever the stop strings look like."""
    stops = StopSet(["a" * 4000 + "b"])
    followed = 0

    class Counting(list[int]):
        def __getitem__(self, index: int) -> int:  # type: ignore[override]
            nonlocal followed
            followed += 1
            return super().__getitem__(index)

    stops.fail = Counting(stops.fail)
    matcher = StopMatcher(stops)
    for _ in range(20000):
        matcher.feed("a")
    assert followed <= 20000
