"""Edge processes as root starts them: two on one listening socket, signals, drain, stop, and the lifeline."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvloop
from edge_kit import FakeText

from penstock.core.processes.spawn import HTTP, spawn
from penstock.core.protocol import config as configuration
from penstock.core.protocol.control import Boot, ChildToRoot, ChildUp, Drain, Drained, Heartbeat, Message, Stop
from penstock.core.protocol.messages import Submit
from penstock.core.protocol.pools import pools_of
from penstock.core.runtime.frames import FrameDecoder, encode

CHAT: dict[str, Any] = {"model": "brook", "messages": [{"role": "user", "content": "hi"}]}


class Child:
    """A spawned edge and root's end of its control link."""

    def __init__(self, index: int, listener: socket.socket, run_dir: Path) -> None:
        boot = Boot(
            role="edge",
            id=index,
            epoch=1,
            config=configuration.build({"edge_workers": 2, "log_format": "json"}),
            run_dir=str(run_dir),
            root_pid=os.getpid(),
            module="penstock.transports.edge",
            listeners={HTTP: listener.fileno()},
            pools=pools_of(configuration.build()),
            edges=2,
        )
        self.process, self.control = spawn(boot, {})
        self._decoder = FrameDecoder(ChildToRoot)
        self.heard: list[Message] = []
        self.control.settimeout(30)

    def say(self, message: Message) -> None:
        self.control.sendall(encode(message))

    def wait_for(self, kind: type[Message]) -> Message:
        while True:
            for message in self.heard:
                if isinstance(message, kind):
                    return message
            data = self.control.recv(1 << 16)
            assert data, f"the edge left with {self.process.wait(10)} before it said {kind.__name__}"
            self.heard += self._decoder.feed(data)

    def end(self) -> None:
        self.control.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)


@pytest.fixture
def text(tmp_path: Path) -> Iterator[FakeText]:
    """A fake text service in its own thread."""
    fake = FakeText(str(tmp_path / "text-0.sock"))
    up, over = threading.Event(), asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        await fake.listen()
        loops.append(asyncio.get_running_loop())
        up.set()
        await over.wait()
        fake._server.close()  # type: ignore[union-attr]
        for link in list(fake._links):
            link.close()

    def main() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve())

    thread = threading.Thread(target=main)
    thread.start()
    assert up.wait(10)
    yield fake
    loops[0].call_soon_threadsafe(over.set)
    thread.join(10)


@pytest.fixture
def start(tmp_path: Path, text: FakeText) -> Iterator[Callable[[int], tuple[list[Child], str]]]:
    """start(n) -> n edges on one socket, all up, and their URL."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

        def begin(count: int) -> tuple[list[Child], str]:
            children = [Child(index, listener, tmp_path) for index in range(count)]
            for child in children:
                stack.callback(child.end)
            for child in children:
                up = child.wait_for(ChildUp)
                assert isinstance(up, ChildUp)
                assert up.pid == child.process.pid
            return children, f"http://127.0.0.1:{listener.getsockname()[1]}"

        yield begin


def ask(url: str) -> httpx.Response:
    with httpx.Client(trust_env=False, verify=False, timeout=20) as http:
        return http.post(f"{url}/v1/chat/completions", json=CHAT)


def test_two_edges_share_a_socket_and_one_survives_the_other(text: FakeText, start: Callable[[int], tuple[list[Child], str]]) -> None:
    (first, second), url = start(2)
    asked = 0
    while {s.edge for s in text.received if isinstance(s, Submit)} != {0, 1}:
        assert ask(url).status_code == 200
        asked += 1
        assert asked < 500, "one edge gets all connections"
    keys = [s.key for s in text.wait_for(Submit)]
    assert len(set(keys)) == len(keys)
    for sig in (signal.SIGINT, signal.SIGTERM):
        for child in (first, second):
            child.process.send_signal(sig)
    first.process.kill()
    first.process.wait(10)
    for _ in range(5):
        assert ask(url).status_code == 200
    assert text.wait_for(Submit)[-1].edge == 1
    assert second.wait_for(Heartbeat)

    second.say(Drain(deadline_s=5.0))
    second.wait_for(Drained)
    refused = ask(url)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    second.say(Stop())
    assert second.process.wait(10) == 0


def test_the_end_of_root_is_the_end_of_the_edge(start: Callable[[int], tuple[list[Child], str]]) -> None:
    (child,), _ = start(1)
    child.control.close()
    assert child.process.wait(10) == 1


def test_an_unknown_transport_is_reported_to_root(tmp_path: Path, text: FakeText) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        boot = Boot(
            role="edge",
            id=0,
            epoch=1,
            config=configuration.build({"transports": ["opena"]}),
            run_dir=str(tmp_path),
            root_pid=os.getpid(),
            module="penstock.transports.edge",
            listeners={HTTP: listener.fileno()},
            pools=pools_of(configuration.build()),
        )
        process, control = spawn(boot, {})
        try:
            control.settimeout(30)
            said = b"".join(iter(lambda: control.recv(1 << 16), b""))
        finally:
            control.close()
            status = process.wait(10)
    assert status == 1
    assert b"Did you mean 'openai'?" in said


def test_the_edge_imports_little() -> None:
    """Well under a second of processor time (the limit is loose: the machine may be busy), and nothing that it has no use for."""
    code = (
        "import sys, time; import penstock.transports.edge, penstock.transports.builtin;"
        "print(time.process_time(), *(m for m in ('trio', 'torch', 'opentelemetry', 'tokenizers', 'pydantic') if m in sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60).stdout.split()
    assert float(out[0]) < 2.0
    assert out[1:] == []
