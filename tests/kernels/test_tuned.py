"""The tables of tiles: each names kernels that exist, a user's own comes before the shipped one, no file can stop a start, and a card without any is told."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from penstock.kernels import gpu, tables
from penstock.plugins.devices import cuda
from penstock.plugins.devices.loading import fingerprint

TABLES = tables.shipped()
NOTHING = tables.Identity("NVIDIA Nothing 9000", 24, 500)
TILE = {"BLOCK_N": 128, "BLOCK_K": 64, "TARGET": 48, "MAX_SPLITS": 2, "num_warps": 4, "num_stages": 2}


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """card(name or identity): as if this machine had it, with an empty cache."""
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path))
    monkeypatch.delenv(tables.VARIABLE, raising=False)

    def named(identity: str | tables.Identity) -> None:
        gpu.forget_tables()
        found = identity if isinstance(identity, tables.Identity) else tables.Identity(identity, 132, 3400)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: found.name)
        monkeypatch.setattr(tables, "identity", lambda: found)

    yield named
    gpu.forget_tables()


def written(path: Path, identity: tables.Identity = NOTHING, tiles: Any = None, **facts: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tables.write(path, identity, {"linear.skinny": TILE} if tiles is None else tiles, facts)
    return path


@pytest.mark.parametrize("device", TABLES)
def test_tables_name_kernels_of_the_default_one(device: str) -> None:
    assert set(TABLES[device]) <= set(TABLES["default"])
    assert [found for section, tile in TABLES[device].items() if (found := tables.wrong_tile(section, tile))] == []


@pytest.mark.parametrize(("name", "key"), [("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"), ("NVIDIA H200", "nvidia-h200")])
def test_a_card_has_its_own(card: Any, name: str, key: str) -> None:
    card(name)
    assert gpu.without_table() is None
    for kernel, default in TABLES["default"].items():
        assert gpu.tuned(kernel) == {**default, **TABLES[key].get(kernel, {})}


def test_a_card_without_one_is_told(card: Any, caplog: pytest.LogCaptureFixture) -> None:
    card(NOTHING)
    assert gpu.without_table() == NOTHING.name
    assert gpu.tuned("linear.skinny") == TABLES["default"]["linear.skinny"]
    cuda.say_tables()
    assert "NVIDIA Nothing 9000 has no tiles of its own" in caplog.text
    assert "`penstock tune`" in caplog.text


def test_no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu.forget_tables()
    assert gpu.without_table() is None
    assert tables.own() == tables.Own()


def test_the_users_own_comes_first_section_by_section(card: Any, caplog: pytest.LogCaptureFixture) -> None:
    card("NVIDIA H200")
    own = tables.Identity("NVIDIA H200", 132, 3400)
    written(tables.own_path(own), own, penstock="0.0.1", triton=tables.triton_version())
    assert gpu.tuned("linear.skinny") == {**TABLES["default"]["linear.skinny"], **TABLES["nvidia-h200"]["linear.skinny"], **TILE}
    assert gpu.tuned("rmsnorm") == TABLES["nvidia-h200"]["rmsnorm"]
    with caplog.at_level(logging.INFO, "penstock.cuda"):
        cuda.say_tables()
    assert f"tiles of {tables.own_path(own)}: linear.skinny" in caplog.text
    assert "measured with Penstock 0.0.1, not" in caplog.text
    assert "Triton" not in caplog.text
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_card_whose_own_table_found_nothing_better_is_not_told_again(card: Any, caplog: pytest.LogCaptureFixture) -> None:
    card(NOTHING)
    written(tables.own_path(NOTHING), tiles={})
    assert gpu.without_table() is None
    cuda.say_tables()
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_the_fingerprint_knows_the_users_own(card: Any) -> None:
    gpu_device, host = torch.device("cuda"), torch.device("cpu")
    card(NOTHING)
    shipped = fingerprint("a", *cuda.own_tiles(gpu_device))
    assert shipped == fingerprint("a")
    card(NOTHING)
    written(tables.own_path(NOTHING))
    first = fingerprint("a", *cuda.own_tiles(gpu_device))
    assert cuda.own_tiles(host) == []
    card(NOTHING)
    written(tables.own_path(NOTHING), tiles={"linear.skinny": {**TILE, "BLOCK_N": 64}}, date="another day")
    assert len({shipped, first, fingerprint("a", *cuda.own_tiles(gpu_device))}) == 3
    card(NOTHING)
    written(tables.own_path(NOTHING), date="another day")
    assert fingerprint("a", *cuda.own_tiles(gpu_device)) == first


DAMAGED: dict[str, tuple[bytes, str]] = {
    "nothing in it": (b"", "no JSON"),
    "cut off": (b'{"format": 1, "tiles": {"linear', "no JSON"),
    "not UTF-8": (b"\xff\xfe\x00", "no JSON"),
    "nested": (b"[" * 100_000, "no JSON"),
    "a list": (b"[]", "format None, not 1"),
    "a later format": (b'{"format": 2, "tiles": {}}', "format 2, not 1"),
    "no tiles": (b'{"format": 1}', "it has no tiles"),
    "another kernel": (b'{"format": 1, "tiles": {"linear.fat": {"BLOCK_N": 64}}}', "linear.fat: no kernel of this version has that name"),
    "another number": (b'{"format": 1, "tiles": {"rmsnorm": {"WIDTH": 64}}}', "rmsnorm: 'WIDTH' is no number of its tiles (num_warps)"),
    "a text": (b'{"format": 1, "tiles": {"rmsnorm": {"num_warps": "4"}}}', "num_warps must be a whole number"),
    "a truth": (b'{"format": 1, "tiles": {"rmsnorm": {"num_warps": true}}}', "num_warps must be a whole number"),
    "too much": (b'{"format": 1, "tiles": {"linear.skinny": {"TARGET": 99999999999}}}', "TARGET must be a whole number from 0 to 1048576"),
    "three warps": (b'{"format": 1, "tiles": {"rmsnorm": {"num_warps": 3}}}', "num_warps must be a power of two"),
    "an odd block": (b'{"format": 1, "tiles": {"linear.skinny": {"BLOCK_N": 48}}}', "BLOCK_N must be a power of two"),
    "an empty tile": (b'{"format": 1, "tiles": {"rmsnorm": {}}}', "a tile is a table of numbers"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_table_is_a_warning_with_its_name(card: Any, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    card("NVIDIA H200")
    path = tables.own_path(tables.Identity("NVIDIA H200", 132, 3400))
    path.parent.mkdir()
    path.write_bytes(DAMAGED[kind][0])
    assert gpu.tuned("rmsnorm") == TABLES["nvidia-h200"]["rmsnorm"]
    cuda.say_tables()
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert str(path) in warning
    assert DAMAGED[kind][1] in warning
    assert "`penstock tune`, or delete it" in warning


@pytest.mark.parametrize(
    "other", [NOTHING._replace(processors=12), NOTHING._replace(memory_gb_s=900), NOTHING._replace(name="NVIDIA Else")]
)
def test_a_table_of_another_card_is_not_taken(card: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: tables.Identity) -> None:
    card(NOTHING)
    monkeypatch.setenv(tables.VARIABLE, str(written(tmp_path / "mine.json", other)))
    assert tables.own().table is None
    assert "another card" in (tables.own().problem or "")
    assert gpu.without_table() == NOTHING.name


def test_a_variable_names_the_table(card: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card(NOTHING)
    written(tables.own_path(NOTHING), tiles={"rmsnorm": {"num_warps": 2}})
    monkeypatch.setenv(tables.VARIABLE, str(written(tmp_path / "mine.json")))
    assert set(tables.own().tiles) == {"linear.skinny"}
    card(NOTHING)
    monkeypatch.setenv(tables.VARIABLE, tables.SHIPPED)
    assert tables.own() == tables.Own()
    card(NOTHING)
    monkeypatch.setenv(tables.VARIABLE, str(tmp_path / "none.json"))
    assert "there is no such file" in (tables.own().problem or "")
    card(NOTHING)
    monkeypatch.setenv(tables.VARIABLE, str(tmp_path))
    assert "cannot be read" in (tables.own().problem or "")


def test_a_table_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "one.json", date="2026-01-02")
    assert tables.read(path, NOTHING) == tables.Table(
        path, {"linear.skinny": TILE}, {"format": 1, "device": NOTHING._asdict(), "date": "2026-01-02"}
    )
    before = path.read_bytes()
    with pytest.raises(TypeError):
        written(path, date=object())
    monkeypatch.setattr(tables.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        written(path, tiles={})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["one.json"]


def test_an_identity_has_what_no_driver_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Facts:
        name, multi_processor_count, memory_clock_rate, memory_bus_width = "NVIDIA H100 80GB HBM3", 132, 2_619_000, 5120

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Facts)
    assert tables.identity() == ("NVIDIA H100 80GB HBM3", 132, 3400)
    found = tables.identity()
    assert found is not None
    assert found.key == "nvidia-h100-80gb-hbm3-132-3400"
    assert tables.Identity("A/B ../c", 1, 0).key == "a-b-..-c-1-0"  # no folder of another name
    del Facts.memory_clock_rate
    assert tables.identity() == ("NVIDIA H100 80GB HBM3", 132, 0)


@pytest.mark.parametrize(("value", "wanted"), [(0, 0), (0.4, 0), (7, 7), (96, 96), (936, 940), (3352.3, 3400), (4915, 4900), (8000, 8000)])
def test_two_digits(value: float, wanted: int) -> None:
    assert tables.two_digits(value) == wanted


def test_tiles_that_are_tried_stand_before_all_tables(card: Any) -> None:
    card("NVIDIA H200")
    usual = gpu.tuned("rmsnorm")
    with gpu.trying({"rmsnorm": {"num_warps": 2}}):
        assert gpu.tuned("rmsnorm") == {"num_warps": 2}
        with gpu.trying({"gated": {"BLOCK": 64}}):
            assert gpu.tuned("rmsnorm") == {"num_warps": 2}
            assert gpu.tuned("gated") == {"BLOCK": 64}
        assert gpu.tuned("gated") == TABLES["nvidia-h200"]["gated"]
    assert gpu.tuned("rmsnorm") == usual


def test_the_file_is_json_for_people(tmp_path: Path) -> None:
    facts = json.loads(written(tmp_path / "one.json").read_text())
    assert list(facts) == ["format", "device", "tiles"]
