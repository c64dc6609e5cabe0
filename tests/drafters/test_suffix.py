"""The drafter "suffix" against a search that looks at everything."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.protocol.errors import ConfigError
from penstock.core.protocol.speculation import DraftConfig
from penstock.plugins.drafters.suffix import AT_ONCE, BREAK, WORK, Automaton, Suffix

A, B = "a" * 32, "b" * 32


def column(tokens: list[int]) -> np.ndarray:
    return np.array(tokens, np.int32)


def longest(text: list[int], said: list[int]) -> tuple[int, int]:
    """The longest suffix of `said` in `text`, and where it ends first; in `said` itself it must end earlier."""
    for length in range(len(said), 0, -1):
        wanted = said[len(said) - length :]
        for end in range(length, len(text) + 1):
            if text[end - length : end] == wanted and not (text is said and end == len(said)):
                return length, end - 1
    return 0, -1


@given(st.lists(st.integers(0, 3), max_size=40))
@settings(max_examples=200, deadline=None)
def test_the_longest_repeated_suffix_is_known_after_every_token(tokens: list[int]) -> None:
    automaton, said = Automaton(), []
    for token in tokens:
        automaton.add(token)
        said.append(token)
        assert automaton.repeated() == longest(said, said)


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=4),
    st.lists(st.integers(0, 2), max_size=25),
    st.data(),
)
@settings(max_examples=150, deadline=None)
def test_a_walk_never_claims_what_is_not_there_also_while_texts_are_added(
    texts: list[list[int]], said: list[int], data: st.DataObject
) -> None:
    automaton = Automaton()
    before: list[int] = []
    walked: list[int] = []
    state = matched = 0
    grown = False
    for token in said:
        if texts and data.draw(st.booleans()):
            more = [*texts.pop(), BREAK]
            before += more
            grown = bool(walked)
            for one in more:
                automaton.add(one)
        state, matched = automaton.walk(state, matched, token)
        walked.append(token)
        if matched:
            end = automaton.first[state] + 1
            assert before[end - matched : end] == walked[len(walked) - matched :]
        if not grown:
            assert (matched, automaton.first[state] if matched else -1) == longest(before, walked)


def test_it_proposes_what_came_after_in_the_request_itself() -> None:
    drafter = Suffix(DraftConfig(method="suffix"))
    drafter.begin(1, column([5, 1, 2, 3, 4, 6, 7, 8, 9]), A)
    assert drafter.propose(1, 8).tolist() == []
    drafter.extend(1, column([1, 2]))
    assert drafter.propose(1, 8).tolist() == [], "two are too few"
    drafter.extend(1, column([3]))
    assert drafter.propose(1, 8).tolist() == [4, 6, 7, 8, 9, 1], "twice as many as match"
    assert drafter.propose(1, 2).tolist() == [4, 6]
    drafter.end(1)


def test_past_answers_are_their_tenants_own() -> None:
    drafter = Suffix(DraftConfig(method="suffix", prompt_lookup_min=2))
    drafter.begin(1, column([1, 2]), A)
    drafter.extend(1, column([30, 31, 32, 33]))
    drafter.end(1)
    drafter.work()
    for seq, tenant, found in ((2, A, [32, 33]), (3, B, [])):
        drafter.begin(seq, column([9, 30, 31]), tenant)
        assert drafter.propose(seq, 8).tolist() == found, "not beyond the answer's end"
        drafter.end(seq)


def test_memory_is_bounded() -> None:
    options = {"past_tokens": 50, "tenants": 3, "own_tokens": 10}
    drafter = Suffix(DraftConfig(method="suffix", options=options))
    rng = random.Random(1)
    for seq in range(40):
        drafter.begin(seq, column([rng.randrange(9) for _ in range(100)]), f"{seq % 7}")
        drafter.extend(seq, column([rng.randrange(9) for _ in range(20)]))
        assert len(drafter._sequences[seq].own.tokens) == 30
        drafter.end(seq)
        drafter.work()
    assert len(drafter._answers) == 3
    assert all(len(past.automaton.tokens) == past.planned <= 51 for past in drafter._answers.values())
    assert not drafter._sequences
    assert not drafter._old
    nothing = Suffix(DraftConfig(method="suffix", options={"past_tokens": 0}))
    nothing.begin(1, column([1, 2, 3]), A)
    nothing.extend(1, column([4]))
    nothing.end(1)
    assert not nothing._answers


def test_no_step_waits_for_a_long_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted: tokens that automata take, and states that are given back, between two steps."""
    added, freed = [0], [0]
    add, shrink = Automaton.add, Automaton.shrink

    def counting(self: Automaton, token: int) -> None:
        added[0] += 1
        add(self, token)

    def forgetting(self: Automaton, states: int) -> int:
        freed[0] += (gone := shrink(self, states))
        return gone

    monkeypatch.setattr(Automaton, "add", counting)
    monkeypatch.setattr(Automaton, "shrink", forgetting)
    drafter, rng = Suffix(DraftConfig(method="suffix", options={"past_tokens": 6000})), random.Random(2)
    text = [rng.randrange(50) for _ in range(4096)]
    counts: list[int] = []

    def step(ask: int = -1) -> list[int]:
        drafter.work()
        found = drafter.propose(ask, 8).tolist() if ask >= 0 else []
        counts.append(added[0])
        assert freed[0] <= 4 * WORK
        added[0] = freed[0] = 0
        return found

    for seq in range(3):
        drafter.begin(seq, column(text), A)
    drafter.extend(0, column(text[:5]))  # behind a prompt that is not learned yet
    steps = 0
    while not (drafts := step(0)):
        steps += 1
    assert drafts == text[5:13], "what it would have been at once"
    assert steps == 4096 // WORK
    drafter.extend(0, column(text[5:9]))
    assert step(0) == text[9:17]
    drafter.extend(1, column(text))
    while drafter._behind:
        step()
    for seq in range(3):
        drafter.end(seq)
        step()
    while drafter._later or drafter._old:
        step()
    assert max(counts) <= WORK + AT_ONCE
    drafter.begin(9, column(text[100:104]), A)
    drafter.extend(9, column(text[104:106]))
    assert step(9) == text[106:114], "of what was answered before"


def test_answers_that_come_faster_than_they_are_learned() -> None:
    """The oldest are passed over, and so are those that were replaced meanwhile; a sequence that still reads those finds what is there."""
    drafter = Suffix(DraftConfig(method="suffix", prompt_lookup_min=2, options={"past_tokens": 400}))
    drafter.begin(0, column([1]), A)
    drafter.extend(0, column([5, 6, 7, 8]))
    drafter.end(0)
    drafter.work()
    drafter.begin(1, column([2]), A)
    for seq in range(2, 12):
        drafter.begin(seq, column([3]), A)
        drafter.extend(seq, column([seq] * 60))
        drafter.end(seq)
        assert drafter._kept == sum(len(tokens) for _, tokens in drafter._later) <= 400
    drafter.extend(1, column([5, 6]))
    assert drafter.propose(1, 8).tolist() == [7, 8]
    for _ in range(9):
        drafter.work()
    assert (drafter._kept, len(drafter._later), len(drafter._old)) == (0, 0, 0)
    assert drafter.propose(1, 8).tolist() == [7, 8], "its own past is kept while it is read"
    drafter.end(1)
    drafter.work()
    assert not drafter._old


@pytest.mark.parametrize("options", [{"own": 3}, {"tenants": -1}, {"tenants": True}, {"past_tokens": "9"}])
def test_options_that_are_none_are_refused_by_name(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=rf"options\.{next(iter(options))}.*own_tokens, past_tokens, tenants"):
        Suffix(DraftConfig(method="suffix", options=options))
