"""Streams are exactly once: cut at any byte, again and again, resumed in every way there is, at whichever HTTP process, one of which is killed meanwhile, they are what they would have been undisturbed."""

from __future__ import annotations

import json
import os
import random
import re
import socket
from collections.abc import Callable
from typing import Any

import httpx
import psutil
import pytest
from cutting import DONE, Torn, dechunked, lines_of, normal, sse
from websockets.sync.client import connect

FLAGS = ["--edge-workers", "2", "--engine-restarts", "9"]
CHATS = "/v1/chat/completions"
HI = [{"role": "user", "content": "Count."}]
COUNT = [{"role": "user", "content": "Count from 1 to 20."}]
DRAWN: dict[str, Any] = {"ignore_eos": True, "seed": 4, "temperature": 1}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Get the current weather in a city", "parameters": SCHEMA},
}
LINES = {"accept": "application/x-ndjson"}
TWO = [{"role": "user", "content": "What is the weather in Paris and the time in Rome?"}]
CALLS: dict[str, Any] = {
    "messages": TWO,
    "tools": [WEATHER],
    "n": 2,
    "stream": True,
    "stream_options": {"include_usage": True, "events": ["arguments_done"]},
}
STORIES: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "completions": ("/v1/completions", {"prompt": "Once", "n": 2, "max_tokens": 120, "logprobs": 1, "stream": True, **DRAWN}, {}),
    "prompts": ("/v1/completions", {"prompt": ["Once", "Twice"], "max_tokens": 80, "echo": True, "stream": True, **DRAWN}, {}),
    "interval": (CHATS, {"messages": HI, "n": 2, "max_tokens": 200, "stream_interval": 3, "stream": True, **DRAWN}, {}),
    "calls": (CHATS, CALLS, {}),
    "responses": ("/v1/responses", {"input": "Count.", "max_output_tokens": 150, "stream": True, **DRAWN}, {}),
    "messages": ("/v1/messages", {"model": "brook", "max_tokens": 150, "messages": COUNT, "stream": True, "temperature": 0}, {}),
    "tgi": (
        "/generate_stream",
        {"inputs": "<|user|>Count from 1 to 20.<|end|><|assistant|>", "parameters": {"max_new_tokens": 150, "details": True}},
        {},
    ),
    "lines": (CHATS, {"messages": HI, "n": 2, "max_tokens": 120, "logprobs": True, "stream": True, **DRAWN}, LINES),
}


@pytest.fixture
def rng() -> random.Random:
    """Other cuts in every run; CUTS_SEED makes those of a run that failed again."""
    seed = int(os.environ.get("CUTS_SEED", random.SystemRandom().randrange(1 << 30)))
    print(f"CUTS_SEED={seed}")  # shown if the test fails
    return random.Random(seed)


def _holds(pid: int, port: int) -> bool:
    """Is the other end of that port's connection this process's?"""
    return any(link.raddr and link.raddr.port == port for link in psutil.Process(pid).net_connections("tcp"))


def generated(server: Any) -> float:
    return float(server.metric("penstock_tokens_total", 'source="generated"'))


def killer(server: Any, killed: list[int]) -> Callable[[int], None]:
    """Kills the HTTP process that holds the connection from a port; the first that does, and no other."""

    def kill(port: int) -> None:
        for edge in [] if killed else server.children()["edge"]:
            if _holds(edge.pid, port):
                edge.kill()
                killed.append(edge.pid)

    return kill


def story(
    server: Any,
    rng: random.Random,
    path: str,
    body: dict[str, Any],
    headers: dict[str, str],
    *,
    cuts: int,
    begin: str = "http",
    kill: bool = False,
) -> None:
    """The same answer twice: undisturbed, and torn."""
    assert server.until(lambda: len(server.children().get("edge", [])) == 2, 30)
    before = generated(server)
    whole = server.client.post(path, json=body, headers=headers)
    assert whole.status_code == 200, whole.text
    once = generated(server) - before
    wanted = normal(events_of(whole, None))
    assert len(wanted) > 10
    size = len(whole.content) // len(wanted)

    killed: list[int] = []
    kept = {"x-penstock-retain": "60", "x-penstock-on-disconnect": rng.choice(["continue", "park"])}
    asked = headers if begin == "http" else {}
    torn = Torn(server.port, rng, path, body, asked | kept, begin=begin)
    try:
        torn.run(cuts, size, len(wanted), killer(server, killed) if kill else None)
    finally:
        torn.close()
    assert by_choice(normal(torn.payloads)) == by_choice(wanted)
    assert len(killed) == kill, "did a process die in mid-stream?"
    assert torn.cuts >= cuts * 0.9
    assert torn.resumed > 5
    assert generated(server) - before == 2 * once > 0, "each token was made once"
    replayed = server.client.get(f"/v1/streams/{torn.rid}")
    assert exact(events_of(replayed, 0)) == exact(torn.payloads), "to the byte, ids and times and all"


def events_of(reply: httpx.Response, after: int | None) -> list[bytes]:
    """Payloads of a whole reply; `after` None: of one that was not kept, so that nothing has a number."""
    if "ndjson" in reply.headers["content-type"]:
        return [one.payload for one in lines_of(reply.content, after or 0)]
    found = list(sse(reply.content))
    assert [one.number for one in found] == [None if after is None else after + number for number in range(1, len(found) + 1)]
    return [one.payload for one in found]


def by_choice(payloads: list[bytes]) -> list[bytes]:
    """Which of two prompts comes first in a step is anybody's guess: each choice's events, in their order."""

    def index(payload: bytes) -> int:
        found = re.search(rb'"choices":\[{"index":(\d+)', payload)
        return int(found.group(1)) if found else 99

    return sorted(payloads, key=index)


def exact(payloads: list[bytes]) -> list[bytes]:
    """Without the mark of the end, which some carriers leave out."""
    return [payload for payload in payloads if payload != DONE]


def test_a_chat_that_is_cut_two_hundred_times(server: Any, rng: random.Random) -> None:
    body = {"messages": HI, "max_tokens": 300, "logprobs": True, "top_logprobs": 2, "stream": True, **DRAWN}
    story(server, rng, CHATS, body, {}, cuts=200, kill=True)


@pytest.mark.parametrize("name", STORIES)
def test_each_api(server: Any, rng: random.Random, name: str) -> None:
    story(server, rng, *STORIES[name], cuts=40, kill=name in ("responses", "lines"))


@pytest.mark.parametrize("name", ["completions", "responses"])
def test_what_began_on_a_websocket(server: Any, rng: random.Random, name: str) -> None:
    story(server, rng, *STORIES[name], cuts=25, begin="socket")


def test_what_a_model_says_to_itself(starter: Any, rng: random.Random) -> None:
    server = starter("--deterministic", "--edge-workers", "2", "--reasoning-parser", "deepseek_r1")
    body = {"messages": HI, "max_tokens": 150, "stream": True, **DRAWN}
    assert server.client.post(CHATS, json=body | {"stream": False}).json()["choices"][0]["message"]["reasoning_content"]
    story(server, rng, CHATS, body, {}, cuts=30)


def test_a_response_in_the_background_is_followed_at_any_process(server: Any, rng: random.Random) -> None:
    """By the number of its last event, at processes that did not create it, and once the one that did has died."""
    assert server.until(lambda: len(server.children().get("edge", [])) == 2, 30)
    before = generated(server)
    body = {"input": "Count.", "max_output_tokens": 300, "background": True, **DRAWN}
    _, creator, raw = _asked(server, b"POST /v1/responses", body | {"stream": True}, limit=2500)
    found = _followed(raw, 0)
    name = json.loads(found[0])["response"]["id"]
    others: set[int] = set()
    over = False
    while not over:
        limit = 300 + rng.randrange(6000)
        over, edge, raw = _asked(server, f"GET /v1/responses/{name}?stream=true&starting_after={len(found) - 1}".encode(), None, limit)
        others.add(edge)
        found += _followed(raw, len(found))
    assert others - {creator}, "others answered, too"
    psutil.Process(creator).kill()
    assert server.until(lambda: creator not in {edge.pid for edge in server.children().get("edge", [])})
    for after in (-1, 3, len(found) - 2):
        query = "" if after < 0 else f"&starting_after={after}"
        over, edge, raw = _asked(server, f"GET /v1/responses/{name}?stream=true{query}".encode(), None, 1 << 30)
        assert over
        assert edge != creator
        assert _followed(raw, after + 1) == found[after + 1 :]
    whole = server.client.post("/v1/responses", json=body | {"background": False})
    text = "".join(json.loads(one)["delta"] for one in found if b'"response.output_text.delta"' in one)
    assert text == whole.json()["output"][0]["content"][0]["text"]
    assert generated(server) - before == 2 * 300


def _asked(server: Any, line: bytes, body: Any, limit: int) -> tuple[bool, int, bytes]:
    """Whether that was all, whose answer it was (a process id), and its bytes up to the limit."""
    data = b"" if body is None else json.dumps(body).encode()
    head = b"%b HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % (line, len(data))
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as sock:
        sock.sendall(head + data)
        raw = b""
        while len(raw) < limit and not raw.endswith(b"\r\n0\r\n\r\n"):
            raw += sock.recv(min(65536, limit - len(raw)))
        (edge,) = [edge.pid for edge in server.children()["edge"] if _holds(edge.pid, sock.getsockname()[1])]
        return raw.endswith(b"\r\n0\r\n\r\n"), edge, raw


def _followed(raw: bytes, first: int) -> list[bytes]:
    """The whole events in it, whose numbers go on from `first`."""
    _, _, chunks = raw.partition(b"\r\n\r\n")
    assert raw.startswith(b"HTTP/1.1 200 "[: len(raw)]), raw
    payloads = [one.payload for one in sse(dechunked(chunks)[0])]
    assert [json.loads(payload)["sequence_number"] for payload in payloads] == list(range(first, first + len(payloads)))
    return payloads


def test_behind_the_last_event_there_is_nothing_however_large_the_prompt(server: Any) -> None:
    body = {"prompt": "a" * 3000, "echo": True, "logprobs": 3, "max_tokens": 5, "stream": True, "retain_s": 20}
    whole = server.client.post("/v1/completions", json=body)
    rid, ids = whole.headers["x-request-id"], [int(line[4:]) for line in whole.text.split("\n") if line.startswith("id: ")]
    events = [block for block in whole.text.split("\n\n") if block.startswith("id: ")]
    assert ids[-1] > len(ids), "the numbers leap behind what is large about a prompt"
    for after, rest in (
        (ids[-1], 0),
        (ids[-1] + 100, 0),
        (ids[-2], 1),
        (ids[0], len(ids) - 1),
        (ids[len(ids) // 2], len(ids) - len(ids) // 2 - 1),
    ):
        reply = server.client.get(f"/v1/streams/{rid}", headers={"last-event-id": str(after)})
        assert reply.status_code == (200 if rest else 204)
        assert [block for block in reply.text.split("\n\n") if block.startswith("id: ")] == events[len(events) - rest :]


def test_a_retry_of_several_prompts_leaves_the_stream_that_it_repeats(server: Any) -> None:
    body = {"prompt": ["Once upon", "The river"], "max_tokens": 40, "stream": True, "retain_s": 30, **DRAWN}
    named = {"x-request-id": "twice"}
    whole = server.client.post("/v1/completions", json=body, headers=named)
    for _ in range(2):
        again = server.client.post("/v1/completions", json=body, headers=named)
        assert (again.status_code, again.json()["error"]["code"]) == (409, "stream_exists")
    assert server.client.get("/v1/streams/twice").text.split("\n\n")[:5] == whole.text.split("\n\n")[:5]
    wrong = server.client.post("/v1/completions", json=body, headers={"x-request-id": "a b"})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "x-request-id")


def test_one_that_was_cancelled_says_so_to_who_attaches(server: Any) -> None:
    with connect(server.url.replace("http", "ws") + "/v1/stream", subprotocols=["penstock.v1"], proxy=None) as socket:  # type: ignore[list-item]
        body = {"prompt": "Once", "max_tokens": 3000, "logprobs": 1, "stream": True, "retain_s": 30, **DRAWN}
        socket.send(json.dumps({"op": "start", "id": "a", "path": "/v1/completions", "body": body}))
        rid = json.loads(socket.recv(timeout=30))["stream"]
        while "data" not in json.loads(socket.recv(timeout=30)):
            pass
        socket.send(json.dumps({"op": "cancel", "id": "a"}))
        while "error" not in (live := json.loads(socket.recv(timeout=30))):
            pass
        socket.send(json.dumps({"op": "attach", "id": "b", "stream": rid}))
        while "error" not in (later := json.loads(socket.recv(timeout=30))):
            pass
    assert (live["status"], live["error"]["code"]) == (499, "cancelled"), live
    assert (later["id"], later["status"], later["error"]["code"]) == ("b", 499, "cancelled")
