"""What is kept, on real processes: a killed server goes on with its batches, several HTTP processes see the same, and nothing stays that should not."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai
import pytest

if TYPE_CHECKING:
    from conftest import Server, Starter

OVER = ("completed", "failed", "cancelled", "expired")
CHATS = "/v1/chat/completions"
LINES = 150


def lines(count: int = LINES, tokens: int = 40) -> bytes:
    """Answers of different lengths; every seventh request is wrong."""
    ask = {"model": "brook", "messages": [{"role": "user", "content": "What is a penstock?"}], "temperature": 0.0, "ignore_eos": True}
    asks = [{**ask, "max_tokens": 1 + i % tokens, **({"top_p": 2} if i % 7 == 6 else {})} for i in range(count)]
    return b"".join(
        json.dumps({"custom_id": f"r{i}", "method": "POST", "url": CHATS, "body": one}).encode() + b"\n" for i, one in enumerate(asks)
    )


def client_of(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=3, timeout=60)


def begin(client: openai.OpenAI, data: bytes) -> Any:
    file = client.files.create(file=("in.jsonl", data), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=CHATS, completion_window="24h")


def wait(client: openai.OpenAI, id: str, seconds: float = 90) -> Any:
    until = time.monotonic() + seconds
    while (batch := client.batches.retrieve(id)).status not in OVER:
        assert time.monotonic() < until, batch
        time.sleep(0.1)
    return batch


def read(client: openai.OpenAI, batch: Any) -> dict[str, Any]:
    """Its lines by custom_id, each of which is there once."""
    out: dict[str, Any] = {}
    for id, good in ((batch.output_file_id, True), (batch.error_file_id, False)):
        for line in client.files.content(id).text.splitlines():
            one = json.loads(line)
            assert one["custom_id"] not in out
            assert (one["response"]["status_code"] == 200) is good
            out[one["custom_id"]] = one
    return out


def check(found: dict[str, Any], count: int = LINES, tokens: int = 40) -> None:
    assert found.keys() == {f"r{i}" for i in range(count)}
    for i in range(count):
        response = found[f"r{i}"]["response"]
        if i % 7 == 6:
            assert response["status_code"] == 400
        else:
            assert response["body"]["usage"]["completion_tokens"] == 1 + i % tokens


def kill(server: Server) -> None:
    """Root and everything below, as the machine would."""
    server.client.close()
    os.killpg(server.process.pid, signal.SIGKILL)
    server.process.wait(10)


def test_a_killed_server_goes_on_with_its_batch(starter: Starter, tmp_path: Path) -> None:
    store = str(tmp_path / "kept" / "store")
    Path(store).parent.mkdir()
    id, rng, seen = "", random.Random(7), [0]

    def written() -> int:
        """Lines of the output and error files of a batch that runs."""
        return sum(path.read_bytes().count(b"\n") for path in Path(f"{store}-files").glob("*.part"))

    for _life in range(4):
        server = starter("--store", store, "--batch-in-flight", "4")
        with client_of(server) as client:
            if not id:
                id = begin(client, lines()).id
            want = seen[-1] + rng.randint(5, 25)
            assert server.until(lambda want=want: written() >= want, 60)  # type: ignore[misc]
        kill(server)
        seen.append(written())
    assert seen == sorted(seen), "what was answered stays"
    assert seen[-1] < LINES, "the last kill came in the middle"
    server = starter("--store", store, "--batch-in-flight", "4")
    with client_of(server) as client:
        batch = wait(client, id)
        assert batch.status == "completed"
        assert batch.request_counts.to_dict() == {"total": LINES, "completed": LINES - LINES // 7, "failed": LINES // 7}
        check(read(client, batch))
    names = {path.name for path in Path(f"{store}-files").iterdir()}
    assert names == {"lock", "news", batch.input_file_id, batch.output_file_id, batch.error_file_id}
    assert server.stop() == 0
    for path in (Path(store), *Path(f"{store}-files").iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_killed_edge_goes_on_and_a_drain_does_not_wait_for_batches(starter: Starter, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    server = starter("--store", store, "--edge-workers", "2", "--batch-in-flight", "4")
    with client_of(server) as client:
        id = begin(client, lines(40)).id
        assert server.until(lambda: (client.batches.retrieve(id).request_counts or 0).completed >= 5, 60)  # type: ignore[union-attr]
        for edge in server.children()["edge"]:
            edge.kill()
        server.ready()
        batch = wait(client, id)
        check(read(client, batch), 40)
        again = begin(client, lines(400, 300)).id
        assert server.until(lambda: client.batches.retrieve(again).status == "in_progress", 30)
    before = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - before < 10
    with sqlite3.connect(store) as db:
        ((body,),) = db.execute("SELECT body FROM rows WHERE kind = 'batch' AND id = ?", (again,)).fetchall()
    assert json.loads(body)["status"] == "in_progress"


@pytest.fixture
def run() -> Iterator[Path]:
    """A folder for the server's own. Its path is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="pk") as folder:
        yield Path(folder)


def test_every_http_process_sees_the_same_and_nothing_stays(starter: Starter, run: Path) -> None:
    server = starter("--edge-workers", "3", env={"XDG_RUNTIME_DIR": str(run)})
    ask: dict[str, Any] = {"model": "brook", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    ids = set()
    for _ in range(6):  # a connection each: they go to one process or another
        with client_of(server) as client:
            ids.add(client.chat.completions.create(**ask, store=True).id)
    for _ in range(6):
        with client_of(server) as client:
            assert {one.id for one in client.chat.completions.list()} == ids
    with client_of(server) as client:
        batch = begin(client, lines(14))
    with client_of(server) as client:
        check(read(client, wait(client, batch.id)), 14)
    (folder,) = run.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.glob("store.sqlite*")} == {0o600}
    assert server.stop() == 0
    assert list(run.iterdir()) == []


def test_a_store_that_cannot_be_used_stops_the_server_with_a_sentence(starter: Starter, tmp_path: Path) -> None:
    store = tmp_path / "store"
    first = starter("--store", str(store))
    with pytest.raises(AssertionError, match=r"penstock: --store: another server uses"):
        starter("--store", str(store))
    assert first.stop() == 0
    with sqlite3.connect(store) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(AssertionError, match=r"penstock: --store .* was made by a newer Penstock"):
        starter("--store", str(store))
    with pytest.raises(AssertionError, match=r"penstock: --store .*: No such file or directory"):
        starter("--store", str(tmp_path / "no" / "store"))


def test_without_a_request_that_is_kept_nothing_is_made(starter: Starter, run: Path) -> None:
    server = starter(env={"XDG_RUNTIME_DIR": str(run)})
    with client_of(server) as client:
        client.chat.completions.create(model="brook", messages=[{"role": "user", "content": "hi"}], max_tokens=4)
        assert list(client.chat.completions.list()) == []
    (folder,) = run.iterdir()
    assert {path.suffix for path in folder.iterdir()} == {".sock"}
    assert server.stop() == 0
