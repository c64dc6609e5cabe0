"""A process that compiles grammars and verifies answers, and may die of it.

What it is: the main of the grammar worker's children (core/processes/grammars.py): takes Setup and then Jobs, and
answers each with a Done (core/processes/fenced.py).
What it does not know: requests, time limits (who started it kills it), pipes.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import Any

import jsonschema_rs

from penstock.core.contract.grammars import Grammars
from penstock.core.contract.host import PluginHost
from penstock.core.processes.fenced import serve
from penstock.core.processes.grammars import Done, Job, Setup
from penstock.core.protocol.errors import PenstockError, UnsupportedFeature, described

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
            if job.kind == "json":
                self._validator(job.source)
            compiled = self._grammars.compile(job.kind, job.source)
            return Done(compiled=compiled, error="" if compiled else "The grammar backend made nothing of it.")
        except PenstockError as error:
            return Done(error=error.message, unsupported=isinstance(error, UnsupportedFeature))
        except MemoryError:
            return Done(error="It takes too much memory.")
        except BaseException as error:
            return Done(error=described(error, 300))

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
            found = jsonschema_rs.validator_for(json.loads(source), validate_formats=True, offline=True)  # never reads what it names
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


def main() -> None:
    serve(Setup, Job, lambda setup: load(setup).do, Done(), room=ROOM)


if __name__ == "__main__":
    main()
