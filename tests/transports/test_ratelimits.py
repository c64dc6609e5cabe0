"""Tenants' limits at an edge: where a tenant stands, in each reply; what a refusal looks like, in each API's shape."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import grpc
import openai
import pytest
from edge_kit import Edge, delta, finished, hello_script, silent, take
from grpc_kit import Client, failed
from socket_kit import CHATS, HI, dial, say, until_end

from penstock.core.protocol.messages import Counted, Message, Rejected, Submit
from penstock.core.protocol.standing import Standing, Window
from penstock.core.protocol.tables import Principal
from penstock.transports.ratelimits import duration

STANDING = Standing(requests=Window(limit=60, remaining=59, reset_s=1.0), tokens=Window(limit=6000, remaining=0, reset_s=75.25))
HEADERS = {
    "x-ratelimit-limit-requests": "60",
    "x-ratelimit-remaining-requests": "59",
    "x-ratelimit-reset-requests": "1s",
    "x-ratelimit-limit-tokens": "6000",
    "x-ratelimit-remaining-tokens": "0",
    "x-ratelimit-reset-tokens": "1m15.25s",
}
KEYS = {
    b"sk-ada": Principal(tenant="lab", key_id="ada", scopes=frozenset({"inference"}), mark="m-ada", models=["brook"]),
    b"sk-bob": Principal(tenant="other", key_id="bob", scopes=frozenset({"inference"}), mark="m-bob", models=["none"]),
}
CHAT = {"model": "brook", "messages": HI["messages"]}
MESSAGES = {"model": "brook", "max_tokens": 9, "messages": CHAT["messages"]}
SURFACES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", CHAT),
    ("/v1/completions", {"model": "brook", "prompt": ["a", "b"]}),
    ("/v1/messages", MESSAGES),
    ("/v1/responses", {"model": "brook", "input": "hi"}),
]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    edge = Edge(tmp_path_factory.mktemp("edge"), {"grpc_port": 0, "tables": "tables.toml"}).start()
    take(edge, KEYS, 7)
    yield edge
    edge.stop()


@pytest.fixture
def edge(one: Edge) -> Iterator[Edge]:
    one.text.received.clear()
    yield one
    one.text.script = hello_script


def counted(submit: Submit) -> list[Message]:
    return [Counted(key=submit.key, standing=STANDING), *hello_script(submit)]


def refused(
    *, retry_after_s: float | None, type: str = "requests", code: str = "rate_limit_exceeded", standing: Standing | None = STANDING
) -> Any:
    def script(submit: Submit) -> list[Message]:
        return [
            Rejected(key=submit.key, status=429, type=type, code=code, message="Too much.", retry_after_s=retry_after_s, standing=standing)
        ]

    return script


def post(edge: Edge, path: str, body: dict[str, Any], key: str = "sk-ada") -> Any:
    return edge.kept.post(path, json=body, headers={"x-api-key": key})


def limits_in(headers: Any) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.startswith("x-ratelimit-")}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), SURFACES)
def test_each_reply_says_where_its_tenant_stands(edge: Edge, path: str, body: dict[str, Any], stream: bool) -> None:
    edge.text.script = counted
    reply = post(edge, path, {**body, "stream": stream})
    assert reply.status_code == 200
    assert limits_in(reply.headers) == HEADERS
    assert not edge.server.gateway._default._counted


def test_without_limits_nothing_is_said_and_nothing_is_kept(edge: Edge) -> None:
    assert limits_in(post(edge, "/v1/chat/completions", CHAT).headers) == {}
    assert not edge.server.gateway._default._counted


def test_text_learns_which_key_it_was_and_by_which_tables(edge: Edge) -> None:
    post(edge, "/v1/chat/completions", CHAT)
    [submit] = edge.text.wait_for(Submit)
    assert (submit.tenant, submit.key_mark, submit.tables) == ("lab", "m-ada", 7)


def test_a_refusal_is_what_openais_client_knows(edge: Edge) -> None:
    edge.text.script = refused(retry_after_s=19.2)
    with edge.client(api_key="sk-ada", max_retries=0) as client, pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(**CHAT)  # type: ignore[call-overload]
    error = caught.value
    assert (error.type, error.code, error.param) == ("requests", "rate_limit_exceeded", None)
    assert limits_in(error.response.headers) == HEADERS
    assert error.response.headers["retry-after"] == "20"
    assert "x-should-retry" not in error.response.headers


def test_a_refusal_in_anthropics_shape(edge: Edge) -> None:
    edge.text.script = refused(retry_after_s=3.0)
    reply = post(edge, "/v1/messages", MESSAGES)
    body = reply.json()
    assert (reply.status_code, body["type"], body["error"]["type"]) == (429, "error", "rate_limit_error")
    assert body["request_id"] == reply.headers["request-id"]
    assert reply.headers["retry-after"] == "3"
    assert limits_in(reply.headers) == HEADERS


@pytest.mark.parametrize(
    ("path", "body"),
    [
        *SURFACES,
        *((path, {**body, "stream": True}) for path, body in SURFACES),
        ("/generate", {"inputs": "hi"}),
        ("/generate_stream", {"inputs": "hi"}),
    ],
)
def test_a_refusal_is_429_everywhere_streams_too(edge: Edge, path: str, body: dict[str, Any]) -> None:
    edge.text.script = refused(retry_after_s=5)
    reply = post(edge, path, body)
    assert (reply.status_code, reply.headers["retry-after"]) == (429, "5")
    assert "Too much." in reply.text


def test_a_refusal_in_responses_keeps_its_code(edge: Edge) -> None:
    edge.text.script = refused(retry_after_s=5)
    error = post(edge, "/v1/responses", {"model": "brook", "input": "hi"}).json()["error"]
    assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")


@pytest.mark.parametrize(("type", "code"), [("insufficient_quota", "budget_exceeded"), ("tokens", "rate_limit_exceeded")])
def test_clients_are_told_not_to_try_again_what_cannot_help(edge: Edge, type: str, code: str) -> None:
    edge.text.script = refused(retry_after_s=None, type=type, code=code, standing=None)
    reply = post(edge, "/v1/chat/completions", CHAT)
    assert (reply.status_code, reply.json()["error"]["code"], reply.json()["error"]["type"]) == (429, code, type)
    assert reply.headers["x-should-retry"] == "false"
    assert "retry-after" not in reply.headers
    edge.text.received.clear()
    with edge.client(api_key="sk-ada", max_retries=3) as client, pytest.raises(openai.RateLimitError):
        client.chat.completions.create(**CHAT)  # type: ignore[call-overload]
    assert len(edge.text.wait_for(Submit)) == 1


def test_a_refusal_by_grpc(edge: Edge) -> None:
    edge.text.script = refused(retry_after_s=5)
    client = Client(edge.ports["grpc"], key="sk-ada")
    with client.channel:
        code, error, metadata = failed(client.stream(CHATS, HI))
    assert (code, error["code"], error["type"]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "rate_limit_exceeded", "requests")
    assert metadata["retry-after"] == "5"
    assert limits_in(metadata) == HEADERS


def test_a_refusal_on_a_websocket(edge: Edge) -> None:
    edge.text.script = refused(retry_after_s=5)
    with dial(edge, additional_headers={"x-api-key": "sk-ada"}) as ws:
        say(ws, op="start", id="a", path=CHATS, body=HI)
        last = until_end(ws, "a")[-1]
    assert (last["status"], last["error"]["code"], last["error"]["type"], last["retry_after_s"]) == (
        429,
        "rate_limit_exceeded",
        "requests",
        5,
    )


def test_only_a_tenants_models_exist_for_it(edge: Edge) -> None:
    for key, names in (("sk-ada", ["brook"]), ("sk-bob", [])):
        headers = {"x-api-key": key}
        assert [one["id"] for one in edge.kept.get("/v1/models", headers=headers).json()["data"]] == names
        assert edge.kept.get("/v1/models/brook", headers=headers).status_code == (200 if names else 404)
        asked = {**headers, "anthropic-version": "2023-06-01"}
        assert [one["id"] for one in edge.kept.get("/v1/models", headers=asked).json()["data"]] == names


def test_a_stream_whose_key_was_revoked_ends_with_the_reason(edge: Edge) -> None:
    end = {"tokens": [], "reason": "error", "extra": {"error": "Revoked.", "error_code": "invalid_api_key"}}
    edge.text.script = silent
    with edge.http() as http, http.stream("POST", CHATS, json={**CHAT, "stream": True}, headers={"x-api-key": "sk-ada"}) as reply:
        key = edge.text.wait_for(Submit)[0].key
        edge.text.send(delta({"key": key, "text": "one"}))
        lines = (line for line in reply.iter_lines() if line.startswith("data: {"))
        assert "one" in next(line for line in lines if '"content":"one"' in line)
        edge.text.send(delta({"key": key, **end}), finished(key))
        last = json.loads(list(lines)[-1][6:])
    assert last["error"] == {"message": "Revoked.", "type": "invalid_request_error", "param": None, "code": "invalid_api_key"}
    edge.text.script = lambda submit: [delta({"key": submit.key, **end}), finished(submit.key)]
    whole = post(edge, CHATS, CHAT)
    assert (whole.status_code, whole.json()["error"]["code"]) == (401, "invalid_api_key")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0s"),
        (0.0000001, "1ms"),
        (0.02, "20ms"),
        (0.9991, "1s"),
        (1, "1s"),
        (1.5, "1.5s"),
        (59.9999, "1m0s"),
        (360, "6m0s"),
        (3723.004, "1h2m3.004s"),
        (7200, "2h0m0s"),
    ],
)
def test_durations_are_written_as_openai_does(seconds: float, said: str) -> None:
    assert duration(seconds) == said
