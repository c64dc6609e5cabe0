"""/inference/v1/generate: tokens in, tokens out, to the byte; and that nothing is left out in silence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from edge_kit import Edge, delta, events, finished
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.core.protocol.columns import i32
from penstock.core.protocol.messages import Message, Rejected, Submit, TokenLogprobs
from penstock.transports import tokens_replies as replies
from penstock.transports.tokens_schema import IDLE, OF_RENDERING

PATH = "/inference/v1/generate"
IDS: dict[str, Any] = {"token_ids": [5, 6]}


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    one = Edge(tmp_path_factory.mktemp("edge"), {"max_streams": 4}).start()
    yield one
    one.stop()


def position(*tokens: int) -> TokenLogprobs:
    """As text tells it where no text is wanted."""
    return TokenLogprobs(ids=list(tokens), logprobs=[-0.5 - i for i in range(len(tokens))], ranks=[1] * len(tokens), texts=[], bytes_=[])


def told(submit: Submit) -> list[Message]:
    key = submit.key
    prompt = {"prompt_token_ids": i32([5, 6]), "prompt_logprobs": [None, position(6, 9)]}
    return [
        delta({"key": key, "tokens": [10], "output": 1, "extra": {"logprobs": [position(10, 11)], **prompt}}),
        delta({"key": key, "tokens": [2], "output": 2, "reason": "stop", "extra": {"logprobs": [position(2, 3)], "stop_reason": 2}}),
        finished(key, output=2),
    ]


def submitted(edge: Edge, body: dict[str, Any]) -> Submit:
    edge.text.received.clear()
    reply = edge.kept.post(PATH, json=IDS | body)
    assert reply.status_code == 200, reply.text
    submit = edge.text.wait_for(Submit)[0]
    assert isinstance(submit, Submit)
    return submit


# ------------------------------------------------------------------ golden transcripts


def test_golden_whole(script: Edge) -> None:
    script.text.script = told
    reply = script.kept.post(PATH, json={**IDS, "request_id": "r-1", "sampling_params": {"logprobs": 1, "prompt_logprobs": 1}})
    top = '{"token":"token_id:11","logprob":-1.5,"bytes":null}'
    assert reply.text == (
        '{"request_id":"r-1","model":"brook","system_fingerprint":"fp_test","choices":[{"index":0,"token_ids":[10,2],"logprobs":{"content":['
        f'{{"token":"token_id:10","logprob":-0.5,"bytes":null,"top_logprobs":[{top}]}},'
        f'{{"token":"token_id:2","logprob":-0.5,"bytes":null,"top_logprobs":[{top.replace("11", "3")}]}}]}},'
        '"finish_reason":"stop","stop_reason":2}],'
        '"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5,"prompt_tokens_details":{"cached_tokens":0},'
        '"completion_tokens_details":{"reasoning_tokens":0}},'
        '"prompt_logprobs":[null,{"6":{"logprob":-0.5,"rank":1,"decoded_token":null},"9":{"logprob":-1.5,"rank":1,"decoded_token":null}}]}'
    )
    assert reply.headers["x-request-id"] == "r-1"
    msgspec.convert(reply.json(), replies.TokensReply)


def test_golden_stream(script: Edge) -> None:
    script.text.script = told
    body = {**IDS, "stream": True, "stream_options": {"include_usage": True}}
    reply = script.kept.post(PATH, json=body, headers={"x-request-id": "r2"})
    assert reply.text == (
        'data: {"request_id":"r2","choices":[{"index":0,"token_ids":[10],"logprobs":null,"finish_reason":null}]}\n\n'
        'data: {"request_id":"r2","choices":[{"index":0,"token_ids":[2],"logprobs":null,"finish_reason":null}]}\n\n'
        'data: {"request_id":"r2","choices":[{"index":0,"token_ids":[],"logprobs":null,"finish_reason":"stop","stop_reason":2}]}\n\n'
        'data: {"request_id":"r2","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5,'
        '"prompt_tokens_details":{"cached_tokens":0},"completion_tokens_details":{"reasoning_tokens":0}}}\n\n'
        "data: [DONE]\n\n"
    )


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(st.integers(0, 1), st.lists(st.integers(0, 9), max_size=3)), max_size=8),
    ends=st.tuples(st.sampled_from(["stop", "length"]), st.sampled_from(["stop", "length"])),
    with_logprobs=st.booleans(),
)
def test_what_is_streamed_is_the_whole(script: Edge, rows: Any, ends: Any, with_logprobs: bool) -> None:
    def row(key: int, choice: int, tokens: list[int]) -> dict[str, Any]:
        extra = {"logprobs": [position(token) for token in tokens]} if with_logprobs and tokens else {}
        return {"key": key, "choice": choice, "tokens": tokens, "extra": extra}

    def play(submit: Submit) -> list[Message]:
        key = submit.key
        last = [{**row(key, choice, [3]), "reason": reason} for choice, reason in enumerate(ends)]
        return [*(delta(row(key, *one)) for one in rows), delta(*last), finished(key, output=5)]

    script.text.script = play
    body = {**IDS, "sampling_params": {"n": 2, "logprobs": 0 if with_logprobs else None}}
    whole = script.kept.post(PATH, json=body).json()["choices"]
    put: list[dict[str, Any]] = [{"index": i, "token_ids": [], "logprobs": {"content": []} if with_logprobs else None} for i in (0, 1)]
    *stream, done = events(script.kept.post(PATH, json={**body, "stream": True}).text)
    assert done == "[DONE]"
    for event in stream:
        msgspec.convert(event, replies.TokensChunk)
        for choice in event["choices"]:
            mine = put[choice["index"]]
            mine["token_ids"] += choice["token_ids"]
            mine["finish_reason"], mine["stop_reason"] = choice["finish_reason"], choice.get("stop_reason")
            if choice["logprobs"] is not None:
                mine["logprobs"]["content"] += choice["logprobs"]["content"]
    assert put == whole


# ------------------------------------------------------------------ what text is told


def test_text_is_told_to_make_no_text(edge: Edge) -> None:
    submit = submitted(edge, {})
    assert submit.prompt_ids is not None
    assert (submit.prompt_ids.tolist(), submit.prompt, submit.detokenize, submit.want_ids, submit.split) == (
        [5, 6],
        None,
        False,
        True,
        False,
    )
    assert edge.kept.post("/v1/completions", json={"prompt": [5]}).status_code == 200
    assert edge.text.wait_for(Submit, 2)[1].detokenize is True  # type: ignore[attr-defined]


def test_defaults_are_vllms_and_not_the_models(edge: Edge) -> None:
    submit = submitted(edge, {})
    assert (submit.sampling.temperature, submit.sampling.top_p, submit.sampling.max_tokens) == (1.0, 1.0, None)
    assert {"temperature", "top_p", "top_k", "min_p", "repetition_penalty"} <= set(submit.explicit)
    assert "max_tokens" not in submit.explicit


def test_every_setting_arrives(edge: Edge) -> None:
    asked: dict[str, Any] = {
        "n": 2,
        "temperature": 0.5,
        "top_p": 0.5,
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.5,
        "presence_penalty": 0.5,
        "seed": 7,
        "max_tokens": 9,
        "min_tokens": 2,
        "stop_token_ids": [5],
        "ignore_eos": True,
        "logprobs": 2,
        "prompt_logprobs": 0,
        "allowed_token_ids": [5, 6],
        "bad_words": ["x"],
    }
    body = {"sampling_params": {**asked, "logit_bias": {"5": 1}}, "cache_salt": "s", "priority": 3, "model": "brook"}
    submit = submitted(edge, body)
    assert {name: getattr(submit.sampling, name) for name in asked} == asked
    assert submit.sampling.logit_bias == {5: 1.0}
    assert (submit.cache_salt, submit.priority, submit.model) == ("s", 3, "brook")
    assert set(asked) - {"logprobs"} <= {*submit.explicit, "prompt_logprobs"}


def test_a_grammar_governs_it(edge: Edge) -> None:
    submit = submitted(edge, {"sampling_params": {"structured_outputs": {"choice": ["a", "b"]}}})
    assert submit.grammar is not None
    assert (submit.grammar.kind, submit.grammar.field) == ("choice", "structured_outputs.choice")


@pytest.mark.parametrize("name", IDLE)
def test_what_is_about_texts_changes_nothing(edge: Edge, name: str) -> None:
    value = 1 if name == "output_kind" else name not in ("detokenize", "skip_special_tokens")
    with_it, without = (submitted(edge, {"request_id": "same", "sampling_params": params}) for params in ({name: value}, {}))
    assert (with_it.sampling, with_it.explicit) == (without.sampling, without.explicit)


def test_what_rendering_adds_is_no_news(edge: Edge) -> None:
    reply = edge.kept.post(PATH, json={**IDS, **{name: [[0, 1]] for name in OF_RENDERING}, "new": 1, "sampling_params": {"odd": 1}})
    assert reply.headers["x-penstock-ignored-fields"] == "new, sampling_params.odd"


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"token_ids": []}, "token_ids", "invalid_value"),
        ({"token_ids": [1, "a"]}, "token_ids[1]", "invalid_value"),
        ({"token_ids": [1, -1]}, "token_ids[1]", "invalid_value"),
        ({"token_ids": "5"}, "token_ids", "invalid_value"),
        ({"token_ids": [[5]]}, "token_ids[0]", "invalid_value"),
        ({"temperature": 1}, "temperature", "unsupported_feature"),
        ({"prompt": "x"}, "prompt", "unsupported_feature"),
        ({"features": {"mm_hashes": {"image": ["x"]}}}, "features", "unsupported_feature"),
        ({"kv_transfer_params": {"a": 1}}, "kv_transfer_params", "unsupported_feature"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation", "unsupported_feature"),
        ({"stream": True, "sampling_params": {"prompt_logprobs": 1}}, "sampling_params.prompt_logprobs", "invalid_value"),
        ({"priority": 2**40}, "priority", "invalid_value"),
        ({"sampling_params": []}, "sampling_params", "invalid_value"),
        ({"sampling_params": {"temperature": -1}}, "sampling_params.temperature", "invalid_value"),
        ({"sampling_params": {"temperature": "1"}}, "sampling_params.temperature", "invalid_value"),
        ({"sampling_params": {"n": 0}}, "sampling_params.n", "invalid_value"),
        ({"sampling_params": {"n": 1000}}, "sampling_params.n", "invalid_value"),
        ({"sampling_params": {"seed": 2**64}}, "sampling_params.seed", "invalid_value"),
        ({"sampling_params": {"max_tokens": 0}}, "sampling_params.max_tokens", "invalid_value"),
        ({"sampling_params": {"logprobs": 21}}, "sampling_params.logprobs", "invalid_value"),
        ({"sampling_params": {"logit_bias": {"x": 1}}}, "sampling_params.logit_bias.x", "invalid_value"),
        ({"sampling_params": {"stop": ["x"]}}, "sampling_params.stop", "unsupported_feature"),
        ({"sampling_params": {"mirostat": 2}}, "sampling_params.mirostat", "unsupported_feature"),
        ({"sampling_params": {"topP": 1}}, "sampling_params.topP", "unsupported_feature"),
        ({"sampling_params": {"use_beam_search": True}}, "sampling_params.use_beam_search", "unsupported_feature"),
        ({"sampling_params": {"structured_outputs": {}}}, "sampling_params.structured_outputs", "invalid_value"),
        (
            {"sampling_params": {"structured_outputs": {"whitespace_pattern": "x"}}},
            "sampling_params.structured_outputs.whitespace_pattern",
            "unsupported_feature",
        ),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else None,
)
def test_an_error_names_the_field(edge: Edge, body: dict[str, Any], param: str, code: str) -> None:
    reply = edge.kept.post(PATH, json=IDS | body)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["code"]) == (400, param, code), error
    assert param.partition("[")[0] in error["message"]


def test_text_s_own_words_for_a_setting_are_placed(script: Edge) -> None:
    """Of the request, and of a choice that fails alone, streamed or not."""
    wrong = {"message": "min_tokens and max_tokens leave no room (--max-n).", "type": "invalid_request_error", "param": "min_tokens"}
    script.text.script = lambda submit: [Rejected(key=submit.key, status=400, code="invalid_value", **wrong)]
    for stream in (False, True):
        error = script.kept.post(PATH, json={**IDS, "stream": stream}).json()["error"]
        assert error["param"] == "sampling_params.min_tokens"
        assert error["message"] == "sampling_params.min_tokens and max_tokens leave no room (--max-n)."
    ended = {"tokens": [], "reason": "error", "extra": {"error": "n is odd.", "error_code": "invalid_value", "error_param": "n"}}
    script.text.script = lambda submit: [
        delta({"key": submit.key, **ended}, {"key": submit.key, "choice": 1, "reason": "stop"}),
        finished(submit.key),
    ]
    body = {**IDS, "sampling_params": {"n": 2}}
    said = [choice for event in events(script.kept.post(PATH, json={**body, "stream": True}).text)[:-1] for choice in event["choices"]]
    for choices in (script.kept.post(PATH, json=body).json()["choices"], said):
        assert [choice["error"]["message"] for choice in choices if "error" in choice] == ["sampling_params.n is odd."]


def test_a_prompt_of_many_ids_is_no_large_field(edge: Edge) -> None:
    assert len(submitted(edge, {"token_ids": [5] * 300_000}).prompt_ids) == 300_000  # type: ignore[arg-type]


def test_metrics_come_with_the_header(script: Edge) -> None:
    head = {"x-include-metrics": "1"}
    whole = script.kept.post(PATH, json=IDS, headers=head).json()
    for options in ({"include_usage": True}, {}):
        body = {**IDS, "stream": True, "stream_options": options}
        *_, last, _ = events(script.kept.post(PATH, json=body, headers=head).text)
        assert whole["metrics"].keys() == last["metrics"].keys()
        assert ("usage" in last, last["choices"]) == (bool(options), [])
    assert whole["metrics"]["queue_ms"] == 1.0
