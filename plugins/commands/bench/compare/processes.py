"""Processes that are started for a comparison, and ended with it.

What it is: a command in a session of its own with a log in a file, whose end takes along all that it started, however this process ends: by itself, by Ctrl-C, SIGTERM or a
terminal's end (`stoppable`), or killed (Linux then tells the command).
What it does not know: what the commands are.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

import psutil

from penstock.plugins.commands.bench.footprint import cpu_seconds, pss_bytes, tree

GRACE_S = 20.0
"""After SIGTERM; then SIGKILL."""
TAIL_LINES = 12
TAIL_BYTES = 1 << 16
ERROR_LINES = 4
POLL_S = 0.02
_ERROR = re.compile(r"\b(\w*(Error|Exception)|error|fatal)\b: ")

_BOUND = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit("whoever wanted this process is gone")
try:
    os.execvp(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.exit(f"{sys.argv[2]}: {error}")
"""
"""Becomes the command after asking the kernel for a SIGTERM when this process dies (PR_SET_PDEATHSIG, which an exec keeps). A program of its own rather than code between fork
and exec, where threads of this process might hold locks."""


class Process:
    """One command and all that it starts."""

    def __init__(self, command: Sequence[str], log: Path, *, env: Mapping[str, str], piped: bool = False) -> None:
        self.log = log
        self.command = list(command)
        pipe = subprocess.PIPE if piped else subprocess.DEVNULL
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _BOUND, str(os.getpid()), *command],
                stdin=pipe,
                stdout=pipe if piped else file,
                stderr=file,
                env=dict(env),
                start_new_session=True,
            )
        self.pid = self._process.pid

    @property
    def stdin(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def stdout(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout

    def left(self, within_s: float = 0.0) -> bool:
        """Has the command ended, or does it `within_s`? It stays unreaped until `stop`, so that its number, which is also its group's, is nobody else's."""
        deadline = time.monotonic() + within_s
        while self._process.returncode is None and os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.01)
        return True

    def busy_s(self) -> float:
        """CPU seconds that it and what it started have used."""
        return cpu_seconds(tree(self.pid))

    def memory_bytes(self) -> int:
        """Of all of them together, each shared page once."""
        return pss_bytes(tree(self.pid))

    def tail(self, lines: int = TAIL_LINES) -> str:
        """The last lines of its log, and before them the last few errors that came earlier: a server's own processes tell the cause, it tells the consequence."""
        with contextlib.suppress(OSError), self.log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            said = file.read().decode(errors="replace").strip().splitlines()
            earlier = list(dict.fromkeys(line for line in said[:-lines] if _ERROR.search(line)))[-ERROR_LINES:]
            return "\n".join([*earlier, *(["..."] if earlier else []), *said[-lines:]])
        return ""

    def stop(self, grace_s: float = GRACE_S) -> None:
        """SIGTERM, some patience, SIGKILL: of the command, of its group, and of what went into sessions of its own. A second Ctrl-C ends the patience."""
        if self._process.returncode is not None:
            return
        begun = self._descendants()
        try:
            self._signal(signal.SIGTERM)
            deadline = time.monotonic() + grace_s
            while not self.left() and time.monotonic() < deadline:
                time.sleep(POLL_S)
        finally:
            begun += [one for one in self._descendants() if one not in begun]
            self._signal(signal.SIGKILL)
            for one in begun:
                with contextlib.suppress(psutil.Error):  # psutil compares its start, so another process of this number is safe
                    one.kill()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
            self._process.wait()
            psutil.wait_procs(begun, timeout=1)  # what is not a child of ours is reaped by others, when they will

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def _descendants(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            return psutil.Process(self.pid).children(recursive=True)
        return []


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM and SIGHUP do what Ctrl-C does: a KeyboardInterrupt, after which everything that was started is ended. A job in the background of a script, which does not hear
    Ctrl-C, hears them too; under nohup SIGHUP stays ignored."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.raise_signal(signal.SIGINT)

    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: interrupt, signal.SIGHUP: interrupt}
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        del handlers[signal.SIGHUP]
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
