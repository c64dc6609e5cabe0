"""Readers of JSON in an answer: a call as one object, and arguments alone.

What it is: `read_object` for {"name": ..., "arguments": {...}} (or "parameters", in any order, with other members, which are left out), and `read_arguments`
for a value whose function is known already. Arguments go out as they come, as the model wrote them; where they are a string, what it holds; null, or
nothing, is {}. A mark within a string is text; elsewhere it ends the call, and so it does in a string that cannot be JSON's, as a line has ended in it:
the model forgot to close it.
What it does not know: which marks there are, what follows.
"""

from __future__ import annotations

import json
import re

from penstock.core.contract.formats import Fragment
from penstock.plugins.formats.scanner import Place, TableSplitter

_STRING = re.compile(r'["\\\n]')
_SPACE = " \t\r\n"

# Extent.scan
MORE, ENDED, MARK, HELD = range(4)


class Extent:
    """How far a JSON value reaches, in a text that comes in pieces. `whole`: a value that is no string, list or object goes on up to a mark."""

    __slots__ = ("_depth", "_escaped", "_loose", "_quoted", "_whole", "first")

    def __init__(self, *, whole: bool = False) -> None:
        self.first = ""
        """The value's first character, once known."""
        self._depth = 0
        self._quoted = False
        self._escaped = False
        self._loose = False
        """A line has ended in the string."""
        self._whole = whole

    def scan(self, splitter: TableSplitter, buf: str, at: int) -> tuple[int, int]:
        """(position, MORE | ENDED | MARK | HELD): up to there it is the value's; then the text ends, the value has ended, there stands a mark, or
        what may become one. `at` is not on white space in front of the value."""
        place, size = splitter.place, len(buf)
        while at < size:
            if self._quoted:
                if self._loose:
                    start, mark = splitter.find(buf, at)
                    hit = _STRING.search(buf, at)
                    if mark is not None and (hit is None or start < hit.start()):
                        return start, MARK if mark else HELD
                at = self._string(buf, at)
                if not self._quoted and not self._depth:
                    return at, ENDED
                continue
            pattern = self._pattern(place)
            hit = pattern.search(buf, at) if pattern is not None else None
            if not self.first:
                self.first = buf[at]
                if self.first not in '"{[':  # a number or a word: look again, for what ends one
                    continue
            if hit is None:
                return size, MORE
            at = hit.start()
            mark = splitter.mark_at(buf, at)
            if mark is not None:
                return at, MARK if mark else HELD
            char = buf[at]
            if not self._depth and self.first not in '"{[':
                if self._whole or char not in ",}] \t\r\n":
                    at += 1
                    continue
                return at, ENDED
            at += 1
            if char == '"':
                self._quoted = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return at, ENDED
        return size, MORE

    def _pattern(self, place: Place) -> re.Pattern[str] | None:
        if self.first and self.first not in '"{[':
            return place.trigger if self._whole else place.scalar
        return place.nested

    def _string(self, buf: str, at: int) -> int:
        if self._escaped:
            self._escaped = False
            return at + 1
        hit = _STRING.search(buf, at)
        if hit is None:
            return len(buf)
        if hit.group() == "\\":
            self._escaped = True
        elif hit.group() == '"':
            self._quoted = self._loose = False
        else:
            self._loose = True
        return hit.end()


# ------------------------------------------------------------------ arguments alone


def read_arguments(splitter: TableSplitter, buf: str, at: int, out: list[Fragment]) -> int:
    """The open call's arguments, up to the end of the value or to a mark."""
    extent: Extent = splitter.memory
    if extent is None:
        while at < len(buf) and buf[at] in _SPACE:
            at += 1
        if at == len(buf):
            return at
        mark = splitter.mark_at(buf, at)
        if mark == "":
            return splitter.wait(buf, at)
        if mark:
            splitter.argue("{}", out)
            return _leave(splitter, mark, at, out, complete=True)
        extent = splitter.memory = Extent(whole=True)
    end, how = extent.scan(splitter, buf, at)
    if end > at:
        splitter.argue(buf[at:end], out)
    if how == HELD:
        return splitter.wait(buf, end)
    if how == MARK:
        return _leave(splitter, splitter.mark_at(buf, end) or "", end, out, complete=True)
    if how == ENDED:
        splitter.close(out, complete=True)
        splitter.enter(splitter.place.state.after)
    return end


def _leave(splitter: TableSplitter, mark: str, at: int, out: list[Fragment], *, complete: bool) -> int:
    if splitter.open:
        splitter.close(out, complete=complete)
    splitter.enter(splitter.place.state.on[mark], mark)
    return at + len(mark)


# ------------------------------------------------------------------ a call as an object

# Object.step: what comes next
_OPEN, _KEY, _COLON, _VALUE, _NEXT = range(5)


class _Object:
    """One call. `later`: arguments that came before the name."""

    __slots__ = ("called", "extent", "key", "later", "name", "step", "text")

    def __init__(self) -> None:
        self.step = _OPEN
        self.extent: Extent | None = None
        """Of the key or value that is being read."""
        self.text: list[str] = []
        """It, as far as it was read (but of arguments that are going out)."""
        self.key = ""
        self.name = ""
        self.later: str | None = None
        self.called = False


def read_object(splitter: TableSplitter, buf: str, at: int, out: list[Fragment]) -> int:
    """A call, up to the end of the object. What is none fails."""
    mine: _Object = splitter.memory
    if mine is None:
        mine = splitter.memory = _Object()
    while at < len(buf):
        if mine.extent is not None:
            return _value(splitter, mine, buf, at, out)
        char = buf[at]
        if char in _SPACE:
            if not splitter.open:
                splitter.raw.append(char)
            at += 1
            continue
        mark = splitter.mark_at(buf, at)
        if mark == "":
            return splitter.wait(buf, at)
        if mark:
            return _marked(splitter, mine, mark, at, out)
        step = mine.step
        if step == _OPEN and char == "{":
            mine.step = _KEY
        elif step == _COLON and char == ":":
            mine.step = _VALUE
        elif step == _NEXT and char == ",":
            mine.step = _KEY
        elif char == "}" and step in (_KEY, _NEXT):
            return _ended(splitter, mine, buf, at, out)
        elif (step == _KEY and char == '"') or step == _VALUE:
            if step == _VALUE and char in ",}]:":
                return _broken(splitter, mine, at, out)
            mine.extent = Extent()
            mine.text.clear()
            if step == _VALUE and mine.key in _ARGUMENTS and mine.name and not mine.called:
                _begin(splitter, mine, out)
            continue
        else:
            return _broken(splitter, mine, at, out)
        splitter.raw.append(char)
        at += 1
    return at


_ARGUMENTS = ("arguments", "parameters")


def _begin(splitter: TableSplitter, mine: _Object, out: list[Fragment]) -> None:
    mine.called = True
    splitter.begin(mine.name, out)


def _value(splitter: TableSplitter, mine: _Object, buf: str, at: int, out: list[Fragment]) -> int:
    """A key or a value goes on."""
    extent = mine.extent
    assert extent is not None
    end, how = extent.scan(splitter, buf, at)
    piece = buf[at:end]
    going_out = splitter.open
    if going_out and extent.first in "{[":
        if piece:
            splitter.argue(piece, out)
    elif going_out:
        splitter.pending.append(piece)
    else:
        mine.text.append(piece)
        splitter.raw.append(piece)
    if how == MORE:
        return end
    if how == HELD:
        return splitter.wait(buf, end)
    if how == MARK:
        rest = "".join(splitter.pending)
        splitter.pending.clear()
        if rest:
            splitter.argue(rest, out)
        return _marked(splitter, mine, splitter.mark_at(buf, end) or "", end, out)
    mine.extent = None
    if mine.step == _KEY:
        key = _string("".join(mine.text))
        if key is None:
            return _broken(splitter, mine, end, out)
        mine.key, mine.step = key, _COLON
        return end
    mine.step = _NEXT
    if going_out:
        if splitter.pending:
            splitter.argue(_plain("".join(splitter.pending)), out)
            splitter.pending.clear()
        splitter.close(out, complete=True)
    elif mine.key == splitter.place.state.named and not mine.called:
        name = _string("".join(mine.text))
        if name is None or not splitter.callable(name):
            return _broken(splitter, mine, end, out)
        mine.name = name
        if mine.later is not None:
            _begin(splitter, mine, out)
            splitter.argue(mine.later, out)
            splitter.close(out, complete=True)
    elif mine.key in _ARGUMENTS and not mine.called:
        mine.later = _plain("".join(mine.text))
    return end


def _ended(splitter: TableSplitter, mine: _Object, buf: str, at: int, out: list[Fragment]) -> int:
    if not mine.called:
        if not mine.name or splitter.place.state.bare:
            return _broken(splitter, mine, at, out)
        _begin(splitter, mine, out)
        splitter.argue("{}", out)
        splitter.close(out, complete=True)
    splitter.raw.clear()
    splitter.enter(splitter.place.state.after)
    return at + 1


def _marked(splitter: TableSplitter, mine: _Object, mark: str, at: int, out: list[Fragment]) -> int:
    """A mark before the object's end."""
    if not mine.called:
        splitter.fail("", out)
        return at
    if splitter.open:
        splitter.close(out, complete=False)
    if "".join(splitter.raw).strip():
        splitter.fail("", out)
        return at
    splitter.raw.clear()
    return _leave(splitter, mark, at, out, complete=False)


def _broken(splitter: TableSplitter, mine: _Object, at: int, out: list[Fragment]) -> int:
    """It is no JSON, or no call. If its call has been told of, the rest alone is content."""
    after = splitter.place.state.after
    splitter.fail("", out)
    if mine.called:
        splitter.enter(after)
    return at


def _string(text: str) -> str | None:
    try:
        value = json.loads(text, strict=False)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


def _plain(text: str) -> str:
    """Arguments as JSON: what a string holds, {} for null."""
    if text == "null":
        return "{}"
    if text.startswith('"'):
        inside = _string(text)
        return text if inside is None else inside if inside.strip() else "{}"
    return text
