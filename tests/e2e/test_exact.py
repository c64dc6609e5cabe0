"""Streams are exactly once: cut at any byte, again and again, resumed in every way there is, at whichever HTTP process, one of which is killed meanwhile, they are what they would have been undisturbed."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import psutil
import pytest
from cutting import DONE, Torn, lines_of, normal, sse

FLAGS = ["--edge-workers", "2"]
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
    "tgi": ("/generate_stream", {"inputs": "Count from 1 to 20.", "parameters": {"max_new_tokens": 150, "details": True}}, {}),
    "lines": (CHATS, {"messages": HI, "n": 2, "max_tokens": 120, "logprobs": True, "stream": True, **DRAWN}, LINES),
}


@pytest.fixture
def rng() -> Iterator[random.Random]:
    """Other cuts in every run; CUTS_SEED makes those of a run that failed again."""
    seed = int(os.environ.get("CUTS_SEED", random.SystemRandom().randrange(1 << 30)))
    print(f"CUTS_SEED={seed}")  # shown if the test fails
    yield random.Random(seed)


def generated(server: Any) -> float:
    return float(server.metric("penstock_tokens_total", 'source="generated"'))


def killer(server: Any, killed: list[int]) -> Callable[[int], None]:
    """Kills the HTTP process that holds the connection from a port; the first that does, and no other."""

    def kill(port: int) -> None:
        for edge in [] if killed else server.children()["edge"]:
            if any(link.raddr and link.raddr.port == port for link in psutil.Process(edge.pid).net_connections("tcp")):
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
