"""Quotas of containers, on made-up trees of control groups, both versions."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from penstock.plugins.devices import host_limits
from penstock.plugins.devices.host_limits import cores, free_bytes, memory_bytes

GiB = 1 << 30
Tree = tuple[Path, Path]


@pytest.fixture(autouse=True)
def big_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 cores and 256 GiB, 100 of them free."""
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 256 * GiB // 4096, "SC_AVPHYS_PAGES": 100 * GiB // 4096}
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)


def tree(root: Path, groups: str, files: dict[str, str]) -> Tree:
    proc, mount = root / "cgroup", root / "fs"
    proc.write_text(groups)
    mount.mkdir()
    for name, text in files.items():
        (mount / name).parent.mkdir(parents=True, exist_ok=True)
        (mount / name).write_text(text)
    return proc, mount


def test_without_limits_or_groups_all_of_the_machine(tmp_path: Path) -> None:
    none = (tmp_path / "no", tmp_path / "no")
    assert (cores(*none), memory_bytes(*none), free_bytes(*none)) == (64, 256 * GiB, 100 * GiB)
    free = tree(tmp_path, "0::/user.slice\n", {"user.slice/cpu.max": "max 100000\n", "user.slice/memory.max": "max\n"})
    assert (cores(*free), memory_bytes(*free), free_bytes(*free)) == (64, 256 * GiB, 100 * GiB)


@pytest.mark.parametrize(
    ("quota", "threads"), [("200000 100000", 2), ("250000 100000", 2), ("50000 100000", 1), ("9900000 100000", 64), ("x y", 64), ("", 64)]
)
def test_version_2_threads(tmp_path: Path, quota: str, threads: int) -> None:
    assert cores(*tree(tmp_path, "0::/\n", {"cpu.max": quota})) == threads


def test_version_2_the_least_limit_of_all_groups_around_holds(tmp_path: Path) -> None:
    files = {
        "pod/cpu.max": "300000 100000",
        "pod/box/cpu.max": "max 100000",
        "pod/memory.max": str(8 * GiB),
        "pod/memory.current": str(6 * GiB),
        "pod/box/memory.max": str(4 * GiB),
        "pod/box/memory.current": str(1 * GiB),
    }
    limits = tree(tmp_path, "0::/pod/box\n", files)
    assert (cores(*limits), memory_bytes(*limits), free_bytes(*limits)) == (3, 4 * GiB, 2 * GiB)


def test_version_2_a_path_that_only_the_host_sees(tmp_path: Path) -> None:
    files = {"cpu.max": "400000 100000", "memory.max": str(GiB), "memory.current": str(2 * GiB)}
    limits = tree(tmp_path, "0::/../../system.slice/docker-abc.scope\n", files)
    assert (cores(*limits), memory_bytes(*limits), free_bytes(*limits)) == (4, GiB, 0)


@pytest.mark.parametrize("place", ["docker/abc/", ""])
def test_version_1(tmp_path: Path, place: str) -> None:
    files = {
        f"cpu,cpuacct/{place}cpu.cfs_quota_us": "150000",
        f"cpu,cpuacct/{place}cpu.cfs_period_us": "50000",
        f"memory/{place}memory.limit_in_bytes": str(2 * GiB),
        f"memory/{place}memory.usage_in_bytes": str(GiB // 2),
    }
    limits = tree(tmp_path, "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n3:freezer:/docker/abc\n0::/\n", files)
    assert (cores(*limits), memory_bytes(*limits), free_bytes(*limits)) == (3, 2 * GiB, 3 * GiB // 2)


def test_version_1_mounted_under_the_names_in_another_order(tmp_path: Path) -> None:
    files = {"cpu,cpuacct/cpu.cfs_quota_us": "100000", "cpu,cpuacct/cpu.cfs_period_us": "100000"}
    assert cores(*tree(tmp_path, "5:cpuacct,cpu:/\n", files)) == 1


@pytest.mark.parametrize("quota", ["100000 0", "0 100000", "1", "a b c"])
def test_what_makes_no_sense_is_no_limit(tmp_path: Path, quota: str) -> None:
    files = {"cpu.max": quota, "memory.max": "lots", "memory.limit_in_bytes": ""}
    limits = tree(tmp_path, "0::/" + "long" * 100 + "\nnonsense\n", files)
    limits[0].write_bytes(limits[0].read_bytes() + b"0::/\xff\n")
    assert (cores(*limits), memory_bytes(*limits), free_bytes(*limits)) == (64, 256 * GiB, 100 * GiB)


def test_a_limit_holds_without_what_is_used(tmp_path: Path) -> None:
    limits = tree(tmp_path, "0::/\n", {"memory.max": str(GiB)})
    assert (memory_bytes(*limits), free_bytes(*limits)) == (GiB, GiB)


def test_version_1_without_limits(tmp_path: Path) -> None:
    files = {
        "cpu/cpu.cfs_quota_us": "-1",
        "cpu/cpu.cfs_period_us": "100000",
        "memory/memory.limit_in_bytes": "9223372036854771712",
        "memory/memory.usage_in_bytes": str(GiB),
    }
    limits = tree(tmp_path, "2:cpu:/\n1:memory:/\n", files)
    assert (cores(*limits), memory_bytes(*limits), free_bytes(*limits)) == (64, 256 * GiB, 100 * GiB)


def test_here_the_limits_are_within_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert 1 <= cores() <= len(os.sched_getaffinity(0))
    assert 0 <= free_bytes() <= memory_bytes() <= host_limits._physical()
