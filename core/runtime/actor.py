"""The actor protocol.

What it is: an actor is a pure handler. `handle(message)` returns an iterable of messages (usually it is a generator); the actor owns its
state, does no I/O and knows no loop. Where it needs an answer it writes `reply = yield Ask(question, GrantType)` and whoever hosts it
delivers the first message of that type which the asked actor yields. While a handler waits, its actor handles nothing else.
What it does not know: which host runs it (core/runtime/hosts.py), which actor takes which message (the wiring in core/processes/kernel.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeAlias

from penstock.core.protocol.control import Message


class Ask:
    """Yielded by a handler: route `question`, give me back the first `reply` that its taker yields."""

    __slots__ = ("question", "reply")

    def __init__(self, question: Message, reply: type[Message]) -> None:
        self.question = question
        self.reply = reply


class To:
    """Yielded by a handler: send `message` to one peer of a link group (text shard, edge or engine `index`) instead of the only one."""

    __slots__ = ("index", "message")

    def __init__(self, message: Message, index: int) -> None:
        self.message = message
        self.index = index


Out: TypeAlias = Message | Ask | To
Handling: TypeAlias = Iterable[Out]


class Actor(Protocol):
    """`takes` names every message type that may be given to `handle`; `gives` every type that it may yield (asked questions too). An actor with
    optional partners sets them on the instance: a wiring without a taker is refused."""

    name: str
    takes: frozenset[type[Message]]
    gives: frozenset[type[Message]]

    def handle(self, message: Message) -> Handling: ...
