"""Tokens in, tokens out, against what /v1/completions says of the same prompt; and, of a real server, whose end is told how."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

PATH = "/inference/v1/generate"


def post(server: Any, path: str, **body: Any) -> Any:
    reply = server.client.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def streamed(server: Any, path: str, **body: Any) -> list[Any]:
    lines = server.client.post(path, json={**body, "stream": True}).text.splitlines()
    found = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert found.pop() == "[DONE]"
    return [json.loads(line) for line in found]


@pytest.fixture(scope="module")
def prompt(server: Any) -> list[int]:
    turns = [{"role": "user", "content": "Count from 3 to 9."}]
    return post(server, "/tokenize", messages=turns)["tokens"]  # type: ignore[no-any-return]


def test_tokens_and_their_log_probabilities_are_those_of_completions(server: Any, prompt: list[int]) -> None:
    same: dict[str, Any] = {"max_tokens": 12, "temperature": 0, "logprobs": 2, "prompt_logprobs": 1}
    told = post(server, "/v1/completions", prompt=prompt, return_token_ids=True, return_tokens_as_token_ids=True, **same)["choices"][0]
    reply = post(server, PATH, token_ids=prompt, sampling_params=same)
    [choice] = reply["choices"]
    assert choice["token_ids"] == told["token_ids"]
    content = choice["logprobs"]["content"]
    assert [one["token"] for one in content] == told["logprobs"]["tokens"] == [f"token_id:{token}" for token in told["token_ids"]]
    assert [one["logprob"] for one in content] == told["logprobs"]["token_logprobs"]
    for one, top in zip(content, told["logprobs"]["top_logprobs"], strict=True):
        assert {alternative["token"]: alternative["logprob"] for alternative in one["top_logprobs"]}.items() <= top.items()
    before = [one and {id: (p["logprob"], p["rank"]) for id, p in one.items()} for one in told["prompt_logprobs"]]
    assert [one and {id: (p["logprob"], p["rank"]) for id, p in one.items()} for one in reply["prompt_logprobs"]] == before
    assert reply["usage"]["prompt_tokens"] == len(prompt)


def test_a_stream_has_the_same_tokens(server: Any, prompt: list[int]) -> None:
    asked = {"token_ids": prompt, "sampling_params": {"n": 2, "seed": 3, "max_tokens": 20, "logprobs": 0}}
    whole = post(server, PATH, **asked)["choices"]
    for index in (0, 1):
        mine = [choice for chunk in streamed(server, PATH, **asked) for choice in chunk["choices"] if choice["index"] == index]
        assert [token for choice in mine for token in choice["token_ids"]] == whole[index]["token_ids"]
        assert [one for choice in mine if choice["logprobs"] for one in choice["logprobs"]["content"]] == whole[index]["logprobs"][
            "content"
        ]
        assert mine[-1]["finish_reason"] == whole[index]["finish_reason"]


def test_a_grammar_holds_without_text(server: Any, prompt: list[int]) -> None:
    sampling = {"structured_outputs": {"choice": ["water", "ice and steam"]}}
    [choice] = post(server, PATH, token_ids=prompt, sampling_params=sampling)["choices"]
    text = post(server, "/detokenize", tokens=choice["token_ids"][:-1])["prompt"]
    assert (text in ("water", "ice and steam"), choice["finish_reason"]) == (True, "stop")


def test_who_ended_an_answer_is_told_by_every_api(server: Any, prompt: list[int]) -> None:
    """Whole and streamed: a stop text, a stop token, and the model's own end, which is nobody's."""
    asked: dict[str, Any] = {"prompt": prompt, "temperature": 0, "max_tokens": 60}
    plain = post(server, "/v1/completions", return_token_ids=True, **asked)["choices"][0]
    assert (plain["finish_reason"], plain["stop_reason"], plain["matched_stop"]) == ("stop", None, None)
    text, token = plain["text"][2:5], plain["token_ids"][4]
    turns = [{"role": "user", "content": "Count from 3 to 9."}]
    for more, by in (({"stop": ["never said", text]}, text), ({"stop_token_ids": [token]}, token), ({}, None)):
        for path, body in (("/v1/completions", asked), ("/v1/chat/completions", {"messages": turns, "temperature": 0})):
            whole = post(server, path, **body, **more)["choices"][0]
            *_, last = streamed(server, path, **body, **more)
            for choice in (whole, last["choices"][0]):
                assert (choice["finish_reason"], choice["stop_reason"], choice["matched_stop"]) == ("stop", by, by)
    [choice] = post(server, PATH, token_ids=prompt, sampling_params={"temperature": 0, "stop_token_ids": [token]})["choices"]
    assert (choice["token_ids"][-1], choice["stop_reason"]) == (token, token)
    message = post(server, "/v1/messages", model="brook", max_tokens=60, temperature=0, messages=turns, stop_sequences=[text])
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", text)


def test_its_own_id_ends_it(server: Any, prompt: list[int]) -> None:
    said: list[Any] = []

    def ask() -> None:
        sampling = {"max_tokens": 3000, "ignore_eos": True}
        said.append(server.client.post(PATH, json={"token_ids": prompt, "request_id": "mine-7", "sampling_params": sampling}))

    thread = threading.Thread(target=ask)
    thread.start()
    assert server.until(lambda: server.client.delete("/v1/requests/mine-7").status_code == 200)
    thread.join(30)
    assert (said[0].status_code, said[0].json()["error"]["code"]) == (499, "cancelled")
