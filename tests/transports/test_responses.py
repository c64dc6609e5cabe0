"""/v1/responses: what clients of OpenAI's Responses API send and get, to the byte, and that nothing is left out in silence."""

from __future__ import annotations

import asyncio
import json
import re
import typing
from collections.abc import Iterator
from typing import Any

import msgspec
import openai
import pytest
from edge_kit import Edge, MakeEdge, delta, finished, silent
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import input_token_count_params, response_create_params

from penstock.core.actors.text.bounds import SMALL, TRANSLATED_FIELDS
from penstock.core.protocol.columns import i32
from penstock.core.protocol.messages import (
    ARGUMENTS,
    CONTENT,
    DONE,
    NAME,
    REASONING,
    Cancel,
    Message,
    Query,
    Rejected,
    Submit,
    TokenLogprobs,
)
from penstock.transports import responses_replies as replies
from penstock.transports.openai_schema import ChatRequest, CompletionRequest
from penstock.transports.responses_fit import fitted
from penstock.transports.responses_items import place_of, seal, unseal
from penstock.transports.responses_schema import REFUSED, InputTokensRequest, ResponsesRequest

PATH, COUNT = "/v1/responses", "/v1/responses/input_tokens"
HI: dict[str, Any] = {"model": "brook", "input": "hi"}
WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
ID = re.compile(r"(?<=_)[0-9a-f]{32}0")


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    one = Edge(tmp_path_factory.mktemp("edge"), {})
    one.text.answers["tokenize"] = lambda _: (200, b'{"count":7,"max_model_len":64,"tokens":[1]}')
    one.start()
    yield one
    one.stop()


def named_events(text: str) -> list[Any]:
    """The data of a stream whose events are named after their types, and numbered."""
    out = []
    for block in text.split("\n\n")[:-1]:
        name, data = block.split("\n", 1)
        event = msgspec.json.decode(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        out.append(event)
    assert [event["sequence_number"] for event in out] == list(range(len(out)))
    return out


def submitted(edge: Edge, **fields: Any) -> Submit:
    edge.text.received.clear()
    reply = edge.kept.post(PATH, json=HI | fields)
    assert reply.status_code == 200, reply.text
    submit = edge.text.wait_for(Submit)[0]
    assert isinstance(submit, Submit)
    return submit


def messages(edge: Edge, **fields: Any) -> Any:
    return json.loads(submitted(edge, **fields).messages)


def refused(edge: Edge, path: str = PATH, **fields: Any) -> tuple[int, str, str, str]:
    """Status, code, field, message."""
    edge.text.received.clear()
    reply = edge.kept.post(path, json=HI | fields)
    error = msgspec.convert(reply.json()["error"], ErrorFields)
    assert not [one for one in edge.text.received if isinstance(one, Submit)], "it never reaches a device"
    return reply.status_code, error.code, error.param or "", error.message


class ErrorFields(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str


def rows(*parts: tuple[int, int, str], reason: str = "stop", extra: dict[str, Any] | None = None, end: dict[str, Any] | None = None) -> Any:
    """A script: a row for each (channel, call, text), and one that ends the answer."""

    def play(submit: Submit) -> list[Message]:
        found: list[Message] = []
        for number, (channel, call, text) in enumerate(parts):
            more: dict[str, Any] = {"extra": {"call_id": f"call_{call}"}} if channel == NAME else {}
            if extra and channel == CONTENT:
                more = {"extra": extra}
            one = delta({"key": submit.key, "text": text, "output": number + 1, **more})
            found.append(msgspec.structs.replace(one, channels=_u8([channel]), calls=i32([call])))
        found.append(delta({"key": submit.key, "tokens": [], "reason": reason, **({"extra": end} if end else {})}))
        found.append(finished(submit.key, output=len(parts) + 1))
        return found

    return play


def _u8(values: list[int]) -> Any:
    import numpy as np

    return np.array(values, np.uint8)


def fold(events: list[Any]) -> dict[str, Any]:
    """What a client makes of the deltas alone: the items, without looking at what .done events repeat."""
    items: list[Any] = []
    for event in events:
        kind = event["type"]
        if kind == "response.output_item.added":
            assert event["output_index"] == len(items)
            items.append(event["item"])
        elif kind == "response.content_part.added":
            assert event["content_index"] == 0
            items[event["output_index"]]["content"].append(event["part"])
        elif kind.endswith("_text.delta"):
            part = items[event["output_index"]]["content"][0]
            part["text"] += event["delta"]
            if event.get("logprobs"):
                part["logprobs"] += event["logprobs"]
        elif kind == "response.function_call_arguments.delta":
            items[event["output_index"]]["arguments"] += event["delta"]
        elif kind == "response.output_item.done":
            items[event["output_index"]]["status"] = event["item"]["status"]
            if "encrypted_content" in event["item"]:
                items[event["output_index"]]["encrypted_content"] = event["item"]["encrypted_content"]
            assert event["item"] == items[event["output_index"]]
        elif kind == "response.content_part.done":
            assert event["part"] == items[event["output_index"]]["content"][0]
    return {**events[-1]["response"], "output": items}


def masked(value: Any) -> Any:
    """Without what differs from one request to the next."""
    text = ID.sub("ID", json.dumps(value))
    return json.loads(re.sub(r'"(created_at|completed_at)": \d+', r'"\1": 0', text))


# ------------------------------------------------------------------ what text is told


def test_a_text_is_a_message_of_the_user_and_instructions_one_of_the_system(edge: Edge) -> None:
    assert messages(edge) == [{"role": "user", "content": "hi"}]
    assert messages(edge, instructions="Be brief.") == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]


def test_items_become_a_conversation(edge: Edge) -> None:
    items = [
        {"role": "developer", "content": "d"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "id": "rs_x", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "id": "m", "role": "assistant", "status": "completed", "content": [{"type": "output_text", "text": "I look.", "annotations": []}]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city":"Oslo"}'},
        {"type": "function_call", "call_id": "c2", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "sun"}]},
        {"role": "assistant", "content": "Rain."},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"role": "user", "content": "why"},
    ]  # fmt: skip
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city":"Oslo"}'}, "id": "c1"}
    assert messages(edge, input=items) == [
        {"role": "developer", "content": "d"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "hm",
            "tool_calls": [call, {**call, "id": "c2", "function": {"name": "weather", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        {"role": "tool", "tool_call_id": "c2", "content": "sun"},
        {"role": "assistant", "content": "Rain."},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"role": "user", "content": "why"},
    ]


def test_calls_without_words_have_no_content(edge: Edge) -> None:
    items = [
        {"role": "user", "content": "a"},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": ""},
    ]
    assert messages(edge, input=items)[1]["content"] is None


def test_settings_reach_text_under_its_names(edge: Edge) -> None:
    submit = submitted(
        edge,
        max_output_tokens=7,
        temperature=0.5,
        top_p=0.25,
        include=["message.output_text.logprobs"],
        top_logprobs=3,
        parallel_tool_calls=False,
        reasoning={"effort": "low", "summary": "auto"},
        seed=4,
        top_k=2,
        cache_salt="s",
    )
    sampling = submit.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.logprobs, sampling.seed, sampling.top_k) == (
        7,
        0.5,
        0.25,
        3,
        4,
        2,
    )
    assert (submit.parallel_calls, submit.cache_salt, submit.split) == (False, "s", True)
    assert json.loads(submit.template_kwargs) == {"reasoning_effort": "low"}
    assert submit.names["max_tokens"] == "max_output_tokens"


def test_formats_become_grammars(edge: Edge) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    submit = submitted(edge, text={"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}})
    assert submit.grammar is not None
    assert (json.loads(submit.grammar.source), submit.grammar.field) == (schema, "text.format.schema")
    submit = submitted(edge, text={"format": {"type": "json_object"}, "verbosity": "medium"})
    assert submit.grammar is not None
    assert (submit.grammar.kind, submit.grammar.field) == ("json", "text.format")
    assert submitted(edge, text={"format": {"type": "text"}}).grammar is None


def test_tools_are_told_as_chat_tells_them(edge: Edge) -> None:
    submit = submitted(edge, tools=[WEATHER | {"description": "d", "strict": False}], tool_choice="auto")
    assert json.loads(submit.tools) == [
        {"type": "function", "function": {"name": "weather", "description": "d", "parameters": WEATHER["parameters"], "strict": False}}
    ]
    assert not submitted(edge, tools=[WEATHER], tool_choice="none").tools
    assert not submitted(edge, tools=[], tool_choice="auto").tools


# ------------------------------------------------------------------ replies


def test_golden_whole(edge: Edge) -> None:
    reply = edge.kept.post(PATH, json=HI | {"metadata": {"a": "b"}}, headers={"x-request-id": "r1"})
    assert reply.headers["x-request-id"] == "r1"
    assert "r1" not in reply.text, "the id cannot be guessed from what the client chose"
    text = ID.sub("ID", re.sub(r'"(created_at|completed_at)":\d{10}', r'"\1":0', reply.text))
    assert text == (
        '{"id":"resp_ID","object":"response","created_at":0,"status":"completed","completed_at":0,"error":null,"incomplete_details":null,'
        '"model":"brook","output":[{"id":"msg_ID_0","type":"message","status":"completed","role":"assistant",'
        '"content":[{"type":"output_text","annotations":[],"logprobs":[],"text":"Hello world"}]}],'
        '"usage":{"input_tokens":3,"input_tokens_details":{"cached_tokens":0,"cache_write_tokens":0},"output_tokens":2,'
        '"output_tokens_details":{"reasoning_tokens":0},"total_tokens":5},"background":false,"instructions":null,"max_output_tokens":null,'
        '"max_tool_calls":null,"metadata":{"a":"b"},"parallel_tool_calls":true,"previous_response_id":null,"prompt_cache_key":null,'
        '"reasoning":{"effort":null,"summary":null},"safety_identifier":null,"service_tier":"default","store":true,"temperature":null,'
        '"text":{"format":{"type":"text"},"verbosity":"medium"},"tool_choice":"auto","tools":[],"top_logprobs":0,"top_p":null,'
        '"truncation":"disabled","user":null}'
    )


def test_golden_stream(edge: Edge) -> None:
    reply = edge.kept.post(PATH, json=HI | {"stream": True})
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    between = reply.text[reply.text.index("event: response.output_item.added") : reply.text.index("event: response.completed")]
    at = '"item_id":"msg_ID_0","output_index":0,"content_index":0'
    part = '"part":{"type":"output_text","annotations":[],"logprobs":[],"text":'
    assert ID.sub("ID", between) == (
        'event: response.output_item.added\ndata: {"type":"response.output_item.added","sequence_number":2,"output_index":0,'
        '"item":{"id":"msg_ID_0","type":"message","status":"in_progress","role":"assistant","content":[]}}\n\n'
        f'event: response.content_part.added\ndata: {{"type":"response.content_part.added","sequence_number":3,{at},{part}""}}}}\n\n'
        f'event: response.output_text.delta\ndata: {{"type":"response.output_text.delta","sequence_number":4,{at},"delta":"Hello","logprobs":[]}}\n\n'
        f'event: response.output_text.delta\ndata: {{"type":"response.output_text.delta","sequence_number":5,{at},"delta":" world","logprobs":[]}}\n\n'
        f'event: response.output_text.done\ndata: {{"type":"response.output_text.done","sequence_number":6,{at},"text":"Hello world","logprobs":[]}}\n\n'
        f'event: response.content_part.done\ndata: {{"type":"response.content_part.done","sequence_number":7,{at},{part}"Hello world"}}}}\n\n'
        'event: response.output_item.done\ndata: {"type":"response.output_item.done","sequence_number":8,"output_index":0,'
        '"item":{"id":"msg_ID_0","type":"message","status":"completed","role":"assistant",'
        '"content":[{"type":"output_text","annotations":[],"logprobs":[],"text":"Hello world"}]}}\n\n'
    )
    kinds = [event["type"] for event in named_events(reply.text)]
    assert (kinds[:2], kinds[-1]) == (["response.created", "response.in_progress"], "response.completed")


POSITION = TokenLogprobs(ids=[10, 11], logprobs=[-0.5, -1.0], ranks=[1, 2], texts=["A", "B"], bytes_=[b"A", b"B"])
STORIES: dict[str, tuple[list[tuple[int, int, str]], str]] = {
    "words": ([(CONTENT, -1, "a"), (CONTENT, -1, "b")], "stop"),
    "nothing": ([], "stop"),
    "cut": ([(CONTENT, -1, "a")], "length"),
    "reasoning": ([(REASONING, -1, "h"), (REASONING, -1, "m"), (CONTENT, -1, "a")], "stop"),
    "reasoning cut": ([(REASONING, -1, "h")], "length"),
    "a call": ([(NAME, 0, "f"), (ARGUMENTS, 0, '{"a"'), (ARGUMENTS, 0, ":1}"), (DONE, 0, "")], "tool_calls"),
    "all": (
        [
            (REASONING, -1, "h"),
            (CONTENT, -1, "I call"),
            (NAME, 0, "f"),
            (ARGUMENTS, 0, "{}"),
            (DONE, 0, ""),
            (NAME, 1, "g"),
            (ARGUMENTS, 1, "{}"),
            (DONE, 1, ""),
            (CONTENT, -1, "done"),
        ],
        "tool_calls",
    ),
    "a call cut": ([(NAME, 0, "f"), (ARGUMENTS, 0, '{"a"')], "length"),
}


@pytest.mark.parametrize("story", STORIES)
@pytest.mark.parametrize("more", [{}, {"include": ["reasoning.encrypted_content", "message.output_text.logprobs"], "top_logprobs": 1}])
def test_the_events_add_up_to_the_whole(script: Edge, story: str, more: dict[str, Any]) -> None:
    parts, reason = STORIES[story]
    script.text.script = rows(*parts, reason=reason, extra={"logprobs": [POSITION]} if more else None)
    whole = script.kept.post(PATH, json=HI | more).json()
    stream = named_events(script.kept.post(PATH, json=HI | more | {"stream": True}).text)
    assert masked(fold(stream)) == masked(stream[-1]["response"]) == masked(whole)
    msgspec.convert(whole, replies.ResponseReply)
    for event in stream:
        assert event.keys() <= set(replies.ResponseEvent.__struct_fields__)
        msgspec.convert(event, replies.ResponseEvent)
    assert whole["status"] == ("incomplete" if reason == "length" else "completed")
    assert whole["incomplete_details"] == ({"reason": "max_output_tokens"} if reason == "length" else None)
    assert stream[-1]["type"] == f"response.{whole['status']}"
    assert whole["output"][-1]["status"] == whole["status"]
    text = "".join(text for channel, _, text in parts if channel == CONTENT)
    said = [part for item in whole["output"] if item["type"] == "message" for part in item["content"]]
    assert "".join(part["text"] for part in said) == text
    assert sum(len(part["logprobs"]) for part in said) == (sum(channel == CONTENT for channel, _, _ in parts) if more else 0)
    kinds = [item["type"] for item in whole["output"]]
    if story == "all":
        assert kinds == ["reasoning", "message", "function_call", "function_call", "message"]
    for item in whole["output"]:
        assert ("encrypted_content" in item) is (item["type"] == "reasoning" and bool(more))


@pytest.mark.parametrize("stop_reason", [None, "x"])
@pytest.mark.parametrize(
    ("more", "statuses"),
    [([], ["incomplete"]), ([(NAME, 1, "g"), (ARGUMENTS, 1, "{}"), (DONE, 1, "")], ["incomplete", "completed"]), ([(CONTENT, -1, "b")], ["incomplete", "completed"])],
    ids=["alone", "before a call", "before words"],
)  # fmt: skip
def test_a_call_that_the_answer_ended_in_is_incomplete_though_tokens_are_left(
    script: Edge, stop_reason: str | None, more: list[tuple[int, int, str]], statuses: list[str]
) -> None:
    broken = [(NAME, 0, "f"), (ARGUMENTS, 0, '{"a"')]
    script.text.script = rows(*broken, *more, reason="length", end={"stop_reason": stop_reason, "unfinished": True})
    whole = script.kept.post(PATH, json=HI).json()
    stream = named_events(script.kept.post(PATH, json=HI | {"stream": True}).text)
    assert masked(fold(stream)) == masked(stream[-1]["response"]) == masked(whole)
    msgspec.convert(whole, replies.ResponseReply)
    assert (whole["status"], whole["incomplete_details"]) == ("incomplete", {"reason": "stop"})
    assert [item["status"] for item in whole["output"]] == statuses


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([(CONTENT, "a"), (CONTENT, ""), (REASONING, "r"), (REASONING, "ü\n"), (NAME, "f"), (CONTENT, '\u2028"')])),
    st.sampled_from(["stop", "length"]),
)
def test_any_row_of_rows_adds_up(shared_edge: Edge, parts: list[tuple[int, str]], reason: str) -> None:
    told: list[tuple[int, int, str]] = []
    calls = 0
    for channel, text in parts:
        told.append((channel, calls if channel == NAME else -1, text))
        if channel == NAME:
            told += [(ARGUMENTS, calls, "{}"), (DONE, calls, "")]
            calls += 1
    shared_edge.text.script = rows(*told, reason=reason)
    whole = shared_edge.kept.post(PATH, json=HI).json()
    stream = named_events(shared_edge.kept.post(PATH, json=HI | {"stream": True, "stream_options": {"include_obfuscation": True}}).text)
    assert masked(fold(stream)) == masked(stream[-1]["response"]) == masked(whole)


def test_obfuscated_deltas_have_sizes_that_tell_nothing(script: Edge) -> None:
    sizes = set()
    for text in ("a", "abcdefghij", "ü" * 12):
        script.text.script = rows((CONTENT, -1, text))
        reply = script.kept.post(PATH, json=HI | {"stream": True, "stream_options": {"include_obfuscation": True}})
        sizes |= {len(line.encode()) for line in reply.text.splitlines() if "output_text.delta" in line and line.startswith("data")}
    assert len(sizes) == 1


def test_an_answer_goes_back_as_input(script: Edge) -> None:
    """As clients without a store do it, who keep nothing of reasoning but what is sealed."""
    script.text.script = rows(
        (REASONING, -1, "hm"), (CONTENT, -1, "I call"), (NAME, 0, "f"), (ARGUMENTS, 0, "{}"), (DONE, 0, ""), reason="tool_calls"
    )
    ask = HI | {"store": False, "include": ["reasoning.encrypted_content"]}
    output = script.kept.post(PATH, json=ask).json()["output"]
    del output[0]["content"]
    again = [{"role": "user", "content": "hi"}, *output, {"type": "function_call_output", "call_id": "call_0", "output": "42"}]
    assert messages(script, input=again) == [
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": "I call",
            "reasoning_content": "hm",
            "tool_calls": [{"id": "call_0", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "call_0", "content": "42"},
    ]


@given(st.text())
def test_what_is_sealed_can_be_opened(text: str) -> None:
    assert unseal(seal(text)) == text.encode("utf-8", "replace").decode()


@given(st.text())
def test_nothing_else_is_opened_or_takes_place(text: str) -> None:
    assert unseal(text) is None or text.startswith("pk1.")
    unseal("pk1." + text)
    place_of(text)


def test_metrics_when_asked_for(edge: Edge) -> None:
    headers = {"x-include-metrics": "1"}
    assert edge.kept.post(PATH, json=HI, headers=headers).json()["metrics"]["preemptions"] == 0
    stream = named_events(edge.kept.post(PATH, json=HI | {"stream": True}, headers=headers).text)
    assert stream[-1]["response"]["metrics"]["preemptions"] == 0


def test_a_request_id_is_that_of_header_and_log_and_not_of_the_response(edge: Edge) -> None:
    cases: list[tuple[dict[str, Any], bool]] = [({}, True), ({"stream": True}, True), ({"background": True}, False)]
    for more, is_told in cases:
        reply = edge.kept.post(PATH, json=HI | {"request_id": "mine"} | more)
        assert (reply.headers["x-request-id"] == "mine") is is_told
        assert "resp_mine" not in reply.text
        assert edge.kept.post(PATH, json=HI | {"request_id": "mine"} | more, headers={"x-request-id": "r"}).headers["x-request-id"] == "r"


def test_input_tokens(edge: Edge) -> None:
    edge.text.received.clear()
    reply = edge.kept.post(COUNT, json=HI | {"instructions": "Be brief.", "tools": [WEATHER], "max_output_tokens": 3})
    assert (reply.status_code, reply.text) == (200, '{"object":"response.input_tokens","input_tokens":7}')
    asked = next(query for query in edge.text.wait_for(Query, 2) if query.what == "tokenize")
    body = json.loads(asked.body)
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    assert body["tools"][0]["function"]["name"] == "weather"
    with edge.client() as client:
        assert client.responses.input_tokens.count(model="brook", input="hi").input_tokens == 7


# ------------------------------------------------------------------ refusals


def allowed(tool: dict[str, Any] | None = None) -> dict[str, Any]:
    """A tool_choice of one tool, with changes of that."""
    return {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "weather", **(tool or {})}]}


SCHEMA: dict[str, Any] = {"type": "json_schema", "name": "n", "schema": {"type": "object"}}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"input": []}, "input"),
    ({"input": None}, "input"),
    ({"input": 3}, "input"),
    ({"input": [{"type": 3}]}, "input[0].type"),
    ({"input": [{"type": "nope"}]}, "input[0].type"),
    ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [{"role": "user", "content": [3]}]}, "input[0].content[0]"),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
    ({"input": [{"role": "user", "content": [{"type": "nope"}]}]}, "input[0].content[0].type"),
    ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "a", "more": 1}]}]}, "input[0].content[0].more"),
    ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "input[0].arguments"),
    ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input[0].call_id"),
    ({"input": [{"type": "reasoning", "summary": [{"type": "x"}]}]}, "input[0].summary[0]"),
    ({"input": [{"type": "reasoning", "summary": [], "encrypted_content": "gAAA"}]}, "input[0].encrypted_content"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].id"),
    ({"input": [{"id": "msg_" + "0" * 33 + "_0"}]}, "input[0].id"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"top_p": 2}, "top_p"),
    ({"top_logprobs": 21, "include": ["message.output_text.logprobs"]}, "top_logprobs"),
    ({"top_logprobs": 1}, "top_logprobs"),
    ({"include": ["nope"]}, "include"),
    ({"metadata": {str(n): "x" for n in range(17)}}, "metadata"),
    ({"metadata": {"k" * 65: "x"}}, "metadata." + "k" * 64),
    ({"metadata": {"k": "x" * 513}}, "metadata.k"),
    ({"metadata": {"k": 1}}, "metadata.k"),
    ({"user": "x" * 513}, "user"),
    ({"prompt_cache_options": "explicit"}, "prompt_cache_options"),
    ({"service_tier": "gold"}, "service_tier"),
    ({"max_tool_calls": 0}, "max_tool_calls"),
    ({"truncation": "nope"}, "truncation"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ({"text": {"verbosity": "loud"}}, "text.verbosity"),
    ({"tools": [{"name": "f"}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].name"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools[0].name"),
    ({"tools": [WEATHER | {"colour": 1}]}, "tools[0].colour"),
    ({"tools": [WEATHER | {"parameters": 3}]}, "tools[0].parameters"),
    ({"tool_choice": "maybe", "tools": [WEATHER]}, "tool_choice"),
    ({"tool_choice": {}, "tools": [WEATHER]}, "tool_choice.type"),
    ({"tool_choice": {"type": "function"}, "tools": [WEATHER]}, "tool_choice.name"),
    ({"tool_choice": {"type": "allowed_tools", "mode": "auto"}, "tools": [WEATHER]}, "tool_choice.tools"),
    ({"tool_choice": {"type": "function", "name": "weather", "foo": 1}, "tools": [WEATHER]}, "tool_choice.foo"),
    ({"tool_choice": {"type": "function", "function": {"name": "weather"}}, "tools": [WEATHER]}, "tool_choice.function"),
    ({"tool_choice": allowed() | {"bar": None}, "tools": [WEATHER]}, "tool_choice.bar"),
    ({"tool_choice": allowed({"foo": 1}), "tools": [WEATHER]}, "tool_choice.tools[0].foo"),
    ({"tool_choice": allowed({"name": 3}), "tools": [WEATHER]}, "tool_choice.tools[0].name"),
    ({"tool_choice": allowed({"type": None}), "tools": [WEATHER]}, "tool_choice.tools[0].type"),
    ({"background": True, "store": False}, "background"),
    ({"previous_response_id": "resp_none"}, "previous_response_id"),
]
UNSUPPORTED: list[tuple[dict[str, Any], str]] = [
    ({"input": [{"type": "web_search_call", "id": "x", "status": "completed"}]}, "input[0].type"),
    ({"input": [{"type": "computer_call_output"}]}, "input[0].type"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]}]}, "input[0].content[0].type"),
    ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]}, "input[0].content[0].type"),
    *(({"tools": [{"type": kind}]}, "tools[0].type") for kind in ("web_search", "file_search", "code_interpreter", "mcp", "custom", "local_shell")),
    ({"tools": [WEATHER | {"defer_loading": True}]}, "tools[0].defer_loading"),
    ({"tool_choice": {"type": "file_search"}, "tools": [WEATHER]}, "tool_choice"),
    ({"tool_choice": {"type": "mcp", "server_label": "x"}, "tools": [WEATHER]}, "tool_choice"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"conversation": {"id": "conv_1"}}, "conversation"),
    ({"prompt": {"id": "pmpt_1"}}, "prompt"),
    ({"context_management": [{"type": "compaction"}]}, "context_management"),
    ({"moderation": {"model": "x"}}, "moderation"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"text": {"format": {"type": "grammar"}}}, "text.format"),
    ({"text": {"format": {"type": "structural_tag"}}}, "text.format"),
    ({"text": {"format": {"type": "json_object", "schema": {"type": "object"}}}}, "text.format"),
    ({"text": {"format": {"type": "json_object", "foo": 1}}}, "text.format"),
    ({"text": {"format": {"type": "text", "schema": {"type": "object"}}}}, "text.format"),
    ({"text": {"format": {"type": "text", "strict": True}}}, "text.format"),
    ({"text": {"format": SCHEMA | {"Schema": {"type": "string"}}}}, "text.format.Schema"),
    ({"text": {"format": SCHEMA | {"Strict": True}}}, "text.format.Strict"),
    ({"text": {"format": SCHEMA | {"json_schema": {"schema": {"type": "string"}}}}}, "text.format.json_schema"),
    ({"text": {"Format": SCHEMA}}, "text.Format"),
    ({"input": [{"role": "user", "content": "x", "Content": "y"}]}, "input[0].Content"),
    ({"input": [{"type": "function_call", "callId": "c", "name": "f", "arguments": "{}"}]}, "input[0].callId"),
    ({"reasoning": {"Effort": "low"}}, "reasoning.Effort"),
    ({"stream": True, "stream_options": {"includeObfuscation": True}}, "stream_options.includeObfuscation"),
    ({"tool_choice": allowed({"type": "mcp", "name": "weather"}), "tools": [WEATHER]}, "tool_choice.tools[0]"),
    ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
    ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
    ({"max_tokens": 5}, "max_tokens"),
    ({"maxOutputTokens": 5}, "maxOutputTokens"),
    ({"n": 2}, "n"),
    ({"messages": [{"role": "user", "content": "x"}]}, "messages"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"allowed_token_ids": [5]}, "allowed_token_ids"),
    ({"bad_words": ["x"]}, "bad_words"),
    ({"prompt_logprobs": 1}, "prompt_logprobs"),
    ({"return_token_ids": True}, "return_token_ids"),
    ({"documents": [{"text": "x"}]}, "documents"),
    ({"guided_json": {}, "guided_regex": "a"}, "guided_regex"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "name"), WRONG, ids=lambda value: str(value)[:60])
def test_a_wrong_field_is_named(edge: Edge, fields: dict[str, Any], name: str) -> None:
    for stream in (False, True):
        status, code, param, message = refused(edge, **fields, stream=stream)
        assert (status, code, param) == (400, "invalid_value", name), message
        assert "messages" not in message
        assert "response_format" not in message


def test_every_field_of_the_official_client_is_known() -> None:
    """Taken, or refused by name: none is ignored."""
    names = set(typing.get_type_hints(response_create_params.ResponseCreateParamsBase)) | {"stream"}
    assert len(names) > 25
    assert names <= set(ResponsesRequest.__struct_fields__) | REFUSED[ResponsesRequest].keys()
    chats = {*ChatRequest.__struct_fields__, *CompletionRequest.__struct_fields__}
    assert chats <= set(ResponsesRequest.__struct_fields__) | REFUSED[ResponsesRequest].keys(), "nor is one that chat has"
    names = set(typing.get_type_hints(input_token_count_params.InputTokenCountParams))
    assert names <= set(InputTokensRequest.__struct_fields__) | REFUSED[InputTokensRequest].keys()


def test_stream_options_need_a_stream(edge: Edge) -> None:
    assert refused(edge, stream_options={"include_obfuscation": True})[:3] == (400, "invalid_value", "stream_options")


@pytest.mark.parametrize(("fields", "name"), UNSUPPORTED, ids=lambda value: str(value)[:60])
def test_what_does_not_exist_here_is_refused_by_name(edge: Edge, fields: dict[str, Any], name: str) -> None:
    status, code, param, message = refused(edge, **fields)
    assert (status, code, param) == (400, "unsupported_feature", name), message


@pytest.mark.parametrize(
    "fields",
    [
        {"include": ["web_search_call.action.sources", "code_interpreter_call.outputs"]},
        {"user": "u", "safety_identifier": "s", "prompt_cache_key": "k", "prompt_cache_retention": "24h", "service_tier": "flex"},
        {"max_tool_calls": 3, "truncation": "disabled", "conversation": None, "prompt": None, "tool_choice": "auto"},
        {"reasoning": {"summary": "auto", "context": "auto", "mode": "standard"}, "text": {"verbosity": "medium"}},
        {"input": [{"role": "assistant", "content": "a", "phase": "commentary"}, {"role": "user", "content": "b"}]},
        {"stream": False, "background": False, "metadata": None},
        {"text": {"format": {"type": "json_object", "schema": None, "description": ""}}},
        {"text": {"format": SCHEMA | {"json_schema": None}}, "stream": True, "stream_options": {"include_usage": True}},
    ],
)
def test_what_asks_for_nothing_is_taken_in_silence(edge: Edge, fields: dict[str, Any]) -> None:
    reply = edge.kept.post(PATH, json=HI | fields)
    assert reply.status_code == 200, reply.text
    assert "x-penstock-warning" not in reply.headers


def test_unknown_fields_are_named_in_a_header_or_refused(edge: Edge, make_edge: MakeEdge) -> None:
    body = HI | {"colour": 1, "reasoning": {"depth": 3}, "input": [{"role": "user", "content": "x", "mood": 1}]}
    body["text"] = {"format": SCHEMA | {"foo": 1}, "tone": "warm"}
    names = "colour, input[0].mood, reasoning.depth, text.format.foo, text.tone"
    for more in ({}, {"stream": True}, {"background": True}, {"background": True, "stream": True}):
        reply = edge.kept.post(PATH, json=body | more)
        assert (reply.status_code, reply.headers["x-penstock-ignored-fields"]) == (200, names)
    strict = make_edge(strict_fields=True)
    assert strict.kept.post(PATH, json=HI).status_code == 200
    reply = strict.kept.post(PATH, json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "colour")


def test_errors_of_text_name_this_apis_fields(script: Edge) -> None:
    def reject(submit: Submit) -> list[Message]:
        error = {"status": 400, "type": "invalid_request_error", "code": "invalid_value"}
        return [Rejected(key=submit.key, message="messages[1].content is no good.", param="messages", **error)]  # type: ignore[arg-type]

    script.text.script = reject
    for more in ({}, {"stream": True}):
        reply = script.kept.post(PATH, json=HI | {"instructions": "x"} | more)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "input")
        assert reply.json()["error"]["message"] == "input[0].content is no good."


def test_a_failed_answer(script: Edge) -> None:
    def fail(submit: Submit) -> list[Message]:
        extra = {"error": "The engine failed.", "error_code": "engine_failure"}
        return [
            delta({"key": submit.key, "text": "A"}),
            delta({"key": submit.key, "tokens": [], "reason": "error", "extra": extra}),
            finished(submit.key),
        ]

    script.text.script = fail
    reply = script.kept.post(PATH, json=HI)
    assert (reply.status_code, reply.json()["error"]["code"]) == (500, "engine_failure")
    reply = script.kept.post(PATH, json=HI | {"stream": True})
    stream = named_events(reply.text) if reply.status_code == 200 else []
    assert reply.status_code == 500 or stream[-1]["response"]["status"] == "failed"


def test_a_stream_that_breaks_ends_with_response_failed(script: Edge) -> None:
    script.text.script = lambda submit: [delta({"key": submit.key, "text": "A"})]
    with script.kept.stream("POST", PATH, json=HI | {"stream": True}) as reply:
        pieces = reply.iter_text()
        text = next(pieces)
        key = script.text.wait_for(Submit)[0].key
        extra = {"error": "The engine failed.", "error_code": "engine_failure"}
        script.text.send(delta({"key": key, "tokens": [], "reason": "error", "extra": extra}), finished(key))
        text += "".join(pieces)
    last = named_events(text)[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["error"] == {"code": "server_error", "message": "The engine failed."}
    assert last["response"]["output"][0]["content"][0]["text"] == "A"
    assert last["response"]["output"][0]["status"] == "incomplete"


def test_a_client_that_leaves_cancels(script: Edge) -> None:
    script.text.script = lambda submit: [delta({"key": submit.key, "text": "A"})]
    with script.kept.stream("POST", PATH, json=HI | {"stream": True}) as reply:
        next(reply.iter_text())
    key = script.text.wait_for(Submit)[-1].key
    script.wait(lambda: any(isinstance(m, Cancel) and m.key == key for m in script.text.received), "the cancel")
    script.wait(lambda: script.server.gateway.active == 0, "the place to be given back")


# ------------------------------------------------------------------ the official client


def test_the_official_client(script: Edge) -> None:
    with script.client() as client:
        whole = client.responses.create(model="brook", input="hi")
        assert (whole.output_text, whole.status) == ("Hello world", "completed")
        with client.responses.stream(model="brook", input="hi") as stream:
            kinds = [event.type for event in stream]
            assert stream.get_final_response().output_text == "Hello world"
        assert kinds[0] == "response.created"
        script.text.script = rows((NAME, 0, "weather"), (ARGUMENTS, 0, '{"city":"Oslo"}'), (DONE, 0, ""), reason="tool_calls")
        tool: Any = WEATHER
        called = client.responses.create(model="brook", input="weather?", tools=[tool]).output[0]
        assert called.type == "function_call"
        assert (called.name, called.arguments, called.status) == ("weather", '{"city":"Oslo"}', "completed")
        with client.responses.stream(model="brook", input="weather?", tools=[tool]) as stream:
            assert [event.snapshot for event in stream if event.type == "response.function_call_arguments.delta"] == ['{"city":"Oslo"}']
        with pytest.raises(openai.BadRequestError) as found:
            client.responses.create(model="brook", input="hi", temperature=-1)
        assert found.value.param == "temperature"


def test_silence_is_kept_alive_with_comments(make_edge: MakeEdge) -> None:
    edge = make_edge(keep_alive_s=0.05, text=lambda text: setattr(text, "script", silent))
    with edge.kept.stream("POST", PATH, json=HI | {"stream": True}) as reply:
        pieces = reply.iter_text()
        assert next(pieces).startswith(": keep-alive")
        key = edge.text.wait_for(Submit)[0].key
        edge.text.send(Rejected(key=key, status=400, type="invalid_request_error", code="invalid_value", message="No."))
        text = "".join(pieces)
    last = [line for line in text.splitlines() if line.startswith("data")][-1]
    assert json.loads(last.removeprefix("data: ")) == {
        "type": "error",
        "sequence_number": 0,
        "code": "invalid_value",
        "message": "No.",
        "param": None,
    }


# ------------------------------------------------------------------ truncation


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["user", "assistant", "tool", "system"]), st.integers(1, 9)), min_size=1),
    st.booleans(),
    st.integers(0, 60),
)
def test_as_few_of_the_oldest_turns_as_possible_are_left_out(turns: list[tuple[str, int]], instructed: bool, context: int) -> None:
    messages: list[Any] = [{"role": role, "size": size} for role, size in turns]
    first = int(instructed)
    asked = 0

    async def fits(some: list[Any]) -> bool:
        nonlocal asked
        asked += 1
        return sum(message["size"] for message in some) <= context

    def size(some: list[Any]) -> int:
        return sum(message["size"] for message in some)

    found, places = asyncio.run(fitted(messages, [str(at) for at in range(len(messages))], first, fits))
    assert [messages[int(place)] for place in places] == found
    choices = [messages] + [messages[:first] + messages[at:] for at in range(first + 1, len(messages)) if messages[at]["role"] == "user"]
    assert found == next((one for one in choices if size(one) <= context), messages)
    assert asked <= 2 + len(messages).bit_length()


def test_truncation_leaves_room_for_the_answer(script: Edge) -> None:
    def tokens(body: bytes) -> tuple[int, bytes]:
        return 200, b'{"count":%d,"max_model_len":64,"tokens":[]}' % (10 * len(json.loads(body)["messages"]))

    before = script.text.answers["tokenize"]
    script.text.answers["tokenize"] = tokens
    items = [{"role": role, "content": f"{role}{number}"} for number in range(4) for role in ("user", "assistant")] + [
        {"role": "user", "content": "last"}
    ]
    try:
        told = {
            room: messages(script, input=items, instructions="Be brief.", truncation="auto", max_output_tokens=room)
            for room in (1, 4, 5, 14, 24, 64)
        }
        whole = messages(script, input=items, instructions="Be brief.")
        assert (
            refused(script, input=[*items, {"role": "user", "content": [{"type": "input_image"}]}], truncation="auto")[2]
            == "input[9].content[0].type"
        )
    finally:
        script.text.answers["tokenize"] = before
    assert len(whole) == 10
    assert {room: len(some) for room, some in told.items()} == {1: 6, 4: 6, 5: 4, 14: 4, 24: 4, 64: 10}, "text says that nothing fits"
    for room in (1, 5):
        assert told[room][0] == whole[0]
        assert told[room][1:] == whole[-len(told[room]) + 1 :]


# ------------------------------------------------------------------ sizes


@pytest.mark.parametrize("path", [PATH, COUNT])
def test_fields_are_counted_as_the_client_wrote_them(edge: Edge, path: str) -> None:
    """Not those of the chat that they become, which are more: here thrice as many."""
    tool: dict[str, Any] = {"type": "function", "name": "f", "parameters": {}}
    within = (TRANSLATED_FIELDS - 5) // 3
    said = {"x": "y" * SMALL}  # small bodies are not counted
    legal = HI | {"tools": [tool | {"name": f"f{number}"} for number in range(within)], "chat_template_kwargs": said}
    reply = edge.kept.post(path, json=legal)
    assert reply.status_code == 200, reply.text[:300]
    more = HI | {"tools": [*legal["tools"], tool, tool], "chat_template_kwargs": said}
    error = edge.kept.post(path, json=more).json()["error"]
    count = 3 * (within + 2) + 5
    assert f" {count} fields; this server takes at most {TRANSLATED_FIELDS}." in error["message"]


@pytest.mark.parametrize("path", [PATH, COUNT])
@pytest.mark.parametrize("size", [0, SMALL])
@pytest.mark.parametrize("depth", range(880, 1010, 10))
def test_deep_bodies_are_the_clients_mistake(edge: Edge, path: str, size: int, depth: int) -> None:
    schema = '{"a":' * depth + "1" + "}" * depth
    more = ',"stream":false' if path == PATH else ""
    body = f'{{"model":"brook","input":"{"x" * size}","text":{{"format":{{"type":"json_schema","name":"a","schema":{schema}}}}}{more}}}'
    reply = edge.kept.post(path, content=body.encode(), headers={"content-type": "application/json"})
    assert reply.status_code in (200, 400), reply.text[:300]


CALLED = {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "call_1", "output": "7"}
SAID = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("items", "param", "said"),
    [
        ([SAID, CALLED], "input", "No tool output found for function call call_1."),
        ([SAID, CALLED, SAID], "input", "No tool output found for function call call_1."),
        ([SAID, CALLED, CALLED, OUTPUT], "input[2].call_id", "there is a function call 'call_1' already"),
        ([SAID, CALLED, OUTPUT, CALLED, OUTPUT], "input[3].call_id", "there is a function call 'call_1' already"),
        ([SAID, CALLED, OUTPUT, OUTPUT], "input[3].call_id", "has an output already"),
    ],
)
def test_each_call_has_one_output(edge: Edge, items: list[Any], param: str, said: str) -> None:
    for path in (PATH, COUNT):
        reply = edge.kept.post(path, json=HI | {"input": items})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
        assert said in reply.json()["error"]["message"]


def test_names_and_effort_are_checked_as_on_chat(edge: Edge) -> None:
    for fields, param in (
        ({"tools": [{"type": "function", "name": "get weather"}]}, "tools[0].name"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].name"),
        ({"reasoning": {"effort": "foo"}}, "reasoning.effort"),
    ):
        reply = edge.kept.post(PATH, json=HI | fields)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(("role", "kind"), [("user", "output_text"), ("system", "output_text"), ("assistant", "input_text")])
def test_parts_are_of_whoever_speaks(edge: Edge, role: str, kind: str) -> None:
    items = [SAID, {"role": role, "content": [{"type": kind, "text": "x"}]}]
    reply = edge.kept.post(PATH, json=HI | {"input": items})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "input[1].content[0].type")


def test_a_call_that_is_not_complete_says_so_wherever_it_stands(script: Edge) -> None:
    parts = [(NAME, 0, "f"), (ARGUMENTS, 0, '{"a"'), (NAME, 1, "g"), (ARGUMENTS, 1, "{}"), (DONE, 1, "")]
    script.text.script = rows(*parts, reason="length")
    whole = script.kept.post(PATH, json=HI).json()
    assert (whole["status"], [item["status"] for item in whole["output"]]) == ("incomplete", ["incomplete", "completed"])


def test_tokens_that_are_no_text_have_no_log_probabilities(script: Edge) -> None:
    silent = msgspec.structs.replace(POSITION, silent=True)
    script.text.script = rows((CONTENT, -1, "A"), extra={"logprobs": [POSITION, silent]})
    fields = {"include": ["message.output_text.logprobs"]}
    whole = script.kept.post(PATH, json=HI | fields).json()
    (part,) = whole["output"][0]["content"]
    assert [one["token"] for one in part["logprobs"]] == ["A"]
    chat = {"model": "brook", "messages": [{"role": "user", "content": "x"}], "logprobs": True}
    content = script.kept.post("/v1/chat/completions", json=chat).json()["choices"][0]["logprobs"]["content"]
    assert [one["token"] for one in content] == ["A"]
    text = {"model": "brook", "prompt": "x", "logprobs": 1}
    logprobs = script.kept.post("/v1/completions", json=text).json()["choices"][0]["logprobs"]
    assert (logprobs["tokens"], logprobs["text_offset"]) == (["A"], [0])


def test_a_priority_that_nobody_looks_at_is_named(edge: Edge) -> None:
    for path, body in ((PATH, HI), ("/v1/completions", {"model": "brook", "prompt": "x"})):
        headers = edge.kept.post(path, json=body | {"priority": 3}).headers
        assert headers["x-penstock-ignored-fields"] == "priority"
        assert headers["x-penstock-warning"] == "priority has no effect without --scheduling-policy priority"
        headers = edge.kept.post(path, json=body | {"priority": 3, "zz": 1}).headers
        assert headers["x-penstock-warning"].startswith("ignored, as nobody here knows them: zz; priority has no effect")
        assert "x-penstock-warning" not in edge.kept.post(path, json=body | {"priority": 0}).headers
