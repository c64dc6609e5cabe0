"""One request on a socket of its own: what came, when, and how it ended, whatever the other side does."""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from penstock.plugins.commands.doctor.wire import Exchange, Target, Unmeasurable, target_of

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))  # pytest's importlib mode does not

from proxy_kit import Origin, need

Answer = Callable[[Callable[[socket.socket, bytes], None]], Target]


@pytest.fixture
def answered() -> Iterator[Answer]:
    """answered(answer) -> where that is said."""
    made: list[Origin] = []

    def begin(answer: Callable[[socket.socket, bytes], None]) -> Target:
        made.append(Origin(answer))
        return target_of(f"http://127.0.0.1:{made[-1].port}", timeout_s=5)

    yield begin
    for one in made:
        one.close()


def test_reads_are_kept_apart_with_their_times(answered: Answer) -> None:
    heard = threading.Semaphore(0)

    def answer(connection: socket.socket, request: bytes) -> None:
        assert request.startswith(b"POST /v1/x HTTP/1.1\r\nHost: 127.0.0.1:")
        assert b"\r\nx-a: b\r\n" in request
        assert request.endswith(b"\r\n\r\n{}")
        connection.sendall(b"HTTP/1.1 200 OK\r\nServer: Some/1\r\ntransfer-encoding: chunked\r\n\r\n")
        for part in (b"one", b"two"):
            connection.sendall(b"3\r\n%b\r\n" % part)
            heard.acquire(timeout=5)
        connection.sendall(b"0\r\n\r\n")

    exchange = Exchange(answered(answer), "POST", "/v1/x", {"x-a": "b"}, b"{}")
    for count in (1, 2):
        while len(exchange.reads) < count:
            assert exchange.step()
        heard.release()
    exchange.all()
    assert [read.data for read in exchange.reads] == [b"one", b"two"]
    assert 0 <= exchange.reads[0].at <= exchange.reads[1].at <= exchange.elapsed
    assert (exchange.status, exchange.version, exchange.end, exchange.header("server")) == (200, "1.1", "whole", "Some/1")


@pytest.mark.parametrize(
    ("said", "end", "version"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nshort", "cut", "1.1"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nabc", "cut", "1.1"),
        (b"HTTP/1.0 200 OK\r\n\r\nuntil the end", "whole", "1.0"),
        (b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n", "whole", "1.1"),
        (b"SSH-2.0-dropbear\r\n", "nonsense", "0.0"),
        (b"", "cut", "0.0"),
    ],
)
def test_how_it_ended(answered: Answer, said: bytes, end: str, version: str) -> None:
    exchange = Exchange(answered(lambda connection, _: connection.sendall(said)), "GET", "/").all()
    assert (exchange.end, exchange.version) == (end, version)
    assert exchange.step() is False


def test_a_read_may_be_given_up_for_now(answered: Answer) -> None:
    go = threading.Event()

    def answer(connection: socket.socket, _: bytes) -> None:
        go.wait(5)
        connection.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")

    exchange = Exchange(answered(answer), "GET", "/")
    assert (exchange.step(0.01), exchange.end) == (False, "")
    go.set()
    assert (exchange.all().status, exchange.end) == (204, "whole")


@pytest.mark.parametrize(
    ("url", "port", "base", "chat", "authority"),
    [
        ("http://h", 80, "", "/v1/chat/completions", "h"),
        ("https://h:8443/v1/", 8443, "", "/v1/chat/completions", "h:8443"),
        ("http://h/llm", 80, "/llm", "/llm/v1/chat/completions", "h"),
        ("https://h/llm/v1/chat/completions", 443, "/llm", "/llm/v1/chat/completions", "h"),
        ("http://h/openai/chat/completions", 80, "/openai", "/openai/chat/completions", "h"),
        ("http://[::1]:80", 80, "", "/v1/chat/completions", "[::1]"),
    ],
)
def test_addresses(url: str, port: int, base: str, chat: str, authority: str) -> None:
    target = target_of(url)
    assert (target.port, target.base, target.chat, target.authority) == (port, base, chat, authority)


@pytest.mark.parametrize("url", ["h:80", "ftp://h", "http://", "http://h:x", "http://h/a b", "http://h\r\nx: y", "http://[", "http://hö"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(Unmeasurable, match="is no"):
        target_of(url)


def test_a_key_that_no_header_holds() -> None:
    with pytest.raises(Unmeasurable, match="--api-key"):
        target_of("http://h", key="a\r\nb")


def test_tls_is_checked_unless_told_otherwise(tmp_path: Path) -> None:
    certificate, key = tmp_path / "c.pem", tmp_path / "k.pem"
    request = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=x"]
    subprocess.run([need("openssl"), *request, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True, timeout=60)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"https://127.0.0.1:{listener.getsockname()[1]}"

    def serve() -> None:
        for _ in range(2):
            with contextlib.suppress(OSError), listener.accept()[0] as raw, context.wrap_socket(raw, server_side=True) as conn:
                conn.recv(65536)
                conn.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    with listener:
        with pytest.raises(Unmeasurable, match=r"is not trusted: .*--insecure"):
            Exchange(target_of(url), "GET", "/")
        exchange = Exchange(target_of(url, insecure=True), "GET", "/").all()
        thread.join(10)
    assert (exchange.status, exchange.body, exchange.tls[:5]) == (200, b"ok", "TLSv1")
