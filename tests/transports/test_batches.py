"""Batches, with OpenAI's own client against an edge whose text is a fake."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest
from edge_kit import Edge, MakeEdge, delta, finished, hello_script, silent
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import OpenAI

from penstock.core.protocol.control import Tables
from penstock.core.protocol.messages import Cancel, Message, Park, Rejected, Submit, Unpark
from penstock.core.protocol.tables import KeyTable, Principal, digest_of
from penstock.transports import batch_lines, batch_runner, batch_work, batches, folder
from penstock.transports.batch_lines import Check, Reader, answered, finished_lines, not_run
from penstock.transports.batches import Record
from penstock.transports.files import Files
from penstock.transports.folder import Folder
from penstock.transports.job import BACKGROUND
from penstock.transports.store import StoreUnavailable

CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"
OVER = ("completed", "failed", "cancelled", "expired")


def line(id: str, url: str = CHATS, **body: Any) -> dict[str, Any]:
    asked = {"messages": [{"role": "user", "content": id}]} if url == CHATS else {"prompt": id}
    return {"custom_id": id, "method": "POST", "url": url, "body": {"model": "brook", **asked, **body}}


def jsonl(*lines: Any) -> bytes:
    return b"".join(one if isinstance(one, bytes) else json.dumps(one).encode() + b"\n" for one in lines)


@pytest.fixture
def edge(make_edge: MakeEdge) -> Edge:
    return make_edge()


@pytest.fixture
def client(edge: Edge) -> Iterator[OpenAI]:
    with edge.client() as client:
        yield client


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_work, "PROGRESS_S", 0.02)
    monkeypatch.setattr(batch_work, "RETRY_S", (0.01, 0.02))


def begin(client: OpenAI, data: bytes, endpoint: Any = CHATS, **more: Any) -> Any:
    file = client.files.create(file=("in.jsonl", data), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **more)


def wait(client: OpenAI, id: str, *states: str) -> Any:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        batch = client.batches.retrieve(id)
        if batch.status in (states or OVER):
            return batch
        time.sleep(0.01)
    raise AssertionError(f"still {batch}")


def lines_of(client: OpenAI, id: str | None) -> dict[str, Any]:
    if id is None:
        return {}
    found = [json.loads(one) for one in client.files.content(id).read().splitlines()]
    by_id = {one["custom_id"]: one for one in found}
    assert len(by_id) == len(found), "no line comes twice"
    return by_id


def usages(client: OpenAI, batch: Any) -> list[dict[str, Any]]:
    return [one["response"]["body"]["usage"] for one in lines_of(client, batch.output_file_id).values()]


def test_a_batch_runs_to_its_end(edge: Edge, client: OpenAI) -> None:
    made = begin(client, jsonl(line("a"), line("b", n=2), line("c", temperature=-1)), metadata={"night": "ly"})
    assert (made.object, made.status, made.endpoint, made.completion_window) == ("batch", "validating", CHATS, "24h")
    assert made.expires_at == made.created_at + 86400
    batch = wait(client, made.id)
    assert batch.status == "completed"
    assert batch.request_counts.to_dict() == {"total": 3, "completed": 2, "failed": 1}
    assert batch.metadata == {"night": "ly"}
    assert batch.model == "brook"
    assert (made.usage, batch.usage and batch.usage.total_tokens) == (None, sum(usage["total_tokens"] for usage in usages(client, batch)))
    assert None not in (batch.in_progress_at, batch.finalizing_at, batch.completed_at)
    assert (batch.errors, batch.failed_at, batch.cancelled_at, batch.expired_at) == (None,) * 4
    output = lines_of(client, batch.output_file_id)
    assert output.keys() == {"a", "b"}
    for one in output.values():
        assert one.keys() == {"id", "custom_id", "response", "error"}
        assert one["id"].startswith("batch_req_")
        assert one["error"] is None
        assert one["response"]["status_code"] == 200
        assert one["response"]["request_id"] in one["response"]["body"]["id"]
    assert [c["message"]["content"] for c in output["b"]["response"]["body"]["choices"]] == ["Hello world"] * 2
    (wrong,) = lines_of(client, batch.error_file_id).values()
    assert (wrong["custom_id"], wrong["response"]["status_code"]) == ("c", 400)
    assert wrong["response"]["body"]["error"]["param"] == "temperature"
    file = client.files.retrieve(batch.output_file_id)
    assert (file.purpose, file.filename) == ("batch_output", f"{batch.id}_output.jsonl")
    assert {submit.priority for submit in edge.text.wait_for(Submit)} == {BACKGROUND}
    assert [one.id for one in client.batches.list()] == [batch.id]
    assert edge.server.gateway.active == 0
    assert edge.server.gateway.entered is None, "nothing is left that others would pay for"


def test_without_failures_there_is_no_error_file_and_the_other_way_round(client: OpenAI) -> None:
    good = wait(client, begin(client, jsonl(line("a", TEXTS)), TEXTS).id)
    assert (good.status, good.error_file_id) == ("completed", None)
    assert lines_of(client, good.output_file_id)["a"]["response"]["body"]["object"] == "text_completion"
    bad = wait(client, begin(client, jsonl(line("a", TEXTS, max_tokens=-1)), TEXTS).id)
    assert (bad.status, bad.output_file_id) == ("completed", None)
    assert bad.error_file_id is not None


@pytest.mark.parametrize("more", [{"stream": True}, {"background": True}])
def test_what_no_batch_can_answer_is_an_error_of_its_line(edge: Edge, client: OpenAI, more: dict[str, Any]) -> None:
    batch = wait(client, begin(client, jsonl(line("a", **more))).id)
    (wrong,) = lines_of(client, batch.error_file_id).values()
    assert wrong["response"]["body"]["error"]["param"] == next(iter(more))
    assert not [m for m in edge.text.received if isinstance(m, Submit)]


@pytest.mark.parametrize(
    ("data", "code", "number", "param"),
    [
        (b"", "empty_file", None, None),
        (b"\n \n", "empty_file", None, None),
        (jsonl(line("a"), b"no json\n"), "invalid_json_line", 2, None),
        (jsonl(line("a"), b"\n", b"[1]\n"), "invalid_json_line", 3, None),
        (jsonl(b"\xff\n"), "invalid_json_line", 1, None),
        (jsonl(b"[" * 3000 + b"\n"), "invalid_json_line", 1, None),
        (jsonl({**line("a"), "custom_id": 1}), "invalid_json_line", 1, "custom_id"),
        (jsonl({**line("a"), "url": 1}), "invalid_json_line", 1, "url"),
        (jsonl({k: v for k, v in line("a").items() if k != "custom_id"}), "missing_required_parameter", 1, "custom_id"),
        (jsonl({k: v for k, v in line("a").items() if k != "body"}), "missing_required_parameter", 1, "body"),
        (jsonl({**line("a"), "method": "GET"}), "invalid_method", 1, "method"),
        (jsonl(line("a"), line("b", TEXTS)), "mismatched_url", 2, "url"),
        (jsonl({**line("a"), "body": 1}), "invalid_body", 1, "body"),
        (jsonl(line("a", model=1)), "invalid_body", 1, "body"),
        (jsonl(line("")), "invalid_custom_id", 1, "custom_id"),
        (jsonl(line("x" * 513)), "invalid_custom_id", 1, "custom_id"),
        (jsonl(line("a"), line("b"), line("a")), "duplicate_custom_id", 3, "custom_id"),
        (jsonl(line("a"), line("b", model="other")), "mismatched_model", 2, "body.model"),
        (jsonl(line("a", model="other")), "model_not_found", 1, "body.model"),
        (jsonl(*(line(str(i)) for i in range(11))), "too_many_tasks", None, None),
        (jsonl(line("a", user="x" * 5000)), "line_too_long", 1, None),
    ],
)
def test_a_file_that_is_wrong_fails_with_the_line(
    make_edge: MakeEdge, data: bytes, code: str, number: int | None, param: str | None
) -> None:
    edge = make_edge(max_batch_lines=10, max_body_bytes=4096)
    with edge.client() as client:
        batch = wait(client, begin(client, data).id)
        assert batch.status == "failed"
        assert batch.failed_at is not None
        (error,) = batch.errors.data
        assert (error.code, error.line, error.param) == (code, number, param)
        assert (batch.output_file_id, batch.error_file_id) == (None, None)
    assert not [m for m in edge.text.received if isinstance(m, Submit)]


def test_many_wrong_lines_are_told_up_to_a_bound(client: OpenAI) -> None:
    batch = wait(client, begin(client, b"x\n" * 1000).id)
    assert [error.line for error in batch.errors.data] == list(range(1, 101))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"endpoint": "/v1/audio"}, "endpoint"),
        ({"endpoint": "/tokenize"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"input_file_id": "file-0"}, "input_file_id"),
        ({"input_file_id": "../x"}, "input_file_id"),
        ({"input_file_id": 3}, "input_file_id"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k"),
        ({"output_expires_after": {"anchor": "now", "seconds": 3600}}, "output_expires_after.anchor"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after.seconds"),
    ],
)
def test_a_request_that_is_wrong_is_refused_by_name(edge: Edge, client: OpenAI, fields: dict[str, Any], param: str) -> None:
    file = client.files.create(file=("in", jsonl(line("a"))), purpose="batch")
    body = {"input_file_id": file.id, "endpoint": CHATS, "completion_window": "24h", **fields}
    reply = edge.kept.post("/v1/batches", json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
    assert list(client.batches.list()) == []


def test_an_output_is_no_input_and_may_end_earlier(edge: Edge, client: OpenAI) -> None:
    first = begin(client, jsonl(line("a")), output_expires_after={"anchor": "created_at", "seconds": 3600})
    output = client.files.retrieve(wait(client, first.id).output_file_id)
    assert output.expires_at == output.created_at + 3600
    with pytest.raises(openai.BadRequestError, match="batch_output"):
        client.batches.create(input_file_id=output.id, endpoint=CHATS, completion_window="24h")


def test_a_cancel_ends_what_runs_and_keeps_what_is_done(make_edge: MakeEdge) -> None:
    def script(submit: Submit) -> list[Message]:
        return hello_script(submit) if b'"done' in bytes(submit.messages) else []

    edge = make_edge(text=lambda t: setattr(t, "script", script), batch_in_flight=2)
    with edge.client() as client:
        batch = begin(client, jsonl(line("done 1"), line("done 2"), *(line(f"waits {i}") for i in range(50))))
        edge.text.wait_for(Submit, 4)
        said = client.batches.cancel(batch.id)
        assert said.status == "cancelling"
        assert said.cancelling_at is not None
        over = wait(client, batch.id)
        assert over.status == "cancelled"
        assert over.cancelled_at is not None
        assert over.request_counts.to_dict() == {"total": 52, "completed": 2, "failed": 0}
        assert lines_of(client, over.output_file_id).keys() == {"done 1", "done 2"}
        assert len(edge.text.wait_for(Cancel, 2)) == 2
        assert len(edge.text.wait_for(Submit)) == 4
        with pytest.raises(openai.ConflictError, match="cancelled already"):
            client.batches.cancel(batch.id)
        with pytest.raises(openai.NotFoundError):
            client.batches.cancel("batch_0")
    edge.wait(lambda: edge.server.gateway.active == 0)


def test_one_batch_of_a_tenant_after_the_other_and_a_waiting_one_can_be_cancelled(make_edge: MakeEdge) -> None:
    edge = make_edge(text=lambda t: setattr(t, "script", silent))
    with edge.client() as client:
        first = begin(client, jsonl(line("first")))
        (submit,) = edge.text.wait_for(Submit)
        second, third = begin(client, jsonl(line("second"))), begin(client, jsonl(line("third")))
        client.batches.cancel(second.id)
        assert wait(client, second.id).status == "cancelled"
        assert client.batches.retrieve(third.id).status == "validating"
        edge.text.script = hello_script
        edge.text.send(*hello_script(submit))
        assert wait(client, first.id).status == wait(client, third.id).status == "completed"


def test_a_batch_whose_time_is_over_says_so_of_every_line_that_is_left(make_edge: MakeEdge, monkeypatch: pytest.MonkeyPatch) -> None:
    def script(submit: Submit) -> list[Message]:
        return hello_script(submit) if b'"done' in bytes(submit.messages) else []

    monkeypatch.setattr(batches, "WINDOW_S", 1)
    edge = make_edge(text=lambda t: setattr(t, "script", script), batch_in_flight=2)
    with edge.client() as client:
        batch = begin(client, jsonl(line("done"), *(line(f"waits {i}") for i in range(5))))
        over = wait(client, batch.id)
        assert (over.status, over.expired_at is not None) == ("expired", True)
        assert over.request_counts.to_dict() == {"total": 6, "completed": 1, "failed": 5}
        assert lines_of(client, over.output_file_id).keys() == {"done"}
        left = lines_of(client, over.error_file_id)
        assert left.keys() == {f"waits {i}" for i in range(5)}
        assert {one["error"]["code"] for one in left.values()} == {"batch_expired"}
        assert {one["response"] for one in left.values()} == {None}


def test_what_the_server_could_not_take_is_asked_again(make_edge: MakeEdge) -> None:
    seen: dict[bytes, int] = {}

    def script(submit: Submit) -> list[Message]:
        seen[bytes(submit.messages)] = times = seen.get(bytes(submit.messages), 0) + 1
        if times == 1:
            return [Rejected(key=submit.key, status=429, type="rate_limit_error", code="queue_full", message="full", param=None)]
        return hello_script(submit)

    edge = make_edge(text=lambda t: setattr(t, "script", script))
    with edge.client() as client:
        batch = wait(client, begin(client, jsonl(*(line(str(i)) for i in range(5)))).id)
        assert batch.request_counts.to_dict() == {"total": 5, "completed": 5, "failed": 0}
        assert set(seen.values()) == {2}


def test_so_many_run_at_once_and_fewer_while_others_ask(make_edge: MakeEdge) -> None:
    edge = make_edge(text=lambda t: setattr(t, "script", silent), batch_in_flight=4)
    with edge.client() as client:
        begin(client, jsonl(*(line(str(i)) for i in range(20))))
        first = edge.text.wait_for(Submit, 4)
        edge.wait(lambda: edge.server.gateway.active == 4)
        places = edge.server._runner._bench.places  # type: ignore[union-attr]
        assert places.limit() == 4
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(client.completions.create, model="brook", prompt="I ask")
            (mine,) = [one for one in edge.text.wait_for(Submit, 5) if one not in first]
            assert [one.key for one in edge.text.wait_for(Park, 3)] == [one.key for one in first[1:]], "the oldest goes on"
            assert places.limit() == 1
            edge.text.send(*hello_script(first[0]))
            assert edge.text.wait_for(Unpark, 1)[0].key == first[1].key, "then the next"
            assert len(edge.text.wait_for(Submit)) == 5, "no other is begun"
            edge.text.send(*hello_script(mine))
            assert other.result(10).choices[0].text == "Hello world"
        assert {one.key for one in edge.text.wait_for(Unpark, 3)} == {one.key for one in first[1:]}
        edge.text.wait_for(Submit, 6)
        assert places.limit() == 4
        assert edge.server.gateway.entered is not None


def test_a_batch_without_its_input_fails(make_edge: MakeEdge) -> None:
    edge = make_edge(text=lambda t: setattr(t, "script", silent))
    with edge.client() as client:
        blocker = begin(client, jsonl(line("a")))
        edge.text.wait_for(Submit)
        batch = begin(client, jsonl(line("b")))
        client.files.delete(batch.input_file_id)
        client.batches.cancel(blocker.id)
        over = wait(client, batch.id)
        assert (over.status, over.errors.data[0].code) == ("failed", "file_not_found")


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
            with edge.client() as client:
                if not id:
                    id = begin(client, jsonl(*(line(str(i), temperature=-1 if i % 5 == 4 else 0) for i in range(40)))).id
                if life < 3:
                    edge.wait(lambda life=life: len(asked) >= 7 * (life + 1))
                    assert client.batches.retrieve(id).status == "in_progress"
                else:
                    batch = wait(client, id)
                    assert batch.status == "completed"
                    assert batch.request_counts.to_dict() == {"total": 40, "completed": 32, "failed": 8}
                    output, errors = lines_of(client, batch.output_file_id), lines_of(client, batch.error_file_id)
                    assert output.keys() | errors.keys() == {str(i) for i in range(40)}
                    assert len(output) == 32
        finally:
            edge.stop()


@pytest.mark.parametrize(("owner", "name"), [(Folder, "finish"), (Files, "put"), (Folder, "remove"), (Record, "change"), (Record, "read")])
def test_the_end_may_be_interrupted_anywhere(make_edge: MakeEdge, monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
    """The last steps are taken again until the batch is over; each is done as far as it comes before it fails, and then once more."""
    monkeypatch.setattr(batch_runner, "TROUBLE_S", 0.01)
    whole = getattr(owner, name)
    failures: list[str] = []

    def fail(*args: Any) -> bool:
        """From the second call on, three times."""
        ending = not isinstance(args[0], Record) or bool(args[0].private.final)
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

    monkeypatch.setattr(owner, name, now if owner is Folder else later)
    with make_edge().client() as client:
        batch = wait(client, begin(client, jsonl(line("a"), line("b", temperature=-1))).id)
        assert batch.status == "completed"
        assert lines_of(client, batch.output_file_id).keys() == {"a"}
        assert lines_of(client, batch.error_file_id).keys() == {"b"}
        assert len(list(client.files.list(purpose="batch_output"))) == 2
        again = wait(client, begin(client, jsonl(line("a"))).id)
        assert (again.status, again.error_file_id) == ("completed", None)
    assert name in ("remove", "read") or len(failures) >= 4


def test_a_line_that_cannot_be_written_is_asked_again(make_edge: MakeEdge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of it is there: nothing is written behind that before it is cut off."""
    monkeypatch.setattr(batch_runner, "TROUBLE_S", 0.01)
    whole = folder.write
    calls: list[int] = []

    def half(descriptor: int, data: bytes) -> None:
        calls.append(1)
        if len(calls) in (3, 6, 7):
            whole(descriptor, data[: len(data) // 2])
            raise OSError(28, "No space left on device")
        whole(descriptor, data)

    monkeypatch.setattr(folder, "write", half)
    with make_edge(batch_in_flight=4).client() as client:
        batch = wait(client, begin(client, jsonl(*(line(str(i)) for i in range(12)))).id)
        assert batch.request_counts.to_dict() == {"total": 12, "completed": 12, "failed": 0}
        assert lines_of(client, batch.output_file_id).keys() == {str(i) for i in range(12)}


def test_tenants_take_turns_and_do_not_see_each_other(make_edge: MakeEdge) -> None:
    edge = make_edge(tables="tables.toml", text=lambda t: setattr(t, "script", silent), batch_in_flight=1)
    keys = {digest_of(name.encode()): Principal(tenant=name) for name in ("a", "b")}
    body = msgspec.msgpack.encode(KeyTable(keys=keys))
    edge.text.call(lambda: edge.server.app.keyring.take(Tables(generation=1, body=body)))
    with edge.client(api_key="a") as a, edge.client(api_key="b") as b:
        one = begin(a, jsonl(*(line(f"a{i}") for i in range(3))))
        edge.text.wait_for(Submit, 1)
        two = begin(b, jsonl(*(line(f"b{i}") for i in range(3))))
        wait(b, two.id, "in_progress")
        for i in range(6):
            edge.text.send(*hello_script(edge.text.wait_for(Submit, i + 1)[i]))
        assert wait(a, one.id).status == wait(b, two.id).status == "completed"
        order = [json.loads(bytes(submit.messages))[0]["content"] for submit in edge.text.wait_for(Submit)]
        assert order == ["a0", "a1", "b0", "a2", "b1", "b2"], "a1 waited before there was a b"
        assert {submit.tenant for submit in edge.text.wait_for(Submit)[:2]} == {"a"}
        assert [x.id for x in b.batches.list()] == [two.id]
        for ask in (b.batches.retrieve, b.batches.cancel):
            with pytest.raises(openai.NotFoundError):
                ask(one.id)
        with pytest.raises(openai.BadRequestError):
            b.batches.create(input_file_id=one.input_file_id, endpoint=CHATS, completion_window="24h")
        with pytest.raises(openai.NotFoundError):
            b.files.content(str(a.batches.retrieve(one.id).output_file_id))


def test_lists_have_pages(client: OpenAI) -> None:
    ids = [wait(client, begin(client, jsonl(line("a"))).id).id for _ in range(3)]
    page = client.batches.list(limit=2)
    assert ([one.id for one in page.data], page.has_more) == ([ids[2], ids[1]], True)
    assert [one.id for one in client.batches.list(limit=1)] == ids[::-1]


# ------------------------------------------------------------------ lines


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200).map(lambda data: data.replace(b"\xef", b"e")), st.integers(1, 9), st.integers(1, 30))
def test_lines_are_read_however_the_windows_fall(tmp_path_factory: pytest.TempPathFactory, data: bytes, window: int, longest: int) -> None:
    path = tmp_path_factory.mktemp("lines") / "file"
    path.write_bytes(data)
    before, batch_lines.WINDOW = batch_lines.WINDOW, window
    try:
        reader = Reader(path, longest)
        found: list[tuple[int, bytes | None]] = []
        while not reader.over:
            found += reader.window()
        reader.close()
    finally:
        batch_lines.WINDOW = before
    whole = [(n, one if len(one) <= longest else None) for n, one in enumerate(data.split(b"\n"), 1)]
    assert found == [(n, one) for n, one in whole if one is None or one.strip()]


def test_a_mark_of_the_byte_order_is_no_part_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\xef\xbb\xbf" + jsonl(line("a")))
    reader = Reader(path, 1000)
    check = Check(CHATS, 10, 1000)
    while not reader.over:
        check.take(reader.window())
    reader.close()
    check.end()
    assert (check.errors, check.total, check.model) == ([], 1, "brook")


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 400))
def test_what_was_written_in_part_is_cut_off(tmp_path_factory: pytest.TempPathFactory, size: int) -> None:
    path = tmp_path_factory.mktemp("lines") / "file"
    lines = [answered("a\n\u2028", 200, "r", b'{"x":1}'), not_run("b", "c", "m"), answered("c", 400, "r", b"{}")]
    whole = b"".join(lines)
    path.write_bytes(whole[:size])
    ends = [0, len(lines[0]), len(lines[0]) + len(lines[1]), len(whole)]
    kept = max(i for i, end in enumerate(ends) if end <= size)
    assert finished_lines(path) == set(["a\n\u2028", "b", "c"][:kept])
    assert path.read_bytes() == b"".join(lines[:kept])


def test_an_answer_is_one_line_whatever_its_body_looks_like() -> None:
    one = answered("a", 200, "r", b'{\n "x": [1,\n 2]\n}')
    assert one.count(b"\n") == 1
    assert json.loads(one)["response"]["body"] == {"x": [1, 2]}


def test_an_answer_that_is_no_json_is_an_error_of_its_line(edge: Edge, client: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a field that asks for a stream had not been found."""
    monkeypatch.setattr(batch_work, "unfit", lambda _: None)
    batch = wait(client, begin(client, jsonl(line("a", stream=True), line("b"))).id)
    assert lines_of(client, batch.output_file_id).keys() == {"b"}
    (wrong,) = lines_of(client, batch.error_file_id).values()
    assert (wrong["response"], wrong["error"]["code"]) == (None, "internal_error")


def test_a_row_that_comes_late_is_no_trouble(edge: Edge, client: OpenAI) -> None:
    """An answer of several deltas."""

    def script(submit: Submit) -> list[Message]:
        return [delta({"key": submit.key, "text": "x"}), delta({"key": submit.key, "text": "y", "reason": "stop"}), finished(submit.key)]

    edge.text.script = script
    batch = wait(client, begin(client, jsonl(line("a"))).id)
    assert lines_of(client, batch.output_file_id)["a"]["response"]["body"]["choices"][0]["message"]["content"] == "xy"
