"""Clients that stall and clients that leave, at a real server: what they held comes back, and the metrics say why.

Answers are long events (twenty log-probabilities a token), so that a client which reads nothing is noticed after some hundred tokens.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable
from typing import Any

import pytest

STALL_S = 5.0
FLAGS = ["--stream-park-bytes", "16K", "--park-kv-s", "0.3", "--stream-stall-s", str(STALL_S)]
ASK: dict[str, Any] = {
    "messages": [{"role": "user", "content": "hi"}],
    "stream": True,
    "ignore_eos": True,
    "temperature": 0,
    "logprobs": True,
    "top_logprobs": 20,
}


def stream(server: Any, rid: str, max_tokens: int) -> socket.socket:
    """One that nobody reads yet."""
    body = json.dumps(ASK | {"max_tokens": max_tokens}).encode()
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(30)
    sock.connect(("127.0.0.1", server.port))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-request-id: {rid}\r\ncontent-length: {len(body)}\r\n\r\n"
    sock.sendall(head.encode() + body)
    return sock


def said(raw: bytes) -> list[Any]:
    """The events of a chunked reply."""
    body, rest = b"", raw.partition(b"\r\n\r\n")[2]
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    data = [line.removeprefix("data: ") for line in body.decode().split("\n\n") if line.startswith("data: ")]
    return [one if one == "[DONE]" else json.loads(one) for one in data]


def text_of(events: list[Any]) -> str:
    return "".join(event["choices"][0]["delta"].get("content", "") for event in events if event != "[DONE]" and "choices" in event)


def used(server: Any) -> float:
    return float(server.metric("penstock_kv_blocks", 'state="used"'))


def cancelled(server: Any) -> dict[str, float]:
    causes = ("disconnect", "slow_client", "timeout", "drain", "client")
    return {cause: server.metric("penstock_cancellations_total", f'cause="{cause}"') for cause in causes}


def fin(sock: socket.socket, *_: Any) -> None:
    sock.close()


def rst(sock: socket.socket, *_: Any) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def half(sock: socket.socket, *_: Any) -> None:
    sock.shutdown(socket.SHUT_WR)


def delete(_: socket.socket, server: Any, rid: str) -> None:
    assert server.client.delete(f"/v1/requests/{rid}").status_code == 200


def nothing(*_: Any) -> None:
    """It reads nothing, for too long."""


@pytest.mark.parametrize(
    ("leave", "cause"), [(fin, "disconnect"), (rst, "disconnect"), (half, "disconnect"), (delete, "client"), (nothing, "slow_client")]
)
def test_whoever_leaves_gives_everything_back_and_is_counted_once(server: Any, leave: Callable[..., None], cause: str) -> None:
    assert server.until(lambda: used(server) == 0)
    before, rid = cancelled(server), f"leaves-{leave.__name__}"
    with stream(server, rid, 3000) as sock:
        assert server.until(lambda: used(server) > 0)
        leave(sock, server, rid)
        assert server.until(lambda: cancelled(server) != before, STALL_S + 15)
        assert server.until(lambda: used(server) == 0)
    after = cancelled(server)
    assert {name: after[name] - before[name] for name in after} == {name: float(name == cause) for name in after}
    assert server.metric("penstock_sequences") == 0


def test_who_stalls_gives_its_memory_up_and_reads_on_as_if_nothing_had_been(server: Any) -> None:
    parks = server.metric("penstock_parks_total", 'why="slow"')
    with stream(server, "stalls", 400) as sock:
        assert server.until(lambda: server.metric("penstock_sequences", 'state="parked"') == 1, 20)
        assert server.until(lambda: used(server) == 0), "its memory is others', while it still may read on"
        raw = b""
        while not raw.endswith(b"\r\n0\r\n\r\n"):
            raw += sock.recv(1 << 20)
    assert server.metric("penstock_parks_total", 'why="slow"') > parks
    assert server.metric("penstock_preemptions_total") > 0
    with stream(server, "reads", 400) as sock:
        undisturbed = b""
        while not undisturbed.endswith(b"\r\n0\r\n\r\n"):
            undisturbed += sock.recv(1 << 20)
    found, wanted = said(raw), said(undisturbed)
    assert found[-1] == wanted[-1] == "[DONE]"
    assert text_of(found) == text_of(wanted) != ""
    logprobs = [[one["choices"][0]["logprobs"] for one in events[:-1]] for events in (found, wanted)]
    assert json.dumps(logprobs[0]).count('"token"') == json.dumps(logprobs[1]).count('"token"')


def test_who_is_cut_and_then_reads_on_is_told_why(server: Any) -> None:
    before = cancelled(server)
    with stream(server, "late", 3000) as sock:
        assert server.until(lambda: cancelled(server)["slow_client"] > before["slow_client"], STALL_S + 15)
        raw = b"".join(iter(lambda: sock.recv(1 << 20), b""))
    *events, last = said(raw)
    assert last["error"]["code"] == "slow_client"
    assert server.metric("penstock_edge_cuts_total", 'why="stalled"') >= 1
    assert text_of(events)
