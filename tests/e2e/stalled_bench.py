"""What clients that read nothing cost those who read: `python tests/e2e/stalled_bench.py [STALLED] [READERS]`.

What it is: a server of its own with the demo model; some streams are read to their ends again and again, and the gaps between their events are measured: first
alone, then beside many clients that asked for a stream and never read a byte of it, from when those are parked and again while they stay so. Memory of edge, text
and engine, and KV blocks, at the beginning and the end of each; the clients are then cut. The figures of docs/benchmarks/streams.md come from here.
What it does not know: what the server is made of, beyond its metrics and its processes.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import psutil

from penstock.plugins.commands.bench.server import started

SECONDS = 15.0
STALL_S = 90.0
FLAGS = [
    "--kv-cache-memory-bytes",
    "64M",
    "--max-num-seqs",
    "32",
    "--stream-park-bytes",
    "16K",
    "--park-kv-s",
    "1",
    "--stream-stall-s",
    str(STALL_S),
]
ASK: dict[str, Any] = {"stream": True, "ignore_eos": True, "temperature": 0}
LONG: dict[str, Any] = {"max_tokens": 3000, "logprobs": True, "top_logprobs": 20}
"""Events of some kilobytes: a client that does not read them is noticed after a hundred tokens."""


def body(**fields: Any) -> bytes:
    return json.dumps(ASK | {"messages": [{"role": "user", "content": "hi"}]} | fields).encode()


def head(data: bytes) -> bytes:
    return b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (len(data), data)


async def read(port: int, number: int, gaps: list[float]) -> None:
    """One stream after the other, for ever."""
    while True:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head(body(max_tokens=800, seed=number)))
        last = 0.0
        while b"[DONE]" not in (line := await reader.readline()):
            if line.startswith(b"data:"):
                now = time.perf_counter()
                if last:
                    gaps.append(now - last)
                last = now
        writer.close()


def stall(port: int, number: int) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", port))
    sock.sendall(head(body(**LONG, seed=number)))
    return sock


class Watch:
    """What the server says of itself."""

    def __init__(self, url: str) -> None:
        self._http = httpx.AsyncClient(base_url=url, timeout=60)
        (root,) = [child for child in psutil.Process().children() if "serve" in child.cmdline()]
        below = root.children(recursive=True)
        self._processes = {role: [one for one in below if role in one.cmdline()] for role in ("edge", "text", "engine")}

    async def metric(self, name: str, label: str = "") -> float:
        lines = (await self._http.get("/metrics")).text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((name + "{", name + " ")) and label in line)

    async def until(self, condition: Callable[[], Awaitable[bool]], what: str, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not await condition():
            if time.monotonic() > end:
                raise SystemExit(f"{what} did not come within {seconds:.0f} s")
            await asyncio.sleep(0.5)

    async def memory(self) -> str:
        sizes = {role: sum(one.memory_info().rss for one in some) >> 20 for role, some in self._processes.items()}
        used = await self.metric("penstock_kv_blocks", 'state="used"')
        return ", ".join(f"{role} {size} MiB" for role, size in sizes.items()) + f", {used:.0f} KV blocks used"


async def phase(name: str, watch: Watch, gaps: list[float]) -> None:
    before = await watch.memory()
    gaps.clear()
    await asyncio.sleep(SECONDS)
    cuts = statistics.quantiles(gaps, n=100)
    print(f"{name}: {len(gaps)} gaps, P50 {cuts[49] * 1e3:.1f} ms, P95 {cuts[94] * 1e3:.1f} ms, P99 {cuts[98] * 1e3:.1f} ms")
    print(f"  memory: {before}\n      to: {await watch.memory()}", flush=True)


async def main(url: str, stalled: int, readers: int) -> None:
    port, watch = int(url.rsplit(":", 1)[1]), Watch(url)
    gaps: list[float] = []
    reading = [asyncio.create_task(read(port, number, gaps)) for number in range(readers)]
    await asyncio.sleep(5.0)
    await phase(f"{readers} streams that are read", watch, gaps)
    began = time.monotonic()
    clients = [stall(port, number) for number in range(stalled)]

    async def parked() -> bool:
        return await watch.metric("penstock_sequences", 'state="parked"') >= stalled

    await watch.until(parked, "the park of all", STALL_S - SECONDS * 2)
    print(f"all {stalled} parked after {time.monotonic() - began:.0f} s", flush=True)
    await asyncio.sleep(2.0)
    await phase(f"beside {stalled} that are not", watch, gaps)

    async def cut() -> bool:
        return await watch.metric("penstock_cancellations_total", 'cause="slow_client"') >= stalled

    await watch.until(cut, "the cut of all", STALL_S + 30)
    print(f"all cut after {time.monotonic() - began:.0f} s")
    await phase("after the cut", watch, gaps)
    for client in clients:
        client.close()
    for task in reading:
        task.cancel()
    await asyncio.gather(*reading, return_exceptions=True)


if __name__ == "__main__":
    os.environ.setdefault("PENSTOCK_LOG_LEVEL", "error")  # each cut is a warning
    given = [int(word) for word in sys.argv[1:]]
    print(f"load {os.getloadavg()[0]:.1f} before the start")
    with started(FLAGS) as address:
        asyncio.run(main(address, *(given + [200, 8][len(given) :])))
    print(f"load {os.getloadavg()[0]:.1f} at the end")
