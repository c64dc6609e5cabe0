"""A surface is one file: a made-up API with its own field names, payloads, errors and frame, served through the Job that OpenAI's is.

`Telegraph` below is that file. Nothing in it is OpenAI's: requests say `wire`, `copies` and `at_most`, streams are JSON lines, errors are `{"returned": ...}`
and a busy server is 529.
"""

from __future__ import annotations

import asyncio
import functools
import re
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal

import httpx
import msgspec
import pytest
from edge_kit import Edge, MakeEdge, delta, events, finished, silent
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from litestar import Request, post
from litestar.types import ASGIApp

from penstock.core.actors.text.bounds import SMALL
from penstock.core.contract.hookspecs import TransportSpec, hookimpl
from penstock.core.contract.host import PluginHost
from penstock.core.contract.transports import Transport
from penstock.core.protocol.config import build
from penstock.core.protocol.errors import InvalidRequest, PenstockError, PluginFault
from penstock.core.protocol.messages import Message, Rejected, Submit
from penstock.core.protocol.sampling import SamplingParams
from penstock.transports.blame import Owned
from penstock.transports.builtin import openai_routes
from penstock.transports.edge import transport_factories
from penstock.transports.frame import Sse
from penstock.transports.gateway import Batch, Gateway
from penstock.transports.generation import Generation
from penstock.transports.outbox import Outbox
from penstock.transports.request import JsonReply, error_headers
from penstock.transports.surface import Surface
from penstock.transports.voice import VOICE, Choice, Head, Prompt, Usage

# ------------------------------------------------------------------ the surface


class Wire(msgspec.Struct):
    """The body."""

    wire: str | list[str]
    copies: int = 1
    at_most: int | None = None
    drop_by_drop: bool = False
    numbered: bool = False
    """Every line of a stream has its number, so no two are alike."""


class JsonLines:
    headers = ((b"content-type", b"application/x-ndjson"),)
    keep_alive = b"\n"

    def wrap(self, payload: bytes) -> bytes:
        return payload + b"\n"

    def around(self, before: bytes, after: bytes) -> tuple[bytes, bytes]:
        return before, after + b"\n"


class Telegraph:
    def __init__(self, asked: Wire) -> None:
        self.plain = not asked.numbered
        self._count = 0

    def begin(self, head: Head) -> str:
        self._head = {"office": head.model, "slip": f"t/{head.rid}"}
        return self._head["slip"]

    def whole(self, prompts: Sequence[Prompt], choices: Sequence[Choice], usage: Usage, timings: dict[str, Any] | None) -> bytes:
        told = [{"text": "".join(c.pieces), "why": c.reason} | ({"lost": c.error.message} if c.error else {}) for c in choices]
        return msgspec.json.encode({**self._head, "telegrams": told, "words": [usage.prompt, usage.output]})

    def _line(self, line: dict[str, Any]) -> bytes:
        self._count += 1
        return msgspec.json.encode(line if self.plain else {"no": self._count, **line})

    def around(self, index: int) -> tuple[bytes, bytes]:
        return b'{"slip":%d,"dots":' % index, b"}"

    def opened(self, index: int, prompt: Prompt, row: int, batch: Batch) -> Iterator[bytes]:
        yield self._line({"slip": index, "from": self._head["office"]})

    def piece(self, index: int, text: str, row: int, batch: Batch) -> Iterator[bytes]:
        if text:
            yield self._line({"slip": index, "dots": text})

    def closed(self, index: int, reason: str, error: PenstockError | None, row: int, batch: Batch) -> Iterator[bytes]:
        yield self._line({"slip": index, "why": reason} | ({"lost": error.message} if error else {}))
        yield self._line({"slip": index, "sealed": Usage.at(row, batch).output})

    def ended(self, usage: Usage, timings: dict[str, Any] | None) -> Iterable[bytes]:
        return [self._line({"words": [usage.prompt, usage.output]})]

    def broken(self, error: PenstockError) -> Iterable[bytes]:
        return [self._line({"returned": error.message})]

    @staticmethod
    def refuse(error: PenstockError, headers: Iterable[tuple[bytes, bytes]] = ()) -> JsonReply:
        body = msgspec.json.encode({"returned": error.message, "field": error.param})
        return JsonReply(body, 529 if error.status == 429 else error.status, [*error_headers(error), *headers])


def parse(body: bytes) -> tuple[Wire, Generation]:
    try:
        asked = msgspec.json.decode(body, type=Wire)
    except msgspec.MsgspecError as error:
        raise InvalidRequest(f"The telegram cannot be read: {error}.", param="wire") from None
    texts = [asked.wire] if isinstance(asked.wire, str) else asked.wire
    return asked, Generation(
        kind="completion",
        prompts=[{"prompt": text, "prompt_name": "wire"} for text in texts],
        sampling=SamplingParams(n=asked.copies, max_tokens=asked.at_most).validate(),
        explicit=["max_tokens"] if asked.at_most is not None else [],
        names={"max_tokens": "at_most", "n": "copies", "prompt": "wire"},
        stream=asked.drop_by_drop,
    )


def telegraph_routes(gateway: Gateway, voice: type[Telegraph] = Telegraph) -> list[Any]:
    surface = Surface(gateway, JsonLines())

    @post("/telegraph", status_code=200, opt={VOICE: voice})
    async def telegraph(request: Request[Any, Any, Any]) -> ASGIApp:
        asked, generation = parse(await surface.body(request))
        return surface.answer(request, generation, voice(asked))

    return [telegraph]


# ------------------------------------------------------------------ is it served?


@pytest.fixture(scope="module")
def office(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    edge = Edge(tmp_path_factory.mktemp("office"), {"max_streams": 4})
    edge.factories = [openai_routes, telegraph_routes]
    edge.start()
    yield edge
    edge.stop()


@pytest.fixture
def script(office: Edge) -> Iterator[Edge]:
    """The edge, whose script a test may change."""
    before = office.text.script
    yield office
    office.text.script = before


def lines(text: str) -> list[Any]:
    return [msgspec.json.decode(line) for line in text.split("\n") if line]  # a JSON string may hold other line breaks


def test_golden_stream(office: Edge) -> None:
    reply = office.kept.post("/telegraph", json={"wire": "p", "drop_by_drop": True}, headers={"x-request-id": "r7"})
    assert reply.headers["content-type"] == "application/x-ndjson"
    assert reply.headers["x-request-id"] == "r7"
    assert reply.text == (
        '{"slip":0,"from":"brook"}\n{"slip":0,"dots":"Hello"}\n{"slip":0,"dots":" world"}\n'
        '{"slip":0,"why":"stop"}\n{"slip":0,"sealed":2}\n{"words":[3,2]}\n'
    )


def test_golden_whole(office: Edge) -> None:
    reply = office.kept.post("/telegraph", json={"wire": "p"}, headers={"x-request-id": "r8"})
    assert reply.text == '{"office":"brook","slip":"t/r80","telegrams":[{"text":"Hello world","why":"stop"}],"words":[3,2]}'


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(st.integers(0, 1), st.text(max_size=8)), max_size=8),
    prompts=st.integers(1, 2),
    reasons=st.tuples(*2 * [st.sampled_from(["stop", "length"])]),
    numbered=st.booleans(),
)
def test_what_is_streamed_is_the_whole(script: Edge, rows: list[Any], prompts: int, reasons: tuple[str, str], numbered: bool) -> None:
    def play(submit: Submit) -> list[Message]:
        key = submit.key
        ends = [{"key": key, "choice": choice, "tokens": [], "reason": reason} for choice, reason in enumerate(reasons)]
        return [*(delta({"key": key, "choice": choice, "text": text}) for choice, text in rows), delta(*ends), finished(key, output=5)]

    script.text.script = play
    body = {"wire": ["p"] * prompts, "copies": 2, "numbered": numbered}
    whole = script.kept.post("/telegraph", json=body).json()
    stream = lines(script.kept.post("/telegraph", json={**body, "drop_by_drop": True}).text)
    assert stream[-1]["words"] == whole["words"] == [3 * prompts, 5 * prompts]
    assert len(whole["telegrams"]) == 2 * prompts
    for index, telegram in enumerate(whole["telegrams"]):
        mine = [line for line in stream[:-1] if line["slip"] == index]
        texts = "".join(text for choice, text in rows if choice == index % 2)
        assert "".join(line.get("dots", "") for line in mine) == telegram["text"] == texts
        assert [line["why"] for line in mine if "why" in line] == [telegram["why"]] == [reasons[index % 2]]
    if numbered:
        assert [line["no"] for line in stream] == list(range(1, len(stream) + 1))


def test_text_learns_what_was_asked_and_under_which_names(script: Edge) -> None:
    script.text.received.clear()
    script.kept.post("/telegraph", json={"wire": "to whom", "copies": 2, "at_most": 9})
    (submit,) = script.text.wait_for(Submit)
    assert (submit.prompt, submit.kind, submit.sampling.n, submit.sampling.max_tokens) == ("to whom", "completion", 2, 9)
    assert (submit.prompt_name, submit.explicit) == ("wire", ["max_tokens"])
    assert submit.names == {"max_tokens": "at_most", "n": "copies", "prompt": "wire"}


# ------------------------------------------------------------------ errors in its own shape


def test_a_body_that_cannot_be_read(office: Edge) -> None:
    reply = office.kept.post("/telegraph", json={"wire": 3})
    assert (reply.status_code, reply.json()["field"]) == (400, "wire")
    assert reply.json()["returned"].startswith("The telegram cannot be read")


@pytest.mark.parametrize("stream", [False, True])
def test_no_prompt_at_all(office: Edge, stream: bool) -> None:
    reply = office.kept.post("/telegraph", json={"wire": [], "drop_by_drop": stream}, timeout=5)
    assert (reply.status_code, reply.json()) == (400, {"returned": "There is no prompt to answer.", "field": "wire"})
    assert office.server.gateway.active == 0


def test_a_body_of_another_kind(office: Edge) -> None:
    reply = office.kept.post("/telegraph", content=b"stop", headers={"content-type": "text/plain"})
    assert (reply.status_code, sorted(reply.json())) == (415, ["field", "returned"])


def test_without_a_key_or_with_another_method(make_edge: MakeEdge) -> None:
    """What is refused before a route is asked: in the shape of the API whose path it is."""
    edge = make_edge(routes=[openai_routes, telegraph_routes], api_key=["k"])
    with edge.http() as http:
        for path in ("/telegraph", "/telegraph/"):
            reply = http.post(path, json={"wire": "p"})
            assert (reply.status_code, sorted(reply.json())) == (401, ["field", "returned"])
            assert reply.headers["www-authenticate"] == "Bearer"
        assert sorted(http.get("/telegraph").json()) == ["field", "returned"]
        reply = http.get("/telegraph", headers={"authorization": "Bearer k"})
        assert (reply.status_code, reply.json()["returned"]) == (405, "GET is not allowed here. Use OPTIONS or POST.")
        assert reply.headers["allow"] == "OPTIONS, POST"
        assert "code" in http.post("/v1/completions", json={"prompt": "p"}).json()["error"]
        assert http.post("/nowhere").json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_of_text(script: Edge, stream: bool) -> None:
    def refuse(submit: Submit) -> list[Message]:
        return [
            Rejected(key=submit.key, status=429, type="rate_limit_error", code="queue_full", message="Busy.", param=None, retry_after_s=3.0)
        ]

    script.text.script = refuse
    reply = script.kept.post("/telegraph", json={"wire": "p", "drop_by_drop": stream})
    assert (reply.status_code, reply.json()) == (529, {"returned": "Busy.", "field": None})
    assert reply.headers["retry-after"] == "3"


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_of_the_edge(make_edge: MakeEdge, stream: bool) -> None:
    """Before anything is submitted: no place is left."""
    edge = make_edge(routes=[telegraph_routes], max_streams=1)
    gateway = edge.server.gateway
    edge.text.call(gateway.enter)
    with edge.http() as http:
        reply = http.post("/telegraph", json={"wire": "p", "drop_by_drop": stream})
    edge.text.call(gateway.leave)
    assert reply.status_code == 529
    assert "--max-streams" in reply.json()["returned"]


def test_a_stream_that_breaks(script: Edge) -> None:
    kept: list[Message] = []

    def play(submit: Submit) -> list[Message]:
        end = {"key": submit.key, "tokens": [], "reason": "error", "extra": {"error": "The cable is cut.", "error_code": "engine_failure"}}
        kept.extend([delta(end), finished(submit.key)])
        return [delta({"key": submit.key, "text": "Hel"})]

    script.text.script = play
    with script.kept.stream("POST", "/telegraph", json={"wire": "p", "drop_by_drop": True}) as reply:
        assert reply.status_code == 200
        rest = reply.iter_lines()
        first = next(rest)
        script.text.send(*kept)
        said = lines("\n".join([first, *rest]))
    assert said == [{"slip": 0, "from": "brook"}, {"slip": 0, "dots": "Hel"}, {"returned": "The cable is cut."}]


def test_a_choice_that_fails_alone(script: Edge) -> None:
    def play(submit: Submit) -> list[Message]:
        key = submit.key
        bad = {
            "key": key,
            "choice": 1,
            "tokens": [],
            "reason": "error",
            "extra": {"error": "No word is left.", "error_code": "invalid_value"},
        }
        return [
            delta({"key": key, "text": "a"}, {"key": key, "choice": 1, "text": "b"}),
            delta({"key": key, "reason": "stop"}, bad),
            finished(key),
        ]

    script.text.script = play
    whole = script.kept.post("/telegraph", json={"wire": "p", "copies": 2}).json()
    stream = lines(script.kept.post("/telegraph", json={"wire": "p", "copies": 2, "drop_by_drop": True}).text)
    assert whole["telegrams"] == [{"text": "a", "why": "stop"}, {"text": "b", "why": "error", "lost": "No word is left."}]
    assert {"slip": 1, "why": "error", "lost": "No word is left."} in stream


def test_an_idle_stream_says_what_its_frame_says(make_edge: MakeEdge) -> None:
    edge = make_edge(routes=[telegraph_routes], text=lambda t: setattr(t, "script", silent), keep_alive_s=0.05)
    with edge.http() as http, http.stream("POST", "/telegraph", json={"wire": "p", "drop_by_drop": True}) as reply:
        raw = reply.iter_raw()
        assert next(raw) == b"\n"
        key = edge.text.wait_for(Submit)[0].key
        edge.text.send(delta({"key": key, "text": "x", "reason": "stop"}), finished(key))
        said = lines(b"".join(raw).decode())
    assert said[1] == {"slip": 0, "dots": "x"}


# ------------------------------------------------------------------ a voice with a mistake


class Stammering(Telegraph):
    """It fails at the end of a stream, and at telling so."""

    def ended(self, usage: Usage, timings: dict[str, Any] | None) -> Iterable[bytes]:
        raise ZeroDivisionError

    def broken(self, error: PenstockError) -> Iterable[bytes]:
        raise ZeroDivisionError


def test_a_voices_mistake_is_its_requests_alone(make_edge: MakeEdge) -> None:
    """The link, on which all others hang, survives."""
    kept: list[Message] = []

    def play(submit: Submit) -> list[Message]:
        kept.append(finished(submit.key))
        return [delta({"key": submit.key, "text": "x", "reason": "stop"})]

    edge = make_edge(
        routes=[lambda gateway: telegraph_routes(gateway, Stammering), openai_routes], text=lambda t: setattr(t, "script", play)
    )
    with edge.http() as http:
        with http.stream("POST", "/telegraph", json={"wire": "p", "drop_by_drop": True}) as reply:
            rest = reply.iter_lines()
            first = next(rest)
            edge.text.send(*kept)
            assert lines("\n".join([first, *rest]))[1] == {"slip": 0, "dots": "x"}
        edge.text.script = lambda submit: [delta({"key": submit.key, "text": "y", "reason": "stop"}), finished(submit.key)]
        assert http.post("/v1/completions", json={"prompt": "p"}).json()["choices"][0]["text"] == "y"
        assert edge.server.gateway.active == 0


BLAME = "The transport 'wires' (plugin 'strange' of package 'strange') is broken: "


@pytest.fixture
def strangers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """strangers(voice) gives what an edge makes of a plugin that registers the telegraph with that voice, and of OpenAI's routes."""

    def make(voice: type[Telegraph] = Telegraph, factory: Any = None) -> list[Any]:
        module = types.ModuleType("strange")
        telegraph = functools.partial(telegraph_routes, voice=voice)
        spec = TransportSpec(name="wires", api_level=2, factory=lambda gateway: Transport((factory or telegraph)(gateway)))
        module.register_transports = hookimpl(lambda: [spec])  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "strange", module)
        config = build({"transports": ["wires", "openai"]})
        return transport_factories(PluginHost("edge", extra=["strange"]).load(), config)

    return make


def broken_voice(**methods: Any) -> type[Telegraph]:
    return type("Broken", (Telegraph,), methods)


def fail(*_: Any) -> Any:
    raise ZeroDivisionError("no wire")


def served(make_edge: MakeEdge, routes: list[Any], stream: bool, **body: Any) -> httpx.Response:
    """What a client gets, in a server that still serves others."""
    edge = make_edge(routes=routes)
    with edge.http() as http:
        reply = http.post("/telegraph", json={"wire": "p", "drop_by_drop": stream, **body})
        assert http.post("/v1/completions", json={"prompt": "p"}).status_code == 200
        assert edge.server.gateway.active == 0
    return reply


@pytest.mark.parametrize(
    ("methods", "stream", "said"),
    [
        ({"whole": lambda *_: "abc"}, False, "whole() returned 'abc', which must be bytes"),
        ({"whole": lambda *_: None}, False, "whole() returned None, which must be bytes"),
        ({"begin": lambda *_: None}, False, "begin() returned None, which must be str"),
        ({"begin": lambda *_: 42}, True, "begin() returned 42, which must be str"),
        ({"whole": fail}, False, "telegraph() failed with ZeroDivisionError: no wire"),
    ],
)
def test_what_a_voice_gives_wrongly_is_its_plugins_fault(
    methods: Any, stream: bool, said: str, make_edge: MakeEdge, strangers: Any, caplog: pytest.LogCaptureFixture
) -> None:
    reply = served(make_edge, strangers(broken_voice(**methods)), stream)
    assert (reply.status_code, sorted(reply.json())) == (500, ["field", "returned"])
    assert reply.json()["returned"] == "The server made an error. It is logged with the request id."
    assert any(BLAME + said in message for message in caplog.messages)


class Ear:
    """A Listener of somebody's, without an option of its own."""

    name = "ear"

    def __init__(self, words: list[Any]) -> None:
        self.words = words

    async def start(self, sock: Any, app: Any) -> None:
        self.words.append(("start", sock, callable(app)))

    async def stop(self, limit_s: float) -> None:
        self.words.append("stop")


def test_a_listener_is_started_and_stopped_with_its_edge(make_edge: MakeEdge) -> None:
    words: list[Any] = []
    edge = make_edge(routes=[lambda gateway: Transport(listeners=[Ear(words)])])
    assert words == [("start", None, True)]
    edge.text.call(edge.server.stop)
    assert words[1] == "stop"


@pytest.mark.parametrize(
    ("transport", "said"),
    [
        (Transport(listeners=[3]), "returned the listener 3, which has no name and no start and no stop"),  # type: ignore[list-item]
        (Transport(routes=7), "returned a transport whose routes are 7, which must be a list"),  # type: ignore[arg-type]
    ],
)
def test_what_is_wrong_with_a_transport_is_its_plugins_fault(transport: Transport, said: str) -> None:
    with pytest.raises(PluginFault, match=f"factory.. {said}"):
        Owned(lambda gateway: transport, lambda call, error: PluginFault(f"{call}() {error}"))(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["piece", "closed", "opened", "ended", "broken"])
def test_what_a_voice_fails_at_in_a_stream_is_logged_with_plugin_and_request(
    method: str, make_edge: MakeEdge, strangers: Any, caplog: pytest.LogCaptureFixture
) -> None:
    methods = {method: fail} | ({"ended": fail} if method == "broken" else {})
    edge = make_edge(routes=strangers(broken_voice(**methods)))
    with edge.http() as http:
        body = {"wire": "p", "drop_by_drop": True, "numbered": True}
        http.post("/telegraph", json=body, headers={"x-request-id": "slip-7"})
    assert any("request slip-7" in message and BLAME in message and "no wire" in message for message in caplog.messages)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("refuse", [fail, lambda *_: None])
def test_an_error_that_a_voice_cannot_say_is_said_plainly(
    refuse: Any, stream: bool, make_edge: MakeEdge, strangers: Any, caplog: pytest.LogCaptureFixture
) -> None:
    routes = strangers(broken_voice(refuse=staticmethod(refuse)))
    reply = served(make_edge, routes, stream, wire=[])
    assert (reply.status_code, reply.json()["error"]["message"]) == (400, "There is no prompt to answer.")
    assert any(BLAME + "refuse() " in message for message in caplog.messages)


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_of_text_that_a_voice_cannot_say_is_said_plainly(
    stream: bool, make_edge: MakeEdge, strangers: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def play(submit: Submit) -> list[Message]:
        return [Rejected(key=submit.key, status=429, type="rate_limit_error", code="queue_full", message="Busy.")]

    edge = make_edge(routes=strangers(broken_voice(refuse=staticmethod(fail))), text=lambda t: setattr(t, "script", play))
    with edge.http() as http:
        reply = http.post("/telegraph", json={"wire": "p", "drop_by_drop": stream})
    assert (reply.status_code, reply.json()["error"]["message"]) == (429, "Busy.")
    assert any(BLAME + "refuse() failed with ZeroDivisionError: no wire" in message for message in caplog.messages)


def test_a_list_of_something_else_than_routes_is_its_plugins_fault(strangers: Any) -> None:
    factory, openai = strangers(factory=lambda gateway: [42])
    with pytest.raises(PluginFault, match=re.escape(BLAME + "factory() returned a list with 42 in it, which is no Litestar route handler")):
        factory(None)
    assert not isinstance(openai, Owned), "built-in ones speak for themselves"


# ------------------------------------------------------------------ what it costs


class Counted(Telegraph):
    """A plain voice that counts what is asked of it."""

    asked: ClassVar[list[str]] = []

    def around(self, index: int) -> tuple[bytes, bytes]:
        self.asked.append("around")
        return super().around(index)

    def opened(self, index: int, prompt: Prompt, row: int, batch: Batch) -> Iterator[bytes]:
        self.asked.append("opened")
        return super().opened(index, prompt, row, batch)

    def piece(self, index: int, text: str, row: int, batch: Batch) -> Iterator[bytes]:
        self.asked.append("piece")
        return super().piece(index, text, row, batch)


def test_a_plain_row_asks_neither_voice_nor_frame(make_edge: MakeEdge, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is one JSON string and one append to the outbox."""
    pushed: list[bytes] = []
    wrapped: list[bytes] = []
    push, wrap = Outbox.push, JsonLines.wrap
    monkeypatch.setattr(Outbox, "push", lambda self, data: (pushed.append(data), push(self, data))[1])
    monkeypatch.setattr(JsonLines, "wrap", lambda self, payload: (wrapped.append(payload), wrap(self, payload))[1])
    monkeypatch.setattr(Counted, "asked", [])

    def play(submit: Submit) -> list[Message]:
        rows = [delta({"key": submit.key, "text": str(i)}) for i in range(50)]
        return [*rows, delta({"key": submit.key, "tokens": [], "reason": "stop"}), finished(submit.key)]

    edge = make_edge(routes=[lambda gateway: telegraph_routes(gateway, Counted)], text=lambda t: setattr(t, "script", play))
    with edge.http() as http:
        assert http.post("/telegraph", json={"wire": "p", "drop_by_drop": True}).text.encode() == b"".join(pushed)
    assert Counted.asked == ["around", "opened"]
    assert len(pushed) == 50 + 4
    assert len(wrapped) == 4


# ------------------------------------------------------------------ its neighbours


def test_the_frame_of_events_joins_before_as_it_wraps_after() -> None:
    for frame in (Sse(), JsonLines()):
        head, tail = frame.around(b'{"a":', b"}")
        assert head + b'"text"' + tail == frame.wrap(b'{"a":"text"}')


def test_other_routes_keep_their_shape(office: Edge) -> None:
    assert office.kept.post("/v1/completions", json={"prompt": 3}).json()["error"]["param"] == "prompt"
    assert office.kept.get("/nowhere").json()["error"]["code"] == "not_found"
    assert events(office.kept.post("/v1/completions", json={"prompt": "p", "stream": True}).text)[-1] == "[DONE]"


# ------------------------------------------------------------------ large bodies


LARGE, LITTLE = bytes(SMALL + 1), bytes(SMALL)


def test_large_bodies_are_parsed_one_at_a_time_beside_the_loop() -> None:
    """A small one goes past them, and what their parser raises comes to their own request."""
    loops_thread = threading.get_ident()
    running = most = 0
    going, on = threading.Event(), threading.Event()

    def parse(body: bytes, number: int, *, wrong: int) -> int:
        nonlocal running, most
        if body is LITTLE:
            return number
        assert threading.get_ident() != loops_thread
        running += 1
        most = max(most, running)
        going.set()
        assert on.wait(10)
        running -= 1
        if number == wrong:
            raise InvalidRequest("No.")
        return number

    async def main() -> list[Any]:
        surface = Surface(Gateway(build({}), 0), Sse())
        large = [asyncio.create_task(surface.understood(LARGE, parse, number, wrong=5)) for number in range(8)]
        while not going.is_set():
            await asyncio.sleep(0)
        assert await surface.understood(LITTLE, parse, 99, wrong=5) == 99
        assert not any(task.done() for task in large)
        on.set()
        return await asyncio.gather(*large, return_exceptions=True)

    found = asyncio.run(main())
    assert most == 1
    assert isinstance(found[5], InvalidRequest)
    assert [*found[:5], *found[6:]] == [0, 1, 2, 3, 4, 6, 7]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * SMALL}]}),
        ("/v1/completions", {"prompt": "x" * SMALL}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "x" * SMALL}], "max_tokens": 5}),
        ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "x" * SMALL}]}),
        ("/v1/responses", {"input": "x" * SMALL}),
        ("/v1/responses/input_tokens", {"input": "x" * SMALL}),
        ("/tokenize", {"prompt": "x" * SMALL}),
        ("/detokenize", {"tokens": [1] * SMALL}),
        ("/generate", {"inputs": "x" * SMALL}),
    ],
)
def test_each_route_parses_large_bodies_in_turn(make_edge: MakeEdge, path: str, body: dict[str, Any]) -> None:
    edge = make_edge()
    lock, taken = edge.server.gateway.parsing, 0

    class Counted(asyncio.Lock):
        async def acquire(self) -> Literal[True]:
            nonlocal taken
            taken += 1
            return await super().acquire()

    assert not lock.locked()
    edge.server.gateway.parsing = Counted()
    with edge.http() as http:
        http.post(path, json={"model": "brook", **body})
        assert taken == 1
        http.post(path, json={"model": "brook"})
        assert taken == 1


DEEP: list[tuple[str, str]] = [
    (
        "/v1/chat/completions",
        '"messages":[{"role":"user","content":"a"}],"response_format":{"type":"json_schema","json_schema":{"schema":%s}}',
    ),
    ("/v1/chat/completions", '"messages":[{"role":"user","content":"a"}],"tools":[{"function":{"name":"f","parameters":%s}}],"store":true'),
    ("/v1/completions", '"prompt":"a","guided_json":%s'),
    ("/v1/messages", '"max_tokens":5,"messages":[{"role":"user","content":"a"}],"output_format":{"type":"json_schema","schema":%s}'),
    ("/v1/messages", '"max_tokens":5,"messages":[{"role":"user","content":"a"}],"tools":[{"name":"f","input_schema":%s}]'),
    ("/v1/responses", '"input":"a","tools":[{"type":"function","name":"f","parameters":%s}]'),
    ("/tokenize", '"messages":[{"role":"user","content":"a"}],"tools":[{"function":{"name":"f","parameters":%s}}]'),
    ("/generate", '"inputs":"a","other":%s'),
]


@pytest.mark.parametrize(("path", "more"), DEEP)
def test_a_deep_body_is_the_clients_mistake_however_deep(shared_edge: Edge, path: str, more: str) -> None:
    """What parses a body leaves room for those that parse and write parts of it later, on more of the stack."""
    statuses = []
    for depth in range(700, 1010, 5):
        body = ("{" if path == "/generate" else '{"model":"brook",') + more % ('{"a":' * depth + "1" + "}" * depth) + "}"
        reply = shared_edge.kept.post(path, content=body.encode(), headers={"content-type": "application/json"})
        assert reply.status_code < 500, (depth, reply.text[:300])
        statuses.append(reply.status_code)
    assert statuses[0] == 200 < statuses[-1]
    assert statuses == sorted(statuses)


class _NoStatic(Telegraph):
    def refuse(self, error: PenstockError, headers: Iterable[tuple[bytes, bytes]] = ()) -> JsonReply:  # type: ignore[override]
        raise NotImplementedError


class _Half:
    @staticmethod
    def refuse(error: PenstockError, headers: Iterable[tuple[bytes, bytes]] = ()) -> JsonReply:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("voice", "said"),
    [
        (_NoStatic, r"refuse\(\) must be a @staticmethod"),
        (_Half, r"it has no begin\(\) and no whole\(\)"),
        (3, "is 3, which is no Voice"),
        (Telegraph, ""),
        (JsonLines, r"no refuse\(\)"),
    ],
)
def test_a_routes_voice_is_looked_at_when_the_edge_starts(voice: Any, said: str) -> None:
    @post("/telegraph", opt={VOICE: voice})
    async def telegraph() -> None: ...

    def blame(call: str, error: Exception | str) -> PluginFault:
        return PluginFault(f"The transport 'odd' is broken: {call}() {error}")

    owned = Owned(lambda gateway: Transport([telegraph]), blame)
    if not said:
        assert owned(None).routes == [telegraph]  # type: ignore[arg-type]
        return
    with pytest.raises(PluginFault, match=f"The transport 'odd' .*{said}"):
        owned(None)  # type: ignore[arg-type]
