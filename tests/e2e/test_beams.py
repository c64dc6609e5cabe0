"""Beam searches over HTTP, with the demo model."""

from __future__ import annotations

import json
from typing import Any

import jsonschema_rs
import pytest

ASK = "The river is"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def search(server: Any, **fields: Any) -> Any:
    asked = {"prompt": ASK, "max_tokens": 24, "use_beam_search": True, "best_of": 4, "n": 3, "logprobs": 0, **fields}
    reply = server.client.post("/v1/completions", json=asked)
    assert reply.status_code == 200, reply.text
    return reply.json()


def scores(reply: Any, penalty: float) -> list[float]:
    """Sum of log-probabilities / length ** penalty. An end token that is not shown counts in both: only answers cut off by their length are exact."""
    found = []
    for choice in reply["choices"]:
        values = choice["logprobs"]["token_logprobs"]
        found.append(sum(values) / len(values) ** penalty)
    return found


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("early", [True, False, "never"])
def test_the_best_come_first(server: Any, penalty: float, early: Any) -> None:
    reply = search(server, length_penalty=penalty, early_stopping=early, ignore_eos=True)
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
    assert {choice["finish_reason"] for choice in reply["choices"]} == {"length"}
    assert len({choice["text"] for choice in reply["choices"]}) == 3
    assert scores(reply, penalty) == sorted(scores(reply, penalty), reverse=True)
    assert reply["usage"]["completion_tokens"] == 3 * 24
    greedy = search(server, use_beam_search=False, best_of=1, n=1, temperature=0, ignore_eos=True)
    assert scores(reply, 0.0)[0] >= scores(greedy, 0.0)[0] - 1e-3


def test_early_stopping_and_length_penalty_say_which_answers_win(server: Any) -> None:
    long, short = (search(server, n=1, length_penalty=penalty, max_tokens=60) for penalty in (4.0, -4.0))
    assert short["usage"]["completion_tokens"] <= long["usage"]["completion_tokens"]


@pytest.mark.parametrize("more", [{}, {"guided_regex": "[a-z]{3,8}( [a-z]{2,8}){1,3}\\."}])
def test_a_stream_is_the_whole_reply(server: Any, more: dict[str, Any]) -> None:
    whole = search(server, **more)
    asked = {"prompt": ASK, "max_tokens": 24, "use_beam_search": True, "best_of": 4, "n": 3, "stream": True, **more}
    text: dict[int, str] = {}
    reasons: dict[int, str] = {}
    with server.client.stream("POST", "/v1/completions", json=asked) as reply:
        assert reply.status_code == 200
        for line in reply.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                for choice in json.loads(line[6:])["choices"]:
                    text[choice["index"]] = text.get(choice["index"], "") + choice["text"]
                    if choice["finish_reason"]:
                        reasons[choice["index"]] = choice["finish_reason"]
    assert [text[i] for i in range(3)] == [choice["text"] for choice in whole["choices"]]
    assert [reasons[i] for i in range(3)] == [choice["finish_reason"] for choice in whole["choices"]]


def test_every_answer_of_a_search_obeys(server: Any) -> None:
    check = jsonschema_rs.validator_for(SCHEMA)
    asked = {
        "messages": [{"role": "user", "content": "Where is Anna from, and how old is she? Answer in JSON."}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}},
        "max_tokens": 120,
        "use_beam_search": True,
        "n": 3,
        "best_of": 4,
    }
    reply = server.client.post("/v1/chat/completions", json=asked)
    assert reply.status_code == 200, reply.text
    texts = [choice["message"]["content"] for choice in reply.json()["choices"] if choice["finish_reason"] == "stop"]
    assert texts
    assert len(set(texts)) == len(texts)
    for text in texts:
        assert check.is_valid(json.loads(text)), text
    again = server.client.post("/v1/chat/completions", json=asked).json()
    assert [choice["message"] for choice in again["choices"]] == [choice["message"] for choice in reply.json()["choices"]]


def test_choices(server: Any) -> None:
    words = ["left", "right", "up", "down", "water"]
    reply = search(server, guided_choice=words, n=4, best_of=5)
    said = [choice["text"] for choice in reply["choices"]]
    assert set(said) <= set(words)  # one that can be spelt in several tokens may be there several times
    assert {choice["finish_reason"] for choice in reply["choices"]} == {"stop"}


def test_answers_that_the_grammar_does_not_have_are_errors_that_say_so(server: Any) -> None:
    *there, last = search(server, n=12, best_of=12, guided_choice=["x", "y"])["choices"]
    assert {choice["text"] for choice in there if choice["finish_reason"] == "stop"} == {"x", "y"}
    assert last["finish_reason"] == "error"
    assert (last["error"]["type"], last["error"]["code"]) == ("invalid_request_error", "invalid_value")
    assert "answers that obey guided_choice" in last["error"]["message"]


def test_a_call_that_is_asked_for_can_be_searched(server: Any) -> None:
    tool = {"type": "function", "function": {"name": "age_of", "parameters": SCHEMA, "strict": True}}
    asked = {
        "messages": [{"role": "user", "content": "How old is Anna?"}],
        "tools": [tool],
        "tool_choice": "required",
        "max_tokens": 120,
        "use_beam_search": True,
        "n": 2,
    }
    reply = server.client.post("/v1/chat/completions", json=asked)
    assert reply.status_code == 200, reply.text
    check = jsonschema_rs.validator_for(SCHEMA)
    for choice in reply.json()["choices"]:
        if choice["finish_reason"] == "tool_calls":
            assert check.is_valid(json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"]))
        else:
            assert choice["finish_reason"] == "length"
