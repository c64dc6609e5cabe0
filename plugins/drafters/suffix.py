"""The drafter "suffix": what followed the longest run of tokens that was there before.

What it is: suffix automata (Blumer et al., 1985), one of each sequence's own tokens and one of what was answered before under the same prefix-cache root (so that nobody
sees another tenant's texts). The longest suffix of a sequence that occurred before is known after every token without a search; what
followed it then is proposed, the longer the match the more of it (as SuffixDecoding does, arXiv 2411.04975). Good for agents, edits and code, where texts repeat.
What it does not know: models, how drafts are verified.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np

from penstock.core.protocol.columns import EMPTY_I32, I32
from penstock.core.protocol.errors import ConfigError
from penstock.core.protocol.speculation import DraftConfig

BREAK = -1
"""Between two answers: no token."""
DRAFTS = 8
NUMBERS = {"own_tokens": 4096, "past_tokens": 65536, "tenants": 64}
"""Its options: how many of a prompt's last tokens are looked at, of past answers of a tenant, and of how many tenants; 0 past tokens: of none."""
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

    def after(self, end: int, most: int) -> list[int]:
        """What followed the token at `end`, up to a break."""
        found = self.tokens[end + 1 : end + 1 + most]
        return found[: found.index(BREAK)] if BREAK in found else found


class _Sequence:
    __slots__ = ("matched", "own", "past", "said", "state", "tenant")

    def __init__(self, tenant: str, past: Automaton | None) -> None:
        self.tenant = tenant
        self.own = Automaton()
        self.past = past
        self.state = self.matched = 0
        self.said: list[int] = []
        """Its answer, for those that come later."""


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
        self._answers: OrderedDict[str, Automaton] = OrderedDict()

    def begin(self, seq: int, tokens: I32, tenant: str) -> None:
        past = self._answers.get(tenant)
        if past is not None:
            self._answers.move_to_end(tenant)
        one = self._sequences[seq] = _Sequence(tenant, past)
        for token in tokens[max(0, tokens.size - self._own) :].tolist():
            self._add(one, token)

    def extend(self, seq: int, tokens: I32) -> None:
        one = self._sequences[seq]
        said = tokens.tolist()
        one.said += said
        for token in said:
            self._add(one, token)

    @staticmethod
    def _add(one: _Sequence, token: int) -> None:
        one.own.add(token)
        if one.past is not None:
            one.state, one.matched = one.past.walk(one.state, one.matched, token)

    def propose(self, seq: int, most: int) -> I32:
        one = self._sequences[seq]
        matched, end = one.own.repeated()
        source = one.own
        if one.past is not None and one.matched > matched:
            source, matched, end = one.past, one.matched, one.past.first[one.state]
        if matched < self._least:
            return EMPTY_I32
        return np.array(source.after(end, min(most, FACTOR * matched)), np.int32)

    def end(self, seq: int) -> None:
        one = self._sequences.pop(seq)
        if not self._past or not one.said:
            return
        past = self._answers.get(one.tenant)
        if past is None or len(past.tokens) + len(one.said) > self._past:  # what is old goes as a whole; who still reads it may
            past = self._answers[one.tenant] = Automaton()
        self._answers.move_to_end(one.tenant)
        for token in [*one.said[-self._past :], BREAK]:
            past.add(token)
        while len(self._answers) > self._tenants:
            self._answers.popitem(last=False)


def suffix(*, config: DraftConfig, **options: Any) -> Suffix:
    return Suffix(config)
