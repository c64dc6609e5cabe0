"""Chat completions that are kept, with OpenAI's own client."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import openai
import pytest
from edge_kit import MakeEdge, full_script, hello_script
from openai import OpenAI

from penstock.core.protocol.control import Tables
from penstock.core.protocol.messages import Message, Submit
from penstock.core.protocol.tables import KeyTable, Principal, digest_of

ASK: dict[str, Any] = {"model": "brook", "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}]}
KEPT = "/v1/chat/completions"


@pytest.fixture
def client(make_edge: MakeEdge) -> Iterator[OpenAI]:
    with make_edge().client() as client:
        yield client


def test_an_answer_is_kept_if_asked_for_and_only_then(client: OpenAI) -> None:
    client.chat.completions.create(**ASK)
    client.chat.completions.create(**ASK, store=False, metadata={"a": "b"})
    assert list(client.chat.completions.list()) == []
    said = client.chat.completions.create(**ASK, store=True, metadata={"topic": "greeting"}, temperature=0.5)
    (kept,) = client.chat.completions.list()
    assert kept.id == said.id
    assert kept.choices == said.choices
    assert kept.usage == said.usage
    assert kept.created == said.created
    found = client.chat.completions.retrieve(said.id)
    assert found == kept
    assert (found.metadata, found.temperature) == ({"topic": "greeting"}, 0.5)  # type: ignore[attr-defined]
    assert [(m.role, m.content, m.id) for m in client.chat.completions.messages.list(said.id)] == [
        ("system", "Be kind.", f"{said.id}-0"),
        ("user", "hi", f"{said.id}-1"),
    ]


@pytest.mark.parametrize("script", [hello_script, full_script])
@pytest.mark.parametrize("more", [{}, {"n": 2}, {"logprobs": True, "top_logprobs": 1}, {"extra_body": {"return_token_ids": True}}])
def test_a_stream_is_kept_as_the_whole_reply_that_it_would_have_been(
    make_edge: MakeEdge, script: Callable[[Submit], list[Message]], more: dict[str, Any]
) -> None:
    edge = make_edge(text=lambda t: setattr(t, "script", script))
    usage = {"stream_options": {"include_usage": True}}
    with edge.client() as client:
        check_folding(client, more, usage)


def check_folding(client: OpenAI, more: dict[str, Any], usage: dict[str, Any]) -> None:
    plain = [c.to_dict() for c in client.chat.completions.create(**ASK, **more, **usage, stream=True)]
    chunks = [c.to_dict() for c in client.chat.completions.create(**ASK, **more, **usage, stream=True, store=True)]
    changing = ("id", "created")
    assert [{k: v for k, v in c.items() if k not in changing} for c in chunks] == [
        {k: v for k, v in c.items() if k not in changing} for c in plain
    ], "a stream that is kept is like any other"
    whole = client.chat.completions.create(**ASK, **more, store=True).to_dict()
    kept = client.chat.completions.retrieve(str(chunks[0]["id"])).to_dict()
    assert {k: v for k, v in kept.items() if k not in (*changing, "request_id", "metadata")} == {
        k: v for k, v in whole.items() if k not in changing
    }


def test_the_list_has_pages_an_order_and_filters(client: OpenAI) -> None:
    ids = [client.chat.completions.create(**ASK, store=True, metadata={"odd": str(i % 2)}).id for i in range(5)]
    page = client.chat.completions.list(limit=2)
    assert ([one.id for one in page.data], page.has_more) == (ids[:2], True)
    assert [one.id for one in client.chat.completions.list(limit=2)] == ids, "the client follows the pages"
    assert [one.id for one in client.chat.completions.list(order="desc", after=ids[2])] == [ids[1], ids[0]]
    assert [one.id for one in client.chat.completions.list(metadata={"odd": "1"})] == [ids[1], ids[3]]
    assert [one.id for one in client.chat.completions.list(model="brook")] == ids
    assert list(client.chat.completions.list(model="other")) == []


def test_metadata_change_and_all_is_forgotten(client: OpenAI) -> None:
    said = client.chat.completions.create(**ASK, store=True, metadata={"a": "1"})
    changed = client.chat.completions.update(said.id, metadata={"b": "2"})
    assert changed.metadata == {"b": "2"}  # type: ignore[attr-defined]
    assert changed.choices == said.choices
    assert list(client.chat.completions.list(metadata={"a": "1"})) == []
    assert len(list(client.chat.completions.list(metadata={"b": "2"}, model="brook"))) == 1
    gone = client.chat.completions.delete(said.id)
    assert (gone.id, gone.deleted, gone.object) == (said.id, True, "chat.completion.deleted")
    for ask in (
        lambda: client.chat.completions.retrieve(said.id),
        lambda: client.chat.completions.delete(said.id),
        lambda: client.chat.completions.update(said.id, metadata={}),
        lambda: client.chat.completions.messages.list(said.id),
    ):
        with pytest.raises(openai.NotFoundError):
            ask()


def test_messages_have_pages_and_parts(client: OpenAI) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages: list[Any] = [{"role": "user", "content": parts}, {"role": "assistant", "content": "c"}, {"role": "user", "content": "d"}]
    said = client.chat.completions.create(model="brook", messages=messages, store=True)
    page = client.chat.completions.messages.list(said.id, limit=2)
    assert ([m.content for m in page.data], page.has_more) == (["ab", "c"], True)
    assert [p.to_dict() for p in page.data[0].content_parts or []] == parts
    assert [m.content for m in client.chat.completions.messages.list(said.id, order="desc", limit=1)] == ["d", "c", "ab"]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=x", "limit"),
        ("limit=1&limit=2", "limit"),
        ("order=up", "order"),
        ("after=nobody", "after"),
        ("before=x", "before"),
        ("metadata=x", "metadata"),
    ],
)
def test_a_query_that_cannot_be_obeyed_is_refused(make_edge: MakeEdge, query: str, param: str) -> None:
    reply = make_edge().kept.get(f"{KEPT}?{query}")
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("metadata", "param"),
    [
        ({"k" * 65: "v"}, "metadata." + "k" * 64),
        ({"k": "v" * 513}, "metadata.k"),
        ({"k": 1}, "metadata.k"),
        ({str(i): "" for i in range(17)}, "metadata"),
        ("text", "metadata"),
    ],
)
def test_metadata_has_bounds(make_edge: MakeEdge, metadata: Any, param: str) -> None:
    edge = make_edge()
    reply = edge.kept.post(KEPT, json={**ASK, "store": True, "metadata": metadata})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
    assert not [m for m in edge.text.received if isinstance(m, Submit)], "nothing was asked"


@pytest.mark.parametrize("stream", [False, True])
def test_an_id_that_could_not_be_found_again_is_refused(make_edge: MakeEdge, stream: bool) -> None:
    edge = make_edge()
    reply = edge.kept.post(KEPT, json={**ASK, "store": True, "stream": stream}, headers={"x-request-id": "a/b"})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "request_id")


def test_tenants_do_not_see_each_other(make_edge: MakeEdge) -> None:
    edge = make_edge(tables="tables.toml")
    keys = {digest_of(name.encode()): Principal(tenant=tenant) for name, tenant in (("a1", "a"), ("a2", "a"), ("b", "b"))}
    body = msgspec.msgpack.encode(KeyTable(keys=keys))
    edge.text.call(lambda: edge.server.app.keyring.take(Tables(generation=1, body=body)))
    with edge.client(api_key="a1") as a1, edge.client(api_key="a2") as a2, edge.client(api_key="b") as b:
        check_tenants(a1, a2, b)


def check_tenants(a1: OpenAI, a2: OpenAI, b: OpenAI) -> None:
    said = a1.chat.completions.create(**ASK, store=True)
    assert a2.chat.completions.retrieve(said.id).id == said.id
    assert list(b.chat.completions.list()) == []
    for ask in (
        lambda: b.chat.completions.retrieve(said.id),
        lambda: b.chat.completions.delete(said.id),
        lambda: b.chat.completions.update(said.id, metadata={"stolen": "yes"}),
        lambda: b.chat.completions.messages.list(said.id),
    ):
        with pytest.raises(openai.NotFoundError):
            ask()
    with pytest.raises(openai.BadRequestError):
        b.chat.completions.list(after=said.id)
    assert a1.chat.completions.retrieve(said.id).id == said.id


@pytest.mark.parametrize("stream", [False, True])
def test_without_a_store_it_is_refused_and_there_are_no_routes(make_edge: MakeEdge, stream: bool) -> None:
    edge = make_edge(enable_store=False)
    reply = edge.kept.post(KEPT, json={**ASK, "store": True, "stream": stream})
    assert (reply.status_code, reply.json()["error"]["param"], reply.json()["error"]["code"]) == (400, "store", "unsupported_feature")
    assert edge.kept.post(KEPT, json={**ASK, "store": False}).status_code == 200
    assert edge.kept.get(KEPT).status_code == 405
    assert edge.kept.get(f"{KEPT}/x").status_code == 404


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_cannot_be_kept_is_an_error(make_edge: MakeEdge, stream: bool) -> None:
    edge = make_edge(store_max_bytes=300)
    reply = edge.kept.post(KEPT, json={**ASK, "store": True, "stream": stream})
    if stream:
        assert '"code":"store_full"' in reply.text
        assert "[DONE]" not in reply.text
    else:
        assert (reply.status_code, reply.json()["error"]["code"]) == (429, "store_full")
    edge.wait(lambda: edge.server.gateway.active == 0)
