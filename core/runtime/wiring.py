"""Who takes which message: routing tables as data.

What it is: `route` makes the table of one host from what its actors and ports take and give, and refuses a wiring that is not closed: a message
without a taker or a giver, an ambiguous route. A *port* is anything at the edge of a host that is no actor: a link to another process, the device
queue, a worker thread, a clock. Extensions go by their kind (`Kinds`), WorkDone by its owner's name. It takes messages through `deliver` (a plain call that must not block) and gives messages by calling the
host's `post`.
What it does not know: how messages are carried (core/runtime/hosts.py), which actors exist (core/processes/engine.py, core/processes/text_side.py, core/processes/root.py wire them).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from penstock.core.protocol.control import Extension, Message, WorkDone
from penstock.core.protocol.errors import FinalError
from penstock.core.runtime.actor import Actor

log = logging.getLogger("penstock.extensions")

ADDRESSED: frozenset[type[Message]] = frozenset({Extension, WorkDone})
"""Messages that say themselves who takes them, by kind or by name: no type's route, and nobody need be there."""


class WiringError(FinalError):
    """The wiring is not closed: a message without a taker or a giver, an ambiguous route, an Ask that cannot be answered. `parties` are the names of
    those that it is about, so that whoever knows them can say whose they are."""

    def __init__(self, message: str, *parties: str) -> None:
        super().__init__(message)
        self.parties = parties


def misfit(giver: str, out: object) -> WiringError:
    """What is wrong with something that was said and has no route."""
    if not isinstance(out, Message):
        return WiringError(f"{giver} gave {out!r:.80}, which is no message.", giver)
    if isinstance(out, Extension):
        what = f"the data {out.data!r:.80}" if type(out.kind) is str else f"the kind {out.kind!r:.80}"
        return WiringError(f"{giver} gave an Extension with {what}: a kind is a text, data is bytes.", giver)
    return WiringError(f"{giver} yielded {type(out).__name__}, which it does not declare.", giver)


class Port(Protocol):
    """`takes` leave the host here, `gives` come in here. `index` names one peer of a link group (To), None the only one."""

    name: str
    takes: frozenset[type[Message]]
    gives: frozenset[type[Message]]

    def deliver(self, message: Message, index: int | None) -> None: ...


class CallPort:
    """A port whose other side is a plain function."""

    def __init__(
        self,
        name: str,
        deliver: Callable[[Message, int | None], None],
        *,
        takes: Iterable[type[Message]] = (),
        gives: Iterable[type[Message]] = (),
    ) -> None:
        self.name = name
        self.takes = frozenset(takes)
        self.gives = frozenset(gives)
        self._deliver = deliver

    def deliver(self, message: Message, index: int | None) -> None:
        self._deliver(message, index)


Routes = Mapping[str, Mapping[type[Message], str]]
"""giver -> message type -> taker, by name."""


class Dropped:
    """Messages that are lost because nobody is there to take them: `count` of all, and one warning for each `key` as long as there are few."""

    MOST_WARNED = 32

    def __init__(self) -> None:
        self.count = 0
        self._warned: set[object] = set()

    def note(self, key: object, what: str, *values: object) -> None:
        """`what` with %-places for `values`."""
        self.count += 1
        if key not in self._warned and len(self._warned) < self.MOST_WARNED:
            self._warned.add(key)
            log.warning(what, *values)


class Kinds:
    """Who takes which kind of Extension: `takes` is kind -> party, `gives` kind -> the port to another process. The rest is dropped."""

    def __init__(self, takes: Mapping[str, str] | None = None, gives: Mapping[str, str] | None = None) -> None:
        self._takes = dict(takes or {})
        self._gives = dict(gives or {})
        self._dropped = Dropped()

    @property
    def dropped(self) -> int:
        return self._dropped.count

    def inward(self, kind: str) -> str | None:
        """The taker of what comes from a port: nothing is passed on to another process."""
        taker = self._takes.get(kind)
        if taker is None:
            self._drop(kind)
        return taker

    def outward(self, kind: str) -> str | None:
        """The taker of what a party of this host says."""
        taker = self._takes.get(kind) or self._gives.get(kind)
        if taker is None:
            self._drop(kind)
        return taker

    def _drop(self, kind: str) -> None:
        self._dropped.note(kind, "an extension of the kind %.100r is dropped: no actor of this process takes it", kind)


def route(actors: Sequence[Actor], ports: Sequence[Port]) -> Routes:
    """The routing table. From an actor: to the other actor or port that takes the type, else back to itself (a note to itself). From a port:
    to the actor that takes it. Raises WiringError listing everything that has no taker, no giver or several takers."""
    parties: list[Actor | Port] = [*actors, *ports]
    names = [party.name for party in parties]
    twice = sorted({name for name in names if names.count(name) > 1})
    wrong = [f"two parties are called {name!r}" for name in twice]
    blamed = list(twice)
    table: dict[str, dict[type[Message], str]] = {name: {} for name in names}
    given: set[tuple[str, type[Message]]] = set()
    for giver in parties:
        from_port = giver in ports
        for kind in sorted(giver.gives - ADDRESSED, key=lambda t: t.__name__):
            takers = [a.name for a in actors if kind in a.takes and a is not giver]
            takers += [p.name for p in ports if kind in p.takes] if not from_port else []
            if not takers and not from_port and kind in giver.takes:
                takers = [giver.name]
            if len(takers) == 1:
                table[giver.name][kind] = takers[0]
                given.add((takers[0], kind))
            elif takers:
                wrong.append(f"{kind.__name__} from {giver.name} has several takers: {', '.join(takers)}")
                blamed += [giver.name, *takers]
                given.update((taker, kind) for taker in takers)
            else:
                wrong.append(f"{kind.__name__} from {giver.name} has no taker")
                blamed.append(giver.name)
    for taker in parties:
        for kind in sorted(taker.takes - ADDRESSED, key=lambda t: t.__name__):
            if (taker.name, kind) not in given:
                wrong.append(f"{taker.name} takes {kind.__name__}, which nobody gives")
                blamed.append(taker.name)
    if wrong:
        raise WiringError("The wiring is not closed: " + "; ".join(wrong) + ".", *blamed)
    return table
