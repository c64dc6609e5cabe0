"""What the deployment tests stand on: nginx and Caddy with the shipped configuration, and servers that say exactly what a test wants."""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from penstock.plugins.commands.bench.server import free_port

FILES = Path(__file__).resolve().parents[2] / "examples" / "deployment"
UPSTREAM = "server 127.0.0.1:8000;"


def need(program: str) -> str:
    """Its path. Where it is missing the test is skipped, but never in CI (.ci/run installs it)."""
    path = shutil.which(program)
    if path is None:
        assert os.environ.get("CI") != "true", f"{program} is missing: .ci/run installs it"
        pytest.skip(f"{program} is not installed")
    return path


def replaced(text: str, old: str, new: str) -> str:
    assert old in text, f"the shipped file has no {old!r} any more"
    return text.replace(old, new)


def listening(port: int, process: subprocess.Popen[bytes], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        assert process.poll() is None, "the proxy left"
        assert time.monotonic() < deadline, "the proxy does not listen"
        time.sleep(0.02)


@contextlib.contextmanager
def nginx(folder: Path, *ports: int, body_limit: str = "64m") -> Iterator[httpx.Client]:
    """A client of nginx with examples/deployment/nginx.conf, before what listens on `ports`. Only names of the machine are other ones: ports, paths."""
    program, openssl = need("nginx"), need("openssl")
    folder.mkdir(exist_ok=True)
    front, certificate, key = free_port(), folder / "cert.pem", folder / "key.pem"
    request = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    names = ["-subj", "/CN=penstock", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([openssl, *request, *names], check=True, capture_output=True, timeout=60)
    text = (FILES / "nginx.conf").read_text(encoding="utf-8")
    for old, new in {
        UPSTREAM: " ".join(f"server 127.0.0.1:{port};" for port in ports),
        "listen 443 ssl": f"listen 127.0.0.1:{front} ssl",
        "/etc/ssl/llm.example.org.pem": str(certificate),
        "/etc/ssl/llm.example.org.key": str(key),
        "/var/log/nginx/penstock.log": str(folder / "access.log"),
        "client_max_body_size    64m": f"client_max_body_size {body_limit}",
    }.items():
        text = replaced(text, old, new)
    with _nginx(program, folder, text, front):
        trusted = ssl.create_default_context(cafile=str(certificate))
        with httpx.Client(base_url=f"https://127.0.0.1:{front}", verify=trusted, timeout=30) as client:
            yield client


@contextlib.contextmanager
def _nginx(program: str, folder: Path, http: str, front: int) -> Iterator[None]:
    scratch = "".join(f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    around = f"daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log; events {{}} http {{ {scratch} {http} }}"
    (folder / "nginx.conf").write_text(around, encoding="utf-8")
    process = subprocess.Popen([program, "-p", str(folder), "-c", str(folder / "nginx.conf")])
    try:
        listening(front, process)
        yield
    finally:
        process.terminate()
        process.wait(20)


@contextlib.contextmanager
def nginx_before(folder: Path, port: int, servers: dict[str, str]) -> Iterator[dict[str, str]]:
    """One nginx before what listens on `port`, with a server for each of these: name -> what stands in its `location /`; yields name -> its address."""
    program = need("nginx")
    ports = {name: free_port() for name in servers}
    http = "access_log off;" + "".join(
        f"server {{ listen 127.0.0.1:{ports[name]}; location / {{ proxy_pass http://127.0.0.1:{port}; {lines} }} }}"
        for name, lines in servers.items()
    )
    with _nginx(program, folder, http, next(iter(ports.values()))):
        yield {name: f"http://127.0.0.1:{one}" for name, one in ports.items()}


@contextlib.contextmanager
def caddy(folder: Path, port: int) -> Iterator[httpx.Client]:
    """A client of Caddy with examples/deployment/Caddyfile, without its certificates, which come from the internet."""
    program = shutil.which("caddy")
    if program is None:
        pytest.skip("caddy is not installed")
    front = free_port()
    text = (FILES / "Caddyfile").read_text(encoding="utf-8")
    text = replaced(replaced(text, "llm.example.org {", f"http://127.0.0.1:{front} {{"), "127.0.0.1:8000", f"127.0.0.1:{port}")
    (folder / "Caddyfile").write_text("{\n\tadmin off\n}\n" + text, encoding="utf-8")
    command = [program, "run", "--adapter", "caddyfile", "--config", str(folder / "Caddyfile")]
    process = subprocess.Popen(command, env={**os.environ, "HOME": str(folder), "XDG_DATA_HOME": str(folder)}, stderr=subprocess.DEVNULL)
    try:
        listening(front, process)
        with httpx.Client(base_url=f"http://127.0.0.1:{front}", timeout=30) as client:
            yield client
    finally:
        process.terminate()
        process.wait(20)


class Origin:
    """A server of one's own behind the proxy: `answer(connection, request)` is called for each whole request, on a thread. `requests` has them all."""

    def __init__(self, answer: Callable[[socket.socket, bytes], None]) -> None:
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.requests: list[bytes] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(30)
            data = b""
            while b"\r\n\r\n" not in data:
                data += _some(connection)
            length = re.search(rb"(?i)content-length: (\d+)", data)
            while len(data.partition(b"\r\n\r\n")[2]) < int(length.group(1) if length else 0):
                data += _some(connection)
            self.requests.append(data)
            self._answer(connection, data)

    def close(self) -> None:
        self._listener.close()


def _some(connection: socket.socket) -> bytes:
    part = connection.recv(65536)
    if not part:
        raise OSError("closed")
    return part


class Storing:
    """Passes requests on at once, and replies in blocks of `size` bytes; None: at their end."""

    def __init__(self, upstream: int, size: int | None) -> None:
        self._upstream, self._size = upstream, size
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(self._listener.accept()[0],), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        server = socket.create_connection(("127.0.0.1", self._upstream))
        stored = b""
        with client, server, contextlib.suppress(OSError):
            while True:
                for ready in select.select([client, server], [], [], 30)[0]:
                    data = ready.recv(65536)
                    if ready is client:
                        if not data:
                            return
                        server.sendall(data)
                        continue
                    stored += data
                    if not data:
                        client.sendall(stored)
                        return
                    while self._size and len(stored) >= self._size:
                        client.sendall(stored[: self._size])
                        stored = stored[self._size :]

    def close(self) -> None:
        self._listener.close()
