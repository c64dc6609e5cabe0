"""Seats from plugins, for an engine or for text.

What it is: asks every registered actor spec of this process for its seat, and puts the plugin's name to what its actor raises and to what does not fit
about its seat or about what it says.
What it does not know: hosts, what the actors do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import GeneratorType
from typing import Any

import msgspec

from penstock.core.contract.actors import ActorContext, Seat
from penstock.core.contract.host import PluginHost
from penstock.core.protocol.config import Config
from penstock.core.protocol.control import EngineFacts, Message
from penstock.core.protocol.errors import PenstockError, PluginFault, tamed
from penstock.core.runtime.actor import Handling
from penstock.core.runtime.clock import Clock
from penstock.core.runtime.seats import check_seat
from penstock.core.runtime.wiring import WiringError

Say = Callable[[str, Message], None]


class PluginSeats:
    """`seats` in the order of registration. `say(party, message)` may be called from any thread. Raises PluginFault for a factory that fails or gives
    a seat that will not do."""

    def __init__(
        self, plugins: PluginHost | None, say: Say, *, config: Config, id: int, epoch: int, clock: Clock, facts: EngineFacts | None = None
    ) -> None:
        self.seats: list[Seat] = []
        self._blames: dict[str, tuple[str, Callable[[str, Exception | str], PluginFault]]] = {}
        for spec in plugins.actors().values() if plugins is not None else ():
            assert plugins is not None
            mouth = _Mouth(say)
            blame = functools.partial(plugins.blame, "actors", spec.name)
            seat = spec.factory(ActorContext(config=config, id=id, epoch=epoch, post=mouth.post, now_ns=clock.now_ns, facts=facts))
            try:
                check_seat(seat)
            except WiringError as error:
                raise blame("factory", f"gave a seat that will not do: {error.message.removesuffix('.')}") from error
            mouth.name = seat.party.name
            handles = hasattr(seat.party, "handle")
            if handles:
                seat = msgspec.structs.replace(seat, party=_Named(seat.party, functools.partial(blame, "handle")))
            self._blames[mouth.name] = ("handle" if handles else "post", blame)
            self.seats.append(seat)

    def blame(self, error: WiringError, seats: bool) -> Exception:
        """See core/runtime/seats.py: the fault of a plugin whose party is in it, else the error as it is."""
        for party in error.parties:
            if party in self._blames:
                call, blame = self._blames[party]
                what = "gave a seat that does not fit" if seats else "broke a rule"
                return blame("factory" if seats else call, f"{what}: {error.message.removesuffix('.')}")
        return error


class _Mouth:
    """Where a party posts, whose name is known only once its factory has returned."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self.name = ""

    def post(self, message: Message) -> None:
        self._say(self.name, message)


class _Named:
    """A plugin's actor, whose exceptions name it."""

    def __init__(self, actor: Any, blame: Callable[[Exception], PluginFault]) -> None:
        self._actor = actor
        self._blame = blame

    def __getattr__(self, name: str) -> Any:  # name, takes, gives, close
        return getattr(self._actor, name)

    def handle(self, message: Message) -> Handling:
        try:
            handling = self._actor.handle(message)
            yield from handling if isinstance(handling, GeneratorType) else (out for out in handling)
        except (PenstockError, GeneratorExit):  # the latter is how a generator that nobody goes on with is closed
            raise
        except BaseException as error:
            raise self._blame(tamed(error)) from error
