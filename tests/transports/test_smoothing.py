"""Streams that come evenly: what waits, how long, and that nothing but time changes. The clock is the test's own."""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable
from typing import Any

import pytest
from edge_kit import Edge, MakeEdge, delta, finished
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.protocol.config import build
from penstock.core.protocol.errors import ConfigError, EngineUnavailable
from penstock.core.protocol.messages import Message, Submit
from penstock.transports.door import Batch
from penstock.transports.smoothing import Smoothing

CHATS, TEXTS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"


class Loop:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.time = 100.0
        self._timers: list[tuple[float, int, Any]] = []
        self._count = 0

    def now(self) -> float:
        return self.time

    def later(self, seconds: float, call: Callable[[], None]) -> Any:
        assert seconds >= 0

        class Handle:
            live = True

            def cancel(self) -> None:
                self.live = False

            def run(self) -> None:
                if self.live:
                    call()

        handle = Handle()
        self._count += 1
        heapq.heappush(self._timers, (self.time + seconds, self._count, handle))
        return handle

    def advance(self, seconds: float) -> None:
        end = self.time + seconds
        while self._timers and self._timers[0][0] <= end + 1e-12:
            at, _, handle = heapq.heappop(self._timers)
            self.time = max(self.time, at)
            handle.run()
        self.time = max(self.time, end)


class Teller:
    """A sink that notes when it is told what."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.rows: list[tuple[float, int, str, str]] = []
        self.ended: list[Any] = []
        self.fails_at = ""

    def row(self, choice: int, text: str, reason: str, row: int, batch: Batch) -> None:
        if self.fails_at and text == self.fails_at:
            raise RuntimeError("no")
        self.rows.append((round(self.loop.time - 100, 6), choice, text, reason))

    def finished(self, message: Any) -> None:
        self.ended.append((round(self.loop.time - 100, 6), message))

    def failed(self, error: Any) -> None:
        self.ended.append((round(self.loop.time - 100, 6), error))

    @property
    def texts(self) -> str:
        return "".join(text for _, _, text, _ in self.rows)


class Played:
    def __init__(self, most_ms: float) -> None:
        self.loop = Loop()
        self.wrong: list[BaseException] = []
        self.teller = Teller(self.loop)
        self.smoothing = Smoothing(most_ms / 1e3, self.wrong.append, now=self.loop.now, later=self.loop.later)
        self.sink = self.smoothing.sink(self.teller)

    def step(self, *rows: tuple[int, str, str]) -> None:
        """What one step brings: choice, text, reason."""
        message = delta(*({"key": 1, "choice": choice, "text": text, "reason": reason} for choice, text, reason in rows))
        batch = Batch(message)
        for number, (choice, text, reason) in enumerate(rows):
            self.sink.row(choice, text, reason, number, batch)

    def burst(self, texts: str, reason: str = "") -> None:
        self.step(*((0, text, reason if at == len(texts) else "") for at, text in enumerate(texts, 1)))

    @property
    def times(self) -> list[tuple[str, float]]:
        return [(text, at) for at, _, text, _ in self.teller.rows]


def test_a_burst_is_spread_over_the_time_until_the_next_step() -> None:
    played = Played(100)
    played.burst("a")
    assert played.times == [("a", 0.0)], "the first comes at once"
    played.loop.advance(0.04)
    played.burst("bcde")
    played.loop.advance(0.04)
    played.burst("fg")
    played.loop.advance(0.04)
    played.burst("h")
    played.loop.advance(0.04)
    assert played.times == [
        ("a", 0.0), ("b", 0.04), ("c", 0.05), ("d", 0.06), ("e", 0.07), ("f", 0.08), ("g", 0.1), ("h", 0.12),
    ]  # fmt: skip


def test_the_bound_holds_where_steps_are_far_apart() -> None:
    played = Played(20)
    played.burst("a")
    played.loop.advance(1.0)
    played.burst("bcde")
    played.loop.advance(1.0)
    assert played.times[1:] == [("b", 1.0), ("c", 1.005), ("d", 1.01), ("e", 1.015)]


def test_what_comes_together_at_the_very_beginning_leaves_together() -> None:
    """How far apart steps are is not known yet."""
    played = Played(1000)
    played.burst("abc")
    played.loop.advance(0.0)
    assert played.times == [("a", 0.0), ("b", 0.0), ("c", 0.0)]


def test_an_end_waits_for_nothing() -> None:
    played = Played(1000)
    played.burst("a")
    played.loop.advance(0.5)
    played.burst("bcde")
    played.loop.advance(0.15)
    assert played.teller.texts == "abc"
    played.burst("fg", "stop")
    assert played.teller.texts == "abcdefg"
    assert played.teller.rows[-1] == (0.65, 0, "g", "stop")
    played.sink.finished("over")  # type: ignore[arg-type]
    assert played.teller.ended == [(0.65, "over")]
    played.loop.advance(5.0)
    assert played.teller.texts == "abcdefg"


def test_a_failure_tells_what_waits_first() -> None:
    played = Played(1000)
    played.burst("a")
    played.loop.advance(0.5)
    played.burst("bcde")
    error = EngineUnavailable("Gone.")
    played.sink.failed(error)
    assert (played.teller.texts, played.teller.ended) == ("abcde", [(0.5, error)])


def test_without_bursts_nothing_waits() -> None:
    """One token a step, and several answers side by side."""
    played = Played(1000)
    for number in range(9):
        played.step(*((choice, f"{choice}{number} ", "") for choice in range(3)))
        played.loop.advance(0.0)
        assert len(played.teller.rows) == 3 * (number + 1)
        played.loop.advance(0.02)


def test_who_has_left_is_told_nothing_more() -> None:
    played = Played(1000)
    played.burst("a")
    played.loop.advance(0.5)
    played.burst("bcde")
    played.smoothing.clear()
    played.loop.advance(5.0)
    assert played.teller.texts == "ab"


@pytest.mark.parametrize("at", ["c", "e"])
def test_a_sink_that_raises_ends_its_request_alone(at: str) -> None:
    played = Played(1000)
    played.teller.fails_at = at
    played.burst("a")
    played.loop.advance(0.5)
    played.burst("bcd")
    if at == "c":
        played.loop.advance(1.0)
        assert [str(one) for one in played.wrong] == ["no"]
    else:
        with pytest.raises(RuntimeError, match="no"):
            played.burst("e", "stop")
        assert not played.wrong
    said = played.teller.texts
    played.loop.advance(5.0)
    assert played.teller.texts == said, "nothing is passed any more"


STEPS = st.lists(
    st.tuples(st.floats(0.0, 0.3), st.lists(st.integers(0, 2), max_size=6).map(sorted)),
    max_size=20,
)


@settings(max_examples=300, deadline=None)
@given(steps=STEPS, most=st.integers(1, 300), sloth=st.floats(0.0, 0.05))
def test_rows_keep_their_order_and_none_waits_longer_than_the_bound(steps: list[tuple[float, list[int]]], most: int, sloth: float) -> None:
    """`sloth`: the loop is late by so much at most."""
    played = Played(most)
    later = played.smoothing._later
    played.smoothing._later = lambda seconds, call: later(seconds + (sloth if seconds else 0.0), call)
    came: list[tuple[float, int, str]] = []
    firsts: set[int] = set()
    for number, (pause, choices) in enumerate(steps):
        played.loop.advance(pause)
        rows = [(choice, f"{number}.{at} ", "") for at, choice in enumerate(choices)]
        came += [(played.loop.time - 100, choice, text) for choice, text, _ in rows]
        played.step(*rows)
        new = {choice for choice in choices if choice not in firsts}
        firsts |= new
        told = [choice for _, choice, _, _ in played.teller.rows]
        assert new <= set(told), "the first of an answer is there at once"
    last = played.loop.time - 100
    for choice in range(3):
        played.step((choice, "!", "stop"))
    assert [text for _, _, text, _ in played.teller.rows] == [text for _, _, text in came] + ["!"] * 3
    assert [choice for _, choice, _, _ in played.teller.rows][: len(came)] == [choice for _, choice, _ in came]
    for (at, *_), (arrived, *_) in zip(played.teller.rows, came, strict=False):
        assert arrived - 1e-6 <= at <= arrived + most / 1e3 + 2 * sloth + 1e-6
    assert all(at <= last + 1e-6 for at, *_ in played.teller.rows), "the ends waited for nothing"


# ------------------------------------------------------------------ the whole edge


def bursts(submit: Submit) -> list[Message]:
    """Two answers or one, four tokens a step."""
    n = submit.sampling.n
    steps = ["A", "BCDE", "FGHI", "JK"]
    count, out = 0, []
    for step in steps:
        rows = []
        for choice in range(n):
            for at, text in enumerate(step, 1):
                total = count + at
                end = "stop" if total == 11 else ""
                rows.append({"key": submit.key, "choice": choice, "text": text, "tokens": [total], "output": total, "reason": end})
        count += len(step)
        out.append(delta(*rows))
    return [*out, finished(submit.key, output=11 * n)]


ASKED: list[tuple[str, dict[str, Any]]] = [
    (CHATS, {"messages": [{"role": "user", "content": "hi"}], "stream": True}),
    (CHATS, {"messages": [{"role": "user", "content": "hi"}], "stream": True, "n": 2, "stream_interval": 2}),
    (TEXTS, {"prompt": "hi", "stream": True}),
    (RESPONSES, {"input": "hi", "stream": True, "store": False}),
    ("/inference/v1/generate", {"token_ids": [1], "stream": True}),
    (
        "/v1/messages",
        {"model": "brook", "max_tokens": 20, "messages": [{"role": "user", "content": "hi"}], "stream": True},
    ),
]


@pytest.fixture
def edge(shared_edge: Edge) -> Any:
    before = shared_edge.text.script
    shared_edge.text.script = bursts
    yield shared_edge
    shared_edge.text.script = before


def texts_of(text: str) -> dict[str, str]:
    """By choice, whatever the API calls it."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        if not line.startswith("data: {"):
            continue
        event = json.loads(line[6:])
        if event.get("type") == "response.output_text.delta":
            found["0"] = found.get("0", "") + event["delta"]
        elif event.get("type") == "content_block_delta":
            found["0"] = found.get("0", "") + event["delta"]["text"]
        for choice in event.get("choices", ()):
            said = choice.get("text") or (choice.get("delta") or {}).get("content") or str(choice.get("token_ids") or "")
            found[str(choice["index"])] = found.get(str(choice["index"]), "") + said
    return found


@pytest.mark.parametrize(("path", "body"), ASKED)
def test_every_stream_takes_the_field_and_says_the_same(edge: Edge, path: str, body: dict[str, Any]) -> None:
    plain = texts_of(edge.kept.post(path, json=body).text)
    smooth = texts_of(edge.kept.post(path, json={**body, "stream_smoothing_ms": 20}).text)
    assert smooth == plain
    assert "".join(plain.values()), "it says something"
    error = edge.kept.post(path, json={**body, "stream_smoothing_ms": 1001}).json()["error"]
    assert "stream_smoothing_ms must be between 0 and 1000 milliseconds, but is 1001" in error["message"]


def test_tgi_has_it_among_its_parameters(edge: Edge) -> None:
    body: dict[str, Any] = {"inputs": "hi", "parameters": {"stream_smoothing_ms": 20}}
    said = [json.loads(line[5:]) for line in edge.kept.post("/generate_stream", json=body).text.splitlines() if line.startswith("data:")]
    assert "".join(one["token"]["text"] for one in said) == "ABCDEFGHIJK"
    body["parameters"]["stream_smoothing_ms"] = -1
    reply = edge.kept.post("/generate_stream", json=body)
    assert (reply.status_code, "parameters.stream_smoothing_ms must be" in reply.text) == (422, True)


def test_a_stream_that_is_kept_has_the_same_events(edge: Edge) -> None:
    body = ASKED[1][1] | {"retain_s": 30, "seed": 1}

    def numbered(more: dict[str, Any], rid: str) -> list[tuple[str, Any]]:
        text = edge.kept.post(CHATS, json=body | more, headers={"x-request-id": rid}).text
        lines = [line for line in text.splitlines() if line]
        ids = [line for line in lines if line.startswith("id:")]
        said = [json.loads(line[6:])["choices"] for line in lines if line.startswith("data: {")]
        return list(zip(ids, said, strict=False))

    assert numbered({"stream_smoothing_ms": 15}, "even-1") == numbered({}, "even-2")


def test_the_servers_own_number_holds_for_whoever_says_none(make_edge: MakeEdge, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[float] = []
    real = Smoothing.__init__

    def noted(self: Smoothing, most_s: float, *rest: Any, **more: Any) -> None:
        made.append(most_s)
        real(self, most_s, *rest, **more)

    monkeypatch.setattr(Smoothing, "__init__", noted)
    edge = make_edge(stream_smoothing_ms=25)
    edge.text.script = bursts
    path, body = ASKED[0]
    for more, expected in (({}, [0.025]), ({"stream_smoothing_ms": 10}, [0.01]), ({"stream_smoothing_ms": 0}, []), ({"stream": False}, [])):
        made.clear()
        assert edge.kept.post(path, json=body | more).status_code == 200
        assert made == expected, "off, there is nothing in between"
    for wrong in (-1, 1001, float("nan")):
        with pytest.raises(ConfigError, match="--stream-smoothing-ms must be from 0 to 1000"):
            build({"stream_smoothing_ms": wrong})
