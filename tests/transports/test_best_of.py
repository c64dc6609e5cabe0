"""best_of: more answers are drawn than the reply shows, and it shows the likeliest."""

from __future__ import annotations

from typing import Any

import pytest
from edge_kit import Edge, delta, finished

from penstock.core.protocol.messages import Message, Submit, TokenLogprobs

LIKELINESS = {0: [-3.0, -0.1], 1: [-0.5], 2: [-0.4, -0.4, -0.4], 3: [], 4: [-0.5]}
"""The tokens' log-probabilities, by choice."""
FAILED = 4


def positions(values: list[float]) -> list[TokenLogprobs]:
    return [TokenLogprobs(ids=[1], logprobs=[value], ranks=[1], texts=["x"], bytes_=[b"x"]) for value in values]


def script(submit: Submit) -> list[Message]:
    """Each choice says its number and the prompt."""
    rows: list[dict[str, Any]] = []
    for choice in range(submit.sampling.n):
        values = LIKELINESS[choice]
        row: dict[str, Any] = {"key": submit.key, "choice": choice, "text": f"{choice}{submit.prompt}", "tokens": [1] * len(values)}
        rows.append(row | {"extra": {"logprobs": positions(values)}, "reason": "stop"})
        if choice == FAILED:
            rows[-1] |= {"reason": "error", "extra": {"error": "No token is left.", "error_code": "invalid_value"}}
    return [delta(*rows), finished(submit.key, output=sum(map(len, LIKELINESS.values())))]


@pytest.fixture(scope="module")
def edge(shared_edge: Edge) -> Edge:
    shared_edge.text.script = script
    return shared_edge


def ask(edge: Edge, **fields: Any) -> dict[str, Any]:
    reply = edge.kept.post("/v1/completions", json={"prompt": "a", **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()  # type: ignore[no-any-return]


def test_the_likeliest_on_average_come_first_and_all_are_counted(edge: Edge) -> None:
    reply = ask(edge, n=2, best_of=4)
    assert [(choice["index"], choice["text"], choice["logprobs"]) for choice in reply["choices"]] == [(0, "2a", None), (1, "1a", None)]
    assert reply["usage"]["completion_tokens"] == 7


def test_each_prompt_has_its_own_best(edge: Edge) -> None:
    reply = ask(edge, prompt=["a", "b"], best_of=3)
    assert [choice["text"] for choice in reply["choices"]] == ["2a", "2b"]


def test_one_that_failed_or_says_nothing_is_the_last_to_be_shown(edge: Edge) -> None:
    reply = ask(edge, n=4, best_of=5)
    assert [choice["text"] for choice in reply["choices"]] == ["2a", "1a", "0a", "3a"]
    assert all("error" not in choice for choice in reply["choices"])


def test_logprobs_that_were_asked_for_are_shown(edge: Edge) -> None:
    (choice,) = ask(edge, best_of=3, logprobs=1)["choices"]
    assert choice["logprobs"]["token_logprobs"] == [-0.4, -0.4, -0.4]
