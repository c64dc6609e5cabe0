"""Routes about the server and what runs on it, whatever API started it.

What it is: /server_info; DELETE /v1/requests/{id}, which ends a running request at whichever edge it came in; and what retained.py has: to pause, resume and stop one, and
to resume a retained stream.
What it does not know: APIs, how text finds a request.
"""

from __future__ import annotations

from typing import Any

import msgspec
from litestar import Request, delete, get
from litestar.types import ASGIApp

from penstock.core.protocol.tables import METRICS
from penstock.transports.gateway import Gateway
from penstock.transports.questions import failure_of
from penstock.transports.request import JsonReply, context_of
from penstock.transports.retained import control, stream_routes
from penstock.version import __version__

SCOPE = "scope"
"""The key in a handler's `opt` that names the scope which a key needs for it."""
OPEN = "open"
"""The key in a handler's `opt`: GET and HEAD of its paths, spelt as they are, need no key. For what holds no secret and is asked before a key can be typed in."""


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
            "scheduling": {
                "policy": config.scheduling_policy,
                "priority": "lower first",
                "itl_target_ms": config.itl_target_ms,
                "mixed_prefill_tokens": config.mixed_prefill_tokens,
            },
            "pools": pools,
        }
        return JsonReply(msgspec.json.encode(body))

    @delete("/v1/requests/{request_id:path}", summary="End a running request", tags=["server"], status_code=200)
    async def cancel(request: Request[Any, Any, Any]) -> ASGIApp:
        wanted = str(request.path_params["request_id"]).removeprefix("/")
        await control(gateway, wanted, context_of(request.scope), "cancel")
        return JsonReply(msgspec.json.encode({"id": wanted, "object": "request", "cancelled": True}))

    return [server_info, cancel, *stream_routes(gateway)]
