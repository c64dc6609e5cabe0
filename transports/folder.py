"""The folder of what is too large for the store's rows: files' contents, named by ids that the server made.

What it is: `Folder`, which writes, finds, reads and removes them. Everything in it is its owner's alone (0700, 0600). What is being written has another name until it
is whole, so that a file that is there is whole.
What it does not know: what is in the files, whose they are, the store's rows. Its methods may wait for the disk: they are called in threads.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
from collections.abc import Collection
from pathlib import Path

from penstock.core.protocol.errors import ConfigError

PART = ".part"
"""What is still being written ends so."""
LOCK, NEWS = "lock", "news"
NEVER = -1
_ID = re.compile(r"[a-z]+[-_][0-9A-Za-z]+")


def new_id(prefix: str) -> str:
    return prefix + secrets.token_hex(16)


def write(descriptor: int, data: bytes) -> None:
    """All of it, or OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


class Folder:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None

    def make(self) -> None:
        """Raises OSError."""
        self.path.mkdir(mode=0o700, exist_ok=True)

    def of(self, id: str) -> Path:
        """Where the contents of that id are. Raises ValueError for what is no id of ours: no client's word ever becomes a path."""
        if not _ID.fullmatch(id):
            raise ValueError(id)
        return self.path / id

    def writing(self, id: str) -> Path:
        """The same while it is being written."""
        return self.of(id).with_suffix(PART)

    def create(self, id: str) -> int:
        """A descriptor to write to `writing(id)`."""
        self.make()
        return os.open(self.writing(id), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def finish(self, id: str) -> int:
        """It is whole: `of(id)` is there from now on. Returns its size, 0 where there is none. May be called again."""
        source, target = self.writing(id), self.of(id)
        if source.exists():
            descriptor = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            source.rename(target)
        return target.stat().st_size if target.exists() else 0

    def remove(self, id: str) -> None:
        """Whatever there is of it."""
        for path in (self.of(id), self.writing(id)):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()

    def used(self) -> int:
        """Bytes in it."""
        try:
            with os.scandir(self.path) as entries:
                return sum(_size(entry) for entry in entries)
        except FileNotFoundError:
            return 0

    def sweep(self, known: Collection[str], older_than: float) -> list[str]:
        """Remove whatever belongs to no id of `known` and was not touched since `older_than` (seconds since the epoch). Returns the names."""
        gone: list[str] = []
        try:
            names = os.listdir(self.path)
        except FileNotFoundError:
            return gone
        for name in names:
            path = self.path / name
            with contextlib.suppress(FileNotFoundError):
                if name.removesuffix(PART) not in known and _ID.fullmatch(name.removesuffix(PART)) and path.stat().st_mtime < older_than:
                    path.unlink()
                    gone.append(name)
        return gone

    def touch_news(self) -> None:
        """Tell the other edges that there is something to do."""
        self.make()
        descriptor = os.open(self.path / NEWS, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        os.close(descriptor)
        os.utime(self.path / NEWS)

    def news(self) -> int:
        """When that was last done; it only matters whether it changed."""
        try:
            return (self.path / NEWS).stat().st_mtime_ns
        except FileNotFoundError:
            return NEVER

    def lock(self) -> None:
        """Until this process ends the folder is this server's. Raises ConfigError if it is another's."""
        try:
            self.make()
            self.path.chmod(0o700)
            descriptor = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise ConfigError(f"--store: the folder {self.path} cannot be used ({error.strerror}).", param="store") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise ConfigError(f"--store: another server uses {self.path}. Stop it, or name another file.", param="store") from None
        self._lock = descriptor

    def unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat(follow_symlinks=False).st_size
    except FileNotFoundError:
        return 0
