"""One HTTP/1.1 request on a socket of its own, and when each read brought what.

What it is: `Target`, where to ask; `Exchange`, which sends a request and keeps every read of the reply with its time, so that nothing of a general client's buffers stands between the clock and the socket.
What it does not know: what is asked, what a body says.
"""

from __future__ import annotations

import socket
import ssl
import time
from typing import NamedTuple
from urllib.parse import urlsplit

import httptools

CHAT = "/chat/completions"
_READ = 1 << 16


class Unmeasurable(Exception):
    """Nothing can be said about this server, and why; a sentence."""


class Target(NamedTuple):
    """`base` is what stands before /v1; `chat` the path of chat completions."""

    tls: bool
    host: str
    port: int
    base: str
    chat: str
    key: str | None = None
    insecure: bool = False
    timeout_s: float = 60.0

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"


def target_of(url: str, *, key: str | None = None, insecure: bool = False, timeout_s: float = 60.0) -> Target:
    """`url` is a server's base, with or without /v1, or its chat completions' whole address. Raises Unmeasurable."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise Unmeasurable(f"{url!a} is no URL: {error}.") from None
    if parts.scheme not in ("http", "https") or not host or not url.isascii() or not url.isprintable() or " " in url:
        raise Unmeasurable(f"{url!a} is no address of a server. Give one such as https://llm.example.org or http://127.0.0.1:8000/v1.")
    if key is not None and not (key.isascii() and key.isprintable()):
        raise Unmeasurable("The API key has characters that no header can hold. See --api-key.")
    tls = parts.scheme == "https"
    path = parts.path.rstrip("/")
    whole = path.endswith(CHAT)
    base = path.removesuffix(CHAT).removesuffix("/v1")
    return Target(tls, host, port or (443 if tls else 80), base, path if whole else f"{base}/v1{CHAT}", key, insecure, timeout_s)


class Read(NamedTuple):
    """What one read brought of the body; `at` in seconds since the request was sent."""

    at: float
    data: bytes


class Exchange:
    """Opens a connection and sends the request. Raises Unmeasurable where nobody can be reached; what happens later is in `end`:

    "": it goes on; "whole": the reply is complete; "cut": the connection ended before that; "reset"; "late": nothing came for the timeout; "nonsense": it was no HTTP.
    """

    def __init__(self, target: Target, method: str, path: str, headers: dict[str, str] | None = None, body: bytes | None = None) -> None:
        self._target = target
        self.status = 0
        self.headers: list[tuple[str, str]] = []
        self.reads: list[Read] = []
        self.end = ""
        self._whole = False
        self._now = 0.0
        self._parser = httptools.HttpResponseParser(self)
        self.connect_s = 0.0
        self.tls = ""
        self._socket = self._connected()
        given = {"Host": target.authority, "Accept": "*/*", "User-Agent": "penstock-doctor", "Connection": "close"}
        if target.key:
            given["Authorization"] = f"Bearer {target.key}"
        if body is not None:
            given |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
        lines = "".join(f"{name}: {value}\r\n" for name, value in {**given, **(headers or {})}.items())
        self._asked = time.perf_counter()
        try:
            self._socket.sendall(f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode("ascii") + (body or b""))
        except OSError:
            self._finish("reset")

    def _connected(self) -> socket.socket:
        target = self._target
        begun = time.perf_counter()
        try:
            raw = socket.create_connection((target.host, target.port), min(10.0, target.timeout_s))
        except (OSError, UnicodeError) as error:
            raise Unmeasurable(f"No server answers at {target.host} port {target.port} ({error}). Is the address right?") from None
        self.connect_s = time.perf_counter() - begun
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        raw.settimeout(target.timeout_s)
        if not target.tls:
            return raw
        context = ssl.create_default_context()
        if target.insecure:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["http/1.1"])
        try:
            secured = context.wrap_socket(raw, server_hostname=target.host)
        except ssl.SSLCertVerificationError as error:
            raw.close()
            raise Unmeasurable(
                f"The certificate of {target.host} is not trusted: {error.verify_message}. --insecure measures all the same."
            ) from None
        except OSError as error:
            raw.close()
            raise Unmeasurable(
                f"{target.host} port {target.port} speaks no TLS that is understood here ({error}). Is it http://?"
            ) from None
        self.tls = secured.version() or "TLS"
        return secured

    # --- what the parser finds

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.decode("latin-1").lower(), value.decode("latin-1")))

    def on_body(self, body: bytes) -> None:
        self.reads.append(Read(self._now, body))

    def on_message_complete(self) -> None:
        self._whole = True

    # --- for who reads

    @property
    def elapsed(self) -> float:
        """Seconds since the request was sent."""
        return time.perf_counter() - self._asked

    @property
    def version(self) -> str:
        return str(self._parser.get_http_version())

    @property
    def body(self) -> bytes:
        return b"".join(read.data for read in self.reads)

    def header(self, name: str) -> str:
        return next((value for given, value in self.headers if given == name), "")

    def step(self, within_s: float | None = None) -> bool:
        """Read once; False: nothing came within that time (without one it is the target's, and the end), or the reply is at its end."""
        if self.end:
            return False
        self._socket.settimeout(self._target.timeout_s if within_s is None else max(0.001, within_s))
        try:
            data = self._socket.recv(_READ)
        except TimeoutError:
            if within_s is None:
                self._finish("late")
            return False
        except OSError:
            return self._finish("reset")
        self._now = self.elapsed
        if not data:
            bounded = self.header("content-length") or "chunked" in self.header("transfer-encoding").lower()
            return self._finish("whole" if self.status and not bounded else "cut")
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._whole = True
        except httptools.HttpParserError:
            return self._finish("nonsense")
        self.status = self._parser.get_status_code()
        if self._whole:
            self._finish("whole")
        return True

    def all(self) -> Exchange:
        """Read to the end."""
        while self.step():
            pass
        return self

    def close(self) -> None:
        self._socket.close()

    def _finish(self, how: str) -> bool:
        self.end = how
        self._socket.close()
        return False
