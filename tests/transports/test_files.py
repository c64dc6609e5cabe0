"""Files, with OpenAI's own client and with forms that no client would send."""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest
from edge_kit import Edge, MakeEdge
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import OpenAI

from penstock.core.protocol.config import build
from penstock.core.protocol.control import Tables
from penstock.core.protocol.errors import ConfigError
from penstock.core.protocol.tables import KeyTable, Principal, digest_of
from penstock.transports import batch_runner, files
from penstock.transports.files import LONGEST_NAME, clean_name
from penstock.transports.folder import Folder, new_id

LINES = b'{"custom_id":"a"}\n{"custom_id":"b"}\n'


@pytest.fixture
def edge(make_edge: MakeEdge) -> Edge:
    return make_edge()


@pytest.fixture
def client(edge: Edge) -> Iterator[OpenAI]:
    with edge.client() as client:
        yield client


def folder(edge: Edge) -> Path:
    return edge.folder / "files"


def contents(edge: Edge) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder(edge).glob("*"))] if folder(edge).exists() else []


def test_a_file_comes_is_found_and_goes(edge: Edge, client: OpenAI) -> None:
    made = client.files.create(file=("in.jsonl", LINES), purpose="batch")
    assert (made.object, made.bytes, made.filename, made.purpose, made.status) == ("file", len(LINES), "in.jsonl", "batch", "processed")
    assert made.id.startswith("file-")
    assert made.expires_at == made.created_at + 30 * 86400
    assert client.files.retrieve(made.id) == made
    assert [one.id for one in client.files.list()] == [made.id]
    assert client.files.content(made.id).read() == LINES
    (path,) = folder(edge).iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder(edge).stat().st_mode) == 0o700
    gone = client.files.delete(made.id)
    assert (gone.id, gone.deleted) == (made.id, True)
    assert contents(edge) == []
    for ask in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            ask(made.id)  # type: ignore[operator]


@pytest.mark.parametrize("size", [0, 1, 65536, (1 << 20) - 1, 1 << 20, 5 * (1 << 20) + 17])
def test_every_byte_comes_back(edge: Edge, client: OpenAI, size: int) -> None:
    data = random.Random(size).randbytes(size)
    made = client.files.create(file=("in", data), purpose="batch")
    assert made.bytes == size
    assert client.files.content(made.id).read() == data
    reply = edge.kept.get(f"/v1/files/{made.id}/content")
    assert reply.headers["content-type"] == "application/octet-stream"
    assert reply.headers["content-length"] == str(size)


def test_lists_have_pages_and_filters(client: OpenAI) -> None:
    ids = [client.files.create(file=(f"{i}", LINES), purpose="batch").id for i in range(5)]
    assert [one.id for one in client.files.list(limit=2)] == ids[::-1]
    assert [one.id for one in client.files.list(order="asc", after=ids[2])] == ids[3:]
    assert [one.id for one in client.files.list(purpose="batch", limit=1)] == ids[::-1]
    assert list(client.files.list(purpose="batch_output")) == []


def test_a_file_may_end_earlier(client: OpenAI) -> None:
    made = client.files.create(file=("in", LINES), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600})
    assert made.expires_at == made.created_at + 3600


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("in.jsonl", "in.jsonl"),
        ("../../etc/passwd", "passwd"),
        ("C:\\temp\\in.jsonl", "in.jsonl"),
        ("..", "file"),
        ("a/", "file"),
        ("a\x00\r\nb", "ab"),
        ("x" * 300, "x" * LONGEST_NAME),
        ("größe.jsonl", "größe.jsonl"),
    ],
)
def test_a_clients_name_is_shown_and_no_path(given: str, shown: str) -> None:
    assert clean_name(given) == shown


def test_names_of_the_worst_kind_come_back_in_a_header_that_is_one(edge: Edge, client: OpenAI) -> None:
    made = client.files.create(file=('../ü"\\";x=".jsonl', LINES), purpose="batch")
    reply = edge.kept.get(f"/v1/files/{made.id}/content")
    assert reply.headers["content-disposition"].isascii()
    assert reply.headers["content-disposition"].count('"') == 2
    assert [path.name for path in folder(edge).iterdir()] == [made.id]


def form(*parts: tuple[str, bytes], boundary: str = "b") -> tuple[dict[str, str], bytes]:
    body = b"".join(b"--%s\r\n%s\r\n\r\n%s\r\n" % (boundary.encode(), head.encode(), data) for head, data in parts)
    return {"content-type": f"multipart/form-data; boundary={boundary}"}, body + b"--%s--\r\n" % boundary.encode()


FILE = 'content-disposition: form-data; name="file"; filename="x"'
PURPOSE = 'content-disposition: form-data; name="purpose"'


def field(name: str) -> str:
    return f'content-disposition: form-data; name="{name}"'


@pytest.mark.parametrize(
    ("parts", "param", "status"),
    [
        ([(FILE, b"x")], "purpose", 400),
        ([(PURPOSE, b"batch")], "file", 400),
        ([(FILE, b"x"), (PURPOSE, b"assistants")], "purpose", 400),
        ([(FILE, b"x"), (PURPOSE, b"mine")], "purpose", 400),
        ([(FILE, b"x"), (PURPOSE, b"batch_output")], "purpose", 400),
        ([(FILE, b"x"), (FILE, b"y"), (PURPOSE, b"batch")], "file", 400),
        ([(FILE, b"x"), (PURPOSE, b"batch"), (PURPOSE, b"batch")], "purpose", 400),
        ([(FILE, b"x"), (PURPOSE, b"batch"), (field("other"), b"1")], "other", 400),
        ([(FILE, b"x"), (PURPOSE, b"b" * 5000)], "purpose", 400),
        ([(FILE, b"x"), (PURPOSE, b"\xff")], None, 400),
        ([(FILE, b"x" * 2000), (PURPOSE, b"batch")], "file", 413),
        ([(FILE, b"x"), (PURPOSE, b"batch"), (field("expires_after[seconds]"), b"3600")], "expires_after.anchor", 400),
        (
            [(FILE, b"x"), (PURPOSE, b"batch"), (field("expires_after[anchor]"), b"created_at"), (field("expires_after[seconds]"), b"1")],
            "expires_after.seconds",
            400,
        ),
        ([(FILE, b"x"), (PURPOSE, b"batch"), *((field(f"f{i}"), b"") for i in range(20))], None, 400),
        ([("content-disposition: attachment", b"x")], None, 400),
    ],
)
def test_a_form_that_is_wrong_is_named_and_leaves_nothing(
    make_edge: MakeEdge, parts: list[tuple[str, bytes]], param: str | None, status: int
) -> None:
    edge = make_edge(max_file_bytes=1000)
    headers, body = form(*parts)
    reply = edge.kept.post("/v1/files", headers=headers, content=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (status, param)
    assert contents(edge) == []
    assert edge.kept.get("/v1/files").json()["data"] == []


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({"content-type": "application/json"}, b"{}", 415),
        ({"content-type": "multipart/form-data"}, b"", 400),
        ({"content-type": "multipart/form-data; boundary=b"}, b"", 400),
        ({"content-type": "multipart/form-data; boundary=b"}, b"no form", 400),
        ({"content-type": "multipart/form-data; boundary=b"}, b"--b\r\n" + FILE.encode() + b"\r\n\r\nnot ended", 400),
        ({"content-type": "multipart/form-data; boundary=b", "content-encoding": "gzip"}, b"", 415),
        ({}, b"", 415),
    ],
)
def test_what_is_no_form_is_refused_and_leaves_nothing(edge: Edge, headers: dict[str, str], body: bytes, status: int) -> None:
    reply = edge.kept.post("/v1/files", headers=headers, content=body)
    assert reply.status_code == status, reply.text
    assert contents(edge) == []


def test_a_client_that_leaves_half_way_leaves_nothing(edge: Edge) -> None:
    headers, body = form((PURPOSE, b"batch"), (FILE, b"x" * 3_000_000))

    def half() -> Iterator[bytes]:
        yield body[:2_000_000]
        raise RuntimeError("gone")

    with pytest.raises(RuntimeError), edge.http() as http:
        http.post("/v1/files", headers=headers, content=half())
    edge.wait(lambda: not edge.server._state.tasks, "the request's end")
    assert contents(edge) == []


def test_a_full_disk_is_a_503_that_leaves_nothing(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    headers, body = form((PURPOSE, b"batch"), (FILE, b"x" * 3_000_000))
    with monkeypatch.context() as patch:
        patch.setattr(files, "write", full)
        reply = edge.kept.post("/v1/files", headers=headers, content=body)
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "store_unavailable")
    assert "No space left" in reply.json()["error"]["message"]
    assert contents(edge) == []
    assert edge.kept.post("/v1/files", headers=headers, content=body).status_code == 200


def test_a_tenant_has_so_many_files_and_all_together_so_many_bytes(make_edge: MakeEdge) -> None:
    edge = make_edge(max_files=2, max_files_bytes=10_000)
    with edge.client() as client:
        first = client.files.create(file=("a", b"x"), purpose="batch")
        client.files.create(file=("b", b"x"), purpose="batch")
        with pytest.raises(openai.RateLimitError, match="--max-files"):
            client.files.create(file=("c", b"x"), purpose="batch")
        client.files.delete(first.id)
        client.files.create(file=("d", b"x" * 20_000), purpose="batch")
    with (again := make_edge(max_files_bytes=10_000)).client() as client:
        made = client.files.create(file=("d", b"x" * 20_000), purpose="batch")
        with pytest.raises(openai.RateLimitError, match="--max-files-bytes"):
            client.files.create(file=("c", b"x"), purpose="batch")
        client.files.delete(made.id)
        assert contents(again) == []


def test_tenants_do_not_see_each_other(make_edge: MakeEdge) -> None:
    edge = make_edge(tables="tables.toml")
    keys = {digest_of(name.encode()): Principal(tenant=name) for name in ("a", "b")}
    body = msgspec.msgpack.encode(KeyTable(keys=keys))
    edge.text.call(lambda: edge.server.app.keyring.take(Tables(generation=1, body=body)))
    with edge.client(api_key="a") as a, edge.client(api_key="b") as b:
        made = a.files.create(file=("x", LINES), purpose="batch")
        assert list(b.files.list()) == []
        for ask in (b.files.retrieve, b.files.content, b.files.delete):
            with pytest.raises(openai.NotFoundError):
                ask(made.id)  # type: ignore[operator]
        assert a.files.content(made.id).read() == LINES


@pytest.mark.parametrize("id", ["..", "file-..", "..%2f..%2fetc%2fpasswd", "lock", "file-x.part", "%00"])
def test_an_id_is_no_path(edge: Edge, client: OpenAI, id: str) -> None:
    client.files.create(file=("x", LINES), purpose="batch")
    for path in (f"/v1/files/{id}", f"/v1/files/{id}/content"):
        reply = edge.kept.request("GET", httpx.URL(f"{edge.url}{path}"))
        assert reply.status_code in (400, 404)


def test_files_stay_with_a_store_that_stays(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    path.mkdir()
    id = ""
    for life in range(2):
        (tmp_path / str(life)).mkdir()
        edge = Edge(tmp_path / str(life), {"store": str(path / "s")}).start()
        try:
            with edge.client() as client:
                id = id or client.files.create(file=("x", LINES), purpose="batch").id
                assert client.files.content(id).read() == LINES
            with pytest.raises(ConfigError, match="another server uses"):
                Folder(path / "s-files").lock()
        finally:
            edge.stop()
    again = Folder(path / "s-files")
    again.lock()
    again.unlock()
    assert sorted(one.name for one in path.iterdir() if not one.name.endswith(("-wal", "-shm"))) == ["s", "s-files"]


def test_the_folder_sweeps_what_nobody_knows(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "f")
    known, old, new, half = (new_id("file-") for _ in range(4))
    for id in (known, old, new, half):
        os.close(folder.create(id))
        if id != half:
            folder.finish(id)
    os.utime(folder.of(old), (1, 1))
    os.utime(folder.of(known), (1, 1))
    os.utime(folder.writing(half), (1, 1))
    (tmp_path / "f" / "lock").touch()
    os.utime(tmp_path / "f" / "lock", (1, 1))
    assert sorted(folder.sweep({known}, 1000)) == sorted([old, f"{half}.part"])
    assert sorted(path.name for path in folder.path.iterdir()) == sorted([known, new, "lock"])
    assert folder.finish(known) == 0, "again it changes nothing"


@pytest.mark.parametrize("id", ["", "..", "a/b", "file-a/..", "file-a.part", "lock", "file-\n"])
def test_the_folder_takes_no_word_of_a_client(tmp_path: Path, id: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        Folder(tmp_path).of(id)


@pytest.mark.parametrize("name", ["max_file_bytes", "max_files", "max_files_bytes", "max_batch_lines", "batch_in_flight"])
def test_bounds_must_allow_something(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build({name: 0})
    assert caught.value.param == name


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_forms_are_read_however_they_are_cut(data: st.DataObject) -> None:
    """The parser between the network's pieces and ours."""
    import asyncio

    from penstock.transports.form import read_form
    from penstock.transports.request import CONTEXT, RequestContext
    from penstock.transports.tracing import NO_TRACING

    payload = data.draw(st.binary(max_size=300)) + data.draw(st.sampled_from([b"", b"\r\n--", b"\r\n--b", b"--b--\r\n"]))
    if b"\r\n--boundary" in payload:
        return
    headers, body = form((PURPOSE, b"batch"), (FILE, payload), boundary="boundary")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=8)))
    pieces = [body[a:b] for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    raw = {name.encode(): value.encode() for name, value in headers.items()}

    async def no_send(_: Any) -> None:
        raise AssertionError

    context = RequestContext("r", NO_TRACING.begin("", ""), raw, no_send, None)
    scope = {"headers": list(raw.items()), "state": {CONTEXT: context}}
    came: list[bytes] = []

    async def receive() -> dict[str, Any]:
        piece = pieces.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

    async def take(piece: bytes) -> None:
        came.append(piece)

    found = asyncio.run(read_form(scope, receive, 1000, take, flag="--x"))
    assert b"".join(came) == payload
    assert (found.fields, found.filename, found.size) == ({"purpose": "batch"}, "x", len(payload))


def test_contents_whose_time_is_over_are_removed(make_edge: MakeEdge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_runner, "SWEEP_S", 0.02)
    monkeypatch.setattr(batch_runner, "ORPHAN_S", 0.2)
    edge = make_edge(store_ttl_s=0.3)
    with edge.client() as client:
        made = client.files.create(file=("x", LINES), purpose="batch")
        assert client.files.content(made.id).read() == LINES
        edge.wait(lambda: contents(edge) == [], "the contents to go")
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(made.id)
