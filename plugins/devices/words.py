"""Bad words looked up on the host: which tokens would complete one.

What it is: `WordTable`, the words of one sequence in an order in which one binary search finds every word that a history ends with all but the last token
of. The beginnings (a word without its last token) are kept as bytes, read from their end: those that fit a history are then the prefixes of one string,
and all of them lie on one chain of ever shorter prefixes, which is made once. A look-up costs the logarithm of the number of words and what it
finds, however long the words are and however nearly they fit; nothing is remembered between two steps, so that preempted, forked and rewritten
histories need no care.
What it does not know: logits, slots, devices (one whose histories the host cannot see compares all words by itself: DeviceOps.ban_words).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from penstock.core.protocol.columns import EMPTY_I32, I32

_TOKEN_BYTES = 4


class WordTable:
    """Of words [n] int32 with at least two tokens each."""

    def __init__(self, words: Sequence[I32]) -> None:
        ends: dict[bytes, list[int]] = {}
        for word in words:
            ends.setdefault(word[-2::-1].tobytes(), []).append(int(word[-1]))
        self._beginnings = sorted(ends)
        self._ends = [ends[beginning] for beginning in self._beginnings]
        self._shorter = _chain(self._beginnings)
        self.reach = max(map(len, self._beginnings), default=0) // _TOKEN_BYTES
        """So many of a history's last tokens decide."""

    def banned(self, history: I32) -> I32:
        """The tokens that complete a word behind this history ([n], at least its last `reach` tokens): ascending, none twice."""
        key = history[::-1][: self.reach].tobytes()
        at = bisect_right(self._beginnings, key) - 1
        if at < 0:
            return EMPTY_I32
        # A prefix of the key sorts before it, and all between the two begin with that prefix: so it is on the chain of the last one before the key.
        fits = _common(self._beginnings[at], key)
        found: list[int] = []
        while at >= 0:
            if len(self._beginnings[at]) <= fits:
                found += self._ends[at]
            at = self._shorter[at]
        return np.unique(np.asarray(found, np.int32)) if found else EMPTY_I32


def _chain(beginnings: list[bytes]) -> list[int]:
    """For each of the sorted strings the longest other one that is a prefix of it; -1: none."""
    shorter: list[int] = []
    open_: list[int] = []
    for index, beginning in enumerate(beginnings):
        while open_ and not beginning.startswith(beginnings[open_[-1]]):
            open_.pop()
        shorter.append(open_[-1] if open_ else -1)
        open_.append(index)
    return shorter


def _common(one: bytes, other: bytes) -> int:
    """How many bytes both begin with, in whole tokens."""
    size = min(len(one), len(other))
    if one[:size] == other[:size]:
        return size
    differ = np.frombuffer(one, np.int32, size // _TOKEN_BYTES) != np.frombuffer(other, np.int32, size // _TOKEN_BYTES)
    return int(differ.argmax()) * _TOKEN_BYTES
