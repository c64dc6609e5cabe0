"""Answers that must obey something, from the demo model over HTTP."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

ASK = [{"role": "user", "content": "Where is Anna from, and how old is she? Answer in JSON."}]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}


def wide(count: int, *, required: bool = True, kind: str = "string") -> dict[str, Any]:
    names = {f"property_{i}": {"type": kind} for i in range(count)}
    return {"type": "object", "properties": names, "required": list(names) if required else [], "additionalProperties": False}


def chat(server: Any, **fields: Any) -> Any:
    return server.client.post("/v1/chat/completions", json={"messages": ASK, "max_tokens": 200, **fields})


def choices(server: Any, **fields: Any) -> list[tuple[str, str]]:
    reply = chat(server, **fields)
    assert reply.status_code == 200, reply.text
    return [(choice["message"]["content"], choice["finish_reason"]) for choice in reply.json()["choices"]]


def test_json_schema(server: Any) -> None:
    check = jsonschema_rs.validator_for(SCHEMA)
    for seed in range(4):
        for text, reason in choices(server, response_format=FORMAT, n=3, temperature=1.3, seed=seed):
            assert reason in ("stop", "length")
            if reason == "stop":
                assert check.is_valid(json.loads(text)), text


@pytest.mark.parametrize("required", [True, False])
@pytest.mark.parametrize(("count", "kind"), [(500, "integer"), (500, "string"), (740, "string"), (740, "integer")])
def test_an_object_of_many_properties(server: Any, count: int, kind: str, required: bool) -> None:
    [(text, reason)] = choices(server, guided_json=wide(count, required=required, kind=kind), temperature=1.0, seed=3, max_tokens=60)
    assert text.lstrip().startswith("{")
    assert reason in ("stop", "length")


def test_a_stop_string_that_stays_in_the_answer_is_part_of_what_obeys(server: Any) -> None:
    """Also TGI's way, where it always stays."""
    for text, reason in choices(
        server, guided_regex="[a-d]{1,30}e", stop=["e"], include_stop_str_in_output=True, n=2, temperature=1.0, seed=2
    ):
        assert (re.fullmatch("[a-d]{1,30}e", text) is not None, reason) == (True, "stop")
    parameters = {"grammar": {"type": "regex", "value": "[a-d]{1,30}e"}, "stop": ["e"], "max_new_tokens": 40}
    reply = server.client.post("/generate", json={"inputs": "a", "parameters": parameters})
    assert reply.status_code == 200, reply.text
    assert re.fullmatch("[a-d]{1,30}e", reply.json()["generated_text"])
    assert chat(server, guided_regex="[a-d]{1,30}e", stop=["e"]).json()["error"]["param"] == "stop"


def test_a_stream_is_the_whole_reply(server: Any) -> None:
    asked = {"messages": ASK, "max_tokens": 200, "response_format": FORMAT, "temperature": 0, "stream": True}
    with server.client.stream("POST", "/v1/chat/completions", json=asked) as reply:
        chunks = [json.loads(line[6:]) for line in reply.iter_lines() if line.startswith("data: {")]
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert [(text, chunks[-1]["choices"][0]["finish_reason"])] == choices(server, response_format=FORMAT, temperature=0)


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"guided_regex": "[0-9]{3}-[a-z]{2}"}, "[0-9]{3}-[a-z]{2}"),
        ({"guided_grammar": 'root ::= "x" [0-9] [0-9]'}, "x[0-9]{2}"),
        ({"structured_outputs": {"choice": ["a b", "c"]}, "logprobs": True, "top_logprobs": 2}, "a b|c"),
        ({"guided_choice": ["yes", "no"], "min_tokens": 30}, "yes|no"),
        ({"guided_choice": ["left", "right"], "frequency_penalty": 1.5, "logit_bias": {"5": 20}, "top_p": 0.5}, "left|right"),
        ({"guided_json": {"type": "number"}, "temperature": 2.0}, r"-?[0-9.]+"),
    ],
)
def test_other_kinds(server: Any, fields: dict[str, Any], pattern: str) -> None:
    for text, reason in choices(server, n=2, seed=5, **fields):
        assert reason == "stop"
        assert re.fullmatch(pattern, text)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"guided_json": {"type": "object", "not": {}}}, "guided_json", "unsupported_feature"),
        ({"guided_json": {"typo": 1}}, "guided_json", "unsupported_feature"),
        ({"guided_regex": "("}, "guided_regex", "invalid_value"),
        ({"guided_grammar": "nonsense"}, "guided_grammar", "invalid_value"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "invalid_value"),
        ({"guided_choice": ["yes", "no"], "allowed_token_ids": [5]}, "allowed_token_ids", "invalid_value"),
        ({"response_format": FORMAT, "stop": ['"age"']}, "stop", "invalid_value"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "invalid_value"),
        ({"guided_json": wide(1500, required=False)}, "guided_json", "invalid_value"),
        ({"guided_json": wide(5000)}, "guided_json", "invalid_value"),
    ],
)
def test_what_cannot_be_obeyed_is_a_400(server: Any, fields: dict[str, Any], param: str | None, code: str) -> None:
    reply = chat(server, **fields, temperature=0)
    assert (reply.status_code, reply.json()["error"]["param"], reply.json()["error"]["code"]) == (400, param, code)


def test_completions(server: Any) -> None:
    reply = server.client.post("/v1/completions", json={"prompt": ["Say yes:", "Say no:"], "guided_choice": ["yes", "no"], "n": 2})
    assert {choice["text"] for choice in reply.json()["choices"]} <= {"yes", "no"}
    assert {choice["finish_reason"] for choice in reply.json()["choices"]} == {"stop"}


def test_an_answer_obeys_over_an_engines_death(server: Any) -> None:
    """The engine is killed in the middle of a stream: the next one's matcher walks what was received, and goes on."""
    asked = {"messages": ASK, "max_tokens": 1500, "guided_regex": "([a-z]{3}-){150}end", "temperature": 1.0, "seed": 3, "stream": True}
    with server.client.stream("POST", "/v1/chat/completions", json=asked) as reply:
        chunks = []
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                chunks.append(json.loads(line[6:]))
                if len(chunks) == 20:
                    server.children()["engine"][0].kill()
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert re.fullmatch("([a-z]{3}-){150}end", text)
    assert server.metric("penstock_replays_total") >= 1
    assert choices(server, guided_choice=["yes", "no"])[0][0] in ("yes", "no")


def test_another_backend(starter: Any) -> None:
    """Compiled in a process of its own and obeyed by the engine; text itself never loads it. What it cannot express exactly is obeyed all the same."""
    if importlib.util.find_spec("xgrammar") is None:
        pytest.skip("xgrammar is not installed")
    server = starter("--structured-outputs-config.backend", "xgrammar", "--deterministic")
    schema = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}, "required": ["name", "age"]}
    for guided in (schema, SCHEMA):  # by xgrammar, and (a list of so many) by llguidance
        check = jsonschema_rs.validator_for(guided)
        for text, reason in choices(server, guided_json=guided, n=2, temperature=1.0, seed=1):
            assert reason == "length" or check.is_valid(json.loads(text)), text
    for fields, pattern in (
        ({"guided_regex": "[a-z]{3}x.y"}, "[a-z]{3}x.y"),
        ({"guided_choice": ["left", "right"]}, "left|right"),
        ({"guided_grammar": 'root ::= "a" [0-9] "!"'}, "a[0-9]!"),
        ({"guided_grammar": 'start: "x" NUMBER\nNUMBER: /[0-9]{1,3}/'}, "x[0-9]{1,3}"),
        ({"guided_regex": "[a-d]{1,30}(e[a-z]{1,4})?", "stop": ["e"]}, "[a-d]{1,30}"),
    ):
        for text, _ in choices(server, temperature=1.0, seed=2, n=2, **fields):
            assert re.fullmatch(pattern, text), (fields, text)
    refused = chat(server, guided_json={"not": {"type": "string"}})
    assert refused.status_code == 400
    assert "'not'" in refused.json()["error"]["message"]
    (text,) = server.children()["text"]
    loaded = {Path(mapped.path).name for mapped in text.memory_maps()}
    assert not any(name.startswith(("libtorch", "libxgrammar")) for name in loaded)
    whole = choices(server, guided_regex="[a-z]{12}", use_beam_search=True, n=3)
    assert [len(text) for text, _ in whole] == [12] * 3
    assert server.stop() == 0
