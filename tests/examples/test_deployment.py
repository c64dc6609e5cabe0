"""The files of examples/deployment: proxies in front of a real server, the unit, the image's recipe, the manifest."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import click
import httpx
import pytest
import yaml
from proxy_kit import FILES, Origin, caddy, nginx
from websockets.sync.client import connect
from websockets.typing import Origin as Origin_
from websockets.typing import Subprotocol

from penstock.core import cli
from penstock.core.processes import kernel, supervisor
from penstock.core.protocol.config import Config
from penstock.plugins.commands.bench.server import free_port

ROOT = Path(__file__).resolve().parents[2]
BODY = {"model": "brook", "prompt": "Count:", "max_tokens": 60, "temperature": 0, "ignore_eos": True, "stream": True}
LADDER_S = supervisor.LATE_S + supervisor.STOP_S + supervisor.TERM_S
"""From the end of --shutdown-timeout to SIGKILL for the last process."""


class Served:
    """A real server on loopback. `direct` talks to it past any proxy."""

    def __init__(self, *arguments: str) -> None:
        self.port = free_port()
        command = [sys.executable, "-m", "penstock", "serve", "--kv-cache-memory-bytes", "64M", "--port", str(self.port), *arguments]
        self.process = subprocess.Popen(command, start_new_session=True)
        self.direct = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30)
        self.until(self._ready)

    def _ready(self) -> bool:
        assert self.process.poll() is None
        with contextlib.suppress(httpx.TransportError):
            return self.direct.get("/health/ready").status_code == 200
        return False

    def until(self, condition: Any, timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def metric(self, line: str) -> float:
        return sum(float(x.rsplit(" ", 1)[1]) for x in self.direct.get("/metrics").text.splitlines() if x.startswith(line + " "))

    def end(self) -> None:
        self.direct.close()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(10)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    one = Served("--max-body-bytes", "100K", "--root-path", "/llm")
    yield one
    one.end()


@pytest.fixture(scope="module")
def front(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """nginx before `served`. Its body limit is to --max-body-bytes what the shipped one is to the default."""
    with nginx(tmp_path_factory.mktemp("nginx"), served.port, body_limit="200k") as client:
        yield client


# ------------------------------------------------------------------ nginx


def test_the_shipped_body_limit_is_twice_the_servers() -> None:
    (limit,) = re.findall(r"client_max_body_size +(\d+)m;", (FILES / "nginx.conf").read_text(encoding="utf-8"))
    assert int(limit) << 20 == 2 * Config().max_body_bytes


@pytest.mark.parametrize(("size", "says"), [(150_000, "--max-body-bytes"), (190_000, "--max-body-bytes"), (3_000_000, "too large")])
def test_too_large_a_body_is_413_whoever_says_so(front: httpx.Client, size: int, says: str) -> None:
    for _ in range(4):  # a proxy that loses a race would say 502 now and then
        reply = front.post("/v1/completions", json={**BODY, "prompt": "a" * size})
        error = reply.json()["error"]
        assert (reply.status_code, error["code"]) == (413, "request_too_large")
        assert says in error["message"]
        assert error.keys() == {"message", "type", "param", "code"}


def test_the_servers_own_errors_pass(front: httpx.Client) -> None:
    wrong = front.post("/v1/completions", json={**BODY, "max_tokens": -1})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "max_tokens")
    assert front.post("/v1/completions", json={**BODY, "model": "other"}).json()["error"]["code"] == "model_not_found"


def test_websockets_pass(front: httpx.Client) -> None:
    port = front.base_url.port
    trust = ssl.create_default_context()
    trust.check_hostname, trust.verify_mode = False, ssl.CERT_NONE
    for path in ("/v1/stream", "/llm/v1/stream"):
        url = f"wss://127.0.0.1:{port}{path}"
        with connect(
            url, subprotocols=[Subprotocol("penstock.v1")], origin=Origin_(f"https://127.0.0.1:{port}"), ssl=trust, proxy=None
        ) as ws:
            ws.send(json.dumps({"op": "start", "id": "a", "path": "/v1/completions", "body": {**BODY, "stream": True}}))
            heard = [json.loads(ws.recv(timeout=20))]
            while "done" not in heard[-1]:
                heard.append(json.loads(ws.recv(timeout=20)))
            assert [said["seq"] for said in heard[1:-1]] == list(range(1, len(heard) - 1))


def test_request_ids_are_the_clients_or_the_servers(front: httpx.Client) -> None:
    assert front.get("/version", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    made = front.get("/version").headers.get_list("x-request-id")
    assert len(made) == 1
    assert re.fullmatch(r"[0-9a-f]{32}", made[0])
    # The body's is heard where there is no header: the proxy must not bring one of its own.
    body = {**BODY, "stream": False, "max_tokens": 1, "request_id": "mine-2"}
    assert front.post("/v1/completions", json=body).json()["id"] == "cmpl-mine-20"


def test_the_proxys_log_has_the_id_that_the_client_saw(tmp_path: Path, served: Served) -> None:
    with nginx(tmp_path, served.port) as client:
        rid = client.get("/version").headers["x-request-id"]
    assert f" id={rid}\n" in (tmp_path / "access.log").read_text(encoding="utf-8")


def test_the_path_below_a_root_is_served_and_metrics_are_not_shown(front: httpx.Client, served: Served) -> None:
    assert front.get("/llm/v1/models").json() == front.get("/v1/models").json()
    assert served.direct.get("/metrics").status_code == 200
    assert [front.get(path).status_code for path in ("/metrics", "/llm/metrics")] == [404, 404]


def in_step(client: httpx.Client, origin: Origin, heard: threading.Semaphore, events: int) -> None:
    """Each event arrives although nothing follows it until it has been read."""
    with client.stream("POST", "/v1/completions", json={}, timeout=10) as reply:
        lines = (line for line in reply.iter_lines() if line)
        for number in range(events):
            assert next(lines) == f"data: {number}"
            heard.release()
        assert list(lines) == []
    assert len(origin.requests) == 1


@pytest.mark.parametrize("kind", ["nginx", "caddy"])
def test_streams_arrive_event_by_event(kind: str, tmp_path: Path) -> None:
    heard = threading.Semaphore(0)

    def answer(connection: socket.socket, request: bytes) -> None:  # without the header by which Penstock asks nginx itself not to buffer
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")
        for number in range(6):
            connection.sendall(b"data: %d\n\n" % number)
            heard.acquire(timeout=20)

    origin = Origin(answer)
    with contextlib.closing(origin), (nginx if kind == "nginx" else caddy)(tmp_path, origin.port) as client:
        in_step(client, origin, heard, 6)


@pytest.mark.parametrize("kind", ["nginx", "caddy"])
def test_a_real_stream_is_whole_and_a_client_that_leaves_cancels_it(kind: str, tmp_path: Path, served: Served) -> None:
    with (nginx if kind == "nginx" else caddy)(tmp_path, served.port) as client:
        with client.stream("POST", "/v1/completions", json=BODY) as reply:
            assert reply.headers["content-type"].startswith("text/event-stream")
            events = [line[6:] for line in reply.iter_lines() if line.startswith("data: ")]
        assert events[-1] == "[DONE]"
        want = served.direct.post("/v1/completions", json={**BODY, "stream": False}).json()["choices"][0]["text"]
        assert "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1]) == want
        assert client.get("/metrics").status_code == 404
        gone = 'penstock_cancellations_total{cause="disconnect"}'
        before = served.metric(gone)
        with client.stream("POST", "/v1/completions", json={**BODY, "max_tokens": 3500}) as reply:
            next(reply.iter_lines())
        served.until(lambda: served.metric(gone) == before + 1, 20)


def test_a_request_that_was_sent_is_never_sent_again(tmp_path: Path) -> None:
    """Two servers that take the request and hang up: one got it, the client is told. One that takes no connection costs nothing."""
    dead = [Origin(lambda connection, request: None) for _ in range(2)]
    with nginx(tmp_path / "a", *(origin.port for origin in dead)) as client:
        reply = client.post("/v1/completions", json=BODY)
    assert sum(len(origin.requests) for origin in dead) == 1
    assert (reply.status_code, reply.json()["error"]["code"], reply.headers["retry-after"]) == (503, "engine_unavailable", "2")
    for origin in dead:
        origin.close()
    alive = Origin(lambda connection, request: connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}"))
    with contextlib.closing(alive), nginx(tmp_path / "b", free_port(), alive.port) as client:
        assert [client.post("/v1/completions", json=BODY).status_code for _ in range(4)] == [200] * 4
    assert len(alive.requests) == 4


def test_a_drain_finishes_a_stream_through_the_proxy(tmp_path: Path) -> None:
    server = Served("--shutdown-timeout", "60")
    try:
        with nginx(tmp_path, server.port) as client:
            with client.stream("POST", "/v1/completions", json={**BODY, "max_tokens": 3000}) as reply:
                lines = (line for line in reply.iter_lines() if line)
                next(lines)
                server.process.send_signal(signal.SIGTERM)
                server.until(lambda: client.get("/health/ready").status_code == 503, 10)
                late = client.post("/v1/completions", json=BODY)
                assert (late.status_code, late.json()["error"]["code"], late.headers["retry-after"]) == (503, "draining", "2")
                assert [client.get(path).status_code for path in ("/health/live", "/health/decode")] == [200, 200]
                *_, last = lines
            assert last == "data: [DONE]"
            assert server.process.wait(60) == 0
            gone = client.post("/v1/completions", json=BODY)
            assert (gone.status_code, gone.json()["error"]["code"]) == (503, "engine_unavailable"), "nginx's own words"
    finally:
        server.end()


# ------------------------------------------------------------------ systemd


def understood(arguments: list[str]) -> Config:
    """The configuration that these arguments of `penstock` give. Raises what the command would complain with."""
    assert arguments[0] == "serve"
    return cli.parse_serve_args(arguments[1:])


@pytest.fixture
def unit() -> dict[str, list[str]]:
    text = (FILES / "penstock.service").read_text(encoding="utf-8")
    pairs = re.findall(r"(?m)^(\w+)=(.*)$", text)
    return {name: [value for other, value in pairs if other == name] for name, _ in pairs}


def test_the_unit_starts_what_is_known_and_waits_for_the_drain(unit: dict[str, list[str]], tmp_path: Path) -> None:
    (credential,) = unit["LoadCredential"]
    name = credential.partition(":")[0]
    (tmp_path / name).write_text("secret  # of nobody\n", encoding="utf-8")
    (tmp_path / name).chmod(0o400)
    (line,) = unit["ExecStart"]
    assert f"%d/{name}" in line
    program, *arguments = line.replace("%d", str(tmp_path)).split()
    assert Path(program).name == "penstock"
    config = understood(arguments)
    assert config.api_key == ["secret"]
    assert int(unit["TimeoutStopSec"][0]) >= config.shutdown_timeout + LADDER_S + 5
    assert unit["KillMode"] == ["mixed"]
    places = (("/run", "RuntimeDirectory"), ("/var/cache", "CacheDirectory"), ("/var/lib", "StateDirectory"))
    writable = {f"{place}/{unit[name][0]}" for place, name in places}
    environment = dict(pair.split("=") for pair in unit["Environment"][0].split())
    assert all(any((value + "/").startswith(folder + "/") for folder in writable) for value in environment.values())


def test_systemd_finds_no_fault_in_the_unit(tmp_path: Path) -> None:
    verify = shutil.which("systemd-analyze")
    if verify is None:
        pytest.skip("systemd-analyze is not installed")
    copy = tmp_path / "penstock.service"
    text = (FILES / "penstock.service").read_text(encoding="utf-8").replace("/opt/penstock/bin/penstock", sys.executable)

    def complaints(text: str) -> list[str]:
        copy.write_text(text, encoding="utf-8")
        told = subprocess.run([verify, "verify", "--man=no", str(copy)], capture_output=True, text=True, check=False, timeout=60)
        return [line for line in told.stderr.splitlines() if "penstock" in line]

    assert complaints(text) == []
    assert complaints(text.replace("KillMode=mixed", "KillMode=gentle")) != [], "systemd-analyze looks at nothing here"


def test_a_proxy_of_the_same_group_reaches_a_unix_socket_as_the_page_says(tmp_path: Path) -> None:
    """Connecting takes the right to write, and the socket has the mode that the umask leaves."""
    page = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    (advised,) = re.findall(r"`UMask=(\d+)`", page)
    modes = {}
    for umask in (advised, "0077"):
        path = tmp_path / umask
        before = os.umask(int(umask, 8))
        try:
            kernel.bind(Config(uds=str(path))).close()
        finally:
            os.umask(before)
        modes[umask] = path.stat().st_mode & 0o777
    assert (modes[advised] & 0o060, modes[advised] & 0o007) == (0o060, 0), "the group, and nobody else"
    assert modes["0077"] & 0o077 == 0, "with the unit's own UMask a proxy stays outside: the page has to say so"


# ------------------------------------------------------------------ the container's image


@pytest.fixture(scope="module")
def recipe() -> list[tuple[str, str]]:
    """(instruction, the rest), with continued lines joined."""
    text = (FILES / "Containerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in text.splitlines()) if word.isupper()]


def words_of(recipe: list[tuple[str, str]], instruction: str) -> list[str]:
    return [rest for word, rest in recipe if word == instruction]


def test_the_image_starts_what_is_known(recipe: list[tuple[str, str]]) -> None:
    (entry,), (command,) = words_of(recipe, "ENTRYPOINT"), words_of(recipe, "CMD")
    config = understood(json.loads(command))
    assert json.loads(entry) == ["penstock"]
    assert (config.host, [str(config.port)]) == ("0.0.0.0", words_of(recipe, "EXPOSE"))
    (user,) = words_of(recipe, "USER")
    assert int(user) > 0, "a number: Kubernetes' runAsNonRoot cannot look names up"
    assert any(f"--uid {user} " in line for line in words_of(recipe, "RUN"))
    assert words_of(recipe, "STOPSIGNAL") == ["SIGTERM"]


def test_the_images_health_check_tells_ready_from_gone(recipe: list[tuple[str, str]], served: Served) -> None:
    (check,) = words_of(recipe, "HEALTHCHECK")
    _, *command = json.loads(check.partition(" CMD ")[2])

    def passes(port: int) -> bool:
        there = [word.replace("127.0.0.1:8000", f"127.0.0.1:{port}") for word in command]
        return subprocess.run([sys.executable, *there], capture_output=True, check=False, timeout=60).returncode == 0

    assert passes(served.port)
    assert not passes(free_port())


@pytest.mark.slow
def test_what_the_image_copies_is_there_and_enough_to_build(recipe: list[tuple[str, str]], tmp_path: Path) -> None:
    ignore = (FILES / "Containerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    seen = {line[1:] for line in ignore if line.startswith("!")}
    hidden = [line.removeprefix("**/") for line in ignore if line.startswith("**/")]
    copied: set[str] = set()
    for rest in words_of(recipe, "COPY"):
        *sources, target = rest.split()
        for source in sources:
            copied.add(source)
            if (ROOT / source).is_dir():  # links within stay links, as the image's builder leaves them
                drop = lambda _, names: [name for name in names if any(fnmatch(name, mask) for mask in hidden)]  # noqa: E731
                shutil.copytree(ROOT / source, tmp_path / "src" / target, symlinks=True, ignore=drop)
            else:
                (tmp_path / "src").mkdir(exist_ok=True)
                shutil.copy(ROOT / source, tmp_path / "src" / target)
    assert copied == seen
    built = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-q", "--outdir", str(tmp_path), str(tmp_path / "src")]
    subprocess.run(built, check=True, capture_output=True, timeout=240)
    (wheel,) = tmp_path.glob("*.whl")
    shutil.unpack_archive(wheel, tmp_path / "site", "zip")
    for file in ("core/cli.py", "transports/edge.py", "kernels/native/kernels.c", "plugins/demo_model/brook/model.safetensors"):
        assert (tmp_path / "site" / "penstock" / file).exists(), file


# ------------------------------------------------------------------ Kubernetes


def service_links(service: dict[str, Any]) -> dict[str, str]:
    """The environment that Kubernetes gives to each pod that starts beside this service, unless the pod says no."""
    name, address = service["metadata"]["name"].upper().replace("-", "_"), "10.0.0.1"
    links = {f"{name}_SERVICE_HOST": address}
    for position, port in enumerate(service["spec"]["ports"]):
        number, protocol = port["port"], port.get("protocol", "TCP")
        url, stem = f"{protocol.lower()}://{address}:{number}", f"{name}_PORT_{number}_{protocol}"
        if position == 0:
            links |= {f"{name}_SERVICE_PORT": str(number), f"{name}_PORT": url}
        links |= {f"{name}_SERVICE_PORT_{port['name'].upper()}": str(number), stem: url}
        links |= {f"{stem}_PROTO": protocol.lower(), f"{stem}_PORT": str(number), f"{stem}_ADDR": address}
    return links


def test_the_pod_starts_what_is_known_and_waits_for_the_drain(
    recipe: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment, service = yaml.safe_load_all((FILES / "kubernetes.yaml").read_text(encoding="utf-8"))
    pod: dict[str, Any] = deployment["spec"]["template"]["spec"]
    for name, value in service_links(service).items() if pod.get("enableServiceLinks", True) else ():
        monkeypatch.setenv(name, value)
    (container,) = pod["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    (tmp_path / "keys").write_text("secret\n", encoding="utf-8")
    arguments = [str(word).replace(mounts["keys"] + "/", f"{tmp_path}/") for word in container["args"]]
    config = understood(arguments)
    assert config.api_key == ["secret"]
    assert config.model is not None
    assert config.model.startswith(mounts["models"])
    assert [port["containerPort"] for port in container["ports"]] == [config.port]
    assert pod["securityContext"]["runAsUser"] == int(words_of(recipe, "USER")[0])
    assert f"PENSTOCK_CACHE={mounts['cache']}" in words_of(recipe, "ENV")[0].split()
    first = float(container["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert pod["terminationGracePeriodSeconds"] >= first + config.shutdown_timeout + LADDER_S + 5
    probes = {kind: container[kind]["httpGet"]["path"] for kind in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert probes == {"startupProbe": "/health/ready", "readinessProbe": "/health/ready", "livenessProbe": "/health/live"}
    assert service["spec"]["selector"].items() <= deployment["spec"]["template"]["metadata"]["labels"].items()


def test_a_wrong_option_would_be_seen() -> None:
    with pytest.raises(click.UsageError):
        understood(["serve", "--no-such-option", "1"])


@pytest.mark.parametrize("name", ["nginx.conf", "Caddyfile"])
def test_the_proxies_hide_metrics_however_the_path_is_spelt(name: str) -> None:
    """As the server takes it: it knows no difference between these."""
    text = (FILES / name).read_text(encoding="utf-8")
    (hidden,) = re.findall(r"(?:location ~|@hidden path_regexp) (\S*metrics\S*)", text)
    for path in ("/metrics", "/metrics/", "/metrics//", "//metrics", "//metrics/", "/llm/metrics", "/llm/metrics/", "/llm//metrics"):
        assert re.search(hidden, path), path
    for path in ("/v1/models", "/metricsx", "/v1/metrics", "/llm/v1/models", "/"):
        assert not re.search(hidden, path), path
