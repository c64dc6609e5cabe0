"""gRPC of a real server with two HTTP processes: streams are the answers of HTTP, who leaves frees what was held, a kept stream survives the process that began it, and a drain lets calls finish."""

from __future__ import annotations

import json
import random
import signal
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from penstock.plugins.commands.bench.server import free_port

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "transports"))

from grpc_kit import CHATS, Client, failed

TOKENS = {"temperature": 0, "ignore_eos": True}
LONG = {"messages": [{"role": "user", "content": "Count."}], "max_tokens": 3000, **TOKENS}


def chat(question: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}], "max_tokens": 48, **TOKENS}


SURFACES: list[tuple[str, Callable[[str], dict[str, Any]], Callable[[Any], str], Callable[[Any], str]]] = [
    (
        CHATS,
        chat,
        lambda chunk: chunk["choices"][0]["delta"].get("content") or "",
        lambda reply: reply["choices"][0]["message"]["content"],
    ),
    (
        "/v1/completions",
        lambda question: {"prompt": question, "max_tokens": 48, **TOKENS},
        lambda chunk: chunk["choices"][0]["text"],
        lambda reply: reply["choices"][0]["text"],
    ),
    (
        "/v1/responses",
        lambda question: {"input": question, "max_output_tokens": 48, "temperature": 0},
        lambda event: event["delta"] if event["type"] == "response.output_text.delta" else "",
        lambda reply: "".join(part["text"] for item in reply["output"] if item["type"] == "message" for part in item["content"]),
    ),
    (
        "/v1/messages",
        lambda question: {"messages": [{"role": "user", "content": question}], "max_tokens": 48, "temperature": 0},
        lambda event: event["delta"].get("text", "") if event["type"] == "content_block_delta" else "",
        lambda reply: "".join(block["text"] for block in reply["content"]),
    ),
]


def fresh(port: int) -> Client:
    """With a connection of its own: any of the edges may get it."""
    return Client(port, **{"grpc.use_local_subchannel_pool": 1})


def edge_of(server: Any, port: int) -> list[psutil.Process]:
    """Who serves this process's connections to that port."""
    mine = {link.laddr.port for link in psutil.Process().net_connections("tcp") if link.raddr and link.raddr.port == port}
    found = []
    for edge in server.children()["edge"]:
        links = psutil.Process(edge.pid).net_connections("tcp")
        if any(link.laddr.port == port and link.raddr and link.raddr.port in mine for link in links):
            found.append(edge)
    return found


def test_a_server_over_grpc(starter: Any) -> None:
    port = free_port()
    server = starter("--deterministic", "--edge-workers", "2", "--grpc-port", str(port))
    assert server.until(lambda: f"grpc on 127.0.0.1:{port}" in server.log.read_text())
    model = server.client.get("/v1/models").json()["data"][0]["id"]

    # What is streamed, put together, is the whole answer, over HTTP too; many at once, on connections of their own.
    def both(number: int) -> None:
        path, body, piece, whole = SURFACES[number % len(SURFACES)]
        asked = body(f"Count from {number} to 20.") | {"model": model}
        client = fresh(port)
        with client.channel:
            streamed = "".join(piece(json.loads(event.data)) for event in client.stream(path, asked | {"stream": True}, timeout=60))
            alone = whole(json.loads(client.call(path, asked).body))
        assert streamed == alone == whole(server.client.post(path, json=asked).json())
        assert streamed

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(both, range(8)))

    # So is what comes without JSON.
    client = fresh(port)
    with client.channel:
        *pieces, last = client.generate("Once", max_tokens=16, temperature=0)
    asked = {"prompt": "Once", "max_tokens": 16, "temperature": 0}
    assert "".join(piece.text for piece in pieces) == server.client.post("/v1/completions", json=asked).json()["choices"][0]["text"]
    assert sum(len(piece.token_ids) for piece in pieces) == last.usage.completion_tokens > 0
    assert pieces[-1].finish_reason in ("stop", "length")

    def idle() -> bool:
        return server.metric("penstock_sequences", 'state="running"') == 0 == server.metric("penstock_kv_blocks", 'state="used"')

    # Who cancels, whose deadline passes, or whose connection breaks frees what was held.
    assert server.until(idle)
    client = fresh(port)
    running = client.stream(CHATS, LONG | {"stream": True}, timeout=60)
    for _ in range(3):
        next(running)
    assert not idle()
    running.cancel()
    assert server.until(idle)
    assert failed(client.stream(CHATS, LONG | {"stream": True}, timeout=1))[0] is grpc.StatusCode.DEADLINE_EXCEEDED
    assert server.until(idle)
    running = client.stream(CHATS, LONG | {"stream": True}, timeout=60)
    next(running)
    client.channel.close()
    assert server.until(idle)

    # An edge dies with its connections: a stream that is kept goes on, and says nothing twice.
    asked = chat("Count from 1 to 20.") | {"max_tokens": 600}
    whole = server.client.post(CHATS, json=asked).json()["choices"][0]["message"]["content"]
    client = fresh(port)
    client.call("/version")
    (edge,) = edge_of(server, port)
    running = client.stream(CHATS, asked | {"stream": True, "retain_s": 60}, timeout=60, id="kept")
    events = [next(running) for _ in range(5)]
    edge.kill()
    with pytest.raises(grpc.RpcError):
        events.extend(running)
    client.channel.close()
    client = fresh(port)
    events += client.attach("kept", events[-1].seq)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert "".join(SURFACES[0][2](json.loads(event.data)) for event in events) == whole
    client.channel.close()

    # Whatever comes in, the server stays.
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", port)) as conn:
            conn.sendall(random.randbytes(5000))
    assert server.client.get("/health").status_code == 200

    # What runs at the end finishes; what comes then is refused.
    client = fresh(port)
    running = client.stream(CHATS, asked | {"stream": True, "max_tokens": 1500}, timeout=60)
    next(running)
    stopped: list[int] = []
    server.process.send_signal(signal.SIGTERM)
    thread = threading.Thread(target=lambda: stopped.append(server.process.wait(40)))
    thread.start()
    assert server.until(lambda: server.client.get("/health/ready").status_code == 503)
    assert failed(client.stream(CHATS, asked))[0] is grpc.StatusCode.UNAVAILABLE
    chunks = [json.loads(event.data) for event in running]
    assert "".join(map(SURFACES[0][2], chunks)).startswith(whole)
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    client.channel.close()
    thread.join(40)
    assert stopped == [0], server.log.read_text()
    log = server.log.read_text()
    assert "Traceback" not in log, log
