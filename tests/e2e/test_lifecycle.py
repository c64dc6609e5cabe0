"""Processes: drains, kills, restarts; the status is truthful and nothing is left behind."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import psutil
import pytest

BODY = {
    "model": "brook",
    "prompt": "Count: 1, 2, 3,",
    "max_tokens": 400,
    "temperature": 0,
    "ignore_eos": True,
    "stream": True,
    "return_token_ids": True,
}


def read(server: Any, body: dict[str, Any], at: int | None = None, then: Any = None) -> tuple[list[int], str, bool]:
    """Token ids, text and whether [DONE] came; `then()` is called once after `at` tokens."""
    ids: list[int] = []
    text = ""
    with server.client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line == "data: [DONE]":
                return ids, text, True
            if not line.startswith("data: "):
                continue
            event = json.loads(line[6:])
            for choice in event.get("choices", []):
                ids += choice.get("token_ids") or []
                text += choice["text"]
            if at is not None and len(ids) >= at:
                then()
                at = None
    return ids, text, False


def left(children: list[psutil.Process], timeout_s: float = 2) -> list[psutil.Process]:
    """Which of them still run after `timeout_s`. One that nobody has reaped yet (a container's first process may be slow) runs no more."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and any(map(runs, children)):
        time.sleep(0.02)
    return [p for p in children if runs(p)]


def runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_killed_engine_is_a_pause_not_a_loss(starter: Any) -> None:
    server = starter("--deterministic")
    want = read(server, BODY)
    assert len(want[0]) == 400
    (engine,) = server.children()["engine"]
    got = read(server, BODY, at=60, then=engine.kill)
    assert got == want
    (fresh,) = server.children()["engine"]
    assert fresh.pid != engine.pid
    assert server.stop() == 0


@pytest.mark.parametrize("role", ["edge", "text"])
def test_a_killed_edge_or_text_comes_back(starter: Any, role: str) -> None:
    server = starter()
    (victim,) = server.children()[role]
    victim.kill()
    victim.wait(5)
    server.client.close()
    server.__post_init__()
    server.ready()
    assert len(read(server, {**BODY, "max_tokens": 5})[0]) == 5
    assert server.stop() == 0


def test_a_killed_root_leaves_no_orphan(starter: Any) -> None:
    server = starter()
    children = [p for group in server.children().values() for p in group]
    assert len(children) == 3
    server.process.kill()
    assert left(children) == []


def test_too_many_deaths_give_up_with_a_truthful_status(starter: Any) -> None:
    server = starter("--engine-restarts", "1")
    children: list[psutil.Process] = []
    for _ in range(2):
        children += [p for group in server.children().values() for p in group]
        (engine,) = server.children()["engine"]
        engine.kill()
        engine.wait(5)

        def over(gone: int = engine.pid) -> bool:
            return server.process.poll() is not None or any(p.pid != gone for p in server.children().get("engine", []))

        assert server.until(over, 20)
    assert server.process.wait(20) not in (0, None)
    assert left(children) == []


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_drain_finishes_what_runs(starter: Any, sig: int) -> None:
    server = starter()
    # To the whole group, as a terminal's Ctrl-C or `make` does it.
    got = read(server, BODY, at=20, then=lambda: os.killpg(server.process.pid, sig))
    assert len(got[0]) == 400
    assert got[2]
    assert server.process.wait(20) == 0


def test_a_second_signal_stops_at_once(starter: Any) -> None:
    server = starter()
    children = [p for group in server.children().values() for p in group]

    def twice() -> None:
        server.process.send_signal(signal.SIGTERM)
        time.sleep(1.1)  # sooner it would be a copy of the first
        server.process.send_signal(signal.SIGTERM)

    begun = time.monotonic()
    ids, _, done = [], "", True
    try:
        ids, _, done = read(server, {**BODY, "max_tokens": 3500}, at=5, then=twice)
    except httpx.TransportError:
        done = False
    assert not done or len(ids) < 3500
    server.process.wait(10)
    assert time.monotonic() - begun < 15
    assert left(children) == []


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["no-such-folder"], ["no-such-folder"]),
        (["--max-model-len", "99999999"], ["max-model-len"]),
        (["--device", "abacus"], ["abacus"]),
        (["--scheduling-policy", "lottery"], ["lottery"]),
    ],
)
def test_a_start_that_fails_says_why_in_a_line(args: list[str], words: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "penstock", "serve", "--port", "0", *args], capture_output=True, text=True, timeout=60)
    assert done.returncode not in (0, -9)
    assert all(w in done.stderr + done.stdout for w in words), done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_a_taken_port_is_said(starter: Any) -> None:
    server = starter()
    done = subprocess.run(
        [sys.executable, "-m", "penstock", "serve", "--port", str(server.port)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode not in (0, -9)
    assert str(server.port) in done.stderr
    assert "Traceback" not in done.stderr


def test_two_edges_share_the_port_and_one_view_of_metrics(starter: Any) -> None:
    server = starter("--edge-workers", "2")
    assert len(server.children()["edge"]) == 2
    for _ in range(12):
        answer = httpx.post(server.url + "/v1/completions", json={"model": "brook", "prompt": "Hi", "max_tokens": 2}, timeout=30)
        assert answer.status_code == 200

    def count() -> float:
        text = httpx.get(server.url + "/metrics").text
        lines = [x for x in text.splitlines() if x.startswith("http_requests_total{") and "/v1/completions" in x]
        return sum(float(x.rsplit(" ", 1)[1]) for x in lines)

    assert server.until(lambda: all(count() == 12 for _ in range(6)), 5)
    assert server.stop() == 0


class Collector(BaseHTTPRequestHandler):
    """Keeps the bodies that an OTLP/HTTP exporter posts."""

    bodies: list[bytes]

    def do_POST(self) -> None:
        self.bodies.append(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


def test_spans_reach_a_collector_and_tile_the_request(starter: Any) -> None:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    handler = type("Kept", (Collector,), {"bodies": []})
    collector = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    try:
        server = starter(
            env={"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_address[1]}", "OTEL_BSP_SCHEDULE_DELAY": "200"}
        )
        answer = server.client.post(
            "/v1/chat/completions",
            json={"model": "brook", "messages": [{"role": "user", "content": "Tell me a short story."}], "max_tokens": 50},
            headers={"traceparent": f"00-{trace}-00f067aa0ba902b7-01"},
        )
        assert trace in answer.headers["traceparent"]
        assert server.stop() == 0
    finally:
        collector.shutdown()
        collector.server_close()
    spans = {}
    for body in handler.bodies:
        request = ExportTraceServiceRequest()
        request.ParseFromString(body)
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                for span in scope.spans:
                    if span.trace_id.hex() == trace:
                        spans[span.name] = span
    assert {"receive", "queue", "prefill", "decode", "detokenise", "send"} <= set(spans), sorted(spans)
    whole = next(s for name, s in spans.items() if name.startswith("chat"))
    parts = sorted((s for s in spans.values() if s.parent_span_id == whole.span_id), key=lambda s: s.start_time_unix_nano)
    told = [(s.name, s.start_time_unix_nano, s.end_time_unix_nano) for s in parts]
    assert parts[0].start_time_unix_nano == whole.start_time_unix_nano, told
    assert parts[-1].end_time_unix_nano == whole.end_time_unix_nano, told
    for before, after in itertools.pairwise(parts):
        assert before.end_time_unix_nano == after.start_time_unix_nano, told
    keys = {a.key for a in whole.attributes}
    assert {"gen_ai.operation.name", "gen_ai.request.model"} <= keys
