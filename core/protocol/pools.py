"""What is served, as data.

What it is: a pool is one served model: the text process that speaks for it and the engines behind that. The kernel starts children by this list, and
every edge has a door to each pool. Today the configuration gives exactly one.
What it does not know: processes, sockets, how a request finds its pool.
"""

from __future__ import annotations

import msgspec

from penstock.core.protocol.config import Config


class PoolSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One served model. `name` is the pool's own; `models` are the names that requests may use."""

    name: str
    models: list[str]
    text: int
    """Index of its text process, its shard: public ids carry it."""
    engines: list[int]
    """Indices of its engine processes, unique over all pools."""


def pools_of(config: Config) -> list[PoolSpec]:
    """The pools of a server, the default one (for requests that name no model, or one that nobody serves) first."""
    models = list(config.served_model_name)
    return [PoolSpec(name=models[0] if models else "default", models=models, text=0, engines=[0])]
