"""/generate, /generate_stream, / and /info: what TGI's clients send and get, to the byte, and that nothing is left out in silence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from edge_kit import Edge, MakeEdge, delta, events, finished
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.core.protocol.columns import i32
from penstock.core.protocol.messages import Message, Rejected, Submit, TokenLogprobs
from penstock.transports import tgi_replies as replies

WHOLE, STREAM = "/generate", "/generate_stream"
HI: dict[str, Any] = {"inputs": "hi"}


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    one = Edge(tmp_path_factory.mktemp("edge"), {"max_streams": 4}).start()
    yield one
    one.stop()


def position(token: int, text: str, *, silent: bool = False) -> TokenLogprobs:
    return TokenLogprobs(ids=[token], logprobs=[-0.5], ranks=[1], texts=[text], bytes_=[text.encode()], silent=silent)


def told(submit: Submit) -> list[Message]:
    """ "Hé" in two tokens, the second of which completes a character, and an end token."""
    key = submit.key
    first = TokenLogprobs(ids=[10], logprobs=[-0.5], ranks=[1], texts=["H\ufffd"], bytes_=[b"H\xc3"])
    second = TokenLogprobs(ids=[11], logprobs=[float("-inf")], ranks=[1], texts=["\ufffd"], bytes_=[b"\xa9"])
    prompt = {"prompt_token_ids": i32([5, 6]), "prompt_text": "hi", "prompt_logprobs": [None, position(6, "i")], "prompt_first": b"h"}
    return [
        delta({"key": key, "text": "H", "tokens": [10], "output": 1, "extra": {"logprobs": [first], **prompt, "prompt_offsets": [0, 1]}}),
        delta({"key": key, "text": "é", "tokens": [11], "output": 2, "extra": {"logprobs": [second]}}),
        delta({"key": key, "tokens": [2], "output": 3, "reason": "stop", "extra": {"logprobs": [position(2, "</s>", silent=True)]}}),
        finished(key, output=3),
    ]


def submitted(edge: Edge, **parameters: Any) -> Submit:
    edge.text.received.clear()
    reply = edge.kept.post(WHOLE, json={**HI, "parameters": parameters})
    assert reply.status_code == 200, reply.text
    submit = edge.text.wait_for(Submit)[0]
    assert isinstance(submit, Submit)
    return submit


# ------------------------------------------------------------------ golden transcripts


def test_golden_whole(edge: Edge) -> None:
    reply = edge.kept.post(WHOLE, json=HI, headers={"x-request-id": "r1"})
    assert reply.headers["x-request-id"] == "r1"
    assert reply.text == '{"generated_text":"Hello world"}'


def test_golden_details(script: Edge) -> None:
    script.text.script = told
    reply = script.kept.post(WHOLE, json={**HI, "parameters": {"details": True, "decoder_input_details": True, "seed": 3}})
    assert reply.text == (
        '{"generated_text":"Hé","details":{"finish_reason":"eos_token","generated_tokens":3,"seed":3,'
        '"prefill":[{"id":5,"text":"h","logprob":null},{"id":6,"text":"i","logprob":-0.5}],'
        '"tokens":[{"id":10,"text":"H","logprob":-0.5,"special":false},{"id":11,"text":"é","logprob":-9999.0,"special":false},'
        '{"id":2,"text":"</s>","logprob":-0.5,"special":true}]}}'
    )


def test_golden_stream(script: Edge) -> None:
    script.text.script = told
    reply = script.kept.post(STREAM, json={**HI, "parameters": {"details": True, "return_full_text": True}})
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.text == (
        'data: {"index":1,"token":{"id":10,"text":"H","logprob":-0.5,"special":false},"generated_text":null,"details":null}\n\n'
        'data: {"index":2,"token":{"id":11,"text":"é","logprob":-9999.0,"special":false},"generated_text":null,"details":null}\n\n'
        'data: {"index":3,"token":{"id":2,"text":"</s>","logprob":-0.5,"special":true},"generated_text":"hiHé",'
        '"details":{"finish_reason":"eos_token","generated_tokens":3,"input_length":3,"seed":null}}\n\n'
    )


def test_golden_root(edge: Edge) -> None:
    assert edge.kept.post("/", json=HI).text == '[{"generated_text":"Hello world"}]'
    assert edge.kept.post("/", json={**HI, "stream": True}).text == edge.kept.post(STREAM, json=HI).text


def test_golden_error(edge: Edge) -> None:
    reply = edge.kept.post(WHOLE, json={"inputs": ""})
    assert (reply.status_code, reply.text) == (422, '{"error":"inputs must not be empty.","error_type":"validation"}')


def test_golden_info(script: Edge) -> None:
    before = script.text.answers["server_info"]
    facts = {"dtype": "bfloat16", "device": "cpu", "max_model_len": 64, "kv_bytes": 1}
    script.text.answers["server_info"] = lambda _: (200, json.dumps({"model": "brook", "engine": facts}).encode())
    try:
        told = script.kept.get("/info").json()
    finally:
        script.text.answers["server_info"] = before
    assert msgspec.convert(told, replies.InfoReply).max_total_tokens == 64
    assert told == told | {"model_id": "brook", "model_dtype": "bfloat16", "max_input_tokens": 63, "max_concurrent_requests": 4}
    assert script.kept.get("/info").json()["max_total_tokens"] is None


# ------------------------------------------------------------------ what is streamed is the whole


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(st.text(max_size=6), st.lists(st.booleans(), max_size=3)), max_size=6),
    end=st.tuples(st.text(max_size=4), st.lists(st.booleans(), max_size=2)),
    why=st.sampled_from([("stop", None, "eos_token"), ("stop", "x", "stop_sequence"), ("length", None, "length")]),
    with_logprobs=st.booleans(),
    full=st.booleans(),
)
def test_what_is_streamed_is_the_whole(script: Edge, rows: Any, end: Any, why: Any, with_logprobs: bool, full: bool) -> None:
    """Rows of any text and any tokens, special (True) or not; text without tokens comes only at the end."""
    rows = [(text, silent) for text, silent in rows if silent or not text]

    def row(key: int, text: str, silent: list[bool], **more: Any) -> dict[str, Any]:
        extra = more.pop("extra", {})
        if with_logprobs and silent:
            extra |= {"logprobs": [position(7, "<s>" if one else "t", silent=one) for one in silent]}
        return {"key": key, "text": text, "tokens": [7] * len(silent), "extra": extra, **more}

    def play(submit: Submit) -> list[Message]:
        key = submit.key
        last = row(key, *end, reason=why[0], extra={"stop_reason": why[1]}, output=5)
        return [*(delta(row(key, *one)) for one in rows), delta(last), finished(key, output=5)]

    script.text.script = play
    body = {**HI, "parameters": {"details": True, "return_full_text": full}}
    whole = msgspec.convert(script.kept.post(WHOLE, json=body).json(), replies.GenerateReply)
    stream = [msgspec.convert(event, replies.GenerateEvent) for event in events(script.kept.post(STREAM, json=body).text)]
    answer = "".join(text for text, _ in [*rows, end])
    assert stream[-1].generated_text == whole.generated_text == ("hi" if full else "") + answer
    assert "".join(event.token.text for event in stream if not event.token.special) == answer
    assert [event.index for event in stream] == list(range(1, len(stream) + 1))
    assert all(event.generated_text is None and event.details is None for event in stream[:-1])
    assert whole.details is not None
    last = stream[-1].details
    assert last is not None
    assert (last.finish_reason, last.generated_tokens) == (whole.details.finish_reason, whole.details.generated_tokens) == (why[2], 5)
    assert len(stream) == max(1, sum(len(silent) for _, silent in [*rows, end]) + (not end[1]))


# ------------------------------------------------------------------ what text is told


def test_the_defaults_are_tgis(script: Edge) -> None:
    submit = submitted(script)
    params = submit.sampling
    assert (params.temperature, params.max_tokens, params.include_stop_str_in_output, params.logprobs) == (0.0, 100, True, None)
    assert {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens"} == set(submit.explicit)
    assert (submit.kind, submit.prompt, submit.prompt_name, submit.add_special_tokens) == ("completion", "hi", "inputs", True)


@pytest.mark.parametrize(
    ("parameters", "temperature"),
    [
        ({"do_sample": True}, 1.0),
        ({"temperature": 0.5}, 0.5),
        ({"temperature": 1.0}, 0.0),
        ({"top_k": 5}, 1.0),
        ({"top_p": 0.9}, 1.0),
        ({"top_p": 1.0}, 0.0),
        ({"do_sample": False, "seed": 3}, 0.0),
        ({"do_sample": True, "temperature": 0.7}, 0.7),
    ],
)
def test_when_it_draws(script: Edge, parameters: dict[str, Any], temperature: float) -> None:
    assert submitted(script, **parameters).sampling.temperature == temperature


def test_fields_reach_text(script: Edge) -> None:
    more = {"max_new_tokens": 7, "repetition_penalty": 1.2, "frequency_penalty": 0.3, "seed": 5, "stop": ["a"], "truncate": 9}
    submit = submitted(script, **more)
    params = submit.sampling
    assert (params.max_tokens, params.repetition_penalty, params.frequency_penalty, params.seed, params.stop) == (7, 1.2, 0.3, 5, ["a"])
    assert submit.truncate_prompt_tokens == 9
    assert submit.names == {"max_tokens": "max_new_tokens", "truncate_prompt_tokens": "truncate"}
    assert submitted(script, details=True).sampling.logprobs == 0


@pytest.mark.parametrize(
    ("given", "kind", "source"),
    [
        ({"type": "regex", "value": "[a-z]+"}, "regex", "[a-z]+"),
        ({"type": "json", "value": {"type": "object"}}, "json", '{"type":"object"}'),
        ({"type": "json", "value": '{"type": "object"}'}, "json", '{"type":"object"}'),
        ({"type": "json_schema", "value": {"name": "n", "schema": {"type": "object"}}}, "json", '{"type":"object"}'),
    ],
)
def test_grammars_reach_text(script: Edge, given: Any, kind: str, source: str) -> None:
    grammar = submitted(script, grammar=given).grammar
    assert grammar is not None
    assert (grammar.kind, grammar.source, grammar.field) == (kind, source, "parameters.grammar")


def test_the_likeliest_of_several_answers_and_the_likeliest_tokens(script: Edge) -> None:
    """And the others in `details`."""

    def answers(submit: Submit) -> list[Message]:
        rows = []
        for choice, logprob in enumerate((-2.0, -0.5)):
            entry = TokenLogprobs(ids=[10, 11], logprobs=[logprob, -0.25], ranks=[2, 1], texts=["a", "b"], bytes_=[b"a", b"b"])
            rows.append(
                {
                    "key": submit.key,
                    "choice": choice,
                    "text": f"answer {choice}",
                    "tokens": [10],
                    "reason": "length",
                    "extra": {"logprobs": [entry]},
                }
            )
        return [delta(*rows), finished(submit.key)]

    script.text.script = answers
    asked = {"do_sample": True, "best_of": 2, "top_n_tokens": 1, "details": True}
    body = script.kept.post(WHOLE, json={**HI, "parameters": asked}).json()
    reply = msgspec.convert(body, replies.GenerateReply)
    assert (reply.generated_text, reply.details and reply.details.generated_tokens) == ("answer 1", 1)
    assert reply.details is not None
    assert reply.details.best_of_sequences is not None
    assert [one.generated_text for one in reply.details.best_of_sequences] == ["answer 0"]
    assert body["details"]["top_tokens"] == [[{"id": 11, "text": "b", "logprob": -0.25, "special": False}]]
    script.text.script = answers
    refused = script.kept.post(STREAM, json={**HI, "parameters": asked})
    assert (refused.status_code, refused.json()["error"]) == (422, "parameters.best_of is not available in a stream.")
    script.text.script = told
    for line in script.kept.post(STREAM, json={**HI, "parameters": {"top_n_tokens": 1}}).text.split("\n\n")[:-1]:
        assert "top_tokens" in json.loads(line.removeprefix("data: "))


# ------------------------------------------------------------------ what is refused, by name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("best_of", 2),  # of a greedy answer
        ("best_of", 0),
        ("best_of", 10**6),
        ("top_n_tokens", -1),
        ("top_n_tokens", 10**6),
        ("grammar", {"type": "lark", "value": ""}),
        ("grammar", {"type": "regex", "value": 3}),
        ("grammar", {"type": "json", "value": "{"}),
        ("grammar", {"type": "json_schema", "value": {}}),
        ("grammar", "x"),
        ("typical_p", 0.9),
        ("watermark", True),
        ("adapter_id", "a"),
        ("max_new_tokens", 0),
        ("max_new_tokens", 2**31),
        ("temperature", 0),
        ("temperature", 1001),
        ("top_k", 0),
        ("top_p", 0),
        ("top_p", 1.1),
        ("repetition_penalty", 0),
        ("frequency_penalty", 3),
        ("seed", -1),
        ("seed", 2**63),
        ("truncate", 0),
        ("stop", ["x"] * 17),
        ("stop", [""]),
        ("stop", "x"),
        ("max_tokens", 3),
        ("n", 2),
        ("logit_bias", {"1": 1}),
        ("guided_json", {}),
        ("min_p", 0.1),
        ("maxNewTokens", 3),
        ("stop_sequences", ["x"]),
        ("typical", 0.5),
    ],
)
def test_what_is_refused_is_named(edge: Edge, name: str, value: Any) -> None:
    asks = value or {"x": 1} if name == "guided_json" else value
    reply = edge.kept.post(WHOLE, json={**HI, "parameters": {name: asks}})
    assert (reply.status_code, reply.json()["error_type"]) == (422, "validation"), reply.text
    assert reply.json()["error"].startswith(f"parameters.{name}"), reply.text
    msgspec.convert(reply.json(), replies.GenerateError)


@pytest.mark.parametrize(
    ("path", "more", "name"),
    [
        (WHOLE, {"max_new_tokens": 3}, "max_new_tokens"),
        (WHOLE, {"temperature": 0.3}, "temperature"),
        (WHOLE, {"stream": True}, "stream"),
        (STREAM, {"stream": True}, "stream"),
        ("/", {"messages": [{"role": "user"}]}, "messages"),
        (WHOLE, {"model": "other"}, "model"),
        (STREAM, {"parameters": {"decoder_input_details": True}}, "parameters.decoder_input_details"),
        ("/", {"stream": True, "parameters": {"decoder_input_details": True}}, "parameters.decoder_input_details"),
        (WHOLE, {"inputs": ["a", "b"]}, "inputs"),
        (WHOLE, {"parameters": 3}, "parameters"),
    ],
)
def test_what_stands_in_the_wrong_place_is_named(edge: Edge, path: str, more: dict[str, Any], name: str) -> None:
    reply = edge.kept.post(path, json=HI | more)
    assert (reply.status_code, reply.json()["error"].split(" ")[0]) == (422, name), reply.text


def test_what_asks_for_nothing_is_taken_and_what_nobody_knows_is_told(script: Edge) -> None:
    body = {**HI, "stream": False, "speed": 1, "parameters": {"best_of": 1, "watermark": False, "typical_p": None, "colour": "red"}}
    reply = script.kept.post(WHOLE, json=body)
    assert reply.status_code == 200
    assert reply.headers["x-penstock-ignored-fields"] == "speed, parameters.colour"


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (400, "context_length_exceeded", (422, "validation")),
        (413, "request_too_large", (413, "validation")),
        (429, "queue_full", (429, "overloaded")),
        (503, "queue_full", (429, "overloaded")),
        (503, "engine_unavailable", (503, "unhealthy")),
        (503, "draining", (503, "unhealthy")),
        (500, "engine_failure", (424, "generation")),
        (500, "internal_error", (500, "internal")),
    ],
)
@pytest.mark.parametrize("path", [WHOLE, STREAM])
def test_refusals_of_text(script: Edge, path: str, status: int, code: str, expected: tuple[int, str]) -> None:
    script.text.script = lambda submit: [
        Rejected(key=submit.key, status=status, type="x", code=code, message="No.", param=None, retry_after_s=3.0)
    ]
    reply = script.kept.post(path, json=HI)
    assert (reply.status_code, reply.json()) == (expected[0], {"error": "No.", "error_type": expected[1]})
    assert ("retry-after" in reply.headers) is (status in (429, 503))


def test_what_is_refused_before_there_is_a_route_has_the_shape_too(make_edge: MakeEdge) -> None:
    edge = make_edge(api_key=["secret"])
    with edge.http() as http:
        wrong = http.post(WHOLE, json=HI)
        assert (wrong.status_code, sorted(wrong.json())) == (401, ["error", "error_type"])
        assert http.get(STREAM, headers={"x-api-key": "secret"}).json()["error_type"] == "validation"


def test_a_stream_that_breaks_ends_with_an_error_event(script: Edge) -> None:
    kept: list[Message] = []

    def play(submit: Submit) -> list[Message]:
        end = {"key": submit.key, "tokens": [], "reason": "error", "extra": {"error": "It broke.", "error_code": "engine_failure"}}
        kept.extend([delta(end), finished(submit.key)])
        return [delta({"key": submit.key, "text": "Hel"})]

    script.text.script = play
    with script.kept.stream("POST", STREAM, json=HI) as reply:
        rest = reply.iter_text()
        first = next(rest)
        script.text.send(*kept)
        said = events(first + "".join(rest))
    assert said[-1] == {"error": "It broke.", "error_type": "generation"}
    assert all(event.get("generated_text") is None for event in said)


def test_timings_on_demand(edge: Edge) -> None:
    assert edge.kept.post(WHOLE, json=HI, headers={"x-include-metrics": "1"}).json()["metrics"]["preemptions"] == 0


@pytest.mark.parametrize("body", [HI | {"speed": 1}, HI | {"parameters": {"colour": 1}}])
def test_strict_fields_refuses_what_nobody_knows(make_edge: MakeEdge, body: dict[str, Any]) -> None:
    edge = make_edge(strict_fields=True)
    reply = edge.kept.post(WHOLE, json=body)
    assert (reply.status_code, reply.json()["error_type"]) == (422, "validation")
    assert ("speed" if "speed" in body else "parameters.colour") in reply.json()["error"]
