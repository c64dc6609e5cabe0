"""Responses that are kept, as rows of the store.

What it is: `Records`: a response with its input under its id, the events of one in the background in numbered pieces beside it, and a lease which says that some
HTTP process still runs it; conversations found by previous_response_id, and items by reference.
What it does not know: how a response comes to be (responses_jobs.py), HTTP, what SQLite does (store.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from penstock.core.actors.text.bounds import fields_in
from penstock.core.protocol.errors import InvalidRequest, NotFound, RequestTooLarge
from penstock.transports.responses_items import Item, place_of
from penstock.transports.responses_voice import FINAL
from penstock.transports.store import Store

RESPONSE, EVENTS, LEASE = "response", "response.events", "response.lease"
"""Kinds of rows."""
LEASE_S = 30.0
"""Whoever runs a response in the background says so more often than this; after it nobody does."""

LOST = {"code": "server_error", "message": "The server lost the process that ran this response. Send the request again."}


class Kept(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What is kept beside the response itself. `rid`: the request's id, by which it can be cancelled."""

    input: msgspec.Raw
    rid: str
    model: str
    previous: str | None = None
    background: bool = False
    stream: bool = False


class Record:
    """One response."""

    __slots__ = ("body", "kept")

    def __init__(self, body: bytes, kept: Kept) -> None:
        self.body = body
        self.kept = kept

    @property
    def response(self) -> dict[str, Any]:
        found: dict[str, Any] = msgspec.json.decode(self.body)
        return found

    @property
    def input(self) -> list[Item]:
        return msgspec.json.decode(self.kept.input, type=list[dict[str, Any]])

    @property
    def output(self) -> list[Item]:
        return msgspec.json.decode(self._output, type=list[dict[str, Any]])

    @property
    def _output(self) -> msgspec.Raw:
        return msgspec.json.decode(self.body, type=_Output).output

    @property
    def size(self) -> int:
        """In bytes, with its input."""
        return len(self.body) + len(self.kept.input)

    def fields(self, most: int) -> int:
        """How many its items have (bounds.fields_in)."""
        return fields_in(bytes(self.kept.input), most) + fields_in(bytes(self._output), most)

    @property
    def status(self) -> str:
        return msgspec.json.decode(self.body, type=_Status).status

    @property
    def final(self) -> bool:
        return self.status in FINAL


class _Status(msgspec.Struct):
    status: str


class _Output(msgspec.Struct):
    output: msgspec.Raw


class Records:
    """Everything is asked in a tenant's name."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def put(self, tenant: str, id: str, body: bytes, kept: Kept) -> None:
        await self._store.put(RESPONSE, tenant, id, body, extra=msgspec.json.encode(kept))

    async def update(self, tenant: str, id: str, body: bytes) -> bool:
        """False: somebody deleted it."""
        return await self._store.update(RESPONSE, tenant, id, body)

    async def find(self, tenant: str, id: str) -> Record | None:
        """One whose process is gone has failed."""
        row = await self._store.row(RESPONSE, tenant, id)
        if row is None:
            return None
        record = Record(row.body, msgspec.json.decode(row.extra, type=Kept))
        if record.kept.background and not record.final and await self._store.row(LEASE, tenant, id) is None:
            row = await self._store.row(RESPONSE, tenant, id)  # it may have ended in between
            if row is None or (record := Record(row.body, record.kept)).final:
                return None if row is None else record
            record.body = msgspec.json.encode({**record.response, "status": "failed", "error": LOST})
            await self._store.update(RESPONSE, tenant, id, record.body, version=row.version)
        return record

    async def get(self, tenant: str, id: str) -> Record:
        """Raises NotFound."""
        record = await self.find(tenant, id)
        if record is None:
            raise NotFound(f"There is no response {id[:200]!r}.", param="response_id")
        return record

    async def delete(self, tenant: str, id: str) -> bool:
        """Was it there?"""
        found = await self._store.delete(RESPONSE, tenant, id)
        number = 0
        while await self._store.delete(EVENTS, tenant, f"{id}/{number}"):
            number += 1
        return found

    # --- in the background

    async def renew(self, tenant: str, id: str) -> None:
        await self._store.put(LEASE, tenant, id, b"", ttl_s=LEASE_S, keep=True)

    async def release(self, tenant: str, id: str) -> None:
        await self._store.delete(LEASE, tenant, id)

    async def put_events(self, tenant: str, id: str, number: int, events: list[bytes]) -> None:
        await self._store.put(EVENTS, tenant, f"{id}/{number}", msgspec.msgpack.encode(events))

    async def events(self, tenant: str, id: str, number: int) -> list[bytes] | None:
        """Piece `number`; None: it is not there (yet)."""
        body = await self._store.get(EVENTS, tenant, f"{id}/{number}")
        return None if body is None else msgspec.msgpack.decode(body, type=list[bytes])

    async def count_events(self, tenant: str, id: str) -> int:
        """How many are kept."""
        count = number = 0
        while (events := await self.events(tenant, id, number)) is not None:
            count, number = count + len(events), number + 1
        return count

    # --- conversations

    async def history(self, tenant: str, id: str, most: int, most_bytes: int) -> list[Record]:
        """The responses that led to `id`, and itself, the oldest first. Raises InvalidRequest where one is missing, is not over, or failed, or there are more than
        `most`; RequestTooLarge where they have more than `most_bytes`."""
        found: list[Record] = []
        wanted: str | None = id
        size = 0
        while wanted is not None:
            record = await self.find(tenant, wanted)
            if record is None:
                what = "" if wanted == id else ", which is before it,"
                raise _wrong(f"the response {wanted[:200]!r}{what} is not kept here (any more).")
            if record.status not in FINAL - {"failed"}:
                raise _wrong(f"the response {wanted!r} {'failed' if record.status == 'failed' else 'is not over yet'}.")
            found.append(record)
            size += record.size
            if len(found) > most:
                raise _wrong(f"more than {most} responses lead to it (--max-messages). Begin a new conversation.")
            check_size(size, most_bytes, "previous_response_id")
            wanted = record.kept.previous
        return found[::-1]

    async def sources(self, tenant: str, names: Iterable[str], most_bytes: int) -> list[Record]:
        """The responses whose items those are, without such as are not there. Raises RequestTooLarge."""
        found: list[Record] = []
        size = 0
        for id in dict.fromkeys(place[0] for place in map(place_of, names) if place is not None):
            record = await self.find(tenant, id)
            if record is not None:
                found.append(record)
                size += record.size
                check_size(size, most_bytes, "input")
        return found


def items_among(sources: Iterable[Record], names: Iterable[tuple[str, str]]) -> list[Item]:
    """Those that a request refers to: (id, where it stands), of `sources`. Raises InvalidRequest."""
    known = {item["id"]: item for record in sources for item in (*record.input, *record.output)}
    found = []
    for name, where in names:
        item = known.get(name)
        if item is None:
            raise InvalidRequest(f"{where}.id: there is no item {name[:200]!r} here (any more).", param=f"{where}.id")
        found.append(item)
    return found


def check_size(size: int, most: int, param: str) -> None:
    if size > most:
        raise RequestTooLarge(
            f"{param}: what is kept of that conversation has more than {most} bytes (--max-body-bytes). Begin a new one.", param=param
        )


def _wrong(what: str) -> InvalidRequest:
    return InvalidRequest(f"previous_response_id: {what}", param="previous_response_id")
