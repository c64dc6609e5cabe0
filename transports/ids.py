"""Public ids: what a client calls its request.

What it is: the id of a reply ("chatcmpl-...") is a prefix, the request's id, and one last character that says which text process (shard) has the
request, so that whoever comes back with an id is led there, at any edge. To clients an id is opaque.
What it does not know: requests, doors.
"""

from __future__ import annotations

import string

SHARDS = string.digits + string.ascii_lowercase
"""The last character, by the shard's index."""


PREFIXES = ("chatcmpl-", "cmpl-", "msg_", "resp_")
"""What public ids begin with, by API. (Those of APIs whose replies have no id begin with nothing, and nobody knows them.)"""


def split(public: str) -> tuple[str, int] | None:
    """The request's id and the shard that a public id is made of; None if it is none."""
    shard = shard_of(public)
    prefix = next((prefix for prefix in PREFIXES if public.startswith(prefix)), None)
    return None if shard is None or prefix is None else (public[len(prefix) : -1], shard)


def public_id(prefix: str, rid: str, shard: int) -> str:
    """`shard` 0 to 35."""
    return f"{prefix}{rid}{SHARDS[shard]}"


def shard_of(public: str) -> int | None:
    """The shard in a public id, or None where there cannot be one. It may be of another server: ask whether there is such a shard."""
    shard = SHARDS.find(public[-1:]) if public else -1
    return shard if shard >= 0 else None
