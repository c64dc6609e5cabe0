"""The tables file as root holds it.

What it is: the last good reading of --tables FILE, as the message that edges get. Reading again gives the next generation, or an error that leaves
everything as it was.
What it does not know: when to read again, who is told.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from penstock.core.protocol.control import Tables
from penstock.core.protocol.tables import read_tables


class TablesFile:
    """Construct (raises ConfigError for what is wrong in the file), then `read` for each later reading. `current` is what edges should have."""

    def __init__(self, path: str, note: Callable[[str], None]) -> None:
        self._path = path
        self.current = Tables(generation=0, body=b"")
        self.read(note)

    def read(self, note: Callable[[str], None]) -> Tables:
        """Read the file. Raises ConfigError, and then `current` stays. `note` gets what the user should know besides."""
        table = read_tables(self._path, note)
        self.current = Tables(generation=self.current.generation + 1, body=msgspec.msgpack.encode(table))
        return self.current
