"""Lists of what is kept, page by page.

What it is: `Page`, what the query string of a list asks for, read strictly (a filter that nobody obeys would give another list than was asked for); and the
body that a page is.
What it does not know: which things are listed, where they are (store.py).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal, NamedTuple
from urllib.parse import parse_qsl

import msgspec

from penstock.core.protocol.errors import InvalidRequest
from penstock.transports.request import Scope

QUERY = "query"
"""The key in a handler's `opt` that names the query's fields: a dict of name -> its JSON schema (with a description), for the OpenAPI document."""
METADATA = "metadata"
LONGEST = 4096
"""Characters of a query."""

Order = Literal["asc", "desc"]


class Page(NamedTuple):
    after: str | None
    limit: int
    order: Order
    where: dict[str, str]
    """By the filters' names; of metadata `metadata.KEY`."""


def fields(*, limit: int, most: int, order: Order | None, filters: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """The query's fields, for `opt`. `order` None: it cannot be asked for."""
    out: dict[str, dict[str, Any]] = {
        "after": {"type": "string", "description": "The id of the last one of the page before."},
        "limit": {"type": "integer", "minimum": 1, "maximum": most, "default": limit, "description": "Most that come."},
    }
    if order is not None:
        out["order"] = {"enum": ["asc", "desc"], "default": order, "description": "By the time when they were made."}
    for name in filters:
        if name == METADATA:
            out[METADATA] = {
                "type": "object",
                "additionalProperties": {"type": "string"},
                "description": "`metadata[KEY]=VALUE`: those alone that say so.",
            }
        else:
            out[name] = {"type": "string", "description": f"Those of this {name} alone."}
    return out


def read_page(scope: Scope, *, limit: int, most: int, order: Order, orders: bool = True, filters: Collection[str] = ()) -> Page:
    """What the query asks for. Raises InvalidRequest naming the field."""
    after: str | None = None
    where: dict[str, str] = {}
    given: set[str] = set()
    text = scope["query_string"].decode("latin-1")
    if len(text) > LONGEST:
        raise InvalidRequest(f"The query has more than {LONGEST} characters.")
    for name, value in parse_qsl(text, keep_blank_values=True):
        if name in given:
            raise InvalidRequest(f"{name[:100]} is given more than once.", param=name[:100])
        given.add(name)
        if name == "after":
            after = value
        elif name == "limit":
            if not (value.isascii() and value.isdecimal() and len(value) < 10 and 1 <= int(value) <= most):
                raise InvalidRequest(f"limit must be a number from 1 to {most}, but is {value[:40]!r}.", param="limit")
            limit = int(value)
        elif name == "order" and orders:
            if value not in ("asc", "desc"):
                raise InvalidRequest(f"order must be asc or desc, but is {value[:40]!r}.", param="order")
            order = value
        elif METADATA in filters and name.startswith("metadata[") and name.endswith("]"):
            where[f"metadata.{name[9:-1]}"] = value
        elif name in filters and name != METADATA:
            where[name] = value
        else:
            known = ["after", "limit", *(["order"] if orders else []), *("metadata[KEY]" if f == METADATA else f for f in filters)]
            raise InvalidRequest(f"{name[:100]!r} is not known here. The query may have {', '.join(known)}.", param=name[:100])
    return Page(after, limit, order, where)


def page_body(items: Sequence[bytes], ids: Sequence[str], limit: int) -> bytes:
    """Of the first `limit` of `items` (JSON, with their ids); one more says that there are more."""
    shown = ids[:limit]
    return msgspec.json.encode(
        {
            "object": "list",
            "data": [msgspec.Raw(item) for item in items[:limit]],
            "first_id": shown[0] if shown else None,
            "last_id": shown[-1] if shown else None,
            "has_more": len(items) > limit,
        }
    )
