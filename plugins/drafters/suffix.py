"""The drafter "suffix": what followed the longest run of tokens that was there before.

What it is: suffix automata (Blumer et al., 1985), one of each sequence's own tokens and one of what was answered before under the same prefix-cache root (so that nobody
sees another tenant's texts). The longest suffix of a sequence that occurred before is known after every token without a search; what
followed it then is proposed, the longer the match the more of it (as SuffixDecoding does, arXiv 2411.04975). Good for agents, edits and code, where texts repeat.
The engine waits for it between two steps, so long texts are learned, and forgotten, in pieces.
What it does not know: models, how drafts are verified.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from typing import Any

import numpy as np

from penstock.core.protocol.columns import EMPTY_I32, I32
from penstock.core.protocol.errors import ConfigError
from penstock.core.protocol.speculation import MOST_TOKENS, DraftConfig

BREAK = -1
"""Between two answers: no token."""
DRAFTS = 8
NUMBERS = {"own_tokens": 4096, "past_tokens": 65536, "tenants": 64}
"""Its options: how many of a prompt's last tokens are looked at, of past answers of a tenant, and of how many tenants; 0 past tokens: of none."""
WORK = 256
"""Tokens of long texts (prompts, past answers) that are learned between two steps: about half a millisecond. A prompt of 4096 tokens has drafts 16 steps later."""
AT_ONCE = MOST_TOKENS + 1
"""Tokens of a sequence that are learned when they come: what a step brings."""
LEAST, FACTOR = 3, 2
"""The shortest match that counts, and how many tokens are proposed a matched one."""


class Automaton:
    """All substrings of the tokens added so far. A state stands for substrings that end at the same places; `first[state]` is the end of the first of these."""

    __slots__ = ("_length", "_link", "_next", "first", "last", "tokens")

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._next: list[dict[int, int]] = [{}]
        self._link = [-1]
        self._length = [0]
        self.first = [-1]
        self.last = 0

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
        """Forget at most so many states, whatever that leaves: how many."""
        before = len(self._next)
        del self._next[max(0, before - states) :]
        return before - len(self._next)

    def after(self, end: int, most: int) -> list[int]:
        """What followed the token at `end`, up to a break."""
        found = self.tokens[end + 1 : end + 1 + most]
        return found[: found.index(BREAK)] if BREAK in found else found


class _Past:
    """What was answered before. Not all of it is in the automaton yet."""

    __slots__ = ("automaton", "planned", "readers", "replaced")

    def __init__(self) -> None:
        self.automaton = Automaton()
        self.planned = 0
        """Tokens in it, once all is."""
        self.readers = 0
        """Sequences that follow it."""
        self.replaced = False


class _Sequence:
    __slots__ = ("matched", "own", "past", "said", "state", "tenant", "waiting")

    def __init__(self, tenant: str, past: _Past | None) -> None:
        self.tenant = tenant
        self.own = Automaton()
        self.past = past
        self.state = self.matched = 0
        self.said: list[int] = []
        """Its answer, for those that come later."""
        self.waiting: list[int] = []
        """Its next tokens, the last one first, that no automaton has seen yet."""

    def add(self, tokens: Iterable[int]) -> None:
        own, past = self.own, None if self.past is None else self.past.automaton
        for token in tokens:
            own.add(token)
            if past is not None:
                self.state, self.matched = past.walk(self.state, self.matched, token)


class Suffix:
    """See core/contract/drafters.py: HostDrafter."""

    def __init__(self, config: DraftConfig) -> None:
        for name, value in config.options.items():
            if name not in NUMBERS or type(value) is not int or value < 0:
                known = ", ".join(NUMBERS)
                raise ConfigError(
                    f"--speculative-config: 'options.{name}' of method 'suffix' is {value!r:.40}; numbers of 0 or more are {known}.",
                    param="speculative_config",
                )
        sizes = NUMBERS | config.options
        self.max_lookahead = config.num_speculative_tokens or DRAFTS
        self._least = config.prompt_lookup_min or LEAST
        self._own, self._past, self._tenants = sizes["own_tokens"], sizes["past_tokens"], sizes["tenants"]
        self._sequences: dict[int, _Sequence] = {}
        self._answers: OrderedDict[str, _Past] = OrderedDict()
        self._behind: OrderedDict[int, _Sequence] = OrderedDict()
        """Sequences with tokens that wait, the first come first."""
        self._later: deque[tuple[_Past, list[int]]] = deque()
        """Answers that wait to be learned, the last token first."""
        self._kept = 0
        """Their tokens."""
        self._old: list[Automaton] = []
        """Nobody's any more: freed piece by piece, too."""

    def begin(self, seq: int, tokens: I32, tenant: str) -> None:
        past = self._answers.get(tenant)
        if past is not None:
            self._answers.move_to_end(tenant)
            past.readers += 1
        one = self._sequences[seq] = _Sequence(tenant, past)
        self._take(seq, one, tokens[max(0, tokens.size - self._own) :].tolist())

    def extend(self, seq: int, tokens: I32) -> None:
        one = self._sequences[seq]
        said = tokens.tolist()
        one.said += said
        self._take(seq, one, said)

    def _take(self, seq: int, one: _Sequence, tokens: list[int]) -> None:
        """What a step brings at once; more than that waits for its turn."""
        if not one.waiting and len(tokens) <= AT_ONCE:
            one.add(tokens)
        else:
            one.waiting = tokens[::-1] + one.waiting
            self._behind[seq] = one

    def work(self) -> None:
        """See HostDrafter: sequences first, then what others may copy from later, then what is to be forgotten."""
        left = WORK
        while left and self._behind:
            seq, one = next(iter(self._behind.items()))
            left -= (taken := min(left, len(one.waiting)))
            one.add(_last(one.waiting, taken))
            if not one.waiting:
                del self._behind[seq]
        while left and self._later:
            past, waiting = self._later[0]
            taken = len(waiting) if past.replaced else min(left, len(waiting))
            self._kept -= taken
            if past.replaced:  # for nobody
                self._later.popleft()
                continue
            left -= taken
            for token in _last(waiting, taken):
                past.automaton.add(token)
            if not waiting:
                self._later.popleft()
        left = 4 * WORK  # forgetting is quicker than learning
        while left and self._old:
            left -= (gone := self._old[-1].shrink(left))
            if not gone:
                self._old.pop()

    def propose(self, seq: int, most: int) -> I32:
        one = self._sequences[seq]
        if one.waiting:
            return EMPTY_I32
        matched, end = one.own.repeated()
        source = one.own
        if one.past is not None and one.matched > matched:
            source, matched = one.past.automaton, one.matched
            end = source.first[one.state]
        if matched < self._least:
            return EMPTY_I32
        return np.array(source.after(end, min(most, FACTOR * matched)), np.int32)

    def end(self, seq: int) -> None:
        one = self._sequences.pop(seq)
        self._behind.pop(seq, None)
        self._old.append(one.own)
        if one.past is not None:
            one.past.readers -= 1
            self._bury(one.past)
        if not self._past or not one.said:
            return
        past = self._answers.get(one.tenant)
        said = one.said[-self._past :]
        if past is None or past.planned + len(said) > self._past:  # what is old goes as a whole; who still reads it may
            self._replace(past)
            past = self._answers[one.tenant] = _Past()
        self._answers.move_to_end(one.tenant)
        said.append(BREAK)
        past.planned += len(said)
        self._later.append((past, said[::-1]))
        self._kept += len(said)
        while self._kept > max(self._past, len(said)):  # learned too slowly: what is oldest is not
            late, waiting = self._later.popleft()
            self._kept -= len(waiting)
            if not late.replaced:
                late.automaton.add(BREAK)
        while len(self._answers) > self._tenants:
            self._replace(self._answers.popitem(last=False)[1])

    def _replace(self, past: _Past | None) -> None:
        if past is not None:
            past.replaced = True
            self._bury(past)

    def _bury(self, past: _Past) -> None:
        if past.replaced and not past.readers:
            self._old.append(past.automaton)


def _last(tokens: list[int], count: int) -> list[int]:
    """Takes so many off the end, the last one first."""
    found = tokens[: -count - 1 : -1]
    del tokens[len(tokens) - count :]
    return found


def suffix(*, config: DraftConfig, **options: Any) -> Suffix:
    return Suffix(config)
