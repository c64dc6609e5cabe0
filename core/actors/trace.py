"""Record an actor's inputs, and replay them.

What it is: `Recorder` stands in for a pure actor at its host and notes, for every message, the time that the actor saw, the answers that its
questions got, and what it said. `replay` gives the inputs to a fresh actor and returns what that one says: a pure actor says the same. A
recorded incident becomes a test; a new scheduling policy can be tried on yesterday's traffic (open loop: the answers stay yesterday's).
What it does not know: which actor it is, files (`dump` and `load` are bytes: msgpack, never pickle).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import Any, Union

import msgspec

from penstock.core.protocol.columns import dec_hook, enc_hook, ext_hook
from penstock.core.protocol.messages import Message, message_types
from penstock.core.runtime.actor import Actor, Ask, Handling, Out, To
from penstock.core.runtime.clock import Clock


class HeldClock:
    """A clock that stands still while a message is handled, so that one number a message records time. Wall time is not recorded: an
    actor that decides by it is not replayable."""

    def __init__(self) -> None:
        self._now = 0

    def hold(self, now_ns: int) -> None:
        self._now = now_ns

    def now_ns(self) -> int:
        return self._now

    def wall_ns(self) -> int:
        return self._now


class Handled(msgspec.Struct, kw_only=True):
    """One message at `at_ns`, the answers it was given in order, and everything that was yielded (questions too)."""

    at_ns: int
    message: Any
    answers: list[Any] = msgspec.field(default_factory=list)
    said: list[Any] = msgspec.field(default_factory=list)


class Recorder:
    """An actor around the actor that `make(clock)` builds. `trace` grows without bound: record windows, not weeks."""

    def __init__(self, make: Callable[[Clock], Actor], clock: Clock) -> None:
        self._clock = clock
        self._held = HeldClock()
        self.actor = make(self._held)
        self.name = self.actor.name
        self.takes = self.actor.takes
        self.gives = self.actor.gives
        self.trace: list[Handled] = []

    def handle(self, message: Message) -> Handling:
        now = self._clock.now_ns()
        handled = Handled(at_ns=now, message=message)
        self.trace.append(handled)
        self._held.hold(now)
        handling = _generator(self.actor.handle(message))
        answer: Any = None
        while True:
            try:
                out = handling.send(answer)
            except StopIteration:
                return
            handled.said.append(_plain(out))
            answer = yield out
            if isinstance(out, Ask):
                handled.answers.append(answer)

    def dump(self) -> bytes:
        return dump(self.trace)


def _generator(handling: Handling) -> Generator[Out, Any, None]:
    """Any handling as a generator."""
    yield from handling


def _plain(out: Out) -> Message:
    if isinstance(out, Ask):
        return out.question
    return out.message if isinstance(out, To) else out


def replay(make: Callable[[Clock], Actor], trace: Iterable[Handled]) -> list[list[Message]]:
    """What a fresh actor says to the recorded messages, one list a message. Raises IndexError if it asks more than the recorded one did."""
    clock = HeldClock()
    actor = make(clock)
    said: list[list[Message]] = []
    for handled in trace:
        clock.hold(handled.at_ns)
        answers = iter(handled.answers)
        handling = _generator(actor.handle(handled.message))
        answer: Any = None
        mine: list[Message] = []
        said.append(mine)
        while True:
            try:
                out = handling.send(answer)
            except StopIteration:
                break
            mine.append(_plain(out))
            answer = None
            if isinstance(out, Ask):
                answer = next(answers, None)
                if answer is None:
                    raise IndexError(f"the actor asks {type(out.question).__name__}, which the recorded one did not")
    return said


def dump(trace: Iterable[Handled]) -> bytes:
    return msgspec.msgpack.Encoder(enc_hook=enc_hook).encode(list(trace))


def load(data: bytes) -> list[Handled]:
    """Raises msgspec.ValidationError for what is no trace of this build's messages."""
    union: Any = Union[tuple(message_types())]  # noqa: UP007  (built at run time)
    entry: Any = msgspec.defstruct("Entry", [("at_ns", int), ("message", union), ("answers", list[union]), ("said", list[union])])
    decoded: Any = msgspec.msgpack.Decoder(list[entry], dec_hook=dec_hook, ext_hook=ext_hook).decode(data)
    return [Handled(at_ns=e.at_ns, message=e.message, answers=e.answers, said=e.said) for e in decoded]
