"""A real server on loopback, with the demo model, for tests that need every process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest

from penstock.plugins.commands.bench.server import free_port

sys.path.insert(0, str(Path(__file__).parent))  # pytest's importlib mode does not

SMALL = ["--kv-cache-memory-bytes", "64M"]


@dataclass
class Server:
    """A running `penstock serve`."""

    process: subprocess.Popen[str]
    port: int
    log: Path
    client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.client = httpx.Client(base_url=self.url, timeout=60)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ready(self, timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the server left with {self.process.returncode}:\n{self.log.read_text()}")
            try:
                if self.client.get("/health/ready").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"not ready in {timeout_s} s:\n{self.log.read_text()}")

    def children(self) -> dict[str, list[psutil.Process]]:
        """Processes below root, by the role in their command line."""
        out: dict[str, list[psutil.Process]] = {}
        try:
            below = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.Error:
            return {}
        for child in below:
            try:
                line = child.cmdline()
            except psutil.Error:  # it just left
                continue
            for role in ("edge", "text", "engine"):
                if role in line:
                    out.setdefault(role, []).append(child)
        return out

    def metric(self, name: str, label: str = "") -> float:
        """Sum over the label sets of one metric that hold `label` (like state="used")."""
        lines = [x for x in self.client.get("/metrics").text.splitlines() if x.startswith((name + "{", name + " ")) and label in x]
        assert lines, f"no metric {name}"
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def until(self, condition: Callable[[], bool], timeout_s: float = 10) -> bool:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if condition():
                return True
            time.sleep(0.02)
        return condition()

    def stop(self, sig: int = signal.SIGTERM, timeout_s: float = 40) -> int:
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(sig)
        return self.process.wait(timeout_s)


Starter = Callable[..., Server]


def start(tmp: Path, *args: str, env: dict[str, str] | None = None) -> Server:
    port = free_port()
    log = tmp / f"server-{port}.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "penstock", "serve", *SMALL, *args, "--host", "127.0.0.1", "--port", str(port)],
            stdout=out,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
    server = Server(process, port, log)
    server.ready()
    return server


@pytest.fixture
def starter(tmp_path: Path) -> Iterator[Starter]:
    """Start servers with flags; whatever is left is killed at the end."""
    servers: list[Server] = []

    def begin(*args: str, env: dict[str, str] | None = None) -> Server:
        servers.append(start(tmp_path, *args, env=env))
        return servers[-1]

    yield begin
    for server in servers:
        server.client.close()
        if server.process.poll() is None:
            os.killpg(server.process.pid, signal.SIGKILL)
            server.process.wait(10)


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for the tests of a module that leave it as it was; with the module's FLAGS, if it has some."""
    running = start(tmp_path_factory.mktemp("server"), "--deterministic", *getattr(request.module, "FLAGS", ()))
    yield running
    assert running.stop() == 0, running.log.read_text()
