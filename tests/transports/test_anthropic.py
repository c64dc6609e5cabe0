"""/v1/messages and /v1/messages/count_tokens: what Anthropic's clients send and get, to the byte, and that nothing is left out in silence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from edge_kit import Edge, MakeEdge, delta, finished, silent
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.core.protocol.messages import Message, Query, Rejected, Submit
from penstock.transports import anthropic_replies as replies
from penstock.transports.anthropic import anthropic_routes
from penstock.transports.anthropic_models import ModelsQuery, models_page
from penstock.transports.anthropic_voice import MessagesVoice
from penstock.transports.gateway import Batch
from penstock.transports.outbox import Outbox

PATH, COUNT = "/v1/messages", "/v1/messages/count_tokens"
HI: dict[str, Any] = {"model": "brook", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    one = Edge(tmp_path_factory.mktemp("edge"), {"max_streams": 4})
    one.text.answers["tokenize"] = lambda _: (200, b'{"count":7,"max_model_len":64,"tokens":[1]}')
    one.start()
    yield one
    one.stop()


def named_events(text: str) -> list[Any]:
    """The data of a stream whose events are named after their types."""
    out = []
    for block in text.split("\n\n")[:-1]:
        name, data = block.split("\n", 1)
        event = msgspec.json.decode(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        out.append(event)
    return out


def submitted(edge: Edge, **fields: Any) -> Submit:
    edge.text.received.clear()
    reply = edge.kept.post(PATH, json=HI | fields)
    assert reply.status_code == 200, reply.text
    submit = edge.text.wait_for(Submit)[0]
    assert isinstance(submit, Submit)
    return submit


def refused(edge: Edge, path: str = PATH, **fields: Any) -> tuple[int, str, str]:
    reply = edge.kept.post(path, json=HI | fields)
    body = reply.json()
    assert body["type"] == "error"
    msgspec.convert(body, replies.MessageError)
    return reply.status_code, body["error"]["type"], body["error"]["message"]


# ------------------------------------------------------------------ golden transcripts


def test_golden_whole(edge: Edge) -> None:
    headers = {"x-request-id": "r1", "anthropic-version": "2023-06-01", "x-api-key": "any"}
    reply = edge.kept.post(PATH, json=HI, headers=headers)
    assert reply.headers["x-request-id"] == reply.headers["request-id"] == "r1"
    assert "x-penstock-warning" not in reply.headers
    assert reply.text == (
        '{"id":"msg_r10","type":"message","role":"assistant","model":"brook","content":[{"type":"text","text":"Hello world"}],'
        '"stop_reason":"end_turn","stop_sequence":null,'
        '"usage":{"input_tokens":3,"cache_creation_input_tokens":0,"cache_read_input_tokens":0,"output_tokens":2,'
        '"output_tokens_details":{"thinking_tokens":0}}}'
    )


def test_golden_stream(edge: Edge) -> None:
    reply = edge.kept.post(PATH, json={**HI, "stream": True}, headers={"x-request-id": "r2"})
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.text == (
        'event: message_start\ndata: {"type":"message_start","message":{"id":"msg_r20","type":"message","role":"assistant","model":"brook",'
        '"content":[],"stop_reason":null,"stop_sequence":null,'
        '"usage":{"input_tokens":3,"cache_creation_input_tokens":0,"cache_read_input_tokens":0,"output_tokens":0}}}\n\n'
        'event: content_block_start\ndata: {"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}\n\n'
        'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"Hello"}}\n\n'
        'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":" world"}}\n\n'
        'event: content_block_stop\ndata: {"type":"content_block_stop","index":0}\n\n'
        'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn","stop_sequence":null},'
        '"usage":{"input_tokens":3,"cache_creation_input_tokens":0,"cache_read_input_tokens":0,"output_tokens":2,'
        '"output_tokens_details":{"thinking_tokens":0}}}\n\n'
        'event: message_stop\ndata: {"type":"message_stop"}\n\n'
    )


def test_golden_error(edge: Edge) -> None:
    reply = edge.kept.post(PATH, json={**HI, "max_tokens": 0}, headers={"x-request-id": "mine"})
    assert (reply.status_code, reply.text) == (
        400,
        '{"type":"error","error":{"type":"invalid_request_error","message":"max_tokens must be from 1 to 2147483647, but is 0."},"request_id":"mine"}',
    )


def test_golden_count(edge: Edge) -> None:
    body = {"model": "brook", "messages": HI["messages"], "system": "Be brief."}
    edge.text.received.clear()
    reply = edge.kept.post(COUNT, json=body)
    assert (reply.status_code, reply.text) == (200, '{"input_tokens":7}')
    asked = next(query for query in edge.text.wait_for(Query, 2) if query.what == "tokenize")
    assert json.loads(asked.body) == {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}],
        "add_generation_prompt": True,
        "continue_final_message": False,
        "add_special_tokens": False,
        "model_has": "messages",
    }


# ------------------------------------------------------------------ what is streamed is the whole


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(max_size=8), max_size=8),
    end=st.sampled_from(
        [("stop", None, "end_turn"), ("stop", 7, "end_turn"), ("stop", "\n\n", "stop_sequence"), ("length", None, "max_tokens")]
    ),
    last=st.text(max_size=4),
    cached=st.integers(0, 3),
)
def test_what_is_streamed_is_the_whole(script: Edge, texts: list[str], end: tuple[str, Any, str], last: str, cached: int) -> None:
    def play(submit: Submit) -> list[Message]:
        key = submit.key
        row = {"key": key, "text": last, "reason": end[0], "extra": {"stop_reason": end[1]}, "cached": cached}
        return [
            *(delta({"key": key, "text": text, "cached": cached}) for text in texts),
            delta(row),
            finished(key, output=5, cached=cached),
        ]

    script.text.script = play
    whole = script.kept.post(PATH, json=HI, headers={"x-request-id": "same"}).json()
    msgspec.convert(whole, replies.MessageReply)
    stream = named_events(script.kept.post(PATH, json={**HI, "stream": True}, headers={"x-request-id": "same"}).text)
    message: dict[str, Any] = {}
    for event in stream:
        msgspec.convert(event, replies.MessageEvent)
        match event["type"]:
            case "message_start":
                message = event["message"]
            case "content_block_start":
                message["content"].append(event["content_block"])
            case "content_block_delta":
                message["content"][event["index"]]["text"] += event["delta"]["text"]
            case "message_delta":
                message |= event["delta"]
                message["usage"] |= event["usage"]
    assert message == whole
    assert whole["content"] == [{"type": "text", "text": "".join(texts) + last}]
    assert (whole["stop_reason"], whole["stop_sequence"]) == (end[2], end[1] if isinstance(end[1], str) else None)
    assert whole["usage"]["input_tokens"] + whole["usage"]["cache_read_input_tokens"] == 3
    assert [event["type"] for event in stream[-3:]] == ["content_block_stop", "message_delta", "message_stop"]


def test_a_plain_row_costs_one_push_and_no_question(make_edge: MakeEdge, monkeypatch: pytest.MonkeyPatch) -> None:
    """But the first of a block, which begins it."""
    pushed: list[bytes] = []
    asked: list[str] = []
    push, piece = Outbox.push, MessagesVoice.piece
    monkeypatch.setattr(Outbox, "push", lambda self, data: (pushed.append(data), push(self, data))[1])
    monkeypatch.setattr(MessagesVoice, "piece", lambda self, index, text, *more: (asked.append(text), piece(self, index, text, *more))[1])

    def play(submit: Submit) -> list[Message]:
        rows = [delta({"key": submit.key, "text": str(i)}) for i in range(50)]
        return [*rows, delta({"key": submit.key, "tokens": [], "reason": "stop"}), finished(submit.key)]

    edge = make_edge(routes=[anthropic_routes], text=lambda t: setattr(t, "script", play))
    with edge.http() as http:
        assert http.post(PATH, json={**HI, "stream": True}).text.encode() == b"".join(pushed)
    assert asked == ["0"]
    assert sum(b"text_delta" in data for data in pushed) == 50
    assert len(pushed) == 50 + 5


def test_a_voice_says_a_piece_as_a_plain_row_is_said(edge: Edge) -> None:
    voice = MessagesVoice()
    batch = Batch(delta({"key": 1}))
    assert voice.around(0) is None
    *_, first = voice.piece(0, "a\u2028b", 0, batch)
    around = voice.around(0)
    assert around is not None
    assert first == b'"a\xe2\x80\xa8b"'.join(around) == b"".join(voice.piece(0, "a\u2028b", 0, batch))


# ------------------------------------------------------------------ what text is told


def test_fields_reach_text(script: Edge) -> None:
    more = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "stop_sequences": ["\n\nHuman:"], "metadata": {"user_id": "u"}}
    submit = submitted(script, **more, cache_control={"type": "ephemeral"}, service_tier="auto")
    params = submit.sampling
    assert (params.temperature, params.top_p, params.top_k, params.stop, params.max_tokens) == (0.5, 0.9, 5, ["\n\nHuman:"], 9)
    assert submit.explicit == ["max_tokens", "stop", "temperature", "top_k", "top_p"]
    assert (submit.kind, submit.model, submit.add_special_tokens) == ("chat", "brook", False)


def conversation(submit: Submit) -> list[tuple[str, Any]]:
    return [(message["role"], message["content"]) for message in json.loads(submit.messages)]


def test_system_and_turns(script: Edge) -> None:
    block = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral", "ttl": "1h"}}
    submit = submitted(
        script,
        system=[block],
        messages=[
            {"role": "user", "content": [block, {"type": "text", "text": "b", "citations": None}]},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": "d"},
            {"role": "user", "content": [block]},
        ],
    )
    parts = [{"type": "text", "text": text} for text in "abc"]
    assert conversation(submit) == [("system", "a"), ("user", parts), ("assistant", "d"), ("user", "a")]
    assert (submit.add_generation_prompt, submit.continue_final_message) == (True, False)


def test_the_assistants_final_words_are_continued(script: Edge) -> None:
    turns = [{"role": "user", "content": "Answer with JSON."}, {"role": "assistant", "content": "{"}]
    submit = submitted(script, messages=turns)
    assert (submit.add_generation_prompt, submit.continue_final_message) == (False, True)
    for content in ("", []):  # it begins with nothing
        submit = submitted(script, messages=[turns[0], {"role": "assistant", "content": content}])
        assert (submit.add_generation_prompt, submit.continue_final_message) == (True, False)
    for content in ("{ ", [{"type": "text", "text": ""}]):
        status, kind, message = refused(script, messages=[turns[0], {"role": "assistant", "content": content}])
        assert (status, kind) == (400, "invalid_request_error")
        assert message.startswith("messages[1].content: ")


@pytest.mark.parametrize(
    ("turns", "where"),
    [
        ([("user", "")], "messages[0].content"),
        ([("user", [])], "messages[0].content"),
        ([("user", [{"type": "text", "text": ""}])], "messages[0].content[0].text"),
        ([("user", "x"), ("user", "")], "messages[1].content"),
        ([("user", "x"), ("assistant", ""), ("user", "y")], "messages[1].content"),
        ([("user", "x"), ("assistant", []), ("user", "y")], "messages[1].content"),
        ([("assistant", "")], "messages[0].content"),
    ],
)
def test_what_says_nothing_is_refused(script: Edge, turns: list[tuple[str, Any]], where: str) -> None:
    status, kind, message = refused(script, messages=[{"role": role, "content": content} for role, content in turns])
    assert (status, kind) == (400, "invalid_request_error")
    assert message.startswith(where)


def test_an_empty_answer_of_this_server_may_be_sent_back(script: Edge) -> None:
    empty = {"role": "assistant", "content": [{"type": "text", "text": ""}]}
    submitted(script, messages=[*HI["messages"], empty, *HI["messages"]])


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"temperature": 1.5}, "temperature must be from 0 to 1"),
        ({"temperature": -0.1}, "temperature must be from 0 to 1"),
        ({"metadata": {"user": "x"}}, "metadata.user is not a field"),
        ({"metadata": {"user_id": 3}}, "metadata.user_id must be a text"),
        ({"cache_control": {"type": "x"}}, "cache_control.type must be 'ephemeral'"),
        ({"cache_control": {}}, "cache_control.type must be 'ephemeral'"),
        ({"cache_control": {"type": "ephemeral", "ttl": "2h"}}, "cache_control.ttl must be '5m' or '1h'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral", "ttl": 3}}]}]},
            "messages[0].content[0].cache_control.ttl must be",
        ),
        ({"tools": [{"name": "a" * 129, "input_schema": {"type": "object"}}]}, "tools[0].name must be 1 to 128"),
        ({"tools": [{"name": "get weather", "input_schema": {"type": "object"}}]}, "tools[0].name must be 1 to 128"),
    ],
)
def test_what_anthropic_itself_refuses(script: Edge, fields: dict[str, Any], where: str) -> None:
    status, kind, message = refused(script, **fields)
    assert (status, kind) == (400, "invalid_request_error")
    assert message.startswith(where)


def test_what_anthropic_itself_takes(script: Edge) -> None:
    tools = [{"name": "a" * 128, "input_schema": {"type": "object"}}]
    fields: dict[str, Any] = {"metadata": {"user_id": None}, "cache_control": {"type": "ephemeral", "ttl": "1h"}, "temperature": 1}
    submitted(script, tools=tools, **fields)
    submitted(script, metadata={"user_id": "u"}, cache_control={"type": "ephemeral"}, temperature=0)


@pytest.mark.parametrize("path", ["/v1/messages/nothing", "/v1/messages/batches/a/b/c", "/v1/messages/batches/msgbatch_1"])
def test_where_there_is_nothing_the_error_has_anthropics_shape(script: Edge, path: str) -> None:
    reply = script.kept.get(path)
    assert (reply.status_code, reply.json()["type"], reply.json()["error"]["type"]) == (404, "error", "not_found_error")
    assert script.kept.get("/v1/nothing").json().keys() == {"error"}


def test_a_max_tokens_that_does_not_fit_cannot_be_left_out(script: Edge) -> None:
    said = "You requested 99 tokens. Lower max_tokens to at most 7, leave it out to use what is left, or shorten the messages."
    script.text.script = lambda submit: [
        Rejected(key=submit.key, status=400, type="x", code="context_length_exceeded", message=said, param="max_tokens", retry_after_s=None)
    ]
    message = script.kept.post(PATH, json=HI).json()["error"]["message"]
    assert message == "You requested 99 tokens. Lower max_tokens to at most 7, or shorten the messages."


# ------------------------------------------------------------------ what is refused, by name

TEXT = {"type": "text", "text": "x"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tool_choice", {"type": "any"}),
        ("thread", {"type": "create"}),
        ("mcp_servers", [{"url": "x"}]),
        ("container", "c"),
        ("context_management", {"edits": [{"type": "clear_tool_uses_20250919"}]}),
        ("context_management", {"edits": [{"type": "clear_thinking_20251015", "keep": {"type": "thinking_turns", "value": 2}}]}),
        ("stop", ["x"]),
        ("n", 2),
        ("seed", 1),
        ("logit_bias", {"1": 1}),
        ("response_format", {"type": "json_object"}),
        ("temparature", 1),
        ("maxTokens", 3),
        ("stopSequences", ["x"]),
        ("max_tokens", "9"),
        ("max_tokens", 2**31),
        ("temperature", -1),
        ("top_p", 0),
        ("top_k", -2),
        ("stop_sequences", ["x"] * 17),
        ("stop_sequences", [""]),
        ("metadata", 3),
        ("service_tier", "fast"),
        ("messages", []),
    ],
)
def test_what_is_refused_is_named(edge: Edge, name: str, value: Any) -> None:
    status, kind, message = refused(edge, **{name: value})
    assert (status, kind) == (400, "invalid_request_error")
    assert message.startswith(name), message


@pytest.mark.parametrize("name", ["model", "messages", "max_tokens"])
def test_what_is_required_is_named(edge: Edge, name: str) -> None:
    reply = edge.kept.post(PATH, json={key: value for key, value in HI.items() if key != name})
    assert (reply.status_code, reply.json()["error"]["message"]) == (400, f"{name} is required.")


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ([TEXT, {"type": "image", "source": {}}], "messages[0].content[1]: content of type 'image'"),
        ([{"type": "document"}], "messages[0].content[0]: content of type 'document'"),
        ([{"text": "x"}], "messages[0].content[0].type must"),
        ([{"type": "text"}], "messages[0].content[0].text must"),
        ([{**TEXT, "citations": [{}]}], "messages[0].content[0].citations is not supported"),
        ([{**TEXT, "weight": 2}], "messages[0].content[0].weight is not a field"),
        ([{**TEXT, "cache_control": True}], "messages[0].content[0].cache_control must"),
    ],
)
@pytest.mark.parametrize("path", [PATH, COUNT])
def test_blocks_are_refused_by_name(edge: Edge, path: str, content: Any, where: str) -> None:
    body = {"model": "brook", "messages": [{"role": "user", "content": content}]} | ({"max_tokens": 3} if path == PATH else {})
    reply = edge.kept.post(path, json=body)
    assert reply.status_code == 400
    assert reply.json()["error"]["message"].startswith(where)


@pytest.mark.parametrize("message", [{"role": "tool", "content": "x"}, {"role": "user", "content": "x", "name": "n"}, {"role": "user"}])
def test_messages_of_other_apis_are_refused(edge: Edge, message: Any) -> None:
    assert refused(edge, messages=[message])[:2] == (400, "invalid_request_error")


def test_values_that_ask_for_nothing_are_taken(script: Edge) -> None:
    submitted(script, tools=[], tool_choice={"type": "none"}, thinking=None, mcp_servers=[], system=None, stop_sequences=[])
    for keep in ("all", {"type": "all"}):
        submitted(script, context_management={"edits": [{"type": "clear_thinking_20251015", "keep": keep}]})


def test_counting_refuses_what_it_would_not_count(edge: Edge) -> None:
    body = {"model": "brook", "messages": HI["messages"]}
    for more in ({"tools": [{"name": "f"}]}, {"thinking": {"type": "enabled"}}, {"output_config": {"effort": 1}}, {"max_tokens": 3}):
        reply = edge.kept.post(COUNT, json=body | more)
        assert reply.status_code == 400
        assert reply.json()["error"]["message"].startswith(next(iter(more)))


# ------------------------------------------------------------------ models

CLIENT = {"anthropic-version": "2023-06-01"}
ENTRIES = [{"id": name, "created": 86400 * index, "max_model_len": 64} for index, name in enumerate("abcde")]


def test_models_for_anthropics_clients(edge: Edge) -> None:
    one = {"type": "model", "id": "brook", "display_name": "brook", "created_at": "1970-01-01T00:00:01Z", "lifecycle": "active"}
    one |= {"max_input_tokens": None, "max_tokens": None}
    page = edge.kept.get("/v1/models", headers=CLIENT)
    assert page.json() == {"data": [one], "has_more": False, "first_id": "brook", "last_id": "brook"}
    assert edge.kept.get("/v1/models/brook", headers=CLIENT).json() == one
    missing = edge.kept.get("/v1/models/claude", headers=CLIENT)
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "not_found_error")
    wrong_queries = (
        "limit=0",
        "limit=1001",
        "limit=x",
        "limit=-1",
        "after_id=x",
        "before_id=x",
        "limit=1&limit=2",
        "lifecycle=new",
        "lifecycle[]=",
    )
    for query in wrong_queries:
        wrong = edge.kept.get(f"/v1/models?{query}", headers=CLIENT)
        assert wrong.status_code == 400
        assert wrong.json()["error"]["message"].startswith(query.partition("=")[0].removesuffix("[]"))
    for query in ("order=asc", "Limit=3", "limit[]=3"):
        unknown = edge.kept.get(f"/v1/models?{query}", headers=CLIENT)
        assert (unknown.status_code, unknown.json()["type"]) == (400, "error")
        assert f"{query.partition('=')[0]!r} is not known here" in unknown.json()["error"]["message"]
    for query in ("limit=3", "lifecycle=active", "x=1"):  # OpenAI's list has no query
        unknown = edge.kept.get(f"/v1/models?{query}")
        assert (unknown.status_code, unknown.json()["error"]["param"]) == (400, query.partition("=")[0])
    for path in ("/v1/models", "/v1/models/brook"):
        assert edge.kept.get(path).json()["object"] in ("list", "model")


@pytest.mark.parametrize(
    ("query", "shown"),
    [
        ("lifecycle[]=active", True),
        ("lifecycle=active", True),
        ("lifecycle[]=retired&lifecycle[]=active&lifecycle[]=deprecated", True),
        ("lifecycle%5B%5D=deprecated", False),
        ("lifecycle=retired&lifecycle=deprecated&limit=5", False),
        ("lifecycle=retired&after_id=brook", False),
        ("lifecycle=retired&before_id=brook", False),
    ],
)
def test_a_list_of_other_stages_of_life_is_empty(edge: Edge, query: str, shown: bool) -> None:
    page = edge.kept.get(f"/v1/models?{query}", headers=CLIENT)
    assert [one["id"] for one in page.json()["data"]] == (["brook"] if shown else [])
    assert (page.json()["has_more"], page.json()["first_id"]) == (False, "brook" if shown else None)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/files"),
        ("POST", "/v1/files"),
        ("GET", "/v1/files/file_1"),
        ("DELETE", "/v1/files/file_1"),
        ("GET", "/v1/files/file_1/content"),
    ],
)
def test_anthropics_files_are_not_taken_for_openais(edge: Edge, method: str, path: str) -> None:
    files = {"file": ("a.txt", b"a")} if method == "POST" else None
    reply = edge.kept.request(method, path, headers=CLIENT, files=files)
    assert (reply.status_code, reply.json()["error"]["type"]) == (404, "not_found_error")
    assert reply.json()["error"]["message"].startswith("The Files API of Anthropic is not served here")
    assert edge.kept.request(method, path, files=files).json().get("type") != "error"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/skills", 404),
        ("POST", "/v1/skills/skill_1/versions", 404),
        ("POST", "/v1/complete", 404),
        ("GET", "/nothing", 404),
        ("PATCH", "/v1/models", 405),
        ("PUT", "/v1/files", 405),
    ],
)
def test_what_is_refused_has_the_shape_of_the_client_where_no_route_has_its_own(edge: Edge, method: str, path: str, status: int) -> None:
    reply = edge.kept.request(method, path, headers=CLIENT)
    assert (reply.status_code, reply.json()["type"]) == (status, "error")
    assert edge.kept.request(method, path).json().keys() == {"error"}
    assert edge.kept.post("/v1/completions", json={}, headers=CLIENT).json().keys() == {"error"}, "it is OpenAI's"


def test_a_missing_key_has_the_shape_of_the_client(make_edge: MakeEdge) -> None:
    with make_edge(api_key=["secret"]).http() as http:
        for path in ("/v1/models", "/v1/files", "/v1/skills"):
            assert http.get(path, headers=CLIENT).json()["error"]["type"] == "authentication_error"
            assert http.get(path).json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("limit", [1, 2, 3, 20])
def test_pages_of_models_are_the_list(limit: int) -> None:
    for way, end in (("after_id", "last_id"), ("before_id", "first_id")):
        seen: list[str] = []
        asked: dict[str, Any] = {"limit": limit} | ({way: "e"} if way == "before_id" else {})
        while True:
            page = models_page(ENTRIES, ModelsQuery(**asked))
            names = [one["id"] for one in page["data"]]
            assert len(names) <= limit
            seen = [*seen, *names] if way == "after_id" else [*names, *seen]
            if not page["has_more"]:
                break
            asked[way] = page[end]
        assert "".join(seen) == ("abcde" if way == "after_id" else "abcd")
    assert models_page(ENTRIES, ModelsQuery(after_id="e")) == {"data": [], "has_more": False, "first_id": None, "last_id": None}


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (404, "model_not_found", (404, "not_found_error")),
        (413, "request_too_large", (413, "request_too_large")),
        (429, "queue_full", (529, "overloaded_error")),
        (503, "queue_full", (529, "overloaded_error")),
        (503, "engine_unavailable", (529, "overloaded_error")),
        (503, "draining", (529, "overloaded_error")),
        (429, "rate_limit_exceeded", (429, "rate_limit_error")),
        (500, "engine_failure", (500, "api_error")),
        (400, "context_length_exceeded", (400, "invalid_request_error")),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals_of_text(script: Edge, stream: bool, status: int, code: str, expected: tuple[int, str]) -> None:
    script.text.script = lambda submit: [
        Rejected(key=submit.key, status=status, type="x", code=code, message="No.", param=None, retry_after_s=3.0)
    ]
    reply = script.kept.post(PATH, json={**HI, "stream": stream})
    said = {"type": "error", "error": {"type": expected[1], "message": "No."}, "request_id": reply.headers["request-id"]}
    assert (reply.status_code, reply.json()) == (expected[0], said)
    assert ("retry-after" in reply.headers) is (status in (429, 503))


def test_a_busy_edge_is_overloaded(make_edge: MakeEdge) -> None:
    edge = make_edge(max_streams=1)
    edge.text.call(edge.server.gateway.enter)
    with edge.http() as http:
        reply = http.post(PATH, json=HI)
    edge.text.call(edge.server.gateway.leave)
    assert (reply.status_code, reply.json()["error"]["type"]) == (529, "overloaded_error")


def test_versions(edge: Edge) -> None:
    for version in ("2023-06-01", "2026-10-21", "2031-01-01"):
        assert edge.kept.post(PATH, json=HI, headers={"anthropic-version": version, "anthropic-beta": "a,b"}).status_code == 200
    for path in (PATH, COUNT):
        reply = edge.kept.post(path, json=HI, headers={"anthropic-version": "2023-01-01"})
        assert (reply.status_code, reply.json()["error"]["message"][:17]) == (400, "anthropic-version")


def test_that_there_are_no_threads_is_said_with_the_code_that_clients_look_for(edge: Edge) -> None:
    error = edge.kept.post(PATH, json={**HI, "thread": {"type": "create"}}).json()["error"]
    assert error["details"] == {"error_code": "thread_unsupported_request"}
    assert "details" not in edge.kept.post(PATH, json={**HI, "container": "c"}).json()["error"]


def test_what_is_refused_before_there_is_a_route_has_the_shape_too(make_edge: MakeEdge) -> None:
    edge = make_edge(api_key=["secret"])
    with edge.http() as http:
        wrong = http.post(PATH, json=HI, headers={"x-api-key": "other"})
        assert (wrong.status_code, wrong.json()["error"]["type"]) == (401, "authentication_error")
        assert http.post(PATH, json=HI, headers={"x-api-key": "secret"}).status_code == 200
        method = http.get(PATH, headers={"x-api-key": "secret"})
        assert (method.status_code, method.json()["error"]["type"]) == (405, "invalid_request_error")
        kind = http.post(COUNT, content=b"x", headers={"x-api-key": "secret", "content-type": "text/plain"})
        assert (kind.status_code, kind.json()["error"]["type"]) == (415, "invalid_request_error")
        assert http.post("/v1/completions", json={}).json()["error"]["code"] == "invalid_api_key"


def test_an_unknown_model_is_404_when_counting(edge: Edge) -> None:
    reply = edge.kept.post(COUNT, json={"model": "claude", "messages": HI["messages"]})
    assert (reply.status_code, reply.json()["error"]["type"]) == (404, "not_found_error")


def test_an_error_of_text_when_counting(script: Edge) -> None:
    before = script.text.answers["tokenize"]
    script.text.answers["tokenize"] = lambda _: (400, b'{"message":"The template says no.","type":"x","code":"invalid_value"}')
    try:
        reply = script.kept.post(COUNT, json={"model": "brook", "messages": HI["messages"]})
    finally:
        script.text.answers["tokenize"] = before
    assert (reply.status_code, reply.json()["error"]["message"]) == (400, "The template says no.")


def test_a_stream_that_breaks_ends_with_an_error_event(script: Edge) -> None:
    kept: list[Message] = []

    def play(submit: Submit) -> list[Message]:
        end = {"key": submit.key, "tokens": [], "reason": "error", "extra": {"error": "It broke.", "error_code": "engine_failure"}}
        kept.extend([delta(end), finished(submit.key)])
        return [delta({"key": submit.key, "text": "Hel"})]

    script.text.script = play
    with script.kept.stream("POST", PATH, json={**HI, "stream": True}) as reply:
        rest = reply.iter_text()
        first = next(rest)
        script.text.send(*kept)
        said = named_events(first + "".join(rest))
    error = {"type": "api_error", "message": "It broke."}
    assert said[-1] == {"type": "error", "error": error, "request_id": reply.headers["request-id"]}
    assert "message_stop" not in {event["type"] for event in said}


def test_an_idle_stream_has_pings(make_edge: MakeEdge) -> None:
    edge = make_edge(text=lambda t: setattr(t, "script", silent), keep_alive_s=0.05)
    with edge.http() as http, http.stream("POST", PATH, json={**HI, "stream": True}) as reply:
        raw = reply.iter_raw()
        assert next(raw) == b'event: ping\ndata: {"type":"ping"}\n\n'
        key = edge.text.wait_for(Submit)[0].key
        edge.text.send(delta({"key": key, "text": "x", "reason": "stop"}), finished(key))
        said = named_events(b"".join(raw).decode())
    assert said[-1]["type"] == "message_stop"


def test_timings_on_demand(edge: Edge) -> None:
    headers = {"x-include-metrics": "1"}
    assert edge.kept.post(PATH, json=HI, headers=headers).json()["metrics"]["preemptions"] == 0
    stream = named_events(edge.kept.post(PATH, json={**HI, "stream": True}, headers=headers).text)
    assert stream[-2]["metrics"]["preemptions"] == 0
