"""A choice that its own settings made impossible ends alone, and as the client's error; other failures end the request."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from edge_kit import Edge, delta, events, finished

from penstock.core.protocol.messages import Message, Submit

WHY = "allowed_token_ids and bad_words leave no token that could be drawn after 1 tokens of the answer."
BLAMED = {"error": WHY, "error_code": "invalid_value", "error_param": "allowed_token_ids"}
PATH = "/v1/completions"


def script(*, failing: set[int], prompts: set[str] | None = None, extra: dict[str, Any] = BLAMED) -> Any:
    """Choices say "Hello"; then those in `failing` (of the prompts in `prompts`) fail and the others stop."""

    def play(submit: Submit) -> list[Message]:
        rows = [{"key": submit.key, "choice": choice} for choice in range(submit.sampling.n)]
        ends: list[dict[str, Any]] = []
        for row in rows:
            fails = row["choice"] in failing and (prompts is None or submit.prompt in prompts)
            ends.append({**row, "tokens": [], "reason": "error", "extra": extra} if fails else {**row, "tokens": [], "reason": "stop"})
        return [delta(*[{**row, "text": "Hello", "tokens": [10]} for row in rows]), delta(*ends), finished(submit.key, output=len(rows))]

    return play


def at_once(submit: Submit) -> list[Message]:
    return [delta({"key": submit.key, "tokens": [], "reason": "error", "extra": BLAMED}), finished(submit.key, output=0)]


def ask(edge: Edge, **more: Any) -> Any:
    with edge.http() as http:
        return http.post(PATH, json={"model": "brook", "prompt": "a", **more})


def test_the_only_choice_is_the_request(edge: Edge) -> None:
    edge.text.script = script(failing={0})
    reply = ask(edge)
    assert reply.status_code == 400
    assert reply.json()["error"] == {"message": WHY, "type": "invalid_request_error", "param": "allowed_token_ids", "code": "invalid_value"}


@pytest.mark.parametrize("stream", [False, True])
def test_nothing_was_said_yet_so_it_is_a_plain_400(edge: Edge, stream: bool) -> None:
    edge.text.script = at_once
    reply = ask(edge, stream=stream)
    assert reply.status_code == 400
    assert reply.json()["error"]["message"] == WHY


def test_a_stream_that_had_begun_ends_with_the_error(edge: Edge) -> None:
    kept: list[Message] = []

    def play(submit: Submit) -> list[Message]:
        first, *rest = script(failing={0})(submit)
        kept.extend(rest)
        return [first]

    edge.text.script = play
    with edge.http() as http, http.stream("POST", PATH, json={"model": "brook", "prompt": "a", "stream": True}) as reply:
        assert reply.status_code == 200
        lines = reply.iter_lines()
        first = next(lines)
        edge.text.send(*kept)
        said = [msgspec.json.decode(line.removeprefix("data: ")) for line in [first, *lines] if line]
    assert said[-1]["error"]["type"] == "invalid_request_error"
    assert said[-1]["error"]["message"] == WHY
    assert "".join(c["text"] for e in said[:-1] for c in e["choices"]) == "Hello"
    assert not any(c["finish_reason"] for e in said[:-1] for c in e["choices"])


@pytest.mark.parametrize(("more", "failing", "prompts"), [({"n": 3}, {1}, None), ({"prompt": ["a", "b", "c"]}, {0}, {"b"})])
def test_neighbours_are_unhurt(edge: Edge, more: dict[str, Any], failing: set[int], prompts: set[str] | None) -> None:
    edge.text.script = script(failing=failing, prompts=prompts)
    whole = ask(edge, **more)
    assert whole.status_code == 200
    choices = whole.json()["choices"]
    assert [c["finish_reason"] for c in choices] == ["stop", "error", "stop"]
    assert [c["text"] for c in choices] == ["Hello"] * 3
    assert choices[1]["error"] == {"message": WHY, "type": "invalid_request_error", "param": "allowed_token_ids", "code": "invalid_value"}
    assert "error" not in choices[0]

    streamed = events(ask(edge, stream=True, **more).text)
    assert streamed[-1] == "[DONE]"
    ends = {c["index"]: c for e in streamed[:-1] for c in e["choices"] if c["finish_reason"]}
    assert {index: c["finish_reason"] for index, c in ends.items()} == {0: "stop", 1: "error", 2: "stop"}
    assert ends[1]["error"] == choices[1]["error"]


@pytest.mark.parametrize("stream", [False, True])
def test_in_chat_too(edge: Edge, stream: bool) -> None:
    edge.text.script = script(failing={1})
    with edge.http() as http:
        body = {"model": "brook", "messages": [{"role": "user", "content": "a"}], "n": 2, "stream": stream}
        reply = http.post("/v1/chat/completions", json=body)
    told = [c for e in events(reply.text)[:-1] for c in e["choices"]] if stream else reply.json()["choices"]
    [failed] = [choice for choice in told if "error" in choice]
    assert (failed["index"], failed["finish_reason"]) == (1, "error")
    assert failed["error"] == {"message": WHY, "type": "invalid_request_error", "param": "allowed_token_ids", "code": "invalid_value"}


@pytest.mark.parametrize("stream", [False, True])
def test_all_failed_is_a_failed_request(edge: Edge, stream: bool) -> None:
    edge.text.script = script(failing={0, 1})
    reply = ask(edge, n=2, stream=stream)
    assert reply.status_code == 400, "the stream had not begun to leave"
    assert (reply.json()["error"]["message"], reply.json()["error"]["code"]) == (WHY, "invalid_value")


@pytest.mark.parametrize("stream", [False, True])
def test_the_servers_fault_still_ends_everything(edge: Edge, stream: bool) -> None:
    edge.text.script = script(failing={1}, extra={"error": "boom", "error_code": "engine_failure"})
    reply = ask(edge, n=2, stream=stream)
    error = reply.json()["error"]
    assert reply.status_code == 500
    assert (error["message"], error["code"], error["type"]) == ("boom", "engine_failure", "server_error")
