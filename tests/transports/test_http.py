"""The application around the routes: keys, error shapes, limits, health, draining, headers, metrics, the OpenAPI document."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from edge_kit import Edge, MakeEdge, delta, events, finished, silent

from penstock.core.protocol.messages import Cancel, EdgeStats, Limits, Query, Submit, TextReady
from penstock.transports import edge as edge_module
from penstock.transports import gateway
from penstock.transports.http import PUBLIC, paths_of
from penstock.transports.openapi_replies import OWN_ERRORS
from penstock.transports.server_routes import OPEN
from penstock.version import __version__

CHAT = {"model": "brook", "messages": [{"role": "user", "content": "hi"}]}
COMPLETIONS = "/v1/completions"
CHATS = "/v1/chat/completions"


def error_of(reply: httpx.Response) -> dict[str, Any]:
    """The error, after a check that its shape is OpenAI's and nothing else is in the body."""
    assert reply.headers["content-type"] == "application/json"
    body = reply.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert isinstance(body["error"]["message"], str)
    return body["error"]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def http(shared_edge: Edge) -> Iterator[httpx.Client]:
    with shared_edge.http() as client:
        yield client


# ------------------------------------------------------------------ keys


def routes_of(edge: Edge) -> list[tuple[str, str]]:
    """Every (method, path) of the application, path parameters filled in."""
    found = []
    for route in edge.server.app.app.routes:
        path = re.sub(r"\{[^}]*\}", "brook", route.path)
        found += [(str(method), path) for method in route.methods]  # type: ignore[union-attr]
    return found


def test_every_route_needs_a_key_unless_it_is_health(make_edge: MakeEdge) -> None:
    edge = make_edge(api_key=["secret-1", "schlüssel-2"])
    routes = routes_of(edge)
    assert {path for _, path in routes} >= PUBLIC | {CHATS, COMPLETIONS, "/v1/models", "/metrics", "/version", "/schema", "/tokenize"}
    own = {re.sub(r"\{[^}]*\}", "brook", path) for path in OWN_ERRORS}
    with edge.http() as http:
        for method, path in [
            *routes,
            ("GET", "/nowhere"),
            ("POST", "/"),
            ("GET", "/health/"),
            ("GET", f"{edge.url}//health"),
            ("GET", "/health/x"),
        ]:
            for headers in ({}, {"authorization": "Bearer wrong"}, {"x-api-key": "secret-"}, {"authorization": "Basic secret-1"}):
                reply = http.request(method, path, headers=headers, json=CHAT if method == "POST" else None)
                if path in PUBLIC or method == "OPTIONS":  # a browser asks without credentials
                    assert reply.status_code in (200, 204), (method, path)
                elif method in ("GET", "HEAD") and path in paths_of(edge.server.app.app).marked(OPEN):
                    assert reply.status_code == (405 if path == "/" else 200), (method, path)
                else:
                    assert reply.status_code == 401, (method, path, headers)
                    assert reply.headers["www-authenticate"] == "Bearer"
                    assert reply.url.path in own or error_of(reply)["code"] == "invalid_api_key"
            for good in (
                {"authorization": "Bearer secret-1"},
                {"authorization": "bearer  secret-1"},
                {"x-api-key": "secret-1"},
                {"authorization": "Bearer schlüssel-2".encode()},
                {"authorization": "Bearer wrong", "x-api-key": "secret-1"},
            ):
                assert http.request(method, path, headers=good).status_code != 401, (method, path, good)
    with pytest.raises(openai.AuthenticationError), edge.client(api_key="wrong") as client:
        client.models.list()
    with edge.client(api_key="secret-1") as client:
        assert [m.id for m in client.models.list()] == ["brook"]


def test_each_key_is_a_tenant_of_its_own(make_edge: MakeEdge) -> None:
    edge = make_edge(api_key=["one", "two"])
    with edge.http() as http:
        for key in ("one", "two", "one"):
            assert http.post(CHATS, json=CHAT, headers={"x-api-key": key}).status_code == 200
    tenants = [s.tenant for s in edge.text.wait_for(Submit, 3)]
    assert tenants[0] == tenants[2] != tenants[1]
    assert all(re.fullmatch("[0-9a-f]{16}", tenant) for tenant in tenants)


def test_without_keys_nothing_is_protected(http: httpx.Client) -> None:
    assert http.get("/version").status_code == 200


# ------------------------------------------------------------------ error shapes


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/v1", 404, "not_found"),
        ("GET", "/v1/models/other/one", 404, "model_not_found"),
        ("GET", COMPLETIONS, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
        ("PUT", "/v1/models/brook", 405, "method_not_allowed"),
    ],
)
def test_wrong_places(http: httpx.Client, method: str, path: str, status: int, code: str) -> None:
    reply = http.request(method, path)
    assert reply.status_code == status
    assert error_of(reply)["code"] == code
    if status == 405:
        assert reply.headers["allow"]


@pytest.mark.parametrize("path", [CHATS, COMPLETIONS, "/tokenize", "/detokenize"])
@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"", "application/json", 400),
        (b"[]", "application/json", 400),
        (b"a=1", "application/x-www-form-urlencoded", 415),
        (b"{}", "text/plain", 415),
        (b"{}", "application/json; charset=utf-8", 400),
        (b"{}", None, 400),
    ],
)
def test_wrong_bodies(http: httpx.Client, path: str, content: bytes, kind: str | None, status: int) -> None:
    reply = http.post(path, content=content, headers={"content-type": kind} if kind else {})
    assert reply.status_code == status
    error = error_of(reply)
    assert error["type"] == "invalid_request_error"
    if content == b"{}" and status == 400:
        assert error["param"] in ("messages", "prompt", "tokens")


@pytest.mark.parametrize("path", [CHATS, COMPLETIONS, "/tokenize", "/detokenize"])
@pytest.mark.parametrize("field", ["x", "suffix", "chat_template_kwargs", "tools", "prompt"])
@pytest.mark.parametrize("depth", [3000, 100_000])
def test_json_nested_too_deeply_is_400(http: httpx.Client, path: str, field: str, depth: int, caplog: pytest.LogCaptureFixture) -> None:
    body = b'{"model":"brook","%s":%s}' % (field.encode(), b"[" * depth + b"]" * depth)
    reply = http.post(path, content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 400
    assert "deep" in error_of(reply)["message"]
    assert not [record for record in caplog.records if record.levelname != "INFO"]


def test_the_official_client_sees_its_exceptions(make_edge: MakeEdge) -> None:
    edge = make_edge()
    with edge.client() as client:
        with pytest.raises(openai.BadRequestError) as bad:
            client.chat.completions.create(model="brook", messages=[{"role": "user", "content": "hi"}], temperature=-1)
        assert (bad.value.param, bad.value.code) == ("temperature", "invalid_value")
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("nope")
        with pytest.raises(openai.BadRequestError) as later:
            client.chat.completions.create(**CHAT, extra_body={"structural_tag": "a"})  # type: ignore[call-overload]
        assert later.value.code == "unsupported_feature"


def test_failed_queries_keep_their_status(make_edge: MakeEdge) -> None:
    failure = json.dumps({"message": "No.", "type": "invalid_request_error", "code": "invalid_value", "param": "tokens"}).encode()
    edge = make_edge(text=lambda t: t.answers.update(detokenize=lambda _: (400, failure), tokenizer_info=lambda _: (500, b"?")))
    with edge.http() as http:
        reply = http.post("/detokenize", json={"tokens": [1]})
        assert (reply.status_code, error_of(reply)["param"]) == (400, "tokens")
        assert error_of(http.get("/tokenizer_info"))["code"] == "internal_error"


def raw(edge: Edge, data: bytes) -> bytes:
    """What the server answers to these bytes, until it closes."""
    with socket.create_connection(("127.0.0.1", edge.port), timeout=10) as sock:
        sock.sendall(data)
        return b"".join(iter(lambda: sock.recv(1 << 16), b""))


def test_malformed_http(shared_edge: Edge) -> None:
    for data in (b"NONSENSE\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET /\xff HTTP/1.1\r\nhost: x\r\n\r\n"):
        head, _, body = raw(shared_edge, data).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 Bad Request")
        assert json.loads(body)["error"]["type"] == "invalid_request_error"


def told(edge: Edge, line: bytes, *headers: bytes) -> tuple[bytes, dict[str, Any]]:
    """The status line's rest and the error of a request that must end the connection."""
    head, _, body = raw(edge, b"\r\n".join((line, *headers, b"", b""))).partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    return head.split(b"\r\n")[0].removeprefix(b"HTTP/1.1 "), json.loads(body)["error"]


@pytest.mark.parametrize("hosts", [(), (b"Host: a", b"Host: a"), (b"Host: a", b"host: b")])
def test_a_request_has_one_host(shared_edge: Edge, hosts: tuple[bytes, ...]) -> None:
    status, error = told(shared_edge, b"GET /version HTTP/1.1", *hosts)
    assert (status, error["param"], error["type"]) == (b"400 Bad Request", "host", "invalid_request_error")


@pytest.mark.parametrize("coding", [b"gzip, chunked", b"gzip\r\nTransfer-Encoding: chunked", b"deflate,Chunked"])
def test_only_chunked_is_a_transfer_coding(shared_edge: Edge, coding: bytes) -> None:
    status, error = told(shared_edge, b"POST /v1/completions HTTP/1.1", b"Host: x", b"Transfer-Encoding: " + coding)
    assert (status, error["param"], error["type"]) == (b"501 Not Implemented", "transfer-encoding", "invalid_request_error")


def test_chunked_in_any_spelling(shared_edge: Edge) -> None:
    body = json.dumps({"model": "brook", "prompt": "a"}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: Chunked\r\n\r\n"
    assert raw(shared_edge, head + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)).startswith(b"HTTP/1.1 200")


def test_http_1_0_needs_no_host(shared_edge: Edge) -> None:
    assert raw(shared_edge, b"GET /version HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("path", ["/v1/models", CHATS])
def test_http_1_0_gets_no_chunks(shared_edge: Edge, path: str) -> None:
    """It knows none: what a length is not told of ends with the connection."""
    body = json.dumps({**CHAT, "stream": True}).encode() if path == CHATS else b""
    line = b"%s %s HTTP/1.0\r\ncontent-length: %d\r\n\r\n" % (b"POST" if body else b"GET", path.encode(), len(body))
    head, _, reply = raw(shared_edge, line + body).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert (b"content-length" in head.lower()) is (path != CHATS)
    assert reply.startswith(b"data: {") and reply.endswith(b"\n\ndata: [DONE]\n\n") if body else json.loads(reply)["object"] == "list"
    assert raw(shared_edge, b"HEAD /schema HTTP/1.0\r\n\r\n").endswith(b"\r\n\r\n")


@pytest.mark.parametrize("version", [b"0.9", b"2.0"])
def test_other_versions_are_named(shared_edge: Edge, version: bytes) -> None:
    line = b"GET /version" if version == b"0.9" else b"GET /version HTTP/2.0"
    status, error = told(shared_edge, line, b"host: x") if version != b"0.9" else told(shared_edge, line)
    assert status == b"400 Bad Request"
    assert version.decode() in error["message"]


@pytest.mark.parametrize("offer", [b"websocket", b"h2c"])
def test_a_request_that_offers_another_protocol_keeps_its_body(shared_edge: Edge, offer: bytes) -> None:
    """As Java's and curl's clients do; what follows on the connection is answered too."""
    body = json.dumps({"model": "brook", "prompt": "a"}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: %b\r\n" % offer
    last = b"GET /version HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    plain = head + b"content-length: %d\r\n\r\n" % len(body) + body
    chunked = head + b"transfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    assert raw(shared_edge, plain + chunked + last).count(b"HTTP/1.1 200 OK") == 3


def test_garbage_writes_one_line_for_many(make_edge: MakeEdge, caplog: pytest.LogCaptureFixture) -> None:
    edge = make_edge()
    for _ in range(20):
        assert raw(edge, b"NONSENSE\r\n\r\n").startswith(b"HTTP/1.1 400")
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1


def test_options_of_the_whole_server(make_edge: MakeEdge) -> None:
    for edge in (make_edge(), make_edge(api_key="secret")):
        head, _, body = raw(edge, b"OPTIONS * HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 204")
        assert b"allow: DELETE, GET, HEAD, OPTIONS, POST" in head.split(b"\r\n")
        assert not body


def test_an_error_in_a_route_is_a_500_that_tells_nothing(make_edge: MakeEdge, caplog: pytest.LogCaptureFixture) -> None:
    edge = make_edge(text=lambda t: t.answers.update(models=lambda _: (200, b"this is no JSON")))
    with edge.http() as http:
        reply = http.get("/v1/models/x", headers={"x-request-id": "find-me"})
    assert reply.status_code == 500
    assert error_of(reply) == {
        "message": "The server made an error. It is logged with the request id.",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }
    assert "find-me" in caplog.text


# ------------------------------------------------------------------ limits


def test_body_limit(make_edge: MakeEdge) -> None:
    edge = make_edge(max_body_bytes=1000)
    with edge.http() as http:
        for size in (1001, 1900, 100_000):
            reply = http.post(COMPLETIONS, json={"model": "brook", "prompt": "x" * size})
            assert reply.status_code == 413
            assert error_of(reply)["code"] == "request_too_large"
        chunks = (b"x" * 100 for _ in range(15))
        assert http.post(COMPLETIONS, content=chunks, headers={"content-type": "application/json"}).status_code == 413
        assert http.post(COMPLETIONS, json={"model": "brook", "prompt": "x" * 900}).status_code == 200
    assert not edge.server.gateway.active


def test_a_too_large_body_is_refused_before_it_is_sent(make_edge: MakeEdge) -> None:
    edge = make_edge(max_body_bytes=1000)
    answer = raw(edge, b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 1001\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"100 Continue" not in answer


def test_header_limit(make_edge: MakeEdge) -> None:
    edge = make_edge(max_header_bytes=2000)
    with edge.http() as http:
        assert http.get("/version", headers={"x-long": "a" * 1500}).status_code == 200
        reply = http.get("/version", headers={"x-long": "a" * 2500})
        assert reply.status_code == 431
        assert error_of(reply)["code"] == "request_too_large"
    endless = raw(edge, b"GET / HTTP/1.1\r\nx-long: " + b"a" * 5000)  # a block that never ends
    assert endless.startswith(b"HTTP/1.1 431")
    assert json.loads(endless.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_too_large"


# ------------------------------------------------------------------ slow clients

SHORT_S = 0.15
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
BODY = json.dumps({"model": "brook", "prompt": "p" * 4096}).encode()


def drip(sock: socket.socket, data: bytes, size: int, pause_s: float) -> bytes:
    """Send pieces until the server says something or hangs up; what it said."""
    sock.settimeout(pause_s)
    for at in range(0, len(data), size):
        try:
            sock.sendall(data[at : at + size])
            return sock.recv(1 << 16)
        except TimeoutError:
            continue
        except ConnectionError:
            return b""
    sock.settimeout(10)
    return sock.recv(1 << 16)


@pytest.fixture(scope="module")
def hasty_edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    edge = Edge(tmp_path_factory.mktemp("hasty"), {"receive_timeout_s": SHORT_S})
    edge.start()
    yield edge
    edge.stop()


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (HEAD + b"x-endless: " + b"a" * 10_000, "head"),
        (HEAD + b"content-length: 10000\r\n\r\n" + b"{" * 10_000, "body"),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n" + b"1\r\n{\r\n" * 10_000, "body"),
    ],
)
def test_a_request_that_comes_in_drops_is_408(hasty_edge: Edge, data: bytes, what: str) -> None:
    start = data.index(b"\r\n\r\n") + 4 if what == "body" else 20
    with socket.create_connection(("127.0.0.1", hasty_edge.port)) as sock:
        sock.sendall(data[:start])
        answer = drip(sock, data[start:], 6, SHORT_S / 10)
        assert answer.startswith(b"HTTP/1.1 408 Request Timeout")
        head, _, body = answer.partition(b"\r\n\r\n")
        assert b"connection: close" in head
        error = json.loads(body)["error"]
        assert (error["type"], error["code"]) == ("invalid_request_error", "request_timeout")
        assert what in error["message"]
        with contextlib.suppress(ConnectionResetError):  # a drip that crossed the end on its way
            assert sock.recv(10) == b""
    if what == "body":  # a head that never came is no request
        name = 'http_requests_total{handler="/v1/completions",method="POST",status="408"}'
        hasty_edge.wait(lambda: hasty_edge.server.gateway.counters.read().get(name, 0) > 0, "the 408 in the counts")


@pytest.mark.parametrize("data", [b"", b"\r\n\r\n"])
def test_a_connection_without_a_request_is_closed_in_silence(hasty_edge: Edge, data: bytes) -> None:
    with socket.create_connection(("127.0.0.1", hasty_edge.port), timeout=10) as sock:
        sock.sendall(data)
        assert sock.recv(100) == b""


def test_a_body_that_nobody_waits_for_ends_too(hasty_edge: Edge) -> None:
    with socket.create_connection(("127.0.0.1", hasty_edge.port), timeout=10) as sock:
        sock.sendall(b"GET /version HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n")
        answer = b"".join(iter(lambda: sock.recv(1 << 16), b""))
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.count(b"HTTP/1.1") == 1


def test_a_slow_body_that_makes_progress_is_taken(hasty_edge: Edge) -> None:
    with socket.create_connection(("127.0.0.1", hasty_edge.port)) as sock:
        sock.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(BODY))
        began = time.monotonic()
        answer = drip(sock, BODY, len(BODY) // 8, SHORT_S / 3)
        assert answer.startswith(b"HTTP/1.1 200")
        assert time.monotonic() - began > 2 * SHORT_S


def test_a_slow_answer_is_not_the_clients_fault(make_edge: MakeEdge) -> None:
    edge = make_edge(text=lambda t: setattr(t, "script", silent), receive_timeout_s=SHORT_S)
    with socket.create_connection(("127.0.0.1", edge.port), timeout=10) as sock:
        sock.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(BODY) + BODY + HEAD[:9])  # and a second head begins behind it
        key = edge.text.wait_for(Submit)[-1].key
        sock.settimeout(2 * SHORT_S)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        sock.settimeout(10)
        edge.text.send(delta({"key": key, "text": "a", "reason": "stop"}), finished(key))
        assert sock.recv(1 << 16).startswith(b"HTTP/1.1 200")
        assert sock.recv(1 << 16).startswith(b"HTTP/1.1 408"), "the second head is late, but only after the first answer"


def test_an_idle_connection_between_requests_stays(hasty_edge: Edge) -> None:
    with socket.create_connection(("127.0.0.1", hasty_edge.port)) as sock:
        for _ in range(2):
            sock.settimeout(10)
            sock.sendall(b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n")
            assert sock.recv(1 << 16).startswith(b"HTTP/1.1 200")
            sock.settimeout(2 * SHORT_S)
            with pytest.raises(TimeoutError):
                sock.recv(1)


def test_stream_limit(make_edge: MakeEdge) -> None:
    edge = make_edge(max_streams=2, text=lambda t: setattr(t, "script", silent))
    results: list[httpx.Response] = []

    def ask() -> None:
        with edge.http() as http:
            results.append(http.post(CHATS, json=CHAT))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    keys = [s.key for s in edge.text.wait_for(Submit, 2)]
    with edge.http() as http:
        reply = http.post(CHATS, json=CHAT)
        assert (reply.status_code, reply.headers["retry-after"]) == (429, "1")
        assert error_of(reply)["code"] == "too_many_streams"
        assert http.get("/v1/models").status_code == 200
    for key in keys:
        edge.text.send(delta({"key": key, "reason": "stop"}), finished(key))
    for thread in threads:
        thread.join(10)
    assert [r.status_code for r in results] == [200, 200]
    with edge.http() as http:
        edge.text.script = lambda s: [delta({"key": s.key, "reason": "stop"}), finished(s.key)]
        assert http.post(CHATS, json=CHAT).status_code == 200


# ------------------------------------------------------------------ health, readiness, draining


def test_health_when_all_is_well(http: httpx.Client) -> None:
    assert [http.get(path).status_code for path in sorted(PUBLIC)] == [200, 200, 200, 200]


def test_not_ready_while_text_is_not(make_edge: MakeEdge) -> None:
    edge = make_edge(text=lambda t: setattr(t, "ready", False))
    edge.wait(lambda: edge.server.gateway.door().connected, "the link")
    edge.wait(lambda: "loading" in edge.server.gateway.readiness()[1], "TextReady")
    with edge.http() as http:
        assert http.get("/health/live").status_code == 200
        reply = http.get("/health/ready")
        assert (reply.status_code, reply.json()["reason"]) == (503, "the engine is loading")
        refused = http.post(CHATS, json=CHAT)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert "the engine is loading" in error_of(refused)["message"]
        assert error_of(refused)["code"] == "engine_unavailable"
        edge.text.send(TextReady(ready=True))
        edge.wait(lambda: edge.server.gateway.readiness()[0], "readiness")
        assert http.get("/health").status_code == 200
        assert http.post(CHATS, json=CHAT).status_code == 200


def test_requests_are_taken_while_an_engine_restarts_though_health_says_no(make_edge: MakeEdge) -> None:
    edge = make_edge()
    edge.text.send(TextReady(ready=False, reason="the engine is being restarted", waits=True, ages={"engine-0": 1.5}))
    edge.wait(lambda: "restarted" in edge.server.gateway.readiness()[1], "TextReady")
    with edge.http() as http:
        health = http.get("/health")
        assert (health.status_code, health.json()["reason"]) == (503, "the engine is being restarted")
        assert health.json()["ages_s"]["engine-0"] >= 1.5
        assert http.post(CHATS, json=CHAT).status_code == 200


def test_health_knows_a_silent_text_process(make_edge: MakeEdge) -> None:
    edge = make_edge()
    edge.text.beats = False
    with edge.http() as http:
        assert http.get("/health").json()["status"] == "ready"
        edge.server.gateway.door()._heard_ns -= 60_000_000_000
        health = http.get("/health")
        assert health.status_code == 503
        assert "the text process has not been heard of for" in health.json()["reason"]
        assert health.json()["ages_s"]["text"] > 59
        edge.text.send(TextReady(ready=True))
        edge.wait(lambda: edge.server.gateway.readiness()[0], "a sign of life")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETIONS, {"prompt": [1] * 1_300_000}, "prompt"),
        (COMPLETIONS, {"prompt": "a", "stop_token_ids": [1] * 700_000}, "stop_token_ids"),
        (CHATS, {"messages": [{"role": "user", "content": "a"}] * 120_000}, "messages"),
        (CHATS, {"messages": [{"role": "user", "content": "a"}] * 8193}, "messages"),
        ("/tokenize", {"prompt": "a" * 15_000_000}, "prompt"),
        ("/tokenize", {"messages": [{"role": "user", "content": "a"}] * 8193}, "messages"),
        ("/detokenize", {"tokens": [1] * 1_300_000}, "tokens"),
        ("/tokenize", {"prompt": "a", **{f"z{i}": 1 for i in range(300)}}, None),
        ("/detokenize", {"tokens": [1], **{f"z{i}": 1 for i in range(150_000)}}, None),
    ],
)
def test_what_is_too_large_never_leaves_the_edge(make_edge: MakeEdge, path: str, body: dict[str, Any], param: str | None) -> None:
    edge = make_edge()
    edge.text.send(TextReady(ready=True, limits=Limits(max_model_len=4096, max_chars=1000, context_chars=0, max_ids=5000)))
    edge.wait(lambda: edge.server.gateway.limits is not None, "limits")
    with edge.http() as http:
        reply = http.post(path, json={"model": "brook", **body})
    assert reply.status_code in (400, 413)
    assert error_of(reply)["param"] == param
    assert any(char.isdigit() for char in error_of(reply)["message"])
    assert not any(isinstance(m, Submit) or (isinstance(m, Query) and m.what in ("tokenize", "detokenize")) for m in edge.text.received)


def test_a_request_waits_for_a_text_process_that_is_about_to_be_ready(make_edge: MakeEdge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another edge may have said already that the server is ready."""
    monkeypatch.setattr(gateway, "SOON_S", 20.0)
    edge = make_edge(text=lambda t: setattr(t, "ready", False))
    edge.wait(lambda: "loading" in edge.server.gateway.readiness()[1], "TextReady")
    with concurrent.futures.ThreadPoolExecutor() as pool, edge.http() as http, edge.http() as other:
        answers = [pool.submit(client.post, CHATS, json={**CHAT, "stream": stream}) for client, stream in ((http, False), (other, True))]
        edge.wait(lambda: len(edge.server._state.tasks) == 2, "both requests")
        assert not any(answer.done() for answer in answers)
        edge.text.send(TextReady(ready=True))
        assert [answer.result(20).status_code for answer in answers] == [200, 200]


def test_an_edge_accepts_when_it_has_met_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Edges share a socket: one that could only refuse leaves connections to the others. But not for ever."""
    monkeypatch.setattr(edge_module, "JOIN_S", 20.0)
    edge = Edge(tmp_path, {})
    edge.text.ready = None
    edge._thread.start()
    assert edge.starting.wait(20)
    edge.wait(lambda: edge.server.gateway.door().connected, "the link")
    assert edge.server._servers == []
    edge.text.send(TextReady(ready=False, reason="the engine is loading"))
    edge.wait(lambda: len(edge.server._servers) == 1, "the socket")
    edge.stop()
    monkeypatch.setattr(edge_module, "JOIN_S", 0.01)
    (tmp_path / "text-0.sock").unlink(missing_ok=True)
    alone = Edge(tmp_path, {})
    alone.text.ready = None
    alone._thread.start()
    assert alone._up.wait(20)
    with alone.http() as http:
        assert http.get("/health").status_code == 503
    alone.stop()


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_waits_for_a_link_that_is_being_dialled(make_edge: MakeEdge, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    """A new text process is met by one edge after another: the first may have said already that the server is ready."""
    monkeypatch.setattr(gateway, "SOON_S", 20.0)
    edge = make_edge()
    edge.text.close_door()
    edge.text.drop_links()
    edge.wait(lambda: not edge.server.gateway.door().connected, "the link's end")
    with concurrent.futures.ThreadPoolExecutor() as pool, edge.http() as http:
        answer = pool.submit(http.post, CHATS, json={**CHAT, "stream": stream})
        edge.wait(lambda: len(edge.server._state.tasks) == 1, "the request")
        assert not answer.done()
        edge.text.open_door()
        assert answer.result(20).status_code == 200


def test_while_draining_nobody_waits_for_text(make_edge: MakeEdge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "SOON_S", 3600.0)
    edge = make_edge()
    edge.text.close_door()
    edge.text.drop_links()
    edge.wait(lambda: not edge.server.gateway.door().connected, "the link's end")
    asyncio.run_coroutine_threadsafe(edge.server.drain(1.0), edge.loop).result(10)
    with edge.http() as http:
        assert error_of(http.post(CHATS, json=CHAT))["code"] == "draining"


def test_without_a_text_process(make_edge: MakeEdge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "SOON_S", 0.05)
    edge = make_edge()
    edge.text.close_door()
    edge.text.drop_links()
    edge.wait(lambda: not edge.server.gateway.door().connected, "the link's end")
    with edge.http() as http:
        assert http.get("/health/live").status_code == 200
        assert http.get("/health").status_code == 503
        assert http.get("/health/decode").status_code == 503
        assert http.get("/v1/models").status_code == 503
        assert http.post(CHATS, json=CHAT).status_code == 503
        metrics = http.get("/metrics")
        assert metrics.status_code == 200
        assert 'http_requests_total{handler="/v1/models",method="GET",status="503"} 1' in metrics.text


def test_decode_health_is_texts_word(make_edge: MakeEdge) -> None:
    edge = make_edge(text=lambda t: t.answers.update(health=lambda _: (503, b'{"status":"stalled"}')))
    with edge.http() as http:
        reply = http.get("/health/decode")
    assert (reply.status_code, reply.json()) == (503, {"status": "stalled"})


def test_drain_finishes_what_runs_and_refuses_the_rest(make_edge: MakeEdge) -> None:
    edge = make_edge(text=lambda t: setattr(t, "script", silent))
    results: list[httpx.Response] = []

    def ask() -> None:
        with edge.http() as http:
            results.append(http.post(CHATS, json=CHAT | {"stream": True}))

    thread = threading.Thread(target=ask)
    thread.start()
    key = edge.text.wait_for(Submit)[0].key
    drained = asyncio.run_coroutine_threadsafe(edge.server.drain(20.0), edge.loop)
    edge.wait(lambda: edge.server.gateway.draining, "draining")
    with edge.http() as http:
        refused = http.post(CHATS, json=CHAT)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
        assert error_of(refused)["code"] == "draining"
        assert http.get("/health/ready").status_code == 503
        assert http.get("/health/live").status_code == 200
    assert not drained.done()
    edge.text.send(delta({"key": key, "text": "done", "reason": "stop"}), finished(key))
    drained.result(10)
    thread.join(10)
    assert results[0].text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("path", ["/tokenizer_info", "/metrics", "/v1/models"])
def test_questions_are_answered_when_the_drains_time_is_over(make_edge: MakeEdge, path: str) -> None:
    """By a text process that answers no more; before the end and after it."""
    edge = make_edge(text=lambda t: [t.answers.pop(name) for name in ("tokenizer_info", "metrics", "models")])
    edge.text.script = silent
    with concurrent.futures.ThreadPoolExecutor() as pool, edge.http() as http, edge.http() as other, edge.http() as later:
        running = pool.submit(other.post, CHATS, json=CHAT)
        edge.text.wait_for(Submit)
        answer = pool.submit(http.get, path)
        edge.text.wait_for(Query, 2)
        asyncio.run_coroutine_threadsafe(edge.server.drain(0.05), edge.loop).result(10)
        for reply in (running.result(10), answer.result(10), later.get(path)):
            assert (reply.status_code, error_of(reply)["code"]) == (503, "draining")
            assert reply.headers["retry-after"]


def test_a_question_does_not_outlive_a_stop(make_edge: MakeEdge, caplog: pytest.LogCaptureFixture) -> None:
    edge = make_edge(text=lambda t: t.answers.pop("tokenizer_info"))
    with concurrent.futures.ThreadPoolExecutor() as pool, edge.http() as http:
        answer = pool.submit(http.get, "/tokenizer_info")
        edge.text.wait_for(Query, 2)
        asyncio.run_coroutine_threadsafe(edge.server.stop(), edge.loop).result(10)
        reply = answer.result(10)
        assert (reply.status_code, error_of(reply)["code"]) == (503, "draining")
    assert not [r for r in caplog.records if r.levelname == "ERROR"]


@pytest.mark.parametrize("path", [CHATS, COMPLETIONS, "/tokenize", "/detokenize"])
@pytest.mark.parametrize("framing", [b"content-length: 100\r\n\r\n{", b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n"])
def test_a_request_that_is_still_being_sent_at_the_end_is_told(
    make_edge: MakeEdge, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, path: str, framing: bytes
) -> None:
    monkeypatch.setattr(edge_module, "GOODBYE_S", 0.1)
    edge = make_edge()
    with socket.create_connection(("127.0.0.1", edge.port), timeout=10) as sock:
        sock.sendall(b"POST %s HTTP/1.1\r\nhost: x\r\n" % path.encode() + framing)
        edge.wait(lambda: len(edge.server._state.tasks) == 1, "the request")
        asyncio.run_coroutine_threadsafe(edge.server.stop(), edge.loop).result(10)
        answer = b"".join(iter(lambda: sock.recv(1 << 16), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
    assert b"retry-after: 2" in head
    assert json.loads(body)["error"]["code"] == "draining"
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    name = f'http_requests_total{{handler="{path}",method="POST",status="503"}}'
    assert edge.server.gateway.counters.read()[name] == 1


def test_the_connection_limit_writes_one_line_for_many(make_edge: MakeEdge, caplog: pytest.LogCaptureFixture) -> None:
    edge = make_edge(max_streams=1)
    edge.text.script = silent
    with concurrent.futures.ThreadPoolExecutor() as pool, edge.http() as http, edge.http() as other:
        running = pool.submit(http.post, CHATS, json=CHAT)
        edge.text.wait_for(Submit)
        assert [other.post(CHATS, json=CHAT).status_code for _ in range(5)] == [429] * 5
        lines = [r.getMessage() for r in caplog.records if "--max-streams" in r.getMessage()]
        assert lines == ["1 requests refused: 1 are in progress at this edge (--max-streams 1)"]
        edge.server.gateway._refused_at_ns -= 60_000_000_000
        assert other.post(CHATS, json=CHAT).status_code == 429
        assert "5 requests refused" in [r.getMessage() for r in caplog.records if "--max-streams" in r.getMessage()][-1]
        asyncio.run_coroutine_threadsafe(edge.server.drain(0.05), edge.loop).result(10)
        running.result(10)


def test_drain_deadline_ends_the_rest(make_edge: MakeEdge) -> None:
    edge = make_edge(text=lambda t: setattr(t, "script", silent))
    results: list[httpx.Response] = []

    def ask() -> None:
        with edge.http() as http:
            results.append(http.post(CHATS, json=CHAT))

    thread = threading.Thread(target=ask)
    thread.start()
    edge.text.wait_for(Submit)
    asyncio.run_coroutine_threadsafe(edge.server.drain(0.05), edge.loop).result(10)
    thread.join(10)
    assert (results[0].status_code, error_of(results[0])["code"]) == (503, "draining")
    assert edge.text.wait_for(Cancel)[0].cause == "drain"


@pytest.mark.parametrize("how", ["a nearer deadline", "stop"])
def test_whatever_ends_a_drain_early_each_stream_is_told(make_edge: MakeEdge, how: str) -> None:
    edge = make_edge(text=lambda t: setattr(t, "script", silent))
    results: list[httpx.Response] = []

    def ask() -> None:
        with edge.http() as http:
            results.append(http.post(CHATS, json=CHAT | {"stream": True}))

    thread = threading.Thread(target=ask)
    thread.start()
    edge.text.wait_for(Submit)
    drained = asyncio.run_coroutine_threadsafe(edge.server.drain(60.0), edge.loop)
    edge.wait(lambda: edge.server.gateway.draining, "draining")
    if how == "stop":
        asyncio.run_coroutine_threadsafe(edge.server.stop(), edge.loop).result(10)
    else:
        edge.loop.call_soon_threadsafe(edge.server.drain_within, 0.0)
        assert drained.result(10) == 1
    thread.join(10)
    assert json.loads(results[0].text.split("data: ")[-1])["error"]["code"] == "draining"
    assert edge.text.wait_for(Cancel)[0].cause == "drain"


# ------------------------------------------------------------------ headers, pages, metrics


def test_request_id_is_taken_if_sane_and_made_if_not(http: httpx.Client, shared_edge: Edge) -> None:
    mine = http.post(CHATS, json=CHAT, headers={"x-request-id": "job-7:a"})
    assert mine.headers["x-request-id"] == "job-7:a"
    assert mine.json()["id"] == "chatcmpl-job-7:a0"
    assert shared_edge.text.wait_for(Submit)[-1].rid == "job-7:a"
    for bad in ("a b", "x" * 200, "<script>", ""):
        made = http.get("/version", headers={"x-request-id": bad}).headers["x-request-id"]
        assert re.fullmatch("[0-9a-f]{32}", made)
    named = http.post(CHATS, json=CHAT | {"request_id": "from-the-body"})
    assert named.headers["x-request-id"] == "from-the-body"


@pytest.mark.parametrize(
    ("path", "body"),
    [(CHATS, CHAT), (COMPLETIONS, {"prompt": "hi"}), ("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})],
)
def test_strict_fields_refuses_what_nobody_knows(make_edge: MakeEdge, path: str, body: dict[str, Any]) -> None:
    http = make_edge(strict_fields=True).kept
    assert http.post(path, json=body).status_code == 200
    error = http.post(path, json=body | {"zz": 1, "temprature": 2}).json()["error"]
    assert (error["param"], error["code"]) == ("temprature", "invalid_value")
    assert error["message"] == "Fields that nobody knows here are refused (--strict-fields): temprature, zz. Leave them out."
    many = http.post(path, json=body | {f"{i:02}" + "z" * 100: 1 for i in range(20)})
    assert many.status_code == 400
    assert "and 12 more" in many.json()["error"]["message"]
    if path in (CHATS, COMPLETIONS):
        options = {"stream": True, "stream_options": {"zz": 1}}
        assert http.post(path, json=body | options).json()["error"]["param"] == "stream_options.zz"
        hints = {"user": "u", "metadata": {"a": "b"}, "stream_options": {"include_obfuscation": False}, "stream": True}
        assert http.post(path, json=body | hints).status_code == 200


def test_ignored_fields_are_named(http: httpx.Client) -> None:
    tool = {"type": "function", "foo": 1, "function": {"name": "f", "bar-baz": 2, "a, b": 3}}
    reply = http.post(CHATS, json=CHAT | {"tools": [tool]})
    assert reply.headers["x-penstock-ignored-fields"] == "tools[0].foo, tools[0].function.bar-baz, ?"
    reply = http.post(CHATS, json=CHAT | {"temprature": 0.5, "evil\r\nheader": 1})
    assert reply.status_code == 200
    assert reply.headers["x-penstock-ignored-fields"] == "?, temprature"
    assert reply.headers["x-penstock-warning"] == "ignored, as nobody here knows them: ?, temprature"
    assert "x-penstock-ignored-fields" not in http.post(CHATS, json=CHAT).headers


def test_processing_time_and_date(http: httpx.Client) -> None:
    reply = http.post(CHATS, json=CHAT)
    assert int(reply.headers["openai-processing-ms"]) < 5000
    assert reply.headers["date"].endswith("GMT")
    assert "server" not in reply.headers


def test_metrics_in_the_reply_on_request(http: httpx.Client) -> None:
    got = http.post(CHATS, json=CHAT, headers={"x-include-metrics": "1"}).json()["metrics"]
    assert (got["queue_ms"], got["prefill_ms"], got["decode_ms"], got["preemptions"]) == (1.0, 2.0, 3.0, 0)
    assert all(isinstance(value, int | float) for value in got.values())
    assert "metrics" not in http.post(CHATS, json=CHAT).json()
    *_, last, done = events(http.post(CHATS, json=CHAT | {"stream": True}, headers={"x-include-metrics": "1"}).text)
    assert (last["choices"], last["metrics"]["queue_ms"], "usage" in last, done) == ([], 1, False, "[DONE]")


@pytest.mark.parametrize("path", [CHATS, COMPLETIONS])
def test_metrics_in_a_stream_need_nothing_else(http: httpx.Client, path: str) -> None:
    body = (CHAT if path == CHATS else {"prompt": "hi"}) | {"stream": True}
    *_, last, done = events(http.post(path, json=body, headers={"x-include-metrics": "1"}).text)
    assert (last["choices"], last["metrics"]["queue_ms"], "usage" in last, done) == ([], 1.0, False, "[DONE]")
    *_, last, done = events(http.post(path, json=body).text)
    assert last["choices"][0]["finish_reason"] == "stop"


def test_several_prompts_in_one_reply(http: httpx.Client) -> None:
    reply = http.post(COMPLETIONS, json={"prompt": ["a", [1, 2][0:0] or "b"], "n": 2}).json()
    assert [c["index"] for c in reply["choices"]] == [0, 1, 2, 3]
    assert reply["model"] == "brook"  # none was named: the default
    assert reply["usage"]["prompt_tokens"] == 6


def test_small_pages(http: httpx.Client, shared_edge: Edge) -> None:
    assert http.get("/version").json() == {"version": __version__}
    assert http.get("/tokenizer_info").json() == {"tokenizer_class": "Fake"}
    assert http.post("/detokenize", json={"tokens": [1, 2]}).json()["prompt"] == "x"
    assert http.post("/tokenize", json={"prompt": "a", "model": "brook", "zz": 1}).headers["x-penstock-ignored-fields"] == "zz"
    query = [q for q in shared_edge.text.wait_for(Query) if q.what == "tokenize"][-1]
    assert json.loads(query.body) == {"prompt": "a", "model": "brook"}
    for body in ({}, {"prompt": "a", "messages": CHAT["messages"]}):
        assert http.post("/tokenize", json=body).status_code == 400
    assert http.get("/v1/models/brook").json()["id"] == "brook"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        *((path, 200) for path in ("/health", "/health/live", "/health/ready", "/health/decode", "/version", "/metrics")),
        *((path, 200) for path in (CHATS, "/v1/models", "/v1/models/brook", "/schema")),
        *((path, 404) for path in ("/nowhere", "/v1/models/nobody")),
        *((path, 405) for path in (COMPLETIONS, "/tokenize")),
    ],
)
def test_head_is_get_without_the_body(http: httpx.Client, shared_edge: Edge, path: str, status: int) -> None:
    head = http.head(path)
    assert (head.status_code, head.content) == (status, b"")
    whole = http.get(path)
    assert (whole.status_code, len(whole.content) > 0) == (status, True)
    assert head.headers["content-type"] == whole.headers["content-type"]
    answer = raw(shared_edge, b"HEAD %s HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n" % path.encode())
    assert answer.endswith(b"\r\n\r\n")
    assert answer.count(b"\r\n\r\n") == 1, "nothing follows the head"
    if status == 405:
        assert whole.headers["allow"] == "OPTIONS, POST"
    name = f'method="HEAD",status="{status}"'
    assert any(name in counter for counter in shared_edge.counters())


def test_what_may_be_done_names_head(http: httpx.Client) -> None:
    reply = http.post("/version")
    assert (reply.status_code, reply.headers["allow"]) == (405, "GET, HEAD, OPTIONS")


@pytest.mark.parametrize("path", ["/version", "/v1/models", "/v1/models/brook", CHATS, "/tokenize", "/health"])
def test_options_and_405_agree(http: httpx.Client, path: str) -> None:
    allowed = http.options(path).headers["allow"]
    assert allowed == http.delete(path).headers["allow"]
    assert ("HEAD" in allowed) == (http.head(path).status_code != 405)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHATS, CHAT),
        (COMPLETIONS, {"prompt": "a"}),
        ("/v1/responses", {"input": "a"}),
        ("/v1/messages", CHAT | {"max_tokens": 5}),
        ("/inference/v1/generate", {"token_ids": [1], "sampling_params": {}}),
    ],
)
def test_a_model_without_a_name_is_none(http: httpx.Client, path: str, body: dict[str, Any], stream: bool) -> None:
    reply = http.post(path, json={**body, "model": "", "stream": stream})
    assert (reply.status_code, "'' does not exist here" in reply.json()["error"]["message"]) == (404, True)
    assert http.post(path, json={**body, "model": "brook", "stream": stream}).status_code == 200


@pytest.mark.parametrize(("path", "body"), [("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})])
def test_the_token_pages_know_their_models(http: httpx.Client, path: str, body: dict[str, Any]) -> None:
    for model in ("brook", None):
        assert http.post(path, json={**body, "model": model}).status_code == 200
    assert error_of(http.post(path, json={**body, "model": ""}))["code"] == "model_not_found"
    reply = http.post(path, json={**body, "model": "gpt-9"})
    assert reply.status_code == 404
    error = error_of(reply)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "brook" in error["message"]


def test_openapi_document(http: httpx.Client) -> None:
    document = http.get("/schema/openapi.json").json()
    body = document["paths"][CHATS]["post"]["requestBody"]["content"]["application/json"]["schema"]
    name = body["$ref"].rsplit("/", 1)[1]
    assert "messages" in document["components"]["schemas"][name]["properties"]
    assert set(document["paths"]) >= {CHATS, COMPLETIONS, "/v1/models", "/health/ready", "/metrics"}
    page = http.get("/schema")
    assert page.headers["content-type"].startswith("text/html")
    assert CHATS in page.text
    assert "http://" not in page.text.replace("http://www.w3.org", "")
    assert "https://" not in page.text


def test_metrics_reach_text_before_they_are_asked(make_edge: MakeEdge) -> None:
    edge = make_edge()
    with edge.http() as http:
        http.post(CHATS, json=CHAT)
        http.get("/nowhere")
        reply = http.get("/metrics")
    assert reply.text == "penstock_up 1\n"
    assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    counters = edge.text.wait_for(EdgeStats)[-1].counters
    assert counters[f'http_requests_total{{handler="{CHATS}",method="POST",status="200"}}'] == 1
    assert counters['http_requests_total{handler="other",method="GET",status="404"}'] == 1
    assert counters[f'http_request_duration_seconds_count{{handler="{CHATS}",method="POST"}}'] == 1
    assert counters[f'http_request_duration_seconds_bucket{{handler="{CHATS}",method="POST",le="+Inf"}}'] == 1
    order = [type(m).__name__ for m in edge.text.received if isinstance(m, EdgeStats) or (isinstance(m, Query) and m.what == "metrics")]
    assert order[-2:] == ["EdgeStats", "Query"]
