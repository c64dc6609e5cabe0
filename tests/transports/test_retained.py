"""Retained streams at the edge: events are numbered, and any edge sends those that a client lacks, as the first one would have."""

from __future__ import annotations

import json
import re
import threading
import time
from typing import Any

import httpx
import msgspec
import pytest
from edge_kit import Edge, MakeEdge, delta, finished, hello_script, silent

from penstock.core.protocol.messages import Attach, Attached, Cancel, Detach, Message, Query, Rejected, Submit
from penstock.transports.job import Job

CHATS = "/v1/chat/completions"
HI: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
SURFACES = [
    (CHATS, HI),
    (CHATS, HI | {"n": 2, "stream_options": {"include_usage": True}}),
    (CHATS, HI | {"n": 2, "stream_interval": 2}),
    ("/v1/completions", {"prompt": ["a", "b"], "stream": True}),
    ("/v1/messages", {"model": "brook", "max_tokens": 9, "messages": HI["messages"], "stream": True}),
    ("/v1/responses", {"input": "hi", "stream": True}),
    ("/generate_stream", {"inputs": "hi"}),
]


class Stream:
    """What a text process would keep of the streams that it was sent."""

    def __init__(self, edge: Edge) -> None:
        self.edge = edge
        edge.text.answers["stream"] = self.found
        edge.text.answers["control"] = lambda body: (200, b'{"prompts":1}') if json.loads(body)["rid"] == "r1" else (404, b"{}")

    @property
    def submits(self) -> list[Submit]:
        return [message for message in self.edge.text.received if isinstance(message, Submit)]

    def found(self, body: bytes) -> tuple[int, bytes]:
        asked = json.loads(body)
        mine = [submit for submit in self.submits if submit.rid == asked["rid"] and submit.retain_s]
        if not mine:
            return 404, b'{"message":"No.","code":"stream_not_found"}'
        keys = [submit.key for submit in mine]
        context = mine[0].context
        return 200, msgspec.json.encode({"rid": asked["rid"], "tenant": "", "model": "", "keys": keys, "context": context, "ended": True})

    def again(self, script: Any = hello_script) -> list[Message]:
        """All frames of the last stream."""
        rid = self.submits[-1].rid
        return [frame for submit in self.submits if submit.rid == rid for frame in script(submit)]


@pytest.fixture
def edge(make_edge: MakeEdge) -> Edge:
    return make_edge()


@pytest.fixture
def stream(edge: Edge) -> Stream:
    """Whoever attaches gets the rows of hello_script again."""
    stream = Stream(edge)
    own = edge.text._on_message

    def on_message(link: Any, message: Message) -> None:
        own(link, message)
        if isinstance(message, Attach):
            for frame in stream.again():
                link.send(frame)

    edge.text._on_message = on_message  # type: ignore[method-assign]
    return stream


def blocks(text: str) -> list[str]:
    """Events, without the one second that is the clock's."""
    return [re.sub(r'"completed_at":\d+', "", block) for block in text.split("\n\n") if block and not block.startswith(":")]


@pytest.mark.parametrize(("path", "body"), SURFACES)
def test_every_surface_resumes_at_every_event(edge: Edge, stream: Stream, path: str, body: dict[str, Any]) -> None:
    whole = edge.kept.post(path, json=body, headers={"x-penstock-retain": "30"})
    rid, events = whole.headers["x-request-id"], blocks(whole.text)
    assert [block.split("\n")[0] for block in events] == [f"id: {number}" for number in range(1, len(events) + 1)]
    for after in range(len(events) + 1):
        rest = edge.kept.get(f"/v1/streams/{rid}", headers={"last-event-id": str(after)})
        assert rest.status_code == (204 if after == len(events) else 200)
        assert blocks(rest.text) == events[after:]
        assert rest.headers["x-request-id"] == rid
    by_query, by_header = edge.kept.get(f"/v1/streams/{rid}?after=1"), edge.kept.get(f"/v1/streams/{rid}", headers={"last-event-id": "1"})
    assert blocks(by_query.text) == blocks(by_header.text)
    assert edge.server.gateway.active == 0


@pytest.mark.parametrize(("path", "body"), [*SURFACES, ("/v1/completions", {"prompt": ["a" * 9000, "b"], "stream": True, "echo": True})])
def test_a_stream_in_lines_resumes_behind_the_lines_that_came(edge: Edge, stream: Stream, path: str, body: dict[str, Any]) -> None:
    whole = edge.kept.post(path, json=body, headers={"x-penstock-retain": "30", "accept": "application/x-ndjson"})
    rid, lines = whole.headers["x-request-id"], whole.text.split("\n")
    assert lines.pop() == ""
    for after in range(len(lines) + 1):
        rest = edge.kept.get(f"/v1/streams/{rid}?after={after}", headers={"accept": "text/event-stream"})
        assert rest.status_code == (204 if after == len(lines) else 200)
        assert re.sub(r'"completed_at":\d+', "", rest.text) == re.sub(
            r'"completed_at":\d+', "", "".join(line + "\n" for line in lines[after:])
        )
        assert after == len(lines) or rest.headers["content-type"] == "application/x-ndjson", "as it began"


def test_what_resumes_tells_the_timings_of_the_stream_and_not_its_own(edge: Edge, stream: Stream) -> None:
    def told(text: str) -> tuple[list[str], dict[str, float]]:
        events = blocks(text)
        return events, json.loads(events[-2].split("data: ")[1])["metrics"]

    headers = {"x-penstock-retain": "9", "x-include-metrics": "1", "x-request-id": "r1"}
    began = time.monotonic()
    first, here = told(edge.kept.post(CHATS, json=HI, headers=headers).text)
    again, there = told(edge.kept.get("/v1/streams/r1").text)
    passed = 1e3 * (time.monotonic() - began)
    assert [event.split("\n")[0] for event in again] == [event.split("\n")[0] for event in first]
    assert first[:-2] == again[:-2]
    assert there.keys() == here.keys()
    assert there["time_to_first_token_ms"] == here["time_to_first_token_ms"]
    assert here["total_ms"] <= there["total_ms"] <= passed  # this text has no word of when it was done
    assert told(edge.kept.get("/v1/streams/r1", headers={"last-event-id": str(len(first) - 2)}).text)[0][0].startswith(
        again[-2].split("\n")[0]
    )


def test_events_are_those_of_a_stream_that_is_not_retained(edge: Edge, stream: Stream) -> None:
    plain, kept = (edge.kept.post(CHATS, json=HI | more) for more in ({}, {"retain_s": 5}))
    ids = [reply.headers["x-request-id"] for reply in (plain, kept)]
    said = ["\n".join(line for line in block.split("\n") if not line.startswith("id: ")) for block in blocks(kept.text)]
    assert [block.replace(ids[1], "ID") for block in said] == [block.replace(ids[0], "ID") for block in blocks(plain.text)]
    assert "id: " not in plain.text


@pytest.mark.parametrize(
    ("headers", "more", "expected"),
    [
        ({}, {}, (0.0, "cancel")),
        ({}, {"retain_s": 5}, (5.0, "continue")),
        ({}, {"retain_s": 5, "on_disconnect": "park"}, (5.0, "park")),
        ({}, {"on_disconnect": "continue"}, (60.0, "continue")),
        ({}, {"on_disconnect": "cancel"}, (0.0, "cancel")),
        ({}, {"retain_s": 0}, (0.0, "cancel")),
        ({"x-penstock-retain": "7.5"}, {}, (7.5, "continue")),
        ({"x-penstock-retain": "7", "x-penstock-on-disconnect": "park"}, {}, (7.0, "park")),
        ({"x-penstock-retain": "7"}, {"retain_s": 3}, (3.0, "continue")),
    ],
)
def test_what_is_asked_for(edge: Edge, headers: dict[str, str], more: dict[str, Any], expected: tuple[float, str]) -> None:
    assert edge.kept.post(CHATS, json=HI | more, headers=headers).status_code == 200
    submit = edge.text.wait_for(Submit)[0]
    assert (submit.retain_s, submit.on_disconnect) == expected
    assert bool(submit.context) is bool(expected[0])


@pytest.mark.parametrize(
    ("headers", "more", "param"),
    [
        ({}, {"retain_s": -1}, "retain_s"),
        ({}, {"retain_s": 601}, "retain_s"),
        ({}, {"retain_s": True}, "retain_s"),
        ({}, {"retain_s": 5, "stream": False}, "retain_s"),
        ({}, {"on_disconnect": "stay"}, "on_disconnect"),
        ({}, {"on_disconnect": "park", "retain_s": 0}, "retain_s"),
        ({"x-penstock-retain": "soon"}, {}, "x-penstock-retain"),
        ({"x-penstock-retain": "nan"}, {}, "x-penstock-retain"),
        ({"x-penstock-retain": "1e9"}, {}, "x-penstock-retain"),
        ({"x-penstock-retain": "5", "x-penstock-on-disconnect": "x"}, {}, "x-penstock-on-disconnect"),
    ],
)
def test_what_cannot_be(edge: Edge, headers: dict[str, str], more: dict[str, Any], param: str) -> None:
    reply = edge.kept.post(CHATS, json=HI | more, headers=headers)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
    assert not [message for message in edge.text.received if isinstance(message, Submit)]


@pytest.mark.parametrize(("given", "status"), [("x", 400), ("-1", 400), ("1.5", 400), ("9" * 30, 400), ("0", 200), ("", 200)])
def test_the_number_of_the_last_event(edge: Edge, stream: Stream, given: str, status: int) -> None:
    rid = edge.kept.post(CHATS, json=HI | {"retain_s": 5}).headers["x-request-id"]
    reply = edge.kept.get(f"/v1/streams/{rid}", headers={"last-event-id": given})
    assert reply.status_code == status
    if status == 400:
        assert reply.json()["error"]["param"] == "last-event-id"


def test_one_that_is_not_there(edge: Edge, stream: Stream) -> None:
    rid = edge.kept.post(CHATS, json=HI).headers["x-request-id"]
    reply = edge.kept.get(f"/v1/streams/{rid}")
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "stream_not_found")


def opened(http: httpx.Client, edge: Edge, count: int) -> httpx.Response:
    """A stream whose first row was sent."""
    request = http.build_request("POST", CHATS, json=HI | {"retain_s": 5})
    reply = http.send(request, stream=True)
    edge.text.wait_for(Submit, count)
    return reply


def test_who_leaves_detaches_and_ends_nothing(make_edge: MakeEdge) -> None:
    edge = make_edge(text=lambda text: setattr(text, "script", lambda submit: [delta({"key": submit.key, "text": "Hel"})]))
    with edge.http() as http:
        opened(http, edge, 1).close()
        detached = edge.text.wait_for(Detach)[0]
    assert detached == Detach(key=edge.text.wait_for(Submit)[0].key, edge=0)
    assert not [message for message in edge.text.received if isinstance(message, Cancel)]


def test_who_comes_takes_the_stream_over(make_edge: MakeEdge) -> None:
    """The first connection is told by an event that no stream has: it has no number. Nothing is cancelled."""
    edge = make_edge(text=lambda text: setattr(text, "script", lambda submit: [delta({"key": submit.key, "text": "Hel"})]))
    Stream(edge)
    with edge.http() as http, edge.http() as other:
        first = opened(http, edge, 1)
        key, rid = edge.text.wait_for(Submit)[0].key, first.headers["x-request-id"]
        request = other.build_request("GET", f"/v1/streams/{rid}", headers={"last-event-id": "1"})
        edge.text.script = silent
        got: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: got.append(other.send(request)))
        thread.start()
        assert edge.text.wait_for(Attach)[0] == Attach(rid=rid, tenant="", edge=0, keys=[key], mark=1)
        text = first.read().decode()
        edge.text.send(
            delta({"key": key, "text": "Hel"}), delta({"key": key, "text": "lo"}), delta({"key": key, "reason": "stop"}), finished(key)
        )
        thread.join(20)
    assert '"code":"stream_taken"' in blocks(text)[-1]
    assert not blocks(text)[-1].startswith("id: ")
    assert [block.split("\n")[0] for block in blocks(got[0].text)] == ["id: 2", "id: 3", "id: 4", "id: 5"]
    assert '"content":"Hel"' in blocks(got[0].text)[0]
    assert not [message for message in edge.text.received if isinstance(message, (Cancel, Detach))]


def test_one_that_is_gone_meanwhile(make_edge: MakeEdge) -> None:
    edge = make_edge()
    Stream(edge)
    own = edge.text._on_message

    def on_message(link: Any, message: Message) -> None:
        own(link, message)
        if isinstance(message, Attach):
            link.send(Rejected(key=message.keys[0], status=404, type="invalid_request_error", code="stream_not_found", message="Gone."))

    edge.text._on_message = on_message  # type: ignore[method-assign]
    rid = edge.kept.post(CHATS, json=HI | {"retain_s": 5}).headers["x-request-id"]
    reply = edge.kept.get(f"/v1/streams/{rid}")
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "stream_not_found"), "nothing was sent yet: it has its status"
    assert edge.server.gateway.active == 0


@pytest.mark.parametrize("over", ["http", "ndjson"])
def test_what_was_under_way_to_the_reader_before_is_not_taken_for_the_answer(edge: Edge, stream: Stream, over: str) -> None:
    """Rows, an end or a refusal that text sent before it heard of the new reader, who listens on the same edge to the same keys."""
    headers = {"accept": "application/x-ndjson"} if over == "ndjson" else {}
    whole = edge.kept.post(CHATS, json=HI | {"retain_s": 5}, headers=headers)
    key, rid = stream.submits[0].key, whole.headers["x-request-id"]
    refusal = Rejected(key=key, status=409, type="invalid_request_error", code="stream_taken", message="Taken.")
    for late in ([delta({"key": key, "text": " world"})], [delta({"key": key, "reason": "stop"}), finished(key)], [refusal]):
        edge.text.late = list(late)
        assert edge.kept.get(f"/v1/streams/{rid}").text == whole.text
    assert edge.server.gateway.active == 0


def test_who_left_takes_nothing_from_who_came_at_once(make_edge: MakeEdge) -> None:
    """The next one listens before the reply to the one before has come to its end."""
    edge = make_edge(text=lambda text: setattr(text, "script", lambda submit: [delta({"key": submit.key, "text": "Hel"})]))
    Stream(edge)
    with edge.http() as http:
        first = opened(http, edge, 1)
        key, rid, door = edge.text.wait_for(Submit)[0].key, first.headers["x-request-id"], edge.server.gateway.door()
        failures: list[Any] = []

        class Next:
            failed = staticmethod(failures.append)

        def both() -> None:
            door._sinks[key]._job._abandon("disconnect")  # type: ignore[attr-defined]
            door.follow(rid, "", {key: Next()})  # type: ignore[dict-item]

        edge.text.call(both)
        edge.wait(lambda: edge.server.gateway.active == 0, "the end of the first reply")
        edge.text.wait_for(Attach)
        assert edge.text.wait_for(Detach) == [Detach(key=key, edge=0)]
        edge.text.send(Rejected(key=key, status=409, type="invalid_request_error", code="stream_taken", message="Taken."))
        edge.wait(lambda: bool(failures), "it still listens")


def test_who_leaves_a_stream_that_has_ended_takes_nothing_from_who_reads_it_now(edge: Edge, stream: Stream) -> None:
    """The first reader's process has the end of it, and still sends."""
    failures: list[Any] = []
    jobs: list[Any] = []
    begin = Job.begin

    class Next:
        failed = staticmethod(failures.append)

    def begun(job: Job) -> None:
        jobs.append(job)
        begin(job)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Job, "begin", begun)
        rid = edge.kept.post(CHATS, json=HI | {"retain_s": 5}).headers["x-request-id"]
    key, door = stream.submits[0].key, edge.server.gateway.door()
    edge.wait(lambda: key not in door._sinks)
    assert jobs[0].keys == [key]

    def both() -> None:
        door.follow(rid, "", {key: Next()})  # type: ignore[dict-item]
        jobs[0].cancel("disconnect")
        jobs[0].cancel("client")

    edge.text._on_message = lambda link, message: edge.text.received.append(message)  # type: ignore[method-assign]
    edge.text.call(both)
    assert not [message for message in edge.text.received if isinstance(message, (Detach, Cancel))]
    edge.text.send(Attached(mark=1), Rejected(key=key, status=409, type="invalid_request_error", code="stream_taken", message="Taken."))
    edge.wait(lambda: bool(failures), "it still listens")


def test_who_comes_while_another_waits_for_text_is_the_one(edge: Edge) -> None:
    """The one that waits is told at once, and what it waited for is nobody's."""
    stream = Stream(edge)
    whole = edge.kept.post(CHATS, json=HI | {"retain_s": 5})
    rid = whole.headers["x-request-id"]
    own = edge.text._on_message

    def on_message(link: Any, message: Message) -> None:
        first = isinstance(message, Attach) and message.mark == 1
        if not first:  # the first is never answered
            own(link, message)
        else:
            edge.text.received.append(message)
        if isinstance(message, Attach) and not first:
            for frame in stream.again():
                link.send(frame)

    edge.text._on_message = on_message  # type: ignore[method-assign]
    got: list[httpx.Response] = []
    with edge.http() as other:
        thread = threading.Thread(target=lambda: got.append(other.get(f"/v1/streams/{rid}")))
        thread.start()
        edge.wait(lambda: any(isinstance(message, Attach) for message in edge.text.received))
        assert edge.kept.get(f"/v1/streams/{rid}").text == whole.text
        thread.join(20)
    assert (got[0].status_code, got[0].json()["error"]["code"]) == (409, "stream_taken")
    assert edge.server.gateway.active == 0


@pytest.mark.parametrize("do", ["pause", "resume", "stop"])
def test_controls(edge: Edge, stream: Stream, do: str) -> None:
    reply = edge.kept.post(f"/v1/requests/r1/{do}")
    assert (reply.status_code, reply.json()) == (200, {"id": "r1", "object": "request", "done": do})
    asked = [json.loads(query.body) for query in edge.text.wait_for(Query) if query.what == "control"]
    assert asked == [{"rid": "r1", "tenant": None, "own": "", "do": do}]
    assert edge.kept.post(f"/v1/requests/other/{do}").status_code == 404


@pytest.mark.parametrize("after", [0, 3, 250])
def test_all_that_was_kept_comes_as_the_client_takes_it(make_edge: MakeEdge, after: int) -> None:
    """However much more it is than may wait unsent, and all at once from text."""
    edge = make_edge(stream_park_bytes=2048, stream_max_bytes=4096)
    stream = Stream(edge)
    own = edge.text._on_message

    def on_message(link: Any, message: Message) -> None:
        own(link, message)
        if isinstance(message, Attach):
            key = message.keys[0]
            link.send(delta(*({"key": key, "text": f"{number:0100}"} for number in range(500))))
            link.send(delta({"key": key, "reason": "stop"}))
            link.send(finished(key))

    edge.text._on_message = on_message  # type: ignore[method-assign]
    rid = edge.kept.post(CHATS, json=HI | {"retain_s": 5}).headers["x-request-id"]
    assert stream.submits
    found = blocks(edge.kept.get(f"/v1/streams/{rid}", headers={"last-event-id": str(after)}).text)
    assert [block.split("\n")[0] for block in found] == [f"id: {number}" for number in range(after + 1, 504)]
    assert [f"{number:0100}" in block for number, block in enumerate(found[-502:-2], 0 if after < 2 else after - 1)] == [True] * len(
        found[-502:-2]
    )
    assert edge.server.gateway.active == 0
