"""The bench of the scheduler's own time: it runs steps as an engine does, with drafts and without, and tells the whole and its parts. No figure is judged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from penstock.plugins.commands.bench.command import bench
from penstock.plugins.commands.bench.machinery import BEHIND, FIRST, KV, OF_DRAFTING, OF_LANDING, OF_SLOTS, SETTLED, Bench, Parts


@pytest.mark.parametrize(("drafts", "depth", "gaps"), [(0, 1, False), (3, 1, False), (3, 2, True)])
def test_steps_are_those_of_an_engine(drafts: int, depth: int, gaps: bool) -> None:
    it = Bench(6, drafts, block=8, depth=depth, steps=40, gaps=gaps)
    for _ in range(SETTLED):
        it.step()
    steps = [it.step() for _ in range(40)]
    assert all(ns > 0 for ns, _, _ in steps)
    assert 0 < sum(kv > 0 for _, kv, _ in steps) <= 40, "some need blocks"
    assert sum(wide for _, _, wide in steps) > 20, "most steps have drafts, where there are any"
    board = it.scheduler._board
    assert board.rows is not None
    assert np.diff(board.rows.slots).tolist() == [1 + gaps] * 5
    known = board.slots.known[board.rows.index] - board.slots.prompt[board.rows.index]
    assert (known.min() > 190) == (known.max() > known.min()) == (drafts > 0), "several tokens a step, not as many for everybody"


def test_parts_are_put_back_and_no_call_is_counted_twice() -> None:
    it = Bench(4, 2, block=8, depth=1, steps=4)
    for _ in range(SETTLED):
        it.step()
    it.parts = parts = Parts(it.scheduler)
    whole, kv, _ = it.step()
    found = parts.end()
    assert set(found) - {KV} <= {
        *OF_DRAFTING.values(),
        *OF_LANDING.values(),
        *OF_SLOTS.values(),
        *BEHIND.values(),
        FIRST,
    }
    assert {"drafts: which were right", "where each token goes", "Sample"} <= set(found)
    assert found.get(KV, 0) >= kv
    assert sum(found.values()) >= whole
    parts.close()
    assert "landed" not in vars(it.scheduler._board.drafting)


def test_the_command_tells_each_number_of_rows_and_drafts(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    arguments = ["--rows", "2", "--rows", "5", "--drafts", "0", "--drafts", "2", "--steps", "30", "--repeats", "2", "--json", str(out)]
    told = CliRunner().invoke(bench, ["machinery", *arguments])
    assert told.exit_code == 0, told.output
    lines = told.output.splitlines()
    assert [cell.strip() for cell in lines[0].strip("|").split("|")[1:]] == [
        f"{rows} rows, {drafts} drafts" for rows in (2, 5) for drafts in (0, 2)
    ]
    assert len({line.count("|") for line in lines[:-1]}) == 1
    results = json.loads(out.read_text())["results"]
    assert [(one["rows"], one["drafts"]) for one in results] == [(2, 0), (2, 2), (5, 0), (5, 2)]
    assert all(0 < one["us"] <= one["median_us"] for one in results)
    assert [any(part.startswith("drafts:") for part in one["parts"]) for one in results] == [False, True, False, True]
