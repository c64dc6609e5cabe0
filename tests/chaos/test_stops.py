"""Starting and stopping: drains, deadlines, second signals, clear errors, truthful statuses."""

from __future__ import annotations

import os
import signal
import socket
import time
from typing import Any

from penstock.core.processes.supervisor import SAME_S

SLOW = {"step_s": 0.01}


def test_sigterm_drains_and_new_requests_are_refused_meanwhile(begin: Any, stream: Any) -> None:
    server = begin(SLOW).ready()
    running = stream(server, 200)
    running.reached(5)
    server.process.send_signal(signal.SIGTERM)
    server.wait_event("stopping")
    refused = server.until(lambda: (r := server.complete()).status_code == 503 and r)
    assert refused.json()["error"]["code"] == "draining"
    assert "retry-after" in refused.headers
    running.join(30)
    assert running.done
    assert len(running.tokens) == 200
    assert server.wait() == 0
    assert not server.left_over()
    assert not list(server.folder.glob("penstock-run-*"))


def test_the_deadline_cuts_and_says_so(begin: Any, stream: Any) -> None:
    server = begin(SLOW, shutdown_timeout=0.5).ready()
    running = stream(server, 4000)
    running.reached(5)
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == 128 + signal.SIGTERM
    running.join(10)
    assert running.reason != "length"
    assert "cut short" in server.err.read_text().splitlines()[-1]


def test_a_copy_of_the_signal_does_not_cut_the_drain(begin: Any, stream: Any) -> None:
    """`make run` and `timeout` send on what their whole process group got."""
    server = begin(SLOW).ready()
    running = stream(server, 200)
    running.reached(5)
    os.killpg(server.process.pid, signal.SIGTERM)
    server.wait_event("stopping")  # root took the first: the copy cannot merge with it
    server.process.send_signal(signal.SIGTERM)
    running.join(30)
    assert running.done
    assert len(running.tokens) == 200
    assert server.wait() == 0
    assert "killing" not in server.err.read_text()


def test_a_second_signal_ends_every_stream_with_an_error_event(begin: Any, stream: Any) -> None:
    server = begin(SLOW, edge_workers=2).ready()
    running = [stream(server, 4000, prompt) for prompt in ("a", "b", "c")]
    for one in running:
        one.reached(5)
    server.process.send_signal(signal.SIGINT)
    server.wait_event("stopping")
    time.sleep(SAME_S + 0.1)  # what makes it a second one
    began = time.monotonic()
    server.process.send_signal(signal.SIGINT)
    assert server.wait() == 128 + signal.SIGINT
    assert time.monotonic() - began < 5
    for one in running:
        one.join(10)
        assert one.error is None
        assert one.events[-1]["error"]["code"] == "draining"
    causes = [event["cause"] for event in server.events() if event["event"] == "request cancelled"]
    assert set(causes) <= {"drain"}, causes
    assert server.err.read_text().splitlines()[-1] == "penstock: 3 requests were cut short by a second signal"
    assert "killing" not in server.err.read_text()
    assert not server.left_over()


def test_a_signal_while_starting_is_a_clean_stop(begin: Any) -> None:
    server = begin({"load_s": 30})
    server.wait_event("startup")
    server.children()
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == 0
    assert not server.left_over()
    assert server.out.read_text() == ""


def test_a_model_that_cannot_be_loaded_is_one_line_and_status_1(begin: Any) -> None:
    server = begin({"fail_load": "model.safetensors: the header is cut off."}, log_level="error")
    assert server.wait(60) == 1
    assert server.out.read_text() == ""
    lines = server.err.read_text().splitlines()
    assert lines[-1] == "penstock: model.safetensors: the header is cut off."
    assert "Traceback" not in server.text()
    assert not server.left_over()


def test_an_unknown_device_names_the_known_ones(begin: Any) -> None:
    server = begin(device="fakee", log_level="error")
    assert server.wait(60) == 1
    assert "Did you mean 'fake'?" in server.err.read_text().splitlines()[-1]


def test_ctrl_c_to_the_group_with_a_unix_socket_two_edges_and_the_tasks_wiring(begin: Any, stream: Any, tmp_path: Any) -> None:
    path = str(tmp_path / "api.sock")
    server = begin(SLOW, uds=path, edge_workers=2, wiring="tasks").ready()
    assert f"--unix-socket {path}" in server.out.read_text()
    with server.client() as client:
        assert client.get("/health/ready").status_code == 200
        assert client.get("/v1/models").json()["data"][0]["id"] == "brook"
    running = [stream(server, 100, prompt) for prompt in ("a", "b", "c")]
    for one in running:
        one.reached(5)
    os.killpg(server.process.pid, signal.SIGINT)  # as a terminal does
    for one in running:
        one.join(30)
        assert one.done
        assert len(one.tokens) == 100
    assert server.wait() == 0
    assert "Traceback" not in server.text()
    assert not os.path.exists(path)


def test_the_server_sits_on_the_printed_port_and_a_second_one_is_told_so(begin: Any) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        server = begin(port=port)
        assert server.wait(30) == 1
        assert f"Port {port} on 127.0.0.1 is in use" in server.err.read_text()
        assert not server.children()
