"""What tenants have spent of their budgets, as root keeps it.

What it is: `SpentFile`: the last word of each text process, held in memory for the next one, and in a file under $XDG_STATE_HOME/penstock for the next server
with the same tables.
What it does not know: what a budget is, when one is spent, tables.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from penstock.core.protocol.control import Spent


def place_of(tables: str) -> Path:
    """One file for each tables file."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    name = hashlib.sha256(os.path.abspath(os.path.expanduser(tables)).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return Path(state) / "penstock" / f"spent-{name}.json"


class SpentFile:
    """`note` is told once what goes wrong with the file; the server goes on, and its budgets count from its own start then."""

    def __init__(self, path: Path, note: Callable[[str], None]) -> None:
        self._path = path
        self._note = note
        self._noted = False
        self._rows: dict[str, Spent] = {}
        self._read()

    @property
    def rows(self) -> list[Spent]:
        return list(self._rows.values())

    def take(self, rows: Iterable[Spent]) -> None:
        """Later words of a tenant's take the place of earlier ones. On disk when this returns."""
        self._rows |= {row.tenant: row for row in rows}
        beside = self._path.with_suffix(f".{os.getpid()}.new")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with open(beside, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
                file.write(msgspec.json.encode(self.rows))
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, self._path)
        except OSError as error:
            with contextlib.suppress(OSError):
                beside.unlink()
            self._wrong(f"cannot be written ({error.strerror or error}): what is spent from now on is forgotten when the server ends")

    def _read(self) -> None:
        try:
            rows = msgspec.json.decode(self._path.read_bytes(), type=list[Spent])
        except FileNotFoundError:
            return
        except OSError as error:
            self._wrong(f"cannot be read ({error.strerror or error}): budgets begin anew")
            return
        except (msgspec.MsgspecError, UnicodeDecodeError):
            self._wrong("is damaged: budgets begin anew")
            return
        self._rows = {row.tenant: row for row in rows}

    def _wrong(self, what: str) -> None:
        if not self._noted:
            self._noted = True
            self._note(f"what tenants have spent ({self._path}) {what}")
