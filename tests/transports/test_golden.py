"""Whole conversations with the API, byte for byte: each file of golden/ is a request and its reply, without what differs every time.

PENSTOCK_UPDATE_SNAPSHOT=1 writes the files anew.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
from edge_kit import Edge, delta, events, finished, full_script

from penstock.core.protocol.messages import Message, Submit

GOLDEN = Path(__file__).parent / "golden"
UPDATE = bool(os.environ.get("PENSTOCK_UPDATE_SNAPSHOT"))
STREAM: dict[str, Any] = {"stream": True}
USAGE: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
EVERYTHING: dict[str, dict[str, Any]] = {
    "chat": {"n": 2, "logprobs": True, "top_logprobs": 1, "return_token_ids": True},
    "completions": {"n": 2, "logprobs": 1, "return_token_ids": True, "echo": True},
}
BODIES: dict[str, dict[str, Any]] = {
    "chat": {"model": "brook", "messages": [{"role": "user", "content": "hi"}]},
    "completions": {"model": "brook", "prompt": "hi"},
}
PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
METRICS = {"x-include-metrics": "1"}
FAILS, STALLS = 13, 14
"""Seeds with which the engine fails, and with which it brings one token and no more."""

CASES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "whole": ({}, {}),
    "stream": (STREAM, {}),
    "usage": (USAGE, {}),
    "metrics-whole": ({}, METRICS),
    "metrics-stream": (USAGE, METRICS),
    "failed-whole": ({"seed": FAILS}, {}),
    "failed-stream": (STREAM | {"seed": FAILS}, {}),
    "refused": ({"logits_processors": ["x"]}, {}),
    "wrong": ({"temperature": -1}, {}),
}
"""name -> (fields beside the smallest body, headers)."""


def failure(key: int) -> list[Message]:
    extra = {"error": "The engine failed.", "error_code": "engine_failure"}
    return [delta({"key": key, "tokens": [], "reason": "error", "extra": extra}), finished(key)]


def script(submit: Submit) -> list[Message]:
    """All that was asked for, but for those seeds."""
    if submit.sampling.seed == FAILS:
        return failure(submit.key)
    if submit.sampling.seed == STALLS:
        return [delta({"key": submit.key, "text": "A"})]
    return full_script(submit)


@pytest.fixture(scope="module")
def edge(shared_edge: Edge) -> Edge:
    shared_edge.text.script = script
    return shared_edge


def transcript(path: str, body: dict[str, Any], headers: dict[str, str], reply: httpx.Response, text: str) -> str:
    """What the file holds. Ids, dates and times are masked."""
    text = re.sub(r'"id":"(chatcmpl|cmpl)-[0-9a-f]{33}"', r'"id":"\1-ID"', text)
    text = re.sub(r'"created":\d{10}', '"created":CREATED', text)
    text = re.sub(r'("total_ms"|"time_to_first_token_ms"):-?[\d.e+-]+', r"\1:TIME", text)
    return "\n".join(
        [
            f"POST {path}",
            *(f"{name}: {value}" for name, value in headers.items()),
            json.dumps(body),
            "",
            str(reply.status_code),
            f"content-type: {reply.headers['content-type']}",
            text,
        ]
    )


def compare(api: str, name: str, got: str) -> None:
    file = GOLDEN / f"{api}-{name}.txt"
    if UPDATE:
        file.write_text(got, encoding="utf-8")
    assert got == file.read_text(encoding="utf-8")


def check(edge: Edge, api: str, name: str, fields: dict[str, Any], headers: dict[str, str]) -> None:
    body = BODIES[api] | fields
    reply = edge.kept.post(PATHS[api], json=body, headers=headers)
    compare(api, name, transcript(PATHS[api], body, headers, reply, reply.text))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("api", PATHS)
def test_the_reply_is_the_golden_one(edge: Edge, api: str, name: str) -> None:
    check(edge, api, name, *CASES[name])


@pytest.mark.parametrize("api", PATHS)
def test_everything_at_once(edge: Edge, api: str) -> None:
    check(edge, api, "everything-whole", EVERYTHING[api], METRICS)
    options = {"include_usage": True, "continuous_usage_stats": True}
    check(edge, api, "everything-stream", EVERYTHING[api] | STREAM | {"stream_options": options}, METRICS)


def test_tokens_go_in_and_tokens_come_out(edge: Edge) -> None:
    check(edge, "completions", "tokens", {"prompt": [1, 2, 3], "return_token_ids": True}, {})


@pytest.mark.parametrize("api", PATHS)
def test_a_stream_that_breaks_ends_with_an_error_and_without_done(edge: Edge, api: str) -> None:
    body = BODIES[api] | STREAM | {"seed": STALLS}
    with edge.kept.stream("POST", PATHS[api], json=body) as reply:
        pieces = reply.iter_text()
        text = next(pieces)
        (submit,) = [one for one in edge.text.wait_for(Submit) if one.sampling.seed == STALLS and one.kind[:4] == api[:4]]
        edge.text.send(*failure(submit.key))
        text += "".join(pieces)
    compare(api, "broken-stream", transcript(PATHS[api], body, {}, reply, text))


def test_no_file_is_left_over() -> None:
    names = [*CASES, "everything-whole", "everything-stream", "broken-stream"]
    assert {file.name for file in GOLDEN.iterdir()} == {f"{api}-{name}.txt" for api in PATHS for name in names} | {"completions-tokens.txt"}


@pytest.mark.parametrize("name", ["stream", "usage", "metrics-stream", "everything-stream"])
@pytest.mark.parametrize("api", PATHS)
def test_what_strict_clients_ask_of_a_stream(api: str, name: str) -> None:
    """Of each choice one chunk ends it, which says nothing else, and nothing comes after it; a role comes first and once."""
    text = (GOLDEN / f"{api}-{name}.txt").read_text(encoding="utf-8")
    chunks = events(text[text.index("data: ") :].replace("CREATED", "0").replace("TIME", "0"))
    assert chunks.pop() == "[DONE]"
    assert name == "stream" or chunks[-1]["choices"] == []
    said: Counter[int] = Counter()
    ended: set[int] = set()
    for chunk in chunks:
        for choice in chunk["choices"]:
            index = choice["index"]
            assert index not in ended
            if choice["finish_reason"] is not None:
                ended.add(index)
                assert not choice.get("text")
                assert not choice.get("delta")
                assert choice["logprobs"] is None
                assert "token_ids" not in choice
            elif api == "chat":
                assert ("role" in choice["delta"]) == (said[index] == 0)
            said[index] += 1
    assert ended == said.keys() != set()


def test_usage_is_complete_wherever_there_is_one() -> None:
    texts = [file.read_text(encoding="utf-8") for file in GOLDEN.iterdir()]
    usages = [json.JSONDecoder().raw_decode(text, at.end())[0] for text in texts for at in re.finditer(r'"usage":(?=\{)', text)]
    assert len(usages) > 20
    whole = 0
    for one in usages:
        assert one["total_tokens"] == one["prompt_tokens"] + one["completion_tokens"]
        assert one["prompt_tokens_details"].keys() == {"cached_tokens"}
        details = one.get("completion_tokens_details")  # of a choice that still goes on, nobody knows
        assert details is None or details.keys() == {"reasoning_tokens"}
        whole += details is not None
    assert whole > 10
