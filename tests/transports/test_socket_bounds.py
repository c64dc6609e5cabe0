"""WebSockets: nothing that a client sends, or does not read, harms anybody else; and who may connect."""

from __future__ import annotations

import contextlib
import json
import logging
import socket as sockets
from collections.abc import Iterator
from typing import Any

import pytest
from edge_kit import Edge, MakeEdge, delta, finished, silent
from socket_kit import CHATS, HANDSHAKE, HI, dial, frame, hear, raw, rest, say, sockets_of, until_end
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from penstock.core.protocol.messages import Cancel, Park, Submit, Unpark


@pytest.fixture
def edge(make_edge: MakeEdge) -> Edge:
    return make_edge()


@pytest.fixture
def ws(edge: Edge) -> Iterator[ClientConnection]:
    with dial(edge) as connection:
        yield connection


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


def test_handshakes_that_are_refused(make_edge: MakeEdge, caplog: pytest.LogCaptureFixture) -> None:
    edge = make_edge()
    with pytest.raises(InvalidStatus) as refused:
        dial(edge, subprotocols=None)
    assert refused.value.response.status_code == 400
    other = make_edge(routes=edge.factories[:1])
    with pytest.raises(InvalidStatus) as refused:
        dial(other)
    assert refused.value.response.status_code == 404
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


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


def test_a_stream_that_says_much_holds_no_other_up(make_edge: MakeEdge) -> None:
    edge = make_edge(stream_max_bytes=64 << 20)
    edge.text.script = silent
    with dial(edge, max_queue=1) as ws:
        for id in ("much", "little"):
            say(ws, op="start", id=id, path=CHATS, body=HI)
        rids = {said["id"]: said["stream"] for said in (hear(ws), hear(ws))}
        keys = {submit.rid: submit.key for submit in edge.text.wait_for(Submit, 2)}
        much, little = keys[rids["much"]], keys[rids["little"]]
        edge.text.send(*[delta({"key": much, "text": "x" * 10_000}) for _ in range(2000)])
        edge.text.wait_for(Park)
        edge.text.send(delta({"key": little, "text": "Hi", "reason": "stop"}), finished(little))
        edge.text.send(delta({"key": much, "reason": "stop", "tokens": []}), finished(much))
        edge.wait(lambda: edge.server.gateway.delivered == 2002, "the last row")
        ends: dict[str, int] = {}
        seqs: list[int] = []
        while len(ends) < 2:
            said = hear(ws)
            if said.get("done"):
                ends[said["id"]] = len(seqs)
            elif said["id"] == "much":
                seqs.append(said["seq"])
    assert seqs == list(range(1, len(seqs) + 1))
    assert ends["little"] < ends["much"] - 500
