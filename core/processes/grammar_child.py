"""A process that compiles grammars and verifies answers, and may die of it.

What it is: the main of the grammar worker's children (core/processes/grammars.py): reads Setup and then Jobs from standard input, answers each with a Done on
standard output, until the input ends. Its memory is limited once the backend has learned the vocabulary.
What it does not know: requests, time limits (who started it kills it).
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import jsonschema_rs
import msgspec

from penstock.core.contract import layouts
from penstock.core.contract.grammars import Grammars
from penstock.core.contract.host import PluginHost
from penstock.core.processes.grammars import LENGTH, Done, Job, Setup
from penstock.core.processes.spawn import PR_SET_PDEATHSIG, ignore_signals
from penstock.core.protocol.errors import InvalidRequest, PenstockError, UnsupportedFeature

ROOM = 1 << 30
"""Bytes of address space that jobs may take besides what is taken when they begin."""
MOST_KEPT = 64


class Checker:
    """What the child knows."""

    def __init__(self, grammars: Grammars, kinds: list[str]) -> None:
        self._grammars = grammars
        self._kinds = kinds
        self._validators: OrderedDict[str, Any] = OrderedDict()

    def do(self, job: Job) -> Done:
        """Never raises for a bad job."""
        try:
            if job.verify:
                return Done(error=self._verify(job))
            if job.kind not in self._kinds:
                raise UnsupportedFeature(f"The grammar backend has no grammars of the kind {job.kind!r}.")
            if job.kind == "layout":
                self._check_leaves(job.source)
            elif job.kind == "json":
                self._validator(job.source)
            compiled = self._grammars.compile(job.kind, job.source)
            return Done(compiled=compiled, error="" if compiled else "The grammar backend made nothing of it.")
        except PenstockError as error:
            return Done(error=error.message, unsupported=isinstance(error, UnsupportedFeature), field=error.param or "")
        except MemoryError:
            return Done(error="It takes too much memory.")
        except Exception as error:
            return Done(error=f"{type(error).__name__}: {error}"[:300])

    def _check_leaves(self, source: str) -> None:
        """Each grammar in a layout for itself, so that an error names its own."""
        for leaf in {(leaf.kind, leaf.source, leaf.field): leaf for leaf in layouts.leaves(layouts.decode(source))}.values():
            done = self.do(Job(leaf.kind, leaf.source))
            if done.error:
                kind = UnsupportedFeature if done.unsupported else InvalidRequest
                raise kind(done.error, param=leaf.field)

    def _verify(self, job: Job) -> str:
        """Why the answer does not obey; "": it does."""
        if job.kind == "json":
            try:
                answer = json.loads(job.text)
            except ValueError as error:
                return f"It is not valid JSON: {error}."
            wrong = next(iter(self._validator(job.source).iter_errors(answer)), None)
            return "" if wrong is None else f"At /{'/'.join(map(str, wrong.instance_path))}: {wrong.message}"[:300]
        matcher = self._grammars.matcher(self._grammars.compile(job.kind, job.source))
        if not all(matcher.consume(token) for token in job.ids):
            return "Its text is not of the grammar."
        return "" if matcher.may_end() else "It ended too early."

    def _validator(self, source: str) -> Any:
        found = self._validators.pop(source, None)
        if found is None:
            found = jsonschema_rs.validator_for(json.loads(source), validate_formats=True)
        self._validators[source] = found
        if len(self._validators) > MOST_KEPT:
            self._validators.popitem(last=False)
        return found


def load(setup: Setup) -> Checker:
    plugins = PluginHost("text", extra=setup.extra).load()
    spec = plugins.grammars(setup.backend)
    assert spec is not None
    tokens: list[bytes] = []
    at = 0
    for count in setup.counts:
        tokens.append(setup.data[at : at + count])
        at += count
    return Checker(spec.factory(tokens, setup.special), spec.kinds)


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


def main() -> None:
    ignore_signals()
    if sys.platform == "linux":  # what is computed for nobody ends too
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a plugin prints is no answer

    def say(done: Done) -> None:
        body = msgspec.msgpack.encode(done)
        sink.write(LENGTH.pack(len(body)) + body)
        sink.flush()

    body = _receive(sys.stdin.buffer)
    if body is None:
        return
    checker = load(msgspec.msgpack.decode(body, type=Setup))
    limit_memory(ROOM)
    say(Done())
    while (body := _receive(sys.stdin.buffer)) is not None:
        say(checker.do(msgspec.msgpack.decode(body, type=Job)))


if __name__ == "__main__":
    main()
