"""Transport plugins of api_level 1, whose factories gave a list of routes.

What it is: `adapt`, which the host calls for a TransportSpec of level 1: its list becomes the routes of a Transport without listeners.
What it does not know: routes, the host.
"""

from __future__ import annotations

from typing import Any

import msgspec

from penstock.core.contract.hookspecs import TransportSpec
from penstock.core.contract.transports import Transport


def adapt(spec: TransportSpec) -> TransportSpec:
    routes: Any = spec.factory

    def factory(gateway: Any) -> Transport:
        found = routes(gateway)
        if not isinstance(found, (list, tuple)):
            raise TypeError(f"it must return a list of route handlers, not {type(found).__name__}")
        return Transport(found)

    return msgspec.structs.replace(spec, api_level=2, factory=factory)
