"""Who takes which message: routing tables as data.

What it is: `route` makes the table of one host from what its actors and ports take and give, and refuses a wiring that is not closed: a message
without a taker or a giver, an ambiguous route. A *port* is anything at the edge of a host that is no actor: a link to another process, the device
queue, a worker thread, a clock. It takes messages through `deliver` (a plain call that must not block) and gives messages by calling the
host's `post`.
What it does not know: how messages are carried (core/runtime/hosts.py), which actors exist (core/processes/engine.py, core/processes/text_side.py, core/processes/root.py wire them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from penstock.core.protocol.control import Message
from penstock.core.protocol.errors import FinalError
from penstock.core.runtime.actor import Actor


class WiringError(FinalError):
    """The wiring is not closed: a message without a taker or a giver, an ambiguous route, an Ask that cannot be answered."""


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


def route(actors: Sequence[Actor], ports: Sequence[Port]) -> Routes:
    """The routing table. From an actor: to the other actor or port that takes the type, else back to itself (a note to itself). From a port:
    to the actor that takes it. Raises WiringError listing everything that has no taker, no giver or several takers."""
    parties: list[Actor | Port] = [*actors, *ports]
    names = [party.name for party in parties]
    wrong = [f"two parties are called {name!r}" for name in sorted({n for n in names if names.count(n) > 1})]
    table: dict[str, dict[type[Message], str]] = {name: {} for name in names}
    given: set[tuple[str, type[Message]]] = set()
    for giver in parties:
        from_port = giver in ports
        for kind in sorted(giver.gives, key=lambda t: t.__name__):
            takers = [a.name for a in actors if kind in a.takes and a is not giver]
            takers += [p.name for p in ports if kind in p.takes] if not from_port else []
            if not takers and not from_port and kind in giver.takes:
                takers = [giver.name]
            if len(takers) == 1:
                table[giver.name][kind] = takers[0]
                given.add((takers[0], kind))
            elif takers:
                wrong.append(f"{kind.__name__} from {giver.name} has several takers: {', '.join(takers)}")
            else:
                wrong.append(f"{kind.__name__} from {giver.name} has no taker")
    for taker in parties:
        for kind in sorted(taker.takes, key=lambda t: t.__name__):
            if (taker.name, kind) not in given:
                wrong.append(f"{taker.name} takes {kind.__name__}, which nobody gives")
    if wrong:
        raise WiringError("The wiring is not closed: " + "; ".join(wrong) + ".")
    return table
