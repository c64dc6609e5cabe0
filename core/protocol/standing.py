"""Where a tenant stands with its limits.

What it is: `Standing`, which text tells an edge with each request that has limits of requests or tokens a minute, and with each refusal by them.
What it does not know: how limits are counted (core/actors/text/tenants.py), headers.
"""

from __future__ import annotations

import msgspec


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """One limit: so many a minute, how many are left now, and in how many seconds all of them are there again."""

    limit: int
    remaining: int
    reset_s: float


class Standing(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """None: there is no such limit."""

    requests: Window | None = None
    tokens: Window | None = None
