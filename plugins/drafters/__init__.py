"""Drafters, as plugins of the engine: what guesses the next tokens, which the device then computes along and keeps where it would have drawn them anyway.

What it is: the registering hook. Nothing heavy is imported before a factory is called.
What it does not know: how drafts are verified (the runner), how many a step has (the scheduler).
"""

from __future__ import annotations

from typing import Any

from penstock.core.contract.hookspecs import DrafterSpec, hookimpl


def _suffix(**options: Any) -> Any:
    from penstock.plugins.drafters.suffix import suffix

    return suffix(**options)


@hookimpl
def register_drafters() -> list[DrafterSpec]:
    return [
        DrafterSpec(
            name="suffix",
            api_level=1,
            doc="What followed the longest run of tokens that was there before, in the request or in past answers of its tenant.",
            methods=["suffix"],
            where="host",
            factory=_suffix,
        )
    ]
