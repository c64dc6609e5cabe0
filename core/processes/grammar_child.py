"""A process that compiles grammars and verifies answers, and may die of it.

What it is: the main of the grammar worker's children (core/processes/grammars.py): takes Setup and then Jobs, and
answers each with a Done (core/processes/fenced.py).
What it does not know: requests, time limits (who started it kills it), pipes.
"""

from __future__ import annotations

import functools
import json
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema_rs

from penstock.core.contract import layouts
from penstock.core.contract.grammars import Grammars
from penstock.core.contract.host import BUILT_IN, PluginHost
from penstock.core.processes.fenced import serve
from penstock.core.processes.grammars import Done, Job, Setup
from penstock.core.protocol.errors import InvalidRequest, PenstockError, PluginFault, UnsupportedFeature, described, shown, tamed

ROOM = 1 << 30
"""Bytes of address space that jobs may take besides what is taken when they begin."""
MOST_KEPT = 64
Blame = Callable[[str, Exception | str], PluginFault]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)[:80]!r} comes twice in an object")
    return made


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


_STRICT = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_number)
"""As strict parsers read answers."""


class Checker:
    """What the child knows. `tokens` are the vocabulary's bytes, without those of tokens that are no text."""

    def __init__(self, grammars: Grammars, kinds: list[str], tokens: dict[bytes, int], blame: Blame | None = None) -> None:
        """`blame(call, error)` words a fault of a backend that is a stranger's; None: what it raises is about the grammar."""
        self._grammars = grammars
        self._blame = blame
        self._kinds = kinds
        self._tokens = tokens
        self._longest = max(map(len, tokens), default=0)
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
            elif job.kind in layouts.JSON:
                self._validator(job.source)
            compiled = self._compile(job)
            return Done(compiled=compiled, error="" if compiled else "The grammar backend made nothing of it.")
        except PenstockError as error:
            return Done(
                error=error.message,
                unsupported=isinstance(error, UnsupportedFeature),
                broken=isinstance(error, PluginFault),
                field=error.param or "",
            )
        except MemoryError:
            return Done(error="It takes too much memory.")
        except BaseException as error:
            return Done(error=described(error, 300))

    def _compile(self, job: Job) -> bytes:
        blame = self._blame
        if blame is None:
            return self._grammars.compile(job.kind, job.source)
        try:
            compiled = self._grammars.compile(job.kind, job.source)
        except (PenstockError, MemoryError):
            raise
        except BaseException as error:
            raise blame("compile", tamed(error)) from error
        if not (isinstance(compiled, bytes) and compiled):
            raise blame("compile", f"gave {shown(compiled)}: it must be bytes, and some")
        return compiled

    def _check_leaves(self, source: str) -> None:
        """Each grammar in a layout for itself, so that an error names its own."""
        for leaf in {(leaf.kind, leaf.source, leaf.field): leaf for leaf in layouts.leaves(layouts.decode(source))}.values():
            done = self.do(Job(leaf.kind, leaf.source))
            if done.broken:
                raise PluginFault(done.error)
            if done.error:
                kind = UnsupportedFeature if done.unsupported else InvalidRequest
                raise kind(done.error, param=leaf.field)

    def _verify(self, job: Job) -> str:
        """Why the answer does not obey; "": it does."""
        if job.kind in layouts.JSON:
            try:
                answer = _STRICT.decode(job.text)
            except ValueError as error:
                return f"It is not valid JSON: {error}."
            return self._wrong(job.source, answer)
        matcher = self._grammars.matcher(self._compile(job))
        if not all(matcher.consume(token) for token in job.ids or self._spelt(job.text.encode())):
            return "Its text is not of the grammar."
        if not matcher.may_end():
            return "It ended too early."
        part = layouts.decode(job.source) if job.kind == "layout" else None
        match part:
            case layouts.Tags():
                return self._tagged(part, job.text)
            case layouts.Chain(parts=[layouts.Text(begin), layouts.Obey() as content, *end]):
                tag = layouts.Tag(begin, content, "".join(one.text for one in end if isinstance(one, layouts.Text)))
                return self._tagged(layouts.Tags([begin], [tag]), job.text)
        return ""

    def _spelt(self, text: bytes) -> Iterator[int]:
        """Tokens that have this text; -1 where there are none."""
        at = 0
        while at < len(text):
            sizes = range(min(self._longest, len(text) - at), 0, -1)
            size = next((size for size in sizes if text[at : at + size] in self._tokens), 1)
            yield self._tokens.get(text[at : at + size], -1)
            at += size

    def _tagged(self, part: layouts.Tags, text: str) -> str:
        """What is wrong with the JSON in a text's tags."""
        triggers = re.compile("|".join(map(re.escape, part.triggers)))
        at = 0
        while (found := triggers.search(text, at)) is not None:
            at = found.end()
            fitting = [tag for tag in part.tags if text.startswith(tag.begin, found.start())]
            tag = max(fitting, key=lambda tag: len(tag.begin), default=None)
            if tag is None or tag.content.kind not in layouts.JSON:
                continue
            begin = found.start() + len(tag.begin)
            begin += len(text[begin:]) - len(text[begin:].lstrip())
            try:
                value, at = _STRICT.raw_decode(text, begin)
            except ValueError as error:
                return f"It is not valid JSON after {tag.begin[:80]!r}: {error}."
            if (wrong := self._wrong(tag.content.source, value)) or not text.startswith(tag.end, at):
                return wrong or f"{tag.end[:80]!r} does not follow."
        return ""

    def _wrong(self, source: str, value: Any) -> str:
        wrong = next(iter(self._validator(source).iter_errors(value)), None)
        return "" if wrong is None else f"At /{'/'.join(map(str, wrong.instance_path))}: {wrong.message}"[:300]

    def _validator(self, source: str) -> Any:
        found = self._validators.pop(source, None)
        if found is None:
            try:
                found = jsonschema_rs.validator_for(json.loads(source), validate_formats=True, offline=True)  # never reads what it names
            except jsonschema_rs.ValidationError as error:
                if error.message.endswith('is not a "regex"'):  # to it: whether it is one was seen before
                    raise UnsupportedFeature(f"The schema's pattern {error.message[:-17][:80]} is not supported.") from None
                raise
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
    special = frozenset(setup.special)
    spelt = {token: id for id, token in reversed(list(enumerate(tokens))) if token and id not in special}
    stranger = plugins.package_of("grammars", spec.name) != BUILT_IN
    blame = functools.partial(plugins.blame, "grammars", spec.name) if stranger else None
    return Checker(spec.factory(tokens, setup.special), spec.kinds, spelt, blame)


def main() -> None:
    serve(Setup, Job, lambda setup: load(setup).do, Done(), room=ROOM, failed=lambda error: Done(error=described(error), broken=True))


if __name__ == "__main__":
    main()
