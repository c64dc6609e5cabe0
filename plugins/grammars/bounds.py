"""Numbers and strings of JSON that end, and names that come once.

What it is: `Bounds` follows the bytes of an answer in JSON and takes from a mask what would make a number or a string longer than anybody needs, if
something else is allowed too: what is left is still of the grammar; and, by names.py, what would say a name again. (White space is bounded by the grammar.)
`ended` does the same for strings without quotes.
What it does not know: schemas, the grammar's state.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Self

import numpy as np

from penstock.core.protocol.columns import I32
from penstock.plugins.grammars.names import Names, NameTokens

LONGEST_NUMBER = 24
"""Characters: every 64-bit integer and double can be written so."""
LONGEST_STRING = 32768
"""Bytes between quotes. A schema's own maxLength may be smaller."""

_EXPONENT = re.compile(rb"[\s,:\[]*-?[0-9][0-9.]*[eE]")
_WILD = re.compile(rb"[\x00-\x1f]|\\u|^u")
"""What a token must have that is not tame."""


def mask_of(chosen: list[bool], words: int) -> I32:
    """A mask of these tokens."""
    bits = np.zeros(words * 32, np.uint8)
    bits[: len(chosen)] = chosen
    return np.packbits(bits, bitorder="little").view(np.int32)


class Starts:
    """Masks of a vocabulary: tokens that do `not` begin with a part of a number; not with an exponent (in a number, or bringing one of their own); those
    that begin with a quote."""

    def __init__(self, tokens: Sequence[bytes], words: int) -> None:
        number = frozenset(b"0123456789.eE+-")
        self.no_number = mask_of([not (token and token[0] in number) for token in tokens], words)
        self.no_exponent = mask_of([re.match(rb"[0-9.]*[eE]", token) is None for token in tokens], words)
        self.no_own_exponent = mask_of([_EXPONENT.match(token) is None for token in tokens], words)
        self.quote = mask_of([token[:1] == b'"' for token in tokens], words)
        self.names = NameTokens(tokens)
        self._tokens = tokens
        self._words = words
        self._ways: dict[bytes, I32] = {}

    def way(self, text: bytes) -> I32:
        """Tokens that this text begins with, or that begin with it."""
        if text not in self._ways:
            self._ways[text] = mask_of(
                [bool(token) and (token.startswith(text) or text.startswith(token)) for token in self._tokens], self._words
            )
        return self._ways[text]


class Bounds:
    """One answer."""

    __slots__ = ("_escaped", "_in_string", "_names", "_number", "_starts", "_string")

    def __init__(self, starts: Starts, *, free_names: bool = True) -> None:
        """`free_names`: there may be objects whose names the grammar does not say one by one."""
        self._starts = starts
        self._names = Names(starts.names) if free_names else None
        self._in_string = False
        self._escaped = False
        self._string = 0
        self._number = 0

    def copy(self) -> Self:
        """Another answer that has come as far."""
        other = type(self).__new__(type(self))
        other._starts = self._starts
        other._names = None if self._names is None else self._names.copy()
        other._in_string, other._escaped, other._string, other._number = self._in_string, self._escaped, self._string, self._number
        return other

    @property
    def names(self) -> Names | None:
        return self._names

    @property
    def in_string(self) -> bool:
        return self._in_string

    def feed(self, data: bytes) -> None:
        if self._names is not None:
            self._names.feed(data)
        for byte in data:
            if self._in_string:
                self._string += 1
                if self._escaped:
                    self._escaped = False
                elif byte == 0x5C:
                    self._escaped = True
                elif byte == 0x22:
                    self._in_string = False
            elif byte == 0x22:
                self._in_string, self._string, self._number = True, 0, 0
            elif byte in b"0123456789.eE+-":
                self._number += 1
            else:
                self._number = 0

    def narrow(self, out: I32, may_end: bool) -> None:
        """In place. `may_end`: the answer may end here, so that nothing need be left."""
        starts = self._starts
        if self._names is not None:
            self._names.narrow(out)
        if self._in_string:
            if self._string >= LONGEST_STRING and not self._escaped:
                _keep(out, starts.quote, False)
        elif self._number >= LONGEST_NUMBER:
            _keep(out, starts.no_number, may_end)
        else:
            _keep(out, starts.no_exponent if self._number else starts.no_own_exponent, may_end)


def ended(starts: Starts, out: I32, tail: bytes, then: bytes, count: int) -> None:
    """In place, for a string without quotes, of which there are `count` bytes and that `then` ends. `tail` is what was drawn last."""
    if count >= LONGEST_STRING:
        there = next(size for size in range(len(then) - 1, -1, -1) if tail.endswith(then[:size]))
        _keep(out, starts.way(then[there:]), False)


class TameStarts(Starts):
    """And tokens that are `tame` outside of a string, in one, and behind a backslash in one: they put no control character into a string, and say no
    character by its code."""

    def __init__(self, tokens: Sequence[bytes], words: int) -> None:
        super().__init__(tokens, words)
        states = ((False, False), (True, False), (True, True))
        self.tame = [mask_of([_tame(token, *state) for token in tokens], words) for state in states]


def _tame(token: bytes, in_string: bool, escaped: bool) -> bool:
    if _WILD.search(token) is None:
        return True
    for byte in token:
        if not in_string:
            in_string = byte == 0x22
        elif byte < 0x20 or (escaped and byte == 0x75):
            return False
        elif escaped:
            escaped = False
        elif byte == 0x22:
            in_string = False
        else:
            escaped = byte == 0x5C
    return True


class TameBounds(Bounds):
    """Bounds under which what stands in a string is JSON whatever the grammar says of it, and a name is spelt in one way only."""

    __slots__ = ("_tame",)

    def __init__(self, starts: TameStarts) -> None:
        super().__init__(starts)
        self._tame = starts.tame

    def copy(self) -> Self:
        """See Bounds."""
        other = super().copy()
        other._tame = self._tame
        return other

    def narrow(self, out: I32, may_end: bool) -> None:
        """See Bounds."""
        super().narrow(out, may_end)
        out &= self._tame[self._in_string + (self._in_string and self._escaped)]


def _keep(out: I32, mask: I32, may_be_empty: bool) -> None:
    left = out & mask
    if may_be_empty or left.any():
        out[:] = left
