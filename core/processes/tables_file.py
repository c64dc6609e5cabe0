"""The tables file as root holds it.

What it is: the last good reading of --tables FILE, as the messages that edges and texts get. Reading again gives the next generation, or an error that leaves
everything as it was.
What it does not know: when to read again, who is told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from penstock.core.protocol.control import Tables
from penstock.core.protocol.tables import read_tables


class TablesFile:
    """Construct (raises ConfigError for what is wrong in the file), then `read` for each later reading. `served` and `policy` as in read_tables."""

    def __init__(self, path: str, note: Callable[[str], None], *, served: Sequence[str] = (), policy: str = "priority") -> None:
        self.path = path
        self._served = served
        self._policy = policy
        self.current = Tables(generation=0, body=b"")
        """What edges should have."""
        self.limits = Tables(generation=0, body=b"")
        """What texts should have."""
        self.budgets = False
        """Does any tenant have one?"""
        self.read(note)

    def read(self, note: Callable[[str], None]) -> Tables:
        """Read the file. Raises ConfigError, and then all stays. `note` gets what the user should know besides."""
        found = read_tables(self.path, note, served=self._served, policy=self._policy)
        generation = self.current.generation + 1
        self.current = Tables(generation=generation, body=msgspec.msgpack.encode(found.keys))
        self.limits = Tables(generation=generation, body=msgspec.msgpack.encode(found.tenants))
        self.budgets = any(tenant.budget_tokens or tenant.budget_pusd for tenant in found.tenants.tenants.values())
        return self.current
