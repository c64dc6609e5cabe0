"""Calls that are asked for, and grammars beside tools and reasoning: the demo model over HTTP, in its own format and made to write all others."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from penstock.core.protocol.model_folder import demo_folder
from penstock.plugins.formats import BUILT_IN

CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
ZONE: dict[str, Any] = {
    "type": "object",
    "properties": {"zone": {"enum": ["CET", "UTC"]}},
    "required": ["zone"],
    "additionalProperties": False,
}
SCHEMAS = {"get_weather": CITY, "get_time": ZONE}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()]
STRICT = [{"type": "function", "function": {**tool["function"], "strict": True}} for tool in TOOLS]  # type: ignore[dict-item]
HELLO = [{"role": "user", "content": "Hello!"}]
OSLO = [{"role": "user", "content": "What is the weather in Oslo?"}]
TWO = [{"role": "user", "content": "What is the weather in Paris and the time in Rome?"}]
NAMED = {"type": "function", "function": {"name": "get_time"}}
PERSON = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["age"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}


def post(server: Any, **fields: Any) -> Any:
    return server.client.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 300, "tools": TOOLS, **fields})


def choices(server: Any, **fields: Any) -> list[Any]:
    reply = post(server, **fields)
    assert reply.status_code == 200, reply.text
    found: list[Any] = reply.json()["choices"]
    return found


def calls_of(choice: Any, schemas: dict[str, Any] = SCHEMAS) -> list[str]:
    """The functions that are called, with arguments that obey."""
    found = []
    for call in choice["message"].get("tool_calls") or []:
        name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
        assert jsonschema_rs.validator_for(schemas[name]).is_valid(arguments), call
        found.append(name)
    return found


def streamed(server: Any, **fields: Any) -> list[Any]:
    """The choices that the chunks of a stream make up."""
    made: dict[int, Any] = {}
    with server.client.stream(
        "POST", "/v1/chat/completions", json={"messages": HELLO, "max_tokens": 300, "tools": TOOLS, "stream": True, **fields}
    ) as reply:
        for line in reply.iter_lines():
            if not line.startswith("data: {"):
                continue
            for part in json.loads(line[6:])["choices"]:
                one = made.setdefault(
                    part["index"], {"message": {"content": "", "reasoning_content": "", "tool_calls": []}, "finish_reason": None}
                )
                delta, message = part["delta"], one["message"]
                message["content"] += delta.get("content") or ""
                message["reasoning_content"] += delta.get("reasoning_content") or ""
                for call in delta.get("tool_calls") or []:
                    if call["index"] == len(message["tool_calls"]):
                        message["tool_calls"].append({"function": {"name": call["function"]["name"], "arguments": ""}})
                    message["tool_calls"][call["index"]]["function"]["arguments"] += (call.get("function") or {}).get("arguments") or ""
                assert one["finish_reason"] is None
                one["finish_reason"] = part["finish_reason"]
    return [made[index] for index in sorted(made)]


def shape(choice: Any) -> Any:
    message = choice["message"]
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls") or []]
    return message.get("content") or "", message.get("reasoning_content") or "", calls, choice["finish_reason"]


def test_required(server: Any) -> None:
    for seed in range(3):
        for choice in choices(server, tool_choice="required", n=3, temperature=1.2, seed=seed):
            assert choice["message"]["content"] is None
            assert calls_of(choice)
            assert choice["finish_reason"] == "tool_calls"


def test_one_function_by_name(server: Any) -> None:
    for choice in choices(server, tool_choice=NAMED, n=4, temperature=1.2, seed=1):
        assert (calls_of(choice), choice["finish_reason"], choice["message"]["content"]) == (["get_time"], "stop", None)


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_allowed_tools(server: Any, mode: str) -> None:
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [{"type": "function", "function": {"name": "get_time"}}]}}
    for messages in (HELLO, OSLO, TWO):
        for choice in choices(server, messages=messages, tool_choice=allowed, tools=STRICT, n=2, temperature=1.0, seed=5):
            assert set(calls_of(choice)) <= {"get_time"}
            assert calls_of(choice) or (mode == "auto" and choice["message"]["content"])


def test_one_call_at_most(server: Any) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    weather = {"name": "get_weather", "description": "Get the current weather in a city", "parameters": schema}
    asked = {"messages": TWO, "tools": [{"type": "function", "function": weather}], "tool_choice": "required", "temperature": 0}
    assert len(calls_of(choices(server, **asked)[0], {"get_weather": schema})) == 2
    (choice,) = choices(server, **asked, parallel_tool_calls=False)
    assert (len(calls_of(choice, {"get_weather": schema})), choice["finish_reason"]) == (1, "tool_calls")


def test_several_calls_have_ids_and_indexes(server: Any) -> None:
    """In streams, OpenAI's and Anthropic's."""
    ids: list[str] = []
    names: dict[int, str] = {}
    texts: dict[int, str] = {}
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    weather = {"name": "get_weather", "description": "Get the current weather in a city"}
    given = [{"type": "function", "function": {**weather, "parameters": schema}}]
    asked: dict[str, Any] = {"messages": TWO, "max_tokens": 300, "temperature": 0}
    with server.client.stream(
        "POST", "/v1/chat/completions", json={**asked, "tools": given, "tool_choice": "required", "stream": True}
    ) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                for call in json.loads(line[6:])["choices"][0]["delta"].get("tool_calls") or []:
                    if "id" in call:
                        ids.append(call["id"])
                        assert call["index"] == len(names)
                        names[call["index"]] = call["function"]["name"]
                    assert call["index"] == len(names) - 1
                    texts[call["index"]] = texts.get(call["index"], "") + ((call.get("function") or {}).get("arguments") or "")
    assert len(set(ids)) == len(ids) == len(names) >= 2
    assert all(jsonschema_rs.validator_for(schema).is_valid(json.loads(text)) for text in texts.values())

    tools = [{**weather, "input_schema": schema}]
    asked["model"] = server.client.get("/v1/models").json()["data"][0]["id"]
    blocks: dict[int, Any] = {}
    inputs: dict[int, str] = {}
    events = []
    with server.client.stream(
        "POST", "/v1/messages", json={**asked, "tools": tools, "tool_choice": {"type": "any"}, "stream": True}
    ) as reply:
        assert reply.status_code == 200, reply.read()
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                events.append(event["type"])
                if event["type"] == "content_block_start":
                    assert event["index"] == len(blocks)
                    blocks[event["index"]] = event["content_block"]
                elif event["type"] == "content_block_delta":
                    assert event["index"] == len(blocks) - 1
                    inputs[event["index"]] = inputs.get(event["index"], "") + event["delta"]["partial_json"]
    assert events.count("content_block_stop") == len(blocks) >= 2
    assert len({block["id"] for block in blocks.values()}) == len(blocks)
    assert [(block["type"], block["name"]) for block in blocks.values()] == [("tool_use", name) for name in names.values()]
    assert [json.loads(inputs[index]) for index in blocks] == [json.loads(texts[index]) for index in names]


def test_strict_under_auto(server: Any) -> None:
    (hello,) = choices(server, tools=STRICT, temperature=0)
    assert (calls_of(hello), hello["finish_reason"]) == ([], "stop")
    assert hello["message"]["content"] == choices(server, temperature=0)[0]["message"]["content"]
    called = 0
    for choice in choices(server, messages=OSLO, tools=STRICT, n=4, temperature=1.0, seed=2):
        called += bool(calls_of(choice))
        assert choice["finish_reason"] == ("tool_calls" if calls_of(choice) else "stop")
    assert called


@pytest.mark.parametrize("fields", [{"tool_choice": "required"}, {"tool_choice": NAMED}, {"tools": STRICT}, {"response_format": FORMAT}])
def test_a_stream_is_the_whole_reply(server: Any, fields: Any) -> None:
    asked = {"messages": OSLO, "n": 3, "temperature": 0.9, "seed": 3, **fields}
    whole = [shape(choice) for choice in choices(server, **asked)]
    assert [shape(choice) for choice in streamed(server, **asked)] == whole
    logged = choices(server, **asked, logprobs=True, top_logprobs=2)
    assert [shape(choice) for choice in logged] == whole
    assert all(entry["logprob"] <= 0 for choice in logged for entry in choice["logprobs"]["content"])


def test_a_call_or_an_answer_that_obeys(server: Any) -> None:
    answers = 0
    loose = {name: {"type": "object"} for name in SCHEMAS}
    for bias in ({}, {"4092": -100}):  # <tool_call>
        for choice in choices(server, response_format=FORMAT, n=3, temperature=1.0, seed=7, logit_bias=bias):
            called = calls_of(choice, loose)
            assert choice["finish_reason"] == ("tool_calls" if called else "stop")
            if not called:
                answers += 1
                assert jsonschema_rs.validator_for(PERSON).is_valid(json.loads(choice["message"]["content"]))
    assert answers >= 1


def test_what_is_cut_off_is_a_part(server: Any) -> None:
    for tokens in (1, 8, 20):
        (choice,) = choices(server, messages=OSLO, tool_choice="required", max_tokens=tokens, temperature=0)
        assert choice["finish_reason"] == "length"
    stopped = post(server, messages=OSLO, tool_choice="required", stop=["days"], temperature=0)
    assert (stopped.status_code, stopped.json()["error"]["code"]) == (400, "invalid_value")
    assert "tools[0].function.parameters" in stopped.json()["error"]["message"]
    (choice,) = choices(server, messages=OSLO, tool_choice="required", stop=["never said"], temperature=0)
    assert calls_of(choice)


@pytest.mark.parametrize(
    ("fields", "param", "code", "says"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "not": {}}}}], "tool_choice": "required"}, "tools[0].function.parameters", "unsupported_feature", "'not'"),
        ({"tools": [TOOLS[0], {"type": "function", "function": {"name": "f", "strict": True, "parameters": {"properties": {"a": {"format": "odd"}}}}}]}, "tools[1].function.parameters", "unsupported_feature", "'format'"),
        ({"tools": [{"type": "function", "function": {"name": 'a"b'}}], "tool_choice": "required"}, "tools[0].function.name", "invalid_value", "name"),
        ({"tool_choice": "required", "ignore_eos": True}, "ignore_eos", "invalid_value", "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "h"}}}, "tool_choice", "invalid_value", "'h'"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_for_is_a_400(server: Any, fields: Any, param: str, code: str, says: str) -> None:
    error = post(server, **fields).json()["error"]
    assert (error["param"], error["code"]) == (param, code)
    assert says in error["message"]


def test_structural_tags(server: Any) -> None:
    """The trigger is what the demo model begins calls with: it writes no number of days, but here it must."""
    begin = '<tool_call>\n{"name": "get_weather", "arguments": '
    tag = {
        "type": "structural_tag",
        "structures": [{"begin": begin, "schema": CITY, "end": "}\n</tool_call>"}],
        "triggers": ["<tool_call>"],
    }
    templated = choices(server, messages=OSLO, temperature=0)[0]
    assert calls_of(templated, {"get_weather": {}}) == ["get_weather"]
    system = {"role": "system", "content": "You may call these functions:\n<tools>\n" + json.dumps(TOOLS[0]) + "\n</tools>\nTo call a function, answer with its name and arguments as JSON:\n<tool_call>\n" + '{"name": "function", "arguments": {}}\n</tool_call>'}  # fmt: skip
    for kind in ("legacy", "format"):
        new = {"type": "triggered_tags", "triggers": ["<tool_call>"], "tags": [{"begin": begin, "content": {"type": "json_schema", "json_schema": CITY}, "end": "}\n</tool_call>"}]}  # fmt: skip
        asked = tag if kind == "legacy" else {"type": "structural_tag", "format": new}
        (choice,) = choices(server, messages=[system, *OSLO], tools=None, response_format=asked, temperature=0)
        found = re.search(re.escape(begin) + r"(\{.*\})\}\n</tool_call>", choice["message"]["content"])
        assert found, choice
        assert jsonschema_rs.validator_for(CITY).is_valid(json.loads(found.group(1)))
        assert choice["finish_reason"] == "stop"
        (hello,) = choices(server, tools=None, response_format=asked, temperature=0)
        assert "Hello" in hello["message"]["content"]


def test_calls_obey_over_an_engines_death(server: Any) -> None:
    """The engine is killed in the middle of a call: the next one's matcher walks what was received, and goes on."""
    parameters = {
        "type": "object",
        "properties": {"code": {"type": "string", "pattern": "^([a-z]{3}-){60}end$"}},
        "required": ["code"],
        "additionalProperties": False,
    }
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    asked = {
        "messages": HELLO,
        "max_tokens": 900,
        "tools": tools,
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "temperature": 1.0,
        "seed": 3,
    }
    before = server.metric("penstock_replays_total")
    arguments, reasons, rows = "", [], 0
    with server.client.stream("POST", "/v1/chat/completions", json={**asked, "stream": True}) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                (choice,) = json.loads(line[6:])["choices"]
                for call in choice["delta"].get("tool_calls") or []:
                    arguments += (call.get("function") or {}).get("arguments") or ""
                    rows += 1
                reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
                if rows == 20:
                    rows += 1
                    server.children()["engine"][0].kill()
    assert reasons == ["tool_calls"]
    assert re.fullmatch("([a-z]{3}-){60}end", json.loads(arguments)["code"])
    assert server.metric("penstock_replays_total") > before


# ------------------------------------------------------------------ other formats


def with_marks(tmp: Path, marks: list[str], *, special: bool, before: str = "") -> str:
    """The demo model, whose tokenizer spells reserved tokens as these marks; `before` ends its prompts."""
    folder = tmp / "model"
    shutil.copytree(demo_folder(), folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    renamed = {f"<|reserved_{i}|>": mark for i, mark in enumerate(marks)}
    taken = [token["content"] for token in tokenizer["added_tokens"] if token["content"] in marks]
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):  # the model's own token of that spelling
        text = (folder / name).read_text(encoding="utf-8")
        for mark in taken:
            text = text.replace(mark, mark.replace("<", "<own "))
        (folder / name).write_text(text, encoding="utf-8")
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    for token in tokenizer["added_tokens"]:
        if token["content"] in renamed:
            token["content"], token["special"] = renamed[token["content"]], special
    vocab = tokenizer["model"]["vocab"]
    for old, new in renamed.items():
        if old in vocab:
            vocab[new] = vocab.pop(old)
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    config = folder / "tokenizer_config.json"
    found = json.loads(config.read_text(encoding="utf-8"))
    found["chat_template"] = found["chat_template"].replace(
        "{{- '<|assistant|>' }}{% endif %}", "{{- '<|assistant|>' }}" + f"{{{{- '{before}' }}}}{{% endif %}}"
    )
    config.write_text(json.dumps(found), encoding="utf-8")
    return str(folder)


MARKS = {spec.name: spec.marks for spec in BUILT_IN}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "special"),
    [
        (name, True)
        for name in ("llama3_json", "mistral", "deepseek_v3", "deepseek_v31", "openai", "pythonic", "deepseek_v32", "step3", "glm45")
    ]
    + [(name, False) for name in ("mistral", "qwen3_coder", "glm45")],
)
def test_every_format(starter: Any, tmp_path: Path, name: str, special: bool) -> None:
    """Its marks special tokens of the vocabulary, or ordinary ones."""
    both = ["--reasoning-parser", name] if name == "openai" else []
    server = starter("--model", with_marks(tmp_path, MARKS[name], special=special), "--tool-call-parser", name, *both, "--deterministic")
    most = {"max_tokens": 600, "temperature": 0.8, "seed": 4, "n": 3, "logit_bias": {"12": 18.0} if name == "openai" else {}}  # <|end|>
    for fields in ({"tool_choice": "required"}, {"tool_choice": "required", "parallel_tool_calls": False}, {"tool_choice": NAMED}):
        whole = choices(server, **most, **fields)
        ends = 0
        for choice in whole:
            if choice["finish_reason"] != "length":
                ends += 1
                assert not choice["message"]["content"]
                assert calls_of(choice)
                if len(fields) == 2 or fields["tool_choice"] is NAMED:
                    assert len(calls_of(choice)) == 1
                assert choice["finish_reason"] == ("stop" if fields["tool_choice"] is NAMED else "tool_calls")
            else:  # it likes to call: all but the last one are complete
                assert len(choice["message"]["tool_calls"] or []) > 1 or name == "openai"
        assert ends or fields == {"tool_choice": "required"}
        assert [shape(choice) for choice in streamed(server, **most, **fields)] == [shape(choice) for choice in whole]
    for choice in choices(server, **most, tools=STRICT):
        assert calls_of(choice) or choice["message"]["content"] or choice["finish_reason"] == "length" or name == "openai"
    reply = post(server, **most, response_format=FORMAT)
    for choice in reply.json()["choices"]:
        if choice["finish_reason"] == "stop":
            assert jsonschema_rs.validator_for(PERSON).is_valid(json.loads(choice["message"]["content"]))
    reply = post(server, **most, response_format={"type": "json_object"})
    assert (reply.status_code == 400) is (name == "llama3_json")


@pytest.mark.slow
@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize(("parser", "before"), [("deepseek_r1", ""), ("qwen3", "<think>"), ("qwen3", "<think></think>")])
def test_the_answer_of_a_reasoning_model_obeys(starter: Any, tmp_path: Path, parser: str, before: str, special: bool) -> None:
    server = starter(
        "--model",
        with_marks(tmp_path, ["<think>", "</think>"], special=special, before=before),
        "--reasoning-parser",
        parser,
        "--deterministic",
    )
    end = {"9": 18.0}  # </think> becomes likely: reasoning ends some time
    reasoned = 0
    for fields in (
        {"tools": None, "response_format": FORMAT},
        {"tool_choice": "required"},
        {"response_format": FORMAT},
        {"tools": None, "guided_choice": ["yes", "no"]},
    ):
        asked = {"n": 4, "temperature": 1.0, "seed": 11, "max_tokens": 400, "logit_bias": end, **fields}
        whole = choices(server, **asked)
        ended = [choice for choice in whole if choice["finish_reason"] != "length"]
        assert ended
        for choice in ended:
            content, reasoning, _, reason = shape(choice)
            reasoned += bool(reasoning)
            called = calls_of(choice, SCHEMAS if "tool_choice" in fields else {name: {} for name in SCHEMAS})
            assert reason == ("tool_calls" if called else "stop")
            if "tool_choice" in fields:
                assert called
            elif "guided_choice" in fields:
                assert content in ("yes", "no")
            elif not called:
                assert jsonschema_rs.validator_for(PERSON).is_valid(json.loads(content))
        assert [shape(choice) for choice in streamed(server, **asked)] == [shape(choice) for choice in whole]
    assert bool(reasoned) == (before != "<think></think>")


@pytest.mark.slow
def test_calls_obey_when_memory_is_short(starter: Any) -> None:
    """Preempted sequences are computed again, and their matchers walk again."""
    server = starter("--kv-cache-memory-bytes", "3M", "--max-model-len", "512", "--no-enable-prefix-caching", "--deterministic")
    parameters = {
        "type": "object",
        "properties": {"code": {"type": "string", "pattern": "^([a-z]{3}-){40}end$"}},
        "required": ["code"],
        "additionalProperties": False,
    }
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    asked = {
        "tools": tools,
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "n": 8,
        "temperature": 1.0,
        "seed": 3,
        "max_tokens": 300,
    }
    for choice in choices(server, **asked):
        assert calls_of(choice, {"f": parameters}) == ["f"]
    assert server.metric("penstock_preemptions_total") > 0
