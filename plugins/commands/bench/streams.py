"""`penstock bench streams`: what streams cost beside the model.

What it is: servers on loopback with a device that computes nothing and whose tokens tell the time (clock_device.py), and clients that read, resume or stall: how long a token is on its way from the device to the client
(`latency`), how many events an HTTP process sends (`events`), what a stream that is kept takes and how soon it is resumed (`retained`), what clients that read nothing cost those who read (`stalled`). Linux only.
What it does not know: tables and options (command.py), models.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import re
import socket
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

from penstock.core.protocol.model_folder import demo_folder
from penstock.plugins.commands.bench import clock_device, report
from penstock.plugins.commands.bench.footprint import pss_bytes, tree
from penstock.plugins.commands.bench.server import started

LIMIT_S = 170.0
"""No measurement takes longer."""
STEP_S = 0.02
"""Of the device, where streams are to be as quick as those of a model: 50 tokens a second each."""
KEPT_TOKENS = 500
ROUND_TOKENS = 2000
SOCKETS = 8
"""That the streams of `events` share, over WebSockets."""
PARK_S = 60.0
STALL_S = 75.0
"""Longer than until all are parked, and the row beside them."""
SETTLE_S = 2.0
ASK: dict[str, Any] = {"prompt": "Once", "stream": True, "ignore_eos": True, "temperature": 0}
LONG: dict[str, Any] = {"max_tokens": 3000, "logprobs": 20}
"""Events of some kilobytes: a client that does not read them is noticed after a hundred tokens."""
Result = TypeVar("Result")
_TEXT = re.compile(rb'"text":"([^"]*)"')
_SHAKE = (
    b"GET /v1/stream HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-version: 13\r\n"
    b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-protocol: penstock.v1\r\n\r\n"
)


@contextlib.contextmanager
def clocked(args: list[str], *, step_s: float, streams: int) -> Iterator[str]:
    """A server whose device is the clock; `args` are more of its options."""
    fake = {"fake": {"check": False, "num_blocks": 1 << 17, "step_s": step_s}}
    flags = ["--device", "clock", "--hf-overrides", json.dumps(fake), "--max-num-seqs", str(max(16, streams)), *args]
    with tempfile.TemporaryDirectory() as site:
        info = Path(site) / "penstock_bench_clock-0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: penstock-bench-clock\nVersion: 0\n", encoding="utf-8")
        (info / "entry_points.txt").write_text(f"[penstock.engine]\nclock = {clock_device.__name__}\n", encoding="utf-8")
        before = {name: os.environ.get(name) for name in ("PYTHONPATH", "PENSTOCK_LOG_LEVEL")}
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [site, before["PYTHONPATH"]]))
        os.environ["PENSTOCK_LOG_LEVEL"] = "error"  # each client that is cut is a warning
        try:
            with started(flags) as url:
                yield url
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


class Server:
    """What a running server says of itself, and what its processes take."""

    def __init__(self, url: str) -> None:
        self.port = int(url.rsplit(":", 1)[1])
        self._pids: dict[str, list[int]] = {"edge": [], "text": [], "engine": []}
        for pid in tree(os.getpid()):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            for role, found in self._pids.items():
                if role.encode() in words:
                    found.append(pid)

    def memory(self) -> dict[str, float]:
        """MiB (proportional set size), by role."""
        return {role: pss_bytes(pids) / 2**20 for role, pids in self._pids.items()}

    def cpu(self, role: str) -> float:
        """Seconds of all threads, from the scheduler's own account: clock ticks are too coarse."""
        tasks = [task for pid in self._pids[role] for task in Path(f"/proc/{pid}/task").iterdir()]
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9

    async def get(self, path: str) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(b"GET %b HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n" % path.encode())
        raw = await reader.read()
        writer.close()
        return raw

    async def metric(self, name: str, label: str = "") -> float:
        lines = (await self.get("/metrics")).decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((name + "{", name + " ")) and label in line)


class Reading(asyncio.Protocol):
    """What comes on one connection, with its times (ns, monotonic), to be understood later; or only how much."""

    def __init__(self, asked: bytes) -> None:
        self._asked = asked
        self.came: list[tuple[int, bytes]] = []
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(self._asked)

    def data_received(self, data: bytes) -> None:
        self.came.append((time.monotonic_ns(), data))

    def connection_lost(self, _: Exception | None) -> None:
        if not self.over.done():
            self.over.set_result(None)


class Counting(Reading):
    """Counts `mark`; hangs up once `end` came `ends` times."""

    def __init__(self, asked: bytes, mark: bytes, end: bytes, ends: int) -> None:
        super().__init__(asked)
        self.count = 0
        self._mark, self._end, self._ends = mark, end, ends
        self._tails = [b"", b""]

    def data_received(self, data: bytes) -> None:
        found = []
        for at, mark in enumerate((self._mark, self._end)):  # which two reads may share
            text = self._tails[at] + data
            self._tails[at] = text[-len(mark) + 1 :]
            found.append(text.count(mark))
        self.count += found[0]
        self._ends -= found[1]
        if self._ends <= 0:
            self.transport.close()


def post(body: dict[str, Any], path: str = "/v1/completions", **headers: str) -> bytes:
    data = json.dumps(ASK | body).encode()
    more = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{more}content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    return head.encode() + data


async def bounded(work: Awaitable[Result]) -> Result:
    """Raises TimeoutError."""
    async with asyncio.timeout(LIMIT_S):
        return await work


async def opened(port: int, reading: Callable[[], Reading]) -> Any:
    return (await asyncio.get_running_loop().create_connection(reading, "127.0.0.1", port))[1]


async def connect(port: int, asked: bytes) -> Reading:
    made: Reading = await opened(port, lambda: Reading(asked))
    return made


# ------------------------------------------------------------------ latency


async def latency(server: Server, streams: int, seconds: float) -> dict[str, Any]:
    """ms from the end of a step on the device to the client's read of its event; the first second is not counted."""
    texts = {text: place for place, text in enumerate(clock_device.words(Path(demo_folder()) / "tokenizer.json"))}
    asked = post({"max_tokens": round(seconds / STEP_S)})
    readings = [await connect(server.port, asked) for _ in range(streams)]
    await asyncio.gather(*(one.over for one in readings))
    waits: list[float] = []
    for one in readings:
        behind = one.came[0][0] + 1_000_000_000
        for now, data in one.came:
            if now >= behind:
                for found in _TEXT.findall(data):
                    if found:
                        waits.append((now // clock_device.TICK_NS - texts[found.decode()]) % len(texts) * clock_device.TICK_NS / 1e9)
    return {"streams": streams, "events": len(waits), "ms": report.spread(waits), "folds_at_ms": len(texts) * clock_device.TICK_NS / 1e6}


# ------------------------------------------------------------------ events


async def events(server: Server, streams: int, seconds: float, carrier: str) -> dict[str, Any]:
    """Rounds of so many streams at once, each read to its end, for about so long."""
    count, used, wall = 0, 0.0, 0.0
    round_ = _over_sse if carrier == "sse" else _over_sockets
    await round_(server, streams, 200)
    while wall < seconds:
        cpu, begun = server.cpu("edge"), time.perf_counter()
        count += await round_(server, streams, ROUND_TOKENS)
        used += server.cpu("edge") - cpu
        wall += time.perf_counter() - begun
    return {
        "carrier": carrier,
        "streams": streams,
        "events": count,
        "events_per_s": count / wall,
        "edge_cores": used / wall,
        "events_per_cpu_s": count / max(used, 1e-9),
    }


async def _over_sse(server: Server, streams: int, tokens: int) -> int:
    asked = post({"max_tokens": tokens})
    readings = [await opened(server.port, lambda: Counting(asked, b"data: {", b"data: [DONE]", 1)) for _ in range(streams)]
    await asyncio.gather(*(one.over for one in readings))
    return sum(one.count for one in readings)


async def _over_sockets(server: Server, streams: int, tokens: int) -> int:
    shares = [len(range(first, streams, SOCKETS)) for first in range(min(SOCKETS, streams))]
    readings = [await opened(server.port, functools.partial(Counting, _SHAKE, b'"seq":', b'"done":true', share)) for share in shares]
    await asyncio.sleep(0.2)  # nothing may be sent before the handshake is answered
    for number in range(streams):
        body = ASK | {"max_tokens": tokens}
        said = json.dumps({"op": "start", "id": str(number), "path": "/v1/completions", "body": body}).encode()
        readings[number % SOCKETS].transport.write(b"\x81\xfe" + len(said).to_bytes(2, "big") + bytes(4) + said)
    await asyncio.gather(*(one.over for one in readings))
    return sum(one.count for one in readings)


# ------------------------------------------------------------------ retained


async def retained(server: Server, streams: int, resumes: int) -> dict[str, Any]:
    """Streams of 500 events, read to their ends; then some of them again, from the middle on, one after the other."""
    await asyncio.sleep(SETTLE_S)
    warm = [await connect(server.port, post({"max_tokens": KEPT_TOKENS})) for _ in range(50)]
    await asyncio.gather(*(one.over for one in warm))
    before = server.memory()
    for first in range(0, streams, 50):
        some = [
            await connect(server.port, post({"max_tokens": KEPT_TOKENS, "retain_s": 300}, x_request_id=f"kept-{number}"))
            for number in range(first, min(first + 50, streams))
        ]
        await asyncio.gather(*(one.over for one in some))
    await asyncio.sleep(SETTLE_S)
    after, kept = server.memory(), await server.metric("penstock_retained_bytes")
    waits = []
    for number in range(resumes):
        begun = time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET /v1/streams/kept-%d HTTP/1.1\r\nhost: x\r\nlast-event-id: %d\r\n\r\n" % (number % streams, KEPT_TOKENS // 2))
        await reader.readuntil(b"id: %d\n" % (KEPT_TOKENS // 2 + 1))
        waits.append(time.perf_counter() - begun)
        writer.close()
    kib = {role: (after[role] - before[role]) * 1024 / streams for role in ("text", "edge")}
    return {"streams": streams, "kib_a_stream": kib, "said_kib_a_stream": kept / 1024 / streams, "resume_ms": report.spread(waits)}


# ------------------------------------------------------------------ stalled


async def _reader(port: int, number: int, gaps: list[float]) -> None:
    """One stream after the other, for ever."""
    while True:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.closing(writer):
            writer.write(post({"max_tokens": 800, "seed": number}))
            last = 0.0
            while line := await reader.readline():
                if line.startswith(b"data: {"):
                    now = time.perf_counter()
                    if last:
                        gaps.append(now - last)
                    last = now


def _stall(port: int, number: int) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", port))
    sock.sendall(post(LONG | {"seed": number}))
    return sock


async def _until(condition: Callable[[], Awaitable[bool]], what: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not await condition():
        if time.monotonic() > end:
            raise OSError(f"{what} did not come within {seconds:.0f} s")
        await asyncio.sleep(0.5)


async def stalled(server: Server, many: int, readers: int, seconds: float) -> list[dict[str, Any]]:
    """The gaps between the events of some streams that are read: alone, beside clients that read nothing, all of them parked, and after these were cut."""
    gaps: list[float] = []
    reading = [asyncio.create_task(_reader(server.port, number, gaps)) for number in range(readers)]
    rows: list[dict[str, Any]] = []

    async def phase(name: str) -> None:
        first = server.memory()
        gaps.clear()
        await asyncio.sleep(seconds)
        used = await server.metric("penstock_kv_blocks", 'state="used"')
        rows.append(
            {
                "phase": name,
                "gaps": len(gaps),
                "ms": report.spread(gaps),
                "mib_first": first,
                "mib_last": server.memory(),
                "kv_blocks": used,
            }
        )

    async def parked() -> bool:
        return await server.metric("penstock_sequences", 'state="parked"') >= many

    async def cut() -> bool:
        return await server.metric("penstock_cancellations_total", 'cause="slow_client"') >= many

    clients: list[socket.socket] = []
    try:
        await asyncio.sleep(SETTLE_S)
        await phase("alone")
        clients = [_stall(server.port, number) for number in range(many)]
        await _until(parked, "the park of all (fewer: --stalled)", PARK_S)
        await asyncio.sleep(SETTLE_S)
        await phase("beside those that stall")
        await _until(cut, "the cut of all", STALL_S + 30)
        await phase("after the cut")
    finally:
        for client in clients:
            client.close()
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)
    return rows


STALLED_FLAGS = ["--stream-park-bytes", "16K", "--park-kv-s", "1", "--stream-stall-s", str(STALL_S), "--max-streams", "100000"]
