"""/server_info, and DELETE /v1/requests: a running request is ended from outside, by its tenant or an administrator alone."""

from __future__ import annotations

import concurrent.futures
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from edge_kit import SERVER_INFO, Edge, MakeEdge, delta, finished

from penstock.core.protocol.messages import Message, Query, Submit
from penstock.core.protocol.tables import INFERENCE, Principal
from penstock.transports import ids
from penstock.transports import openapi_replies as replies
from penstock.transports.anthropic_voice import MessagesVoice
from penstock.transports.keyring import Keyring
from penstock.transports.openai import parse_chat, parse_completion
from penstock.transports.openai_voice import ChatVoice, CompletionVoice
from penstock.transports.voice import Head

CHATS = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]


def found(asked: bytes) -> tuple[int, bytes]:
    """Text has a request r1."""
    here = json.loads(asked)["rid"] == "r1"
    return (200, b'{"prompts":1}') if here else (404, b'{"message":"No.","type":"x","code":"not_found"}')


@pytest.fixture
def edge(make_edge: MakeEdge) -> Edge:
    edge = make_edge(text=lambda t: setattr(t, "script", lambda submit: [delta({"key": submit.key, "text": "Hel"})]))
    edge.text.answers["control"] = found
    return edge


def ended(key: int) -> list[Message]:
    extra = {"error": "The request was cancelled.", "error_code": "cancelled"}
    return [delta({"key": key, "tokens": [], "reason": "abort", "extra": extra}), finished(key)]


@pytest.mark.parametrize(
    ("path", "body", "last"),
    [
        (
            CHATS,
            {"messages": HI, "stream": True},
            'data: {"error":{"message":"The request was cancelled.","type":"cancelled_error","param":null,"code":"cancelled"}}\n\n',
        ),
        (
            "/v1/messages",
            {"model": "brook", "max_tokens": 9, "messages": HI, "stream": True},
            'data: {"type":"error","error":{"type":"invalid_request_error","message":"The request was cancelled."},"request_id":"r1"}\n\n',
        ),
        ("/generate_stream", {"inputs": "hi"}, 'data: {"error":"The request was cancelled.","error_type":"cancelled"}\n\n'),
    ],
)
def test_a_stream_that_is_cancelled_ends_with_an_error(edge: Edge, path: str, body: dict[str, Any], last: str) -> None:
    with edge.http() as http, edge.http() as other, http.stream("POST", path, json=body, headers={"x-request-id": "r1"}) as reply:
        rest = reply.iter_text()
        first = next(rest)
        gone = other.delete("/v1/requests/r1")
        assert (gone.status_code, gone.text) == (200, '{"id":"r1","object":"request","cancelled":true}')
        edge.text.send(*ended(edge.text.wait_for(Submit)[0].key))
        assert (first + "".join(rest)).endswith(last)
    edge.wait(lambda: edge.server.gateway.active == 0, "the place to be given back")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHATS, {"messages": HI}),
        (CHATS, {"messages": HI, "n": 2}),
        ("/v1/messages", {"model": "brook", "max_tokens": 9, "messages": HI}),
        ("/generate", {"inputs": "hi"}),
    ],
)
def test_a_whole_reply_that_is_cancelled_is_499(edge: Edge, path: str, body: dict[str, Any]) -> None:
    with edge.http() as http, concurrent.futures.ThreadPoolExecutor(1) as pool:
        reply = pool.submit(http.post, path, json=body)
        edge.text.send(*ended(edge.text.wait_for(Submit)[0].key))
        assert reply.result(20).status_code == 499
        assert "cancelled" in reply.result().text
    assert edge.server.gateway.active == 0


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("chatcmpl-r10", ["r1"]),
        ("cmpl-r10", ["r1"]),
        ("msg_r10", ["r1"]),
        ("r1", ["r1"]),
        ("chatcmpl-r1z", ["chatcmpl-r1z"]),
        ("chatcmpl-a/b0", ["a/b", "chatcmpl-a/b0"]),
        ("r10", ["r10"]),
    ],
)
def test_which_request_an_id_names(edge: Edge, name: str, asked: list[str]) -> None:
    reply = edge.kept.delete(f"/v1/requests/{name}")
    assert [json.loads(query.body)["rid"] for query in edge.text.wait_for(Query) if query.what == "control"] == asked
    if asked[0] == "r1":
        assert msgspec.convert(reply.json(), replies.CancelReply) == replies.CancelReply(id=name, object="request", cancelled=True)
    else:
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "not_found")


def test_an_id_may_be_as_long_as_it_likes(edge: Edge) -> None:
    assert edge.kept.delete("/v1/requests/" + "x" * 4000).status_code == 404


def test_an_error_of_text_is_passed_on(edge: Edge) -> None:
    edge.text.answers["control"] = lambda _: (400, b'{"message":"Strange.","type":"x","code":"invalid_value"}')
    assert edge.kept.delete("/v1/requests/r1").status_code == 400


@pytest.mark.parametrize(
    ("principal", "tenant"),
    [
        (Principal(tenant="a", scopes=frozenset({INFERENCE})), "a"),
        (Principal(scopes=frozenset({INFERENCE})), ""),
        (Principal(tenant="a"), None),
        (Principal(), None),
    ],
)
def test_text_is_told_in_whose_name(edge: Edge, monkeypatch: pytest.MonkeyPatch, principal: Principal, tenant: str | None) -> None:
    """Who may do everything may end everybody's request."""
    monkeypatch.setattr(Keyring, "find", lambda *_: principal)
    monkeypatch.setattr(edge.server.app.keyring, "locked", True)
    edge.kept.delete("/v1/requests/r1")
    assert json.loads(edge.text.wait_for(Query)[-1].body) == {"rid": "r1", "tenant": tenant, "own": principal.tenant, "do": "cancel"}


def test_every_voices_ids_are_known(tmp_path: Path) -> None:
    head = Head(ids.public_id("", "r1", 3), 0, "brook", None)
    chat = parse_chat(json.dumps({"messages": HI}).encode(), Edge(tmp_path, {}).config)
    text = parse_completion(b'{"prompt":"x"}', Edge(tmp_path, {}).config)
    for voice in (ChatVoice(chat), CompletionVoice(text), MessagesVoice()):
        assert ids.split(voice.begin(head)) == ("r1", 3)
    for other in ("", "r13", "chatcmpl-", "chatcmpl-r_"):
        assert ids.split(other) is None


def test_server_info(edge: Edge) -> None:
    told = edge.kept.get("/server_info").json()
    info = msgspec.convert(told, replies.ServerInfoReply)
    assert info.scheduling == replies.Scheduling(policy="fcfs", priority="lower first", itl_target_ms=None, mixed_prefill_tokens=None)
    assert told["pools"] == [json.loads(SERVER_INFO)]
    edge.text.answers["server_info"] = lambda _: (503, b'{"message":"No.","type":"x","code":"draining"}')
    assert edge.kept.get("/server_info").status_code == 503


def test_server_info_has_no_secret(make_edge: MakeEdge) -> None:
    edge = make_edge(api_key=["secret-1"])
    with edge.http(headers={"x-api-key": "secret-1"}) as http:
        assert "secret" not in http.get("/server_info").text
        assert http.get("/server_info", headers={"x-api-key": "no"}).status_code == 401
