"""Drafters, as plugins of the engine: what guesses the next tokens, which the device then computes along and keeps where it would have drawn them anyway.

What it is: the registering hook. Nothing heavy is imported before a factory is called.
What it does not know: how drafts are verified (the runner), how many a step has (the scheduler).
"""

from __future__ import annotations

from penstock.core.contract.hookspecs import DrafterSpec, hookimpl


@hookimpl
def register_drafters() -> list[DrafterSpec]:
    return []
