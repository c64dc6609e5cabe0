"""The files of examples/deployment: the proxy in front of a real server, the unit, the image's recipe."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from penstock.plugins.commands.bench.server import free_port

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "examples" / "deployment"
START_S = 60
BODY = {"model": "brook", "prompt": "Count:", "max_tokens": 60, "temperature": 0, "ignore_eos": True, "stream": True}


class Proxied:
    """A server, and nginx with the shipped configuration before it."""

    def __init__(self, folder: Path) -> None:
        self.port, self.front = free_port(), free_port()
        arguments = ["--kv-cache-memory-bytes", "64M", "--port", str(self.port), "--shutdown-timeout", "30", "--max-body-bytes", "100K"]
        self.server = subprocess.Popen([sys.executable, "-m", "penstock", "serve", *arguments], start_new_session=True)
        text = (FILES / "nginx.conf").read_text(encoding="utf-8")
        text = text.replace("127.0.0.1:8000", f"127.0.0.1:{self.port}").replace("listen 443 ssl", f"listen 127.0.0.1:{self.front}")
        text = re.sub(r"^\s*ssl_.*$", "", text, flags=re.MULTILINE)
        temporary = "".join(f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        whole = f"daemon off; pid {folder}/pid; error_log {folder}/error.log; events {{}} http {{ access_log off; {temporary} {text} }}"
        (folder / "nginx.conf").write_text(whole, encoding="utf-8")
        self.nginx = subprocess.Popen(["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf")])
        self.url = f"http://127.0.0.1:{self.front}"

    def ready(self) -> None:
        deadline = time.monotonic() + START_S
        while True:
            try:
                if httpx.get(self.url + "/health/ready").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            assert time.monotonic() < deadline, "not ready"
            assert self.server.poll() is None
            assert self.nginx.poll() is None
            time.sleep(0.05)

    def end(self) -> None:
        self.nginx.terminate()
        self.nginx.wait(10)
        if self.server.poll() is None:
            os.killpg(self.server.pid, signal.SIGKILL)
            self.server.wait(10)


@pytest.fixture(scope="module")
def proxied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxied]:
    if shutil.which("nginx") is None:
        assert os.environ.get("CI") != "true", "CI installs nginx, see .ci/run"
        pytest.skip("nginx is not installed")
    one = Proxied(tmp_path_factory.mktemp("nginx"))
    one.ready()
    yield one
    one.end()


def test_errors_and_ids_pass_the_proxy(proxied: Proxied) -> None:
    with httpx.Client(base_url=proxied.url) as client:
        large = client.post("/v1/completions", json={**BODY, "prompt": "a" * 200_000})
        assert (large.status_code, large.json()["error"]["code"]) == (413, "request_too_large"), "the server's own words"
        assert re.fullmatch(r"[0-9a-f]{32}", client.get("/version").headers["x-request-id"])


def test_a_stream_is_not_held_back(proxied: Proxied) -> None:
    """The first event is there before the last one exists: the server's counters say that the request still runs."""
    body = {**BODY, "max_tokens": 1500}
    with (
        httpx.Client(base_url=proxied.url, timeout=60) as client,
        httpx.Client(base_url=proxied.url) as other,
        client.stream("POST", "/v1/completions", json=body) as reply,
    ):
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = reply.iter_lines()
        first = next(line for line in lines if line.startswith("data: "))
        assert json.loads(first[6:])["choices"]
        assert 'penstock_requests{state="running"} 1' in other.get("/metrics").text, "the answer is under way"
        assert [line for line in lines if line][-1] == "data: [DONE]"


def test_a_drain_finishes_a_stream_through_the_proxy(proxied: Proxied) -> None:
    events: list[Any] = []
    begun = threading.Event()

    def read() -> None:
        with httpx.Client(base_url=proxied.url, timeout=60) as client, client.stream("POST", "/v1/completions", json=BODY) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: "):
                    events.append(line[6:])
                    begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(30)
    proxied.server.send_signal(signal.SIGTERM)
    reader.join(60)
    assert events[-1] == "[DONE]"
    assert proxied.server.wait(60) == 0


def test_the_unit_is_well_formed(tmp_path: Path) -> None:
    text = (FILES / "penstock.service").read_text(encoding="utf-8")
    stop = int(re.search(r"TimeoutStopSec=(\d+)", text).group(1))  # type: ignore[union-attr]
    drain = int(re.search(r"--shutdown-timeout (\d+)", text).group(1))  # type: ignore[union-attr]
    assert stop >= drain + 10
    assert understood(re.search(r"^ExecStart=\S+ (.*)$", text, re.MULTILINE).group(1).replace("%d", str(tmp_path)).split(), tmp_path)  # type: ignore[union-attr]
    verify = shutil.which("systemd-analyze")
    if verify is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / "penstock.service"
    unit.write_text(text.replace("/opt/penstock/bin/penstock", sys.executable), encoding="utf-8")
    told = subprocess.run([verify, "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False, timeout=60)
    assert "penstock.service" not in told.stderr, told.stderr


def understood(arguments: list[str], folder: Path) -> bool:
    """Does the command line take these, as far as it can be said without a model?"""
    from penstock.core import cli

    assert arguments[0] == "serve"
    (folder / "keys").write_text("secret\n", encoding="utf-8")
    (folder / "keys").chmod(0o600)
    context = cli.serve.make_context("serve", arguments[1:])  # type: ignore[attr-defined]
    return cli._config_of(context) is not None


def test_the_image_copies_what_is_there_and_starts_what_is_known(tmp_path: Path) -> None:
    text = (FILES / "Containerfile").read_text(encoding="utf-8")
    copied = [word for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE) for word in line.split()[:-1]]
    assert {"core", "plugins", "kernels", "transports", "src", "pyproject.toml"} <= set(copied)
    assert all((ROOT / name).exists() for name in copied)
    command = json.loads(re.search(r"^CMD (\[.*\])$", text, re.MULTILINE).group(1))  # type: ignore[union-attr]
    assert understood(command, tmp_path)
    assert "USER penstock" in text
