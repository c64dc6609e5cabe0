"""Seats become a host: who runs where.

What it is: `House`, made of seats (core/contract/actors.py): one host for the actors and ports of its cell, and beside it those that have a task or a
thread of their own. To the host such an actor is one that only puts what it gets into a mailbox; what it says later enters by `say`.
What it does not know: which seats there are (core/processes/engine.py, core/processes/text_side.py), plugins.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from types import GeneratorType
from typing import Any

import trio

from penstock.core.contract.actors import HOSTS, Seat
from penstock.core.protocol.control import Message
from penstock.core.protocol.errors import tamed
from penstock.core.runtime.actor import Handling
from penstock.core.runtime.hosts import FusedHost, TaskHost, make_host
from penstock.core.runtime.wiring import Kinds, WiringError

log = logging.getLogger("penstock.actors")
JOIN_S = 5.0


Blame = Callable[[WiringError, bool], Exception]
"""Words a wrong wiring as the fault of whoever brought the party. True: the seats do not fit; False: something that was said does not."""


class House:
    """`await nursery.start(house.run)`, then `host.post`. `link` names the port to the other side, which takes the kinds that nobody here takes.
    Raises WiringError for seats that do not fit together, at the start or by what they say: as `blame` words it."""

    def __init__(
        self, seats: Sequence[Seat], *, link: str, wiring: str = "cell", inline: bool = True, blame: Blame = lambda error, seats: error
    ) -> None:
        self._blame = blame
        try:
            self._furnish(seats, link, wiring, inline)
        except WiringError as error:
            raise blame(error, True) from error

    def _furnish(self, seats: Sequence[Seat], link: str, wiring: str, inline: bool) -> None:
        actors: list[Any] = []
        ports: list[Any] = []
        self._apart: list[_Task | _Thread] = []
        self._parties = [seat.party for seat in seats]
        takes: dict[str, str] = {}
        gives: dict[str, str] = {}
        for seat in seats:
            party = seat.party
            check_seat(seat)
            for kind in sorted(seat.takes_kinds):
                if kind in takes:
                    raise WiringError(
                        f"Extensions of the kind {kind!r} have several takers: {takes[kind]}, {party.name}.", takes[kind], party.name
                    )
                takes[kind] = party.name
            gives.update(dict.fromkeys(seat.gives_kinds, link))
            if not hasattr(party, "handle"):
                ports.append(party)
            elif seat.host == "cell":
                actors.append(party)
            else:
                apart = (_Task if seat.host == "task" else _Thread)(self, party)
                self._apart.append(apart)
                actors.append(apart)
        kinds = Kinds(takes, gives)
        self.host: FusedHost | TaskHost = (
            make_host(wiring, actors, ports, kinds) if inline else FusedHost(actors, ports, kinds=kinds, inline=False)
        )
        self._token: trio.lowlevel.TrioToken | None = None

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until `close`, or raises what a handler raised."""
        self._token = trio.lowlevel.current_trio_token()
        if not self._apart:
            await self._run_host(task_status)
            return
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            for apart in self._apart:
                nursery.start_soon(apart.run, name=f"actor {apart.name}")
            try:
                await self._run_host(task_status)
            except Exception as error:  # raised outside the nursery, which would wrap it
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _run_host(self, task_status: trio.TaskStatus[None]) -> None:
        try:
            await self.host.run(task_status)
        except WiringError as error:
            raise self._blame(error, False) from error

    def say_soon(self, giver: str, out: Any) -> None:
        """As that party, from any thread. Before `run` and after the loop's end there is nobody to tell."""
        if self._token is not None:
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self.host.say, giver, out)

    def fail_soon(self, error: BaseException) -> None:
        if self._token is not None:
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self.host.fail, error)

    def close(self) -> None:
        """End the host, then whatever has a `close`; one that fails keeps no other from closing. Idempotent where the parties' are."""
        self.host.close()
        for party in (*self._apart, *self._parties):
            try:
                getattr(party, "close", _nothing)()
            except Exception:
                log.exception("%s could not be closed", party.name)


def _nothing() -> None:
    """What there is to close where nothing is."""


def check_seat(seat: Seat) -> None:
    """Raises WiringError for what is wrong with this seat, whatever else there is."""
    party = seat.party
    lacking = [name for name in ("name", "takes", "gives") if not hasattr(party, name)]
    if lacking or not (callable(getattr(party, "handle", None)) or callable(getattr(party, "deliver", None))):
        raise WiringError(
            f"A seat holds {type(party).__name__}, which is neither actor nor port: it lacks {', '.join(lacking or ['handle'])}."
        )
    name = party.name
    if not isinstance(name, str) or not name:
        raise WiringError(f"A seat holds {type(party).__name__}, whose name is {name!r} instead of a text.")
    if seat.host not in HOSTS:
        raise WiringError(f"The seat of {name} has the host {seat.host!r}, which is none of {', '.join(HOSTS)}.", name)
    for field, value in (("takes", party.takes), ("gives", party.gives)):
        if not isinstance(value, (frozenset, set)) or not all(isinstance(kind, type) and issubclass(kind, Message) for kind in value):
            raise WiringError(f"{name}'s {field} is {value!r:.120}: it must be a frozenset of message types.", name)
    for field, kinds in (("takes_kinds", seat.takes_kinds), ("gives_kinds", seat.gives_kinds)):
        if not isinstance(kinds, (frozenset, set)) or not all(isinstance(kind, str) for kind in kinds):
            raise WiringError(f"The seat of {name} has {field} {kinds!r:.120}: it must be a frozenset of texts.", name)


class _Apart:
    """An actor with a mailbox of its own, as its host sees it."""

    def __init__(self, house: House, actor: Any) -> None:
        self._house = house
        self._actor = actor
        self.name: str = actor.name
        self.takes: frozenset[type[Message]] = actor.takes
        self.gives: frozenset[type[Message]] = actor.gives

    def _said(self, message: Message) -> Iterable[Any]:
        """What the actor says to it. There are no answers: `say` refuses questions."""
        handling: Handling = self._actor.handle(message)
        return handling if isinstance(handling, GeneratorType) else list(handling)


class _Task(_Apart):
    def __init__(self, house: House, actor: Any) -> None:
        super().__init__(house, actor)
        self._box: list[Message] = []
        self._filled = trio.Event()

    def handle(self, message: Message) -> Iterable[Any]:
        self._box.append(message)
        self._filled.set()
        return ()

    async def run(self) -> None:
        while True:
            await self._filled.wait()
            self._filled = trio.Event()
            box, self._box = self._box, []
            for message in box:
                try:
                    for out in self._said(message):
                        self._house.host.say(self.name, out)
                except Exception as error:
                    self._house.host.fail(error)
                await trio.lowlevel.checkpoint()


class _Thread(_Apart):
    def __init__(self, house: House, actor: Any) -> None:
        super().__init__(house, actor)
        self._box: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"actor {self.name}", daemon=True)

    def handle(self, message: Message) -> Iterable[Any]:
        self._box.put(message)
        return ()

    async def run(self) -> None:
        self._thread.start()
        await trio.sleep_forever()

    def close(self) -> None:
        """Waits for the message that is being handled, JOIN_S at most; what else waits is dropped."""
        self._box.put(None)
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(JOIN_S)

    def _work(self) -> None:
        while (message := self._box.get()) is not None and not self._house.host.closed:
            try:
                for out in self._said(message):
                    self._house.say_soon(self.name, out)
            except BaseException as error:  # the loop, whose thread this is not, must hear of it
                self._house.fail_soon(tamed(error))
                return
