"""The benchmark of grammars: what it makes is what it says, and its figures add up."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema_rs
from click.testing import CliRunner

from penstock.plugins.commands.bench.command import bench
from penstock.plugins.commands.bench.grammars import FILLS
from penstock.plugins.commands.bench.schemas import KINDS, generated, suite
from penstock.plugins.grammars.llguidance import LlGuidance

BYTES = LlGuidance([bytes([byte]) for byte in range(256)], [])


def test_every_schema_is_taken_and_its_answer_obeys() -> None:
    made = list(generated(64, 3))
    assert made == list(generated(64, 3))
    assert made != list(generated(64, 4))
    assert {kind for kind, _, _ in made} == set(KINDS)
    assert len({schema for _, schema, _ in made}) > 55
    for _, schema, answer in made:
        assert jsonschema_rs.validator_for(json.loads(schema), validate_formats=True, offline=True).is_valid(json.loads(answer))
        matcher = BYTES.matcher(BYTES.compile("json", schema))
        assert all(matcher.consume(byte) for byte in answer.encode())
        assert matcher.may_end()


def test_cases_of_the_suite(tmp_path: Path) -> None:
    (tmp_path / "draft7").mkdir()
    cases = [
        {
            "schema": {"type": "integer"},
            "tests": [{"data": 1, "valid": True}, {"data": 123, "valid": True}, {"data": "long text", "valid": False}],
        },
        {"schema": {"enum": [1]}, "tests": [{"data": 2, "valid": False}]},
        {"schema": True, "tests": [{"data": 2, "valid": True}]},
    ]
    (tmp_path / "draft7" / "some.json").write_text(json.dumps(cases))
    [(kind, schema, answer)] = suite(tmp_path)
    assert (kind, json.loads(schema)["type"], answer) == ("suite", "integer", "123")


def test_no_answer_fills_the_schema_of_the_turns() -> None:
    matcher = BYTES.matcher(BYTES.compile("json", json.dumps(FILLS)))
    assert all(matcher.consume(byte) for byte in json.dumps([{"name": "Anna", "age": 5}] * 50)[:-1].encode())
    assert not matcher.may_end()
    assert not matcher.consume(ord("]"))


def test_the_command(tmp_path: Path) -> None:
    kept = tmp_path / "figures.json"
    result = CliRunner().invoke(bench, ["grammars", "--schemas", "8", "--json", str(kept)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    row = json.loads(kept.read_text())
    assert row["schemas"] == sum(row["kinds"].values()) == 8
    assert row["vocabulary"] == 4096
    assert row["masks"] > 8
    assert 0 < row["mask_us"]["p50"] <= row["mask_us"]["p99"] <= row["mask_us"]["max"]
    assert row["first_mask_ms"]["p50"] > row["compile_ms"]["p50"] > 0
