"""WebSockets: what comes over one is what comes over HTTP, for many requests at once; and nothing that a client sends harms anybody else."""

from __future__ import annotations

import contextlib
import json
import re
import socket as sockets
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest
from edge_kit import Edge, MakeEdge, delta, finished, full_script, hello_script, silent
from test_retained import Stream, stream  # noqa: F401
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from penstock.core.protocol.messages import Attach, Cancel, Detach, Park, Query, Rejected, Submit, Unpark
from penstock.transports.socket_protocol import PenstockSocket

CHATS = "/v1/chat/completions"
HI: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
SURFACES = [
    (CHATS, HI),
    (CHATS, HI | {"n": 2, "stream_options": {"include_usage": True}}),
    ("/v1/completions", {"prompt": ["a", "b"], "stream": True}),
    ("/v1/messages", {"model": "brook", "max_tokens": 9, "messages": HI["messages"], "stream": True}),
    ("/v1/responses", {"input": "hi", "stream": True}),
    ("/generate_stream", {"inputs": "hi"}),
]


def dial(edge: Edge, **options: Any) -> ClientConnection:
    options = {"subprotocols": ["penstock.v1"], "proxy": None, "max_size": None} | options
    return connect(f"ws://127.0.0.1:{edge.port}/v1/stream", **options)


def say(ws: ClientConnection, **message: Any) -> None:
    ws.send(json.dumps(message))


def hear(ws: ClientConnection) -> dict[str, Any]:
    said = json.loads(ws.recv(timeout=10))
    assert isinstance(said, dict)
    return said


def until_end(ws: ClientConnection, id: str = "a") -> list[dict[str, Any]]:
    """Messages of one stream, to its last one."""
    heard: list[dict[str, Any]] = []
    while not heard or not ("done" in heard[-1] or ("error" in heard[-1] and "op" not in heard[-1])):
        said = hear(ws)
        if said["id"] == id:
            heard.append(said)
    return heard


@pytest.fixture
def edge(make_edge: MakeEdge) -> Edge:
    return make_edge()


@pytest.fixture
def ws(edge: Edge) -> Iterator[ClientConnection]:
    with dial(edge) as connection:
        yield connection


def sockets_of(edge: Edge) -> list[Any]:
    return [one for one in edge.server._state.connections if isinstance(one, PenstockSocket)]


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


# --- steering


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
    assert json.loads(asked[-1].body) == {"rid": rid, "tenant": None, "do": op}


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


# --- bad input


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


def test_streams_of_a_socket_are_bounded(make_edge: MakeEdge) -> None:
    edge = make_edge(max_socket_streams=2)
    edge.text.script = silent
    with dial(edge) as ws:
        for id in "abc":
            say(ws, op="start", id=id, path=CHATS, body=HI)
        said = [hear(ws) for _ in range(3)]
    refused = [message for message in said if "error" in message]
    assert [(message["id"], message["error"]["code"], message["status"]) for message in refused] == [("c", "too_many_streams", 429)]


@pytest.mark.parametrize(
    ("raw", "code"),
    [("{", 1007), ("", 1007), ("[]", 1007), ("3", 1007), ("[" * 200_000, 1007), (b"\x00", 1003)],
)
def test_what_is_no_message_closes_the_socket(edge: Edge, ws: ClientConnection, raw: Any, code: int) -> None:
    ws.send(raw)
    with pytest.raises(ConnectionClosed) as closed:
        ws.recv(timeout=10)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == code
    assert edge.kept.get("/health").status_code == 200


def test_a_large_message_is_bounded_as_bodies_are(make_edge: MakeEdge) -> None:
    edge = make_edge(max_body_bytes=200_000)
    with dial(edge) as ws:
        content = "x" * 100_000
        say(ws, op="start", id="a", path=CHATS, body={"messages": [{"role": "user", "content": content}]})
        assert until_end(ws)[-1]["done"]
        with contextlib.suppress(ConnectionClosed):
            say(ws, op="start", id="a", path=CHATS, body={"messages": [{"role": "user", "content": content * 3}]})
        with pytest.raises(ConnectionClosed) as closed:
            ws.recv(timeout=10)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1009


# --- raw sockets


HANDSHAKE = (
    b"GET /v1/stream HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: penstock.v1\r\n%b\r\n"
)


def raw(edge: Edge, more: bytes = b"") -> tuple[sockets.socket, bytes]:
    conn = sockets.create_connection(("127.0.0.1", edge.port), timeout=10)
    conn.sendall(HANDSHAKE % more + b"hello" * (b"Length" in more))
    return conn, conn.recv(4096)


def frame(opcode: int, data: bytes = b"", fin: bool = True) -> bytes:
    assert len(data) < 126
    return bytes((opcode | (0x80 if fin else 0), 0x80 | len(data), 0, 0, 0, 0)) + data


def rest(conn: sockets.socket) -> bytes:
    out = b""
    with contextlib.suppress(ConnectionError):
        while data := conn.recv(65536):
            out += data
    return out


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        (frame(1, b"\xff\xfe"), 1007),
        (frame(3), 1002),
        (b"\x81\x02{}", 1002),  # not masked
        (frame(0, b"x"), 1002),
        (frame(1, fin=False) + frame(0, fin=False) * 5000, 1008),
    ],
)
def test_wild_frames_end_their_socket_alone(edge: Edge, frames: bytes, code: int) -> None:
    conn, head = raw(edge)
    assert head.startswith(b"HTTP/1.1 101")
    with conn, contextlib.suppress(ConnectionError):
        conn.sendall(frames)
        end = rest(conn)
        if end:
            assert int.from_bytes(end[2:4], "big") == code
    assert edge.kept.get("/health").status_code == 200
    edge.wait(lambda: not sockets_of(edge), "the socket's end")


def test_pings_that_nobody_reads_the_answers_of(edge: Edge) -> None:
    conn, _ = raw(edge)
    flood = frame(9, b"x" * 125) * 500
    with conn:
        conn.settimeout(5)
        with pytest.raises((ConnectionError, TimeoutError)):
            conn.sendall(flood * 1000)
    edge.wait(lambda: not sockets_of(edge), "the socket's end")


@pytest.mark.parametrize(
    "more", [b"Content-Length: 5\r\n", b"X: " + b"y" * 9000 + b"\r\n", b"Host: y\r\n", b"X: " + b"y" * 70000 + b"\r\n"]
)
def test_a_handshake_that_is_none(edge: Edge, more: bytes) -> None:
    conn, head = raw(edge, more)
    with conn:
        assert head.split(b" ")[1] in (b"400", b"431")
    assert edge.kept.get("/health").status_code == 200


def test_an_upgrade_elsewhere_is_ignored(edge: Edge) -> None:
    headers = {"connection": "upgrade", "upgrade": "websocket"}
    assert edge.kept.get("/health", headers=headers).status_code == 200
    reply = edge.kept.get("/v1/stream")
    assert (reply.status_code, reply.headers["upgrade"], reply.json()["error"]["code"]) == (426, "websocket", "upgrade_required")


def test_a_socket_outlives_the_time_that_a_head_may_take(make_edge: MakeEdge) -> None:
    edge = make_edge(receive_timeout_s=0.2)
    with dial(edge) as ws:
        started = edge.text.call(edge.loop.time)
        edge.wait(lambda: edge.loop.time() > started + 0.5)
        say(ws, op="start", id="a", path=CHATS, body=HI)
        assert until_end(ws)[-1]["done"]


def test_who_answers_no_ping_is_let_go(make_edge: MakeEdge) -> None:
    edge = make_edge(keep_alive_s=0.1, stream_stall_s=0.2)
    edge.text.script = silent
    conn, _ = raw(edge)
    with conn:
        conn.sendall(frame(1, json.dumps({"op": "start", "id": "a", "path": "/v1/completions", "body": {"prompt": "a"}}).encode()))
        assert b"\x89\x04" in rest(conn)
    edge.text.wait_for(Cancel)


# --- keys and origins


def test_keys(make_edge: MakeEdge) -> None:
    edge = make_edge(api_key=["secret"], receive_timeout_s=0.3)
    ways: list[dict[str, Any]] = [
        {"additional_headers": {"Authorization": "Bearer secret"}},
        {"additional_headers": {"x-api-key": "secret"}},
        {"subprotocols": ["penstock.v1", "penstock.key.secret"]},
    ]
    for way in ways:
        with dial(edge, **way) as ws:
            assert ws.subprotocol == "penstock.v1"
            say(ws, op="start", id="a", path=CHATS, body=HI)
            assert until_end(ws)[-1]["done"]
    with dial(edge) as ws:
        say(ws, op="auth", key="secret")
        assert hear(ws) == {"op": "auth", "ok": True}
        say(ws, op="start", id="a", path=CHATS, body=HI)
        assert until_end(ws)[-1]["done"]
    tenants = {submit.tenant for submit in edge.text.wait_for(Submit, 4)}
    assert len(tenants) == 1
    assert tenants != {""}
    for first in ({"op": "auth", "key": "wrong"}, {"op": "start", "id": "a", "path": CHATS, "body": HI}, {"op": "?"}, None):
        with dial(edge) as ws:
            if first is not None:
                ws.send(json.dumps(first))
            with pytest.raises(ConnectionClosed) as closed:
                ws.recv(timeout=10)
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 4401
    with pytest.raises(InvalidStatus) as refused:
        dial(edge, subprotocols=["penstock.v1", "penstock.key.wrong"])
    assert refused.value.response.status_code == 401


@pytest.mark.parametrize(
    ("options", "origin", "host", "status"),
    [
        ({}, None, None, 101),
        ({}, "http://evil.example", None, 403),
        ({}, "http://evil.example", "evil.example", 403),  # a name that somebody else may have pointed here
        ({}, "null", None, 403),
        ({}, "http://127.0.0.1:PORT", None, 101),
        ({}, "http://localhost:PORT", "localhost:PORT", 101),
        ({"allowed_origins": ["https://app.example"]}, "https://app.example", None, 101),
        ({"allowed_origins": ["https://app.example"]}, "https://app.example.evil", None, 403),
        ({"allowed_origins": ["*"]}, "https://x.example", None, 101),
        ({"api_key": ["k"]}, "https://own.example", "own.example", 101),
    ],
)
def test_origins(make_edge: MakeEdge, options: dict[str, Any], origin: str | None, host: str | None, status: int) -> None:
    edge = make_edge(**options)
    conn = sockets.create_connection(("127.0.0.1", edge.port), timeout=10)
    head = HANDSHAKE % (f"Origin: {origin}\r\n".encode() if origin else b"")
    head = head.replace(b"Host: x", b"Host: " + (host or "127.0.0.1:PORT").encode()).replace(b"PORT", b"%d" % edge.port)
    with conn:
        conn.sendall(head)
        assert int(conn.recv(4096).split(b" ")[1]) == status


def test_handshakes_that_are_refused(make_edge: MakeEdge) -> None:
    edge = make_edge()
    with pytest.raises(InvalidStatus) as refused:
        dial(edge, subprotocols=None)
    assert refused.value.response.status_code == 400
    other = make_edge(routes=edge.factories[:1])
    with pytest.raises(InvalidStatus) as refused:
        dial(other)
    assert refused.value.response.status_code == 404


# --- the end of streams and sockets


def test_who_leaves_cancels(edge: Edge) -> None:
    edge.text.script = silent
    with dial(edge) as ws:
        for id in "ab":
            say(ws, op="start", id=id, path=CHATS, body=HI)
        edge.text.wait_for(Submit, 2)
    cancels = edge.text.wait_for(Cancel, 2)
    assert {cancel.cause for cancel in cancels} == {"disconnect"}
    edge.wait(lambda: edge.server.gateway.active == 0)


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


def test_a_slow_reader_parks_its_own_stream_and_is_told_of_the_cut(make_edge: MakeEdge) -> None:
    edge = make_edge(stream_park_bytes=10_000, stream_max_bytes=200_000)
    edge.text.script = silent
    with dial(edge, max_queue=1) as slow, dial(edge) as quick:
        for id, ws in (("slow", slow), ("quick", quick)):
            say(ws, op="start", id=id, path=CHATS, body=HI)
            assert "stream" in hear(ws)
        slow_key, quick_key = (submit.key for submit in edge.text.wait_for(Submit, 2))
        text = "x" * 5000
        for _ in range(4000):  # the kernel and uvicorn take a few MB of it
            edge.text.send(delta({"key": slow_key, "text": text}))
            if any(isinstance(message, Park) for message in edge.text.received):
                break
        assert [park.key for park in edge.text.wait_for(Park)] == [slow_key]
        edge.text.send(delta({"key": quick_key, "text": "Hi", "reason": "stop"}), finished(quick_key))
        assert until_end(quick, "quick")[-1]["done"]
        for _ in range(60):
            edge.text.send(delta({"key": slow_key, "text": text}))
        assert edge.text.wait_for(Cancel)[0].cause == "slow_client"
        assert until_end(slow, "slow")[-1]["error"]["code"] == "slow_client"
        say(slow, op="start", id="next", path=CHATS, body=HI)  # the socket lives
        assert "stream" in hear(slow)
    assert not [message for message in edge.text.received if isinstance(message, Unpark) and message.key == quick_key]


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


# --- corners of surfaces


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


def test_below_a_root_path(make_edge: MakeEdge) -> None:
    edge = make_edge(root_path="/api/llm")
    with connect(f"ws://127.0.0.1:{edge.port}/api/llm/v1/stream", subprotocols=["penstock.v1"], proxy=None) as ws:  # type: ignore[list-item]
        for id, path in (("a", CHATS), ("b", "/api/llm" + CHATS)):
            say(ws, op="start", id=id, path=path, body=HI)
            assert until_end(ws, id)[-1]["done"]


def test_a_flood_that_nobody_reads_the_answers_of_is_held_back(edge: Edge) -> None:
    conn, _ = raw(edge)
    with conn:
        conn.settimeout(1)
        with pytest.raises(TimeoutError):
            conn.sendall(frame(1, b'{"op":"dance","id":"a"}') * 2_000_000)
        (handle,) = sockets_of(edge)
        assert edge.text.call(handle.transport.get_write_buffer_size) < 1 << 20
        assert edge.text.call(handle.queue.qsize) < 100_000
    assert edge.kept.get("/health").status_code == 200


def test_a_stranger_cannot_send_much(make_edge: MakeEdge) -> None:
    edge = make_edge(api_key=["secret"])
    with dial(edge) as ws:
        ws.send("x" * 5000)
        with pytest.raises(ConnectionClosed) as closed:
            ws.recv(timeout=10)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1009
    with dial(edge) as ws:
        say(ws, op="auth", key="secret")
        hear(ws)
        say(ws, op="start", id="a", path=CHATS, body=HI | {"messages": [{"role": "user", "content": "x" * 5000}]})
        assert until_end(ws)[-1]["done"]


# --- the document


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
