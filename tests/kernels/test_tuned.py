"""The tables of tiles: each names kernels that exist, and a card without one is told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from penstock.kernels import gpu

TABLES: dict[str, dict[str, dict[str, int]]] = json.loads(gpu.TUNED.read_text())


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """card(name): as if this machine had it."""

    def forget() -> None:
        gpu.device_key.cache_clear()
        gpu.tuned.cache_clear()

    def named(name: str) -> None:
        forget()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)

    yield named
    forget()


@pytest.mark.parametrize("device", TABLES)
def test_tables_name_kernels_of_the_default_one(device: str) -> None:
    assert set(TABLES[device]) <= set(TABLES["default"])
    assert all(type(value) is int and value >= 0 for tile in TABLES[device].values() for value in tile.values())


@pytest.mark.parametrize(("name", "key"), [("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"), ("NVIDIA H200", "nvidia-h200")])
def test_a_card_has_its_own(card: Any, name: str, key: str) -> None:
    card(name)
    assert gpu.without_table() is None
    for kernel, default in TABLES["default"].items():
        assert gpu.tuned(kernel) == {**default, **TABLES[key].get(kernel, {})}


def test_a_card_without_one_is_told(card: Any) -> None:
    card("NVIDIA Nothing 9000")
    assert gpu.without_table() == "NVIDIA Nothing 9000"
    assert gpu.tuned("linear.skinny") == TABLES["default"]["linear.skinny"]


def test_no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.without_table() is None
