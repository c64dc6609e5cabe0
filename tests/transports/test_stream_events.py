"""Streams that say more (events of JSON values), less often (stream_interval), or in lines (NDJSON)."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
from edge_kit import Edge, MakeEdge, delta, events, finished
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.protocol.columns import i32
from penstock.core.protocol.errors import EngineUnavailable, PenstockError
from penstock.core.protocol.messages import (
    ARGUMENTS,
    CONTENT,
    DONE,
    NAME,
    REASONING,
    Finished,
    Message,
    Rejected,
    RowExtra,
    Submit,
    TextDelta,
    TokenLogprobs,
)
from penstock.transports.door import Batch
from penstock.transports.frame import NdJson, Sse, chosen
from penstock.transports.merging import Merging

CHATS, TEXTS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
HI: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
GO: dict[str, Any] = {"prompt": "hi", "stream": True}
LINES = {"accept": "application/x-ndjson"}


def saying(*texts: str, reason: str = "stop") -> Any:
    """Every choice says that, a token a text; the last comes with the end."""

    def script(submit: Submit) -> list[Message]:
        out: list[Message] = []
        for count, text in enumerate(texts, 1):
            extra: dict[str, Any] = {}
            if submit.sampling.logprobs is not None:
                extra = {"logprobs": [TokenLogprobs(ids=[count], logprobs=[-count / 4], ranks=[1], texts=[text], bytes_=[text.encode()])]}
            row = {"key": submit.key, "text": text, "tokens": [count], "output": count, "extra": extra}
            end = reason if count == len(texts) else ""
            out.append(delta(*({**row, "choice": choice, "reason": end} for choice in range(submit.sampling.n))))
        return [*out, finished(submit.key, output=len(texts) * submit.sampling.n)]

    return script


def lines(text: str) -> list[Any]:
    assert text.endswith("\n")
    return [json.loads(line) for line in text.split("\n") if line]


def contents(chunks: list[Any], index: int = 0) -> list[str]:
    """Texts of the chunks of one choice that have one."""
    mine = [chunk["choices"][0] for chunk in chunks if chunk != "[DONE]" and chunk["choices"]]
    texts = [one.get("text") or one.get("delta", {}).get("content") for one in mine if one["index"] == index]
    return [text for text in texts if text]


@pytest.fixture
def edge(shared_edge: Edge) -> Any:
    before = shared_edge.text.script
    yield shared_edge
    shared_edge.text.script = before


# ------------------------------------------------------------------ stream_interval


class Recorder:
    """A Sink that keeps what it is told."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, str, str, tuple[int, int], list[int], list[int], int]] = []
        self.ended: list[Any] = []

    def row(self, choice: int, text: str, reason: str, row: int, batch: Batch) -> None:
        extra = batch.extra(row)
        logprobs = [one.ids[0] for one in (extra.logprobs if extra is not None else None) or ()]
        self.rows.append((choice, text, reason, batch.channel(row), batch.tokens(row), logprobs, batch.column("output_tokens")[row]))

    def finished(self, message: Finished) -> None:
        self.ended.append(message)

    def failed(self, error: PenstockError) -> None:
        self.ended.append(error)


Row = tuple[int, tuple[int, int], str, int]
"""Choice, channel and call, text, tokens."""
ROWS = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.sampled_from([(CONTENT, -1), (CONTENT, -1), (REASONING, -1), (NAME, 0), (ARGUMENTS, 0), (ARGUMENTS, 1), (DONE, 0)]),
        st.text("ab", max_size=3),
        st.integers(0, 2),
    ),
    max_size=30,
)


def deltas(rows: list[Row], ends: bool) -> list[TextDelta]:
    """Each row in a delta with a stranger's before it; at last (with the last text or not) every choice ends."""
    counts, out = [0, 0, 0], []
    token = 0
    for choice, (channel, call), text, many in [*rows, *((choice, (CONTENT, -1), "z" if ends else "", int(ends)) for choice in range(3))]:
        tokens = list(range(token, token + many))
        token += many
        counts[choice] += many
        last = len(out) >= len(rows)
        positions = [TokenLogprobs(ids=[one], logprobs=[-1.0], ranks=[1], texts=["a"], bytes_=[b"a"]) for one in tokens]
        row = {"key": 1, "choice": choice, "text": text, "tokens": tokens, "output": counts[choice], "reason": "stop" if last else ""}
        made = delta({"key": 2, "tokens": [99]}, {**row, "extra": {"logprobs": positions}})
        fields = {name: getattr(made, name) for name in made.__struct_fields__ if name not in ("channels", "calls")}
        out.append(TextDelta(**fields, channels=np.array([0, channel], np.uint8), calls=i32([-1, call])))
    return out


def played(messages: list[TextDelta], interval: int) -> Recorder:
    recorder = Recorder()
    sink = Merging(recorder, interval, 3, tells_end=True)
    for message in messages:
        sink.row(int(message.choices[1]), message.texts[1], message.reasons[1], 1, Batch(message))
    return recorder


@settings(max_examples=200, deadline=None)
@given(rows=ROWS, interval=st.integers(2, 6), ends=st.booleans())
def test_merged_rows_are_the_rows_in_their_order(rows: list[Row], interval: int, ends: bool) -> None:
    messages = deltas(rows, ends)
    plain, merged = played(messages, 1), played(messages, interval)
    for choice in range(3):
        was, now = ([row for row in one.rows if row[0] == choice] for one in (plain, merged))
        assert now[-1][2] == "stop"
        for part in (4, 5):  # tokens, log-probabilities
            assert [one for row in now for one in row[part]] == [one for row in was for one in row[part]]
        spelled = [[(row[3], char) for row in side for char in row[1]] for side in (was, now)]
        assert spelled[0] == spelled[1], "each character in its own channel, in the same order"
        for channel in (NAME, DONE):
            assert [row[1] for row in was if row[3][0] == channel] == [row[1] for row in now if row[3][0] == channel]
        assert [row[6] for row in now] == sorted(row[6] for row in now)
        for before, row, after in zip(now, now[1:], now[2:], strict=False):
            if before[6] and row[3] == after[3] and row[3][0] not in (NAME, DONE):
                assert row[6] - before[6] >= interval, "shorter ones only where a channel or the choice ends"


@pytest.mark.parametrize(
    ("interval", "expected"), [(1, list("ABCDEFG")), (3, ["A", "BCD", "EFG"]), (4, ["A", "BCDE", "FG"]), (99, ["A", "BCDEFG"])]
)
def test_the_first_token_at_once_then_so_many_and_the_rest_with_the_end(edge: Edge, interval: int, expected: list[str]) -> None:
    edge.text.script = saying(*"ABCDEFG")
    more = {"n": 2, "stream_interval": interval, "return_token_ids": True, "stream_options": {"include_usage": True}}
    for path, body in ((CHATS, HI | {"logprobs": True}), (TEXTS, GO | {"logprobs": 0})):
        chunks = events(edge.kept.post(path, json=body | more).text)
        for index in (0, 1):
            assert contents(chunks, index) == expected
            mine = [chunk["choices"][0] for chunk in chunks[:-2] if chunk["choices"][0]["index"] == index]
            assert [one for choice in mine for one in choice.get("token_ids") or ()] == list(range(1, 8))
            told = [choice["logprobs"] for choice in mine if choice.get("logprobs")]
            found = (
                [one["logprob"] for part in told for one in part["content"]]
                if path == CHATS
                else [p for part in told for p in part["token_logprobs"]]
            )
            assert found == [-count / 4 for count in range(1, 8)]
        assert chunks[-2]["usage"]["completion_tokens"] == 14
    chunks = events(edge.kept.post(CHATS, json=HI | {"stream_interval": interval}).text)
    assert contents(chunks) == expected, "plain rows, too"
    text = edge.kept.post(RESPONSES, json={"input": "hi", "stream": True, "store": False, "stream_interval": interval}).text
    assert [json.loads(one) for one in re.findall(r'"type":"response.output_text.delta".*?"delta":("[A-G]+")', text)] == expected


def test_the_server_s_interval_holds_for_whoever_says_none(make_edge: MakeEdge) -> None:
    edge = make_edge(stream_interval=3)
    edge.text.script = saying(*"ABCDEFG")
    for more, expected in (({}, ["A", "BCD", "EFG"]), ({"stream_interval": 1}, list("ABCDEFG"))):
        assert contents(events(edge.kept.post(CHATS, json=HI | more).text)) == expected
    lone = edge.kept.post("/generate_stream", json={"inputs": "hi"}).text
    assert lone.count("data:") == 7, "there an event is a token"


@pytest.mark.parametrize(("said", "meant"), [(None, None), ("auto", None), (True, True), ("force", True), (False, False), ("off", False)])
def test_a_request_may_want_drafts_always_or_never(edge: Edge, said: Any, meant: bool | None) -> None:
    bodies = ((CHATS, HI), (TEXTS, GO), (RESPONSES, {"input": "hi", "store": False}), ("/inference/v1/generate", {"token_ids": [1]}))
    before = sum(isinstance(message, Submit) for message in edge.text.received)
    for path, body in bodies:
        assert edge.kept.post(path, json={**body, "stream": False, "spec_decode": said}).status_code == 200
    asked = edge.text.wait_for(Submit, before + len(bodies))[before:]
    assert [submit.spec_decode for submit in asked] == [meant] * len(bodies)
    for path, body in bodies:
        error = edge.kept.post(path, json=body | {"spec_decode": "maybe"}).json()["error"]
        assert (error["param"], "'off' or 'force'" in error["message"]) == ("spec_decode", True)


@pytest.mark.parametrize("interval", [0, -1, 1025])
def test_an_interval_has_bounds(edge: Edge, interval: int) -> None:
    for path, body in ((CHATS, HI), (TEXTS, GO), (RESPONSES, {"input": "hi", "stream": True})):
        error = edge.kept.post(path, json=body | {"stream_interval": interval}).json()["error"]
        assert error["param"] == "stream_interval"


def test_what_waits_comes_before_a_failure_unless_the_stream_can_be_resumed() -> None:
    (first, second) = deltas([(0, (CONTENT, -1), "a", 1), (0, (CONTENT, -1), "b", 1)], ends=True)[:2]
    for tells, expected in ((True, ["a", "b"]), (False, ["a"])):
        recorder = Recorder()
        sink = Merging(recorder, 8, 3, tells_end=tells)
        for message in (first, second):
            sink.row(0, message.texts[1], "", 1, Batch(message))
        error = EngineUnavailable("Gone.")
        sink.failed(error)
        assert [row[1] for row in recorder.rows] == expected
        assert recorder.ended == [error]


def test_what_waits_comes_before_the_error_of_its_choice(edge: Edge) -> None:
    edge.text.script = lambda submit: saying(*"ABCD")(submit)[:1]
    before = len(edge.text.received)
    with edge.kept.stream("POST", CHATS, json=HI | {"stream_interval": 9}) as reply:
        found = reply.iter_lines()
        next(found)
        submit = next(message for message in edge.text.received[before:] if isinstance(message, Submit))
        extra = {"error": "No.", "error_code": "engine_failure"}
        edge.text.send(
            *saying(*"ABCD")(submit)[1:3], delta({"key": submit.key, "tokens": [], "output": 3, "reason": "error", "extra": extra})
        )
        chunks = [json.loads(line.removeprefix("data: ")) for line in found if line]
    assert contents(chunks[:-1]) == ["A", "BC"]
    assert chunks[-1]["error"]["code"] == "engine_failure"


# ------------------------------------------------------------------ NDJSON


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        (None, False),
        ("*/*", False),
        ("text/event-stream", False),
        ("application/x-ndjson", True),
        ("Application/X-NDJSON; charset=utf-8, */*;q=0.1", True),
        ("application/x-ndjson;q=0", False),
        ("application/x-ndjson;q=0.5, text/event-stream", False),
        ("application/x-ndjson, text/event-stream;q=0.5", True),
        ("application/x-ndjson;q=x", False),
    ],
)
def test_lines_come_where_they_are_asked_for(accept: str | None, expected: bool) -> None:
    usual = Sse()
    found = chosen(None if accept is None else accept.encode(), usual)
    assert isinstance(found, NdJson) if expected else found is usual


SURFACES = [
    (CHATS, HI | {"stream_options": {"include_usage": True}}),
    (CHATS, HI | {"store": True}),
    (TEXTS, {"prompt": ["a", "b"], "stream": True, "echo": True}),
    ("/v1/messages", {"model": "brook", "max_tokens": 9, "messages": HI["messages"], "stream": True}),
    (RESPONSES, {"input": "hi", "stream": True}),
    ("/generate_stream", {"inputs": "hi"}),
    ("/inference/v1/generate", {"token_ids": [1], "stream": True}),
]
CHANGING = r'"(id|request_id|item_id|response_id|created|created_at|completed_at)":("[^"]*"|[\d.]+)'


@pytest.mark.parametrize(("path", "body"), SURFACES)
def test_every_stream_comes_in_lines_too(edge: Edge, path: str, body: dict[str, Any]) -> None:
    plain = edge.kept.post(path, json=body).text
    reply = edge.kept.post(path, json=body, headers=LINES)
    assert (reply.status_code, reply.headers["content-type"]) == (200, "application/x-ndjson")
    data = [line.removeprefix("data: ") for line in plain.split("\n") if line.startswith("data: ") and line != "data: [DONE]"]
    assert re.sub(CHANGING, "", reply.text) == "".join(re.sub(CHANGING, "", line) + "\n" for line in data)
    assert len(lines(reply.text)) == len(data) > 1


def test_a_whole_reply_stays_one(edge: Edge) -> None:
    reply = edge.kept.post(CHATS, json=HI | {"stream": False}, headers=LINES)
    assert reply.headers["content-type"] == "application/json"


def test_an_idle_line_is_empty_and_an_error_is_the_last(make_edge: MakeEdge) -> None:
    edge = make_edge(keep_alive_s=0.05)
    edge.text.script = lambda submit: [delta({"key": submit.key, "text": "A"})]
    with edge.kept.stream("POST", CHATS, json=HI, headers=LINES) as reply:
        found = reply.iter_lines()
        next(found)
        assert contents([json.loads(next(found))]) == ["A"]
        assert next(found) == ""
        (submit,) = edge.text.wait_for(Submit)
        edge.text.send(Rejected(key=submit.key, status=503, type="server_error", code="engine_unavailable", message="Gone."))
        assert json.loads([line for line in found if line][-1])["error"]["message"] == "Gone."


# ------------------------------------------------------------------ values

OBJECT = ('{"a": 1', '2, "b": [', '"x\\u00', 'e9", {', '"c": null}', "]}")
JSON_OBJECT = {"response_format": {"type": "json_object"}}
VALUES = {"stream_options": {"events": ["json_value"]}}


def values(chunks: list[Any]) -> list[Any]:
    return [
        chunk["choices"][0]["json_value"]
        for chunk in chunks
        if chunk != "[DONE]" and chunk["choices"] and "json_value" in chunk["choices"][0]
    ]


def test_values_come_as_they_are_complete(edge: Edge) -> None:
    edge.text.script = saying(*OBJECT)
    expected = [
        {"path": "/a", "value": 12},
        {"path": "/b/0", "value": "xé"},
        {"path": "/b/1/c", "value": None},
        {"path": "/b/1", "value": {"c": None}},
        {"path": "/b", "value": ["xé", {"c": None}]},
    ]
    for path, body in ((CHATS, HI), (TEXTS, GO), (CHATS, HI | {"store": True})):
        chunks = events(edge.kept.post(path, json=body | JSON_OBJECT | VALUES).text)
        assert values(chunks) == expected
        assert contents(chunks) == list(OBJECT), "the text is what it is without them"
        at = next(number for number, chunk in enumerate(chunks) if "json_value" in chunk["choices"][0])
        assert contents(chunks[:at]) == list(OBJECT[:2]), "right behind the text that completes it"
    chunks = events(edge.kept.post(CHATS, json=HI | JSON_OBJECT | VALUES | {"n": 2, "stream_interval": 2}).text)
    assert values(chunks) == [value for value in expected for _ in range(2)] or len(values(chunks)) == 10
    assert "json_value" not in edge.kept.post(CHATS, json=HI | JSON_OBJECT).text


def test_openai_s_client_reads_on(edge: Edge) -> None:
    edge.text.script = saying(*OBJECT)
    stream: Any = edge.client().chat.completions.create(
        model="brook", messages=[{"role": "user", "content": "hi"}], stream=True, extra_body=JSON_OBJECT | VALUES
    )
    found = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in found) == "".join(OBJECT)
    assert next(chunk.choices[0].json_value["path"] for chunk in found if hasattr(chunk.choices[0], "json_value")) == "/a"


def test_items_of_a_list_come_as_lines(edge: Edge) -> None:
    edge.text.script = saying("[{", '"a": 1}', ", ", "[2]", ", 3", "]")
    body = GO | VALUES | {"guided_json": {"type": "array"}}
    found = values(lines(edge.kept.post(TEXTS, json=body, headers=LINES).text))
    items = {value["index"]: value["value"] for value in found if "index" in value}
    assert list(items.items()) == [(0, {"a": 1}), (1, [2]), (2, 3)]
    assert [value["path"] for value in found] == ["/0/a", "/0", "/1/0", "/1", "/2"]


@pytest.mark.parametrize(
    ("path", "more", "param"),
    [
        (CHATS, {"stream_options": {"events": ["json_value"]}}, "stream_options.events[0]"),
        (CHATS, {**JSON_OBJECT, "stream_options": {"events": ["arguments_done", "jsonvalue"]}}, "stream_options.events[1]"),
        (CHATS, {"guided_regex": "a", **VALUES}, "stream_options.events[0]"),
        (CHATS, {"stream_options": {"events": [1]}}, "stream_options.events[0]"),
        (TEXTS, {"stream_options": {"events": "json_value"}}, "stream_options.events"),
        (RESPONSES, VALUES, "stream_options.events"),
        ("/inference/v1/generate", VALUES, "stream_options.events"),
    ],
)
def test_events_that_cannot_be_are_refused_by_name(edge: Edge, path: str, more: dict[str, Any], param: str) -> None:
    bodies = {
        CHATS: HI,
        TEXTS: GO,
        RESPONSES: {"input": "hi", "stream": True},
        "/inference/v1/generate": {"token_ids": [1], "stream": True},
    }
    reply = edge.kept.post(path, json=bodies[path] | more)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param), reply.text


def test_arguments_done_is_the_older_field_s_name(edge: Edge) -> None:
    def script(submit: Submit) -> list[Message]:
        rows: list[Row] = [(0, (NAME, 0), "f", 1), (0, (ARGUMENTS, 0), "{}", 1), (0, (DONE, 0), "", 0)]
        out: list[Message] = []
        for message in deltas(rows, ends=False)[:3]:
            fields = {name: getattr(message, name) for name in message.__struct_fields__ if name not in ("keys", "extras")}
            out.append(TextDelta(**fields, keys=np.array([0, submit.key], np.int64), extras=[RowExtra(row=1, call_id="c")]))
        return [*out, delta({"key": submit.key, "tokens": [], "reason": "tool_calls"}), finished(submit.key)]

    edge.text.script = script
    body = HI | {"tools": [{"type": "function", "function": {"name": "f"}}]}
    said = [
        re.sub(CHANGING, "", edge.kept.post(CHATS, json=body | {"stream_options": options}).text)
        for options in ({"events": ["arguments_done"]}, {"tool_calls_done": True}, {"events": []})
    ]
    assert said[0] == said[1] != said[2]
    assert '"done":true' in said[0]
