"""Layouts as grammars of llguidance.

What it is: `lowered` makes of a layout one grammar: rules for how its parts follow each other, and each grammar in it as a grammar of its own, which they
refer to. `Regions` keeps the bounds of values (bounds.py) to where there are values: after a text that stands before one.
What it does not know: schemas, whether a layout can be satisfied.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from penstock.core.contract.layouts import JSON, Bare, Chain, Either, Free, Mark, Obey, Part, Repeat, Tags, Text
from penstock.core.protocol.columns import I32
from penstock.core.protocol.errors import UnsupportedFeature
from penstock.plugins.grammars.bare import ANYTHING, endless, escaped, finite, terminal
from penstock.plugins.grammars.bounds import Bounds, Starts, ended

SPACE = b" \t\r\n"
_FIRSTS = {"number": "-0123456789", "nested": "{["}
_MAYBE_WHITE = "\0"
"""At the end of a text that has been drawn: behind it there may be white space, which a value may begin with but no other text."""
_META = frozenset('\\.+*?()|[]{}^$#&-~/"')


class _Lowering:
    """`tokens`: the special tokens by their spelling. `grammar(kind, source)`: as llguidance takes it, JSON with a list of one."""

    def __init__(self, tokens: Mapping[str, int], grammar: Callable[[str, str], str]) -> None:
        self._tokens = tokens
        self._grammar = grammar
        self.rules: list[str] = []
        self.grammars: list[dict[str, Any]] = []
        self._names: dict[tuple[str, str], str] = {}
        self._free: dict[str, str] = {}
        self.openers: dict[str, None] = {}
        """What stands before a JSON value."""
        self.bare: dict[str, tuple[str, set[str]]] = {}
        """What stands before a string without quotes, what ends that, and what it never begins with, so that it must be a value of JSON there."""

    def rule(self, body: str, options: str = "") -> str:
        name = f"r{len(self.rules)}"
        self.rules.append(f"{name}{options}: {body}")
        return name

    def lower(self, part: Part, before: str) -> tuple[str, str]:
        """(an expression, the text that has just been drawn when what follows begins). `before` is that of this part."""
        if isinstance(part, Text):
            return _literal(part.text), _after(before, part.text)
        if isinstance(part, Mark):
            return self._mark(part.text), _after(before, part.text)
        if isinstance(part, Chain):
            found = []
            for one in part.parts:
                expression, before = self.lower(one, before)
                found.append(expression)
            return " ".join(one for one in found if one) or '""', before
        if isinstance(part, Either):
            return "( " + " | ".join(self.rule(self.lower(one, before)[0]) for one in part.parts) + " )", ""
        if isinstance(part, Repeat):
            name = self.rule(self.lower(part.part, "")[0])
            return f"{name}*" if part.most is None else f"{name}{{0,{part.most}}}" if part.most else "", ""
        if isinstance(part, Free):
            return self._text(part)
        if isinstance(part, Obey):
            if part.kind in JSON:
                self.openers[before.removesuffix(_MAYBE_WHITE)] = None
            return "@" + self._named(part), ""
        if isinstance(part, Bare):
            firsts = {char for kind in part.unlike for char in _FIRSTS.get(kind, "")}
            self.bare[before] = part.then, firsts & set(self.bare[before][1]) if before in self.bare else firsts
            return self._until(terminal(part), part.then, part), part.then
        if isinstance(part, Tags):
            return self._tags(part), ""
        return "WHITE?", before + _MAYBE_WHITE

    def _mark(self, text: str) -> str:
        if text in self._tokens:
            return f"<[{self._tokens[text]}]>"
        token = self._within(text)
        return (
            " ".join(filter(None, (_literal(text.split(token, 1)[0]), self._mark(token), _literal(text.split(token, 1)[1]))))
            if token
            else _literal(text)
        )

    def _text(self, part: Free) -> tuple[str, str]:
        text = _without(part.without, part.never_first)
        return self._until(text, part.then) if part.then else self._terminal(text), part.then

    def _until(self, text: str, end: str, bare: Bare | None = None) -> str:
        """A terminal's text, and what ends it."""
        if end in self._tokens:
            return f"{self._terminal(text)} {self._mark(end)}"
        token = self._within(end)
        if not token:
            return self.rule(f"{self._terminal(text)} {_literal(end)}", "[lazy]")
        # No terminal goes over a token: what stands before that is the text's own end. Text that may go on however it was so far is ended by the token alone;
        # other text may be unable to go on, which the library takes no token after: it ends at once, and so cannot hold what stands before the token.
        before, after = end.split(token, 1)
        if bare is None or endless(json.loads(bare.schema)):
            return f"{self._terminal(f'({text}) /{escaped(before)}/')} {self._mark(token)} {_literal(after)}"
        if before in bare.schema:
            raise UnsupportedFeature(f"A string with {before!r} in it cannot be asked for here.", param=bare.field or None)
        plain = self._terminal(text if finite(json.loads(bare.schema)) else f"({text}) & ~/{ANYTHING}{escaped(before)}{ANYTHING}/")
        return f"{self.rule(f'{plain} {_literal(before)}', '[lazy]')} {self._mark(token)} {_literal(after)}"

    def _terminal(self, body: str) -> str:
        return self._free.setdefault(body, f"TEXT{len(self._free)}")

    def _within(self, text: str) -> str:
        """The special token in it, if there is one."""
        return max((token for token in self._tokens if token in text), key=len, default="")

    def _named(self, part: Obey) -> str:
        key = part.kind, part.source
        if key not in self._names:
            self._names[key] = f"g{len(self._names)}"
            made = self._grammar(*key)
            (inner,) = json.loads(made)["grammars"] if part.kind != "grammar" else [{"lark_grammar": made}]
            self.grammars.append({**inner, "name": self._names[key]})
        return self._names[key]

    def _tags(self, part: Tags) -> str:
        text = self._terminal(_without(part.triggers))
        ways = []
        for trigger in part.triggers:
            rest = []
            for tag in part.tags:
                if tag.begin.startswith(trigger):
                    if tag.content.kind in JSON:
                        self.openers[tag.begin] = None
                    pieces = (_literal(tag.begin[len(trigger) :]), "@" + self._named(tag.content), _literal(tag.end))
                    rest.append(self.rule(" ".join(piece for piece in pieces if piece)))
            if rest:
                ways.append(f"{self.rule(f'{text} {_literal(trigger)}', '[lazy]')} ( {' | '.join(rest)} )")
        return f"{self.rule(' | '.join(ways))}* {text}"

    def grammar(self, start: str) -> str:
        terminals = [f"{name}: {body}" for body, name in self._free.items()]
        lark = "\n".join([f"start: {start}", *self.rules, *terminals, "WHITE: /[ \\t\\r\\n]{1,40}/"])
        return json.dumps({"grammars": [{"name": "layout", "lark_grammar": lark}, *self.grammars]})


class Lowered(NamedTuple):
    """`openers`: the texts after which a JSON value begins (the text "" is the answer's beginning); `bare`: those after which a string without quotes does,
    what ends it, and characters with which a JSON value in its place begins instead."""

    openers: list[str]
    bare: dict[str, tuple[str, str]]
    grammar: str


def lowered(part: Part, tokens: Mapping[str, int], grammar: Callable[[str, str], str]) -> Lowered:
    """See Grammars.compile, also for what it raises."""
    lowering = _Lowering(tokens, grammar)
    start, _ = lowering.lower(part, "")
    bare = {before: (then, "".join(sorted(firsts))) for before, (then, firsts) in lowering.bare.items()}
    return Lowered(list(lowering.openers), bare, lowering.grammar(start))


def _without(marks: Sequence[str], never_first: str = "") -> str:
    body = f"/{ANYTHING}/"
    if marks:
        body += f" & ~/{ANYTHING}({'|'.join(map(escaped, marks))}){ANYTHING}/"
    if never_first:
        body += f" & ~/[ \\t\\r\\n]*({'|'.join(map(escaped, never_first))}){ANYTHING}/"
    return body


def _after(before: str, text: str) -> str:
    """What stands before a value is known from where white space may be on."""
    return text if before.endswith(_MAYBE_WHITE) else before + text


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


class Regions:
    """The bounds of one answer with a layout: as `Bounds`, within its JSON values, and of the length of its `bare` strings."""

    __slots__ = (
        "_bare",
        "_bounds",
        "_count",
        "_depth",
        "_longest",
        "_openers",
        "_scalar",
        "_starts",
        "_tail",
        "_then",
        "_unlike",
        "_values",
    )

    def __init__(self, starts: Starts, openers: Sequence[bytes], bare: Mapping[bytes, tuple[bytes, bytes]] = MappingProxyType({})) -> None:
        self._starts = starts
        self._values = frozenset(openers)
        self._bare = bare
        self._openers = tuple(opener for opener in {*openers, *bare} if opener)
        self._longest = max(map(len, (*self._openers, *(then for then, _ in bare.values()))), default=0)
        self._tail = b""
        self._bounds: Bounds | None = None
        self._depth = -1
        """Lists and objects that are open; -1: the value has not begun."""
        self._scalar = False
        self._then = b""
        """What ends the string without quotes that goes on."""
        self._unlike = b""
        self._count = 0
        if b"" in openers:
            self._enter()

    def copy(self) -> Regions:
        """Another answer that has come as far."""
        other = Regions(self._starts, self._openers)
        other._tail, other._depth, other._scalar = self._tail, self._depth, self._scalar
        other._bounds = None if self._bounds is None else self._bounds.copy()
        return other

    def _enter(self) -> None:
        self._bounds = Bounds(self._starts)
        self._depth = -1
        self._scalar = False

    def feed(self, data: bytes) -> None:
        for at in range(len(data)):
            byte = data[at : at + 1]
            if self._longest:
                self._tail = (self._tail + byte)[-self._longest :]
            if self._then and not self._text(byte):
                continue
            if self._bounds is not None:
                self._value(byte)
            if self._bounds is None and not self._then and self._tail.endswith(self._openers):
                self._opened()

    def _opened(self) -> None:
        opener = max((one for one in self._openers if self._tail.endswith(one)), key=len)
        self._then, self._unlike = self._bare.get(opener, (b"", b""))
        self._count = 0
        if opener in self._values:
            self._enter()

    def _text(self, byte: bytes) -> bool:
        """One of a string without quotes. False: that is all; it may be the first one of a value that may stand in its place."""
        if self._bounds is not None and not self._count:
            if byte in SPACE:
                return False
            if byte in self._unlike:
                self._then = b""
                return True
            self._bounds = None
        self._count += 1
        if self._tail.endswith(self._then):
            self._then = b""
        return False

    def _value(self, byte: bytes) -> None:
        bounds = self._bounds
        assert bounds is not None
        if self._depth < 0 and byte in SPACE:
            return
        if self._scalar and byte not in b"0123456789.eE+-":
            self._bounds = None
            return
        bounds.feed(byte)
        if self._depth < 0:
            self._depth = 0
            self._scalar = byte not in b'"{['
        if bounds.in_string:
            return
        if byte in b"{[":
            self._depth += 1
        elif byte in b"}]":
            self._depth -= 1
        if not self._depth and not self._scalar:
            self._bounds = None

    def narrow(self, out: I32, may_end: bool) -> None:
        """See Bounds. What follows a value at once is none of it."""
        if self._then:
            ended(self._starts, out, self._tail, self._then, self._count)
        elif self._bounds is not None:
            self._bounds.narrow(out, may_end)
