"""Values within JSON that comes in pieces.

What it is: `JsonValues`, which reads a text piece by piece, wherever it is cut, and tells each value that is complete: where it stands (a JSON Pointer, RFC 6901) and its own text.
What it does not know: where the text comes from, who is told.
"""

from __future__ import annotations

import json
import re
from typing import NamedTuple

DEPTH = 4
"""Values that stand deeper are told with those that hold them alone."""
MOST_CHARS = 1 << 16
"""Of a value's text: a longer one is told without it. As much is kept at most."""
MOST_NAME = 1 << 12
"""Characters of a name, a number or a word that is read on; and no deeper than so many levels / 4."""

_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_SPACE = re.compile(r"[ \t\r\n]+")
_BARE = re.compile(r"[-+.0-9A-Za-z]+")
_SCALAR = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|true|false|null")
_ESCAPED = re.compile(r"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|u[dD][89a-fA-F][0-9a-fA-F]{2}|.)")
_HEX = frozenset("0123456789abcdefABCDEF")


class Value(NamedTuple):
    path: str
    """JSON Pointer."""
    item: int | None
    """Which item of the answer it is, if that is a list and this one of its items."""
    text: str | None
    """Its JSON, without white space between; None: it is longer than MOST_CHARS."""


class _Open:
    """A list or an object that is not closed yet."""

    __slots__ = ("count", "name", "path", "start")

    def __init__(self, path: str, start: int, is_list: bool) -> None:
        self.path = path
        """"": also of those that are too deep to be told."""
        self.start = start
        """Where its text begins among the pieces; -1: it is not kept."""
        self.count = 0 if is_list else -1
        """Items so far; -1: an object."""
        self.name = ""
        """An object's member that is read, as a token of a path."""


def _whole(match: re.Match[str]) -> str:
    """Half a surrogate pair is no character, and many readers refuse it."""
    found = match.group()
    return r"\ufffd" if len(found) == 6 and found[1] == "u" and found[2] in "dD" and found[3] in "89abcdefABCDEF" else found


def _mended(text: str) -> str:
    return _ESCAPED.sub(_whole, text) if "\\" in text else text


class JsonValues:
    """One text. Values come in the order in which they end: those within before what holds them. The root itself is not told. Of what is no JSON nothing more is told."""

    __slots__ = ("_expects", "_left", "_name", "_pieces", "_size", "_stack", "_start", "_token", "_token_size")

    def __init__(self) -> None:
        self._stack: list[_Open] = []
        self._expects = "value"
        """value, item (or the end), name, member (a name or the end), colon, next (or the end), string, bare; "": nothing more."""
        self._left = 0
        """Of an escape: hex digits that are to come; -1: the character behind the backslash."""
        self._name = False
        """Is the string that is read a name?"""
        self._pieces: list[str] = []
        """The text of the outermost open value that is kept, each value in it beginning with a piece of its own."""
        self._size = 0
        self._start = -1
        """Where the scalar that is read begins among the pieces."""
        self._token: list[str] = []
        """The name or bare scalar that is read."""
        self._token_size = 0

    def feed(self, text: str) -> list[Value]:
        """The next piece. What is complete now."""
        out: list[Value] = []
        at, end = 0, len(text)
        while at < end and self._expects:
            if self._expects == "string":
                at = self._string(text, at, out)
            elif self._expects == "bare":
                found = _BARE.match(text, at)
                if found is not None:
                    self._take(found.group())
                    at = found.end()
                else:
                    self._end_bare(out)
            elif found := _SPACE.match(text, at):
                at = found.end()
            else:
                at = self._mark(text, at, out)
        return out

    # --- tokens

    def _string(self, text: str, at: int, out: list[Value]) -> int:
        """Read on in a string. Where it goes on, or what follows it."""
        begin, end = at, len(text)
        closed = False
        while at < end and not closed:
            char = text[at]
            if self._left:
                if self._left < 0:
                    if char not in '"\\/bfnrtu':
                        return self._give_up(end)
                    self._left = 4 if char == "u" else 0
                elif char in _HEX:
                    self._left -= 1
                else:
                    return self._give_up(end)
                at += 1
            elif char == '"':
                closed = True
                at += 1
            elif char == "\\":
                self._left = -1
                at += 1
            else:
                found = _PLAIN.match(text, at)
                if found is None:
                    return self._give_up(end)
                at = found.end()
        self._take(text[begin:at])
        if closed and self._expects:
            if self._name:
                self._end_name()
            else:
                self._end_value(self._start, out)
        return at

    def _take(self, piece: str) -> None:
        """More of the token that is read."""
        if self._name or self._expects == "bare":
            self._token.append(piece)
            self._token_size += len(piece)
            if self._token_size > MOST_NAME:
                self._give_up(0)
                return
        self._keep(piece)

    def _end_name(self) -> None:
        name = json.loads(_mended("".join(self._token)))
        self._stack[-1].name = name.replace("~", "~0").replace("/", "~1")
        self._token.clear()
        self._expects = "colon"

    def _end_bare(self, out: list[Value]) -> None:
        known = _SCALAR.fullmatch("".join(self._token)) is not None
        self._token.clear()
        if known:
            self._end_value(self._start, out)
        else:
            self._give_up(0)

    def _mark(self, text: str, at: int, out: list[Value]) -> int:
        """A character that is no space and in no token. What follows it."""
        char, expects = text[at], self._expects
        if char in "]}":
            stack = self._stack
            fits = stack and (stack[-1].count >= 0) == (char == "]") and expects in ("next", "item" if char == "]" else "member")
            if not fits:
                return self._give_up(len(text))
            self._keep(char)
            self._end_value(stack.pop().start, out)
        elif char == "," and expects == "next":
            self._keep(char)
            self._expects = "name" if self._stack[-1].count < 0 else "value"
        elif char == ":" and expects == "colon":
            self._keep(char)
            self._expects = "value"
        elif char == '"' and expects in ("name", "member"):
            self._name, self._expects, self._token_size = True, "string", 0
            self._take(char)
        elif expects in ("value", "item"):
            return self._begin(text, at)
        else:
            return self._give_up(len(text))
        return at + 1

    # --- values

    def _begin(self, text: str, at: int) -> int:
        char, depth = text[at], len(self._stack)
        told = 1 <= depth <= DEPTH
        start = len(self._pieces) if told or (depth > DEPTH and self._stack[-1].start >= 0) else -1
        if char in "{[":
            if depth >= MOST_NAME // 4:
                return self._give_up(len(text))
            self._stack.append(_Open(self._path() if depth <= DEPTH else "", start, char == "["))
            self._keep(char)
            self._expects = "item" if char == "[" else "member"
            return at + 1
        self._start = start
        self._name = False
        self._token_size = 0
        if char == '"':
            self._expects = "string"
            self._take(char)
            return at + 1
        if _BARE.match(char) is None:
            return self._give_up(len(text))
        self._expects = "bare"
        return at

    def _path(self) -> str:
        """Of the value that begins or ends."""
        if not self._stack:
            return ""
        parent = self._stack[-1]
        return f"{parent.path}/{parent.name if parent.count < 0 else parent.count}"

    def _end_value(self, start: int, out: list[Value]) -> None:
        depth = len(self._stack)
        if not depth:
            self._expects = ""
            return
        parent = self._stack[-1]
        if depth <= DEPTH:
            text = None
            if start >= 0:
                text = "".join(self._pieces[start:])
                self._pieces[start:] = [text]
            out.append(
                Value(self._path(), parent.count if depth == 1 and parent.count >= 0 else None, None if text is None else _mended(text))
            )
        if depth == 1 or parent.start < 0:  # nobody needs it any more
            self._pieces.clear()
            self._size = 0
        if parent.count >= 0:
            parent.count += 1
        self._expects = "next"

    def _keep(self, piece: str) -> None:
        """Of a value that is told, or within one."""
        scalar = self._expects in ("string", "bare") and not self._name
        if not (self._start >= 0 if scalar else bool(self._stack) and self._stack[-1].start >= 0):
            return
        self._pieces.append(piece)
        self._size += len(piece)
        if self._size > MOST_CHARS:
            self._pieces.clear()
            self._size = 0
            self._start = -1
            for one in self._stack:
                one.start = -1

    def _give_up(self, at: int) -> int:
        self._expects = ""
        self._stack.clear()
        self._pieces.clear()
        self._token.clear()
        return at
