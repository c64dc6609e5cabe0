"""WebSockets: what comes over one is what comes over HTTP, for many requests at once, and can be steered."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest
from edge_kit import Edge, MakeEdge, delta, finished, full_script, hello_script, silent
from socket_kit import CHATS, HI, dial, hear, say, until_end
from test_retained import Stream, stream  # noqa: F401
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection

from penstock.core.protocol.columns import i32
from penstock.core.protocol.messages import Attach, Cancel, Detach, Query, Rejected, Submit
from penstock.transports.stream import MOST_PIECES

SURFACES = [
    (CHATS, HI),
    (CHATS, HI | {"n": 2, "stream_options": {"include_usage": True}}),
    ("/v1/completions", {"prompt": ["a", "b"], "stream": True}),
    ("/v1/messages", {"model": "brook", "max_tokens": 9, "messages": HI["messages"], "stream": True}),
    ("/v1/responses", {"input": "hi", "stream": True}),
    ("/generate_stream", {"inputs": "hi"}),
]


@pytest.fixture
def edge(make_edge: MakeEdge) -> Edge:
    return make_edge()


@pytest.fixture
def ws(edge: Edge) -> Iterator[ClientConnection]:
    with dial(edge) as connection:
        yield connection


def payloads_of(edge: Edge, path: str, body: dict[str, Any], **headers: str) -> list[Any]:
    """As server-sent events say them."""
    text = edge.kept.post(path, json=body, headers=headers).text
    lines = [line for line in text.split("\n") if line.startswith("data:")]
    return [json.loads(line[5:]) for line in lines if "[DONE]" not in line]


def plain(value: Any) -> Any:
    """Without what is the clock's or the request's own."""
    text = re.sub(r"[0-9a-f]{32}", "ID", json.dumps(value))
    return json.loads(re.sub(r'"(created|created_at|completed_at)": \d+', r'"\1": 0', text))


@pytest.mark.parametrize(("path", "body"), SURFACES)
def test_payloads_are_those_of_events(edge: Edge, ws: ClientConnection, path: str, body: dict[str, Any]) -> None:
    say(ws, op="start", id="a", path=path, body=body)
    heard = until_end(ws)
    assert set(heard[0]) == {"id", "stream"}
    assert heard[-1] == {"id": "a", "done": True}
    assert [message["seq"] for message in heard[1:-1]] == list(range(1, len(heard) - 1))
    assert plain([message["data"] for message in heard[1:-1]]) == plain(payloads_of(edge, path, body))
    assert edge.server.gateway.active == 0


def test_a_body_without_stream_is_one_message(edge: Edge, ws: ClientConnection) -> None:
    say(ws, op="start", id="ä" * 64, path=CHATS, body=HI | {"stream": False})
    _, data, done = until_end(ws, "ä" * 64)
    assert (data["seq"], data["data"]["choices"][0]["message"]["content"], done["done"]) == (1, "Hello world", True)
    say(ws, op="start", id="b", path="/tokenize", body={"prompt": "x"})
    assert until_end(ws, "b")[1]["data"]["tokens"] == [1]


def test_many_at_once_each_in_its_order(edge: Edge, ws: ClientConnection) -> None:
    edge.text.script = silent
    ids = [f"s{number}" for number in range(50)]
    for id in ids:
        say(ws, op="start", id=id, path=CHATS, body=HI)
    submits = edge.text.wait_for(Submit, 50)
    for word in range(20):
        edge.text.send(delta(*[{"key": submit.key, "text": f"{word} "} for submit in submits]))
    edge.text.send(delta(*[{"key": submit.key, "reason": "stop", "tokens": []} for submit in submits]))
    edge.text.send(*[finished(submit.key) for submit in submits])
    texts, open_ = dict.fromkeys(ids, ""), set(ids)
    while open_:
        said = hear(ws)
        if "data" in said:
            texts[said["id"]] += said["data"]["choices"][0]["delta"].get("content") or ""
        elif "done" in said:
            open_.discard(said["id"])
    assert set(texts.values()) == {"".join(f"{word} " for word in range(20))}


@pytest.mark.parametrize("op", ["pause", "resume", "stop", "cancel"])
def test_steering_asks_text_in_its_name(edge: Edge, ws: ClientConnection, op: str) -> None:
    edge.text.script = silent
    edge.text.answers["control"] = lambda _: (200, b"{}")
    say(ws, op="start", id="a", path=CHATS, body=HI)
    say(ws, op=op, id="a")  # at once: text hears of the request first
    rid = hear(ws)["stream"]
    assert hear(ws) == {"id": "a", "op": op, "ok": True}
    kinds = [message for message in edge.text.received if isinstance(message, (Submit, Query))]
    asked = [message for message in kinds if isinstance(message, Query) and message.what == "control"]
    assert isinstance(kinds[-2], Submit)
    assert json.loads(asked[-1].body) == {"rid": rid, "tenant": None, "own": "", "do": op}


def test_a_cancel_that_text_knows_nothing_of_ends_the_stream(edge: Edge, ws: ClientConnection) -> None:
    edge.text.script = silent
    say(ws, op="start", id="a", path=CHATS, body=HI)
    say(ws, op="cancel", id="a")
    assert until_end(ws)[-1]["error"]["code"] == "cancelled"
    edge.text.wait_for(Cancel)
    assert edge.server.gateway.active == 0


def test_what_does_not_run_cannot_be_steered(edge: Edge, ws: ClientConnection) -> None:
    say(ws, op="pause", id="a")
    said = hear(ws)
    assert (said["op"], said["error"]["code"], said["status"]) == ("pause", "not_found", 404)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"op": "dance", "id": "a"}, "op"),
        ({"op": "start", "id": "", "path": CHATS, "body": {}}, "id"),
        ({"op": "start", "id": "x" * 65, "path": CHATS, "body": {}}, "id"),
        ({"op": "start", "id": "a", "path": "v1", "body": {}}, "path"),
        ({"op": "start", "id": "a", "path": "/a b", "body": {}}, "path"),
        ({"op": "start", "id": "a", "path": CHATS}, "body"),
        ({"op": "start", "id": "a", "path": CHATS, "body": {}, "headers": {"Host": "x"}}, "headers.Host"),
        ({"op": "start", "id": "a", "path": CHATS, "body": {}, "headers": {"x": "a\r\nb"}}, "headers.x"),
        ({"op": "start", "id": "a", "path": CHATS, "body": {}, "headers": {"x y": "a"}}, "headers.x y"),
        ({"op": "attach", "id": "a"}, "stream"),
        ({"op": "attach", "id": "a", "stream": "r", "after": -1}, "after"),
        ({"op": "start", "id": 3}, None),
        ({"op": "start", "id": "a", "surprise": 1}, None),
    ],
)
def test_a_bad_message_is_an_error_and_the_socket_lives(edge: Edge, ws: ClientConnection, message: Any, param: str | None) -> None:
    ws.send(json.dumps(message))
    said = hear(ws)
    assert (said["status"], said["error"]["param"]) == (400, param)
    assert "op" in said
    say(ws, op="start", id="b", path=CHATS, body=HI)
    assert until_end(ws, "b")[-1]["done"]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        (CHATS, {"messages": []}, 400),
        (CHATS, HI | {"model": 3}, 400),
        ("/v1/messages", {}, 400),
        ("/generate_stream", {}, 422),
        ("/nowhere", {}, 404),
        ("/v1/stream", {}, 405),
        ("/v1/chat/completions/../../health", {}, 404),
        ("/v1/files", {}, 415),
    ],
)
def test_errors_are_the_surface_s_own(edge: Edge, ws: ClientConnection, path: str, body: Any, status: int) -> None:
    say(ws, op="start", id="a", path=path, body=body)
    last = until_end(ws)[-1]
    over_http = edge.kept.post(path.replace("/..", "/%2e%2e"), json=body).json()
    assert last["status"] == status
    if status in (400, 422):
        assert last["error"] == (over_http["error"] if isinstance(over_http["error"], dict) else over_http)


def test_an_id_in_use_is_refused_and_what_runs_goes_on(edge: Edge, ws: ClientConnection) -> None:
    edge.text.script = silent
    say(ws, op="start", id="a", path=CHATS, body=HI)
    hear(ws)
    say(ws, op="start", id="a", path=CHATS, body=HI)
    said = hear(ws)
    assert (said["op"], said["error"]["code"]) == ("start", "id_in_use")
    edge.text.send(*hello_script(edge.text.wait_for(Submit)[0]))
    assert until_end(ws)[-1]["done"]


def test_who_leaves_cancels(edge: Edge) -> None:
    edge.text.script = silent
    with dial(edge) as ws:
        for id in "ab":
            say(ws, op="start", id=id, path=CHATS, body=HI)
        edge.text.wait_for(Submit, 2)
    cancels = edge.text.wait_for(Cancel, 2)
    assert {cancel.cause for cancel in cancels} == {"disconnect"}
    edge.wait(lambda: edge.server.gateway.active == 0)


def test_open_connections_are_counted(edge: Edge) -> None:
    edge.text.script = silent

    def now() -> dict[str, float]:
        return {name: value for name, value in edge.server.gateway.counters.read().items() if name.startswith("penstock_edge_")}

    sockets, http, streams = (
        'penstock_edge_connections{kind="websocket"}',
        'penstock_edge_connections{kind="http"}',
        "penstock_edge_streams",
    )
    assert edge.text.call(now) == {sockets: 0, http: 0, streams: 0}
    with dial(edge) as ws:
        say(ws, op="start", id="a", path=CHATS, body=HI)
        edge.kept.get("/version")
        edge.text.wait_for(Submit)
        assert edge.text.call(now) == {sockets: 1, http: 1, streams: 1}
        assert not edge.server.gateway.counters.changed
    edge.wait(lambda: now() == {sockets: 0, http: 1, streams: 0}, "the socket's end")


def test_who_leaves_a_retained_stream_detaches_and_attaches_again(edge: Edge, stream: Stream) -> None:  # noqa: F811
    edge.text.script = silent
    with dial(edge) as ws:
        say(ws, op="start", id="a", path=CHATS, body=HI | {"retain_s": 30}, headers={"X-Request-Id": "mine"})
        assert hear(ws) == {"id": "a", "stream": "mine"}
        submit = edge.text.wait_for(Submit)[0]
        edge.text.send(delta({"key": submit.key, "text": "Hello", "tokens": [10]}))
        got = [hear(ws), hear(ws)]
    edge.text.wait_for(Detach)
    assert not [message for message in edge.text.received if isinstance(message, Cancel)]
    with dial(edge) as ws:
        say(ws, op="attach", id="b", stream="mine", after=2)
        heard = until_end(ws, "b")
        assert heard[0] == {"id": "b", "stream": "mine"}
        assert [message["seq"] for message in got + heard[1:-1]] == list(range(1, len(heard) + 1))
        events = edge.kept.get("/v1/streams/mine").text
        numbered = [
            (int(event.split("\n")[0][4:]), json.loads(event.split("\ndata: ")[1]))
            for event in events.split("\n\n")
            if event and "[DONE]" not in event
        ]
        assert [(message["seq"], message["data"]) for message in got + heard[1:-1]] == numbered
        say(ws, op="attach", id="c", stream="mine", after=99)
        assert until_end(ws, "c")[-1]["done"]
        say(ws, op="attach", id="d", stream="other")
        assert until_end(ws, "d")[-1]["error"]["code"] == "stream_not_found"
    assert edge.text.wait_for(Attach)


def test_a_kept_stream_with_a_large_beginning(edge: Edge, ws: ClientConnection) -> None:
    prompt = "a" * 100_000
    edge.text.script = lambda submit: [
        delta({"key": submit.key, "text": "b", "reason": "stop", "extra": {"prompt_text": prompt, "prompt_token_ids": i32([1])}}),
        finished(submit.key),
    ]
    say(ws, op="start", id="a", path="/v1/completions", body={"prompt": prompt, "stream": True, "echo": True, "retain_s": 30})
    heard = until_end(ws)
    assert heard[-1] == {"id": "a", "done": True}
    assert "".join(message["data"]["choices"][0]["text"] for message in heard[1:-1]) == prompt + "b"


def test_who_takes_a_stream_over_ends_the_other_one(edge: Edge) -> None:
    held = Stream(edge)
    edge.text.script = silent
    with dial(edge) as ws:
        say(ws, op="start", id="a", path=CHATS, body=HI | {"retain_s": 30})
        rid = hear(ws)["stream"]
        key = edge.text.wait_for(Submit)[0].key
        edge.text.send(delta({"key": key, "text": "Hel"}))
        assert [hear(ws)["seq"], hear(ws)["seq"]] == [1, 2]
        say(ws, op="attach", id="b", stream=rid, after=2)
        edge.text.wait_for(Attach)
        edge.text.send(delta({"key": key, "text": "Hel"}), delta({"key": key, "text": "lo", "reason": "stop"}), finished(key))
        heard: dict[str, list[dict[str, Any]]] = {"a": [], "b": []}
        while not (heard["a"] and heard["b"] and "done" in heard["b"][-1]):
            said = hear(ws)
            heard[said["id"]].append(said)
    assert [message["error"]["code"] for message in heard["a"]] == ["stream_taken"]
    assert [message.get("seq") for message in heard["b"]] == [None, 3, 4, None]
    assert not [message for message in edge.text.received if isinstance(message, (Cancel, Detach))]
    assert held.submits


def test_an_error_in_the_middle(edge: Edge, ws: ClientConnection) -> None:
    edge.text.script = silent
    say(ws, op="start", id="a", path=CHATS, body=HI)
    key = edge.text.wait_for(Submit)[0].key
    edge.text.send(delta({"key": key, "text": "Hello"}))
    edge.text.send(delta({"key": key, "reason": "error", "extra": {"error": "It broke.", "error_code": "engine_failure"}}))
    heard = until_end(ws)
    assert heard[-1]["error"] | {"param": None} == {"message": "It broke.", "type": "server_error", "param": None, "code": "engine_failure"}
    assert "Hello" in json.dumps(heard)
    say(ws, op="start", id="b", path=CHATS, body=HI)
    key = edge.text.wait_for(Submit, 2)[1].key
    edge.text.send(Rejected(key=key, status=429, type="rate_limit_error", code="queue_full", message="Later.", retry_after_s=3.0))
    last = until_end(ws, "b")[-1]
    assert (last["status"], last["error"]["code"], last["retry_after_s"]) == (429, "queue_full", 3)


def test_the_end_of_the_server_comes_behind_the_streams(make_edge: MakeEdge) -> None:
    edge = make_edge()
    edge.text.script = silent
    with dial(edge) as ws, dial(edge) as idle:
        say(ws, op="start", id="a", path=CHATS, body=HI)
        assert "stream" in hear(ws)
        edge.text.call(lambda: setattr(edge.server.gateway, "draining", True))
        say(ws, op="start", id="b", path=CHATS, body=HI)
        assert until_end(ws, "b")[-1]["status"] == 503
        edge.text.call(edge.server.stop)
        assert until_end(ws)[-1]["error"]["code"] == "draining"
        for one in (ws, idle):
            with pytest.raises(ConnectionClosed) as closed:
                one.recv(timeout=10)
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1001


def test_a_response_in_the_background_and_large_beginnings(edge: Edge, ws: ClientConnection) -> None:
    body = {"input": "hi", "stream": True, "background": True, "store": True}
    say(ws, op="start", id="a", path="/v1/responses", body=body)
    heard = until_end(ws)
    assert [message["data"]["type"] for message in heard[1:-1]] == [event["type"] for event in payloads_of(edge, "/v1/responses", body)]
    assert heard[-1]["done"]
    edge.text.script = full_script
    asked = {"prompt": "hi!", "stream": True, "echo": True, "logprobs": 1}
    say(ws, op="start", id="b", path="/v1/completions", body=asked)
    heard = until_end(ws, "b")
    assert plain([message["data"] for message in heard[1:-1]]) == plain(payloads_of(edge, "/v1/completions", asked))
    numbers = [message["seq"] for message in heard[1:-1]]
    assert numbers == sorted(set(numbers))


def test_what_is_said_is_in_the_document(make_edge: MakeEdge) -> None:
    """Every message, of both sides, obeys exactly one of those that /schema/asyncapi.json names."""
    edge = make_edge(api_key=["k"])
    document = edge.kept.get("/schema/asyncapi.json", headers={"x-api-key": "k"}).json()
    channel = document["channels"]["stream"]
    assert (document["asyncapi"], channel["address"]) == ("3.0.0", "/v1/stream")
    kinds = {
        side: [jsonschema_rs.validator_for(channel["messages"][ref["$ref"].rsplit("/", 1)[1]]["payload"]) for ref in operation["messages"]]
        for side, operation in document["operations"].items()
    }
    assert sum(map(len, kinds.values())) == len(channel["messages"])
    sent: list[dict[str, Any]] = [
        {"op": "auth", "key": "k"},
        {"op": "start", "id": "a", "path": CHATS, "body": HI | {"surprise": 1}, "headers": {"x-request-id": "r"}},
        {"op": "start", "id": "b", "path": CHATS, "body": {}},
        {"op": "attach", "id": "c", "stream": "none", "after": 3},
        {"op": "pause", "id": "d"},
    ]
    heard: list[dict[str, Any]] = []
    edge.text.answers["stream"] = lambda _: (404, b"{}")
    edge.text.answers["control"] = lambda _: (200, b"{}")
    with dial(edge) as ws:
        for message in sent:
            ws.send(json.dumps(message))
        while len([said for said in heard if "done" in said or "error" in said]) < 4:
            heard.append(hear(ws))
        edge.text.script = silent
        for message in ({"op": "start", "id": "a", "path": CHATS, "body": HI}, {"op": "resume", "id": "a"}):
            ws.send(json.dumps(message))
            heard.append(hear(ws))
    for side, messages in (("ask", sent), ("answer", heard)):
        for said in messages:
            assert sum(kind.is_valid(said) for kind in kinds[side]) == 1, said
    assert {key for said in heard for key in said} >= {"stream", "ignored", "seq", "data", "done", "error", "ok", "op"}


def test_numbers_are_those_that_a_stream_began_with(edge: Edge) -> None:
    """Where lines are counted none may be left out, whatever carries the stream later; elsewhere what is large about a prompt has numbers to spare."""
    held = Stream(edge)

    def echoing(submit: Submit) -> list[Any]:
        said = {"prompt_text": "a" * 300_000, "prompt_token_ids": i32([1])}
        rows = [{"key": submit.key, "text": text, "extra": said if number == 0 else {}} for number, text in enumerate(("Hel", "lo"))]
        return [delta(*rows, {"key": submit.key, "reason": "stop", "tokens": []}), finished(submit.key)]

    own = edge.text._on_message

    def on_message(link: Any, message: Any) -> None:
        own(link, message)
        if isinstance(message, Attach):
            for frame in held.again(echoing):
                link.send(frame)

    edge.text._on_message = on_message  # type: ignore[method-assign]
    edge.text.script = echoing
    ask = {"prompt": "a" * 300_000, "stream": True, "echo": True, "retain_s": 30}
    with dial(edge) as ws:
        say(ws, op="start", id="a", path="/v1/completions", body=ask, headers={"x-request-id": "spared"})
        began = [message for message in until_end(ws, "a") if "data" in message]
        pieces = len(began) - 3
        assert pieces > 2
        assert [message["seq"] for message in began[:pieces]] == list(range(1, pieces + 1))
        assert began[pieces]["seq"] == MOST_PIECES + 1
        say(ws, op="attach", id="b", stream="spared", after=2)
        assert [{**message, "id": "a"} for message in until_end(ws, "b") if "data" in message] == began[2:]
        lines = edge.kept.post(
            "/v1/completions", json=ask, headers={"accept": "application/x-ndjson", "x-request-id": "counted"}
        ).text.splitlines()
        assert len(lines) == len(began)
        for after in (2, pieces + 1):
            say(ws, op="attach", id="c", stream="counted", after=after)
            rest = [message for message in until_end(ws, "c") if "data" in message]
            assert [message["seq"] for message in rest] == list(range(after + 1, len(lines) + 1))
            assert [message["data"] for message in rest] == [json.loads(line) for line in lines[after:]]
