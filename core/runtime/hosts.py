"""Where actors run.

What it is: two hosts for the same actors. `FusedHost` is a *cell*: several actors behind one FIFO; whoever posts from the host's thread runs the cell to completion there and
then, a handler is never re-entered, and an `Ask` is answered inside the run. `TaskHost` gives every actor its own trio task and bounded
mailbox; an `Ask` waits for a one-shot reply. Both pass the same tests, which proves that the actors are pure.
An `Ask` reaches only actors of its own host: what has a task or a thread of its own (core/runtime/seats.py) is told, never asked.
What it does not know: which actors exist, where a message belongs (core/runtime/wiring.py has the tables), sockets and devices (they are ports).

Failure: an exception in a handler fails the host: nothing more is handled, `run` raises it. An actor that can survive one (by failing one
request) has a method `failed(message, error) -> Handling`, whose messages are routed instead; if that raises, the host fails.
"""

from __future__ import annotations

import abc
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from types import GeneratorType
from typing import Any, Protocol

import trio

from penstock.core.protocol.control import Extension, Message, WorkDone
from penstock.core.runtime.actor import Actor, Ask, To
from penstock.core.runtime.mailbox import Mailbox, OneShot
from penstock.core.runtime.wiring import Dropped, Kinds, Port, Routes, WiringError, misfit, route

MAILBOX = 1024
"""Messages that a task actor's mailbox takes before other actors wait. Posts from outside always fit: their bound is the links' credit."""


class Host(Protocol):
    """What both hosts offer. Construct on any thread, everything else but `post_soon` belongs to the trio thread."""

    def post(self, *messages: Message) -> None:
        """Give messages from the ports' side, in order; they are all queued before the first is handled."""
        ...

    def post_soon(self, message: Message) -> None:
        """The same from any thread, once `run` has started."""
        ...

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until `close`, or raises what a handler raised."""
        ...

    async def room(self) -> None:
        """Wait until the host takes more from outside without piling it up."""
        ...

    def close(self) -> None: ...


class _Base(abc.ABC):
    def __init__(self, actors: Sequence[Actor], ports: Sequence[Port], routes: Routes | None, kinds: Kinds | None) -> None:
        self.routes = route(actors, ports) if routes is None else routes
        self.kinds = kinds or Kinds()
        self.unowned = Dropped()
        parties: list[Actor | Port] = [*actors, *ports]
        self._owners = {party.name for party in parties if WorkDone in party.takes}
        self._actors = {actor.name: actor for actor in actors}
        self._ports = {port.name: port for port in ports}
        self._entry: dict[type[Message], str] = {}
        for port in ports:
            self._entry.update(self.routes[port.name])
        self._failure: BaseException | None = None
        self._ended = trio.Event()
        self._token: trio.lowlevel.TrioToken | None = None
        self.handled = 0
        """Messages handled by actors so far (the budget test counts them)."""

    def _taker_of(self, message: Message) -> str | None:
        """The actor that takes what came from a port; None: nobody's, or delivered already."""
        try:
            return self._entry[type(message)]
        except KeyError:
            if type(message) is Extension:
                taker = self.kinds.inward(message.kind)
                if taker not in self._ports:
                    return taker
                self._ports[taker].deliver(message, None)  # the only message that may go from port to port
                return None
            if type(message) is WorkDone:
                if message.owner in self._owners:
                    return message.owner
                self.unowned.note(
                    message.owner,
                    "a WorkDone is dropped: its owner is %.100r, and no party of that name takes WorkDone here",
                    message.owner,
                )
                return None
            raise WiringError(f"No port of this host gives {type(message).__name__}.") from None

    def _addressed(self, giver: str, message: Message) -> str | None:
        """The taker of what `giver` said and no type's route leads to; None: it is dropped."""
        if type(message) is Extension and type(message.kind) is str and type(message.data) is bytes:
            return self.kinds.outward(message.kind)
        raise misfit(giver, message)

    def fail(self, error: BaseException) -> None:
        if self._failure is None:
            self._failure = error
        self._ended.set()

    @property
    def closed(self) -> bool:
        return self._ended.is_set()

    def close(self) -> None:
        self._ended.set()

    @abc.abstractmethod
    def post(self, *messages: Message) -> None:
        """Take messages, on the trio thread."""

    @abc.abstractmethod
    def say(self, giver: str, out: Any) -> None:
        """Take what a party says that runs elsewhere, on the trio thread."""

    def _say(self, giver: str, out: Any, queue: Callable[[str, Message], None]) -> None:
        """Route it: to a port at once, to an actor by `queue`."""
        if self._ended.is_set():
            return
        if type(out) is Ask:
            error = f"{giver} asks {type(out.question).__name__}, but an Ask reaches only actors of its host: send a message, take another."
            self.fail(WiringError(error, giver))
            return
        try:
            message, index = (out.message, out.index) if type(out) is To else (out, None)
            taker = self.routes[giver].get(type(message)) or self._addressed(giver, message)
        except WiringError as wrong:
            self.fail(wrong)
            return
        if taker in self._ports:
            self._ports[taker].deliver(message, index)
        elif taker is not None:
            queue(taker, message)

    def post_soon(self, message: Message) -> None:
        """From any thread. After the loop has ended there is nobody to tell: the message is dropped."""
        assert self._token is not None, "run() has not started"
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self.post, message)


class FusedHost(_Base):
    """The cell. `post` from the trio thread runs everything that is due right there (no task switch); a call from within a handler or a
    port only queues. With `inline=False` a task of its own does the running instead: for a host whose posters must not wait for it."""

    def __init__(
        self,
        actors: Sequence[Actor],
        ports: Sequence[Port],
        *,
        routes: Routes | None = None,
        kinds: Kinds | None = None,
        inline: bool = True,
    ) -> None:
        super().__init__(actors, ports, routes, kinds)
        self._inline = inline
        self._queue: deque[tuple[str, Message]] = deque()
        self._running = False
        self._busy: set[str] = set()
        self._wake = trio.Event()

    def post(self, *messages: Message) -> None:
        if self._ended.is_set():
            return
        try:
            for message in messages:
                taker = self._taker_of(message)
                if taker is not None:
                    self._queue.append((taker, message))
        except WiringError as error:
            self.fail(error)
            return
        self._go()

    def say(self, giver: str, out: Any) -> None:
        self._say(giver, out, lambda taker, message: self._queue.append((taker, message)))
        self._go()

    def _go(self) -> None:
        if self._inline:
            self.drain()
        else:
            self._wake.set()

    def drain(self) -> None:
        """Handle all that is queued. Nested calls return at once: the outer one does the work."""
        if self._running:
            return
        self._running = True
        queue = self._queue
        try:
            while queue and not self._ended.is_set():
                name, message = queue.popleft()
                self._handle(name, message)
        except Exception as error:
            self.fail(error)
        finally:
            self._running = False

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        self._token = trio.lowlevel.current_trio_token()
        task_status.started()
        if self._inline:
            await self._ended.wait()
        else:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._pump)
                await self._ended.wait()
                nursery.cancel_scope.cancel()
        if self._failure is not None:
            raise self._failure

    async def _pump(self) -> None:
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            self.drain()

    async def room(self) -> None:
        """A cell runs to completion before `post` returns, so there is always room; without `inline` let it run."""
        if not self._inline:
            await trio.lowlevel.checkpoint()

    # --- running

    def _handle(self, name: str, message: Message, reply: type[Message] | None = None) -> Message | None:
        """One handler to its end; its outputs are routed, except the first of type `reply`, which is returned."""
        if name in self._busy:
            raise WiringError(f"{name} would be entered again by {type(message).__name__} while it waits for an answer.", name)
        actor = self._actors[name]
        self.handled += 1
        self._busy.add(name)
        try:
            return self._drive(name, actor.handle(message), reply)
        except Exception as error:
            rescue = getattr(actor, "failed", None)
            if rescue is None or isinstance(error, WiringError):
                raise
            return self._drive(name, rescue(message, error), reply)
        finally:
            self._busy.discard(name)

    def _drive(self, name: str, handling: Any, reply: type[Message] | None) -> Message | None:
        found: Message | None = None
        if not isinstance(handling, GeneratorType):
            handling = (out for out in handling)
        answer: Any = None
        while True:
            try:
                out = handling.send(answer)
            except StopIteration:
                return found
            answer = None
            kind = type(out)
            if kind is Ask:
                answer = self._ask(name, out)
            elif found is None and kind is reply:
                found = out
            else:
                self._emit(name, out)

    def _ask(self, asker: str, ask: Ask) -> Message:
        name = self.routes[asker].get(type(ask.question))
        if name is None or name not in self._actors:
            raise WiringError(f"{asker} asks {type(ask.question).__name__}, which no actor of this host takes.", asker)
        reply = self._handle(name, ask.question, ask.reply)
        if reply is None:
            raise WiringError(f"{name} gave no {ask.reply.__name__} to {asker}'s {type(ask.question).__name__}.", name)
        return reply

    def _emit(self, giver: str, out: Any) -> None:
        message, index = (out.message, out.index) if type(out) is To else (out, None)
        taker = self.routes[giver].get(type(message))
        if taker is None and (taker := self._addressed(giver, message)) is None:
            return
        port = self._ports.get(taker)
        if port is not None:
            port.deliver(message, index)
        else:
            self._queue.append((taker, message))


class TaskHost(_Base):
    """Every actor in its own trio task behind its own mailbox."""

    def __init__(
        self,
        actors: Sequence[Actor],
        ports: Sequence[Port],
        *,
        routes: Routes | None = None,
        kinds: Kinds | None = None,
        mailbox: int = MAILBOX,
    ) -> None:
        super().__init__(actors, ports, routes, kinds)
        self._boxes = {actor.name: Mailbox(mailbox) for actor in actors}

    def post(self, *messages: Message) -> None:
        if self._ended.is_set():
            return
        try:
            for message in messages:
                taker = self._taker_of(message)
                if taker is not None:
                    self._boxes[taker].put_now(message)
        except WiringError as error:
            self.fail(error)

    def say(self, giver: str, out: Any) -> None:
        self._say(giver, out, lambda taker, message: self._boxes[taker].put_now(message))

    async def room(self) -> None:
        for box in self._boxes.values():
            await box.wait_room()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        self._token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as nursery:
            for actor in self._actors.values():
                nursery.start_soon(self._serve, actor, name=f"actor {actor.name}")
            task_status.started()
            await self._ended.wait()
            nursery.cancel_scope.cancel()
        if self._failure is not None:
            raise self._failure

    async def _serve(self, actor: Actor) -> None:
        box = self._boxes[actor.name]
        try:
            while True:
                message, reply = await box.get()
                self.handled += 1
                try:
                    await self._run(actor.name, actor.handle(message), reply)
                except Exception as error:
                    rescue = getattr(actor, "failed", None)
                    if rescue is None or isinstance(error, WiringError):
                        raise
                    await self._run(actor.name, rescue(message, error), reply)
                if reply is not None and reply.value is None:
                    raise WiringError(f"{actor.name} gave no {reply.kind.__name__} to a {type(message).__name__}.", actor.name)
        except Exception as error:
            self.fail(error)

    async def _run(self, name: str, handling: Any, reply: OneShot | None) -> None:
        if not isinstance(handling, GeneratorType):
            handling = (out for out in handling)
        answer: Any = None
        while True:
            try:
                out = handling.send(answer)
            except StopIteration:
                return
            if type(out) is Ask:
                answer = await self._ask(name, out)
            else:
                answer = None
                await self._emit(name, out, reply)

    async def _ask(self, asker: str, ask: Ask) -> Message:
        name = self.routes[asker].get(type(ask.question))
        if name is None or name not in self._boxes:
            raise WiringError(f"{asker} asks {type(ask.question).__name__}, which no actor of this host takes.", asker)
        shot = OneShot(ask.reply)
        self._boxes[name].put_now(ask.question, shot)
        await shot.done.wait()
        assert shot.value is not None
        return shot.value

    async def _emit(self, giver: str, out: Any, reply: OneShot | None) -> None:
        message, index = (out.message, out.index) if type(out) is To else (out, None)
        if reply is not None and reply.value is None and type(message) is reply.kind:
            reply.value = message
            reply.done.set()
            return
        taker = self.routes[giver].get(type(message))
        if taker is None and (taker := self._addressed(giver, message)) is None:
            return
        port = self._ports.get(taker)
        if port is not None:
            port.deliver(message, index)
            return
        box = self._boxes[taker]
        if taker != giver:  # a note to itself must not wait for itself
            await box.wait_room()
        box.put_now(message)


def make_host(wiring: str, actors: Sequence[Actor], ports: Sequence[Port], kinds: Kinds | None = None) -> FusedHost | TaskHost:
    """`--wiring`: "cell" or "tasks"."""
    return TaskHost(actors, ports, kinds=kinds) if wiring == "tasks" else FusedHost(actors, ports, kinds=kinds)
