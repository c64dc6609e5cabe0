"""`penstock bench footprint`: seconds from process start to the first streamed token, memory of all processes together, idle CPU.

What it is: starts servers and reads /proc (Linux only). What it does not know: load.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from penstock.plugins.commands.bench.client import Client, Record
from penstock.plugins.commands.bench.server import free_port


def tree(pid: int) -> list[int]:
    """A process and its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        here = todo.pop()
        found.append(here)
        todo += children.get(here, [])
    return found


def pss_bytes(pids: list[int]) -> int:
    """Proportional set size: shared pages are divided among those who share them."""
    total = 0
    for pid in pids:
        try:
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
        except OSError:
            continue
    return total


def cpu_seconds(pids: list[int]) -> float:
    ticks = 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


async def first_token(url: str, start: float, timeout_s: float, status: Callable[[], int | None]) -> tuple[float, float]:
    """Seconds since `start` until the server is ready, and until the first streamed token. `status`: its exit status, if it left."""
    client = Client(url)
    while True:
        try:
            if (await client.get("/health/ready"))[0] == 200:
                break
        except OSError:
            pass
        left = status()
        if left is not None:
            raise OSError(f"the server left with status {left} before it was ready")
        if time.perf_counter() - start > timeout_s:
            raise TimeoutError(f"the server was not ready within {timeout_s:.0f} s")
        await asyncio.sleep(0.01)
    ready = time.perf_counter() - start
    client.model, _ = await client.first_model()
    record = await client.complete(Record(scheduled=0), "Hello", 1, start)
    if not record.ok or not record.tokens:
        raise OSError(f"the first request failed: {record.error}")
    return ready, record.tokens[0]


def measure(args: list[str], *, idle_s: float, timeout_s: float = 180.0) -> dict[str, Any]:
    """One start: ready_s, first_token_s, processes, pss_bytes (after the first request), idle_cpu_share of one core."""
    port = free_port()
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "penstock", "serve", *args, "--host", "127.0.0.1", "--port", str(port)],
        stdout=subprocess.DEVNULL,
        env={"PENSTOCK_LOG_LEVEL": "warning", **os.environ},
    )
    try:
        ready, token = asyncio.run(first_token(f"http://127.0.0.1:{port}", start, timeout_s, process.poll))
        pids = tree(process.pid)
        memory = pss_bytes(pids)
        time.sleep(min(1.0, idle_s))
        before, begun = cpu_seconds(pids), time.perf_counter()
        time.sleep(idle_s)
        share = (cpu_seconds(pids) - before) / (time.perf_counter() - begun) if idle_s else None
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            status: int | None = process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait(10)
    return {
        "ready_s": ready,
        "first_token_s": token,
        "processes": len(pids),
        "pss_bytes": memory,
        "idle_cpu_share": share,
        "exit_status": status,
    }
