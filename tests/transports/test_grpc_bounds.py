"""gRPC's clients are bounded as HTTP's are: in bytes, time and patience; whatever comes in, the server stays."""

from __future__ import annotations

import contextlib
import json
import random
import socket
from collections.abc import Iterator
from typing import Any

import grpc
import h2.events
import h2.settings
import pytest
from edge_kit import Edge, MakeEdge, delta, finished, hello_script, silent
from grpc_kit import CHATS, HI, Bare, call, dial, failed, lent, payloads, stubs, told

from penstock.core.protocol.messages import Cancel, Park, Submit, Unpark
from penstock.transports.grpc import listener

Code = grpc.StatusCode
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\0\0\0\x04\0\0\0\0\0"


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    edge = Edge(tmp_path_factory.mktemp("edge"), {"grpc_port": 0}).start()
    yield edge
    edge.stop()


@pytest.fixture
def edge(one: Edge) -> Iterator[Edge]:
    with lent(one) as edge:
        yield edge


def asked(**fields: Any) -> bytes:
    """A StreamRequest, as it travels."""
    body = stubs()[0].StreamRequest(path=CHATS, body=json.dumps(HI).encode(), **fields).SerializeToString()
    return b"\0" + len(body).to_bytes(4, "big") + body


def connections(edge: Edge) -> set[Any]:
    (own,) = edge.server._listeners
    return own._server.connections


def lives(edge: Edge) -> None:
    with dial(edge) as client:
        assert len(payloads(client.stream(CHATS, HI))) == 4
    assert edge.kept.get("/health").status_code == 200
    edge.wait(lambda: not connections(edge), "the end of all connections")
    edge.wait(lambda: edge.server.gateway.active == 0)


# ------------------------------------------------------------------ size


def test_bodies_are_bounded_as_over_http(make_edge: MakeEdge) -> None:
    edge = make_edge(grpc_port=0, max_body_bytes=200_000)
    with dial(edge) as client:
        content = "x" * 100_000
        ask = {"messages": [{"role": "user", "content": content}], "stream": True}
        assert len(payloads(client.stream(CHATS, ask))) == 4
        for times in (2, 100):  # within the message's bound, and beyond: the one is found by the route, the other before anything is read
            ask["messages"] = [{"role": "user", "content": content * times}]
            code, error, metadata = failed(client.stream(CHATS, ask))
            assert (code, error["code"], metadata["penstock-status"]) == (Code.RESOURCE_EXHAUSTED, "request_too_large", "413")
    lives(edge)


def test_strangers_cannot_send_much(make_edge: MakeEdge) -> None:
    edge = make_edge(grpc_port=0, api_key=["secret"])
    bare = Bare(edge)
    with bare.sock:
        bare.ask(b"\0" + (1 << 20).to_bytes(4, "big"), end=False)  # it is refused before it comes
        assert (found := bare.trailers())["grpc-status"] == "16"
        assert found["penstock-status"] == "401"
    with dial(edge, "secret") as client:
        assert len(payloads(client.stream(CHATS, HI | {"messages": [{"role": "user", "content": "x" * 200_000}]}))) == 4


def test_a_reply_that_is_too_large_for_one_message(make_edge: MakeEdge) -> None:
    edge = make_edge(grpc_port=0, max_body_bytes=10_000)
    edge.text.script = lambda submit: [delta({"key": submit.key, "text": "x" * 20_000, "reason": "stop"}), finished(submit.key)]
    with dial(edge) as client, pytest.raises(grpc.RpcError) as refused:
        client.call(CHATS, HI | {"stream": False})
    assert told(refused.value)[:2] == (Code.RESOURCE_EXHAUSTED, told(refused.value)[1])
    assert told(refused.value)[1]["code"] == "reply_too_large"


def test_requests_in_progress_are_bounded(make_edge: MakeEdge) -> None:
    edge = make_edge(grpc_port=0, max_streams=1)
    edge.text.script = silent
    with dial(edge) as client:
        call = client.stream(CHATS, HI)
        edge.text.wait_for(Submit)
        code, error, metadata = failed(client.stream(CHATS, HI))
        assert (code, error["code"], metadata["retry-after"]) == (Code.RESOURCE_EXHAUSTED, "too_many_streams", "1")
        call.cancel()


def test_calls_of_a_connection_are_bounded(make_edge: MakeEdge) -> None:
    edge = make_edge(grpc_port=0, max_socket_streams=2, max_header_bytes=5000)
    edge.text.script = silent
    bare = Bare(edge)
    with bare.sock:
        for event in bare.events():
            if isinstance(event, h2.events.RemoteSettingsChanged) and bare.h2.remote_settings.max_concurrent_streams == 2:
                break
        assert bare.h2.remote_settings.max_header_list_size == 5000
        bare.flush()
        for id in (1, 3):
            bare.ask(asked(), id=id)
        edge.text.wait_for(Submit, 2)
        bare.h2.remote_settings[h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS] = 9
        bare.h2.remote_settings.acknowledge()
        bare.ask(asked(), id=5)
        with contextlib.suppress(ConnectionError):
            list(bare.events())
    edge.wait(lambda: edge.server.gateway.active == 0)
    assert len(edge.text.wait_for(Submit, 2)) == 2


def test_metadata_are_bounded(make_edge: MakeEdge) -> None:
    edge = make_edge(grpc_port=0, max_header_bytes=2000)
    with dial(edge) as client:
        assert failed(client.stream(CHATS, HI, more="x" * 3000))[0] is not Code.OK
    lives(edge)


# ------------------------------------------------------------------ what is no gRPC


@pytest.mark.parametrize(
    ("data", "headers", "said"),
    [
        (b"\0\xff\xff\xff\xff", {}, "8"),  # a message of 4 GiB
        (b"\0\0\0\0\x09abc", {}, "3"),  # it ends before
        (b"\0\0\0\0\x09", {}, "3"),
        (b"\0\0\0\0\x03abc", {}, "3"),  # no protobuf
        (b"\x01\0\0\0\x03abc", {"grpc_encoding": "gzip"}, "12"),
        (b"", {}, "3"),
        (b"\0", {}, "3"),
        (asked(), {":path": "/penstock.v1.Penstock/Dance"}, "12"),
        (asked(), {"grpc_timeout": "soon"}, "2"),
    ],
)
def test_calls_that_are_none_have_a_status(edge: Edge, data: bytes, headers: dict[str, str], said: str) -> None:
    bare = Bare(edge)
    with bare.sock:
        bare.ask(data, **headers)
        assert bare.trailers()["grpc-status"] == said
    lives(edge)


@pytest.mark.parametrize(
    ("headers", "drop", "status"),
    [({":method": "GET"}, "", "405"), ({"content_type": "application/json"}, "", "415"), ({}, "content-type", "415"), ({}, "te", "400")],
)
def test_requests_that_are_no_calls(edge: Edge, headers: dict[str, str], drop: str, status: str) -> None:
    bare = Bare(edge)
    with bare.sock:
        bare.ask(b"", drop=drop, **headers)
        assert bare.trailers()[":status"] == status
    lives(edge)


@pytest.mark.parametrize("drop", [":method", ":path"])
def test_requests_without_what_every_request_has(edge: Edge, drop: str) -> None:
    bare = Bare(edge)
    with bare.sock:
        bare.ask(asked(), drop=drop)
        assert next(event.stream_id for event in bare.events() if isinstance(event, h2.events.StreamReset)) == 1
        bare.ask(asked(), id=3)  # the connection lives
        assert bare.trailers()["grpc-status"] == "0"
    lives(edge)


@pytest.mark.parametrize("metadata", [{"x_bin": "!"}, {"x": "\xff"}, {"x_request_id": "\xff"}])
def test_metadata_that_are_odd(edge: Edge, metadata: dict[str, str]) -> None:
    bare = Bare(edge)
    with bare.sock:
        bare.h2.send_headers(1, [(name.encode(), value.encode("latin-1")) for name, value in (call() | metadata).items()])
        bare.h2.send_data(1, asked(), end_stream=True)
        bare.flush()
        assert bare.trailers()["grpc-status"] == "0"


def test_who_leaves_while_he_is_answered_costs_no_log(edge: Edge, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(50):
        bare = Bare(edge)
        with bare.sock:
            bare.ask(asked())
            bare.sock.shutdown(socket.SHUT_WR)
    lives(edge)
    assert [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")] == []


def test_garbage_ends_its_connection_alone(edge: Edge) -> None:
    chance = random.Random(7)
    garbage = [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + chance.randbytes(200),  # TLS
        PREFACE[:10],
        PREFACE + chance.randbytes(2000),
        PREFACE + SETTINGS + b"\0\0\x04\x01\x05\0\0\0\x01" + b"\xff\xff\xff\xff",  # a header block that is none
        PREFACE + SETTINGS + b"\0\0\x05\0\0\0\0\0\x07hello",  # data of no stream
        PREFACE + SETTINGS + (b"\0\0\x04\x08\0\0\0\0\0\x7f\xff\xff\xff" * 2),  # a window beyond all bounds
    ]
    for _ in range(150):
        kind, flags, size = chance.randrange(12), chance.randrange(256), chance.randrange(64)
        head = size.to_bytes(3, "big") + bytes((kind, flags)) + chance.choice([0, 1, 3]).to_bytes(4, "big")
        garbage.append(PREFACE + SETTINGS + head + chance.randbytes(size) + chance.randbytes(chance.randrange(40)))
    for data in garbage:
        with socket.create_connection(("127.0.0.1", edge.ports["grpc"]), timeout=10) as conn, contextlib.suppress(ConnectionError):
            conn.sendall(data)
            conn.shutdown(socket.SHUT_WR)
            while conn.recv(65536):
                pass
    lives(edge)


def test_unknown_frames_are_skipped(edge: Edge) -> None:
    bare = Bare(edge)
    with bare.sock:
        bare.sock.sendall(b"\0\0\x03\xb0\0\0\0\0\0abc" + b'\0\0\x07\x0a\0\0\0\0\0\0\0h2="x')  # one of nobody's, and ALTSVC
        bare.ask(asked())
        assert bare.trailers()["grpc-status"] == "0"


# ------------------------------------------------------------------ time


@pytest.mark.parametrize("data", [b"", b"\0\0", asked()[:-1]])
def test_a_message_that_does_not_come(make_edge: MakeEdge, data: bytes) -> None:
    edge = make_edge(grpc_port=0, receive_timeout_s=0.5)
    bare = Bare(edge)
    with bare.sock:
        bare.ask(data, end=False)
        assert bare.trailers()["grpc-status"] == "4"
    lives(edge)


@pytest.mark.parametrize("data", [b"", PREFACE + SETTINGS])
def test_who_gives_no_sign_of_life_is_closed(make_edge: MakeEdge, data: bytes) -> None:
    edge = make_edge(grpc_port=0, keep_alive_s=0.05, stream_stall_s=0.1)
    with socket.create_connection(("127.0.0.1", edge.ports["grpc"]), timeout=10) as conn, contextlib.suppress(ConnectionError):
        conn.sendall(data)
        while conn.recv(65536):
            pass
    edge.wait(lambda: not connections(edge))


def test_who_answers_pings_stays(make_edge: MakeEdge) -> None:
    edge = make_edge(grpc_port=0, keep_alive_s=0.05, stream_stall_s=1.0)
    bare = Bare(edge)
    with bare.sock:
        pings = 0
        for event in bare.events():
            bare.flush()
            pings += isinstance(event, h2.events.PingReceived)
            if pings == 30:
                break
        assert pings == 30
        assert connections(edge)


# ------------------------------------------------------------------ slow clients


def test_pings_that_nobody_reads_the_answers_of(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "MOST_UNREAD", 256 << 10)
    bare = Bare(edge)
    with bare.sock:
        bare.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        bare.sock.settimeout(5)
        with pytest.raises((ConnectionError, TimeoutError)):
            bare.sock.sendall(b"\0\0\x08\x06\0\0\0\0\0penstock" * 2_000_000)
    edge.wait(lambda: not connections(edge), "the connection's end")


def test_a_slow_reader_parks_its_own_stream_and_is_told_of_the_cut(make_edge: MakeEdge) -> None:
    edge = make_edge(grpc_port=0, stream_park_bytes=10_000, stream_max_bytes=200_000)
    edge.text.script = silent
    slow = Bare(edge)
    with slow.sock, dial(edge) as quick:
        slow.ask(asked())  # its window is 64 KiB, and never grows
        slow_key = edge.text.wait_for(Submit)[0].key
        call = quick.stream(CHATS, HI)
        quick_key = edge.text.wait_for(Submit, 2)[1].key
        text = "x" * 5000
        for _ in range(40):
            edge.text.send(delta({"key": slow_key, "text": text}))
        assert [park.key for park in edge.text.wait_for(Park)] == [slow_key]
        edge.text.send(delta({"key": quick_key, "text": "Hi", "reason": "stop"}), finished(quick_key))
        assert [payload["choices"][0]["delta"].get("content") for payload in payloads(call)] == ["", "Hi", None]
        for _ in range(60):
            edge.text.send(delta({"key": slow_key, "text": text}))
        assert edge.text.wait_for(Cancel)[0].cause == "slow_client"
        trailers = slow.trailers()
        assert (trailers["grpc-status"], trailers["penstock-status"]) == ("1", "499")
    lives_silently(edge)


def lives_silently(edge: Edge) -> None:
    edge.text.script = hello_script
    lives(edge)


def test_a_call_that_is_not_read_holds_no_other_of_its_connection_up(make_edge: MakeEdge) -> None:
    edge = make_edge(grpc_port=0, stream_park_bytes=10_000, stream_max_bytes=64 << 20)
    edge.text.script = silent
    with dial(edge) as client:
        unread = client.stream(CHATS, HI)
        key = edge.text.wait_for(Submit)[0].key
        edge.text.send(*[delta({"key": key, "text": "x" * 10_000}) for _ in range(2000)])
        edge.text.wait_for(Park)
        call = client.stream(CHATS, HI)
        other = edge.text.wait_for(Submit, 2)[1].key
        edge.text.send(delta({"key": other, "text": "Hi", "reason": "stop"}), finished(other))
        assert len(payloads(call)) == 3
        edge.text.send(delta({"key": key, "reason": "stop", "tokens": []}), finished(key))
        events = list(unread)
    assert [event.seq for event in events] == list(range(1, 2003))


def test_a_stream_that_is_read_again_goes_on(make_edge: MakeEdge) -> None:
    edge = make_edge(grpc_port=0, stream_park_bytes=10_000)
    edge.text.script = silent
    bare = Bare(edge)
    with bare.sock:
        bare.ask(asked())
        key = edge.text.wait_for(Submit)[0].key
        for number in range(40):
            edge.text.send(delta({"key": key, "text": f"{number:05d}" * 1000}))
        edge.text.wait_for(Park)
        data, ended, told_all = b"", False, False
        while not ended:
            if len(data) > 40 * 5000 and not told_all:
                edge.text.wait_for(Unpark)
                edge.text.send(delta({"key": key, "reason": "stop", "tokens": []}), finished(key))
                told_all = True
            for event in bare.h2.receive_data(bare.sock.recv(65536)):
                if isinstance(event, h2.events.DataReceived):
                    data += event.data
                    bare.h2.acknowledge_received_data(event.flow_controlled_length, 1)
                    bare.flush()
                ended |= isinstance(event, h2.events.StreamEnded)
    texts, events = "", 0
    while data:
        size = int.from_bytes(data[1:5], "big")
        event = stubs()[0].Event.FromString(data[5 : 5 + size])
        events += 1
        assert event.seq == events
        texts += json.loads(event.data)["choices"][0]["delta"].get("content") or ""
        data = data[5 + size :]
    assert texts == "".join(f"{number:05d}" * 1000 for number in range(40))


def test_a_client_that_never_reads_holds_no_place(make_edge: MakeEdge) -> None:
    """Its window is closed, and it says nothing any more: the stream stalls, and is cut."""
    edge = make_edge(grpc_port=0, stream_park_bytes=10_000, stream_stall_s=0.2, keep_alive_s=0.1)
    edge.text.script = lambda submit: [delta({"key": submit.key, "text": "x" * 300_000})]
    bare = Bare(edge)
    with bare.sock:
        bare.ask(asked())
        assert edge.text.wait_for(Cancel)[0].cause in ("slow_client", "disconnect")
        edge.wait(lambda: edge.server.gateway.active == 0)
        edge.wait(lambda: not connections(edge))
