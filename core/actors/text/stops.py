"""Stop strings with hold-back.

What it is: an Aho-Corasick automaton over a request's stop strings (Aho and Corasick, "Efficient string matching", CACM 18(6), 1975), and
the per-sequence matcher that lets text out only once it cannot be the start of a stop string any more; `Withheld`, what goes with that text. The automaton knows how many
characters to hold back, so that a character costs amortised O(1) however many strings there are.
Which stop string wins does not depend on how the text was cut into tokens: the one that is completed first; of those completed by the
same character, the longest. The matcher sees all text; the caller says from when on a completed stop string ends it (`min_tokens`), and one
that was completed earlier is text like any other, in which a later one may have begun.
What it does not know: tokens, requests, the engine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

MAX_STOP_CHARS = 4096
"""Longest stop string that a request may bring (it bounds the hold-back and the automaton)."""


class StopSet:
    """The automaton; immutable, shared by the choices of a request."""

    __slots__ = ("depth", "fail", "goto", "hit", "keep")

    def __init__(self, strings: Sequence[str]) -> None:
        self.goto: list[dict[str, int]] = [{}]
        self.depth: list[int] = [0]
        self.hit: list[str | None] = [None]
        for string in strings:
            if not string:
                raise ValueError("a stop string must not be empty")
            node = 0
            for char in string:
                following = self.goto[node].get(char)
                if following is None:
                    following = len(self.goto)
                    self.goto[node][char] = following
                    self.goto.append({})
                    self.depth.append(self.depth[node] + 1)
                    self.hit.append(None)
                node = following
            self.hit[node] = string
        self.fail: list[int] = [0] * len(self.goto)
        # Characters that may still begin a stop string: all up to the node, but at the end of one (which did not end the text) fewer.
        self.keep = self.depth.copy()
        queue = deque(self.goto[0].values())
        while queue:
            node = queue.popleft()
            for char, following in self.goto[node].items():
                queue.append(following)
                back = self.fail[node]
                while back and char not in self.goto[back]:
                    back = self.fail[back]
                self.fail[following] = self.goto[back].get(char, 0)
            if self.hit[node] is None:
                self.hit[node] = self.hit[self.fail[node]]
            if not self.goto[node]:
                self.keep[node] = self.keep[self.fail[node]]


class StopMatcher:
    """One sequence's place in the automaton. `held` is text that may be the start of a stop string."""

    __slots__ = ("_set", "_state", "held")

    def __init__(self, stops: StopSet) -> None:
        self._set = stops
        self._state = 0
        self.held = ""

    def feed(self, text: str, ends: bool = True) -> tuple[str, str | None]:
        """Take new text. Returns what may go out, and the stop string if one was completed: then what goes out ends right before it
        and the rest of `text` is dropped. Unless `ends`, stop strings that `text` completes are no end."""
        goto, fail, hit = self._set.goto, self._set.fail, self._set.hit
        state = self._state
        for index, char in enumerate(text):
            following = goto[state].get(char)
            while following is None and state:
                state = fail[state]
                following = goto[state].get(char)
            state = following or 0
            stop = hit[state]
            if stop is not None and ends:
                whole = self.held + text[: index + 1]
                self.held = ""
                self._state = 0
                return whole[: len(whole) - len(stop)], stop
        self._state = state
        keep = self._set.keep[state]
        if not keep:
            if not self.held:
                return text, None
            whole, self.held = self.held + text, ""
            return whole, None
        whole = self.held + text
        cut = len(whole) - keep
        self.held = whole[cut:]
        return whole[:cut], None

    def flush(self) -> str:
        """The sequence has ended: what was held back was no stop string."""
        held, self.held, self._state = self.held, "", 0
        return held


class Withheld:
    """What goes with tokens (their log-probabilities) while a matcher holds their text back: it is out with the first character of the token's."""

    __slots__ = ("_begins", "_items", "_out", "_seen")

    def __init__(self) -> None:
        self._items: deque[Any] = deque()
        self._begins: deque[int] = deque()
        self._seen = 0
        self._out = 0

    def add(self, item: Any, chars: int) -> None:
        """Of the next token, which adds `chars` characters to what the matcher sees."""
        self._items.append(item)
        self._begins.append(self._seen)
        self._seen += chars

    def let_out(self, chars: int) -> list[Any]:
        """The matcher lets so many more characters out."""
        self._out += chars
        out = []
        while self._begins and self._begins[0] < self._out:
            self._begins.popleft()
            out.append(self._items.popleft())
        return out

    def rest(self) -> list[Any]:
        """All that is left."""
        out = [*self._items]
        self._items.clear()
        self._begins.clear()
        return out


def cut(text: str, stops: Sequence[str], after: int = 0) -> tuple[str, str | None]:
    """The reference: what is left of a complete text, by the same rule, and which stop string cut it. Those that are complete within the
    first `after` characters are no end."""
    best: tuple[int, int, str] | None = None
    for stop in stops:
        start = text.find(stop, max(0, after - len(stop) + 1))
        if start >= 0 and (best is None or (start + len(stop), start) < best[:2]):
            best = (start + len(stop), start, stop)
    return (text, None) if best is None else (text[: best[1]], best[2])
