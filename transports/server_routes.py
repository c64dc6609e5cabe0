"""Routes about the server and what runs on it, whatever API started it.

What it is: /server_info, and DELETE /v1/requests/{id}, which ends a running request at whichever edge it came in.
What it does not know: APIs, how text finds a request.
"""

from __future__ import annotations

from typing import Any

import msgspec
from litestar import Request, delete, get
from litestar.types import ASGIApp

from penstock.core.protocol.errors import NotFound
from penstock.core.protocol.tables import ADMIN, METRICS
from penstock.transports.gateway import Door, Gateway
from penstock.transports.ids import split
from penstock.transports.questions import failure_of
from penstock.transports.request import JsonReply, context_of
from penstock.version import __version__

SCOPE = "scope"
"""The key in a handler's `opt` that names the scope which a key needs for it."""


def server_routes(gateway: Gateway) -> list[Any]:
    """Handlers that share one gateway."""

    @get("/server_info", summary="What is served, by which engine, within which limits", tags=["server"], opt={SCOPE: METRICS})
    async def server_info() -> ASGIApp:
        pools = []
        for door in gateway.doors.values():
            answer = await door.query("server_info")
            if answer.status != 200:
                raise failure_of(answer)
            pools.append(msgspec.Raw(answer.body))
        config = gateway.config
        body = {
            "version": __version__,
            "model": gateway.model_name,
            "scheduling": {"policy": config.scheduling_policy, "priority": "lower first"},
            "pools": pools,
        }
        return JsonReply(msgspec.json.encode(body))

    @delete("/v1/requests/{request_id:path}", summary="End a running request", tags=["server"], status_code=200)
    async def cancel(request: Request[Any, Any, Any]) -> ASGIApp:
        wanted = str(request.path_params["request_id"]).removeprefix("/")
        principal = context_of(request.scope).principal
        tenant = None if principal.may(ADMIN) else principal.tenant
        for rid, door in places(gateway, wanted):
            answer = await door.query("cancel", msgspec.json.encode({"rid": rid, "tenant": tenant}))
            if answer.status == 200:
                return JsonReply(msgspec.json.encode({"id": wanted, "object": "request", "cancelled": True}))
            if answer.status != 404:
                raise failure_of(answer)
        raise NotFound(f"No request {wanted[:200]!r} is running.", param="id")

    return [server_info, cancel]


def places(gateway: Gateway, wanted: str) -> list[tuple[str, Door]]:
    """Which request that may be, and who may have it: a reply's id names its text process; a request's own id (x-request-id) may be anywhere."""
    doors = list(gateway.doors.values())
    found = split(wanted)
    named = [(found[0], door) for door in doors if door.pool.text == found[1]] if found is not None else []
    return [*named, *((wanted, door) for door in doors)]
