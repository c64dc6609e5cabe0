"""Clients that leave, that read slowly, and that stop reading: the work is cancelled, parked, cut, and memory stays bounded."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import socket
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from edge_kit import Edge, MakeEdge, delta, finished, silent

from penstock.core.protocol import config as configuration
from penstock.core.protocol.messages import Cancel, Message, Park, Submit, Unpark
from penstock.transports.outbox import Outbox, Pulse

CHAT: dict[str, Any] = {"model": "brook", "messages": [{"role": "user", "content": "hi"}]}


@contextlib.contextmanager
def request(edge: Edge, **fields: Any) -> Iterator[socket.socket]:
    """A request on a raw socket with a small receive buffer."""
    body = msgspec.json.encode(CHAT | fields)
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(10)
    with sock:
        sock.connect(("127.0.0.1", edge.port))
        sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
        yield sock


def status_499(edge: Edge) -> float:
    return edge.counters().get('http_requests_total{handler="/v1/chat/completions",method="POST",status="499"}', 0)


def say_a(submit: Submit) -> list[Message]:
    return [delta({"key": submit.key, "text": "a"})]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_before_the_first_byte_cancels(make_edge: MakeEdge, stream: bool) -> None:
    edge = make_edge(text=lambda t: setattr(t, "script", silent))
    with request(edge, stream=stream):
        key = edge.text.wait_for(Submit)[0].key
    cancel = edge.text.wait_for(Cancel)[0]
    assert (cancel.key, cancel.cause) == (key, "disconnect")
    edge.wait(lambda: edge.server.gateway.active == 0, "the place to be given back")
    edge.wait(lambda: not edge.server._state.tasks, "the request's end")
    assert status_499(edge) == 1
    assert not [name for name in edge.counters() if "cancel" in name], "text counts cancellations, for all edges"


def test_a_client_that_leaves_in_mid_stream_cancels_every_choice_once(make_edge: MakeEdge) -> None:
    edge = make_edge(text=lambda t: setattr(t, "script", say_a))
    with request(edge, stream=True, n=3) as sock:
        assert b"200 OK" in sock.recv(1 << 16)
    edge.text.wait_for(Cancel)
    edge.wait(lambda: edge.server.gateway.active == 0, "the place to be given back")
    key = edge.text.wait_for(Submit)[0].key
    edge.text.send(delta({"key": key, "text": "late"}), finished(key))  # what was under way falls to the ground
    assert [c.key for c in edge.text.wait_for(Cancel)] == [key]
    assert status_499(edge) == 1


def test_the_official_client_closing_its_stream_cancels(make_edge: MakeEdge) -> None:
    edge = make_edge(text=lambda t: setattr(t, "script", say_a))
    with edge.client() as client:
        stream = client.chat.completions.create(**CHAT, stream=True)  # type: ignore[call-overload]
        next(iter(stream))
        stream.close()
        edge.text.wait_for(Cancel)


def test_no_cancel_after_a_complete_reply(make_edge: MakeEdge) -> None:
    edge = make_edge()
    with edge.http() as http:
        for stream in (True, False):
            assert http.post("/v1/chat/completions", json=CHAT | {"stream": stream}).status_code == 200
    edge.wait(lambda: not edge.server._state.connections, "the connections' end")
    assert not [m for m in edge.text.received if isinstance(m, Cancel)]
    assert edge.server.gateway.active == 0


def flood(edge: Edge, key: int, kilobytes: int) -> None:
    text = "x" * 1024
    for _ in range(kilobytes // 64):
        edge.text.send(delta(*[{"key": key, "text": text}] * 64))


ENOUGH = 12 << 10
"""Kilobytes that no kernel's socket buffers take."""


def test_a_slow_reader_is_parked_then_goes_on_where_it_was(make_edge: MakeEdge) -> None:
    edge = make_edge(text=lambda t: setattr(t, "script", say_a), stream_park_bytes=64 << 10, stream_max_bytes=64 << 20)
    with request(edge, stream=True) as sock:
        key = edge.text.wait_for(Submit)[0].key
        flood(edge, key, ENOUGH)
        parks = len(edge.text.wait_for(Park))
        edge.wait(lambda: all(box.parked for box in boxes(edge)) and bool(boxes(edge)), "the park")
        edge.text.send(delta({"key": key, "tokens": [], "reason": "stop"}), finished(key))
        data = bytearray()
        while not data.endswith(b"0\r\n\r\n"):
            data += sock.recv(1 << 20)
    assert data.count(b"x" * 1024) == ENOUGH  # nothing is lost
    assert b"[DONE]" in data
    assert len(edge.text.wait_for(Park)) >= parks
    assert not [m for m in edge.text.received if isinstance(m, Cancel)]


def test_unpark_at_half(make_edge: MakeEdge) -> None:
    edge = make_edge(text=lambda t: setattr(t, "script", say_a), stream_park_bytes=64 << 10, stream_max_bytes=64 << 20)
    with request(edge, stream=True) as sock:
        key = edge.text.wait_for(Submit)[0].key
        flood(edge, key, ENOUGH)
        edge.wait(lambda: all(box.parked for box in boxes(edge)) and bool(boxes(edge)), "the park")
        before = sum(isinstance(m, Unpark) for m in edge.text.received)
        while sum(isinstance(m, Unpark) for m in edge.text.received) == before:
            assert sock.recv(1 << 20)
        assert edge.text.wait_for(Unpark)[-1].key == key


def test_a_reader_that_takes_nothing_is_cut_at_the_limit(make_edge: MakeEdge) -> None:
    edge = make_edge(text=lambda t: setattr(t, "script", say_a), stream_park_bytes=64 << 10, stream_max_bytes=256 << 10, stream_stall_s=0.5)
    with request(edge, stream=True) as sock:
        key = edge.text.wait_for(Submit)[0].key
        most = 0
        for _ in range(400):
            flood(edge, key, 64)
            most = max(most, max((box.unsent for box in boxes(edge)), default=0))
            if any(isinstance(m, Cancel) for m in edge.text.received):
                break
        cancel = edge.text.wait_for(Cancel)[0]
        assert (cancel.key, cancel.cause) == (key, "slow_client")
        assert most <= (256 + 64) << 10
        edge.wait(lambda: edge.server.gateway.active == 0, "the place to be given back")
        edge.wait(lambda: not edge.server._state.connections, "the connection's end")
        with pytest.raises(ConnectionResetError):
            b"".join(iter(lambda: sock.recv(1 << 20), b""))
    assert status_499(edge) == 1
    assert edge.counters()['penstock_edge_cuts_total{why="full"}'] == 1


def test_a_reader_that_stalls_is_cut_in_time(make_edge: MakeEdge) -> None:
    edge = make_edge(text=lambda t: setattr(t, "script", say_a), stream_park_bytes=64 << 10, stream_max_bytes=64 << 20, stream_stall_s=0.2)
    with request(edge, stream=True):
        key = edge.text.wait_for(Submit)[0].key
        flood(edge, key, ENOUGH)
        assert edge.text.wait_for(Cancel)[0].cause == "slow_client"
    edge.wait(lambda: edge.server.gateway.active == 0, "the place to be given back")


def boxes(edge: Edge) -> list[Outbox]:
    """The outboxes of open streams."""
    return [sink._job.outbox for sink in edge.server.gateway.door()._sinks.values()]  # type: ignore[attr-defined]


# ------------------------------------------------------------------ the outbox alone


KEEP_ALIVE = b"still here\n"


class Hand:
    """An outbox with its calls recorded."""

    def __init__(self, **options: Any) -> None:
        self.calls: list[str] = []
        config = configuration.build({"stream_park_bytes": 100, "stream_max_bytes": 300} | options)
        park, unpark = (functools.partial(self.calls.append, name) for name in ("park", "unpark"))
        self.box = Outbox(config, park, unpark, self.calls.append, keep_alive=KEEP_ALIVE)


def on_loop(function: Any) -> None:
    asyncio.run(function())


def test_outbox_thresholds() -> None:
    async def run() -> None:
        hand = Hand()
        box = hand.box
        box.push(b"a" * 99)
        assert hand.calls == []
        box.push(b"a")
        box.push(b"a" * 50)
        assert hand.calls == ["park"]
        data = box.take()
        assert len(data) == 150
        box.sent(99)
        assert hand.calls == ["park"]
        box.sent(1)
        assert hand.calls == ["park", "unpark"]
        box.push(b"b" * 60)
        assert hand.calls == ["park", "unpark", "park"]
        box.push(b"b" * 190)
        assert hand.calls == ["park", "unpark", "park"]
        box.push(b"b")
        assert hand.calls[-1] == "full"

    on_loop(run)


def test_outbox_takes_bounded_pieces_in_order() -> None:
    async def run() -> None:
        box = Hand(stream_park_bytes=1 << 20, stream_max_bytes=1 << 20).box
        parts = [bytes([65 + i]) * 30_000 for i in range(5)]
        for part in parts:
            box.push(part)
        box.close()
        taken = []
        while not box.last or not taken:
            taken.append(box.take())
        assert b"".join(taken) == b"".join(parts)
        assert max(map(len, taken)) <= 64 << 10
        box.push(b"late")
        assert box.last

    on_loop(run)


def test_pulse_keeps_alive_only_what_is_idle_and_open() -> None:
    async def run() -> None:
        hand = Hand(keep_alive_s=10.0, stream_stall_s=60.0)
        box = hand.box
        start = box.moved
        box.tick(start + 9.9, 10.0, 60.0)
        assert box.unsent == 0
        box.tick(start + 10.0, 10.0, 60.0)
        assert box.take() == KEEP_ALIVE
        box.tick(box.moved + 59.0, 10.0, 60.0)  # what waits is not kept alive by more of it
        assert box.unsent == len(KEEP_ALIVE)
        box.tick(box.moved + 61.0, 10.0, 60.0)
        assert hand.calls == ["stalled"]
        box.drop()
        box.tick(box.moved + 1000.0, 10.0, 60.0)
        assert box.unsent == 0

    on_loop(run)


def test_pulse_sleeps_when_nothing_is_open() -> None:
    async def run() -> None:
        hand = Hand(keep_alive_s=0.01)
        pulse = Pulse(configuration.build({"keep_alive_s": 0.01}))
        pulse.add(hand.box)
        await hand.box.wait()
        assert hand.box.take() == KEEP_ALIVE
        pulse.discard(hand.box)
        while pulse._timer is not None:
            await asyncio.sleep(0.005)

    on_loop(run)


def test_json_escapes_survive() -> None:
    """msgspec's JSON strings are what every client can read."""
    assert json.loads(msgspec.json.encode('\u2028"\\\x00é😀')) == '\u2028"\\\x00é😀'
