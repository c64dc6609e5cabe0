"""What the server keeps for its clients between requests: rows of bytes in SQLite.

What it is: `Store`, whose methods are coroutines of the edge's loop; the database is opened and used by one thread of its own, which begins with the first
call. A row has a kind ("chat.completion", "file"), a tenant, an id that is unique among those, and never comes into another tenant's sight. Rows
end by themselves (`ttl_s`), by `delete`, and when the store is full: then the oldest of the tenant that holds most, but for those put with `keep`.
What it does not know: where it is and what its tables are (store_file.py), what is in the rows, HTTP, who asks.

What is deleted is overwritten. Nothing is opened before somebody stores or asks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import sqlite3
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple, TypeVar

import msgspec

from penstock.core.protocol.config import Config
from penstock.core.protocol.errors import InvalidRequest, RetryableError
from penstock.core.runtime.clock import Clock, SystemClock
from penstock.transports.store_file import Place, connect, place

SWEEP_S = 30.0
"""Rows that are over are no longer shown; they are removed so often, when something is put."""
ROW_BYTES = 200
"""What a row takes beside what is in it, about."""

log = logging.getLogger("penstock.edge.store")

T = TypeVar("T")
Where = Mapping[str, str]

_COLUMNS = "id, tenant, created, version, body, extra, meta, ends"
_ALIVE = "(ends IS NULL OR ends > :now)"


class StoreFull(RetryableError):
    status = 429
    type = "rate_limit_error"
    default_code = "store_full"


class StoreUnavailable(RetryableError):
    default_code = "store_unavailable"


class Row(NamedTuple):
    """`created` and `ends` are seconds since the Unix epoch (`ends` None: it stays); `version` counts updates, from 1."""

    id: str
    tenant: str
    created: float
    version: int
    body: bytes
    extra: bytes
    meta: dict[str, str]
    ends: float | None


class Store:
    """One an edge. Every method but `close` may be called from the loop only. Raises StoreFull where nothing more can be kept, ConfigError where the
    file cannot be had. A second `put` of the same kind, tenant and id replaces the first."""

    def __init__(self, place: Place, *, ttl_s: float, max_bytes: int, max_rows: int, clock: Clock | None = None) -> None:
        self.place = place
        self.ttl_s = ttl_s
        """How long a row stays that is put without a time of its own; 0: until it is deleted."""
        self._max_bytes = max_bytes
        self._max_rows = max_rows
        self._clock = clock or SystemClock()
        self._thread: ThreadPoolExecutor | None = None
        self._db: sqlite3.Connection | None = None
        self._swept = -math.inf
        self._closed = False

    # --- the loop's side

    async def _do(self, work: Callable[[sqlite3.Connection], T], *, begin: str = "BEGIN IMMEDIATE") -> T:
        if self._closed:
            raise StoreUnavailable("The server is shutting down.")
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, work, begin)

    async def _read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Waits for no other edge's write."""
        return await self._do(work, begin="BEGIN")

    async def open(self) -> None:
        """Open it now, to find out whether it can be. Raises ConfigError."""
        await self._do(lambda _: None)

    async def put(
        self,
        kind: str,
        tenant: str,
        id: str,
        body: bytes,
        *,
        extra: bytes = b"",
        meta: Where | None = None,
        ttl_s: float | None = None,
        keep: bool = False,
    ) -> None:
        """`meta` is what `list` can find it by. `ttl_s` None: the store's own; 0 or infinity: until it is deleted. `keep`: never dropped for others."""
        ttl_s = self.ttl_s if ttl_s is None else ttl_s
        text = _json(meta)
        size = len(body) + len(extra) + len(text) + len(id) + len(tenant) + ROW_BYTES

        def work(db: sqlite3.Connection) -> None:
            now = self._now()
            self._sweep(db, now)
            db.execute("DELETE FROM rows WHERE kind = ? AND tenant = ? AND id = ?", (kind, tenant, id))
            self._make_room(db, now, size)
            ends = now + ttl_s if 0 < ttl_s < math.inf else None
            db.execute(
                "INSERT INTO rows (kind, tenant, id, created, ends, keep, version, meta, body, extra, bytes) VALUES (?,?,?,?,?,?,1,?,?,?,?)",
                (kind, tenant, id, now, ends, int(keep), text, body, extra, size),
            )

        await self._do(work)

    async def get(self, kind: str, tenant: str, id: str) -> bytes | None:
        row = await self.row(kind, tenant, id)
        return None if row is None else row.body

    async def row(self, kind: str, tenant: str, id: str) -> Row | None:
        """`get` with everything else that is known of it."""

        def work(db: sqlite3.Connection) -> Row | None:
            asked = {"kind": kind, "tenant": tenant, "id": id, "now": self._now()}
            found = db.execute(f"SELECT {_COLUMNS} FROM rows WHERE kind = :kind AND tenant = :tenant AND id = :id AND {_ALIVE}", asked)
            return next(map(_row, found), None)

        return await self._read(work)

    async def delete(self, kind: str, tenant: str, id: str) -> bool:
        """Was it there?"""

        def work(db: sqlite3.Connection) -> bool:
            asked = {"kind": kind, "tenant": tenant, "id": id, "now": self._now()}
            return db.execute(f"DELETE FROM rows WHERE kind = :kind AND tenant = :tenant AND id = :id AND {_ALIVE}", asked).rowcount > 0

        return await self._do(work)

    async def list(
        self,
        kind: str,
        tenant: str | None,
        *,
        after: str | None = None,
        limit: int = 20,
        order: Literal["asc", "desc"] = "desc",
        where: Where | None = None,
    ) -> list[Row]:
        """At most `limit` rows in the order in which they were put, those behind `after` (an id) alone, and those alone whose `meta` says what `where`
        says. `tenant` None is the server asking for itself: everybody's. Raises InvalidRequest if there is no `after`."""
        if order not in ("asc", "desc"):
            raise ValueError(order)
        asked: dict[str, str | float] = {"kind": kind, "limit": limit, "now": self._now()}
        mine = "kind = :kind" if tenant is None else "kind = :kind AND tenant = :tenant"
        if tenant is not None:
            asked["tenant"] = tenant
        terms = [mine, _ALIVE]
        for i, (key, value) in enumerate((where or {}).items()):
            terms.append(f"EXISTS (SELECT 1 FROM json_each(meta) WHERE json_each.key = :k{i} AND json_each.value = :v{i})")
            asked |= {f"k{i}": key, f"v{i}": value}

        def work(db: sqlite3.Connection) -> list[Row]:
            if after is not None:
                first = db.execute(f"SELECT seq FROM rows WHERE {mine} AND id = :after", {**asked, "after": after}).fetchone()
                if first is None:
                    raise InvalidRequest(f"after: there is no {after[:200]!r} here.", param="after")
                terms.append(f"seq {'>' if order == 'asc' else '<'} :seq")
                asked["seq"] = first[0]
            found = db.execute(f"SELECT {_COLUMNS} FROM rows WHERE {' AND '.join(terms)} ORDER BY seq {order} LIMIT :limit", asked)
            return [_row(one) for one in found]

        return await self._read(work)

    async def update(
        self,
        kind: str,
        tenant: str,
        id: str,
        body: bytes,
        *,
        extra: bytes | None = None,
        meta: Where | None = None,
        version: int | None = None,
    ) -> bool:
        """Replace what a row says (None: leave it); its place in the order and its end stay. False, and nothing done: it is not there, or no longer of
        that version."""

        def work(db: sqlite3.Connection) -> bool:
            asked = {"kind": kind, "tenant": tenant, "id": id, "now": self._now()}
            found = db.execute(
                f"SELECT seq, version, extra, meta, bytes, length(body) FROM rows WHERE kind = :kind AND tenant = :tenant AND id = :id AND {_ALIVE}",
                asked,
            ).fetchone()
            if found is None or (version is not None and found[1] != version):
                return False
            new_extra, new_meta = found[2] if extra is None else extra, found[3] if meta is None else _json(meta)
            size = found[4] + len(body) + len(new_extra) + len(new_meta) - found[5] - len(found[2]) - len(found[3])
            db.execute(
                "UPDATE rows SET version = version + 1, body = ?, extra = ?, meta = ?, bytes = ? WHERE seq = ?",
                (body, new_extra, new_meta, size, found[0]),
            )
            return True

        return await self._do(work)

    async def count(self, kind: str, tenant: str) -> int:
        def work(db: sqlite3.Connection) -> int:
            asked = {"kind": kind, "tenant": tenant, "now": self._now()}
            return int(db.execute(f"SELECT count(*) FROM rows WHERE kind = :kind AND tenant = :tenant AND {_ALIVE}", asked).fetchone()[0])

        return await self._read(work)

    async def sweep(self) -> None:
        """Remove what has come to its end now, and not when something is put the next time."""

        def work(db: sqlite3.Connection) -> None:
            self._swept = -math.inf
            self._sweep(db, self._now())

        await self._do(work)

    def close(self) -> None:
        """What is asked afterwards fails. Returns when the thread is done with what it had."""
        self._closed = True
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.submit(self._close)
            thread.shutdown()

    # --- the thread's side

    def _now(self) -> float:
        return self._clock.wall_ns() / 1e9

    def _run(self, work: Callable[[sqlite3.Connection], T], begin: str) -> T:
        if self._db is None:
            self._db = connect(self.place)
        db = self._db
        try:
            db.execute(begin)
            done = work(db)
            db.execute("COMMIT")
        except BaseException as error:
            with contextlib.suppress(sqlite3.Error):
                db.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error):  # a full disk, a file that somebody else holds
                log.exception("the store failed")
                raise StoreUnavailable(f"What the server keeps cannot be reached: {error}.", retry_after_s=1.0) from None
            raise
        return done

    def _close(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    def _sweep(self, db: sqlite3.Connection, now: float) -> None:
        if now - self._swept >= SWEEP_S or now < self._swept:
            self._swept = now
            db.execute("DELETE FROM rows WHERE ends <= ?", (now,))

    def _make_room(self, db: sqlite3.Connection, now: float, size: int) -> None:
        """Drop the oldest of whoever holds most, until `size` more bytes fit. Raises StoreFull."""
        if size > self._max_bytes:
            raise StoreFull(f"This is larger than everything that the server may keep ({self._max_bytes} bytes, --store-max-bytes).")
        while True:
            rows, held = db.execute("SELECT coalesce(sum(rows), 0), coalesce(sum(bytes), 0) FROM held").fetchone()
            if rows < self._max_rows and held + size <= self._max_bytes:
                return
            if db.execute("DELETE FROM rows WHERE ends <= ?", (now,)).rowcount:
                continue
            most = db.execute("SELECT tenant FROM held WHERE keep = 0 ORDER BY bytes DESC LIMIT 1").fetchone()
            if most is None:
                raise StoreFull(
                    f"The server keeps as much as it may ({held} bytes in {rows} rows; --store-max-bytes, --store-max-rows). Delete something first."
                )
            db.execute(
                "DELETE FROM rows WHERE seq = (SELECT seq FROM rows WHERE tenant = ? AND keep = 0 ORDER BY seq LIMIT 1)",
                most,
            )


def _json(meta: Where | None) -> str:
    return msgspec.json.encode(dict(meta or {})).decode()


def _row(found: tuple[str, str, float, int, bytes, bytes, str, float | None]) -> Row:
    return Row(*found[:6], msgspec.json.decode(found[6]), found[7])


def open_store(config: Config, run_dir: str, clock: Clock | None = None) -> Store | None:
    """The store that the options describe, not opened yet. None: --no-store."""
    where = place(config, run_dir)
    if where is None:
        return None
    return Store(where, ttl_s=config.store_ttl_s, max_bytes=config.store_max_bytes, max_rows=config.store_max_rows, clock=clock)
