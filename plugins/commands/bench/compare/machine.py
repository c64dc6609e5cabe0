"""Where a comparison ran.

What it is: `facts`, what a reader of its table has to know of the machine and of this Penstock, as far as it can be found out without starting anything on a device.
What it does not know: servers, figures.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

from penstock import version
from penstock.plugins.devices.host_limits import cores, memory_bytes

TELLING = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16", "sve")
"""Of a processor's flags those that decide which kernels an engine has."""


def facts() -> dict[str, str]:
    """By name, in the order in which a table says them."""
    found = {
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
        "penstock": version.__version__,
        "commit": commit(),
        "processor": processor(_read("/proc/cpuinfo")),
        "cores": str(cores()),
        "memory": f"{memory_bytes() / 2**30:.0f} GiB",
        "card": card(),
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "load before": load(),
    }
    return {name: value for name, value in found.items() if value}


def load() -> str:
    """Of the last minute: of an idle machine near 0."""
    return f"{os.getloadavg()[0]:.1f}"


def commit() -> str:
    """Of the checkout that this package is run from; "" where it is installed from a package. Marked where files differ from it."""
    here = Path(version.__file__).resolve()
    if not _said(["git", "-C", str(here.parent), "ls-files", here.name]):
        return ""
    return _said(["git", "-C", str(here.parent), "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"])


def processor(cpuinfo: str) -> str:
    """Name and telling flags from the text of /proc/cpuinfo."""
    name = re.search(r"(?m)^(?:model name|Model|CPU part)\s*:\s*(.+)$", cpuinfo)
    family = re.search(r"(?m)^cpu family\s*:\s*(\d+)$", cpuinfo)
    flags = re.search(r"(?m)^(?:flags|Features)\s*:\s*(.+)$", cpuinfo)
    has = set(flags.group(1).split()) if flags else set()
    words = [name.group(1).strip() if name else platform.processor() or platform.machine()]
    words += [f"family {family.group(1)}"] if family else []
    words += [", ".join(flag for flag in TELLING if flag in has) or "none of the vector units that engines ask for"] if flags else []
    return "; ".join(words)


def card() -> str:
    """NVIDIA's cards and their driver; "" without one."""
    if shutil.which("nvidia-smi") is None:
        return ""
    return "; ".join(_said(["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]).splitlines())


def _said(command: list[str]) -> str:
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""
    return ""


def _read(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text(encoding="utf-8", errors="replace")
    return ""
