"""Seats: cell, task and thread; extensions by kind; answers of the device queue by owner."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import trio
import trio.testing

from penstock.core.contract.actors import Seat
from penstock.core.protocol.control import Drain, Drained, Extension, Message, Stop, Tick, WorkDone
from penstock.core.runtime.actor import Ask, To
from penstock.core.runtime.seats import House
from penstock.core.runtime.wiring import CallPort, WiringError

Handler = Callable[[Any], Iterable[Any]]


class Scripted:
    """An actor made of a function; notes the threads that it ran on."""

    def __init__(self, name: str, takes: set[type[Message]], gives: set[type[Message]], handler: Handler) -> None:
        self.name = name
        self.takes = frozenset(takes)
        self.gives = frozenset(gives)
        self.threads: set[str] = set()
        self._handler = handler

    def handle(self, message: Message) -> Iterable[Any]:
        self.threads.add(threading.current_thread().name)
        return self._handler(message)


def ping(data: bytes = b"", kind: str = "t.ping") -> Extension:
    return Extension(kind=kind, data=data)


def echo(message: Any) -> Iterable[Any]:
    yield Extension(kind="t.pong", data=message.data + b"!")


class Out:
    """The port to the other side."""

    def __init__(self, takes: set[type[Message]] | None = None, gives: set[type[Message]] | None = None) -> None:
        self.said: list[tuple[Message, int | None]] = []
        self.changed = threading.Event()
        self.port = CallPort("link", self._take, takes=takes or set(), gives=gives or set())

    def _take(self, message: Message, index: int | None) -> None:
        self.said.append((message, index))
        self.changed.set()


def run(house: House, test: Callable[[], Any]) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(house.run)
            await test()
            house.close()

    try:
        trio.run(main)
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None
    finally:
        house.close()


async def until(condition: Callable[[], bool]) -> None:
    """A thread answers through the loop: run it until then."""
    with trio.fail_after(10):
        while not condition():
            await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("wiring", ["cell", "tasks"])
@pytest.mark.parametrize("host", ["cell", "task", "thread"])
def test_an_extension_reaches_the_actor_of_its_kind_and_the_answer_leaves(host: Any, wiring: str) -> None:
    out = Out()
    actor = Scripted("echo", set(), set(), echo)
    seat = Seat(party=actor, host=host, takes_kinds=frozenset({"t.ping"}), gives_kinds=frozenset({"t.pong"}))
    house = House([Seat(party=out.port), seat], link="link", wiring=wiring)

    async def test() -> None:
        house.host.post(*(ping(bytes([n])) for n in b"abc"))
        await until(lambda: len(out.said) == 3)

    run(house, test)
    assert out.said == [(Extension(kind="t.pong", data=bytes([n]) + b"!"), None) for n in b"abc"]
    assert (actor.threads == {"actor echo"}) is (host == "thread")


def test_a_kind_that_is_taken_here_does_not_leave_and_what_comes_in_does_not_bounce(caplog: pytest.LogCaptureFixture) -> None:
    out = Out()
    got: list[bytes] = []
    seats = [
        Seat(party=out.port),
        Seat(party=Scripted("echo", set(), set(), echo), takes_kinds=frozenset({"t.ping"}), gives_kinds=frozenset({"t.pong", "t.far"})),
        Seat(party=Scripted("end", set(), set(), lambda m: got.append(m.data) or ()), takes_kinds=frozenset({"t.pong"})),
    ]
    house = House(seats, link="link")

    async def test() -> None:
        house.host.post(ping(b"x"), ping(kind="t.far"))

    run(house, test)
    assert (got, out.said) == ([b"x!"], [])
    assert house.host.kinds.dropped == 1


def test_an_unknown_kind_is_dropped_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    house = House([Seat(party=Out().port)], link="link")

    async def test() -> None:
        house.host.post(*[ping(kind="who.knows")] * 3, *(ping(kind=f"k{n}") for n in range(100)))

    with caplog.at_level(logging.WARNING):
        run(house, test)
    assert house.host.kinds.dropped == 103
    assert caplog.messages[0] == "an extension of the kind 'who.knows' is dropped: no actor of this process takes it"
    assert len(caplog.messages) == 32


def test_to_names_the_peer() -> None:
    out = Out()
    actor = Scripted("echo", set(), set(), lambda m: [To(ping(kind="t.pong"), 3)])
    house = House(
        [Seat(party=out.port), Seat(party=actor, takes_kinds=frozenset({"t.ping"}), gives_kinds=frozenset({"t.pong"}))], link="link"
    )

    async def test() -> None:
        house.host.post(ping())

    run(house, test)
    assert out.said == [(ping(kind="t.pong"), 3)]


@pytest.mark.parametrize("host", ["task", "thread"])
def test_typed_messages_pass_between_cell_and_apart(host: Any) -> None:
    """Drain in; Tick from the cell to the apart actor; Stop back; Drained out."""
    out = Out({Drained}, {Drain})
    near = Scripted("near", {Drain, Stop}, {Tick, Drained}, lambda m: [Tick(now_ns=1) if type(m) is Drain else Drained(role="t", id=0)])
    far = Scripted("far", {Tick}, {Stop}, lambda m: [Stop(reason="far")])
    house = House([Seat(party=out.port), Seat(party=near), Seat(party=far, host=host)], link="link")

    async def test() -> None:
        house.host.post(Drain())
        await until(lambda: bool(out.said))

    run(house, test)
    assert out.said == [(Drained(role="t", id=0), None)]


@pytest.mark.parametrize("host", ["task", "thread"])
def test_an_ask_reaches_only_its_own_host(host: Any) -> None:
    def asking(_: Any) -> Iterable[Any]:
        yield Ask(Tick(now_ns=1), Stop)

    far = Scripted("far", {Drain}, {Tick}, asking)
    near = Scripted("near", {Tick}, {Stop, Drained}, lambda m: [Stop(reason="")])
    out = Out({Stop, Drained}, {Drain})
    house = House([Seat(party=out.port), Seat(party=near), Seat(party=far, host=host)], link="link")

    async def test() -> None:
        house.host.post(Drain())
        await trio.sleep_forever()

    with pytest.raises(WiringError, match="far asks Tick, but an Ask reaches only actors of its host"):
        run(house, test)


@pytest.mark.parametrize("host", ["cell", "task", "thread"])
def test_what_a_handler_raises_ends_the_host(host: Any) -> None:
    def broken(_: Any) -> Iterable[Any]:
        raise ValueError("no good")

    seat = Seat(party=Scripted("bad", set(), set(), broken), host=host, takes_kinds=frozenset({"t.ping"}))
    house = House([Seat(party=Out().port), seat], link="link")

    async def test() -> None:
        house.host.post(ping())
        await trio.sleep_forever()

    with pytest.raises(ValueError, match="no good"):
        run(house, test)


@pytest.mark.parametrize("wiring", ["cell", "tasks"])
def test_an_answer_of_the_device_queue_goes_to_its_owner(wiring: str, caplog: pytest.LogCaptureFixture) -> None:
    got: dict[str, list[int]] = {"a": [], "b": []}
    seats = [Seat(party=Out(gives={WorkDone}).port)]
    for name in got:
        seats.append(Seat(party=Scripted(name, {WorkDone}, set(), lambda m, name=name: got[name].append(m.id) or ())))
    house = House(seats, link="link", wiring=wiring)

    async def test() -> None:
        done = [WorkDone(engine=0, epoch=1, owner=owner, id=id) for id, owner in enumerate(["a", "b", "gone", "a"])]
        house.host.post(*done)
        await trio.testing.wait_all_tasks_blocked()

    with caplog.at_level(logging.WARNING):
        run(house, test)
    assert got == {"a": [0, 3], "b": [1]}
    assert house.host.unowned.count == 1
    assert caplog.messages == ["a WorkDone is dropped: its owner is 'gone', and no party of that name takes WorkDone here"]


def test_a_port_says_things_from_any_thread_and_is_closed_with_the_house() -> None:
    class Timer:
        name = "timer"
        takes: frozenset[type[Message]] = frozenset()
        gives: frozenset[type[Message]] = frozenset({Tick})
        closed = 0

        def deliver(self, message: Message, index: int | None) -> None:
            raise AssertionError("nothing is sent to it")

        def close(self) -> None:
            self.closed += 1
            raise OSError("the socket is gone")  # is logged, and keeps no other from closing

    timer, got = Timer(), []
    actor = Scripted("clock", {Tick}, set(), lambda m: got.append(m.now_ns) or ())
    house = House([Seat(party=timer, host="thread"), Seat(party=actor)], link="link")
    house.say_soon("timer", Tick(now_ns=1))  # nobody hears it yet

    async def test() -> None:
        await trio.to_thread.run_sync(house.say_soon, "timer", Tick(now_ns=2))
        await until(lambda: bool(got))

    run(house, test)
    assert got == [2]
    assert timer.closed
    house.say_soon("timer", Tick(now_ns=3))


def test_seats_that_do_not_fit_are_refused() -> None:
    a, b = (Scripted(name, set(), set(), echo) for name in "ab")
    kinds = frozenset({"t.ping"})
    with pytest.raises(WiringError, match=r"'t\.ping' have several takers: a, b"):
        House([Seat(party=a, takes_kinds=kinds), Seat(party=b, takes_kinds=kinds)], link="link")
    with pytest.raises(WiringError, match="'moon', which is none of cell, task, thread"):
        House([Seat(party=a, host="moon")], link="link")  # type: ignore[arg-type]
    with pytest.raises(WiringError, match="neither actor nor port"):
        House([Seat(party=object())], link="link")
    with pytest.raises(WiringError, match="Tick from c has no taker"):  # what is given depends on settings: so does the wiring
        House([Seat(party=Scripted("c", set(), {Tick}, echo))], link="link")
