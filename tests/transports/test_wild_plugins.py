"""Whatever a transport's own code raises, and wherever: its request gets a 500, the log names the plugin, and the edge serves on."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import types
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import uvloop
from edge_kit import MakeEdge, delta, finished
from litestar import Request, post
from litestar.types import ASGIApp

from penstock.core.actors.text.bounds import SMALL
from penstock.core.contract.hookspecs import TransportSpec, hookimpl
from penstock.core.contract.host import PluginHost
from penstock.core.contract.transports import Transport
from penstock.core.protocol.config import build
from penstock.core.protocol.messages import Message, Submit
from penstock.transports import replies
from penstock.transports.edge import to_its_end, transport_factories
from penstock.transports.frame import Sse
from penstock.transports.gateway import Gateway
from penstock.transports.openai import parse_completion
from penstock.transports.openai_voice import CompletionVoice
from penstock.transports.surface import Surface
from penstock.transports.voice import VOICE

BLAME = "The transport 'wild' (plugin 'wilderness' of package 'wilderness') is broken: "
SAID = "The server made an error"


class Panic(BaseException):
    """As libraries in Rust raise it."""


class Silent(Exception):
    def __str__(self) -> str:
        raise SystemExit("no words")


KINDS: list[Callable[[], BaseException]] = [
    lambda: SystemExit(3),
    KeyboardInterrupt,
    Panic,
    Silent,
    asyncio.CancelledError,
    StopIteration,
    lambda: ValueError("plain"),
]
kinds = pytest.mark.parametrize("kind", KINDS, ids=["exit", "interrupt", "panic", "silent", "cancelled", "stop", "plain"])


@pytest.fixture(autouse=True)
def no_interrupts() -> Any:
    """As in an edge: root decides."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


def throwing(kind: Callable[[], BaseException]) -> Callable[..., Any]:
    def throw(*_: Any, **__: Any) -> Any:
        raise kind()

    return throw


@pytest.fixture
def wild(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """wild(routes) gives what an edge makes of a plugin with those routes (a factory), and of OpenAI's."""

    def make(factory: Callable[[Gateway], list[Any]]) -> list[Any]:
        module = types.ModuleType("wilderness")
        spec = TransportSpec(name="wild", api_level=2, factory=lambda gateway: Transport(factory(gateway)))
        module.register_transports = hookimpl(lambda: [spec])  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "wilderness", module)
        config = build({"transports": ["wild", "openai"]})
        return transport_factories(PluginHost("edge", extra=["wilderness"]).load(), config)

    return make


def voiced(methods: dict[str, Any], parse: Any = parse_completion) -> Callable[[Gateway], list[Any]]:
    """One route: completions in a voice that has those methods."""
    voice: Any = type("Wild", (CompletionVoice,), methods)

    def factory(gateway: Gateway) -> list[Any]:
        surface = Surface(gateway, Sse())

        @post("/wild", status_code=200, opt={VOICE: voice})
        async def wild(request: Request[Any, Any, Any]) -> ASGIApp:
            call = await surface.understood(await surface.body(request), parse, gateway.config, gateway.limits)
            return surface.answer(request, call, voice(call))

        return [wild]

    return factory


def lives(edge: Any) -> None:
    edge.text.script = play
    with edge.http() as http:
        assert http.post("/v1/completions", json={"prompt": "p"}).json()["choices"][0]["text"] == "y"
    assert edge.server.gateway.active == 0


def play(submit: Submit) -> list[Message]:
    return [delta({"key": submit.key, "text": "y"}), delta({"key": submit.key, "tokens": [], "reason": "stop"}), finished(submit.key)]


@kinds
@pytest.mark.parametrize(
    ("method", "stream"),
    [("begin", False), ("whole", False), ("begin", True), ("around", True), ("opened", True), ("closed", True), ("ended", True)],
)
def test_a_voice(kind: Any, method: str, stream: bool, make_edge: MakeEdge, wild: Any, caplog: pytest.LogCaptureFixture) -> None:
    edge = make_edge(routes=wild(voiced({method: throwing(kind)})), text=lambda text: setattr(text, "script", play))
    with edge.http() as http:
        reply = http.post("/wild", json={"prompt": "p", "stream": stream})
        assert (reply.status_code, reply.json()["error"]["code"]) == (500, "internal_error")
    assert SAID in reply.text
    assert any(BLAME in message for message in caplog.messages), caplog.messages
    lives(edge)


@kinds
@pytest.mark.parametrize("method", ["broken", "refuse"])
def test_an_error_in_a_voice(kind: Any, method: str, make_edge: MakeEdge, wild: Any, caplog: pytest.LogCaptureFixture) -> None:
    methods = {method: staticmethod(throwing(kind)), "ended": throwing(kind)}
    edge = make_edge(routes=wild(voiced(methods)), text=lambda text: setattr(text, "script", play))
    with edge.http() as http:
        assert SAID in http.post("/wild", json={"prompt": "p", "stream": True}).text
    assert any(BLAME in message for message in caplog.messages), caplog.messages
    lives(edge)


@kinds
@pytest.mark.parametrize("size", [1, SMALL + 1], ids=["small", "large"])
def test_a_parser(kind: Any, size: int, make_edge: MakeEdge, wild: Any, caplog: pytest.LogCaptureFixture) -> None:
    edge = make_edge(routes=wild(voiced({}, throwing(kind))))
    with edge.http() as http:
        for _ in range(2):  # the first left nothing behind that the second would wait for
            reply = http.post("/wild", json={"prompt": "p" * size})
            assert (reply.status_code, SAID in reply.text) == (500, True)
    assert any(BLAME in message for message in caplog.messages), caplog.messages
    lives(edge)


@kinds
def test_a_long_reply(kind: Any, make_edge: MakeEdge, wild: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replies, "LONG", 0)
    edge = make_edge(routes=wild(voiced({"whole": throwing(kind)})), text=lambda text: setattr(text, "script", play))
    with edge.http() as http:
        assert http.post("/wild", json={"prompt": "p"}).status_code == 500
    monkeypatch.undo()
    lives(edge)


@kinds
@pytest.mark.parametrize("begun", [False, True])
def test_an_application(kind: Any, begun: bool, make_edge: MakeEdge, wild: Any, caplog: pytest.LogCaptureFixture) -> None:
    def factory(gateway: Gateway) -> list[Any]:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            if begun:
                await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9")]})
                await send({"type": "http.response.body", "body": b"begun", "more_body": True})
            raise kind()

        @post("/wild", status_code=200)
        async def wild() -> ASGIApp:
            return app  # type: ignore[return-value]

        return [wild]

    edge = make_edge(routes=wild(factory))
    with edge.http() as http:
        try:
            reply = http.post("/wild", json={})
        except Exception:
            assert begun, "the connection ends before the answer is whole"
        else:
            assert not begun
            assert (reply.status_code, reply.json()["error"]["code"]) == (500, "internal_error")
    assert any(BLAME in message for message in caplog.messages), caplog.messages
    lives(edge)


class Sink:
    """One of a plugin's own."""

    def __init__(self, kind: Callable[[], BaseException], method: str) -> None:
        self.kind = kind
        self.method = method
        self.told: list[str] = []

    def _tell(self, what: str) -> None:
        self.told.append(what)
        if what == self.method:
            raise self.kind()

    def row(self, *_: Any) -> None:
        self._tell("row")

    def finished(self, *_: Any) -> None:
        self._tell("finished")

    def failed(self, *_: Any) -> None:
        self._tell("failed")


@kinds
@pytest.mark.parametrize("method", ["row", "finished"])
def test_a_sink(kind: Any, method: str, make_edge: MakeEdge, caplog: pytest.LogCaptureFixture) -> None:
    """The link to text, and whoever else has something to come by it, feel nothing of it."""
    edge = make_edge(text=lambda text: setattr(text, "script", play))
    sink = Sink(kind, method)
    gateway = edge.server.gateway
    with edge.http() as http:
        http.post("/v1/completions", json={"prompt": "p"})
        [first] = edge.text.wait_for(Submit)
        edge.text.call(lambda: gateway.submit(msgspec.structs.replace(first, key=gateway.next_key()), sink))
        assert http.post("/v1/completions", json={"prompt": "p"}).status_code == 200
    assert sink.told == (["row", "failed"] if method == "row" else ["row", "row", "finished", "failed"])
    assert any("test_wild_plugins.Sink: " in message for message in caplog.messages), caplog.messages
    lives(edge)


@pytest.mark.parametrize("factory", [uvloop.new_event_loop, asyncio.new_event_loop])
def test_tasks_and_callbacks_of_its_own(factory: Any, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[int] = []

    async def task() -> None:
        await asyncio.sleep(0)
        raise SystemExit(3)

    async def main() -> int:
        loop = asyncio.get_running_loop()
        loop.call_soon(throwing(KeyboardInterrupt))
        kept = loop.create_task(task())
        while not kept.done():
            await asyncio.sleep(0)
        kept.exception()
        loop.call_soon(seen.append, 1)
        await asyncio.sleep(0)
        return 7

    with caplog.at_level(logging.ERROR), asyncio.Runner(loop_factory=factory) as runner:
        assert to_its_end(runner.get_loop(), main()) == 7
    assert seen == [1]
    said = [message for message in caplog.messages if "the server goes on" in message]
    assert len(said) == 2
    assert all("test_wild_plugins.py, line " in message for message in said)


def test_what_the_edge_itself_ends_with_is_passed_on() -> None:
    async def main() -> int:
        raise SystemExit(4)

    with asyncio.Runner() as runner, pytest.raises(SystemExit):
        to_its_end(runner.get_loop(), main())
