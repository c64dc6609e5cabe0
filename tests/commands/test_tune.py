"""`penstock tune` on a made-up card with made-up times: what is written, shown and said, and what happens without a card, time, or room on the disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from click.testing import CliRunner, Result

pytest.importorskip("triton")
from penstock.kernels import gpu, tables
from penstock.kernels.tuning import stand
from penstock.kernels.tuning.search import Lost, Tiles, key_of
from penstock.kernels.tuning.section import SHAPES, Card, Shape
from penstock.plugins.commands.tune import report
from penstock.plugins.commands.tune.command import tune
from penstock.plugins.commands.tune.shapes import shape_of

CARD = tables.Identity("NVIDIA Nothing 9000", 24, 500)
BROOK = Path(__file__).resolve().parents[2] / "plugins" / "demo_model" / "brook"


class FakeStand:
    """A candidate takes as long as its number of warps says: 4 are the fastest; 2 are wrong."""

    on_check: ClassVar[Callable[[str, Tiles], None]] = staticmethod(lambda section, candidate: None)
    seen: ClassVar[list[tuple[str, list[Shape], Tiles]]] = []

    def __init__(self, section: Any, shapes: Sequence[Shape], room: object, present: Tiles, others: Tiles) -> None:
        self.section, self.loads = section.name, ["few", "many"]
        self.other_bits: set[str] = (
            {key_of({section.name: {**present[section.name], "num_warps": 4}})} if section.name == "rmsnorm" else set()
        )
        FakeStand.seen.append((section.name, list(shapes), dict(others)))

    def prepare(self, candidates: Sequence[Tiles]) -> None:
        """Nothing to compile."""

    def check(self, candidate: Tiles) -> str | None:
        FakeStand.on_check(self.section, candidate)
        return "wrong" if candidate[self.section]["num_warps"] == 2 else None

    def time(self, candidate: Tiles, load: int) -> float:
        return 1e-5 * {4: 1.0, 8: 1.25}.get(candidate[self.section]["num_warps"], 2.0)

    def close(self) -> None:
        """Nothing to give back."""


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A machine with one; its table's file."""
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(tables.VARIABLE, raising=False)
    monkeypatch.setattr(FakeStand, "on_check", staticmethod(lambda section, candidate: None))
    FakeStand.seen = []
    for name, value in {"is_available": True, "device_count": 1, "current_device": 0, "mem_get_info": (8, 8)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    for name in ("empty_cache", "set_device"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: CARD.name)
    monkeypatch.setattr(tables, "identity", lambda: CARD)
    monkeypatch.setattr(stand, "card_of", lambda device: Card(24, False, False))
    monkeypatch.setattr(stand, "room_of", lambda device: None)
    monkeypatch.setattr(stand, "DeviceStand", FakeStand)
    gpu.forget_tables()
    yield tables.own_path(CARD)
    gpu.forget_tables()


def run(*words: str, status: int = 0) -> Result:
    gpu.forget_tables()
    result = CliRunner().invoke(tune, list(words))
    assert result.exit_code == status, result.output
    return result


def test_what_is_found_is_kept_and_used_from_then_on(card: Path) -> None:
    assert gpu.tuned("rmsnorm") == {"num_warps": 8}
    result = run("--sections", "rmsnorm,gated", "--model", "8B")
    facts = json.loads(card.read_text())
    assert facts["format"] == 1
    assert facts["device"] == CARD._asdict()
    assert facts["triton"] == tables.triton_version() != ""
    assert facts["tiles"] == {"rmsnorm": {"num_warps": 4}, "gated": {"BLOCK": 4096, "num_warps": 4}}
    assert facts["measured"]["rmsnorm"] == {
        "before_us": {"few": 12.5, "many": 12.5}, "after_us": {"few": 10.0, "many": 10.0}, "tried": 2, "wrong": 1, "whole": True
    }  # fmt: skip
    assert "rmsnorm: new -20.0% (2 timed, 1 wrong)" in result.stderr
    assert "2 of 2 sections have new tiles: rmsnorm, gated" in result.stderr
    assert "answers may differ, and system_fingerprint says so" in result.stderr
    assert "Servers use it from their next start on" in result.stderr
    assert "new, other bits" in result.stdout
    gpu.forget_tables()
    assert gpu.tuned("rmsnorm") == {"num_warps": 4}
    assert gpu.without_table() is None
    assert FakeStand.seen == [("rmsnorm", [SHAPES["8b"]], {}), ("gated", [SHAPES["8b"]], {"rmsnorm": {"num_warps": 4}})]


def test_a_second_run_begins_where_the_first_ended_and_improves_on_it(card: Path) -> None:
    run("--sections", "rmsnorm")
    assert {name for name, _, _ in FakeStand.seen} == {"rmsnorm"}
    assert [shape.name for shape in FakeStand.seen[0][1]] == ["1B", "8B"]
    result = run("--sections", "rmsnorm,gated", "--json")
    assert [name for name, _, _ in FakeStand.seen] == ["rmsnorm", "gated", "rmsnorm"]
    facts = json.loads(result.stdout)
    assert facts == json.loads(card.read_text())
    assert set(facts["tiles"]) == {"rmsnorm", "gated"}
    assert facts["measured"]["rmsnorm"]["before_us"] == {"few": 10.0, "many": 10.0}
    assert "1 of 2 sections have new tiles: gated" in result.stderr
    assert "system_fingerprint" not in result.stderr


def test_an_interrupt_keeps_what_is_known(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(section: str, candidate: Tiles) -> None:
        if section == "gated":
            raise KeyboardInterrupt

    monkeypatch.setattr(FakeStand, "on_check", staticmethod(interrupt))
    result = run("--sections", "rmsnorm,gated", status=130)
    assert "Interrupted: what is known is kept." in result.stderr
    assert json.loads(card.read_text())["tiles"] == {"rmsnorm": {"num_warps": 4}}


def test_a_dead_card_keeps_what_is_known_and_says_what_to_leave_out(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dead(section: str, candidate: Tiles) -> None:
        if section == "gated":
            raise Lost("gated with 16 warps: illegal memory access")

    monkeypatch.setattr(FakeStand, "on_check", staticmethod(dead))
    result = run("--sections", "rmsnorm,gated", status=1)
    assert "gave up under a candidate" in result.stderr
    assert "gated with 16 warps: illegal memory access" in result.stderr
    assert json.loads(card.read_text())["tiles"] == {"rmsnorm": {"num_warps": 4}}


def test_out_names_another_file(card: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "mine.json"
    result = run("--sections", "rmsnorm", "--out", str(out))
    assert f"Servers use it where PENSTOCK_TILES={out} is set." in result.stderr
    assert not card.exists()
    monkeypatch.setenv(tables.VARIABLE, str(out))
    result = run("--sections", "gated")
    assert set(json.loads(out.read_text())["tiles"]) == {"rmsnorm", "gated"}
    assert "from their next start on" in result.stderr
    (tmp_path / "no").write_text("")
    result = run("--sections", "gated", "--out", str(tmp_path / "no" / "where.json"), status=1)
    assert "cannot be written" in result.stderr
    assert "Name another file with --out" in result.stderr


def test_a_cache_that_others_can_write_is_not_used(card: Path) -> None:
    card.parent.mkdir(parents=True)
    card.parent.chmod(0o777)
    result = run("--sections", "rmsnorm", status=1)
    assert "PENSTOCK_CACHE" in result.stderr
    assert FakeStand.seen == []


def test_a_damaged_table_is_said_and_made_anew(card: Path) -> None:
    card.parent.mkdir(parents=True)
    card.write_text("{")
    result = run("--sections", "rmsnorm")
    assert f"{card} is damaged" in result.stderr
    assert json.loads(card.read_text())["tiles"] == {"rmsnorm": {"num_warps": 4}}


def test_no_time_is_no_result(card: Path) -> None:
    result = run("--sections", "rmsnorm,gated", "--limit-s", "0.000001")
    assert "Not measured: rmsnorm, gated" in result.stderr
    assert json.loads(card.read_text())["tiles"] == {}


def test_a_dry_run_writes_nothing(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("--dry-run", "--sections", "linear,rmsnorm", "--limit-s", "5", "--model", str(BROOK))
    assert "linear.invariant.small" in result.stdout
    assert "brook, rows 16" in result.stdout
    assert "NVIDIA Nothing 9000, 24 processors, 500 GB/s" in result.stdout
    assert "More than --limit-s 5" in result.stdout
    assert (card.exists(), FakeStand.seen) == (False, [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(tables, "identity", lambda: None)
    assert "rmsnorm" in run("--dry-run").stdout
    assert "There is no GPU" in run(status=1).stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--sections", "linear.fat"), "--sections linear.fat: there is none of that name. There are all, linear.skinny,"),
        (("--model", "90B"), "--model 90B: there is no such folder, and the built-in sizes are 1b, 8b"),
        (("--device", "3"), "--device 3: CUDA shows 1 GPUs, counted from 0"),
        (("--limit-s", "0"), "--limit-s"),
    ],
)
def test_wrong_words_are_named(words: tuple[str, ...], said: str) -> None:
    assert said in " ".join(run(*words, status=2).stderr.split())


def test_a_models_shape_is_read(tmp_path: Path) -> None:
    shape, narrow = shape_of(BROOK)
    config = json.loads((BROOK / "config.json").read_text())
    assert (shape.name, shape.hidden, shape.inner, shape.vocab) == (
        "brook",
        config["hidden_size"],
        config["intermediate_size"],
        config["vocab_size"],
    )
    assert not narrow
    other = tmp_path / "narrow"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    assert shape_of(other)[1]


def test_a_card_that_is_shared_is_said() -> None:
    said: list[str] = []
    report.crowd(said.append, 3 << 30)
    report.crowd(said.append, 100 << 20)
    assert [text.split(" of")[0] for text in said] == ["3072 MiB"]
