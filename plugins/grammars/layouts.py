"""Layouts as grammars of llguidance.

What it is: `lowered` makes of a layout one grammar: rules for how its parts follow each other, and each grammar in it as a grammar of its own, which they
refer to. `Regions` keeps the bounds of JSON values (bounds.py) to where there are values: after a text that stands before one.
What it does not know: schemas, whether a layout can be satisfied.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from penstock.core.contract.layouts import JSON, Chain, Either, Free, Mark, Obey, Part, Repeat, Tags, Text
from penstock.core.protocol.columns import I32
from penstock.plugins.grammars.bounds import Bounds, Starts

ANYTHING = "(?s:.)*"
SPACE = b" \t\r\n"
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
        if isinstance(part, Tags):
            return self._tags(part), ""
        return "WHITE?", before + _MAYBE_WHITE

    def _mark(self, text: str) -> str:
        token = self._tokens.get(text)
        return _literal(text) if token is None else f"<[{token}]>"

    def _text(self, part: Free) -> tuple[str, str]:
        terminal = self._terminal(part.without, part.never_first)
        if not part.then:
            return terminal, ""
        if part.then in self._tokens:
            return f"{terminal} {self._mark(part.then)}", part.then
        return self.rule(f"{terminal} {_literal(part.then)}", "[lazy]"), part.then

    def _terminal(self, without: Sequence[str], never_first: str = "") -> str:
        body = f"/{ANYTHING}/"
        if without:
            body += f" & ~/{ANYTHING}({'|'.join(map(_escaped, without))}){ANYTHING}/"
        if never_first:
            body += f" & ~/[ \\t\\r\\n]*({'|'.join(map(_escaped, never_first))}){ANYTHING}/"
        return self._free.setdefault(body, f"TEXT{len(self._free)}")

    def _named(self, part: Obey) -> str:
        key = part.kind, part.source
        if key not in self._names:
            self._names[key] = f"g{len(self._names)}"
            made = self._grammar(*key)
            (inner,) = json.loads(made)["grammars"] if part.kind != "grammar" else [{"lark_grammar": made}]
            self.grammars.append({**inner, "name": self._names[key]})
        return self._names[key]

    def _tags(self, part: Tags) -> str:
        text = self._terminal(part.triggers)
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


def lowered(part: Part, tokens: Mapping[str, int], grammar: Callable[[str, str], str]) -> tuple[list[str], str]:
    """(the texts after which a JSON value begins, the grammar). The text "" is the answer's beginning."""
    lowering = _Lowering(tokens, grammar)
    start, _ = lowering.lower(part, "")
    return list(lowering.openers), lowering.grammar(start)


def _after(before: str, text: str) -> str:
    """What stands before a value is known from where white space may be on."""
    return text if before.endswith(_MAYBE_WHITE) else before + text


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def _escaped(text: str) -> str:
    return "".join("\\" + char if char in _META else char for char in text)


class Regions:
    """The bounds of one answer with a layout: as `Bounds`, within its JSON values."""

    __slots__ = ("_bounds", "_depth", "_longest", "_openers", "_scalar", "_starts", "_tail")

    def __init__(self, starts: Starts, openers: Sequence[bytes]) -> None:
        self._starts = starts
        self._openers = tuple(opener for opener in openers if opener)
        self._longest = max(map(len, self._openers), default=0)
        self._tail = b""
        self._bounds: Bounds | None = None
        self._depth = -1
        """Lists and objects that are open; -1: the value has not begun."""
        self._scalar = False
        if b"" in openers:
            self._enter()

    def _enter(self) -> None:
        self._bounds = Bounds(self._starts)
        self._depth = -1
        self._scalar = False

    def feed(self, data: bytes) -> None:
        for at in range(len(data)):
            byte = data[at : at + 1]
            if self._longest:
                self._tail = (self._tail + byte)[-self._longest :]
            if self._bounds is not None:
                self._value(byte)
            if self._bounds is None and self._tail.endswith(self._openers):
                self._enter()

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
        if self._bounds is not None:
            self._bounds.narrow(out, may_end)
