"""The corpus that Brook learns from must be right: its sums, its JSON, its tool calls and its splits."""

from __future__ import annotations

import itertools
import json
import random
import re
from typing import Any

import brook_chat as chat
import brook_corpus
import brook_pools
import brook_tasks as tasks
import brook_tools as tools
import evaluate
import pytest


def _pools(seed: int, split: str = brook_pools.TRAIN) -> brook_pools.Pools:
    return brook_pools.Pools(random.Random(seed), split)


@pytest.mark.parametrize("split", [brook_pools.TRAIN, brook_pools.HELD_OUT])
def test_sums_are_right_and_keep_to_their_split(split: str) -> None:
    p = _pools(1, split)
    seen = 0
    for _ in range(1500):
        turn = tasks.arithmetic(p)
        for a, sign, b, result in re.findall(r"(\d+) ([+-]) (\d+) = (-?\d+)", turn.assistant):
            assert int(result) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
            assert tasks.arithmetic_split(int(a), int(b), sign) == split
            seen += 1
    assert seen > 800


def test_sums_are_split_alike_in_both_orders() -> None:
    assert all(tasks.arithmetic_split(a, b, "+") == tasks.arithmetic_split(b, a, "+") for a in range(99) for b in range(99))


def test_negative_differences_occur() -> None:
    p = _pools(2)
    assert any(int(tasks.two_digit(p, "-").check) < 0 for _ in range(50))


def test_counting_counts_evenly() -> None:
    p = _pools(3)
    for _ in range(300):
        numbers = [int(part) for part in tasks.counting(p).assistant.split(", ")]
        assert len({two - one for one, two in itertools.pairwise(numbers)}) <= 1


def test_a_list_has_as_many_different_entries_as_asked_for() -> None:
    p = _pools(4)
    for _ in range(300):
        turn = tasks.listing(p)
        entries = re.split(r"\n|, | and ", turn.assistant)
        asked = [word for word in re.findall(r"\w+", turn.user.lower()) if word in tasks.NUMBER_WORDS or word.isdigit()]
        assert str(len(entries)) in asked or tasks.NUMBER_WORDS[len(entries)] in asked
        assert len(set(entries)) == len(entries)


def test_rewriting_gives_the_text_back_changed() -> None:
    p = _pools(5)
    for _ in range(500):
        turn = tasks.rewriting(p)
        if re.match("(Upper|Write in capitals|Rewrite in all caps)", turn.user):
            assert turn.assistant == turn.assistant.upper()
            assert turn.assistant.lower() in turn.user.lower()
        if turn.user.startswith(("Repeat", "Echo", "Copy")):
            assert turn.assistant in turn.user


def test_a_planted_fact_stands_once_before_its_question() -> None:
    corpus = brook_corpus.Corpus(6)
    for _ in range(60):
        one = corpus.recall(60, sentences=30)
        text = chat.render(one.messages[:-1])
        assert one.expected in text
        assert one.expected in one.messages[-1]["content"]


def test_held_out_facts_are_never_trained() -> None:
    trained = {one.answer for one in tasks.facts(_pools(7), 120)}
    held_out = {one.answer for one in tasks.facts(_pools(8, brook_pools.HELD_OUT), 120)}
    assert not trained & held_out
    assert all(brook_pools.split_of(answer) == brook_pools.HELD_OUT for answer in held_out)


@pytest.mark.parametrize("split", [brook_pools.TRAIN, brook_pools.HELD_OUT])
def test_json_fits_its_schema(split: str) -> None:
    p = _pools(9, split)
    for _ in range(100):
        turn = tools.json_task(p)
        answer = json.loads(turn.messages[-1]["content"])
        assert answer == turn.expected
        assert turn.schema is not None
        assert tools.fits(answer, turn.schema)


def test_the_schema_check_can_say_no() -> None:
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    assert tools.fits({"age": 3}, schema)
    assert not tools.fits({"age": True}, schema)
    assert not tools.fits({"age": "3"}, schema)
    assert not tools.fits({}, schema)
    assert not tools.fits({"age": 3, "name": "x"}, schema)


def _check_calls(messages: list[dict[str, Any]], offered: list[dict[str, Any]]) -> int:
    signatures = {tool["function"]["name"]: tool["function"]["parameters"] for tool in offered}
    count = 0
    for message in messages:
        for call in message.get("tool_calls") or ():
            function = call["function"]
            assert tools.fits(function["arguments"], {"required": (), **signatures[function["name"]]})
            count += 1
        if message.get("tool_calls"):
            parsed = chat.parse_tool_calls(chat.assistant_text(message))
            assert parsed == [{"name": c["function"]["name"], "arguments": c["function"]["arguments"]} for c in message["tool_calls"]]
    return count


def test_tool_calls_are_valid_and_offered() -> None:
    corpus = brook_corpus.Corpus(10)
    calls = 0
    for _ in range(400):
        one = corpus.tool_use()
        assert one.tools
        calls += _check_calls(one.messages, one.tools)
    assert calls > 300


def test_two_tools_offered_together_never_do_the_same() -> None:
    p = _pools(11)
    for _ in range(200):
        offered = tools.offers(p, 5)
        assert len({offer.sort for offer in offered}) == len({offer.name for offer in offered}) == 5


@pytest.mark.parametrize("name", list(brook_corpus.CASES))
def test_the_right_answer_of_every_case_is_judged_right(name: str) -> None:
    kind = brook_corpus.CASES[name][0]
    drawn = brook_corpus.cases(name, 8)
    assert drawn == brook_corpus.cases(name, 8)
    for case in drawn:
        assert evaluate.right(kind, chat.assistant_text(case.messages[-1]), case)
        assert not evaluate.right(kind, "<tool_call>\nnot this\n</tool_call>", case)


def test_a_seed_gives_the_same_corpus_again() -> None:
    one, two = brook_corpus.Corpus(12), brook_corpus.Corpus(12)
    assert [one.draw(500) for _ in range(50)] == [two.draw(500) for _ in range(50)]


def test_segments_join_to_the_rendered_text() -> None:
    corpus = brook_corpus.Corpus(13)
    for _ in range(100):
        one = corpus.draw(800)
        pieces = chat.segments(one.messages, one.tools)
        assert "".join(text for text, _ in pieces) == chat.render(one.messages, one.tools)
        assert all(text.endswith(chat.END) for text, written in pieces if written)


@pytest.mark.parametrize("text", ["<tool_call>\n{}\n</tool_call>", '<tool_call>\n{"name": "x"}\n</tool_call>', "<tool_call>\n[1]"])
def test_a_broken_call_is_no_call(text: str) -> None:
    assert chat.parse_tool_calls(text) is None
