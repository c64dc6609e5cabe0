"""Suffix automata in Python: the definitions, and what serves where there is no C compiler.

What it is: `Automaton` (Blumer et al., 1985), all substrings of the tokens added so far; and `Readers`, rows that each have an automaton of their own text and are perhaps followed in
another one, of texts before. Of a row what followed the longest run at its end is proposed, the longer the run the more of it.
What it does not know: whose texts they are, how long they live, what is made of a proposal.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
BREAK = -1
"""Between two texts: no token."""
COUNTS = "counts say another number of tokens than there are"


class Automaton:
    """A state stands for substrings that end at the same places; `first[state]` is the end of the first of these."""

    __slots__ = ("_length", "_link", "_next", "first", "last", "tokens")

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._next: list[dict[int, int]] = [{}]
        self._link = [-1]
        self._length = [0]
        self.first = [-1]
        self.last = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def learn(self, tokens: I32) -> None:
        """These come behind what there is."""
        for token in tokens.tolist():
            self.add(token)

    def since(self, first: int) -> I32:
        """The tokens from that one on."""
        return np.array(self.tokens[first:], np.int32)

    def add(self, token: int) -> None:
        """Amortised in constant time."""
        follow, link, length = self._next, self._link, self._length
        state = self._state({}, length[self.last] + 1, len(self.tokens))
        self.tokens.append(token)
        at = self.last
        self.last = state
        while at >= 0 and token not in follow[at]:
            follow[at][token] = state
            at = link[at]
        if at < 0:
            link[state] = 0
            return
        target = follow[at][token]
        if length[target] == length[at] + 1:
            link[state] = target
            return
        copy = self._state(dict(follow[target]), length[at] + 1, self.first[target])
        link[copy] = link[target]
        link[state] = link[target] = copy
        while at >= 0 and follow[at].get(token) == target:
            follow[at][token] = copy
            at = link[at]

    def _state(self, follow: dict[int, int], length: int, first: int) -> int:
        self._next.append(follow)
        self._link.append(0)
        self._length.append(length)
        self.first.append(first)
        return len(self._next) - 1

    def repeated(self) -> tuple[int, int]:
        """The longest suffix of all tokens that was there before: its length, and where it ended first."""
        state = self._link[self.last]
        return (self._length[state], self.first[state]) if state > 0 else (0, -1)

    def walk(self, state: int, matched: int, token: int) -> tuple[int, int]:
        """From the longest match of a text so far to that with one token more: state and length."""
        while matched <= self._length[self._link[state]] and state:  # states were split since
            state = self._link[state]
        while state and token not in self._next[state]:
            state = self._link[state]
            matched = self._length[state]
        if token in self._next[state]:
            return self._next[state][token], matched + 1
        return 0, 0

    def shrink(self, states: int) -> int:
        """Nobody needs it any more: give back at most so many states. How many; 0: all is done."""
        before = len(self._next)
        del self._next[max(0, before - states) :]
        return before - len(self._next)

    def after(self, end: int, most: int) -> list[int]:
        """What followed the token at `end`, up to a break."""
        found = self.tokens[end + 1 : end + 1 + most]
        return found[: found.index(BREAK)] if BREAK in found else found


class Readers:
    """Rows are small numbers that the caller chooses."""

    def __init__(self) -> None:
        self._rows: dict[int, tuple[Automaton, Automaton | None]] = {}
        self._at: dict[int, tuple[int, int]] = {}
        """Where each stands in texts before: state, and tokens that match."""

    def begin(self, row: int, own: Automaton, past: Automaton | None) -> None:
        """A row starts, its own automaton being empty."""
        self._rows[row], self._at[row] = (own, past), (0, 0)

    def end(self, row: int) -> None:
        """Its automata are not read any more."""
        del self._rows[row], self._at[row]

    def follow(self, rows: I64, counts: I32, tokens: I32) -> None:
        """Rows go on with so many tokens each, one behind the other."""
        if (counts < 0).any() or tokens.size != counts.sum():
            raise ValueError(COUNTS)
        said, begin = tokens.tolist(), 0
        for row, count in zip(rows.tolist(), counts.tolist(), strict=True):
            (own, past), at = self._rows[row], self._at[row]
            for token in said[begin : begin + count]:
                own.add(token)
                if past is not None:
                    at = past.walk(*at, token)
            self._at[row] = at
            begin += count

    def propose(self, rows: I64, most: I32, least: int, factor: int) -> tuple[I32, I32]:
        """Of each row at most so many tokens, where at least `least` match, `factor` a matched one: counts, and tokens one behind the other."""
        counts: list[int] = []
        found: list[int] = []
        for row, wanted in zip(rows.tolist(), most.tolist(), strict=True):
            source, past = self._rows[row]
            matched, end = source.repeated()
            state, length = self._at[row]
            if past is not None and length > matched:
                source, matched, end = past, length, past.first[state]
            mine = source.after(end, min(wanted, factor * matched)) if matched >= least else []
            counts.append(len(mine))
            found += mine
        return np.array(counts, np.int32), np.array(found, np.int32)
