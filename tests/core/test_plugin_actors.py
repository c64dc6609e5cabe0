"""Actors that a plugin brings: their seats in engine and text, what they say to each other and to the device, and whose fault a failure is."""

from __future__ import annotations

import logging
import queue
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from penstock.core.contract.actors import ActorContext, Seat
from penstock.core.contract.fake_device import FakeDevice, FakeOptions
from penstock.core.contract.hookspecs import ActorSpec, hookimpl
from penstock.core.contract.host import PluginHost
from penstock.core.processes.local import LocalServer
from penstock.core.protocol.columns import i32
from penstock.core.protocol.config import build
from penstock.core.protocol.errors import PenstockError, PluginError, PluginFault
from penstock.core.protocol.messages import Control, DeviceWork, Extension, Message, Move, StepDone, WorkDone
from penstock.core.runtime.actor import Ask, To

Handler = Callable[[ActorContext, Any], Iterable[Any]]
Add = Callable[..., str]


def spec(name: str, where: str, handler: Handler, takes: set[type[Message]] | None = None, **seat: Any) -> ActorSpec:
    """An actor of that name that handles by `handler(context, message)`."""

    def factory(context: ActorContext) -> Seat:
        class Scripted:
            def __init__(self) -> None:
                self.name = name
                self.takes = frozenset(takes or set())
                self.gives = frozenset({DeviceWork} if takes else ())

            def handle(self, message: Message) -> Iterable[Any]:
                return handler(context, message)

        return Seat(party=Scripted(), **{key: frozenset(value) if isinstance(value, set) else value for key, value in seat.items()})

    return ActorSpec(name=name, api_level=1, where=where, factory=factory)


@pytest.fixture
def add(monkeypatch: pytest.MonkeyPatch) -> Add:
    """add(specs) makes a plugin module that registers them, and gives its name."""

    def make(*specs: Any, name: str = "strange") -> str:
        module = types.ModuleType(name)
        module.register_actors = hookimpl(lambda: list(specs))  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
        return name

    return make


def server(plugin: str, failures: queue.Queue[PenstockError] | None = None, **config: Any) -> LocalServer:
    device = FakeDevice(FakeOptions(vocab_size=1000))
    on_failure = failures.put if failures is not None else None
    return LocalServer(build(config), lambda message: None, on_failure=on_failure, device=device, extra_plugins=[plugin])


@pytest.mark.parametrize("wiring", ["cell", "tasks"])
@pytest.mark.parametrize("host", ["cell", "task", "thread"])
def test_text_asks_the_engine_which_asks_the_device(host: Any, wiring: str, add: Add) -> None:
    heard: queue.Queue[bytes] = queue.Queue()
    contexts: dict[str, ActorContext] = {}

    def starter(context: ActorContext) -> Seat:
        """A port: it says its word as soon as it can."""
        contexts["text"] = context

        class Port:
            name = "starter"
            takes: frozenset[type[Message]] = frozenset()
            gives: frozenset[type[Message]] = frozenset()

            def deliver(self, message: Message, index: int | None) -> None:
                assert isinstance(message, Extension)
                heard.put(message.data)

        return Seat(party=Port(), takes_kinds=frozenset({"t.answer"}), gives_kinds=frozenset({"t.ask"}))

    def work(context: ActorContext, message: Any) -> Iterable[Any]:
        here = {"engine": context.id, "epoch": context.epoch, "owner": "mover"}
        if isinstance(message, Extension):
            assert context.facts is not None
            assert context.facts.device == "fake"
            yield DeviceWork(control=Control(**here, id=1, name="host_pages", data=b"2"))
            yield DeviceWork(move=Move(**here, id=2, blocks=i32([5, 3]), pages=i32([0, 1]), out=True))
            yield DeviceWork(move=Move(**here, id=3, blocks=i32([5]), pages=i32([2]), out=False))
            yield DeviceWork(control=Control(**here, id=4, name="dream"))
            yield DeviceWork(control=Control(**here, id=5, name="fence"))
        else:
            yield Extension(kind="t.answer", data=f"{message.id} {message.error or message.data.decode()}".encode())

    mover = spec("mover", "engine", work, {WorkDone}, host=host, takes_kinds={"t.ask"}, gives_kinds={"t.answer"})
    name = add(mover, ActorSpec(name="starter", api_level=1, where="text", factory=starter))
    with server(name, wiring=wiring):
        contexts["text"].post(Extension(kind="t.ask", data=b""))
        said = [heard.get(timeout=20).decode() for _ in range(5)]
    assert said == [
        "1 256",
        "2 ",
        "3 There are 2 host pages.",
        "4 The fake device does not know the control 'dream'.",
        "5 ",
    ]
    assert (contexts["text"].facts, contexts["text"].id) == (None, 0)


def test_only_the_seats_of_a_process_are_taken_there(add: Add) -> None:
    name = add(spec("a", "engine", lambda c, m: ()), spec("b", "text", lambda c, m: ()))
    assert list(PluginHost("engine", extra=[name]).load().check().actors()) == ["a"]
    assert list(PluginHost("text", extra=[name]).load().check().actors()) == ["b"]


def test_a_seat_in_no_process_is_refused(add: Add) -> None:
    with pytest.raises(PluginError, match="its field 'where' must be 'engine' or 'text', not 'edge'"):
        PluginHost("engine", extra=[add(spec("a", "edge", lambda c, m: ()))]).load().check()


def test_a_factory_that_gives_no_seat_is_named(add: Add) -> None:
    name = add(ActorSpec(name="bench", api_level=1, where="engine", factory=lambda context: "a chair"))
    with pytest.raises(
        PenstockError, match=r"The actor 'bench' \(plugin 'strange' .* returned a str, which is no actor: it has no 'gives_kinds'"
    ):
        server(name).start()


def test_an_actor_that_takes_what_another_takes_is_refused_at_the_start(add: Add) -> None:
    with pytest.raises(PenstockError, match="two parties are called 'kv'"):
        server(add(spec("kv", "engine", lambda c, m: ()))).start()


@pytest.mark.parametrize("host", ["cell", "task", "thread"])
def test_a_handler_that_fails_is_named(host: Any, add: Add) -> None:
    contexts: list[ActorContext] = []

    def broken(context: ActorContext, message: Any) -> Iterable[Any]:
        raise ValueError("no good")

    def port(context: ActorContext) -> Seat:
        contexts.append(context)
        return Seat(party=types.SimpleNamespace(name="p", takes=frozenset(), gives=frozenset(), deliver=lambda message, index: None))

    bad = spec("bad", "engine", broken, host=host, takes_kinds={"t.ask"})
    failures: queue.Queue[PenstockError] = queue.Queue()
    with server(add(bad, ActorSpec(name="p", api_level=1, where="engine", factory=port)), failures):
        contexts[0].post(Extension(kind="t.ask", data=b""))
        said = str(failures.get(timeout=20))
    assert "The actor 'bad' (plugin 'strange' of package 'strange') is broken: handle() failed with ValueError: no good" in said


class Made:
    """A party with whatever members a test wants."""

    def __init__(self, **members: Any) -> None:
        self.__dict__.update(members)


GOOD: dict[str, Any] = {"name": "odd", "takes": frozenset(), "gives": frozenset(), "handle": lambda message: ()}
BLAMED = r"The actor 'plug' \(plugin 'strange' of package 'strange'\) is broken: factory\(\) gave a seat that "


@pytest.mark.parametrize("where", ["engine", "text"])
@pytest.mark.parametrize(
    ("party", "seat", "said"),
    [
        ({"takes": [WorkDone]}, {}, r"will not do: odd's takes is \[.*WorkDone.*\]: it must be a frozenset of message types"),
        ({"gives": [DeviceWork]}, {}, "will not do: odd's gives is .*: it must be a frozenset of message types"),
        ({"takes": frozenset({"WorkDone"})}, {}, "will not do: odd's takes is"),
        ({"name": None}, {}, "will not do: A seat holds Made, whose name is None"),
        ({"handle": None}, {}, "will not do: A seat holds Made, which is neither actor nor port: it lacks handle"),
        ({}, {"host": "moon"}, "will not do: The seat of odd has the host 'moon', which is none of cell, task, thread"),
        ({}, {"takes_kinds": "t.ask"}, "will not do: The seat of odd has takes_kinds 't.ask': it must be a frozenset of texts"),
        ({"name": "root"}, {}, "does not fit: .*two parties are called 'root'"),
        ({"gives": frozenset({Message})}, {}, "does not fit: .*Message from odd has no taker"),
    ],
)
def test_a_seat_that_will_not_do_is_its_plugins_fault(party: dict[str, Any], seat: dict[str, Any], said: str, where: str, add: Add) -> None:
    if where == "text" and party.get("name") == "root":
        party = {"name": "tokenizer"}
        said = said.replace("root", "tokenizer")
    name = add(ActorSpec(name="plug", api_level=1, where=where, factory=lambda context: Seat(party=Made(**(GOOD | party)), **seat)))
    with pytest.raises(PluginFault, match=BLAMED + said):
        server(name).start()


def test_a_party_without_members_is_its_plugins_fault(add: Add) -> None:
    name = add(ActorSpec(name="plug", api_level=1, where="engine", factory=lambda context: Seat(party=object())))
    with pytest.raises(
        PluginFault, match=BLAMED + "will not do: A seat holds object, which is neither actor nor port: it lacks name, takes"
    ):
        server(name).start()


def test_a_second_taker_is_its_plugins_fault_and_the_first_is_not_told_that_nobody_gives(add: Add) -> None:
    party = Made(**(GOOD | {"takes": frozenset({StepDone})}))
    name = add(ActorSpec(name="plug", api_level=1, where="engine", factory=lambda context: Seat(party=party)))
    with pytest.raises(PluginFault, match=BLAMED + "does not fit: .*StepDone from device has several takers: scheduler, odd") as caught:
        server(name).start()
    assert "which nobody gives" not in str(caught.value)


WRONG = [
    (42, "gave 42, which is no message"),
    (None, "gave None, which is no message"),
    (To(42, 0), "gave 42, which is no message"),  # type: ignore[arg-type]
    (WorkDone(engine=0, epoch=1, owner="", id=1), "yielded WorkDone, which it does not declare"),
    (Extension(kind="t.answer", data="text"), "gave an Extension with the data 'text': a kind is a text, data is bytes"),  # type: ignore[arg-type]
    (Extension(kind=7, data=b""), "gave an Extension with the kind 7: a kind is a text, data is bytes"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize("where", ["engine", "text"])
@pytest.mark.parametrize("wiring", ["cell", "tasks"])
@pytest.mark.parametrize("host", ["cell", "task", "thread", "port"])
def test_what_an_actor_or_a_port_says_wrongly_is_its_plugins_fault(host: Any, wiring: str, where: str, add: Add) -> None:
    for wrong, said in WRONG if (host, wiring) != ("thread", "tasks") else WRONG[:1]:
        contexts: dict[str, ActorContext] = {}

        def port(context: ActorContext, contexts: Any = contexts) -> Seat:
            contexts["port"] = context
            party = Made(name="p", takes=frozenset(), gives=frozenset(), deliver=lambda message, index: None)
            return Seat(party=party, gives_kinds=frozenset({"t.answer"}))

        specs = [ActorSpec(name="a_port", api_level=1, where=where, factory=port)]
        if host != "port":
            specs.append(spec("plug", where, lambda c, m, wrong=wrong: [wrong], host=host, takes_kinds={"t.ask"}, gives_kinds={"t.answer"}))
        failures: queue.Queue[PenstockError] = queue.Queue()
        with server(add(*specs), failures, wiring=wiring):
            contexts["port"].post(wrong if host == "port" else Extension(kind="t.ask", data=b""))
            error = failures.get(timeout=20)
        assert isinstance(error, PluginFault)
        actor, call, giver = ("a_port", "post", "p") if host == "port" else ("plug", "handle", "plug")
        assert f"The actor '{actor}' (plugin 'strange' of package 'strange') is broken: {call}() broke a rule: {giver} {said}" in str(error)


def test_a_question_that_nobody_can_answer_is_its_plugins_fault(add: Add) -> None:
    contexts: list[ActorContext] = []

    def port(context: ActorContext) -> Seat:
        contexts.append(context)
        return Seat(party=Made(name="p", takes=frozenset(), gives=frozenset(), deliver=lambda message, index: None))

    asks = spec("plug", "engine", lambda c, m: [Ask(WorkDone(engine=0, epoch=1, owner="", id=1), StepDone)], takes_kinds={"t.ask"})
    failures: queue.Queue[PenstockError] = queue.Queue()
    with server(add(asks, ActorSpec(name="p", api_level=1, where="engine", factory=port)), failures):
        contexts[0].post(Extension(kind="t.ask", data=b""))
        error = failures.get(timeout=20)
    assert "The actor 'plug' (plugin 'strange' of package 'strange') is broken: handle() broke a rule: plug asks WorkDone" in str(error)


def test_an_extension_to_an_engine_that_is_not_there_is_told_to_the_log(add: Add, caplog: pytest.LogCaptureFixture) -> None:
    contexts: list[ActorContext] = []
    heard: queue.Queue[bytes] = queue.Queue()

    def port(context: ActorContext) -> Seat:
        contexts.append(context)
        party = Made(name="p", takes=frozenset(), gives=frozenset(), deliver=lambda message, index: heard.put(message.data))
        return Seat(party=party, takes_kinds=frozenset({"t.answer"}), gives_kinds=frozenset({"t.ask"}))

    back = spec("back", "engine", lambda c, m: [Extension(kind="t.answer", data=m.data)], takes_kinds={"t.ask"}, gives_kinds={"t.answer"})
    with caplog.at_level(logging.WARNING), server(add(back, ActorSpec(name="p", api_level=1, where="text", factory=port))):
        for index, data in enumerate(b"abc"):
            contexts[0].post(To(Extension(kind="t.ask", data=bytes([data])), index * 7))  # type: ignore[arg-type]
        contexts[0].post(Extension(kind="t.ask", data=b"!"))
        assert [heard.get(timeout=20), heard.get(timeout=20)] == [b"a", b"!"]
    assert [said for said in caplog.messages if "extension" in said] == [
        f"an extension of the kind 't.ask' to engine {n} is dropped: none is connected" for n in (7, 14)
    ]
