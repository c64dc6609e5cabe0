"""What the store is to have of a chat completion beside its answer.

What it is: `Kept`, and `kept_of`, which takes it from a request.
What it does not know: the store, when it is put there (stored_chats.py).
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from penstock.transports.metadata import check_metadata
from penstock.transports.openai_schema import ChatRequest

SHOWN = ("temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "tools", "tool_choice", "response_format")
"""Settings that a kept answer tells, where they were given."""


class Kept(msgspec.Struct, frozen=True):
    messages: bytes
    """JSON, as they came."""
    metadata: dict[str, str]
    shown: dict[str, msgspec.Raw]


def kept_of(request: ChatRequest, raw: Mapping[str, msgspec.Raw]) -> Kept:
    """Raises InvalidRequest for metadata out of bounds."""
    shown = {name: raw[name] for name in SHOWN if name in raw}
    return Kept(bytes(raw["messages"]), check_metadata(request.metadata), shown)
