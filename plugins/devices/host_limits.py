"""What of this machine the process may use: cores and memory, with a container's limits.

What it is: CPU affinity and the physical memory, cut down to the quotas of the process's control groups (Linux cgroups, version 2 and 1, see
cgroups(7) and the kernel's admin guide). A server that starts a thread for each of 64 cores under a quota of 2 is throttled most of the time,
and one that counts on the machine's memory is killed.
What it does not know: torch, devices, what the cores and the memory are for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PROC = Path("/proc/self/cgroup")
MOUNT = Path("/sys/fs/cgroup")


def cores(proc: Path = PROC, mount: Path = MOUNT) -> int:
    """How many threads may run at once: the cores of the CPU affinity, at most as many as the quota pays for, at least 1."""
    able = len(os.sched_getaffinity(0))
    shares = [share for folder in _folders("cpu", proc, mount) if (share := _share(folder)) is not None]
    return max(1, min([able, *(int(share) for share in shares)]))


def memory_bytes(proc: Path = PROC, mount: Path = MOUNT) -> int:
    """The machine's memory, or the least limit that holds for this process."""
    return min([_physical(), *(limit for limit, _ in _memory(proc, mount))])


def free_bytes(proc: Path = PROC, mount: Path = MOUNT) -> int:
    """Memory that nobody uses, here and within each limit (what a limit counts includes the page cache)."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return max(0, min([free, *(limit - used for limit, used in _memory(proc, mount))]))


def _physical() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _share(folder: Path) -> float | None:
    """Cores that a group's quota pays for; None: no quota."""
    for words in (_read(folder, "cpu.max").split(), [_read(folder, name) for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")]):
        with suppress(ValueError, ZeroDivisionError):  # "max" and "" are no numbers
            quota, period = (int(word) for word in words)
            return None if quota <= 0 else quota / period
    return None


def _memory(proc: Path, mount: Path) -> Iterator[tuple[int, int]]:
    """(limit, used) of each group that has a limit, in bytes; 0 used where that cannot be read."""
    for folder in _folders("memory", proc, mount):
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            with suppress(ValueError):
                yield int(_read(folder, limit)), int(_read(folder, used) or 0)


def _read(folder: Path, name: str) -> str:
    """ "" for what cannot be read."""
    with suppress(OSError):
        return (folder / name).read_text(encoding="utf-8", errors="surrogateescape").strip()
    return ""


def _folders(controller: str, proc: Path, mount: Path) -> Iterator[Path]:
    """The process's group of a controller and the groups around it, as far as they are mounted here. In a container the path may name
    groups that only the host sees: then the mount's root is the container's own group."""
    for line in _read(proc.parent, proc.name).splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if names and controller not in names.split(","):
            continue
        root = mount
        if names:
            mounts = [Path(entry) for entry in _listed(mount) if controller in entry.split(",")]
            root = mount / mounts[0] if mounts else mount
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            yield root.joinpath(*parts[:depth])


def _listed(folder: Path) -> list[str]:
    with suppress(OSError):
        return sorted(os.listdir(folder))
    return []
