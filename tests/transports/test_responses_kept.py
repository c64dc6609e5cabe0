"""Responses that are kept: asked for, continued, deleted, listed; those in the background: followed, cancelled, lost. Always in one tenant's sight alone."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import msgspec
import pytest
from edge_kit import Edge, MakeEdge, delta, finished, hello_script, silent
from test_responses import named_events

from penstock.core.actors.text.bounds import SMALL
from penstock.core.protocol.messages import Cancel, Message, Query, Submit
from penstock.transports import responses_replies as replies
from penstock.transports.folder import Folder
from penstock.transports.responses_store import LEASE, RESPONSE, Kept

PATH = "/v1/responses"
HI: dict[str, Any] = {"model": "brook", "input": "hi"}
BACKGROUND = HI | {"background": True}


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    one = Edge(tmp_path_factory.mktemp("edge"), {}).start()
    yield one
    one.stop()


@pytest.fixture
def quiet(edge: Edge) -> Iterator[Edge]:
    """The edge, whose text says nothing by itself."""
    edge.text.script = silent
    edge.text.received.clear()
    yield edge
    edge.text.script = hello_script


def create(edge: Edge, **fields: Any) -> dict[str, Any]:
    reply = edge.kept.post(PATH, json=HI | fields)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def error(reply: httpx.Response) -> tuple[int, str, str | None]:
    return reply.status_code, reply.json()["error"]["code"], reply.json()["error"]["param"]


def told(edge: Edge) -> Any:
    """The conversation that text got last."""
    return json.loads(edge.text.wait_for(Submit)[-1].messages)


def until(edge: Edge, name: str, *statuses: str) -> dict[str, Any]:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        found: dict[str, Any] = edge.kept.get(f"{PATH}/{name}").json()
        if found["status"] in statuses:
            return found
        time.sleep(0.01)
    raise AssertionError(f"{name} is {found['status']}, not {statuses}")


def say(edge: Edge, key: int, *texts: str) -> None:
    edge.text.send(*[delta({"key": key, "text": text}) for text in texts])


def stop(edge: Edge, key: int) -> None:
    edge.text.send(delta({"key": key, "tokens": [], "reason": "stop"}), finished(key))


# ------------------------------------------------------------------ kept


def test_a_response_is_kept_as_it_was_said(edge: Edge) -> None:
    for more in ({}, {"stream": True}):
        reply = edge.kept.post(PATH, json=HI | more)
        said = named_events(reply.text)[-1]["response"] if more else reply.json()
        assert said["store"] is True
        kept = edge.kept.get(f"{PATH}/{said['id']}")
        assert (kept.status_code, kept.json()) == (200, said)


def test_what_is_not_to_be_kept_is_not(edge: Edge) -> None:
    said = create(edge, store=False)
    assert said["store"] is False
    assert error(edge.kept.get(f"{PATH}/{said['id']}")) == (404, "not_found", "response_id")


def test_a_deleted_one_is_gone(edge: Edge) -> None:
    name = create(edge)["id"]
    gone = edge.kept.delete(f"{PATH}/{name}")
    assert (gone.status_code, gone.json()) == (200, {"id": name, "object": "response", "deleted": True})
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")):
        assert error(edge.kept.request(method, f"{PATH}/{name}{path}")) == (404, "not_found", "response_id")


def test_nobody_sees_anothers(make_edge: MakeEdge) -> None:
    edge = make_edge(api_key=["one", "two"])
    with edge.http(headers={"x-api-key": "one"}) as one, edge.http(headers={"x-api-key": "two"}) as two:
        said = one.post(PATH, json=HI).json()
        name, item = said["id"], said["output"][0]["id"]
        for method, path in (("GET", ""), ("GET", "?stream=true"), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")):
            assert error(two.request(method, f"{PATH}/{name}{path}")) == (404, "not_found", "response_id")
        assert error(two.post(PATH, json=HI | {"previous_response_id": name})) == (400, "invalid_value", "previous_response_id")
        reference = [{"type": "item_reference", "id": item}]
        assert error(two.post(PATH, json=HI | {"input": reference})) == (400, "invalid_value", "input[0].id")
        assert one.get(f"{PATH}/{name}").status_code == 200
        assert one.post(PATH, json=HI | {"previous_response_id": name, "input": reference}).status_code == 200


def test_a_server_without_a_store(make_edge: MakeEdge) -> None:
    edge = make_edge(enable_store=False)
    for more in ({}, {"store": True}, {"store": False}):
        said = create(edge, **more)
        assert said["store"] is False
        for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")):
            assert error(edge.kept.request(method, f"{PATH}/{said['id']}{path}")) == (404, "not_found", "response_id")
    assert error(edge.kept.post(PATH, json=BACKGROUND)) == (400, "invalid_value", "background")
    assert error(edge.kept.post(PATH, json=HI | {"previous_response_id": "resp_1"})) == (400, "invalid_value", "previous_response_id")
    reference = [{"type": "item_reference", "id": said["output"][0]["id"]}]
    assert error(edge.kept.post(PATH, json=HI | {"input": reference})) == (400, "invalid_value", "input[0]")


def test_what_cannot_be_kept_is_answered_and_says_so(make_edge: MakeEdge) -> None:
    edge = make_edge(store_max_bytes=600)
    said = create(edge)
    assert (said["store"], said["output"][0]["content"][0]["text"]) == (False, "Hello world")
    assert named_events(edge.kept.post(PATH, json=HI | {"stream": True}).text)[-1]["response"]["store"] is False
    edge.text.received.clear()
    for more in ({}, {"stream": True}):
        assert error(edge.kept.post(PATH, json=BACKGROUND | more))[:2] == (429, "store_full")
    assert not edge.text.call(lambda: edge.server.gateway.store.list(LEASE, ""))  # type: ignore[union-attr]
    assert not [one for one in edge.text.received if isinstance(one, Submit)]
    assert edge.server.gateway.active == 0


# ------------------------------------------------------------------ conversations


def test_a_conversation_goes_on(edge: Edge) -> None:
    first = create(edge, instructions="Be brief.")
    second = create(edge, previous_response_id=first["id"], input="and?")
    assert second["previous_response_id"] == first["id"]
    answer = {"role": "assistant", "content": "Hello world"}
    assert told(edge) == [{"role": "user", "content": "hi"}, answer, {"role": "user", "content": "and?"}], (
        "without the first one's instructions"
    )
    create(edge, previous_response_id=second["id"], input=[{"role": "user", "content": "so"}], instructions="Be long.")
    words = ["Be long.", "hi", "Hello world", "and?", "Hello world", "so"]
    assert [message["content"] for message in told(edge)] == words
    create(edge, previous_response_id=second["id"], input=None)
    assert [message["content"] for message in told(edge)] == words[1:5]


def test_a_conversation_goes_on_at_once(edge: Edge) -> None:
    """It is kept before it is said to be complete."""
    for _ in range(20):
        with edge.kept.stream("POST", PATH, json=HI | {"stream": True}) as reply:
            for line in reply.iter_lines():
                if line.startswith('data: {"type":"response.completed"'):
                    name = json.loads(line.removeprefix("data: "))["response"]["id"]
                    with edge.http() as http:
                        assert http.get(f"{PATH}/{name}").status_code == 200


def test_a_conversation_that_is_not_whole_does_not_go_on(edge: Edge) -> None:
    first = create(edge)
    second = create(edge, previous_response_id=first["id"])
    edge.kept.delete(f"{PATH}/{first['id']}")
    reply = edge.kept.post(PATH, json=HI | {"previous_response_id": second["id"]})
    assert error(reply) == (400, "invalid_value", "previous_response_id")
    assert first["id"] in reply.json()["error"]["message"]


def test_a_conversation_has_an_end(make_edge: MakeEdge) -> None:
    edge = make_edge(max_messages=5)
    first = create(edge)
    second = create(edge, previous_response_id=first["id"])
    create(edge, previous_response_id=second["id"])
    third = create(edge, previous_response_id=second["id"])
    assert error(edge.kept.post(PATH, json=HI | {"previous_response_id": third["id"]}))[0] == 400


def test_a_conversation_has_a_size(make_edge: MakeEdge) -> None:
    """What many requests brought is not gathered by one."""
    edge = make_edge(max_body_bytes=6000)
    name, sizes = create(edge, input="x" * 2000)["id"], 1
    while (reply := edge.kept.post(PATH, json=HI | {"previous_response_id": name, "input": "x" * 2000})).status_code == 200:
        name, sizes = reply.json()["id"], sizes + 1
    assert (error(reply), sizes) == ((413, "request_too_large", "previous_response_id"), 2)
    items = [edge.kept.get(f"{PATH}/{create(edge, input='x' * 3000)['id']}/input_items").json()["data"][0]["id"] for _ in range(3)]
    some = [{"type": "item_reference", "id": item} for item in items]
    assert edge.kept.post(PATH, json=HI | {"input": some[:1] * 30}).status_code == 200, "one response is read once"
    assert error(edge.kept.post(PATH, json=HI | {"input": some})) == (413, "request_too_large", "input")


def test_nobody_waits_for_the_store(make_edge: MakeEdge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large bodies are parsed one at a time, and a request whose conversation is being fetched is not parsed."""
    edge = make_edge()
    gateway = edge.server.gateway
    long = "x" * SMALL
    first = create(edge, input=long)
    held: list[bool] = []
    store = gateway.store
    assert store is not None
    row = type(store).row

    async def slow(self: Any, *asked: Any) -> Any:
        held.append(gateway.parsing.locked())
        found = await row(self, *asked)
        held.append(gateway.parsing.locked())
        return found

    monkeypatch.setattr(type(store), "row", slow)
    create(edge, previous_response_id=first["id"], input=long)
    item = edge.kept.get(f"{PATH}/{first['id']}/input_items").json()["data"][0]["id"]
    create(edge, input=[{"type": "item_reference", "id": item}, {"role": "user", "content": long}])
    assert edge.kept.post(f"{PATH}/input_tokens", json=HI | {"previous_response_id": first["id"], "input": long}).status_code == 200
    assert held
    assert not any(held)


@pytest.mark.parametrize("more", [{"input": "x"}, {"input": "x", "truncation": "auto"}])
def test_what_was_fetched_counts_as_the_body_does(make_edge: MakeEdge, more: dict[str, Any]) -> None:
    """A small request that brings a long conversation with it is work for a thread."""
    edge = make_edge()
    first = create(edge, input="x" * SMALL)
    taken = 0

    class Counted(asyncio.Lock):
        async def acquire(self) -> Literal[True]:
            nonlocal taken
            taken += 1
            return await super().acquire()

    edge.server.gateway.parsing = Counted()
    create(edge, previous_response_id=first["id"], **more)
    assert taken > 1
    before = taken
    assert edge.kept.get(f"{PATH}/{first['id']}/input_items").status_code == 200
    assert taken == before + 1


def test_a_conversation_has_so_many_fields(edge: Edge) -> None:
    part = {"type": "input_text", "text": "a"}
    one = create(edge, input=[{"role": "user", "content": [part] * 15_000}])
    two = create(edge, previous_response_id=one["id"], input=[{"role": "user", "content": [part] * 15_000}])
    three = create(edge, previous_response_id=two["id"], input=[{"role": "user", "content": [part] * 15_000}])
    create(edge, previous_response_id=three["id"])
    four = create(edge, previous_response_id=three["id"], input=[{"role": "user", "content": [part] * 5_001}])
    reply = edge.kept.post(PATH, json=HI | {"previous_response_id": four["id"]})
    assert error(reply) == (413, "request_too_large", "previous_response_id")


def test_items_are_referred_to(edge: Edge) -> None:
    first = create(edge)
    listed = edge.kept.get(f"{PATH}/{first['id']}/input_items").json()["data"]
    items = [{"type": "item_reference", "id": listed[0]["id"]}, {"id": first["output"][0]["id"]}, {"role": "user", "content": "and?"}]
    again = create(edge, input=items)
    assert [message["content"] for message in told(edge)] == ["hi", "Hello world", "and?"]
    kept = edge.kept.get(f"{PATH}/{again['id']}/input_items?order=asc").json()["data"]
    assert [item["content"][0]["text"] for item in kept] == ["hi", "Hello world", "and?"]
    missing = {"type": "item_reference", "id": first["output"][0]["id"][:-1] + "7"}
    assert error(edge.kept.post(PATH, json=HI | {"input": [missing]})) == (400, "invalid_value", "input[0].id")


@pytest.mark.parametrize("order", ["asc", "desc"])
@pytest.mark.parametrize("limit", [1, 2, 3, 7, 100])
def test_pages_of_input_add_up(edge: Edge, order: str, limit: int) -> None:
    texts = [f"t{number}" for number in range(7)]
    name = create(edge, input=[{"role": "user", "content": text} for text in texts])["id"]
    found: list[str] = []
    after: dict[str, str] = {}
    while True:
        page = edge.kept.get(f"{PATH}/{name}/input_items", params={"limit": limit, "order": order, **after}).json()
        msgspec.convert(page, replies.ResponseItems)
        found += [item["content"][0]["text"] for item in page["data"]]
        assert len(page["data"]) <= limit
        assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
        if not page["has_more"]:
            break
        after = {"after": page["last_id"]}
    assert found == (texts if order == "asc" else texts[::-1])


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=x", "limit"),
        ("order=up", "order"),
        ("after=msg_1", "after"),
        ("before=msg_1", "before"),
    ],
)
def test_a_wrong_page_is_named(edge: Edge, query: str, param: str) -> None:
    name = create(edge)["id"]
    assert error(edge.kept.get(f"{PATH}/{name}/input_items?{query}")) == (400, "invalid_value", param)


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("stream=1", "stream"),
        ("stream=true", "stream"),
        ("starting_after=1", "starting_after"),
        ("stream=true&starting_after=-1", "starting_after"),
        ("stream=true&include_obfuscation=true", "include_obfuscation"),
        ("include=nope", "include"),
        ("colour=red", "colour"),
    ],
)
def test_a_wrong_question_is_named(edge: Edge, query: str, param: str) -> None:
    name = create(edge)["id"]
    assert error(edge.kept.get(f"{PATH}/{name}?{query}")) == (400, "invalid_value", param)
    assert edge.kept.get(f"{PATH}/{name}?include=message.output_text.logprobs&include[]=reasoning.encrypted_content").status_code == 200


# ------------------------------------------------------------------ in the background


def test_a_response_in_the_background_comes_to_be(quiet: Edge) -> None:
    said = create(quiet, background=True)
    assert (said["status"], said["output"], said["background"]) == ("queued", [], True)
    msgspec.convert(said, replies.ResponseReply)
    submit = quiet.text.wait_for(Submit)[0]
    assert quiet.kept.get(f"{PATH}/{said['id']}").json() == said
    reply = quiet.kept.post(PATH, json=HI | {"previous_response_id": said["id"]})
    assert error(reply) == (400, "invalid_value", "previous_response_id")
    say(quiet, submit.key, "Hel")
    assert until(quiet, said["id"], "in_progress")["output"] == []
    say(quiet, submit.key, "lo")
    stop(quiet, submit.key)
    found = until(quiet, said["id"], "completed")
    assert found["output"][0]["content"][0]["text"] == "Hello"
    assert found["usage"]["total_tokens"] == 5
    assert (found["id"], found["created_at"]) == (said["id"], said["created_at"])
    quiet.wait(lambda: quiet.server.gateway.active == 0, "the place to be given back")
    quiet.text.script = hello_script
    create(quiet, previous_response_id=said["id"])


def test_one_that_fails_is_kept_so(quiet: Edge) -> None:
    for stream in (False, True):
        quiet.text.received.clear()
        if stream:
            with quiet.kept.stream("POST", PATH, json=BACKGROUND | {"stream": True}) as reply:
                first = next(reply.iter_text())
            name = json.loads(first.split("data: ")[1].split("\n")[0])["response"]["id"]
        else:
            name = create(quiet, background=True)["id"]
        key = quiet.text.wait_for(Submit)[0].key
        extra = {"error": "The engine failed.", "error_code": "engine_failure"}
        quiet.text.send(delta({"key": key, "tokens": [], "reason": "error", "extra": extra}), finished(key))
        found = until(quiet, name, "failed")
        assert found["error"] == {"code": "server_error", "message": "The engine failed."}
        reply = quiet.kept.post(PATH, json=HI | {"previous_response_id": name})
        assert error(reply) == (400, "invalid_value", "previous_response_id")
        if stream:
            assert named_events(quiet.kept.get(f"{PATH}/{name}?stream=true").text)[-1]["response"] == found


def test_it_outlives_its_clients_connection_and_is_followed_from_anywhere(quiet: Edge) -> None:
    with quiet.kept.stream("POST", PATH, json=BACKGROUND | {"stream": True}) as reply:
        first = next(reply.iter_text())
    name = json.loads(first.split("data: ")[1].split("\n")[0])["response"]["id"]
    key = quiet.text.wait_for(Submit)[0].key
    say(quiet, key, "Hel")
    with quiet.http() as http, http.stream("GET", f"{PATH}/{name}?stream=true") as live:
        pieces = live.iter_text()
        text = ""
        while '"delta":"Hel"' not in text:
            text += next(pieces)
        say(quiet, key, "lo")
        while '"delta":"lo"' not in text:
            text += next(pieces)
        stop(quiet, key)
        text += "".join(pieces)
    events = named_events(text)
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[:3] == ["created", "queued", "in_progress"]
    assert events[0]["response"]["status"] == "queued"
    assert events[-1]["response"] == until(quiet, name, "completed")
    assert not [one for one in quiet.text.received if isinstance(one, Cancel)]
    for after in range(len(events)):
        rest = quiet.kept.get(f"{PATH}/{name}?stream=true&starting_after={after}").text
        blocks = [block for block in rest.split("\n\n") if block]
        assert [json.loads(block.split("data: ")[1]) for block in blocks] == events[after + 1 :]
    beyond = quiet.kept.get(f"{PATH}/{name}?stream=true&starting_after={len(events)}")
    assert error(beyond) == (400, "invalid_value", "starting_after")


def test_one_without_a_stream_has_no_events(quiet: Edge) -> None:
    name = create(quiet, background=True)["id"]
    assert error(quiet.kept.get(f"{PATH}/{name}?stream=true")) == (400, "invalid_value", "stream")
    quiet.kept.post(f"{PATH}/{name}/cancel")


def test_a_cancelled_ones_stream_ends_with_the_response_as_cancelled(quiet: Edge) -> None:
    """OpenAI has no event of its own for that."""
    name = create_stream(quiet)
    say(quiet, quiet.text.wait_for(Submit)[-1].key, "Hel")
    quiet.kept.post(f"{PATH}/{name}/cancel")
    last = named_events(quiet.kept.get(f"{PATH}/{name}?stream=true").text)[-1]
    assert (last["type"], last["response"]["status"], last["response"]["error"]) == ("response.failed", "cancelled", None)


@pytest.mark.parametrize("begun", [True, False])
def test_it_is_cancelled(quiet: Edge, begun: bool) -> None:
    name = create(quiet, background=True)["id"]
    key = quiet.text.wait_for(Submit)[0].key
    if begun:
        say(quiet, key, "Hel")
        until(quiet, name, "in_progress")
    for _ in range(2):
        reply = quiet.kept.post(f"{PATH}/{name}/cancel")
        found = reply.json()
        assert (reply.status_code, found["status"], found["error"]) == (200, "cancelled", None)
    assert [item["content"][0]["text"] for item in found["output"]] == (["Hel"] if begun else [])
    assert (found["usage"] and found["usage"]["total_tokens"]) == (4 if begun else None)
    assert quiet.kept.get(f"{PATH}/{name}").json() == found
    assert quiet.text.wait_for(Cancel)[0].key == key
    quiet.wait(lambda: quiet.server.gateway.active == 0, "the place to be given back")


def test_only_those_in_the_background_are_cancelled(edge: Edge) -> None:
    assert error(edge.kept.post(f"{PATH}/{create(edge)['id']}/cancel")) == (400, "invalid_value", "response_id")


def test_a_cancel_that_comes_too_late_changes_nothing(edge: Edge) -> None:
    name = create(edge, background=True)["id"]
    found = until(edge, name, "completed")
    assert edge.kept.post(f"{PATH}/{name}/cancel").json() == found


def test_one_that_is_deleted_while_it_runs_ends_and_does_not_come_back(quiet: Edge) -> None:
    name = create(quiet, background=True, stream=False)["id"]
    key = quiet.text.wait_for(Submit)[0].key
    assert quiet.kept.delete(f"{PATH}/{name}").status_code == 200
    assert quiet.text.wait_for(Cancel)[0].key == key
    quiet.wait(lambda: quiet.server.gateway.active == 0, "the place to be given back")
    assert quiet.kept.get(f"{PATH}/{name}").status_code == 404


def test_a_refused_one_leaves_nothing_behind(make_edge: MakeEdge) -> None:
    edge = make_edge(max_streams=1, text=lambda text: setattr(text, "script", silent))
    name = create(edge, background=True)["id"]
    for more in ({}, {"stream": True}):
        reply = edge.kept.post(PATH, json=BACKGROUND | more)
        assert error(reply)[:2] == (429, "too_many_streams")
    rows = edge.text.call(lambda: edge.server.gateway.store.list(RESPONSE, ""))  # type: ignore[union-attr]
    assert [row.id for row in rows] == [name]
    leases = edge.text.call(lambda: edge.server.gateway.store.list(LEASE, ""))  # type: ignore[union-attr]
    assert [row.id for row in leases] == [name]
    edge.kept.post(f"{PATH}/{name}/cancel")
    edge.wait(lambda: edge.server.gateway.active == 0)
    assert not edge.text.call(lambda: edge.server.gateway.store.list(LEASE, ""))  # type: ignore[union-attr]


def test_one_whose_process_is_gone_has_failed(edge: Edge) -> None:
    name = "resp_" + "0" * 33
    said = create(edge, background=True) | {"id": name, "status": "in_progress"}
    kept = msgspec.json.encode(Kept(input=msgspec.Raw(b"[]"), rid="r", model="brook", background=True, stream=True))
    store = edge.server.gateway.store
    assert store is not None
    edge.text.call(lambda: store.put(RESPONSE, "", name, msgspec.json.encode(said), extra=kept))
    events = named_events_of(edge.kept.get(f"{PATH}/{name}?stream=true").text)
    found = edge.kept.get(f"{PATH}/{name}").json()
    assert (found["status"], found["error"]["code"]) == ("failed", "server_error")
    assert [event["type"] for event in events] == ["response.failed"]
    assert events[0]["response"] == found


def named_events_of(text: str) -> list[Any]:
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]


def test_a_shutdown_ends_it_and_says_so(make_edge: MakeEdge, tmp_path: Path) -> None:
    path = str(tmp_path / "kept.sqlite")
    edge = make_edge(store=path, text=lambda text: setattr(text, "script", silent))
    name = create(edge, background=True)["id"]
    edge.text.wait_for(Submit)
    assert edge.text.call(lambda: edge.server.drain(0.2)) == 1
    edge.wait(lambda: edge.server.gateway.active == 0)
    found = edge.kept.get(f"{PATH}/{name}").json()
    assert (found["status"], found["error"]["code"]) == ("failed", "server_error")


def test_followers_have_a_bound(make_edge: MakeEdge) -> None:
    edge = make_edge(max_streams=1, text=lambda text: setattr(text, "script", silent))
    with edge.kept.stream("POST", PATH, json=BACKGROUND | {"stream": True}) as reply:
        pieces = reply.iter_text()  # kept: without it the connection is closed
        name = json.loads(next(pieces).split("data: ")[1].split("\n")[0])["response"]["id"]
        with edge.http() as http:
            assert error(http.get(f"{PATH}/{name}?stream=true"))[:2] == (429, "too_many_streams")
            assert error(http.post(PATH, json=BACKGROUND | {"stream": True}))[:2] == (429, "too_many_streams")
            http.post(f"{PATH}/{name}/cancel")
    assert edge.kept.get(f"{PATH}/{name}?stream=true").status_code == 200


def test_a_follower_that_reads_nothing_is_cut(make_edge: MakeEdge) -> None:
    """And told so, if it reads on in time."""
    edge = make_edge(stream_stall_s=1.0, keep_alive_s=0.3, text=lambda text: setattr(text, "script", silent))
    name = create_stream(edge)
    key = edge.text.wait_for(Submit)[0].key
    with socket.socket() as sock:
        sock.settimeout(10)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", edge.port))
        sock.sendall(b"GET %s/%s?stream=true HTTP/1.1\r\nhost: x\r\n\r\n" % (PATH.encode(), name.encode()))
        for _ in range(60):
            say(edge, key, "x" * 200_000)
        edge.wait(lambda: edge.server.gateway.counters.read().get('penstock_edge_cuts_total{why="stalled"}', 0) == 1, "the cut")
        said = b"".join(iter(lambda: sock.recv(1 << 20), b""))
    assert said.endswith(b"\r\n0\r\n\r\n")
    assert b'"type":"error","code":"slow_client"' in said[-600:]
    stop(edge, key)
    assert len(until(edge, name, "completed")["output"][0]["content"][0]["text"]) == 12_000_000, "the response itself goes on"


def create_stream(edge: Edge) -> str:
    """One in the background whose client has gone."""
    with edge.http() as http, http.stream("POST", PATH, json=BACKGROUND | {"stream": True}) as reply:
        name: str = json.loads(next(reply.iter_text()).split("data: ")[1].split("\n")[0])["response"]["id"]
    return name


# ------------------------------------------------------------------ several HTTP processes


def test_another_process_sees_follows_and_cancels_it(make_edge: MakeEdge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Folder, "lock", lambda _: None)  # both are of one server
    path = str(tmp_path / "kept.sqlite")
    one = make_edge(store=path, text=lambda text: setattr(text, "script", silent))
    two = make_edge(store=path)
    with one.kept.stream("POST", PATH, json=BACKGROUND | {"stream": True}) as reply:
        name = json.loads(next(reply.iter_text()).split("data: ")[1].split("\n")[0])["response"]["id"]
    submit = one.text.wait_for(Submit)[0]
    assert two.kept.get(f"{PATH}/{name}").json()["status"] == "queued"
    say(one, submit.key, "Hel")
    until(two, name, "in_progress")

    asked = 0

    def cancelled(body: bytes) -> tuple[int, bytes]:
        """As text does it: the request's own edge hears of it. At first text does not know it yet."""
        nonlocal asked
        assert json.loads(body) == {"rid": submit.rid, "tenant": ""}
        asked += 1
        if asked == 1:
            return 404, b'{"message":"No request of that id is running.","type":"invalid_request_error","code":"not_found"}'
        extra = {"error": "Cancelled.", "error_code": "cancelled"}
        key = submit.key
        end: list[Message] = [delta({"key": key, "tokens": [], "reason": "abort", "extra": extra}), finished(key)]
        one.loop.call_soon_threadsafe(lambda: [link.send(message) for link in one.text._links for message in end])
        return 200, b'{"prompts":1}'

    two.text.answers["cancel"] = cancelled
    with two.http() as http, http.stream("GET", f"{PATH}/{name}?stream=true") as live:
        pieces = live.iter_text()
        text = ""
        while '"delta":"Hel"' not in text:
            text += next(pieces)
        found = two.kept.post(f"{PATH}/{name}/cancel").json()
        assert found["status"] == "cancelled"
        text += "".join(pieces)
    last = named_events(text)[-1]
    assert (last["type"], last["response"]) == ("response.failed", found)
    assert [query.what for query in two.text.wait_for(Query) if query.what == "cancel"] == ["cancel"] * 2
    assert one.kept.get(f"{PATH}/{name}").json() == found


# ------------------------------------------------------------------ the official client


def test_the_official_client_keeps_and_follows(edge: Edge) -> None:
    with edge.client() as client:
        first = client.responses.create(model="brook", input="hi", metadata={"a": "b"})
        assert client.responses.retrieve(first.id) == first
        second = client.responses.create(model="brook", input="and?", previous_response_id=first.id)
        assert second.output_text == "Hello world"
        assert [item.type for item in client.responses.input_items.list(first.id)] == ["message"]
        client.responses.delete(first.id)
        stream = client.responses.create(model="brook", input="hi", background=True, stream=True)
        events = list(stream)
        opened = events[0]
        assert opened.type == "response.created"
        again = client.responses.retrieve(opened.response.id, stream=True, starting_after=2)
        assert [event.sequence_number for event in again] == list(range(3, len(events)))
        assert client.responses.cancel(opened.response.id).status == "completed"
