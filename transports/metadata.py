"""Metadata: pairs of texts that a client gives what is kept, to find it again.

What it is: their bounds, which are OpenAI's, and how a store's row has them.
What it does not know: what they are given to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.core.protocol.errors import InvalidRequest

MOST, LONGEST_KEY, LONGEST_VALUE = 16, 64, 512


def check_metadata(given: Mapping[str, Any] | None) -> dict[str, str]:
    """Raises InvalidRequest naming the pair."""
    given = given or {}
    if len(given) > MOST:
        raise InvalidRequest(f"metadata may have at most {MOST} pairs, but has {len(given)}.", param="metadata")
    for key, value in given.items():
        name = f"metadata.{key[:LONGEST_KEY]}"
        if len(key) > LONGEST_KEY:
            raise InvalidRequest(f"{name}: a key may have at most {LONGEST_KEY} characters.", param=name)
        if not isinstance(value, str):
            raise InvalidRequest(f"{name} must be a text.", param=name)
        if len(value) > LONGEST_VALUE:
            raise InvalidRequest(f"{name} may have at most {LONGEST_VALUE} characters, but has {len(value)}.", param=name)
    return dict(given)


def row_meta(metadata: Mapping[str, str], **more: str) -> dict[str, str]:
    """Row.meta of what has them, beside what else it is found by."""
    return {**more, **{f"metadata.{key}": value for key, value in metadata.items()}}
