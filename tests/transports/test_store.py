"""The store of the edge: rows in SQLite, on the loop's side of its thread."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.core.protocol.config import build
from penstock.core.protocol.errors import ConfigError, InvalidRequest
from penstock.core.runtime.clock import FakeClock
from penstock.transports.store import Store, StoreFull, StoreUnavailable, open_store
from penstock.transports.store_file import MEMORY, SCHEMA, Place, place


def in_store(work: Callable[[Store, FakeClock], Awaitable[Any]], path: str = MEMORY, **options: Any) -> Any:
    """Run `work` on a loop with a store of its own."""
    clock = FakeClock()
    values: dict[str, Any] = {"ttl_s": 1000.0, "max_bytes": 1 << 20, "max_rows": 1000, **options}
    store = Store(Place(path, path != MEMORY, Path("unused")), clock=clock, **values)

    async def main() -> Any:
        try:
            return await work(store, clock)
        finally:
            store.close()

    return asyncio.run(main())


def ids(rows: list[Any]) -> list[str]:
    return [row.id for row in rows]


def test_a_row_is_put_found_and_deleted() -> None:
    async def work(store: Store, clock: FakeClock) -> None:
        await store.put("k", "t", "a", b"body", extra=b"more", meta={"model": "m"})
        assert await store.get("k", "t", "a") == b"body"
        row = await store.row("k", "t", "a")
        assert row is not None
        assert (row.id, row.tenant, row.version, row.body, row.extra, row.meta) == ("a", "t", 1, b"body", b"more", {"model": "m"})
        assert row.created == clock.wall_ns() / 1e9
        assert row.ends == row.created + 1000
        assert await store.delete("k", "t", "a")
        assert not await store.delete("k", "t", "a")
        assert await store.get("k", "t", "a") is None

    in_store(work)


def test_neither_kinds_nor_tenants_see_each_other() -> None:
    async def work(store: Store, _: FakeClock) -> None:
        for kind in ("k", "l"):
            for tenant in ("t", "u", ""):
                await store.put(kind, tenant, "same", f"{kind}{tenant}".encode())
        assert await store.get("k", "u", "same") == b"ku"
        assert await store.get("k", "v", "same") is None
        assert not await store.update("k", "v", "same", b"stolen")
        assert not await store.delete("k", "v", "same")
        assert [row.body for row in await store.list("k", "t")] == [b"kt"]
        assert await store.list("k", "v") == []
        await store.put("k", "t", "mine", b"")
        with pytest.raises(InvalidRequest, match="there is no 'mine'"):
            await store.list("k", "u", after="mine")
        assert len(await store.list("k", None)) == 4
        assert await store.delete("k", "t", "same")
        assert await store.get("k", "u", "same") == b"ku"

    in_store(work)


def test_lists_have_an_order_a_beginning_and_a_filter() -> None:
    async def work(store: Store, _: FakeClock) -> None:
        for i in range(7):
            await store.put("k", "t", f"i{i}", b"", meta={"odd": str(i % 2), 'a"b.c[0]': "x"})
        assert ids(await store.list("k", "t", limit=3)) == ["i6", "i5", "i4"]
        assert ids(await store.list("k", "t", limit=3, after="i4")) == ["i3", "i2", "i1"]
        assert ids(await store.list("k", "t", order="asc", limit=2, after="i4")) == ["i5", "i6"]
        assert ids(await store.list("k", "t", where={"odd": "1"})) == ["i5", "i3", "i1"]
        assert ids(await store.list("k", "t", where={"odd": "1", 'a"b.c[0]': "x"}, after="i5")) == ["i3", "i1"]
        assert await store.list("k", "t", where={"odd": "1", "none": "x"}) == []
        assert await store.count("k", "t") == 7
        with pytest.raises(InvalidRequest) as caught:
            await store.list("k", "t", after="nobody")
        assert caught.value.param == "after"

    in_store(work)


def test_an_update_keeps_the_place_and_compares_the_version() -> None:
    async def work(store: Store, _: FakeClock) -> None:
        await store.put("k", "t", "a", b"one", extra=b"x", meta={"m": "1"})
        await store.put("k", "t", "b", b"two")
        assert await store.update("k", "t", "a", b"three", version=1)
        assert not await store.update("k", "t", "a", b"four", version=1)
        assert await store.update("k", "t", "a", b"five", extra=b"", meta={"m": "2"})
        row = await store.row("k", "t", "a")
        assert row is not None
        assert (row.body, row.extra, row.meta, row.version) == (b"five", b"", {"m": "2"}, 3)
        assert ids(await store.list("k", "t")) == ["b", "a"]
        assert not await store.update("k", "t", "c", b"")

    in_store(work)


def test_rows_end_by_themselves() -> None:
    async def work(store: Store, clock: FakeClock) -> None:
        await store.put("k", "t", "short", b"", ttl_s=10)
        await store.put("k", "t", "usual", b"")
        await store.put("k", "t", "ever", b"", ttl_s=float("inf"))
        await store.put("k", "t", "ever too", b"", ttl_s=0)
        clock.advance(10)
        assert await store.get("k", "t", "short") is None
        assert not await store.update("k", "t", "short", b"")
        assert not await store.delete("k", "t", "short")
        assert len(await store.list("k", "t")) == await store.count("k", "t") == 3
        clock.advance(991)
        assert ids(await store.list("k", "t")) == ["ever too", "ever"]
        await store.put("k", "t", "sweeps", b"")
        rows = await store._do(lambda db: db.execute("SELECT count(*), (SELECT sum(rows) FROM held) FROM rows").fetchone())
        assert rows == (3, 3)

        clock.advance(2000)
        await store.sweep()
        rows = await store._do(lambda db: db.execute("SELECT count(*), (SELECT sum(rows) FROM held) FROM rows").fetchone())
        assert rows == (2, 2)

    in_store(work)


def test_when_it_is_full_the_oldest_of_who_holds_most_goes() -> None:
    async def work(store: Store, _: FakeClock) -> None:
        await store.put("k", "small", "s", b"x" * 1000)
        await store.put("k", "big", "kept", b"x" * 3000, keep=True)
        for i in range(6):
            await store.put("k", "big", f"b{i}", b"x" * 1000)
        assert await store.get("k", "small", "s") is not None
        assert await store.get("k", "big", "kept") is not None
        assert ids(await store.list("k", "big")) == ["b5", "b4", "b3", "kept"]
        with pytest.raises(StoreFull):
            await store.put("k", "t", "too large", b"x" * 10_000)

    in_store(work, max_bytes=9000)


def test_what_is_kept_is_refused_when_nothing_can_go() -> None:
    async def work(store: Store, _: FakeClock) -> None:
        for i in range(3):
            await store.put("k", "t", f"i{i}", b"", keep=True)
        with pytest.raises(StoreFull, match="Delete something first") as caught:
            await store.put("k", "t", "one more", b"")
        assert caught.value.status == 429
        assert len(await store.list("k", "t")) == 3
        await store.put("k", "t", "i1", b"again", keep=True)
        assert await store.get("k", "t", "i1") == b"again"

    in_store(work, max_rows=3)


def test_a_file_stays_is_private_and_overwrites_what_is_deleted(tmp_path: Path) -> None:
    path = tmp_path / "store"
    path.touch(0o644)

    async def write(store: Store, _: FakeClock) -> None:
        await store.put("k", "t", "a", b"a secret that goes" * 20)
        await store.put("k", "t", "b", b"what stays")
        for name in os.listdir(tmp_path):
            assert stat.S_IMODE(os.stat(tmp_path / name).st_mode) == 0o600, name
        assert await store.delete("k", "t", "a")

    async def read(store: Store, _: FakeClock) -> bytes | None:
        return await store.get("k", "t", "b")

    in_store(write, str(path))
    assert b"a secret that goes" not in path.read_bytes()
    assert in_store(read, str(path)) == b"what stays"
    assert [file.name for file in tmp_path.iterdir()] == ["store"]


def test_two_edges_share_a_file(tmp_path: Path) -> None:
    path = str(tmp_path / "store")

    async def work(store: Store, clock: FakeClock) -> None:
        other = Store(store.place, ttl_s=1000, max_bytes=1 << 20, max_rows=1000, clock=clock)
        try:
            await asyncio.gather(*(one.put("k", "t", f"{n}-{i}", b"") for n, one in enumerate((store, other)) for i in range(20)))
            assert await other.count("k", "t") == await store.count("k", "t") == 40
            row = await other.row("k", "t", "0-1")
            assert row is not None
            done = await asyncio.gather(*(one.update("k", "t", "0-1", b"mine", version=row.version) for one in (store, other)))
            assert sorted(done) == [False, True]
        finally:
            other.close()

    in_store(work, path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: sqlite3.connect(path).execute(f"PRAGMA user_version = {SCHEMA + 1}").connection.close(), "made by a newer Penstock"),
        (lambda path: sqlite3.connect(path).execute("CREATE TABLE x (y)").connection.close(), "a database of something else"),
        (lambda path: path.write_bytes(b"no database at all, but long enough" * 100), "file is not a database"),
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: path.symlink_to("/dev/null"), "Too many levels"),
        (lambda path: os.mkfifo(path), "no regular file"),
    ],
)
def test_a_file_that_is_no_good_is_refused(tmp_path: Path, make: Callable[[Path], Any], words: str) -> None:
    path = tmp_path / "store"
    make(path)
    with pytest.raises(ConfigError, match=words) as caught:
        in_store(lambda store, _: store.open(), str(path))
    assert "--store" in caught.value.message


def test_after_the_end_nothing_is_kept(tmp_path: Path) -> None:
    async def work(store: Store, _: FakeClock) -> None:
        await store.put("k", "t", "a", b"")
        store.close()
        with pytest.raises(StoreUnavailable):
            await store.get("k", "t", "a")

    in_store(work)


def test_nothing_is_opened_before_somebody_asks(tmp_path: Path) -> None:
    store = open_store(build({"store": str(tmp_path / "s")}), str(tmp_path))
    assert store is not None
    assert store._thread is None
    assert list(tmp_path.iterdir()) == []


def test_the_options_say_where_it_is(tmp_path: Path) -> None:
    assert place(build({"enable_store": False}), "/run") is None
    assert place(build({"no_store": True}), "/run") is None
    assert place(build({}), "/run") == Place(MEMORY, False, Path("/run/files"))
    assert place(build({"edge_workers": 2}), "/run") == Place("/run/store.sqlite", False, Path("/run/files"))
    assert place(build({"store": "/data/s", "edge_workers": 2}), "/run") == Place("/data/s", True, Path("/data/s-files"))
    with pytest.raises(ConfigError, match="--no-store"):
        build({"store": "/data/s", "no_store": True})
    for name, wrong in (("store_ttl_s", -1), ("store_ttl_s", float("nan")), ("store_max_bytes", 0), ("store_max_rows", 0), ("store", " ")):
        with pytest.raises(ConfigError) as caught:
            build({name: wrong})
        assert caught.value.param == name


_STEPS = st.lists(
    st.tuples(
        st.sampled_from(["put", "keep", "delete", "update", "wait"]), st.sampled_from("tu"), st.sampled_from("abc"), st.integers(0, 600)
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(_STEPS)
def test_the_books_are_right_whatever_happens(steps: list[tuple[str, str, str, int]]) -> None:
    """A model in memory: every row that the store shows is what was put last, and what it thinks it holds is what it holds."""

    async def work(store: Store, clock: FakeClock) -> None:
        model: dict[tuple[str, str], bytes] = {}
        for what, tenant, id, size in steps:
            body = os.urandom(size)
            if what in ("put", "keep"):
                try:
                    await store.put("k", tenant, id, body, ttl_s=100, keep=what == "keep")
                    model[tenant, id] = body
                except StoreFull:
                    pass
            elif what == "delete":
                if await store.delete("k", tenant, id):
                    del model[tenant, id]
            elif what == "update":
                if await store.update("k", tenant, id, body):
                    model[tenant, id] = body
            else:
                clock.advance(size)
            shown = {(t, row.id): row.body for t in "tu" for row in await store.list("k", t)}
            assert shown.items() <= model.items()
            held = await store._do(lambda db: db.execute("SELECT tenant, keep, rows, bytes FROM held ORDER BY 1, 2").fetchall())
            real = await store._do(
                lambda db: db.execute("SELECT tenant, keep, count(*), sum(bytes) FROM rows GROUP BY 1, 2 ORDER BY 1, 2").fetchall()
            )
            assert held == real
            assert sum(row[2] for row in held) <= 4

    in_store(work, max_rows=4, max_bytes=3000)
