"""A conversation that is too long, made to fit.

What it is: `fitted`, truncation `auto` of OpenAI's Responses API: the oldest turns are left out, as few as possible. A turn begins with a message of the user, so that
no call loses its output; the instructions and the last turn always stay.
What it does not know: how long anything is (it asks), items, HTTP.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

Message = dict[str, Any]


async def fitted(
    messages: list[Message], places: list[str], instructed: int, fits: Callable[[list[Message]], Awaitable[bool]]
) -> tuple[list[Message], list[str]]:
    """The messages and where they came from, without the oldest turns. The first `instructed` messages are the request's instructions. If not even the last turn fits,
    all are given back: text says how long they are."""

    def without(turn: int) -> list[Message]:
        return [*messages[:instructed], *messages[turn:]]

    if await fits(messages):
        return messages, places
    turns = [at for at in range(instructed + 1, len(messages)) if messages[at]["role"] == "user"]
    if not turns or not await fits(without(turns[-1])):
        return messages, places
    low, high = 0, len(turns) - 1  # the first turn that fits is within
    while low < high:
        middle = (low + high) // 2
        if await fits(without(turns[middle])):
            high = middle
        else:
            low = middle + 1
    return without(turns[low]), [*places[:instructed], *places[turns[low] :]]
