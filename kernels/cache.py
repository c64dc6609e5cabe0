"""The user's cache folder of what this machine made once: compiled C kernels, tuned tiles.

What it is: `directory(name)`: a folder in $PENSTOCK_CACHE, else in $XDG_CACHE_HOME/penstock or ~/.cache/penstock, if only this user can write it.
What it does not know: what lies there.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path


def root() -> Path:
    """Where the cache is, whether or not it exists."""
    base = os.environ.get("PENSTOCK_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "penstock"


def directory(name: str) -> Path | None:
    """A folder of the cache, made if need be; None where it cannot be used."""
    path = root() / name
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except OSError:
        return None
    ours = status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return path if ours and os.access(path, os.W_OK) else None
