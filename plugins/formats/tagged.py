"""Calls whose arguments stand in tags of their own, without JSON's quotes: <parameter=city>Oslo</parameter>.

What it is: `TaggedSplitter`, and the readers of such a call: its name, then keys and values, which go out as the JSON of one object. A value's type is that
of the tool's schema (schemas.py): a string goes out as it comes, anything else when it is complete. A value ends at its end mark, and, as
models forget that, at the next mark that begins a line.
What it does not know: any model's marks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from json.encoder import encode_basestring

from penstock.core.contract.formats import Fragment, Opening
from penstock.plugins.formats.scanner import State, Table, TableSplitter, probe, read_text, table
from penstock.plugins.formats.schemas import ANY, TEXT, TEXT_OR_NULL, Kinds, converted, kinds_of

SPACE = " \t\r\n"
MAX_BARE = 64
"""Characters, for the most part white space, of what may still become null."""
INSIDE = frozenset({"fields", "key", "between", "value"})
"""States of an open call; a mark that leads elsewhere ends its arguments."""


class TaggedSplitter(TableSplitter):
    """`loose`: a value of unknown type is what JSON says it is, else a string."""

    __slots__ = ("_arguments", "_first", "key", "kinds", "loose")

    def __init__(self, states: Table, start: str, opening: Opening, *, loose: bool = False) -> None:
        super().__init__(states, start, opening.tools)
        self._arguments: Mapping[str, Kinds] = {}
        self._first = True
        self.loose = loose
        self.key = ""
        self.kinds = ANY
        """Of the value that is read."""

    def begin(self, name: str, out: list[Fragment]) -> None:
        super().begin(name, out)
        self._arguments = kinds_of(self._tools).get(name, {}) if self._tools else {}
        self._first = True

    def named(self, key: str, kinds: Kinds | None) -> None:
        """A key. `kinds`: as the model says, else as the schema does."""
        self.key = key
        self.kinds = self._arguments.get(key, ANY) if kinds is None else kinds

    def head(self) -> str:
        """What stands before the value."""
        before, self._first = "{" if self._first else ", ", False
        return f"{before}{encode_basestring(self.key)}: "

    def go(self, mark: str, at: int, out: list[Fragment]) -> int:
        """On, past a mark of the open call."""
        following = self.place.state.on[mark]
        if following not in INSIDE:
            self._finish(out)
        self.enter(following, mark)
        return at + len(mark)

    def _finish(self, out: list[Fragment]) -> None:
        self.argue("{}" if self._first else "}", out)
        self.close(out, complete=True)

    def flush(self, cut: bool) -> list[Fragment]:
        """See TableSplitter."""
        if not self.open:
            return super().flush(cut)
        out: list[Fragment] = []
        reader, value = self.place.state.reader, self.memory
        rest, self.held = self.held, ""
        if cut:  # arguments that end anywhere still begin as whole ones do: half a tag, half a name and what may yet become another value stay unsaid
            if reader is read_value and value is not None and not value.begun:
                kept = "".join(self.pending)
                if _is_text(self):
                    self.argue(f'{self.head()}"{_escaped(kept)}', out)
                elif _INTEGER.fullmatch(kept):
                    self.argue(self.head() + kept, out)
            self.pending.clear()
            self.close(out, complete=False)
            return out
        if reader is read_value:
            kept = "".join(self.pending)
            self.pending.clear()
            if value is not None and value.begun:
                said = _escaped(rest)
            elif value is not None:
                said = self.head() + ('"' + _escaped(kept + rest) if _is_text(self) else kept)
            else:
                said = ""
            if said:
                self.argue(said, out)
        elif reader is read_key:
            rest = "".join(self.taken) + rest
            if rest:
                self.argue(rest, out)
        elif reader is read_fields and not cut:
            self._finish(out)
            return out
        self.close(out, complete=False)
        return out


# ------------------------------------------------------------------ readers


def _head(splitter: TableSplitter, buf: str, at: int, out: list[Fragment]) -> tuple[int, str]:
    """What is collected up to a mark: (where, the mark), or (where to go on, "")."""
    start, mark, far = splitter.find_near(buf, at)
    if far:
        splitter.fail("", out)
        return start, ""
    splitter.taken.append(buf[at:start])
    if mark:
        return start, mark
    return (splitter.wait(buf, start) if start < len(buf) else start), ""


def read_called(splitter: TableSplitter, buf: str, at: int, out: list[Fragment]) -> int:
    """A function's name up to a mark: a call begins."""
    assert isinstance(splitter, TaggedSplitter)
    at, mark = _head(splitter, buf, at, out)
    if not mark:
        return at
    name = _unquoted("".join(splitter.taken))
    if not splitter.callable(name):
        splitter.fail("", out)
        return at
    splitter.begin(name, out)
    return splitter.go(mark, at, out)


def read_fields(splitter: TableSplitter, buf: str, at: int, out: list[Fragment]) -> int:
    """Between arguments."""
    assert isinstance(splitter, TaggedSplitter)
    while at < len(buf) and buf[at] in SPACE:
        at += 1
    if at == len(buf):
        return at
    mark = splitter.mark_at(buf, at)
    if mark == "":
        return splitter.wait(buf, at)
    if mark is None:
        splitter.fail("", out)
        return at
    return splitter.go(mark, at, out)


_SAYS = re.compile(r"""\s+string\s*=\s*"(true|false)"\s*""")


def read_key(splitter: TableSplitter, buf: str, at: int, out: list[Fragment]) -> int:
    """An argument's name, up to a mark. It may say beside it whether the value is a string."""
    assert isinstance(splitter, TaggedSplitter)
    at, mark = _head(splitter, buf, at, out)
    if not mark:
        return at
    head = "".join(splitter.taken)
    kinds = None
    if (says := _SAYS.search(head)) is not None:
        head, kinds = head[: says.start()], TEXT if says.group(1) == "true" else ANY
    key = _unquoted(head)
    if not key or "\n" in key:
        splitter.fail("", out)
        return at
    splitter.taken.clear()
    splitter.named(key, kinds)
    return splitter.go(mark, at, out)


_INTEGER = re.compile(r"-?[1-9][0-9]*")
_WITHIN = re.compile(r'["\\\n]')


class _Value:
    """`begun`: it is a string, of which something is out. `bare`: what is kept, while that may still become null. `nested`: it is a list or an object, if that
    is known; then a mark in a string of JSON in it is text, unless a line has ended there: the model forgot a quote."""

    __slots__ = ("_escaped", "_quoted", "bare", "begun", "nested")

    def __init__(self) -> None:
        self.begun = False
        self.bare = ""
        self.nested: bool | None = None
        self._quoted = False
        self._escaped = False

    def end(self, splitter: TaggedSplitter, buf: str, at: int) -> tuple[int, str | None]:
        """See TableSplitter.find."""
        start, mark = splitter.find(buf, at)
        if self.nested is None and (first := buf[at:start].lstrip()[:1]):
            self.nested = first in "{[" and _may_nest(splitter)
        while self.nested and start < len(buf):
            self._walk(buf, at, start)
            if not self._quoted or buf[start] == "\n":
                return start, mark
            at = start
            self._walk(buf, at, at + 1)
            start, mark = splitter.find(buf, at + 1)
            at += 1
        if self.nested:
            self._walk(buf, at, start)
        return start, mark

    def _walk(self, buf: str, at: int, end: int) -> None:
        while at < end:
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            hit = _WITHIN.search(buf, at, end)
            if hit is None:
                return
            char, at = hit.group(), hit.end()
            if char == '"':
                self._quoted = not self._quoted
            elif char == "\n":
                self._quoted = False
            else:
                self._escaped = self._quoted


def _may_nest(splitter: TaggedSplitter) -> bool:
    return splitter.loose if not splitter.kinds else not splitter.kinds.isdisjoint(("object", "array"))


def read_value(splitter: TableSplitter, buf: str, at: int, out: list[Fragment]) -> int:
    """An argument's value, up to a mark. One of the state's `skip` in front of it is none of it."""
    assert isinstance(splitter, TaggedSplitter)
    value: _Value = splitter.memory
    if value is None:
        value = splitter.memory = _Value()
        if buf[at] in splitter.place.state.skip:
            at += 1
            if at == len(buf):
                return at
    start, mark = value.end(splitter, buf, at)
    piece = buf[at:start]
    if value.begun:
        said = encode_basestring(piece)[1:] if mark else _escaped(piece)
        if said:
            splitter.argue(said, out)
    elif piece or mark:
        _unsaid(splitter, value, piece, bool(mark), out)
    if mark:
        return splitter.go(mark, start, out)
    return splitter.wait(buf, start) if start < len(buf) else start


def _unsaid(splitter: TaggedSplitter, value: _Value, piece: str, ended: bool, out: list[Fragment]) -> None:
    """More of a value of which nothing is out."""
    text = _is_text(splitter)
    if not text and splitter.kinds == TEXT_OR_NULL:
        value.bare += piece
        text = len(value.bare) > MAX_BARE or not "null".startswith(value.bare.strip().lower())
    splitter.pending.append(piece)
    if not text and not ended:
        return
    whole = "".join(splitter.pending)
    splitter.pending.clear()
    if not text:
        splitter.argue(splitter.head() + converted(whole, splitter.kinds, splitter.loose), out)
    else:
        value.begun = True
        splitter.argue(f'{splitter.head()}"{_escaped(whole)}' + ('"' if ended else ""), out)


def _is_text(splitter: TaggedSplitter) -> bool:
    """Is it a string, whatever it says?"""
    return splitter.kinds == TEXT or (not splitter.kinds and not splitter.loose)


def _escaped(text: str) -> str:
    return encode_basestring(text)[1:-1]


def _unquoted(text: str) -> str:
    text = text.strip()
    return text[1:-1].strip() if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


# ------------------------------------------------------------------ tables


def tags(begin: str, end: str, function: str, parameter: str, *, close: str = ">", ended: tuple[str, str], **more: State) -> Table:
    """`begin`, then functions (`function` NAME `close`, `ended[0]`) with parameters (`parameter` KEY `close` VALUE `ended[1]`), then `end`."""
    function_end, parameter_end = ended
    again = {end: "content", begin: "call", function: "name"}
    states: dict[str, State] = {
        "content": State(read_text, {begin: "call"}),
        "call": State(probe, {function: "name"}, skip=SPACE),
        "name": State(read_called, {close: "fields"}),
        "fields": State(
            read_fields,
            {parameter: "key", function_end: "tail", end: "content", begin: "call", function: "name"},
            silent=True,
        ),
        "key": State(read_key, {close: "value"}, silent=True),
        "value": State(
            read_value,
            {
                parameter_end: "fields",
                "\n" + parameter_end: "fields",
                "\n" + parameter: "key",
                "\n" + function_end: "tail",
            },
            skip="\n",
            silent=True,
        ),
        "tail": State(probe, again, skip=SPACE, after="junk", silent=True),
        "junk": State(read_text, again),
    }
    return table(**{**states, **more})
