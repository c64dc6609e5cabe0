"""Anthropic's message batches, against an edge whose text is a fake. (tests/e2e has Anthropic's own client.)"""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from edge_kit import Edge, MakeEdge, hello_script, silent

from penstock.core.protocol.control import Tables
from penstock.core.protocol.messages import Message, Rejected, Submit
from penstock.core.protocol.tables import KeyTable, Principal, digest_of
from penstock.transports import batch_runner, batch_work, batches, folder
from penstock.transports.anthropic_replies import MessageBatch, MessageBatchGone, MessageBatchList
from penstock.transports.folder import Folder
from penstock.transports.job import BACKGROUND
from penstock.transports.store import StoreUnavailable

PATH = "/v1/messages/batches"


def params(text: str = "hi", **more: Any) -> dict[str, Any]:
    return {"model": "brook", "max_tokens": 8, "messages": [{"role": "user", "content": text}], **more}


def entry(id: str, **more: Any) -> dict[str, Any]:
    return {"custom_id": id, "params": params(id, **more)}


@pytest.fixture
def edge(make_edge: MakeEdge) -> Edge:
    return make_edge()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_work, "PROGRESS_S", 0.02)
    monkeypatch.setattr(batch_work, "RETRY_S", (0.01, 0.02))


def begin(edge: Edge, *entries: Any) -> str:
    reply = edge.kept.post(PATH, json={"requests": list(entries)})
    assert reply.status_code == 200, reply.text
    return str(msgspec.convert(reply.json(), MessageBatch).id)


def wait(edge: Edge, id: str, **headers: str) -> MessageBatch:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        batch = msgspec.convert(edge.kept.get(f"{PATH}/{id}", headers=headers).json(), MessageBatch)
        if batch.processing_status == "ended":
            return batch
        time.sleep(0.01)
    raise AssertionError(f"still {batch}")


def results(edge: Edge, id: str) -> dict[str, Any]:
    reply = edge.kept.get(f"{PATH}/{id}/results")
    assert (reply.status_code, reply.headers["content-type"]) == (200, "application/x-jsonl")
    found = [json.loads(one) for one in reply.text.splitlines()]
    by_id = {one["custom_id"]: one["result"] for one in found}
    assert len(by_id) == len(found), "no result comes twice"
    return by_id


def counts(batch: MessageBatch) -> dict[str, int]:
    return {name: value for name, value in msgspec.to_builtins(batch.request_counts).items() if value}


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name.startswith("file-")}


# ------------------------------------------------------------------ from beginning to end


def test_a_batch_runs_to_its_end(edge: Edge) -> None:
    reply = edge.kept.post(
        PATH, json={"requests": [entry("a"), entry("b", temperature=-1), entry("c", colour="red"), entry("d", stream=True)]}
    )
    made = reply.json()
    assert (made["type"], made["processing_status"], made["ended_at"], made["results_url"]) == ("message_batch", "in_progress", None, None)
    assert made["request_counts"] == {"processing": 4, "succeeded": 0, "errored": 0, "canceled": 0, "expired": 0}
    assert made["created_at"].endswith("Z")
    batch = wait(edge, made["id"])
    assert counts(batch) == {"succeeded": 1, "errored": 3}
    assert batch.ended_at is not None
    assert batch.results_url == f"{str(edge.kept.base_url).rstrip('/')}{PATH}/{batch.id}/results"
    assert edge.kept.get(batch.results_url).status_code == 200
    found = results(edge, batch.id)
    assert found.keys() == {"a", "b", "c", "d"}
    message = found["a"]["message"]
    assert (found["a"]["type"], message["type"], message["content"]) == ("succeeded", "message", [{"type": "text", "text": "Hello world"}])
    wrong = {id: one["error"]["error"] for id, one in found.items() if one["type"] == "errored"}
    assert {
        id: (one["type"], name in one["message"])
        for (id, one), name in zip(sorted(wrong.items()), ("temperature", "colour", "stream"), strict=True)
    } == {
        "b": ("invalid_request_error", True),
        "c": ("invalid_request_error", True),
        "d": ("invalid_request_error", True),
    }
    assert {found[id]["error"]["type"] for id in wrong} == {"error"}
    assert {submit.priority for submit in edge.text.wait_for(Submit)} == {BACKGROUND}


@pytest.mark.parametrize(
    ("headers", "url"),
    [
        ({"host": "llm.example"}, "http://llm.example/api"),
        ({"host": "llm.example", "x-forwarded-proto": "https"}, "https://llm.example/api"),
        ({"host": "llm.example:8443", "x-forwarded-proto": "HTTPS, http"}, "https://llm.example:8443/api"),
        ({"host": "llm.example", "x-forwarded-proto": "ftp"}, "http://llm.example/api"),
    ],
)
def test_results_are_where_the_client_finds_the_server(make_edge: MakeEdge, headers: dict[str, str], url: str) -> None:
    edge = make_edge(root_path="/api")
    id = begin(edge, entry("a"))
    for prefix in ("", "/api"):
        assert wait(edge, id).results_url is not None
        assert edge.kept.get(f"{prefix}{PATH}/{id}", headers=headers).json()["results_url"] == f"{url}{PATH}/{id}/results"
        assert edge.kept.get(f"{prefix}{PATH}", headers=headers).json()["data"][0]["results_url"] == f"{url}{PATH}/{id}/results"
    assert edge.kept.get(f"/api{PATH}/{id}/results").status_code == 200


def test_requests_are_gone_with_the_end_and_results_with_the_batch(make_edge: MakeEdge, tmp_path: Path) -> None:
    edge = make_edge(store=str(tmp_path / "s"))
    id = begin(edge, entry("a"), entry("b", temperature=-1))
    wait(edge, id)
    [folder] = [path for path in tmp_path.iterdir() if path.is_dir() and names_in(path)]
    edge.wait(lambda: len(names_in(folder)) == 2)
    gone = edge.kept.delete(f"{PATH}/{id}")
    assert msgspec.convert(gone.json(), MessageBatchGone).id == id
    assert names_in(folder) == set()
    for reply in (edge.kept.get(f"{PATH}/{id}"), edge.kept.get(f"{PATH}/{id}/results"), edge.kept.delete(f"{PATH}/{id}")):
        assert (reply.status_code, reply.json()["error"]["type"]) == (404, "not_found_error")


def test_openais_lists_know_nothing_of_it(edge: Edge) -> None:
    id = begin(edge, entry("a"))
    wait(edge, id)
    assert edge.kept.get("/v1/batches").json()["data"] == []
    assert edge.kept.get(f"/v1/batches/{id}").status_code == 404
    assert edge.kept.get("/v1/files").json()["data"] == []


def test_a_cancel_ends_what_runs_and_keeps_what_is_done(make_edge: MakeEdge) -> None:
    edge = make_edge(batch_in_flight=2)
    edge.text.script = lambda submit: hello_script(submit) if b'"a"' in bytes(submit.messages) else silent(submit)
    id = begin(edge, *(entry(name) for name in "abcdef"))
    edge.text.wait_for(Submit, 3)
    early = edge.kept.get(f"{PATH}/{id}/results")
    assert (early.status_code, early.json()["type"]) == (404, "error")
    early = edge.kept.delete(f"{PATH}/{id}")
    assert (early.status_code, early.json()["error"]["type"]) == (409, "invalid_request_error")
    said = edge.kept.post(f"{PATH}/{id}/cancel").json()
    assert said["processing_status"] in ("canceling", "ended")
    assert said["cancel_initiated_at"] is not None
    batch = wait(edge, id)
    assert counts(batch) == {"succeeded": 1, "canceled": 5}
    assert {name: one["type"] for name, one in results(edge, id).items()} == {"a": "succeeded", **dict.fromkeys("bcdef", "canceled")}
    again = edge.kept.post(f"{PATH}/{id}/cancel")
    assert (again.status_code, again.json()["type"]) == (409, "error")


def test_what_is_answered_as_the_cancel_comes_keeps_its_line(make_edge: MakeEdge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that wait for each other's lines to be written."""
    may_write, ends = threading.Event(), []
    write, over = folder.write, batch_work.Work._over

    def slow(descriptor: int, data: bytes) -> None:
        may_write.wait(20)
        write(descriptor, data)

    def noted(work: batch_work.Work) -> str:
        end = over(work)
        ends.extend([end] if end else [])
        return end

    monkeypatch.setattr(batch_work.Work, "_over", noted)
    edge = make_edge(batch_in_flight=8)
    id = begin(edge, *(entry(name) for name in "abcd"))
    monkeypatch.setattr(folder, "write", slow)
    edge.wait(lambda: len(edge.text.received) >= 4)
    edge.kept.post(f"{PATH}/{id}/cancel")
    edge.wait(lambda: bool(ends))
    may_write.set()
    batch = wait(edge, id)
    assert results(edge, id).keys() == set("abcd")
    assert counts(batch).keys() <= {"succeeded", "canceled"}


def test_a_batch_whose_time_is_over_says_so_of_every_request_that_is_left(make_edge: MakeEdge, monkeypatch: pytest.MonkeyPatch) -> None:
    edge = make_edge(batch_in_flight=2)
    edge.text.script = lambda submit: hello_script(submit) if b'"a"' in bytes(submit.messages) else silent(submit)
    id = begin(edge, *(entry(name) for name in "abcd"))
    edge.text.wait_for(Submit, 3)
    later = batch_work.now_s() + 2 * batches.WINDOW_S
    monkeypatch.setattr(batch_work, "now_s", lambda: later)
    batch = wait(edge, id)
    assert counts(batch) == {"succeeded": 1, "expired": 3}
    assert {name: one["type"] for name, one in results(edge, id).items()} == {"a": "succeeded", **dict.fromkeys("bcd", "expired")}


def test_what_the_server_could_not_take_is_asked_again(make_edge: MakeEdge) -> None:
    edge = make_edge()
    times: list[int] = []

    def script(submit: Submit) -> list[Message]:
        times.append(1)
        if len(times) > 2:
            return hello_script(submit)
        return [Rejected(key=submit.key, status=503, type="server_error", code="engine_unavailable", message="later", retry_after_s=0.0)]

    edge.text.script = script
    id = begin(edge, entry("a"))
    assert counts(wait(edge, id)) == {"succeeded": 1}


def test_a_stopped_server_goes_on_where_it_was(tmp_path: Path) -> None:
    """As for a kill, nothing is said at the end: what was asked and not answered is asked again."""
    asked: list[str] = []

    def script(submit: Submit) -> list[Message]:
        asked.append(json.loads(bytes(submit.messages))[0]["content"])
        return hello_script(submit) if len(asked) % 7 else []

    id = ""
    for life in range(4):
        (tmp_path / str(life)).mkdir()
        edge = Edge(tmp_path / str(life), {"store": str(tmp_path / "s"), "batch_in_flight": 3})
        edge.text.script = script if life < 3 else hello_script
        edge.start()
        try:
            if not id:
                id = begin(edge, *(entry(str(i), temperature=-1 if i % 5 == 4 else 0) for i in range(40)))
            if life < 3:
                edge.wait(lambda life=life: len(asked) >= 7 * (life + 1))
                assert edge.kept.get(f"{PATH}/{id}").json()["processing_status"] == "in_progress"
            else:
                assert counts(wait(edge, id)) == {"succeeded": 32, "errored": 8}
                assert results(edge, id).keys() == {str(i) for i in range(40)}
        finally:
            edge.stop()


@pytest.mark.parametrize(("owner", "name"), [(Folder, "finish"), (Folder, "remove"), (batches.Record, "change"), (batches.Record, "read")])
def test_the_end_may_be_interrupted_anywhere(make_edge: MakeEdge, monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
    """The last steps are taken again until the batch is over; each is done as far as it comes before it fails, and then once more."""
    monkeypatch.setattr(batch_runner, "TROUBLE_S", 0.01)
    whole, failures = getattr(owner, name), []

    def fail(*args: Any) -> bool:
        """From the second call on, three times."""
        ending = not isinstance(args[0], batches.Record) or bool(args[0].private.final)
        if ending:
            failures.append(name)
        return ending and 1 < len(failures) <= 4

    async def later(*args: Any) -> Any:
        done = await whole(*args)
        if fail(*args):
            raise StoreUnavailable("no")
        return done

    def now(*args: Any) -> Any:
        done = whole(*args)
        if fail(*args):
            raise OSError(5, "no")
        return done

    edge = make_edge()
    first = begin(edge, entry("a"), entry("b", temperature=-1))
    monkeypatch.setattr(owner, name, now if owner is Folder else later)
    assert counts(wait(edge, first)) == {"succeeded": 1, "errored": 1}
    assert results(edge, first).keys() == {"a", "b"}


def test_tenants_do_not_see_each_other(make_edge: MakeEdge) -> None:
    edge = make_edge(tables="tables.toml", text=lambda t: setattr(t, "script", silent), batch_in_flight=1)
    keys = {digest_of(name.encode()): Principal(tenant=name) for name in ("a", "b")}
    body = msgspec.msgpack.encode(KeyTable(keys=keys))
    edge.text.call(lambda: edge.server.app.keyring.take(Tables(generation=1, body=body)))

    def ask(tenant: str, method: str, path: str, **more: Any) -> Any:
        return edge.kept.request(method, PATH + path, headers={"x-api-key": tenant}, **more)

    one = ask("a", "POST", "", json={"requests": [entry(f"a{i}") for i in range(3)]}).json()["id"]
    edge.text.wait_for(Submit, 1)
    two = ask("b", "POST", "", json={"requests": [entry(f"b{i}") for i in range(3)]}).json()["id"]
    for i in range(6):
        edge.text.send(*hello_script(edge.text.wait_for(Submit, i + 1)[i]))
    for tenant, id in (("a", one), ("b", two)):
        assert counts(wait(edge, id, **{"x-api-key": tenant})) == {"succeeded": 3}
    assert [submit.tenant for submit in edge.text.wait_for(Submit)].count("a") == 3
    assert [x["id"] for x in ask("b", "GET", "").json()["data"]] == [two]
    for method, path in (("GET", f"/{one}"), ("GET", f"/{one}/results"), ("POST", f"/{one}/cancel"), ("DELETE", f"/{one}")):
        assert ask("b", method, path).status_code == 404
    assert ask("none", "GET", "").json()["error"]["type"] == "authentication_error"


# ------------------------------------------------------------------ the list


def test_lists_have_pages(edge: Edge) -> None:
    ids = [begin(edge, entry("a")) for _ in range(5)][::-1]

    def page(query: str) -> tuple[list[str], bool]:
        reply = edge.kept.get(f"{PATH}?{query}")
        assert reply.status_code == 200, reply.text
        listed = msgspec.convert(reply.json(), MessageBatchList)
        found = [one.id for one in listed.data]
        assert (listed.first_id, listed.last_id) == ((found[0], found[-1]) if found else (None, None))
        return found, listed.has_more

    assert page("") == (ids, False)
    assert page("limit=2&beta=true") == (ids[:2], True)
    assert page(f"limit=2&after_id={ids[1]}") == (ids[2:4], True)
    assert page(f"limit=2&after_id={ids[3]}") == (ids[4:], False)
    assert page(f"limit=2&before_id={ids[3]}") == (ids[1:3], True)
    assert page(f"before_id={ids[0]}") == ([], False)


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=x", "limit=1001", "after_id=none", "before_id=none", "after=x", "after_id=a&before_id=b"]
)
def test_a_list_that_nobody_can_give_is_refused(edge: Edge, query: str) -> None:
    reply = edge.kept.get(f"{PATH}?{query}")
    error = reply.json()["error"]
    assert (reply.status_code, error["type"]) == (400, "invalid_request_error")
    assert query.split("&")[-1].partition("=")[0] in error["message"]


# ------------------------------------------------------------------ what is refused at once


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ({}, "requests"),
        ({"requests": []}, "requests"),
        ({"requests": {}}, "requests"),
        ({"requests": [entry("a"), entry("a")]}, "requests[1].custom_id"),
        ({"requests": [entry("a b")]}, "requests[0].custom_id"),
        ({"requests": [entry("")]}, "requests[0].custom_id"),
        ({"requests": [entry("x" * 65)]}, "requests[0].custom_id"),
        ({"requests": [{"custom_id": "a"}]}, "requests[0].params"),
        ({"requests": [{"custom_id": "a", "params": []}]}, "requests[0].params"),
        ({"requests": [{**entry("a"), "priority": 1}]}, "priority"),
        ({"requests": [entry("a")], "colour": {}}, "colour"),
        ({"requests": [entry(str(i)) for i in range(4)]}, "requests"),
    ],
    ids=lambda value: None if isinstance(value, str) else json.dumps(value)[:50],
)
def test_what_is_no_batch_is_refused_by_name(make_edge: MakeEdge, body: dict[str, Any], name: str) -> None:
    edge = make_edge(max_batch_lines=3)
    reply = edge.kept.post(PATH, json=body)
    error = reply.json()
    assert (reply.status_code, error["type"], error["error"]["type"]) == (400, "error", "invalid_request_error")
    assert name in error["error"]["message"]


def test_a_request_may_be_as_large_as_by_itself_and_of_many_lines(make_edge: MakeEdge) -> None:
    edge = make_edge(max_body_bytes=100_000)
    large = "x" * 99_800
    body = json.dumps({"requests": [{"custom_id": "a", "params": params(large)}]})
    assert edge.kept.post(PATH, content=body).status_code == 200
    pretty = json.dumps({"requests": [entry("b"), entry("c")]}, indent=2)
    id = edge.kept.post(PATH, content=pretty).json()["id"]
    assert counts(wait(edge, id)) == {"succeeded": 2}
    texts = {json.loads(bytes(submit.messages))[0]["content"] for submit in edge.text.wait_for(Submit)}
    assert texts == {large, "b", "c"}


def test_without_a_store_there_are_none(make_edge: MakeEdge) -> None:
    edge = make_edge(no_store=True)
    assert edge.kept.get(PATH).status_code == 404
