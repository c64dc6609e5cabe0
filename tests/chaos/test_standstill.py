"""Processes that stand still or are away: health says so soon, and who asks meanwhile is answered afterwards."""

from __future__ import annotations

import concurrent.futures
import signal
from typing import Any

import pytest

TOLD_S = 10.0
"""A load balancer must know by then."""


@pytest.mark.parametrize(("role", "name"), [("text", "the text process"), ("engine", "the engine")])
def test_health_tells_of_a_process_that_stands_still(begin: Any, role: str, name: str) -> None:
    server = begin({"step_s": 0.005}).ready()
    with server.client() as client:
        good = client.get("/health")
        assert good.status_code == 200
        assert good.json()["ages_s"]["text"] < TOLD_S
        process = server.children()[role]
        process.send_signal(signal.SIGSTOP)
        bad = server.until(lambda: next((r for r in [client.get("/health")] if r.status_code == 503), None), TOLD_S)
        assert name in bad.json()["reason"]
        assert "not been heard of" in bad.json()["reason"]
        assert client.get("/health/ready").status_code == 503
        assert client.get("/health/live").status_code == 200, "this one is about the edge alone"
        process.send_signal(signal.SIGCONT)
        server.until(lambda: client.get("/health").status_code == 200, TOLD_S)
    assert server.complete().status_code == 200


def test_who_comes_while_an_engine_restarts_is_answered(begin: Any) -> None:
    """A start that takes longer than two retries of an SDK."""
    server = begin({"step_s": 0.002, "load_s": 4.0}).ready()
    expected = server.complete(40).json()["choices"][0]["text"]
    server.children()["engine"].kill()
    with server.client() as client, concurrent.futures.ThreadPoolExecutor() as pool:
        server.until(lambda: "restarted" in client.get("/health").json().get("reason", ""))
        answers = [pool.submit(server.complete, 40) for _ in range(3)]
        assert client.get("/health").status_code == 503, "readiness still says that something is missing"
        assert [answer.result(30).status_code for answer in answers] == [200, 200, 200]
        assert {answer.result().json()["choices"][0]["text"] for answer in answers} == {expected}
        assert client.get("/health").status_code == 200


def test_health_tells_of_an_engine_that_beats_but_finishes_no_step(begin: Any, stream: Any) -> None:
    server = begin({"step_s": 0.005, "hang_at_step": 30}).ready()
    reader = stream(server, 100)
    reader.reached(20)
    with server.client() as client:
        bad = server.until(lambda: next((r for r in [client.get("/health")] if r.status_code == 503), None), TOLD_S)
    assert "finished no step for" in bad.json()["reason"]
