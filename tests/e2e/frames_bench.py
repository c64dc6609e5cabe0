"""What an event of a stream costs the edge, over HTTP and over gRPC: `python tests/e2e/frames_bench.py [STREAMS] [STEPS]`.

What it is: an edge whose text process is made up (tests/transports/edge_kit.py), so that nothing is computed: each step is one TextDelta with a row for every stream, given to the door as the link would give it. Clients, in a
process of their own, ask for chats and throw away what they read. Counted are events per CPU-second of the thread that runs the edge's loop. The figures of docs/benchmarks/streams.md come from here.
What it does not know: links between processes, what clients do with events.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import platform
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import h2.settings

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "transports"))

from edge_kit import Edge, delta, silent

from penstock.core.protocol.messages import Submit
from penstock.transports.grpc.penstock_v1_pb2 import StreamRequest

PATH = "/v1/chat/completions"
BODY = json.dumps({"messages": [{"role": "user", "content": "hi"}], "stream": True}).encode()
WINDOW = (1 << 31) - 1
AHEAD = 8
"""Steps that may be on their way to the sockets."""


def sse(port: int, streams: int) -> list[socket.socket]:
    """A connection a stream."""
    out = []
    for _ in range(streams):
        sock = socket.create_connection(("127.0.0.1", port))
        sock.sendall(b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (PATH.encode(), len(BODY), BODY))
        out.append(sock)
    return out


def grpc(port: int, streams: int, connections: int) -> list[socket.socket]:
    """Calls on connections whose windows never close."""
    out = []
    message = StreamRequest(path=PATH, body=BODY).SerializeToString()
    for index in range(connections):
        h2c = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
        h2c.local_settings = h2.settings.Settings(client=True, initial_values={h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: WINDOW})
        h2c.initiate_connection()
        h2c.increment_flow_control_window(WINDOW - 65535)
        for call in range(index, streams, connections):
            id = 1 + 2 * (call // connections)
            names = {":method": "POST", ":path": "/penstock.v1.Penstock/Stream", ":scheme": "http", ":authority": "x"}
            h2c.send_headers(id, [*names.items(), ("te", "trailers"), ("content-type", "application/grpc+proto")])
            h2c.send_data(id, b"\0" + len(message).to_bytes(4, "big") + message, end_stream=True)
        sock = socket.create_connection(("127.0.0.1", port))
        sock.sendall(h2c.data_to_send())
        out.append(sock)
    return out


CASES: dict[str, Callable[[Edge, int], list[socket.socket]]] = {
    "SSE, a connection a stream": lambda edge, streams: sse(edge.port, streams),
    "gRPC, all calls on one connection": lambda edge, streams: grpc(edge.ports["grpc"], streams, 1),
    "gRPC, a connection a call": lambda edge, streams: grpc(edge.ports["grpc"], streams, streams),
}


def swallow(socks: list[socket.socket]) -> None:
    async def one(sock: socket.socket) -> None:
        while await asyncio.get_running_loop().sock_recv(sock, 1 << 20):
            pass

    async def all() -> None:
        for sock in socks:
            sock.setblocking(False)
        await asyncio.gather(*map(one, socks))

    asyncio.run(all())


def measure(edge: Edge, name: str, streams: int, steps: int) -> None:
    edge.text.received.clear()
    socks = CASES[name](edge, streams)
    client = multiprocessing.get_context("fork").Process(target=swallow, args=(socks,), daemon=True)
    client.start()
    for sock in socks:
        sock.close()
    keys = [submit.key for submit in edge.text.wait_for(Submit, streams)]
    gateway: Any = edge.server.gateway
    door = next(iter(gateway.doors.values()))
    sinks = [door._sinks[key] for key in keys]

    async def run() -> tuple[float, float]:
        outboxes = [sink._job.outbox for sink in sinks]
        began, at = time.thread_time(), time.perf_counter()
        for step in range(steps):
            door.on_message(delta(*[{"key": key, "text": f" word{step % 10}"} for key in keys]))
            while sum(outbox.unsent for outbox in outboxes) > AHEAD * streams * 200:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0)
        while any(outbox.unsent for outbox in outboxes):
            await asyncio.sleep(0.001)
        return time.thread_time() - began, time.perf_counter() - at

    cpu, seconds = asyncio.run_coroutine_threadsafe(run(), edge.loop).result(600)
    print(f"{name}: {streams * steps / cpu:,.0f} events per CPU-second ({streams * steps:,} events in {seconds:.1f} s)", flush=True)
    client.terminate()
    client.join()
    edge.wait(lambda: gateway.active == 0)


def main(streams: int, steps: int) -> None:
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        edge = Edge(Path(folder), {"grpc_port": 0, "log_level": "error"})
        edge.text.script = silent
        edge.start()
        for _ in range(3):
            for name in CASES:
                measure(edge, name, streams, steps)
        edge.stop()


if __name__ == "__main__":
    given = [int(word) for word in sys.argv[1:]]
    main(*(given + [64, 2000][len(given) :]))
