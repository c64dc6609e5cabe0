"""Clients that do not read are cut, and told so if they ever read on; and every way to leave has its cause.

Raw sockets on a real edge with a fake text behind it. Seconds of stalls are real, and short.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import Any

import msgspec
import pytest
from edge_kit import Edge, MakeEdge, delta, finished

from penstock.core.protocol.messages import Cancel, Detach, Message, Park, Submit

CHAT: dict[str, Any] = {"model": "brook", "messages": [{"role": "user", "content": "hi"}], "stream": True}
PATHS = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi"},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8},
    "/v1/responses": {"input": "hi"},
}
ENOUGH = 12 << 10
"""Kilobytes that no kernel's socket buffers take."""


def say_a(submit: Submit) -> list[Message]:
    return [delta({"key": submit.key, "text": "a"})]


def ask(edge: Edge, path: str = "/v1/chat/completions", **fields: Any) -> socket.socket:
    """A stream on a raw socket with a small receive buffer, not read yet."""
    body = msgspec.json.encode({"model": "brook", "stream": True} | PATHS[path] | fields)
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(10)
    sock.connect(("127.0.0.1", edge.port))
    sock.sendall(b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (path.encode(), len(body), body))
    return sock


def flood(edge: Edge, key: int, kilobytes: int = ENOUGH) -> None:
    for _ in range(kilobytes // 256):
        edge.text.send(delta(*[{"key": key, "text": "x" * 1024}] * 256))


def slow(make_edge: MakeEdge, **options: Any) -> Edge:
    options = {"stream_park_bytes": 64 << 10, "stream_max_bytes": 64 << 20, "stream_stall_s": 1.0} | options
    return make_edge(text=lambda t: setattr(t, "script", say_a), **options)


def rest_of(sock: socket.socket) -> bytes:
    """The body of a chunked reply that ends in order, and then the connection."""
    raw = b"".join(iter(lambda: sock.recv(1 << 20), b""))
    body, rest = b"", raw.partition(b"\r\n\r\n")[2]
    while True:
        size, _, rest = rest.partition(b"\r\n")
        body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
        if size == b"0":
            assert not rest
            return body


@pytest.mark.parametrize("path", PATHS)
def test_who_reads_on_after_the_cut_has_whole_events_and_then_why(make_edge: MakeEdge, path: str) -> None:
    edge = slow(make_edge)
    with ask(edge, path) as sock:
        flood(edge, edge.text.wait_for(Submit)[0].key)
        assert edge.text.wait_for(Cancel)[0].cause == "slow_client"
        assert edge.server.gateway.active == 0, "its place is another's already"
        body = rest_of(sock)
    assert body.endswith(b"\n\n")
    events = [dict(line.split(b": ", 1) for line in event.split(b"\n")) for event in body.split(b"\n\n")[:-1]]
    said = [msgspec.json.decode(event[b"data"]) for event in events]  # every one of them is whole
    last = said[-1]
    error = last if path == "/v1/responses" else last["error"]
    assert "--stream-stall-s" in error["message"]
    if path != "/v1/messages":  # which has types instead
        assert error["code"] == "slow_client"
    assert len(body) < 1 << 20, "little of what nobody read was sent, also into the kernel"
    assert edge.counters()['penstock_edge_cuts_total{why="stalled"}'] == 1
    edge.wait(lambda: not edge.server._state.connections, "the connection's end")


def test_who_never_reads_on_is_gone_after_as_long_again(make_edge: MakeEdge) -> None:
    edge = slow(make_edge, stream_stall_s=0.3)
    with ask(edge) as sock:
        flood(edge, edge.text.wait_for(Submit)[0].key)
        edge.text.wait_for(Cancel)
        edge.wait(lambda: not edge.server._state.connections and not edge.server._state.tasks, "the connection's end")
        with pytest.raises(ConnectionResetError):
            rest_of(sock)
    edge.text.wait_for(Cancel)
    assert len([m for m in edge.text.received if isinstance(m, Cancel)]) == 1


def test_what_waits_in_the_edge_is_bounded_and_goes_with_the_cut(make_edge: MakeEdge) -> None:
    edge = slow(make_edge, stream_max_bytes=1 << 20, stream_stall_s=30.0)
    with ask(edge) as sock:
        key = edge.text.wait_for(Submit)[0].key
        flood(edge, key, 256)
        (job,) = [sink._job for sink in edge.server.gateway.door()._sinks.values()]  # type: ignore[attr-defined]
        flood(edge, key)
        assert edge.text.wait_for(Cancel)[0].cause == "slow_client"
        assert job.outbox.unsent < 1 << 10, "the last word alone"
        body = rest_of(sock)
    assert b"--stream-max-bytes" in body.rstrip(b"\n").rpartition(b"\n")[2]
    assert edge.counters()['penstock_edge_cuts_total{why="full"}'] == 1


def test_a_stream_that_is_kept_is_left_to_whoever_resumes_it(make_edge: MakeEdge) -> None:
    edge = slow(make_edge)
    with ask(edge, retain_s=60) as sock:
        key = edge.text.wait_for(Submit)[0].key
        flood(edge, key)
        assert edge.text.wait_for(Detach)[0] == Detach(key=key, edge=0, cause="slow_client")
        body = rest_of(sock)
    *events, last = body.split(b"\n\n")[:-1]
    assert [int(event.split(b"\n")[0].removeprefix(b"id: ")) for event in events] == list(range(1, len(events) + 1))
    assert last.startswith(b"data: "), "no number: it is no event of the stream"
    assert b"resumed" in last
    assert not [m for m in edge.text.received if isinstance(m, Cancel)]
    assert len([m for m in edge.text.received if isinstance(m, Detach)]) == 1, "another reader may have it by now"


def test_a_cut_stream_keeps_no_drain_waiting(make_edge: MakeEdge) -> None:
    edge = slow(make_edge, stream_stall_s=20.0, stream_max_bytes=256 << 10)
    with ask(edge):
        flood(edge, edge.text.wait_for(Submit)[0].key)
        edge.text.wait_for(Cancel)
        assert edge.text.call(lambda: edge.server.drain(5.0)) == 0


# ------------------------------------------------------------------ ways to leave


def fin(sock: socket.socket) -> None:
    sock.close()


def rst(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def half(sock: socket.socket) -> None:
    """As nginx and others have it, who sends no more has left: from here it cannot be told from closing."""
    sock.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("leave", [fin, rst, half])
@pytest.mark.parametrize("when", ["waiting", "reading", "stalled"])
def test_a_client_that_leaves_is_cancelled_as_such(make_edge: MakeEdge, leave: Any, when: str) -> None:
    edge = slow(make_edge, stream_stall_s=30.0)
    sock = ask(edge)
    with contextlib.closing(sock):
        key = edge.text.wait_for(Submit)[0].key
        if when != "waiting":
            assert b"200 OK" in sock.recv(1 << 16)
        if when == "stalled":
            flood(edge, key)
            edge.text.wait_for(Park)
        leave(sock)
        assert [(m.key, m.cause) for m in edge.text.wait_for(Cancel)] == [(key, "disconnect")]
        edge.wait(lambda: edge.server.gateway.active == 0 and not edge.server._state.tasks, "the request's end")
    assert not [name for name in edge.counters() if "cuts" in name]


@pytest.mark.parametrize("leave", [fin, rst, half])
def test_a_client_that_leaves_is_cancelled_though_it_asked_for_more(
    make_edge: MakeEdge, leave: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Requests that wait behind a stream on the same connection do not hide that its client has gone, though nothing more is said to it."""
    edge = slow(make_edge)
    more = b"GET /version HTTP/1.1\r\nhost: x\r\n\r\nPOST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{"
    with ask(edge) as sock:
        key = edge.text.wait_for(Submit)[0].key
        assert b"200 OK" in sock.recv(1 << 16)
        sock.sendall(more)
        edge.wait(lambda: any(connection.pipeline for connection in edge.server._state.connections), "the requests behind it")  # type: ignore[union-attr]
        leave(sock)
        assert [(m.key, m.cause) for m in edge.text.wait_for(Cancel)] == [(key, "disconnect")]
        edge.wait(lambda: edge.server.gateway.active == 0 and not edge.server._state.tasks, "the request's end")
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_garbage_behind_a_waiting_request_is_not_answered_within_a_stream(make_edge: MakeEdge) -> None:
    edge = slow(make_edge)
    with ask(edge) as sock:
        edge.text.wait_for(Submit)
        data = sock.recv(1 << 16)
        sock.sendall(b"GET /version HTTP/1.1\r\nhost: x\r\n\r\nNONSENSE\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            data += b"".join(iter(lambda: sock.recv(1 << 16), b""))
        assert edge.text.wait_for(Cancel)[0].cause == "disconnect"
    assert data.count(b"HTTP/1.1 ") == 1


def test_a_shutdown_is_the_drain(make_edge: MakeEdge) -> None:
    edge = slow(make_edge)
    with ask(edge) as sock:
        edge.text.wait_for(Submit)
        assert edge.text.call(lambda: edge.server.drain(0.05)) == 1
        assert edge.text.wait_for(Cancel)[0].cause == "drain"
        data = b""
        while not data.endswith(b"0\r\n\r\n"):
            data += sock.recv(1 << 16)
    assert b'"draining"' in data


def test_a_reply_that_is_over_cancels_nothing(make_edge: MakeEdge) -> None:
    edge = make_edge(text=lambda t: setattr(t, "script", lambda s: [delta({"key": s.key, "text": "a", "reason": "stop"}), finished(s.key)]))
    for leave in (fin, rst, half):
        with ask(edge) as sock:
            data = b""
            while b"[DONE]" not in data:
                data += sock.recv(1 << 16)
            leave(sock)
    edge.wait(lambda: edge.server.gateway.active == 0, "the places")
    assert not [m for m in edge.text.received if isinstance(m, Cancel)]


@pytest.mark.parametrize("reads", [False, True])
def test_a_whole_answer_that_nobody_reads_does_not_outlive_an_idle_connection(make_edge: MakeEdge, reads: bool) -> None:
    def script(submit: Submit) -> list[Message]:
        return [delta({"key": submit.key, "text": "x" * (ENOUGH << 10), "reason": "stop"}), finished(submit.key)]

    edge = make_edge(text=lambda t: setattr(t, "script", script), receive_timeout_s=1.0)
    with ask(edge, stream=False) as sock:
        edge.text.wait_for(Submit)
        edge.wait(lambda: edge.server.gateway.active == 0, "the answer")
        (connection,) = edge.server._state.connections
        edge.text.call(connection.timeout_keep_alive_handler)  # type: ignore[union-attr]
        if reads:
            assert b"".join(iter(lambda: sock.recv(1 << 20), b"")).count(b"x" * 1024) == ENOUGH
        else:
            edge.wait(lambda: not edge.server._state.connections, "the connection's end")
            with pytest.raises(ConnectionResetError):
                b"".join(iter(lambda: sock.recv(1 << 20), b""))
