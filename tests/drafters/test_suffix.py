"""The drafter "suffix" against a search that looks at everything, with automata in C and in Python."""

from __future__ import annotations

import random
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.protocol.errors import ConfigError
from penstock.core.protocol.speculation import DraftConfig
from penstock.kernels.suffixes import Suffixes, reference, suffixes
from penstock.plugins.drafters.suffix import AT_ONCE, FACTOR, Suffix

A, B = "a" * 32, "b" * 32
PYTHON = Suffixes(reference.Automaton, reference.Readers, 256)
BOTH = pytest.mark.parametrize("by", [PYTHON, suffixes()], ids=["python", "native"])


def column(tokens: list[int]) -> np.ndarray:
    return np.array(tokens, np.int32)


def longest(text: list[int], said: list[int], own: bool) -> tuple[int, list[int]]:
    """The longest suffix of `said` in `text` and what follows the first place of it; in `own` text it must end earlier."""
    for length in range(len(said), 0, -1):
        wanted = said[len(said) - length :]
        for end in range(length, len(text) + (not own)):
            if text[end - length : end] == wanted:
                return length, text[end:]
    return 0, []


class Brute:
    """The drafter as its documentation has it, for sequences one after the other."""

    def __init__(self, past_tokens: int, least: int) -> None:
        self.past_tokens, self.least = past_tokens, least
        self.answers: dict[str, list[int]] = {}

    def propose(self, said: list[int], tenant: str, most: int) -> list[int]:
        mine, theirs = longest(said, said, True), longest(self.answers.get(tenant, []), said, False)
        length, after = theirs if theirs[0] > mine[0] else mine
        found = after[: min(most, FACTOR * length)] if length >= self.least else []
        return found[: found.index(-1)] if -1 in found else found

    def end(self, answer: list[int], tenant: str) -> None:
        answer = answer[-self.past_tokens :]
        if answer:
            there = self.answers.get(tenant, [])
            kept = there if len(there) + len(answer) <= self.past_tokens else []
            self.answers[tenant] = [*kept, *answer, -1]


def settle(drafter: Suffix) -> None:
    while drafter._behind or drafter._later or drafter._old:
        drafter.work()


@BOTH
@given(
    requests=st.lists(
        st.tuples(
            st.sampled_from([A, B]),
            st.lists(st.integers(0, 3), min_size=1, max_size=90),
            st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), max_size=8),
        ),
        max_size=6,
    ),
    past_tokens=st.sampled_from([0, 12, 1000]),
    least=st.integers(1, 4),
    own_tokens=st.sampled_from([5, 4096]),
)
@settings(max_examples=120, deadline=None)
def test_drafts_are_those_of_a_search_that_looks_at_everything(
    by: Suffixes, requests: list[tuple[str, list[int], list[list[int]]]], past_tokens: int, least: int, own_tokens: int
) -> None:
    options = {"past_tokens": past_tokens, "own_tokens": own_tokens}
    drafter = Suffix(DraftConfig(method="suffix", prompt_lookup_min=least, options=options), by)
    brute = Brute(past_tokens, least)
    for seq, (tenant, prompt, steps) in enumerate(requests):
        drafter.begin(seq, column(prompt), tenant)
        said, answer = prompt[-own_tokens:], list[int]()
        for step in steps:
            settle(drafter)
            assert drafter.propose(seq, 8).tolist() == brute.propose(said, tenant, 8)
            drafter.extend(seq, column(step))
            said, answer = said + step, answer + step
        drafter.end(seq)
        settle(drafter)
        if past_tokens:
            brute.end(answer, tenant)


@BOTH
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_many_rows_at_once_have_what_each_would_have_alone(by: Suffixes, data: st.DataObject) -> None:
    """Sequences begin, go on and end at any time; those whose tokens wait have none."""
    together, alone = (Suffix(DraftConfig(method="suffix", prompt_lookup_min=1), by) for _ in range(2))
    tokens = st.lists(st.integers(0, 3), min_size=1, max_size=4)
    live: list[int] = []
    for seq in range(data.draw(st.integers(1, 8))):
        prompt = data.draw(tokens) * data.draw(st.sampled_from([1, 40]))
        for drafter in (together, alone):
            drafter.begin(seq, column(prompt), A if seq % 3 else B)
        live.append(seq)
        news = {one: data.draw(tokens) for one in live if data.draw(st.booleans())}
        if news:
            said = list(chain.from_iterable(news.values()))
            together.extend_many(np.array(list(news)), column([len(mine) for mine in news.values()]), column(said))
        for one, mine in news.items():
            alone.extend(one, column(mine))
        if data.draw(st.booleans()):
            gone = live.pop(data.draw(st.integers(0, len(live) - 1)))
            together.end(gone)
            alone.end(gone)
        if data.draw(st.booleans()):
            together.work()
            alone.work()
        most = column([data.draw(st.integers(1, 8)) for _ in live])
        counts, found = together.propose_many(np.array(live, np.int64), most)
        each = [alone.propose(one, wanted).tolist() for one, wanted in zip(live, most.tolist(), strict=True)]
        assert (counts.tolist(), found.tolist()) == ([len(one) for one in each], list(chain.from_iterable(each)))


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
        assert drafter._sequences[seq].own.since(0).size == 30
        drafter.end(seq)
        drafter.work()
    assert len(drafter._answers) == 3
    assert all(len(past.automaton) == past.planned <= 51 for past in drafter._answers.values())
    assert not drafter._sequences
    assert not drafter._old
    nothing = Suffix(DraftConfig(method="suffix", options={"past_tokens": 0}))
    nothing.begin(1, column([1, 2, 3]), A)
    nothing.extend(1, column([4]))
    nothing.end(1)
    assert not nothing._answers


class Counted:
    """What automata take, and give back, between two steps."""

    added = freed = 0

    @classmethod
    def suffixes(cls) -> Suffixes:
        cls.added = cls.freed = 0

        class Automaton(reference.Automaton):
            def add(self, token: int) -> None:
                cls.added += 1
                super().add(token)

            def shrink(self, states: int) -> int:
                gone = super().shrink(states)
                cls.freed += gone
                return gone

        return Suffixes(Automaton, reference.Readers, 256)


def test_no_step_waits_for_a_long_text() -> None:
    by = Counted.suffixes()
    drafter, rng = Suffix(DraftConfig(method="suffix", options={"past_tokens": 6000}), by), random.Random(2)
    text = [rng.randrange(50) for _ in range(4096)]
    counts: list[int] = []

    def step(ask: int = -1) -> list[int]:
        drafter.work()
        found = drafter.propose(ask, 8).tolist() if ask >= 0 else []
        counts.append(Counted.added)
        assert Counted.freed <= 4 * by.quick
        Counted.added = Counted.freed = 0
        return found

    for seq in range(3):
        drafter.begin(seq, column(text), A)
    drafter.extend(0, column(text[:5]))  # behind a prompt that is not learned yet
    steps = 0
    while not (drafts := step(0)):
        steps += 1
    assert drafts == text[5:13], "what it would have been at once"
    assert steps == 4096 // by.quick
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
    assert max(counts) <= by.quick + AT_ONCE
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
        assert drafter._kept == sum(tokens.size for _, tokens in drafter._later) <= 400
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
