"""Where a tenant stands with its limits, as headers: those that OpenAI's API has, and clients read.

What it is: `limit_headers`, and `duration`, a time as they write it.
What it does not know: limits, whose they are.
"""

from __future__ import annotations

import math

from penstock.core.protocol.standing import Standing
from penstock.transports.request import Header

NAMES = tuple(f"x-ratelimit-{what}-{of}" for of in ("requests", "tokens") for what in ("limit", "remaining", "reset"))


def limit_headers(standing: Standing) -> list[Header]:
    headers: list[Header] = []
    for of, window in ((b"requests", standing.requests), (b"tokens", standing.tokens)):
        if window is not None:
            headers += [
                (b"x-ratelimit-limit-" + of, b"%d" % window.limit),
                (b"x-ratelimit-remaining-" + of, b"%d" % window.remaining),
                (b"x-ratelimit-reset-" + of, duration(window.reset_s).encode()),
            ]
    return headers


def duration(seconds: float) -> str:
    """As Go writes it: "120ms", "1.5s", "6m0s", "1h2m3s". Never less than it is, to the millisecond."""
    ms = math.ceil(seconds * 1000 - 1e-6)
    if ms < 1000:
        return f"{ms}ms" if ms else "0s"
    minutes, ms = divmod(ms, 60_000)
    hours, minutes = divmod(minutes, 60)
    rest = f"{ms / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if hours or minutes else "") + rest
