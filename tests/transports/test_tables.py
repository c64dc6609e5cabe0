"""Keys of the tables at an edge: who gets in, to what, and in whose name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from edge_kit import Edge, MakeEdge, delta, finished, silent, take

from penstock.core.protocol.messages import Submit
from penstock.core.protocol.tables import Principal, digest_of
from penstock.transports import openapi_replies
from penstock.transports.http import PUBLIC, attributes_of
from penstock.transports.keyring import tenant_of

KEYS = {
    b"sk-ada": Principal(tenant="lab", key_id="ada", tier="gold", scopes=frozenset({"inference"})),
    b"sk-bob": Principal(tenant="lab", key_id="bob", scopes=frozenset({"inference", "metrics"})),
    b"sk-watch": Principal(tenant="watch", key_id="watch", scopes=frozenset({"metrics"})),
    b"sk-root": Principal(tenant="root", key_id="root", scopes=frozenset({"admin"})),
}
CHAT = {"model": "brook", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def edge(make_edge: MakeEdge) -> Iterator[Edge]:
    one = make_edge(tables="tables.toml", api_key=["sk-plain"])
    take(one, KEYS, 1)
    return one


FREE = (*PUBLIC, "/version", "/schema", "/schema/openapi.json")
"""What every key is good for."""


def status(edge: Edge, method: str, path: str, key: str, **more: object) -> int:
    return edge.kept.request(method, path, headers={"authorization": f"Bearer {key}".strip()}, **more).status_code  # type: ignore[arg-type]


def test_an_endpoint_outside_a_keys_scopes_is_403_in_openais_shape(edge: Edge) -> None:
    refused = edge.kept.post("/v1/chat/completions", json=CHAT, headers={"x-api-key": "sk-watch"})
    assert refused.status_code == 403
    error = refused.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("permission_error", "insufficient_scope", None)
    assert "'inference'" in error["message"]
    with pytest.raises(openai.PermissionDeniedError), edge.client(api_key="sk-watch") as client:
        client.models.list()
    assert not [message for message in edge.text.received if isinstance(message, Submit)]


@pytest.mark.parametrize("key", ["sk-ada", "sk-bob", "sk-watch", "sk-root", "sk-plain"])
def test_every_endpoint_asks_for_its_scope_however_it_is_spelt(edge: Edge, key: str) -> None:
    allowed = KEYS[key.encode()].scopes if key != "sk-plain" else {"admin"}
    document = edge.kept.get("/schema/openapi.json", headers={"x-api-key": key}).json()
    for path, item in document["paths"].items():
        real = path.replace("{model_id}", "brook").replace("{request_id}", "r1")
        needs = "metrics" if path in ("/metrics", "/server_info") else None if path in FREE else "inference"
        good = needs is None or bool({needs, "admin"} & allowed)
        for method, operation in item.items():
            if method == "options":  # asked without credentials
                assert "403" not in operation["responses"]
                continue
            assert ("403" in operation["responses"]) is (needs is not None), path
            for spelt in (real, real + "/"):
                assert (status(edge, method.upper(), spelt, key) != 403) is good, (method, spelt)
        if "get" in item:
            assert (status(edge, "HEAD", real, key) != 403) is good, path
        assert status(edge, "OPTIONS", real, key) == 204
    assert status(edge, "GET", "/schema", key) == 200
    assert status(edge, "GET", "/nothing", key) == 404


def test_without_a_key_it_is_401_and_so_it_is_before_the_first_tables(make_edge: MakeEdge) -> None:
    edge = make_edge(tables="tables.toml")
    assert edge.kept.get("/v1/models").status_code == 401
    for key in ("sk-ada", "", "none"):
        assert status(edge, "GET", "/v1/models", key) == 401
    assert edge.kept.get("/health").status_code == 200
    take(edge, KEYS, 1)
    assert status(edge, "GET", "/v1/models", "sk-ada") == 200
    for key in ("sk-eve", "", digest_of(b"sk-ada"), "sk-ad"):
        assert status(edge, "GET", "/v1/models", key) == 401
    with httpx.Client(base_url=edge.url, headers={"x-api-key": "sk-ada"}, trust_env=False) as http:
        found = http.get("/schema/openapi.json").json()
    assert found["components"]["securitySchemes"].keys() == {"bearer", "key"}


def test_the_tenant_goes_with_the_request_to_text(edge: Edge) -> None:
    for key in ("sk-ada", "sk-bob", "sk-root", "sk-plain"):
        assert status(edge, "POST", "/v1/chat/completions", key, json=CHAT) == 200
    assert [submit.tenant for submit in edge.text.wait_for(Submit, 4)] == ["lab", "lab", "root", tenant_of("sk-plain")]


def test_later_tables_count_from_the_next_request_on_and_streams_go_on(edge: Edge) -> None:
    edge.text.script = silent
    with edge.http() as http:
        stream = http.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}, headers={"x-api-key": "sk-ada"})
        with stream as reply:
            key = edge.text.wait_for(Submit)[0].key
            edge.text.send(delta({"key": key, "text": "one"}))
            later = {name: principal for name, principal in KEYS.items() if name != b"sk-ada"} | {b"sk-new": KEYS[b"sk-bob"]}
            take(edge, later, 2)
            take(edge, KEYS, 1)  # late: an earlier generation says nothing any more
            assert status(edge, "GET", "/v1/models", "sk-ada") == 401
            assert status(edge, "GET", "/v1/models", "sk-new") == 200
            edge.text.send(delta({"key": key, "text": "two"}), delta({"key": key, "tokens": [], "reason": "stop"}), finished(key))
            assert "two" in reply.read().decode()
    assert status(edge, "GET", "/v1/models", "sk-plain") == 200


def test_a_key_of_the_command_line_is_good_for_everything_whatever_the_tables_say(make_edge: MakeEdge) -> None:
    edge = make_edge(tables="tables.toml", api_key=["sk-watch"])
    take(edge, KEYS, 1)
    assert status(edge, "GET", "/v1/models", "sk-watch") == 200


def test_spans_say_who_asked() -> None:
    assert attributes_of(KEYS[b"sk-ada"]) == {"penstock.tenant": "lab", "penstock.key_id": "ada", "penstock.tier": "gold"}
    assert attributes_of(KEYS[b"sk-bob"]) == {"penstock.tenant": "lab", "penstock.key_id": "bob"}


def test_every_refusal_by_scope_is_in_the_document(tmp_path: Path) -> None:
    for path, (_, statuses) in openapi_replies.REPLIES.items():
        assert (403 in statuses) is (path not in FREE), path
