"""`penstock doctor stream` before servers that say nothing of their times, and before what changes a stream on its way."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from penstock.plugins.commands.doctor.command import doctor

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))  # pytest's importlib mode does not

from proxy_kit import Origin, Storing

EVENTS = [b'data: {"choices":[{"index":0,"delta":{"content":"%d"}}]}\n\n' % number for number in range(16)]
DONE = b"data: [DONE]\n\n"
PACE_S = 0.03
TRACED = b"x-penstock-trace-chunks: HTTP/1.1\r\n"


def served(
    headers: bytes, events: list[bytes], status: bytes = b"200 OK", arrives_s: Callable[[float], float] = lambda sent_s: sent_s
) -> Origin:
    """An OpenAI server that streams these events, one after the other, and knows nothing else. `arrives_s` says when the one arrives that is sent so late."""

    def answer(connection: socket.socket, request: bytes) -> None:
        begun = time.monotonic()

        def say(status: bytes, body: bytes) -> None:
            kind = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
            connection.sendall(b"HTTP/1.1 " + status + b"\r\n" + kind + body)

        if not request.startswith(b"POST /v1/chat/completions ") or status != b"200 OK":
            say(b"404 Not Found" if status == b"200 OK" else status, b'{"error":{"message":"no such thing"}}')
        elif b'"max_tokens": -1' in request:
            say(b"400 Bad Request", b'{"detail":"max_tokens"}')
        else:
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n" + headers + b"\r\n")
            for number, event in enumerate(events):
                time.sleep(max(0.0, begun + arrives_s(number * PACE_S) - time.monotonic()))
                connection.sendall(event)

    return Origin(answer)


@pytest.fixture
def plain() -> Iterator[Origin]:
    with contextlib.closing(served(b"", [*EVENTS, DONE])) as origin:
        yield origin


def ask(*args: str) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(doctor, ["stream", "--json", "--idle-s", "0", *args], catch_exceptions=False)
    said = json.loads(result.stdout)
    assert isinstance(said, dict)
    return result.exit_code, said


def url(origin: Origin) -> str:
    return f"http://127.0.0.1:{origin.port}"


def test_one_by_one_is_well_whoever_the_server_is(plain: Origin) -> None:
    for _ in range(4):  # a machine that is too busy may bring them together
        code, said = ask(url(plain), "--api-key", "k")
        if not code:
            break
    assert (code, said["findings"], said["server"]) == (0, [], None)
    assert said["stream"]["sent_s"] is None
    assert said["checks"]["WebSocket"].startswith("not measured: the server does not say that it is Penstock")
    assert all(b"\r\nAuthorization: Bearer k\r\n" in request for request in plain.requests)
    assert not any(b"ignore_eos" in request or b"stream_interval" in request for request in plain.requests), "others know no such fields"


def test_without_the_servers_times_another_way_to_it_is_needed(plain: Origin) -> None:
    with contextlib.closing(Storing(plain.port, None)) as proxy:
        code, said = ask(proxy.url)
        assert (code, said["stream"]["pattern"], said["findings"]) == (2, "unknown", [])
        assert "--direct" in said["checks"]["events arrive as they are sent"]
        code, said = ask(proxy.url, "--direct", url(plain))
    assert (code, said["stream"]["pattern"]) == (1, "whole")
    assert [finding["id"] for finding in said["findings"]] == ["whole"]


@pytest.mark.parametrize(
    ("headers", "events", "finding"),
    [
        (TRACED, [*EVENTS, DONE], "heartbeats"),
        (b"", [*(event[:-1] for event in EVENTS), b"\n", DONE], "merged"),
        (b"", EVENTS, "cut"),
        (b"content-length: 5000\r\n", [*EVENTS, DONE], "cut"),
        (b"age: 7\r\n", [*EVENTS, DONE], "cache"),
    ],
)
def test_what_changes_a_stream_is_found(headers: bytes, events: list[bytes], finding: str) -> None:
    with contextlib.closing(served(headers, events)) as origin:
        code, said = ask(url(origin))
    assert code == 1
    assert finding in {found["id"] for found in said["findings"]}


@pytest.mark.parametrize(
    ("arrives_s", "finding"),
    [
        (lambda sent_s: sent_s + 0.3, "late"),
        (lambda sent_s: (sent_s // 0.25 + 1) * 0.25, "interval"),
        (lambda sent_s: 32 * PACE_S, "whole"),
    ],
)
def test_what_delays_a_stream_is_found(arrives_s: Callable[[float], float], finding: str) -> None:
    stamped = [b": sent %.6f\n\n" % (number * PACE_S) + event for number, event in enumerate([*EVENTS, *EVENTS, DONE])]
    with contextlib.closing(served(TRACED, stamped, arrives_s=arrives_s)) as origin:
        for _ in range(4):  # a machine that is too busy adds delays of its own
            code, said = ask(url(origin))
            found = {one["id"] for one in said["findings"]} & {"late", "interval", "whole", "blocks", "uneven"}
            if found == {finding}:
                break
    assert (code, found) == (1, {finding})
    if finding == "interval":
        assert said["stream"]["every_s"] == pytest.approx(0.25, rel=0.2)


@pytest.mark.parametrize(
    ("headers", "events", "status", "says"),
    [
        (b"", [], b"200 OK", "no event"),
        (b"content-encoding: br\r\n", [b"xyz"], b"200 OK", "'br'"),
        (b"content-encoding: gzip\r\n", [b"xyz"], b"200 OK", "'gzip'"),
        (b"", [], b"401 Unauthorized", "--api-key"),
        (b"", [], b"503 Service Unavailable", "no such thing"),
    ],
)
def test_what_is_no_stream_is_a_sentence(headers: bytes, events: list[bytes], status: bytes, says: str) -> None:
    with contextlib.closing(served(headers, events, status)) as origin:
        code, said = ask(url(origin))
    assert code == 2
    assert says in said["error"]


def test_silence_is_said_to_be_silence() -> None:
    with contextlib.closing(Origin(lambda connection, _: time.sleep(1))) as origin:
        code, said = ask(url(origin), "--timeout-s", "0.3")
    assert code == 2
    assert "--timeout-s" in said["error"]
