"""Work in a process of its own that may take all time and memory, and die of it: both ends.

What it is: `Child`, the end that asks (one question at a time, each within a time; it may kill), and `serve`, the main of the other end: one message to
set it up, then questions, each answered, until the input ends. Its memory is limited once it is set up. Messages are frames on its standard
input and output.
What it does not know: what the work is.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

import msgspec

from penstock.core.processes.spawn import PR_SET_PDEATHSIG, ignore_signals

START_S = 60.0
"""How long a child may take to import what it needs and to be set up."""
LENGTH = struct.Struct("<I")

S = TypeVar("S")
Q = TypeVar("Q")
A = TypeVar("A")


class TooSlow(Exception):
    """The child did not answer in time."""


class Unusable(Exception):
    """The child could not be set up; says why."""


class Child(Generic[A]):
    """One process that runs `module`, and answers with `answer`s. `start` comes first; it and `ask` raise TooSlow, or EOFError where the process has
    ended. `kill` may come from another thread."""

    def __init__(self, module: str, answer: type[A]) -> None:
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": import_path()}
        command = [sys.executable, "-m", module]
        self._answer = answer
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True)

    def start(self, setup: Any) -> A:
        """What it says when it is set up; `serve` decides what that is where it cannot be."""
        return self.ask(setup, START_S)

    def ask(self, question: Any, limit_s: float) -> A:
        body = msgspec.msgpack.encode(question)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(LENGTH.pack(len(body)) + body)
            self._process.stdin.flush()
        except OSError:
            raise EOFError from None
        deadline = time.monotonic() + limit_s
        (size,) = LENGTH.unpack(self._read(LENGTH.size, deadline))
        return msgspec.msgpack.decode(self._read(size, deadline), type=self._answer)

    def _read(self, size: int, deadline: float) -> bytearray:
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        found = bytearray()
        while len(found) < size:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([fd], [], [], left)[0]:
                raise TooSlow
            part = os.read(fd, min(size - len(found), 1 << 20))
            if not part:
                raise EOFError
            found += part
        return found

    def kill(self) -> None:
        self._process.kill()

    def bury(self) -> None:
        """Kill it, and forget it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()


def import_path() -> str:
    """Where this process finds modules, for PYTHONPATH: a child loads the same plugins, though a program had put their folder on sys.path."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join(dict.fromkeys(str(Path(entry or ".").absolute()) for entry in [*sys.path, *filter(None, given)]))


def serve(
    setup: type[S],
    question: type[Q],
    load: Callable[[S], Callable[[Q], Any]],
    ready: Any,
    *,
    room: int,
    failed: Callable[[BaseException], Any] | None = None,
) -> None:
    """The main of a child: what `load` makes of the setup answers each question. `ready` is the answer to the setup, `failed` makes the one that is
    given where `load` raises; `room`: bytes of address space that questions may take besides what is taken when they begin."""
    ignore_signals()
    if sys.platform == "linux":  # what is computed for nobody ends too
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a plugin prints is no answer

    def say(answer: Any) -> None:
        body = msgspec.msgpack.encode(answer)
        sink.write(LENGTH.pack(len(body)) + body)
        sink.flush()

    body = _receive(sys.stdin.buffer)
    if body is None:
        return
    try:
        do = load(msgspec.msgpack.decode(body, type=setup))
    except BaseException as error:
        if failed is not None:
            say(failed(error))
        raise
    limit_memory(room)
    say(ready)
    while (body := _receive(sys.stdin.buffer)) is not None:
        say(do(msgspec.msgpack.decode(body, type=question)))


def limit_memory(room: int) -> None:
    """Of the address space, from what is taken now. Nothing where the system does not say what that is."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError):
        return
    most = pages * resource.getpagesize() + room
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _receive(source: BinaryIO) -> bytes | None:
    head = source.read(LENGTH.size)
    return source.read(LENGTH.unpack(head)[0]) if len(head) == LENGTH.size else None
