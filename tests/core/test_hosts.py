"""Routing tables, and the same actors in both hosts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import trio
import trio.testing

from penstock.core.protocol.control import ChildUp, Drain, Drained, Message, Stop, Tick
from penstock.core.runtime.actor import Ask, To
from penstock.core.runtime.hosts import FusedHost, TaskHost, make_host
from penstock.core.runtime.wiring import CallPort, WiringError, route

Handler = Callable[[Any], Iterable[Any]]


class Scripted:
    """An actor made of a function."""

    def __init__(self, name: str, takes: set[type[Message]], gives: set[type[Message]], handler: Handler) -> None:
        self.name = name
        self.takes = frozenset(takes)
        self.gives = frozenset(gives)
        self.handle = handler


def nothing(_: Any) -> Iterable[Any]:
    return ()


def sink(out: list[Any]) -> Callable[[Message, int | None], None]:
    return lambda message, index: out.append((message, index))


both = pytest.mark.parametrize("wiring", ["cell", "tasks"])


def drive(wiring: str, actors: list[Any], ports: list[CallPort], *messages: Message) -> FusedHost | TaskHost:
    """Post, let everything settle, close. Raises what the host raises."""
    host = make_host(wiring, actors, ports)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(host.run)
            await trio.testing.wait_all_tasks_blocked()
            host.post(*messages)
            await trio.testing.wait_all_tasks_blocked()
            host.close()

    try:
        trio.run(main)
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None
    return host


# ------------------------------------------------------------------ routing


def test_routes_are_found_and_checked() -> None:
    a = Scripted("a", {Tick}, {Drain, Tick}, nothing)
    b = Scripted("b", {Drain}, {Drained}, nothing)
    port = CallPort("p", lambda m, i: None, takes={Drained}, gives={Tick})
    table = route([a, b], [port])
    assert table["a"] == {Drain: "b", Tick: "a"}  # nobody else takes a Tick: a note to itself
    assert table["p"] == {Tick: "a"}
    assert table["b"] == {Drained: "p"}


def test_a_message_that_passes_through_is_not_ambiguous() -> None:
    """Park comes from the edges to text, and from text to the engines."""
    text = Scripted("text", {Drain}, {Drain}, nothing)
    left = CallPort("edges", lambda m, i: None, gives={Drain})
    right = CallPort("engines", lambda m, i: None, takes={Drain})
    table = route([text], [left, right])
    assert table["edges"] == {Drain: "text"}
    assert table["text"] == {Drain: "engines"}


def test_open_ends_and_ambiguities_are_all_named() -> None:
    a = Scripted("a", {Tick, Stop}, {Drain, ChildUp}, nothing)
    b = Scripted("b", {Drain}, set(), nothing)
    c = Scripted("c", {Drain}, set(), nothing)
    with pytest.raises(WiringError) as caught:
        route([a, b, c], [CallPort("p", lambda m, i: None, gives={Tick})])
    text = str(caught.value)
    assert "Drain from a has several takers: b, c" in text
    assert "ChildUp from a has no taker" in text
    assert "a takes Stop, which nobody gives" in text
    with pytest.raises(WiringError, match="two parties are called 'a'"):
        route([a, a], [])


# ------------------------------------------------------------------ both hosts


@both
def test_fifo_notes_to_itself_and_ports(wiring: str) -> None:
    """A note to itself is handled after everything that was already queued: that is how the scheduler plans once for many messages."""
    seen: list[str] = []
    out: list[Any] = []

    def handle(message: Any) -> Iterable[Any]:
        seen.append(type(message).__name__)
        if isinstance(message, Tick) and message.now_ns == 1:
            yield Stop()
        if isinstance(message, Stop):
            yield To(Drained(role="x", id=1), 3)
            yield Drained(role="x", id=2)

    actor = Scripted("a", {Tick, Stop}, {Stop, Drained}, handle)
    port = CallPort("p", sink(out), takes={Drained}, gives={Tick})
    host = drive(wiring, [actor], [port], Tick(now_ns=1), Tick(now_ns=2), Tick(now_ns=3))
    assert seen == ["Tick", "Tick", "Tick", "Stop"]
    assert [(m.id, index) for m, index in out] == [(1, 3), (2, None)]
    assert host.handled == 4


@both
def test_ask_gets_the_first_reply_and_other_outputs_are_routed(wiring: str) -> None:
    out: list[Any] = []

    def asker(message: Any) -> Iterable[Any]:
        reply = yield Ask(Drain(deadline_s=7.0), Drained)
        yield ChildUp(role=reply.role, id=reply.id, epoch=1, pid=1)

    def answerer(message: Any) -> Iterable[Any]:
        yield Stop(reason="on the way")
        yield Drained(role="answer", id=int(message.deadline_s))

    a = Scripted("a", {Tick, Drained}, {Drain, ChildUp}, asker)
    b = Scripted("b", {Drain}, {Drained, Stop}, answerer)
    port = CallPort("p", sink(out), takes={Stop, ChildUp}, gives={Tick})
    drive(wiring, [a, b], [port], Tick(now_ns=1))
    assert [m for m, _ in out] == [Stop(reason="on the way"), ChildUp(role="answer", id=7, epoch=1, pid=1)]


@both
def test_while_an_actor_waits_it_handles_nothing_else(wiring: str) -> None:
    log: list[str] = []

    def asker(message: Any) -> Iterable[Any]:
        log.append(f"begin {message.now_ns}")
        yield Ask(Drain(), Drained)
        log.append(f"end {message.now_ns}")

    def answerer(message: Any) -> Iterable[Any]:
        log.append("asked")
        yield Drained(role="r", id=0)

    a = Scripted("a", {Tick, Drained}, {Drain}, asker)
    b = Scripted("b", {Drain}, {Drained}, answerer)
    drive(wiring, [a, b], [CallPort("p", lambda m, i: None, gives={Tick})], Tick(now_ns=1), Tick(now_ns=2))
    assert log == ["begin 1", "asked", "end 1", "begin 2", "asked", "end 2"]


@both
def test_a_handler_that_raises_fails_the_host(wiring: str) -> None:
    handled: list[int] = []

    def handle(message: Any) -> Iterable[Any]:
        handled.append(message.now_ns)
        if message.now_ns == 2:
            raise ZeroDivisionError("boom")
        return ()

    actor = Scripted("a", {Tick}, set(), handle)
    with pytest.raises(ZeroDivisionError, match="boom"):
        drive(wiring, [actor], [CallPort("p", lambda m, i: None, gives={Tick})], *(Tick(now_ns=n) for n in (1, 2, 3)))
    assert handled == [1, 2]


@both
def test_an_actor_may_survive_its_own_failures(wiring: str) -> None:
    out: list[Any] = []

    class Careful(Scripted):
        def failed(self, message: Any, error: Exception) -> Iterable[Any]:
            yield Stop(reason=f"{message.now_ns}: {error}")

    def handle(message: Any) -> Iterable[Any]:
        yield Drained(role="before", id=0)
        if message.now_ns == 1:
            raise ValueError("one request")

    actor = Careful("a", {Tick}, {Drained, Stop}, handle)
    drive(wiring, [actor], [CallPort("p", sink(out), takes={Drained, Stop}, gives={Tick})], Tick(now_ns=1), Tick(now_ns=2))
    assert [type(m).__name__ for m, _ in out] == ["Drained", "Stop", "Drained"]
    assert out[1][0].reason == "1: one request"


@both
def test_wiring_faults_at_run_time_are_loud(wiring: str) -> None:
    port = CallPort("p", lambda m, i: None, takes={Drain}, gives={Tick})

    def undeclared(message: Any) -> Iterable[Any]:
        yield Stop()

    with pytest.raises(WiringError, match="does not declare"):
        drive(wiring, [Scripted("a", {Tick}, {Drain}, undeclared)], [port], Tick(now_ns=1))

    def asks_a_port(message: Any) -> Iterable[Any]:
        yield Ask(Drain(), Drained)

    with pytest.raises(WiringError, match="no actor of this host takes"):
        drive(wiring, [Scripted("a", {Tick}, {Drain}, asks_a_port)], [port], Tick(now_ns=1))
    with pytest.raises(WiringError, match="No port of this host gives Stop"):
        drive(wiring, [Scripted("a", {Tick}, {Drain}, undeclared)], [port], Stop())


@both
def test_an_answer_that_never_comes_is_an_error(wiring: str) -> None:
    def asks(message: Any) -> Iterable[Any]:
        yield Ask(Drain(), Drained)

    a = Scripted("a", {Tick, Drained}, {Drain}, asks)
    b = Scripted("b", {Drain}, {Drained}, nothing)
    with pytest.raises(WiringError, match="gave no Drained"):
        drive(wiring, [a, b], [CallPort("p", lambda m, i: None, gives={Tick})], Tick(now_ns=1))


@both
def test_posts_from_other_threads_arrive(wiring: str) -> None:
    seen: list[int] = []

    def handle(message: Any) -> Iterable[Any]:
        seen.append(message.now_ns)
        return ()

    host = make_host(wiring, [Scripted("a", {Tick}, set(), handle)], [CallPort("p", lambda m, i: None, gives={Tick})])

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(host.run)
            await trio.to_thread.run_sync(lambda: [host.post_soon(Tick(now_ns=n)) for n in range(100)])
            await trio.testing.wait_all_tasks_blocked()
            host.close()

    trio.run(main)
    assert seen == list(range(100))
    host.post_soon(Tick(now_ns=1))  # after the end: dropped


# ------------------------------------------------------------------ one host only


def test_the_cell_is_never_entered_again() -> None:
    """A port that posts from within `deliver` only queues; the running handler is finished first."""
    log: list[str] = []

    def handle(message: Any) -> Iterable[Any]:
        log.append(f"begin {message.now_ns}")
        if message.now_ns == 1:
            yield Drained(role="r", id=0)
        log.append(f"end {message.now_ns}")

    host = FusedHost(
        [Scripted("a", {Tick}, {Drained}, handle)],
        [CallPort("p", lambda m, i: host.post(Tick(now_ns=2)), takes={Drained}, gives={Tick})],
    )
    host.post(Tick(now_ns=1))
    assert log == ["begin 1", "end 1", "begin 2", "end 2"]


def test_circular_asks_are_refused_in_the_cell() -> None:
    def first(message: Any) -> Iterable[Any]:
        yield Ask(Drain(), Drained)

    def second(message: Any) -> Iterable[Any]:
        yield Ask(Stop(), ChildUp)

    a = Scripted("a", {Tick, Drained, Stop}, {Drain, ChildUp}, first)
    b = Scripted("b", {Drain, ChildUp}, {Drained, Stop}, second)
    with pytest.raises(WiringError, match="entered again"):
        drive("cell", [a, b], [CallPort("p", lambda m, i: None, gives={Tick})], Tick(now_ns=1))


def test_a_cell_that_is_not_inline_does_not_run_in_its_posters() -> None:
    seen: list[int] = []

    def handle(message: Any) -> Iterable[Any]:
        seen.append(message.now_ns)
        return ()

    host = FusedHost([Scripted("a", {Tick}, set(), handle)], [CallPort("p", lambda m, i: None, gives={Tick})], inline=False)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(host.run)
            host.post(Tick(now_ns=1))
            assert seen == []
            await trio.testing.wait_all_tasks_blocked()
            assert seen == [1]
            host.close()

    trio.run(main)


def test_a_full_mailbox_makes_other_actors_wait_but_not_the_outside() -> None:
    log: list[str] = []

    def fast(message: Any) -> Iterable[Any]:
        for n in range(6):
            log.append(f"give {n}")
            yield Drain(deadline_s=n)

    def slow(message: Any) -> Iterable[Any]:
        log.append(f"take {int(message.deadline_s)}")
        return ()

    a = Scripted("a", {Tick}, {Drain}, fast)
    b = Scripted("b", {Drain}, set(), slow)
    host = TaskHost([a, b], [CallPort("p", lambda m, i: None, gives={Tick})], mailbox=2)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(host.run)
            host.post(Tick(now_ns=1))
            await trio.testing.wait_all_tasks_blocked()
            host.close()

    trio.run(main)
    assert [line for line in log if line.startswith("take")] == [f"take {n}" for n in range(6)]
    waiting = 0
    for line in log:
        waiting += 1 if line.startswith("give") else -1
        assert waiting <= 4  # two in the mailbox, one being given, one being taken
