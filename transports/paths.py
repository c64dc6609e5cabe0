"""What stands at a path, for answers that are given before or without a route.

What it is: `Paths`, made once of an application's routes: the methods of a path, and the handler that would have answered.
What it does not know: who may use it, errors, what a handler does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from litestar import Litestar
from litestar.handlers.base import BaseRouteHandler

from penstock.transports.voice import VOICE, VOICES, Voice


class Paths:
    """Paths are those below --root-path."""

    def __init__(self, app: Litestar) -> None:
        self._routes = [(_pattern(route.path), route) for route in app.routes]
        self._voices: dict[bytes, type[Voice]] = {}
        for route in app.routes:
            for handler in getattr(route, "route_handlers", []):
                self._voices |= handler.opt.get(VOICES, {})

    def methods(self, path: str) -> list[str]:
        """What may be done there; [] where there is nothing."""
        for route in self._at(path):
            methods = {str(m) for m in getattr(route, "methods", [])}
            return sorted(methods | {"HEAD"} if "GET" in methods else methods)
        return []

    def marked(self, key: str) -> frozenset[str]:
        """The paths that have a handler with `key` in its opt."""
        return frozenset(route.path for _, route in self._routes if any(key in one.opt for one in getattr(route, "route_handlers", [])))

    def everywhere(self) -> list[str]:
        """What may be done somewhere on the server."""
        return sorted({"HEAD"}.union(*({str(m) for m in getattr(route, "methods", [])} for _, route in self._routes)))

    def handler(self, path: str, method: str) -> BaseRouteHandler | None:
        """The handler of that method, else of another one at that path, first of those of an API; None where there is nothing."""
        for route in self._at(path):
            handlers = getattr(route, "route_handlers", [])
            mine = [handler for handler in handlers if method in getattr(handler, "http_methods", ())]
            found: BaseRouteHandler | None = next(iter([*mine, *(one for one in handlers if VOICE in one.opt), *handlers]), None)
            return found
        return None

    def nearest(self, path: str) -> BaseRouteHandler | None:
        """Whose API a path where there is nothing belongs to: a handler above it; None where that would be of any."""
        parts = path.rstrip("/").split("/")
        for size in range(len(parts) - 1, 2, -1):
            found = self.handler("/".join(parts[:size]), "POST")
            if found is not None:
                return found
        return None

    def voice(self, handler: BaseRouteHandler | None, headers: Mapping[bytes, bytes]) -> type[Voice] | None:
        """In which voice an error is said, if not in the route's own (or, without one, in the usual shape): that of a client that tells which API it speaks."""
        if handler is not None and VOICE in handler.opt:
            return None
        voices: dict[bytes, type[Voice]] = self._voices if handler is None else handler.opt.get(VOICES, {})
        return next((voice for header, voice in voices.items() if header in headers), None)

    def _at(self, path: str) -> Iterator[Any]:
        path = path.rstrip("/") or "/"
        return (route for pattern, route in self._routes if pattern.fullmatch(path))


def _pattern(path: str) -> re.Pattern[str]:
    pattern = re.sub(r"\\{[^}]*:path\\}", ".+", re.escape(path))
    return re.compile(re.sub(r"\\{[^}]*\\}", "[^/]+", pattern))
