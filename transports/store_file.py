"""Where the store is, and the database there.

What it is: `place`, which reads of the options where it is; `connect`, which opens the SQLite file, makes it private (0600) and makes the tables, or says in a
sentence why it cannot be used.
What it does not know: what is done with the tables (store.py).

In memory by default; where several edges share it, a file in the server's private runtime folder, which is removed at the end; with --store a file that
stays.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import time
from pathlib import Path
from typing import NamedTuple

from penstock.core.protocol.config import Config
from penstock.core.protocol.errors import ConfigError

SCHEMA = 1
"""The version of the tables, kept in the file: one that is newer than this is refused."""
MEMORY = ":memory:"
BUSY_S = 10.0
"""How long one edge waits for another's write."""

_TABLES = """
CREATE TABLE rows (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL, tenant TEXT NOT NULL, id TEXT NOT NULL,
    created REAL NOT NULL, ends REAL, keep INTEGER NOT NULL, version INTEGER NOT NULL,
    meta TEXT NOT NULL, body BLOB NOT NULL, extra BLOB NOT NULL, bytes INTEGER NOT NULL
);
CREATE UNIQUE INDEX rows_by_id ON rows (kind, tenant, id);
CREATE INDEX rows_in_order ON rows (kind, tenant, seq);
CREATE INDEX rows_by_end ON rows (ends) WHERE ends IS NOT NULL;
CREATE INDEX rows_to_drop ON rows (tenant, seq) WHERE keep = 0;
CREATE TABLE held (tenant TEXT NOT NULL, keep INTEGER NOT NULL, rows INTEGER NOT NULL, bytes INTEGER NOT NULL, PRIMARY KEY (tenant, keep));
CREATE TRIGGER put AFTER INSERT ON rows BEGIN
    INSERT INTO held VALUES (new.tenant, new.keep, 1, new.bytes)
        ON CONFLICT DO UPDATE SET rows = rows + 1, bytes = bytes + new.bytes;
END;
CREATE TRIGGER gone AFTER DELETE ON rows BEGIN
    UPDATE held SET rows = rows - 1, bytes = bytes - old.bytes WHERE tenant = old.tenant AND keep = old.keep;
    DELETE FROM held WHERE tenant = old.tenant AND keep = old.keep AND rows <= 0;
END;
CREATE TRIGGER changed AFTER UPDATE OF bytes ON rows BEGIN
    UPDATE held SET bytes = bytes + new.bytes - old.bytes WHERE tenant = new.tenant AND keep = new.keep;
END;
"""


class Place(NamedTuple):
    """Where the store is: `path` of the database (MEMORY: nowhere), whether it stays, and the folder for what is too large for rows."""

    path: str
    lasting: bool
    folder: Path


def place(config: Config, run_dir: str) -> Place | None:
    """None: --no-store."""
    if not config.enable_store:
        return None
    if config.store is not None:
        return Place(config.store, True, Path(f"{config.store}-files"))
    shared = str(Path(run_dir) / "store.sqlite") if config.edge_workers > 1 else MEMORY
    return Place(shared, False, Path(run_dir) / "files")


def connect(place: Place) -> sqlite3.Connection:
    """The database, made if it is not there yet. Raises ConfigError with a sentence."""
    path = place.path
    if path != MEMORY:
        _make_private(path)
    try:
        db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            _prepare(db, path)
        except BaseException:
            db.close()
            raise
    except sqlite3.Error as error:
        raise ConfigError(f"--store {path} cannot be used: {error}.", param="store") from None
    return db


def _write_ahead(db: sqlite3.Connection) -> None:
    """WAL. SQLite does not wait here while another edge asks for the same (its busy timeout does not hold for a change of the journal)."""
    until = time.monotonic() + BUSY_S
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED) or time.monotonic() > until:
                raise
        time.sleep(0.01)


def _prepare(db: sqlite3.Connection, path: str) -> None:
    db.execute("PRAGMA secure_delete = ON")
    db.execute("PRAGMA temp_store = MEMORY")
    if path != MEMORY:
        _write_ahead(db)
        db.execute("PRAGMA synchronous = NORMAL")
    db.execute("BEGIN IMMEDIATE")  # another edge may be making the tables
    try:
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA:
            raise ConfigError(
                f"--store {path} was made by a newer Penstock (its version is {version}, this one knows {SCHEMA}). Use that one, or another file.",
                param="store",
            )
        if version == 0:
            if db.execute("SELECT 1 FROM sqlite_master").fetchone() is not None:
                raise ConfigError(f"--store {path} is a database of something else. Name another file.", param="store")
            _execute(db, _TABLES)
            db.execute(f"PRAGMA user_version = {SCHEMA}")
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


def _execute(db: sqlite3.Connection, script: str) -> None:
    """Statement by statement: executescript would end the transaction."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            db.execute(statement)
            statement = ""


def _make_private(path: str) -> None:
    """The file exists and is its owner's alone; SQLite gives the files beside it the same mode. Raises ConfigError."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ConfigError(f"--store {path} is no regular file.", param="store")
            os.fchmod(descriptor, 0o600)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ConfigError(f"--store {path} cannot be opened: {error.strerror}.", param="store") from None
