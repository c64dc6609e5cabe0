"""`penstock doctor stream` before a real server: by itself, behind a real nginx that is set up wrongly in the ways that people do it, and behind a proxy that stores."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from penstock.plugins.commands.bench.server import free_port
from penstock.plugins.commands.doctor import probes
from penstock.plugins.commands.doctor.command import doctor

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))  # pytest's importlib mode does not

from proxy_kit import Storing, nginx_before

FLAGS = ("--keep-alive-s", "0.5")
UP = "proxy_http_version 1.1; "
BARE = UP + 'proxy_set_header Connection ""; '
WELL = UP + "proxy_set_header Connection $http_connection; proxy_set_header Upgrade $http_upgrade; proxy_set_header Host $http_host; "
SERVERS = {
    "well": WELL,
    "ignores": "proxy_ignore_headers X-Accel-Buffering; ",
    "gzip": BARE + "gzip on; gzip_proxied any; gzip_types text/event-stream; proxy_ignore_headers X-Accel-Buffering; ",
    "old": "",
    "impatient": WELL + "proxy_read_timeout 1s; ",
    "deaf": WELL
    + 'proxy_set_header Last-Event-ID ""; proxy_set_header X-Request-Id ""; proxy_intercept_errors on; error_page 400 http://127.0.0.1/sorry; ',
    "pages": UP + "proxy_set_header Connection upgrade; proxy_set_header Upgrade $http_upgrade; ",
}


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "LASTS_S", 1.0)
    monkeypatch.setattr(probes, "HANDSHAKE_S", 1.0)


@pytest.fixture(scope="module")
def proxies(server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with nginx_before(tmp_path_factory.mktemp("nginx"), server.port, SERVERS) as urls:
        yield urls


def ask(*args: str) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(doctor, ["stream", "--json", *args], catch_exceptions=False)
    said = json.loads(result.stdout)
    assert isinstance(said, dict)
    return result.exit_code, said


def found(said: dict[str, Any], *, notes: bool = False) -> set[str]:
    return {finding["id"] for finding in said["findings"] if notes or not finding["note"]}


def quietly(*args: str, pattern: str = "steady") -> tuple[int, dict[str, Any]]:
    """The same again where the pattern is another one: on a machine that is too busy it may be, but not again and again."""
    for _ in range(4):
        code, said = ask(*args)
        if said["stream"]["pattern"] == pattern:
            break
    return code, said


def test_a_server_by_itself(server: Any) -> None:
    code, said = quietly(server.url, "--idle-s", "1.5")
    assert (code, said["findings"], set(said["checks"].values())) == (0, [], {"ok"}), said
    assert said["server_saw"] == "HTTP/1.1"
    assert len(said["stream"]["sent_s"]) == len(said["stream"]["arrived_s"]) >= 20


def test_an_nginx_that_is_set_up_well(proxies: dict[str, str], server: Any) -> None:
    code, said = quietly(proxies["well"] + "/v1/chat/completions", "--idle-s", "1.5", "--direct", server.url)
    assert (code, said["findings"]) == (0, []), said
    assert [layer.partition("/")[0] for layer in said["layers"]] == ["nginx"]


def test_buffers_that_ignore_what_the_server_says(proxies: dict[str, str]) -> None:
    """nginx passes chunked bodies on as they come; one of HTTP/1.0 it stores, unless the server's X-Accel-Buffering is obeyed, as it is here in "old"."""
    code, said = quietly(proxies["ignores"], "--idle-s", "0", pattern="blocks")
    assert code == 1
    assert found(said) == {"blocks", "http-1.0-upstream", "websocket"}
    assert said["stream"]["block_bytes"] % 4096 == 0, "two that came at once look like a larger one"
    (held,) = (finding for finding in said["findings"] if finding["id"] == "blocks")
    assert held["what"].startswith("nginx/")
    assert "proxy_ignore_headers" in held["do"][0]
    assert "  proxy_buffering off;" in held["do"]


def test_http_1_0_and_no_upgrades(proxies: dict[str, str]) -> None:
    code, said = quietly(proxies["old"], "--idle-s", "0")
    assert (code, found(said)) == (1, {"http-1.0-upstream", "websocket"})
    assert said["checks"]["idle connections"].startswith("not measured")


def test_a_compressor_holds_all_of_it(proxies: dict[str, str]) -> None:
    code, said = quietly(proxies["gzip"], "--idle-s", "0", pattern="whole")
    assert code == 1
    assert found(said) >= {"whole", "compressed"}
    assert said["stream"]["content_encoding"] == "gzip"


def test_a_short_read_timeout_is_met_by_signs_of_life(proxies: dict[str, str]) -> None:
    code, said = quietly(proxies["impatient"], "--idle-s", "2.5")
    assert (code, said["findings"]) == (0, []), said


def test_a_short_read_timeout_cuts_a_silent_stream(proxies: dict[str, str], starter: Any, tmp_path: Path) -> None:
    silent = starter("--keep-alive-s", "30")
    with nginx_before(tmp_path, silent.port, {"impatient": SERVERS["impatient"]}) as urls:
        code, said = ask(urls["impatient"], "--idle-s", "4")
    assert code == 1
    assert "idle" in found(said)
    (idle,) = (finding for finding in said["findings"] if finding["id"] == "idle")
    assert "--keep-alive-s 0.5" in idle["do"][0]


def test_headers_and_errors_that_do_not_come_through(proxies: dict[str, str]) -> None:
    code, said = quietly(proxies["deaf"], "--idle-s", "0.1")
    assert code == 1
    assert found(said) == {"request-id", "last-event-id", "error-page"}


def test_pages_need_their_host(proxies: dict[str, str]) -> None:
    code, said = quietly(proxies["pages"], "--idle-s", "0")
    assert (code, found(said), found(said, notes=True)) == (0, set(), {"origin"})


# ------------------------------------------------------------------ a proxy that stores


@pytest.mark.parametrize(("size", "pattern"), [(4096, "blocks"), (None, "whole")])
def test_a_proxy_that_stores(server: Any, size: int | None, pattern: str) -> None:
    with contextlib.closing(Storing(server.port, size)) as proxy:
        code, said = quietly(proxy.url, "--idle-s", "0", "--direct", server.url, pattern=pattern)
    assert (code, said["stream"]["pattern"]) == (1, pattern)
    assert (said["stream"]["block_bytes"] or 0) % (size or 1) == 0
    assert pattern in found(said)
    assert said["direct"]["block_bytes"] is None


# ------------------------------------------------------------------ what cannot be measured, and what it looks like


def test_what_cannot_be_measured_is_a_sentence_and_2(server: Any) -> None:
    for args, words in {
        (f"http://127.0.0.1:{free_port()}",): "No server answers",
        ("not a url",): "is no address of a server",
        (f"https://127.0.0.1:{server.port}",): "speaks no TLS",
        (server.url + "/nothing",): "answered 404",
        (server.url, "--model", "other"): "answered 404",
    }.items():
        result = CliRunner().invoke(doctor, ["stream", *args])
        assert (result.exit_code, result.stdout) == (2, "")
        assert words in result.stderr
        assert "Traceback" not in result.stderr


def test_too_short_an_answer_is_said_to_be(server: Any) -> None:
    result = CliRunner().invoke(doctor, ["stream", server.url, "--tokens", "3", "--idle-s", "0"])
    assert result.exit_code == 2
    assert "ask for more with --tokens" in result.stdout


def test_a_plain_report_has_no_colours_and_lines_to_copy(proxies: dict[str, str]) -> None:
    result = CliRunner().invoke(doctor, ["stream", proxies["old"], "--idle-s", "0"])
    lines = result.stdout.splitlines()
    assert result.exit_code == 1
    assert "\x1b" not in result.stdout
    assert lines[0].startswith("way      HTTP/1.1 > nginx/")
    assert (lines[1][:9], lines[2][:9]) == ("sent     ", "arrived  ")
    assert any(line.strip() == "proxy_set_header Upgrade $http_upgrade;" for line in lines)
    assert any(line.startswith("finding websocket: The WebSocket's handshake reaches the server without") for line in lines)
