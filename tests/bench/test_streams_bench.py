"""`penstock bench streams`: its clock tells the time, its counts are right however bytes come, and its figures come from a real server."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from penstock.core.protocol.model_folder import demo_folder
from penstock.plugins.commands.bench import clock_device, streams
from penstock.plugins.commands.bench.command import bench


def test_each_word_of_the_clock_is_one_token_and_plain_in_json() -> None:
    found = clock_device.words(Path(demo_folder()) / "tokenizer.json")
    assert len(found) > 2000, "the clock goes round in a tenth of a second at least"
    assert len(set(found.values())) == len(found)
    for text in found:
        assert json.dumps(text) == f'"{text}"'


def test_ticks_go_round() -> None:
    first = time.monotonic_ns() // clock_device.TICK_NS
    assert clock_device.ticks(1 << 60) - first < 20_000
    assert 0 <= clock_device.ticks(7) < 7


def test_marks_are_counted_wherever_reads_end() -> None:
    text = b'"seq":1 "seq":2 "seq":3 "done":true "seq":4 "done":true'

    async def counted(size: int) -> tuple[int, bool]:
        closed: list[bool] = []

        class Transport:
            def write(self, _: bytes) -> None: ...

            def close(self) -> None:
                closed.append(True)

        one = streams.Counting(b"", b'"seq":', b'"done":true', 2)
        one.connection_made(Transport())  # type: ignore[arg-type]
        for first in range(0, len(text), size):
            assert not closed
            one.data_received(text[first : first + size])
        return one.count, bool(closed)

    for size in range(1, len(text) + 1):
        assert asyncio.run(counted(size)) == (4, True)


def figures(tmp_path: Path, *args: str) -> dict[str, list[dict[str, Any]]]:
    kept = tmp_path / "figures.json"
    result = CliRunner().invoke(bench, ["streams", "--json", str(kept), *args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    return {row["bench"]: row["rows"] for row in rows}


def test_a_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "ROUND_TOKENS", 300)
    found = figures(tmp_path, "--case", "latency", "--case", "events", "--streams", "3", "--edges", "2", "--seconds", "1.5")
    (row,) = found["streams-latency"]
    assert row["streams"] == 3
    assert row["events"] > 3 * 10
    assert 0 <= row["ms"]["p50"] <= row["folds_at_ms"]
    assert [row["carrier"] for row in found["streams-events"]] == ["sse", "websocket"]
    for row in found["streams-events"]:
        assert row["events"] % (64 * (streams.ROUND_TOKENS + 1)) == 0, "an event a token, and one for the end"
        assert row["edge_cores"] > 0


@pytest.mark.slow
def test_streams_that_are_kept_and_clients_that_stall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--stream-park-bytes", "16K", "--park-kv-s", "0.3", "--stream-stall-s", "8"]
    monkeypatch.setattr(streams, "STALLED_FLAGS", flags)
    given = ("--kept", "4", "--stalled", "5", "--readers", "2", "--seconds", "1.5")
    found = figures(tmp_path, "--case", "retained", "--case", "stalled", *given)
    (row,) = found["streams-retained"]
    assert row["said_kib_a_stream"] > 500 * 100 / 1024
    assert row["resume_ms"]["p50"] > 0
    rows = found["streams-stalled"]
    assert [row["phase"] for row in rows] == ["alone", "beside those that stall", "after the cut"]
    assert all(row["gaps"] > 50 for row in rows)
