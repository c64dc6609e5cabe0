"""CORS as the Fetch standard has it: off by default, preflights without a key, headers on every reply to an allowed origin."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from edge_kit import Edge, MakeEdge

CHATS = "/v1/chat/completions"
CHAT: dict[str, Any] = {"model": "brook", "messages": [{"role": "user", "content": "hi"}]}
PAGE = "https://page.example"
ASK = {"origin": PAGE, "access-control-request-method": "POST", "access-control-request-headers": "authorization, content-type"}


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
