"""CORS as the Fetch standard has it: off by default, preflights without a key, headers on every reply to an allowed origin."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from edge_kit import Edge, MakeEdge

from penstock.core.protocol.messages import Message, Rejected, Submit
from penstock.transports.http import PUBLIC

CHATS = "/v1/chat/completions"
CHAT: dict[str, Any] = {"model": "brook", "messages": [{"role": "user", "content": "hi"}]}
PAGE = "https://page.example"
ASK = {"origin": PAGE, "access-control-request-method": "POST", "access-control-request-headers": "authorization, content-type"}

BODIES = [
    (CHATS, CHAT),
    ("/v1/completions", {"prompt": "a"}),
    ("/v1/responses", {"input": "a"}),
    ("/v1/messages", {"model": "brook", "max_tokens": 5, "messages": CHAT["messages"]}),
    ("/", {"inputs": "a"}),
]


def cors(reply: httpx.Response) -> dict[str, str]:
    return {name: value for name, value in reply.headers.items() if name.startswith("access-control-")}


def test_off_by_default(edge: Edge) -> None:
    with edge.http() as http:
        assert cors(http.post(CHATS, json=CHAT, headers={"origin": PAGE})) == {}
        asked = http.options(CHATS, headers=ASK)
        assert (asked.status_code, cors(asked)) == (204, {})
        assert "POST" in asked.headers["allow"]


@pytest.mark.parametrize("origins", [[PAGE], [PAGE, "http://localhost:3000"], ["*"]])
def test_an_allowed_page_may_ask_and_send(make_edge: MakeEdge, origins: list[str]) -> None:
    edge = make_edge(allowed_origins=origins, api_key=["secret"])
    with edge.http() as http:
        asked = http.options(CHATS, headers=ASK)
        assert asked.status_code == 204
        assert not {"content-length", "content-type"} & set(asked.headers)
        assert asked.headers["access-control-allow-origin"] == ("*" if "*" in origins else PAGE)
        assert asked.headers["access-control-allow-methods"] == "POST"
        assert asked.headers["access-control-allow-headers"] == "authorization, content-type"
        assert int(asked.headers["access-control-max-age"]) > 0
        for stream in (False, True):
            reply = http.post(CHATS, json={**CHAT, "stream": stream}, headers={"origin": PAGE, "authorization": "Bearer secret"})
            assert reply.status_code == 200
            assert reply.headers["access-control-allow-origin"] == ("*" if "*" in origins else PAGE)
            assert "x-request-id" in reply.headers["access-control-expose-headers"]
            assert "retry-after" in reply.headers["access-control-expose-headers"]
        refused = http.post(CHATS, json=CHAT, headers={"origin": PAGE})
        assert refused.status_code == 401, "CORS opens no door"
        assert "access-control-allow-origin" in refused.headers, "but the page may read why"
        wrong = http.post(CHATS, json={"model": "brook"}, headers={"origin": PAGE, "authorization": "Bearer secret"})
        assert (wrong.status_code, "access-control-allow-origin" in wrong.headers) == (400, True)


def test_another_page_gets_nothing(make_edge: MakeEdge) -> None:
    edge = make_edge(allowed_origins=[PAGE])
    with edge.http() as http:
        for origin in ("https://other.example", PAGE + ".evil.example", "null", PAGE.upper()):
            asked = http.options(CHATS, headers={**ASK, "origin": origin})
            assert cors(asked) == {}
            reply = http.post(CHATS, json=CHAT, headers={"origin": origin})
            assert cors(reply) == {}
            assert "origin" in reply.headers["vary"], "a cache must not hand this reply to the allowed page"
        assert "origin" in http.post(CHATS, json=CHAT).headers["vary"]


def test_with_credentials_the_origin_is_named(make_edge: MakeEdge) -> None:
    edge = make_edge(allowed_origins=["*"], allow_credentials=True)
    with edge.http() as http:
        reply = http.post(CHATS, json=CHAT, headers={"origin": PAGE})
        assert reply.headers["access-control-allow-origin"] == PAGE, "a star is not allowed beside credentials"
        assert reply.headers["access-control-allow-credentials"] == "true"
        assert "origin" in reply.headers["vary"]


def test_methods_and_headers_may_be_limited(make_edge: MakeEdge) -> None:
    edge = make_edge(allowed_origins=[PAGE], allowed_methods=["GET", "POST"], allowed_headers=["authorization"])
    with edge.http() as http:
        asked = http.options(CHATS, headers=ASK)
        assert asked.headers["access-control-allow-methods"] == "GET, POST"
        assert asked.headers["access-control-allow-headers"] == "authorization"


def test_plain_options_needs_no_key(make_edge: MakeEdge) -> None:
    edge = make_edge(api_key=["secret"])
    with edge.http() as http:
        reply = http.options(CHATS)
        assert (reply.status_code, reply.content) == (204, b"")
        assert "POST" in reply.headers["allow"]
        assert http.options("/nothing/here").status_code == 404
        assert http.post(CHATS, json=CHAT).status_code == 401


SDKS = (
    "authorization, x-api-key, content-type, accept, anthropic-version, anthropic-beta, anthropic-dangerous-direct-browser-access, openai-organization,"
    " openai-project, x-request-id, x-include-metrics, idempotency-key, x-stainless-lang, x-stainless-package-version, x-stainless-os, x-stainless-arch,"
    " x-stainless-runtime, x-stainless-runtime-version, x-stainless-retry-count, x-stainless-timeout, x-stainless-helper-method"
)
"""What the SDKs of OpenAI and Anthropic send from pages."""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    one = Edge(tmp_path_factory.mktemp("edge"), {"allowed_origins": [PAGE], "api_key": ["secret"]}).start()
    yield one
    one.stop()


def routes(edge: Edge) -> list[tuple[str, str]]:
    paths = edge.kept.get("/schema/openapi.json", headers={"x-api-key": "secret"}).json()["paths"]
    return [(re.sub(r"{[^}]*}", "a", path), method.upper()) for path, methods in paths.items() for method in methods if method != "options"]


def test_every_route_takes_the_headers_that_sdks_send_from_pages(page: Edge) -> None:
    found = routes(page)
    assert {("/v1/messages", "POST"), ("/v1/responses/a", "DELETE"), ("/v1/files/a/content", "GET"), ("/generate", "POST")} <= set(found)
    for path, method in [*found, ("/nothing/here", "POST")]:
        asked = page.kept.options(path, headers={**ASK, "access-control-request-method": method, "access-control-request-headers": SDKS})
        assert asked.status_code == 204, path
        allowed = {name: asked.headers[f"access-control-allow-{name}"] for name in ("origin", "methods", "headers")}
        assert allowed == {"origin": PAGE, "methods": method, "headers": SDKS}, path


def test_a_page_may_read_every_error(page: Edge) -> None:
    """Whatever makes it, in whatever shape; without a key and with one."""
    for path, method in [*routes(page), ("/nothing/here", "POST"), ("/v1/models", "PATCH")]:
        for keyed in ({}, {"authorization": "Bearer secret"}, {"x-api-key": "secret"}, {"x-api-key": "wrong"}):
            reply = page.kept.request(method, path, content=b"[]", headers={"origin": PAGE, "content-type": "application/json", **keyed})
            assert (reply.status_code == 401) == ("secret" not in str(keyed) and path not in PUBLIC and method != "PATCH"), (path, keyed)
            assert reply.headers["access-control-allow-origin"] == PAGE, (path, reply.status_code)
            unread = set(reply.headers) - set(reply.headers["access-control-expose-headers"].split(", ")) - READ_ANYWAY
            assert not unread, (path, reply.status_code)


READ_ANYWAY = {
    "cache-control",
    "content-length",
    "content-type",
    "date",
    "connection",
    "vary",
    "transfer-encoding",
    "x-accel-buffering",
} | {f"access-control-{name}" for name in ("allow-origin", "expose-headers")}
"""Safe by the Fetch standard, or nothing to a page."""


@pytest.mark.parametrize(("status", "code"), [(429, "queue_full"), (500, "internal_error"), (503, "engine_unavailable")])
@pytest.mark.parametrize(("path", "body"), BODIES)
@pytest.mark.parametrize("stream", [False, True])
def test_a_page_may_read_what_text_refuses(page: Edge, path: str, body: dict[str, Any], status: int, code: str, stream: bool) -> None:
    def play(submit: Submit) -> list[Message]:
        return [Rejected(key=submit.key, status=status, type="server_error", code=code, message="Busy.", retry_after_s=3)]

    page.text.script = play
    reply = page.kept.post(path, json=body | {"stream": stream}, headers={"origin": PAGE, "x-api-key": "secret"})
    assert reply.status_code in (status, 529), reply.text
    assert reply.headers["access-control-allow-origin"] == PAGE
    assert {"retry-after", "x-request-id", "request-id"} <= set(reply.headers["access-control-expose-headers"].split(", "))
    if status != 500:
        assert reply.headers["retry-after"] == "3"


def test_a_page_may_read_that_it_was_too_slow(make_edge: MakeEdge) -> None:
    """An answer that is given before the application has one."""
    edge = make_edge(allowed_origins=[PAGE], receive_timeout_s=0.2)
    with socket.create_connection(("127.0.0.1", edge.port), timeout=20) as sock:
        sock.sendall(f"POST {CHATS} HTTP/1.1\r\nHost: x\r\nOrigin: {PAGE}\r\nContent-Length: 10\r\n\r\n{{".encode())
        answer = b"".join(iter(lambda: sock.recv(65536), b"")).lower()
    assert answer.startswith(b"http/1.1 408 ")
    assert f"access-control-allow-origin: {PAGE}\r\n".encode() in answer
    assert b"x-request-id: " in answer


@pytest.mark.parametrize("name", ["authorization", "x-api-key"])
def test_a_key_that_is_given_twice_opens_nothing(make_edge: MakeEdge, name: str) -> None:
    """Whoever stands before the server may have looked at the other one."""
    edge = make_edge(api_key=["secret"])
    good, bad = ("Bearer secret", "Bearer other") if name == "authorization" else ("secret", "other")
    with edge.http() as http:
        assert http.get("/v1/models", headers=[(name, good)]).status_code == 200
        for pair in ((good, bad), (bad, good), (good, good)):
            reply = http.get("/v1/models", headers=[(name, one) for one in pair])
            assert reply.status_code == 401
            assert f"{name} is given more than once" in reply.text
