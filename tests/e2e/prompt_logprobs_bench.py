"""What one client's prompt log-probabilities cost those who decode beside it: `python tests/e2e/prompt_logprobs_bench.py [URL] [rounds]`.

What it is: four streams decode on a server that runs already, while another client sends a prompt of random tokens, plain or with log-probabilities; the
longest gap between two events of the streams, and that over the plain prompt's of the same round. The figures of docs/benchmarks/serving.md come from here.
What it does not know: what the server is made of.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
import time
from typing import Any

import httpx

STREAMS, PROMPT = 4, 3500
CASES: dict[str, dict[str, Any]] = {"plain": {}, "prompt_logprobs 0": {"prompt_logprobs": 0}, "prompt_logprobs 20": {"prompt_logprobs": 20}}


def ids(count: int) -> list[int]:
    return [random.randrange(20, 4000) for _ in range(count)]


async def decode(http: httpx.AsyncClient, gaps: list[float]) -> None:
    body = {"prompt": ids(20), "max_tokens": 4000, "stream": True, "ignore_eos": True, "temperature": 0}
    while True:
        last = 0.0
        async with http.stream("POST", "/v1/completions", json=body) as reply:
            async for line in reply.aiter_lines():
                if line.startswith("data:"):
                    now = time.perf_counter()
                    if last:
                        gaps.append(now - last)
                    last = now


async def longest_gap(http: httpx.AsyncClient, url: str, extra: dict[str, Any]) -> float:
    gaps: list[float] = []
    streams = [asyncio.create_task(decode(http, gaps)) for _ in range(STREAMS)]
    await asyncio.sleep(1.0)
    gaps.clear()
    # The other client is a process of its own: it reads megabytes, which would hold up the streams' clock.
    command = ["curl", "-sf", "-o", "/dev/null", "-H", "content-type: application/json", "-d", "@-", f"{url}/v1/completions"]
    client = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.PIPE)
    await client.communicate(json.dumps({"prompt": ids(PROMPT), "max_tokens": 1, "temperature": 0, **extra}).encode())
    await asyncio.sleep(0.3)
    if client.returncode:
        raise SystemExit(f"curl ended with {client.returncode}")
    found = max(gaps)
    for stream in streams:
        stream.cancel()
    await asyncio.gather(*streams, return_exceptions=True)
    return found


async def main(url: str, rounds: int) -> None:
    found: dict[str, list[float]] = {name: [] for name in CASES}
    async with httpx.AsyncClient(base_url=url, timeout=300) as http:
        for number in range(rounds):
            for name in list(CASES) if number % 2 == 0 else list(reversed(CASES)):
                found[name].append(await longest_gap(http, url, CASES[name]))
    for name, gaps in found.items():
        ratios = [mine / plain for mine, plain in zip(gaps, found["plain"], strict=True)]
        print(f"{name:20s} longest gap {statistics.median(gaps) * 1e3:6.0f} ms, over plain's {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000", int(sys.argv[2]) if len(sys.argv) > 2 else 5))
