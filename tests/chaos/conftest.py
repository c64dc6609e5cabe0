"""A real server (root, edge, text, engine) on the fake device: every process is real, only the arithmetic is not."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

MAIN = """
import json, sys
from penstock.core.protocol.config import build
from penstock.core.processes.kernel import serve
sys.exit(serve(build(json.loads(sys.argv[1])), extra_plugins=sys.argv[2:]))
"""
PLUGINS = Path(__file__).parent / "plugins"
START_S = 60.0


class FakeServer:
    """A server in its own process group. `fake` are options of the fake device; `plugin` is the module that brings the device."""

    def __init__(
        self, folder: Path, fake: dict[str, Any] | None = None, plugin: str = "penstock.core.contract.fake_device", **config: Any
    ) -> None:
        self.out = folder / "out.log"
        self.err = folder / "err.log"
        self.folder = folder
        options = {"device": "fake", "port": 0, "hf_overrides": json.dumps({"fake": fake or {}}), "log_format": "json", **config}
        path = os.pathsep.join(filter(None, [str(PLUGINS), os.environ.get("PYTHONPATH")]))
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-c", MAIN, json.dumps(options), plugin],
                stdout=out,
                stderr=err,
                start_new_session=True,
                env={**os.environ, "XDG_RUNTIME_DIR": str(folder), "TMPDIR": str(folder), "PYTHONPATH": path},
            )
        self.uds = config.get("uds")
        self._seen: dict[int, psutil.Process] = {}

    # --- waiting

    def until(self, condition: Callable[[], Any], seconds: float = 20.0) -> Any:
        """Poll other processes: there is nothing to wait on."""
        deadline = time.monotonic() + seconds
        while True:
            value = condition()
            if value:
                return value
            assert time.monotonic() < deadline, f"not within {seconds} s\n{self.text()}"
            time.sleep(0.02)

    def text(self) -> str:
        return self.out.read_text() + self.err.read_text()

    def ready(self) -> FakeServer:
        def said() -> bool:
            assert self.process.poll() is None, f"it left with {self.process.returncode}\n{self.text()}"
            return "Penstock is ready" in self.out.read_text()

        self.until(said, START_S)
        self.children()
        return self

    def events(self) -> list[dict[str, Any]]:
        """Log lines so far."""
        lines = []
        for line in self.err.read_text().splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
        return lines

    def wait_event(self, event: str, count: int = 1, seconds: float = 30.0) -> dict[str, Any]:
        return self.until(lambda: ([e for e in self.events() if e.get("event") == event] + [None] * count)[count - 1], seconds)  # type: ignore[no-any-return]

    # --- talking

    @property
    def url(self) -> str:
        found = re.search(r"ready: (http://\S+)", self.out.read_text())
        return found.group(1) if found else "http://localhost"

    def client(self) -> httpx.Client:
        transport = httpx.HTTPTransport(uds=self.uds) if self.uds else httpx.HTTPTransport()
        return httpx.Client(base_url=self.url, transport=transport, timeout=30)

    def complete(self, max_tokens: int = 8, prompt: str | list[int] = "Count:") -> httpx.Response:
        body = {"model": "brook", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        with self.client() as client:
            return client.post("/v1/completions", json=body)

    # --- processes

    def children(self) -> dict[str, psutil.Process]:
        """Role -> process, now."""
        found = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    line = child.cmdline()
                    if "penstock.core.processes.spawn" in line:
                        found[line[line.index("penstock.core.processes.spawn") + 1]] = child
                        self._seen[child.pid] = child
        return found

    def left_over(self) -> list[psutil.Process]:
        """Processes of this server that still exist."""
        return [p for p in self._seen.values() if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    def wait(self, seconds: float = 20.0) -> int:
        return self.process.wait(seconds)

    def end(self) -> None:
        self.children()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)


class Stream(threading.Thread):
    """A client that reads one streamed completion to its end."""

    def __init__(self, server: FakeServer, max_tokens: int, prompt: str = "Count:") -> None:
        super().__init__(daemon=True)
        self._server = server
        self._body = {
            "model": "brook",
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        self.tokens: list[int] = []
        self.events: list[dict[str, Any]] = []
        self.done = False
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            with self._server.client() as client, client.stream("POST", "/v1/completions", json=self._body) as response:
                for line in response.iter_lines():
                    if line == "data: [DONE]":
                        self.done = True
                    elif line.startswith("data: "):
                        event = json.loads(line[6:])
                        self.events.append(event)
                        for choice in event.get("choices", []):
                            self.tokens += choice.get("token_ids") or []
        except httpx.HTTPError as error:
            self.error = error

    def reached(self, tokens: int) -> None:
        self._server.until(lambda: len(self.tokens) >= tokens or not self.is_alive())
        assert len(self.tokens) >= tokens, (self.events[-3:], self.error, self._server.text())

    @property
    def reason(self) -> str | None:
        reasons = [c["finish_reason"] for e in self.events for c in e.get("choices", []) if c.get("finish_reason")]
        return reasons[-1] if reasons else None


Starter = Callable[..., FakeServer]


@pytest.fixture
def begin() -> Iterator[Starter]:
    servers: list[FakeServer] = []
    with tempfile.TemporaryDirectory(prefix="pk-", dir="/tmp") as base:  # short: it holds unix sockets

        def start(fake: dict[str, Any] | None = None, **config: Any) -> FakeServer:
            folder = Path(base) / str(len(servers))
            folder.mkdir()
            servers.append(FakeServer(folder, fake, **config))
            return servers[-1]

        yield start
        for server in servers:
            server.end()


@pytest.fixture
def stream() -> type[Stream]:
    return Stream
