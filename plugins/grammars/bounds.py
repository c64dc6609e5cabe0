"""Numbers and strings of JSON that end, and names that come once.

What it is: `Bounds` follows the bytes of an answer in JSON and takes from a mask what would make a number or a string longer than anybody needs, if
something else is allowed too: what is left is still of the grammar; and, by names.py, what would say a name again. (White space is bounded by the grammar.)
What it does not know: schemas, the grammar's state.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from penstock.core.protocol.columns import I32
from penstock.plugins.grammars.names import Names, NameTokens

LONGEST_NUMBER = 24
"""Characters: every 64-bit integer and double can be written so."""
LONGEST_STRING = 32768
"""Bytes between quotes. A schema's own maxLength may be smaller."""

_EXPONENT = re.compile(rb"[\s,:\[]*-?[0-9][0-9.]*[eE]")


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


def _keep(out: I32, mask: I32, may_be_empty: bool) -> None:
    left = out & mask
    if may_be_empty or left.any():
        out[:] = left
