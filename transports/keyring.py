"""Keys at an edge: in whose name a request comes.

What it is: the digests of --api-key and of the tables, and what each stands for; finds the principal of a request's headers.
What it does not know: paths, which endpoint needs which scope (http.py), where tables come from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import msgspec

from penstock.core.protocol.config import Config
from penstock.core.protocol.control import Tables
from penstock.core.protocol.tables import KeyTable, Principal, digest_of

KEY_NEEDED = "A valid API key is needed: send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'."


class Keyring:
    """`locked`: a key is needed. With --tables nobody has one before the first Tables came: an edge listens after that."""

    def __init__(self, config: Config) -> None:
        self.locked = bool(config.api_key) or config.tables is not None
        self.scoped = config.tables is not None
        """Some keys may not be good for everything."""
        self._own = {digest_of(key.encode()): Principal(tenant=tenant_of(key)) for key in config.api_key}
        self._principals = self._own
        self._generation = 0

    def take(self, tables: Tables) -> None:
        """Use these tables from the next request on. A key of --api-key stays what it is, whatever they say."""
        if tables.generation > self._generation:
            self._generation = tables.generation
            found = msgspec.msgpack.decode(tables.body, type=KeyTable).keys
            known = {digest: msgspec.structs.replace(principal, generation=tables.generation) for digest, principal in found.items()}
            self._principals = known | self._own

    def find(self, headers: Mapping[bytes, bytes]) -> Principal | None:
        """Whose key was given; None: nobody's."""
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        offered = [given.strip()] if scheme.lower() == b"bearer" else []
        if b"x-api-key" in headers:
            offered.append(headers[b"x-api-key"].strip())
        found = None
        for one in offered:
            # The time of a look-up tells something of digests alone, and nobody can choose a key by its digest: there is nothing to be found out
            # bit by bit, as there would be in a comparison of the keys themselves.
            found = self._principals.get(digest_of(one)) or found
        return found


def tenant_of(key: str) -> str:
    """A name for the owner of a key that has none, which does not give the key away. Prefixes are shared within a tenant only (Submit.tenant)."""
    return hashlib.blake2b(key.encode(), digest_size=8, person=b"pk-tenant").hexdigest()
