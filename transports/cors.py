"""Requests from web pages of other origins (the Fetch standard's CORS protocol). Off unless --allowed-origins names some.

What it is: the answer to a preflight, and the headers that every reply to an allowed origin carries.
What it does not know: keys, routes.
"""

from __future__ import annotations

from penstock.core.protocol.config import Config
from penstock.transports.request import Header, JsonReply

EXPOSED = (
    b"x-request-id, request-id, openai-processing-ms, retry-after, x-penstock-ignored-fields, x-penstock-warning, traceparent, content-disposition, allow,"
    b" www-authenticate, accept-encoding, x-penstock-trace-chunks, x-should-retry, x-ratelimit-limit-requests, x-ratelimit-remaining-requests,"
    b" x-ratelimit-reset-requests, x-ratelimit-limit-tokens, x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens"
)
"""All that replies may have and that pages may not read anyway."""
PREFLIGHT_S = 600
"""So long a browser may remember a preflight's answer."""


class Cors:
    """`on` is False where no origin is allowed: then nothing is ever added."""

    def __init__(self, config: Config) -> None:
        self._origins = frozenset(origin.encode() for origin in config.allowed_origins)
        self._any = b"*" in self._origins
        self._credentials = config.allow_credentials
        self._methods = ", ".join(config.allowed_methods).encode()
        self._headers = ", ".join(config.allowed_headers).encode()
        self.on = bool(self._origins)

    def headers(self, origin: bytes | None) -> list[Header]:
        """For any reply to a request with this Origin header."""
        if not self.on:
            return []
        plain = self._any and not self._credentials
        vary: list[Header] = [] if plain else [(b"vary", b"origin")]
        if origin is None or not (self._any or origin in self._origins):
            return vary
        allowed: list[Header] = [(b"access-control-allow-origin", b"*" if plain else origin), (b"access-control-expose-headers", EXPOSED)]
        if self._credentials:
            allowed.append((b"access-control-allow-credentials", b"true"))
        return [*allowed, *vary]

    def preflight(self, headers: dict[bytes, bytes]) -> JsonReply | None:
        """The reply to an OPTIONS request that is a preflight; None: it is none. Its origin is judged by `headers`, which come on top."""
        wanted = headers.get(b"access-control-request-method")
        origin = headers.get(b"origin")
        if not self.on or wanted is None or origin is None:
            return None
        methods = wanted if self._methods == b"*" else self._methods
        asked = headers.get(b"access-control-request-headers", b"")
        reply = JsonReply(
            b"",
            204,
            [
                (b"access-control-allow-methods", methods),
                (b"access-control-allow-headers", asked if self._headers == b"*" else self._headers),
                (b"access-control-max-age", b"%d" % PREFLIGHT_S),
                (b"vary", b"access-control-request-method, access-control-request-headers"),
            ],
        )
        return reply if self._any or origin in self._origins else JsonReply(b"", 204)
