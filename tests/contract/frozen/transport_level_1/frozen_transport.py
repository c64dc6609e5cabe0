"""A plugin as somebody wrote it against level 1 of transports. Never edited: it must go on working at the level after.

What it is: one route that says how many requests are in progress. What it does not know: anything that came later.
"""

from litestar import get

from penstock.core.hookspecs import TransportSpec, hookimpl


def routes(gateway):  # type: ignore[no-untyped-def]
    @get("/frozen", sync_to_thread=False)
    def frozen() -> dict[str, int]:
        return {"active": gateway.active}

    return [frozen]


@hookimpl
def register_transports():  # type: ignore[no-untyped-def]
    return [TransportSpec(name="frozen", api_level=1, factory=routes)]
