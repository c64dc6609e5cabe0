"""Patterns as JSON schemas have them: ECMA-262's regular expressions with the flag u.

What it is: `translated` says a pattern in the syntax of Rust's regex-syntax, with every class written out by its code points, so that no short form means
another thing there; `words` are the texts that a pattern allows, if they are few. What ECMA-262 has not, and what no grammar can express, is refused by name.
Escapes of signs that need none (`\\-`, `\\@`) are taken for the sign, as browsers take them without u.
Source: ECMA-262, "RegExp (Regular Expression) Objects" (https://tc39.es/ecma262/#sec-patterns).
What it does not know: schemas, JSON's own escapes. It is long because a pattern is read, said again and counted in one piece.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TypeAlias

import msgspec

from penstock.core.protocol.errors import UnsupportedFeature

LAST = 0x10FFFF
NUL = r"\x{0}"
"""Not drawn where a class has it and not both the quote and the backslash: of a class with all control characters the backend takes those two for members in JSON."""
MOST_REPEATED = 1000
MOST_NESTED = 50
Ranges = list[tuple[int, int]]
"""First and last code points, sorted, apart."""
SURROGATES = (0xD800, 0xDFFF)
DIGITS: Ranges = [(0x30, 0x39)]
WORD: Ranges = [(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)]
SPACE: Ranges = [(9, 13), (0x20, 0x20), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029)]
SPACE += [(0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF)]
LINE_ENDS: Ranges = [(10, 10), (13, 13), (0x2028, 0x2029)]
_CLASSES = {"d": DIGITS, "w": WORD, "s": SPACE}
_CONTROLS = {"t": 9, "n": 10, "v": 11, "f": 12, "r": 13}
_SYNTAX = frozenset("^$\\.*+?()[]{}|")
_PROPERTY = re.compile(r"\{([A-Za-z_]+(?:=[A-Za-z_0-9]+)?)\}")
_COUNTS = re.compile(r"\{([0-9]+)(,([0-9]*))?\}")
_NAME = re.compile(r"\?<[A-Za-z_$][A-Za-z_$0-9]*>")


def union(ranges: Ranges) -> Ranges:
    made: Ranges = []
    for first, last in sorted(ranges):
        if made and first <= made[-1][1] + 1:
            made[-1] = (made[-1][0], max(made[-1][1], last))
        else:
            made.append((first, last))
    return made


def complement(ranges: Ranges) -> Ranges:
    """Of the code points that are no surrogates."""
    made: Ranges = []
    at = 0
    for first, last in union([*ranges, SURROGATES]):
        if first > at:
            made.append((at, first - 1))
        at = last + 1
    return [*made, (at, LAST)] if at <= LAST else made


class Chars(msgspec.Struct, frozen=True):
    """One character. `properties`: of Unicode, as `\\p{..}` or `\\P{..}`; `but`: none of all these."""

    ranges: Ranges
    properties: list[str] = []
    but: bool = False


class Chain(msgspec.Struct, frozen=True):
    parts: list[Node]


class Either(msgspec.Struct, frozen=True):
    ways: list[Node]


class Repeat(msgspec.Struct, frozen=True):
    part: Node
    least: int
    most: int | None


class Anchor(msgspec.Struct, frozen=True):
    sign: str


Node: TypeAlias = Chars | Chain | Either | Repeat | Anchor


def _refused(what: str) -> UnsupportedFeature:
    return UnsupportedFeature(f"{what} is not supported in a pattern.")


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._depth = 0

    def whole(self) -> Node:
        made = self._either()
        if self._at < len(self._text):
            raise UnsupportedFeature("The pattern has a ')' without a '('.")
        return made

    def _next(self) -> str:
        return self._text[self._at : self._at + 1]

    def _match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        found = pattern.match(self._text, self._at)
        if found is not None:
            self._at = found.end()
        return found

    def _either(self) -> Node:
        ways = [self._chain()]
        while self._next() == "|":
            self._at += 1
            ways.append(self._chain())
        return ways[0] if len(ways) == 1 else Either(ways)

    def _chain(self) -> Node:
        parts: list[Node] = []
        while (char := self._next()) and char not in "|)":
            part = self._atom(char)
            parts.append(part if isinstance(part, Anchor) else self._repeated(part))
        return parts[0] if len(parts) == 1 else Chain(parts)

    def _atom(self, char: str) -> Node:
        self._at += 1
        if char in "^$":
            if self._next() in ("*", "+", "?", "{"):
                raise _refused(f"An anchor that is repeated ({char!r})")
            return Anchor(char)
        if char == "(":
            return self._group()
        if char == "[":
            return self._class()
        if char == ".":
            return Chars(complement(LINE_ENDS))
        if char == "\\":
            return self._escape()
        if char in "*+?{":
            raise UnsupportedFeature(f"The pattern has {char!r} where nothing is to be repeated: write '\\{char}' for the sign.")
        if char in "]}":
            raise UnsupportedFeature(f"The pattern has a {char!r} that closes nothing: write '\\{char}' for the sign.")
        return self._char(ord(char))

    def _char(self, code: int) -> Chars:
        if SURROGATES[0] <= code <= SURROGATES[1]:
            raise _refused("Half of a surrogate pair")
        return Chars([(code, code)])

    def _group(self) -> Node:
        if self._next() == "?" and self._match(_NAME) is None:
            kind = self._text[self._at : self._at + 2]
            behind = self._text[self._at : self._at + 3]
            if kind in ("?=", "?!") or behind in ("?<=", "?<!"):
                raise _refused(f"Looking ahead or behind ('({behind if behind[:2] == '?<' else kind}')")
            if kind != "?:":
                raise _refused(f"'({kind}'")
            self._at += 2
        self._depth += 1
        if self._depth > MOST_NESTED:
            raise UnsupportedFeature(f"The pattern is nested more than {MOST_NESTED} levels deep.")
        made = self._either()
        self._depth -= 1
        if self._next() != ")":
            raise UnsupportedFeature("The pattern has a '(' without a ')'.")
        self._at += 1
        return made

    def _repeated(self, part: Node) -> Node:
        sign = self._next()
        if sign == "{":
            counts = self._match(_COUNTS)
            if counts is None:
                raise UnsupportedFeature("The pattern has a '{' that begins no counts: write '\\{' for the sign.")
            least = int(counts[1])
            most = least if counts[2] is None else int(counts[3]) if counts[3] else None
            if max(least, most or 0) > MOST_REPEATED:
                raise _refused(f"More than {MOST_REPEATED} times ({counts[0]!r})")
            if most is not None and most < least:
                raise UnsupportedFeature(f"The pattern's counts {counts[0]!r} are out of order.")
        elif sign and sign in "*+?":
            self._at += 1
            least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[sign]
        else:
            return part
        if self._next() == "?":  # as few as possible: the texts are the same
            self._at += 1
        if self._next() in ("*", "+", "?", "{"):
            raise UnsupportedFeature(f"The pattern has {self._next()!r} where nothing is to be repeated.")
        return Repeat(part, least, most)

    def _class(self) -> Chars:
        but = self._next() == "^"
        self._at += but
        found: Ranges = []
        properties: list[str] = []
        while (char := self._next()) != "]":
            first = self._member(char)
            if self._next() == "-" and self._text[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                last = self._member(self._next())
                ends = [one.ranges[0] if len(one.ranges) == 1 and not one.properties else (0, 1) for one in (first, last)]
                if any(low != high for low, high in ends):
                    raise UnsupportedFeature("The pattern has a range in '[]' that begins or ends with more than one character.")
                if ends[0][0] > ends[1][0]:
                    raise UnsupportedFeature("The pattern has a range in '[]' that is out of order.")
                found.append((ends[0][0], ends[1][0]))
            else:
                found += first.ranges
                properties += first.properties
        self._at += 1
        return Chars(union(found), properties, but)

    def _member(self, char: str) -> Chars:
        if not char:
            raise UnsupportedFeature("The pattern has a '[' without a ']'.")
        self._at += 1
        return self._escape(inside=True) if char == "\\" else self._char(ord(char))

    def _escape(self, *, inside: bool = False) -> Chars:
        char = self._next()
        self._at += 1
        if char in _CONTROLS:
            return self._char(_CONTROLS[char])
        if char.lower() in _CLASSES and char:
            found = _CLASSES[char.lower()]
            return Chars(found if char.islower() else complement(found))
        if char in ("p", "P"):
            name = self._match(_PROPERTY)
            if name is None:
                raise UnsupportedFeature(f"The pattern has '\\{char}' without the name of a property.")
            return Chars([], [f"\\{char}{name[0]}"])
        if char == "b" and inside:
            return self._char(8)
        if char in ("b", "B"):
            raise _refused(f"The edge of a word ('\\{char}')")
        if char == "0" and not self._next().isdigit():
            return self._char(0)
        if char.isdigit() or char == "k":
            raise _refused(f"A reference to a group ('\\{char}')")
        if char == "x":
            return self._char(self._hex(2, "\\x"))
        if char == "u":
            return self._char(self._unicode())
        if char == "c" and re.match("[A-Za-z]", self._next()):
            self._at += 1
            return self._char(ord(self._text[self._at - 1]) % 32)
        if not char or char.isalnum() or char in "_<>":
            raise _refused(f"'\\{char}'")
        return self._char(ord(char))

    def _hex(self, size: int, sign: str) -> int:
        digits = self._text[self._at : self._at + size]
        if not re.fullmatch(f"[0-9A-Fa-f]{{{size}}}", digits):
            raise UnsupportedFeature(f"The pattern's {sign!r} needs {size} hexadecimal digits.")
        self._at += size
        return int(digits, 16)

    def _unicode(self) -> int:
        braced = self._match(re.compile(r"\{([0-9A-Fa-f]{1,6})\}"))
        if braced is not None:
            if int(braced[1], 16) > LAST:
                raise UnsupportedFeature(f"The pattern's {braced[0]!r} is no character.")
            return int(braced[1], 16)
        code = self._hex(4, "\\u")
        low = re.compile(r"\\u([dD][c-fC-F][0-9A-Fa-f]{2})")
        if 0xD800 <= code < 0xDC00 and (second := self._match(low)) is not None:
            return 0x10000 + ((code - 0xD800) << 10) + int(second[1], 16) - 0xDC00
        return code


def _anchored(node: Node, first: bool, last: bool) -> None:
    """An anchor stands where a text begins or ends. Elsewhere nothing, or not only that, would match."""
    if isinstance(node, Anchor):
        if not (first if node.sign == "^" else last):
            raise _refused(f"The anchor {node.sign!r} in the middle")
    elif isinstance(node, Either):
        for way in node.ways:
            _anchored(way, first, last)
    elif isinstance(node, Repeat):
        _anchored(node.part, False, False)
    elif isinstance(node, Chain):
        solid = [i for i, part in enumerate(node.parts) if not isinstance(part, Anchor)]
        for i, part in enumerate(node.parts):
            _anchored(part, first and (not solid or i <= solid[0]), last and (not solid or i >= solid[-1]))


def parsed(pattern: str) -> Node:
    """Raises UnsupportedFeature."""
    made = _Parser(pattern).whole()
    _anchored(made, True, True)
    return made


def _holds(ranges: Ranges, code: int) -> bool:
    return any(first <= code <= last for first, last in ranges)


def _code(code: int) -> str:
    char = chr(code)
    return char if char.isascii() and char.isalnum() else f"\\x{{{code:x}}}"


def _said(node: Node) -> str:
    if isinstance(node, Anchor):
        return node.sign
    if isinstance(node, Chain):
        return "".join(f"(?:{_said(part)})" if isinstance(part, Either) else _said(part) for part in node.parts)
    if isinstance(node, Either):
        return "|".join(map(_said, node.ways))
    if isinstance(node, Repeat):
        counts = {(0, None): "*", (1, None): "+", (0, 1): "?"}.get((node.least, node.most))
        if counts is None:
            most = "" if node.most is None else str(node.most)
            counts = f"{{{node.least}}}" if node.least == node.most else f"{{{node.least},{most}}}"
        return f"(?:{_said(node.part)}){counts}"
    ranges = node.ranges
    if not node.properties:
        ranges = complement(ranges) if node.but else ranges
        if not (_holds(ranges, 0x22) and _holds(ranges, 0x5C)):
            ranges = [(max(first, 1), last) for first, last in ranges if last]  # see NUL
        if not ranges:
            return r"[a&&b]"  # nothing
        if len(ranges) == 1 and ranges[0][0] == ranges[0][1]:
            return _code(ranges[0][0])
    inside = "".join(_code(first) if first == last else f"{_code(first)}-{_code(last)}" for first, last in ranges)
    if not node.properties:
        return f"[{inside}]"
    return f"[[{'^' if node.but else ''}{inside}{''.join(node.properties)}]&&[^{NUL}]]"


def translated(pattern: str) -> str:
    """Raises UnsupportedFeature, whose message says what of the pattern it is."""
    return _said(parsed(pattern))


def words(pattern: str, most: int) -> list[str] | None:
    """What the pattern allows, sorted; None: more than `most`, or without bounds. Raises UnsupportedFeature."""
    node = parsed(pattern)
    ways = node.ways if isinstance(node, Either) else [node]
    found: set[str] = set()
    for way in ways:
        parts = way.parts if isinstance(way, Chain) else [way]
        if len(parts) < 2 or parts[0] != Anchor("^") or parts[-1] != Anchor("$"):
            return None
        some = _words(Chain([part for part in parts if not isinstance(part, Anchor)]), most)
        if some is None or len(found | some) > most:
            return None
        found |= some
    return sorted(found)


def extendable(pattern: str) -> bool:
    """Can every text that it allows be made longer, again and again? False where that is not plain. Raises UnsupportedFeature."""
    node = parsed(pattern)
    for way in node.ways if isinstance(node, Either) else [node]:
        parts = way.parts if isinstance(way, Chain) else [way]
        if parts and parts[-1] == Anchor("$"):
            last = parts[-2] if len(parts) > 1 else None
            if not (isinstance(last, Repeat) and last.most is None and isinstance(last.part, Chars)):
                return False
        elif any(isinstance(part, Either) for part in parts):  # an anchor may be in it
            return False
    return True


def _words(node: Node, most: int) -> set[str] | None:
    if isinstance(node, Anchor):
        return None
    if isinstance(node, Chars):
        ranges = complement(node.ranges) if node.but else node.ranges
        if node.properties or sum(last - first + 1 for first, last in ranges) > most:
            return None
        return {chr(code) for first, last in ranges for code in range(first, last + 1)}
    if isinstance(node, Either):
        return _joined(node.ways, most, lambda found, some: found | some, set())
    if isinstance(node, Repeat):
        if node.most is None:
            return None
        one = _words(node.part, most)
        if one is None:
            return None
        made: set[str] = set()
        power = {""}
        for count in range(node.most + 1):
            if count >= node.least:
                made |= power
            power = {a + b for a in power for b in one}
            if max(len(made), len(power)) > most:
                return None
        return made
    return _joined(node.parts, most, lambda found, some: {a + b for a in found for b in some}, {""})


def _joined(nodes: Sequence[Node], most: int, join: Callable[[set[str], set[str]], set[str]], found: set[str]) -> set[str] | None:
    for node in nodes:
        some = _words(node, most)
        if some is None:
            return None
        found = join(found, some)
        if len(found) > most:
            return None
    return found
