"""Killing processes: nothing is orphaned, streams survive an engine, the status is the truth."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

import pytest

from penstock.core.processes.kernel import make_run_dir

SLOW = {"step_s": 0.01}


def gone_within(server: Any, seconds: float) -> None:
    """Every process of the server is gone so soon."""
    began = time.monotonic()
    server.until(lambda: not server.left_over(), seconds)
    assert time.monotonic() - began <= seconds + 0.5


def test_no_orphan_outlives_a_killed_root_nor_does_its_directory_outlive_the_next(begin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = begin().ready()
    children = server.children()
    assert set(children) == {"engine", "text", "edge"}
    (left,) = server.folder.glob("penstock-run-*")
    assert left.stat().st_mode & 0o777 == 0o700
    assert {p.name for p in left.iterdir()} == {"text-0.sock", "engine-0.sock"}
    children["engine"].suspend()  # a process that cannot even run dies too
    server.process.kill()
    gone_within(server, 2.0)
    assert server.wait() == -signal.SIGKILL
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(server.folder))
    fresh = make_run_dir()
    assert list(server.folder.glob("penstock-run-*")) == [fresh]


def test_every_process_is_replaced_and_the_drain_is_clean_after_all(begin: Any, stream: Any) -> None:
    server = begin(SLOW).ready()
    undisturbed = stream(server, 150)
    undisturbed.join(30)
    assert undisturbed.done
    assert len(undisturbed.tokens) == 150

    # The engine: the stream pauses and goes on; not a token is lost, none comes twice.
    interrupted = stream(server, 150)
    interrupted.reached(20)
    before = server.children()
    before["engine"].kill()
    interrupted.join(30)
    assert interrupted.done, (interrupted.events[-2:], interrupted.error, server.text())
    assert interrupted.reason == "length"
    assert interrupted.tokens == undisturbed.tokens
    server.wait_event("recovered", 1)
    assert server.children()["engine"].pid != before["engine"].pid

    # Text: its streams end as retryable, the next request is answered.
    lost = stream(server, 2000)
    lost.reached(5)
    server.children()["text"].kill()
    lost.join(20)
    assert not lost.done or lost.reason != "length"
    server.wait_event("recovered", 2)
    server.until(lambda: server.complete().status_code == 200)

    # The edge: clients are cut, the listening socket stays, the next connection is served.
    server.children()["edge"].kill()
    server.wait_event("recovered", 3)
    server.until(lambda: server.complete().status_code == 200)
    assert server.complete(150).json()["usage"]["completion_tokens"] == 150

    server.children()
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == 0
    gone_within(server, 2.0)
    assert [e["process"] for e in server.events() if e["event"] == "process died"] == ["engine-0", "text-0", "edge-0"]


def test_a_request_that_kills_engines_is_failed_alone(begin: Any, stream: Any) -> None:
    """The device dies of one prompt, every time (tests/chaos/plugins/poison_device.py)."""
    server = begin({"step_s": 0.01}, plugin="poison_device", device="poison").ready()
    undisturbed = stream(server, 200)
    undisturbed.join(30)
    assert undisturbed.done, server.text()
    beside = [stream(server, 200), stream(server, 200)]
    for one in beside:
        one.reached(20)

    poisoned = server.complete(prompt=[666, 666, 666, 5])
    assert poisoned.status_code == 500
    error = poisoned.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "engine_failure")
    assert error["message"] == "The engine died 2 times while it worked on this request, so it is not tried again."

    for one in beside:  # they lost two engines and not a token
        one.join(30)
        assert one.done, (one.events[-2:], one.error, server.text())
        assert (one.tokens, one.reason) == (undisturbed.tokens, "length")
    assert server.complete().status_code == 200
    died = [e["process"] for e in server.events() if e["event"] == "process died"]
    assert died == ["engine-0", "engine-0"]
    with server.client() as client:
        metrics = client.get("/metrics").text
    assert "penstock_requests_condemned_total 1.0" in metrics
    server.children()
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == 0
    gone_within(server, 2.0)


def test_a_search_whose_engine_dies_finds_the_same(begin: Any, stream: Any) -> None:
    """It begins anew in the next engine, and nobody can tell: with a grammar too, whose places are made anew."""
    server = begin({"step_s": 0.02}, max_num_seqs=12).ready()
    plain = {"prompt": "Count:", "max_tokens": 80, "use_beam_search": True, "best_of": 4, "n": 3, "ignore_eos": True}
    obeying = {
        "prompt": "Say:",
        "max_tokens": 80,
        "use_beam_search": True,
        "best_of": 4,
        "n": 2,
        "guided_regex": "[a-z]{600,605}",
        "logprobs": 1,
    }

    def ask(body: dict[str, Any], into: list[Any]) -> None:
        with server.client() as client:
            into.append(client.post("/v1/completions", json={"model": "brook", **body}))

    def both(*, kill: bool) -> list[Any]:
        found: list[list[Any]] = [[], []]
        threads = [threading.Thread(target=ask, args=pair) for pair in zip((plain, obeying), found, strict=True)]
        for thread in threads:
            thread.start()
        if kill:
            beside = stream(server, 150)
            beside.reached(40)  # in the midst of both searches, which have 80 steps
            assert all(thread.is_alive() for thread in threads)
            server.children()["engine"].kill()
            beside.join(30)
            assert len(beside.tokens) == 150
        for thread in threads:
            thread.join(60)
        for (reply,) in found:
            assert reply.status_code == 200, reply.text
        return [reply.json() for (reply,) in found]

    undisturbed = both(kill=False)
    interrupted = both(kill=True)
    server.wait_event("recovered", 1)
    for mine, theirs in zip(interrupted, undisturbed, strict=True):
        assert mine["choices"] == theirs["choices"]
        assert mine["usage"]["completion_tokens"] == theirs["usage"]["completion_tokens"]
    assert all(len(choice["text"]) >= 60 for choice in undisturbed[1]["choices"])


def test_a_hung_engine_is_ended_and_its_streams_go_on(begin: Any, stream: Any) -> None:
    """The device's thread hangs at step 100 of each life: not dead, and its process beats on."""
    server = begin({"step_s": 0.005, "hang_at_step": 100}, watchdog_timeout=10).ready()
    client = stream(server, 150)
    client.join(60)
    assert client.done, (client.events[-2:], client.error, server.text())
    assert (len(client.tokens), client.reason) == (150, "length")
    (hung,) = [e for e in server.events() if e["event"] == "process hangs"]
    assert hung["process"] == "engine-0"
    assert hung["reason"].startswith("it finished no step for ")
    (died,) = [e for e in server.events() if e["event"] == "process died"]
    assert died["reason"].startswith("hung: it finished no step for ")
    stacks = server.err.read_text()
    assert "Thread 0x" in stacks
    assert 'fake_device.py", line' in stacks  # where it hangs
    undisturbed = begin({"step_s": 0.0}).ready().complete(150)
    assert len(undisturbed.json()["choices"][0]["text"]) > 0
    assert "".join(c["text"] for e in client.events for c in e.get("choices", [])) == undisturbed.json()["choices"][0]["text"]
    server.children()
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == 0
    gone_within(server, 2.0)


def test_an_engine_whose_device_fails_again_and_again_ends_the_server_with_1(begin: Any, stream: Any) -> None:
    server = begin({"fail_at_step": 3}, engine_restarts=1).ready()
    client = stream(server, 50)
    assert server.wait(60) == 1
    client.join(10)
    assert not client.done or client.reason != "length"
    last = server.err.read_text().splitlines()[-1]
    assert last.startswith("penstock: The engine-0 process failed for good after 1 restarts")
    assert "injected device fault" in last
    assert not server.left_over()
