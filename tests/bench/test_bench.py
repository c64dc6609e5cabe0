"""The benchmark's own arithmetic and its client, against a scripted server."""

from __future__ import annotations

import asyncio
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from penstock.plugins.commands.bench import report, workload
from penstock.plugins.commands.bench.client import Client, Record
from penstock.plugins.commands.bench.command import bench


def test_percentiles_interpolate() -> None:
    assert report.percentile([4, 1, 3, 2], 0.5) == 2.5
    assert report.percentile([1], 0.99) == 1
    assert math.isnan(report.percentile([], 0.5))


def test_lengths_are_seeded_and_clipped() -> None:
    a = workload.make(count=200, vocab=1000, seed=3, max_len=300)
    b = workload.make(count=200, vocab=1000, seed=3, max_len=300)
    assert a == b
    assert a != workload.make(count=200, vocab=1000, seed=4, max_len=300)
    assert all(len(r.prompt) + r.output <= 300 and r.output >= 1 for r in a.requests)
    assert all(16 <= t < 1000 for r in a.requests for t in r.prompt)


def test_shared_prefixes_are_shared() -> None:
    load = workload.make(count=6, vocab=500, seed=1, prefix_len=20, prefixes=2, input_len=5)
    heads = [tuple(r.prompt[:20]) for r in load.requests]
    assert heads[0] == heads[2] == heads[4]
    assert heads[1] == heads[3] != heads[0]


def test_fixed_lengths_are_never_cut() -> None:
    exact = workload.make(count=2, vocab=500, seed=1, prefix_len=20, input_len=60, output_len=20, max_len=100)
    assert [(len(r.prompt), r.output) for r in exact.requests] == [(80, 20)] * 2
    for changes in ({"input_len": 61, "output_len": 20}, {"input_len": 80}, {"output_len": 80}):
        with pytest.raises(workload.DoesNotFit, match=r"context is 100"):
            workload.make(count=1, vocab=500, seed=1, prefix_len=20, max_len=100, **changes)
    drawn = workload.make(count=50, vocab=500, seed=1, prefix_len=20, input_len=70, max_len=100)
    assert {len(r.prompt) for r in drawn.requests} == {90}
    assert all(1 <= r.output <= 10 for r in drawn.requests)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("serve --requests 0", "--requests"),
        ("serve --input-len 0", "--input-len"),
        ("serve --output-len -1", "--output-len"),
        ("serve --concurrency 0", "--concurrency"),
        ("serve --request-rate 0", "--request-rate"),
        ("serve -- tiny", "--start"),
        ("throughput --requests 0", "--requests"),
        ("latency --repeats 0", "--repeats"),
        ("latency --requests 5", "--requests"),
        ("latency --prefixes 0", "--prefixes"),
        ("latency --input-len 4090 --output-len 100 -- --kv-cache-memory-bytes 64M", "4190 tokens"),
        ("footprint --repeats 0", "--repeats"),
        ("serve --url ftp://a", "no http(s) URL"),
        ("serve --url http://a\udcff", "--url"),
    ],
)
def test_what_cannot_be_measured_is_refused(line: str, said: str) -> None:
    result = CliRunner().invoke(bench, line.split())
    assert result.exit_code == 2, result.output
    assert said in result.output


def test_a_load_that_does_not_fit_the_servers_context_is_refused() -> None:
    async def inside() -> int:
        server = await asyncio.start_server(models_of_4096, "127.0.0.1", 0)
        port: int = server.sockets[0].getsockname()[1]
        line = f"serve --url http://127.0.0.1:{port} --input-len 4090 --output-len 100 --vocab 300"
        async with server:
            result = await asyncio.to_thread(CliRunner().invoke, bench, line.split())
        assert "4190 tokens" in result.output
        return int(result.exit_code)

    assert asyncio.run(inside()) == 2


async def models_of_4096(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    body = json.dumps({"data": [{"id": "brook", "max_model_len": 4096}]}).encode()
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    await writer.drain()
    writer.close()
    await writer.wait_closed()


def test_every_option_of_latency_does_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(workload, "make", lambda _make=workload.make, **settings: made.append(settings) or _make(**settings))
    line = "latency --batch-size 2 --repeats 1 --input-len 3 --output-len 2 --prefix-len 4 --prefixes 2 --seed 9 --json"
    result = CliRunner().invoke(bench, [*line.split(), str(tmp_path / "out.json"), "--", "--kv-cache-memory-bytes", "64M"])
    assert result.exit_code == 0, result.output
    assert "batch 2, 7 in, 2 out" in result.output
    assert len(made) == 2
    want = {"count": 2, "input_len": 3, "output_len": 2, "prefix_len": 4, "prefixes": 2}
    assert all(want.items() <= settings.items() for settings in made)
    row = json.loads((tmp_path / "out.json").read_text())
    assert row["settings"]["prefixes"] == 2


def test_arrivals_have_the_asked_rate() -> None:
    times = workload.arrivals(4000, 50.0, 1.0, random.Random(5))
    assert times == sorted(times)
    assert 3999 / times[-1] == pytest.approx(50, rel=0.1)
    assert set(workload.arrivals(5, math.inf, 1.0, random.Random(0))) == {0.0}


def record(tokens: list[float], *, sent: float = 0.0, want: int | None = None) -> Record:
    return Record(scheduled=0, sent=sent, done=tokens[-1], tokens=tokens, want=want or len(tokens), status=200, prompt_tokens=10)


def test_summary_counts_failures_and_goodput() -> None:
    fine = record([0.1, 0.2, 0.3])
    slow = record([1.0, 1.5, 2.0])
    failed = Record(scheduled=0, status=500, error="boom", want=3)
    result = report.summarise([fine, slow, failed], 2.0, {"ttft": 500, "itl": 200})
    assert (result["completed"], result["failed"], result["short"]) == (2, 1, 0)
    assert result["output_tokens_per_s"] == 3
    assert result["ttft_ms"]["p50"] == pytest.approx(550)
    assert result["itl_ms"]["std"] == pytest.approx(200)
    assert result["goodput_share"] == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="ttft:MS"):
        report.parse_slo(["first:3"])


def sse(*events: object) -> bytes:
    return b"".join(b"data: " + (e.encode() if isinstance(e, str) else json.dumps(e).encode()) + b"\n\n" for e in events)


async def serve(body: bytes, *, status: int = 200, pieces: int = 7) -> tuple[asyncio.Server, str]:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")).split(b":")[1])
        await reader.readexactly(length)
        writer.write(b"HTTP/1.1 %d X\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n" % status)
        for i in range(0, len(body), pieces):
            part = body[i : i + pieces]
            writer.write(b"%x\r\n%s\r\n" % (len(part), part))
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    return server, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def run(body: bytes, **kwargs: int) -> Record:
    async def go() -> Record:
        server, url = await serve(body, **kwargs)
        async with server:
            return await Client(url, model="m").complete(Record(scheduled=0), [1, 2], 3, 0.0)

    return asyncio.run(go())


@pytest.mark.parametrize("pieces", [1, 5, 4096])
def test_client_counts_tokens_by_ids_or_usage_or_chunks(pieces: int) -> None:
    by_ids = run(
        sse({"choices": [{"text": "é", "token_ids": [1, 2]}]}, {"choices": [{"text": "b", "token_ids": [3]}]}, "[DONE]"), pieces=pieces
    )
    assert by_ids.ok
    assert (len(by_ids.tokens), "".join(by_ids.text)) == (3, "éb")
    usage = {"prompt_tokens": 2, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 1}}
    by_usage = run(sse({"choices": [{"text": "abc"}], "usage": usage}, "[DONE]"), pieces=pieces)
    assert (len(by_usage.tokens), by_usage.cached_tokens) == (3, 1)
    by_chunk = run(sse({"choices": [{"text": "a"}]}, {"choices": [{"text": "b"}]}, "[DONE]"), pieces=pieces)
    assert len(by_chunk.tokens) == 2
    end = {"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 3}}  # one token's text waited for the next one's
    by_end = run(sse({"choices": [{"text": "a"}]}, {"choices": [{"text": "é"}]}, end, "[DONE]"), pieces=pieces)
    assert (len(by_end.tokens), by_end.prompt_tokens) == (3, 2)


def test_client_reports_failures() -> None:
    assert "without [DONE]" in str(run(sse({"choices": [{"text": "a"}]})).error)
    assert "boom" in str(run(sse({"error": {"message": "boom"}})).error)
    assert "makes no sense" in str(run(b"data: {\n\n").error)
    assert "makes no sense" in str(run(b'data: {"choices": 3}\n\n').error)
    refused = run(b'{"error": {"message": "no"}}', status=429)
    assert not refused.ok
    assert "no" in str(refused.error)
