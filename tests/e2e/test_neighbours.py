"""What one client sends must not make another wait: a small request beside each kind of heavy one, on a real server."""

from __future__ import annotations

import concurrent.futures
import threading
import time
from functools import partial
from typing import Any

import httpx
import msgspec
import psutil
import pytest

WAIT_S = 0.25
"""Longest wait of a small request beside a heavy one, above what it takes alone."""
TINY = {"model": "brook", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
NEW = "~~"
"""Becomes another text each time that the body is sent."""
HI = [{"role": "user", "content": "hi"}]


def many(count: int, name: str = "z") -> dict[str, int]:
    """So many fields that nobody knows."""
    return {f"{name}{i}": 1 for i in range(count)}


def schema(count: int, required: bool, nested: bool) -> dict[str, Any]:
    """One that is new each time that it is sent."""
    size = 19 if nested else count
    objects = [object_of([f"field_{NEW}_{at + i}" for i in range(size)], {"type": "string"}, required) for at in range(0, count, size)]
    whole = object_of([f"part_{i}" for i in range(len(objects))], objects, required) if nested else objects[0]
    return {"messages": HI, "max_tokens": 30, "temperature": 1.0, "guided_json": whole}


def object_of(names: list[str], parts: Any, required: bool) -> dict[str, Any]:
    properties = dict(zip(names, parts if isinstance(parts, list) else [parts] * len(names), strict=True))
    return {"type": "object", "properties": properties, "required": names if required else [], "additionalProperties": False}


HEAVY: dict[str, tuple[str, Any, set[int]]] = {
    "a text of 20 MB to count": ("/tokenize", lambda: {"prompt": "the water runs " * 1_400_000}, {413}),
    "a long legal text to count": ("/tokenize", lambda: {"prompt": "the water runs " * 60_000}, {200}),
    "a million emoji to count": ("/tokenize", lambda: {"prompt": "😀" * 1_000_000}, {200}),
    "900,000 messages": ("/v1/chat/completions", lambda: {"messages": [{"role": "user", "content": "a"}] * 900_000}, {400, 413}),
    "900,000 parts": (
        "/v1/chat/completions",
        lambda: {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 700_000}]},
        {400, 413},
    ),
    "8,000 messages": ("/v1/chat/completions", lambda: {"messages": [{"role": "user", "content": "a"}] * 8000}, {400}),
    "10M ids to decode": ("/detokenize", lambda: {"tokens": [5] * 10_000_000}, {413}),
    "many legal ids to decode": ("/detokenize", lambda: {"tokens": [5] * 260_000}, {200}),
    "a prompt of 10M ids": ("/v1/completions", lambda: {"prompt": [5] * 10_000_000}, {400, 413}),
    "a prompt of 1M ids": ("/v1/completions", lambda: {"prompt": [5] * 1_000_000}, {400, 413}),
    "5M allowed ids": ("/v1/completions", lambda: {"prompt": "a", "allowed_token_ids": [5] * 5_000_000}, {400, 413}),
    "100,000 bad words": ("/v1/completions", lambda: {"prompt": "a", "bad_words": [f"a{i}" for i in range(100_000)]}, {400, 413}),
    "1,000 bad words": (
        "/v1/completions",
        lambda: {"prompt": "a", "max_tokens": 30, "ignore_eos": True, "bad_words": [f"word {i}" for i in range(1000)]},
        {200},
    ),
    "99,000 biases": ("/v1/completions", lambda: {"prompt": "a", "logit_bias": {str(i): 1 for i in range(99_000)}}, {400}),
    "2M stop strings": ("/v1/completions", lambda: {"prompt": "a", "stop": ["a"] * 2_000_000}, {400, 413}),
    "20,000 unknown fields to tokenize": ("/tokenize", lambda: {"prompt": "a", **many(20_000)}, {413}),
    "800,000 unknown fields to tokenize": ("/tokenize", lambda: {"prompt": "a", **many(800_000)}, {413}),
    "99,000 unknown fields to tokenize": ("/tokenize", lambda: {"prompt": "a", **many(99_000)}, {413}),
    "800,000 unknown fields to detokenize": ("/detokenize", lambda: {"tokens": [5], **many(800_000)}, {413}),
    "800,000 unknown fields to complete": ("/v1/completions", lambda: {"prompt": "a", **many(800_000)}, {413}),
    "600,000 fields of a refused kind": ("/v1/completions", lambda: {"prompt": "a", **many(600_000, "guided_")}, {413}),
    "800,000 unknown fields of a chat": ("/v1/chat/completions", lambda: {"messages": HI, **many(800_000)}, {413}),
    "90,000 unknown fields of a message": ("/v1/chat/completions", lambda: {"messages": [HI[0] | many(90_000)]}, {200, 400, 413}),
    "90,000 template variables": ("/v1/chat/completions", lambda: {"messages": HI, "chat_template_kwargs": many(90_000)}, {200, 400, 413}),
    "90,000 unknown stream options": (
        "/v1/chat/completions",
        lambda: {"messages": HI, "stream": True, "stream_options": many(90_000)},
        {200, 400, 413},
    ),
    "90,000 fields of a tool": (
        "/v1/chat/completions",
        lambda: {
            "messages": HI,
            "tool_choice": "none",
            "tools": [{"type": "function", "function": {"name": "f", "parameters": many(90_000)}}],
        },
        {200, 400, 413},
    ),
    "90,000 fields of past arguments": (
        "/v1/chat/completions",
        lambda: {"messages": [*HI, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": many(90_000)}}]}, *HI]},
        {200, 400, 413},
    ),
    "90,000 fields of a response format": (
        "/v1/chat/completions",
        lambda: {"messages": HI, "response_format": {"type": "text", **many(90_000)}},
        {200, 400, 413},
    ),
    "a refused field of 3M values": ("/v1/completions", lambda: {"prompt": "a", "grammar": [1] * 3_000_000}, {400}),
    **{
        f"a schema of {count} {'required' if required else 'optional'} properties": (
            "/v1/chat/completions",
            partial(schema, count, required, nested),
            statuses,
        )
        for count, required, nested, statuses in (
            (740, False, False, {200}),
            (1490, True, False, {200}),
            (5000, False, False, {400}),
            (5000, True, False, {400}),
            (1400, False, True, {200}),
        )
    },
    "a schema of 740 properties and any others": (
        "/v1/chat/completions",
        lambda: schema(740, False, False) | {"guided_json": {**schema(740, False, False)["guided_json"], "additionalProperties": True}},
        {200, 400},
    ),
    "a prompt of 30 MB": ("/v1/completions", lambda: {"prompt": "the water runs " * 2_000_000}, {400, 413}),
}


def tiny(client: httpx.Client) -> float:
    began = time.monotonic()
    reply = client.post("/v1/chat/completions", json=TINY)
    assert reply.status_code == 200, reply.text
    return time.monotonic() - began


@pytest.fixture(scope="module")
def bodies() -> dict[str, bytes]:
    return {name: msgspec.json.encode({"model": "brook", **make()}) for name, (_, make, _) in HEAVY.items()}


@pytest.mark.parametrize("name", list(HEAVY))
def test_a_small_request_hardly_waits(server: Any, bodies: dict[str, bytes], name: str) -> None:
    path, _, statuses = HEAVY[name]
    with httpx.Client(base_url=server.url, timeout=60) as small, httpx.Client(base_url=server.url, timeout=60) as heavy:
        alone = min(tiny(small) for _ in range(5))
        over = threading.Event()
        waits: list[float] = []

        def beside() -> None:
            while not over.is_set():
                waits.append(tiny(small))

        with concurrent.futures.ThreadPoolExecutor() as pool:
            going = pool.submit(beside)
            sent = [bodies[name].replace(NEW.encode(), str(number).encode()) for number in range(3)]
            replies = [heavy.post(path, content=body, headers={"content-type": "application/json"}) for body in sent]
            over.set()
            going.result(30)
    assert {reply.status_code for reply in replies} <= statuses, replies[0].text[:300]
    if replies[0].status_code != 200:
        error = replies[0].json()["error"]
        assert error["param"] or " fields; " in error["message"]
        assert error["code"] == "unsupported_feature" or any(char.isdigit() for char in error["message"])
    # One stall is what a shared machine does by itself; a blocked loop stalls each time.
    assert sorted(waits)[-2 if len(waits) > 2 else -1] - alone < WAIT_S, sorted(waits)[-3:]


TOOL = {"type": "object", "properties": {"city": {"type": "string"}}}
PARALLEL = 4
"""Clients that send the same heavy body at once: more than there are cores here to parse them."""

LEGAL: dict[str, tuple[str, Any]] = {
    "parts of a chat": ("/v1/chat/completions", lambda: {"messages": [parts(45_000)]}),
    "tools of a chat": ("/v1/chat/completions", lambda: {"messages": HI, "tool_choice": "none", "tools": functions(12_000)}),
    "token ids of a completion": ("/v1/completions", lambda: {"prompt": [[5] * 250_000] * 4}),
    "parts of a response": ("/v1/responses", lambda: {"input": [parts(15_000, "input_text")], "store": False}),
    "tools of a response": ("/v1/responses", lambda: {"input": "hi", "tools": flat(4_500), "tool_choice": "none", "store": False}),
    "a response to be fitted": ("/v1/responses", lambda: {"input": [parts(15_000, "input_text")], "truncation": "auto", "store": False}),
    "parts of a response to count": ("/v1/responses/input_tokens", lambda: {"input": [parts(15_000, "input_text")]}),
    "blocks of a message": ("/v1/messages", lambda: {"max_tokens": 1, "messages": [parts(15_000)]}),
    "tools of a message": (
        "/v1/messages",
        lambda: {"max_tokens": 1, "messages": HI, "tools": anthropic(5_300), "tool_choice": {"type": "none"}},
    ),
    "blocks of a message to count": ("/v1/messages/count_tokens", lambda: {"messages": [parts(15_000)]}),
    "a text to generate from": (
        "/generate",
        lambda: {"inputs": "the water runs " * 60_000, "parameters": {"max_new_tokens": 1, "truncate": 8}},
    ),
    "parts to tokenize": ("/tokenize", lambda: {"messages": [parts(45_000)]}),
}
"""Bodies near what is still parsed, on each surface. Whether the model has room for them is said after that."""


def parts(count: int, kind: str = "text") -> dict[str, Any]:
    return {"role": "user", "content": [{"type": kind, "text": "a"}] * count}


def functions(count: int) -> list[Any]:
    return [{"type": "function", "function": {"name": f"f{number}", "parameters": TOOL}} for number in range(count)]


def flat(count: int) -> list[Any]:
    return [{"type": "function", "name": f"f{number}", "parameters": TOOL} for number in range(count)]


def anthropic(count: int) -> list[Any]:
    return [{"name": f"f{number}", "input_schema": TOOL} for number in range(count)]


@pytest.mark.parametrize("name", list(LEGAL))
def test_a_small_request_hardly_waits_beside_many_large_bodies(server: Any, name: str) -> None:
    path, make = LEGAL[name]
    model = {} if path == "/generate" else {"model": "brook"}
    body = msgspec.json.encode(model | make())
    with httpx.Client(base_url=server.url, timeout=60) as small:
        alone = min(tiny(small) for _ in range(5))
        over = threading.Event()
        waits: list[float] = []

        def beside() -> None:
            while not over.is_set():
                waits.append(tiny(small))

        def heavy(_: int) -> list[int]:
            with httpx.Client(base_url=server.url, timeout=60) as client:
                return [client.post(path, content=body, headers={"content-type": "application/json"}).status_code for _ in range(2)]

        with concurrent.futures.ThreadPoolExecutor(PARALLEL + 1) as pool:
            going = pool.submit(beside)
            statuses = [status for found in pool.map(heavy, range(PARALLEL)) for status in found]
            over.set()
            going.result(30)
    assert set(statuses) <= {200, 400}, "no limit of the edge's was in the way"
    # A few stalls are what a shared machine does by itself; a blocked loop stalls for most of the time.
    assert sorted(waits)[-1 - len(waits) // 5] - alone < WAIT_S, sorted(waits)[-5:]


def test_memory_comes_back_after_a_long_text(server: Any, bodies: dict[str, bytes]) -> None:
    [text] = server.children()["text"]

    def used() -> int:
        return int(psutil.Process(text.pid).memory_info().rss)

    with httpx.Client(base_url=server.url, timeout=60) as client:
        before = used()
        for _ in range(3):
            path, _, _ = HEAVY["a long legal text to count"]
            assert client.post(path, content=bodies["a long legal text to count"]).status_code == 200
        assert server.until(lambda: used() < before + (96 << 20), 5), (before, used())
