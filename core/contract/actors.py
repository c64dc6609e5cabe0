"""Seats: what an actor plugin returns, and where its actor runs.

What it is: the protocol of an actor and of a port as a plugin author sees them, `Seat`, which gives one of them a place in a process, and
`ActorContext`, what a factory is given. Built-in actors and ports have seats too.
What it does not know: hosts (core/runtime/hosts.py), which seats there are (core/processes/engine.py, core/processes/text_side.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final, Literal, Protocol

import msgspec

from penstock.core.protocol.config import Config
from penstock.core.protocol.control import EngineFacts, Message

HOSTS: Final = ("cell", "task", "thread")
PLACES: Final = ("engine", "text")
"""Processes that have seats."""


class Actor(Protocol):
    """A pure handler: no I/O, no sleeping, no clock but `ActorContext.now_ns`. Sets are read once, after the factory returned: an actor with optional
    partners builds them from its settings."""

    name: str
    """Unique in its process. Taken are "scheduler", "kv", "executor", "sampler", "masks", "device", "text", "root" in an engine, and "text", "edges", "engines",
    "root", "tokenizer", "grammars", "clock" in text."""
    takes: frozenset[type[Message]]
    """Types that may be given to `handle`. Each must have a giver in this process. Extensions are not listed here: `Seat.takes_kinds`."""
    gives: frozenset[type[Message]]
    """Types that `handle` may yield, those it asks with included. Each must have exactly one taker in this process. Extensions: `Seat.gives_kinds`."""

    def handle(self, message: Message) -> Iterable[Any]:
        """Messages to send (usually this is a generator). `reply = yield Ask(question, Reply)` (penstock.core.runtime.actor) gives the answer of the actor
        that takes the question, if it is in the same host; while it waits, its actor handles nothing else. `yield To(message, index)` names one text
        shard or engine. An exception ends the process's work, as one of a step does."""
        ...


class ActorPort(Protocol):
    """What brings the outside world in: a thread, a socket, a timer. It takes messages by `deliver` and gives them by `ActorContext.post`."""

    name: str
    """As an actor's."""
    takes: frozenset[type[Message]]
    """Types that actors of this process send to it."""
    gives: frozenset[type[Message]]
    """Types that it posts: each must have an actor that takes it."""

    def deliver(self, message: Message, index: int | None) -> None:
        """Called on the process's loop: return at once. `index` is that of a To."""
        ...


class Seat(msgspec.Struct, frozen=True, kw_only=True):
    """A party at its place."""

    party: Any
    """An Actor, or an ActorPort. What has a `close()` is closed with the process."""
    host: Literal["cell", "task", "thread"] = "cell"
    """"cell": beside the built-in actors, run to completion within each message's turn: the quickest way, and the only one from which an Ask reaches
    the built-in actors. "task": a task of its own on the process's loop: it never runs in the middle of a step's messages. "thread": a thread of its
    own, for an actor that computes for long or waits (what it is sent meanwhile piles up). From both no Ask reaches anybody, and none reaches them: anything slow is two messages.
    For a port it says where it calls `post` from, which takes either."""
    takes_kinds: frozenset[str] = frozenset()
    """Kinds of Extension that `handle` (or `deliver`) gets, whoever sends them: a kind has one taker in a process."""
    gives_kinds: frozenset[str] = frozenset()
    """Kinds of Extension that it sends to the other side where nobody in its own process takes them: from an engine to text, from text to an engine
    (To(message, index) names which; all of its engines without). There an unknown kind is dropped with a warning."""


class ActorContext(msgspec.Struct, frozen=True, kw_only=True):
    """What the factory of an actor is given."""

    config: Config
    """All options."""
    id: int
    """The engine's index, or the text shard's."""
    epoch: int
    """This life of the process, from 1. Messages to the device queue carry it."""
    post: Callable[[Message], None]
    """Say something as this party, from any thread (ports; actors yield instead). Before the process serves and after it ended nobody hears it."""
    now_ns: Callable[[], int]
    """Monotonic nanoseconds, comparable between the processes of one host."""
    facts: EngineFacts | None = None
    """What the engine turned out to be; None in text, which may be up before any engine."""
