"""The bench of drafts with known answers: a model of a shape says what follows, its drafters are wrong as often as they should be, and everything is told."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from penstock import LLM, SamplingParams
from penstock.core.actors.scheduler.widths import Widths
from penstock.plugins.commands.bench import known
from penstock.plugins.commands.bench.command import bench
from penstock.plugins.commands.bench.speculation import in_turn

SHAPE = {"vocab_size": 700, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
DRAFT = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}


@pytest.fixture
def shape(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """As "small", but smaller."""
    its = known.shape_of("small", **SHAPE, num_key_value_heads=1)
    monkeypatch.setitem(known.SHAPES, "small", its)
    monkeypatch.setattr(known, "CIRCLE", 400)
    monkeypatch.setattr(known, "DRAFT", DRAFT)
    return its


def test_nobody_is_always_first_or_last() -> None:
    names = ["off", "ngram", "suffix"]
    orders = [in_turn(names, turn) for turn in range(6)]
    for place in range(3):
        assert sorted(order[place] for order in orders) == sorted(2 * names)
    assert len({tuple(order) for order in orders}) == 6


def test_prompts_hold_as_much_of_the_answer_as_the_case_says(shape: dict[str, Any]) -> None:
    def held(case: str) -> float:
        shares = []
        for prompt, answer in known.prompts(shape, case, 3, 80):
            pairs = set(itertools.pairwise(prompt))
            shares.append(np.mean([pair in pairs for pair in itertools.pairwise(answer)]))
        return float(np.mean(shares))

    assert held("edits") > held("rewrites") > 0.7
    assert held("copies nothing") == 0.0
    assert 0.2 < held("misleads") < 0.4
    assert known.prompts(shape, "edits", 1, 80) == known.prompts(shape, "edits", 1, 80)
    assert known.prompts(shape, "edits", 1, 80) != known.prompts(shape, "edits", 1, 80, seed=1)


def test_answers_are_known_and_drafters_lie_as_often_as_they_should(
    shape: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = known.known_model(tmp_path, shape)
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    seen: list[list[int]] = []
    monkeypatch.setattr(Widths, "choose", lambda self, rows: min(3, self.most(rows)))
    monkeypatch.setattr(Widths, "verified", lambda self, width, accepted: seen.append(list(accepted)))
    for method in known.METHODS:
        seen.clear()
        config = json.dumps({"method": method, "model": known.known_drafter(tmp_path, shape, method)})
        with LLM(folder, kv_cache_memory_bytes=8 << 20, max_num_seqs=4, speculative_config=config) as engine:
            given = known.prompts(shape, "copies nothing", 3, 60)
            said = engine.generate(prompt_token_ids=[prompt for prompt, _ in given], sampling_params=params)
        assert [list(one.outputs[0].token_ids) for one in said] == [answer for _, answer in given]
        reached, first = (sum(accepted[place] for accepted in seen) for place in (0, 1))
        assert 0.5 < first / reached < 0.95, method


def test_the_command_tells_each_case(shape: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    arguments = ["--shape", "small", "--turns", "1", "--output-len", "24", "--rows", "1", "--rows", "3", "--json", str(out)]
    configs = ["--config", '{"method": "ngram"}', "--config", '{"method": "medusa", "model": "known"}', "--config", "{}"]
    told = CliRunner().invoke(bench, ["speculation", *arguments, *configs, "--case", "edits", "--case", "copies nothing"])
    assert told.exit_code == 0, told.output
    assert told.output.count("tokens/s") == 16
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["settings"]["rows"] for row in rows] == [1, 3]
    assert set(rows[0]["off"]) == set(rows[0]["{}"]) == {"edits", "copies nothing"}
    wrong = CliRunner().invoke(bench, ["speculation", "--shape", "small", "--case", "none"])
    assert wrong.exit_code == 2
    assert "copies nothing" in wrong.output
