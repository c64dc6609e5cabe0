"""The drafter "suffix": what followed the longest run of tokens that was there before.

What it is: suffix automata, one of each sequence's own tokens and one of what was answered before under the same prefix-cache root (so that nobody
sees another tenant's texts). The longest suffix of a sequence that occurred before is known after every token without a search; what
followed it then is proposed, the longer the match the more of it (as SuffixDecoding does, arXiv 2411.04975). Good for agents, edits and code, where texts repeat.
The engine waits for it between two steps: all rows are one call, and long texts are learned, and forgotten, in pieces.
What it does not know: models, how drafts are verified, how an automaton is kept (kernels/suffixes).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Any

import numpy as np

from penstock.core.protocol.columns import EMPTY_I32, I32, I64, i32, i64
from penstock.core.protocol.errors import ConfigError
from penstock.core.protocol.speculation import MOST_TOKENS, DraftConfig
from penstock.kernels.suffixes import Automaton, Suffixes, suffixes
from penstock.kernels.suffixes.reference import BREAK

DRAFTS = 8
NUMBERS = {"own_tokens": 4096, "past_tokens": 65536, "tenants": 64}
"""Its options: how many of a prompt's last tokens are looked at, of past answers of a tenant, and of how many tenants; 0 past tokens: of none."""
AT_ONCE = MOST_TOKENS + 1
"""Tokens of a sequence that are learned when they come: what a step brings. Of longer ones so many between two steps as automata take in half a millisecond (Suffixes.quick)."""
LEAST, FACTOR = 3, 2
"""The shortest match that counts, and how many tokens are proposed a matched one."""


class _Past:
    """What was answered before. Not all of it is in the automaton yet."""

    __slots__ = ("automaton", "planned", "readers", "replaced")

    def __init__(self, automaton: Automaton) -> None:
        self.automaton = automaton
        self.planned = 0
        """Tokens in it, once all is."""
        self.readers = 0
        """Sequences that follow it."""
        self.replaced = False


class _Sequence:
    __slots__ = ("own", "past", "prompt", "row", "tenant", "waiting")

    def __init__(self, row: int, tenant: str, own: Automaton, past: _Past | None, prompt: I32) -> None:
        self.row = row
        self.tenant = tenant
        self.own = own
        self.past = past
        self.prompt = prompt.size
        """The first tokens of its own that it did not say."""
        self.waiting = prompt
        """Its next tokens, which no automaton has seen yet."""

    def said(self) -> I32:
        """Its answer, for those that come later."""
        return np.concatenate([self.own.since(self.prompt), self.waiting[max(0, self.prompt - len(self.own)) :]])


class Suffix:
    """See core/contract/drafters.py: HostDrafter."""

    def __init__(self, config: DraftConfig, by: Suffixes | None = None) -> None:
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
        self._by = by or suffixes()
        self._readers = self._by.readers()
        self._sequences: dict[int, _Sequence] = {}
        self._free: list[int] = []
        """Rows of the readers that nobody has, below as many as there ever were."""
        self._asked: tuple[bytes, I64] = b"", i64([])
        """The last sequences that were asked about, and their rows."""
        self._answers: OrderedDict[str, _Past] = OrderedDict()
        self._behind: OrderedDict[int, _Sequence] = OrderedDict()
        """Sequences with tokens that wait, the first come first."""
        self._later: deque[tuple[_Past, I32]] = deque()
        """Answers that wait to be learned."""
        self._kept = 0
        """Their tokens."""
        self._old: list[Automaton] = []
        """Nobody's any more: freed piece by piece, too."""

    # ------------------------------------------------------------------ sequences

    def begin(self, seq: int, tokens: I32, tenant: str) -> None:
        past = self._answers.get(tenant)
        if past is not None:
            self._answers.move_to_end(tenant)
            past.readers += 1
        row = self._free.pop() if self._free else len(self._sequences)
        prompt = tokens[max(0, tokens.size - self._own) :].copy()
        one = self._sequences[seq] = _Sequence(row, tenant, self._by.automaton(), past, prompt)
        self._readers.begin(row, one.own, None if past is None else past.automaton)
        if prompt.size <= AT_ONCE:
            self._follow(one, prompt.size)
        else:
            self._behind[seq] = one

    def extend(self, seq: int, tokens: I32) -> None:
        self.extend_many(i64([seq]), i32([tokens.size]), tokens)

    def extend_many(self, seqs: I64, counts: I32, tokens: I32) -> None:
        """What a step brings at once; more than that, and what comes behind it, waits for its turn."""
        rows = self._rows_of(seqs)
        if self._behind or (tokens.size > AT_ONCE and int(counts.max()) > AT_ONCE):
            late = counts > AT_ONCE
            late |= [self._sequences[seq].waiting.size > 0 for seq in seqs.tolist()]
            ends = counts.cumsum()
            for at in np.flatnonzero(late).tolist():
                one = self._sequences[int(seqs[at])]
                one.waiting = np.concatenate([one.waiting, tokens[ends[at] - counts[at] : ends[at]]])
                self._behind[int(seqs[at])] = one
            tokens, rows, counts = tokens[(~late).repeat(counts)], rows[~late], counts[~late]
        self._readers.follow(rows, counts, tokens)

    def propose(self, seq: int, most: int) -> I32:
        return self.propose_many(i64([seq]), i32([most]))[1]

    def propose_many(self, seqs: I64, most: I32) -> tuple[I32, I32]:
        """None for those of which not all is learned yet."""
        if self._behind:
            most = np.where([self._sequences[seq].waiting.size > 0 for seq in seqs.tolist()], np.int32(0), most)
        found: tuple[I32, I32] = self._readers.propose(self._rows_of(seqs), most, self._least, FACTOR)
        return found

    def _rows_of(self, seqs: I64) -> I64:
        """They are mostly those of the call before."""
        key = seqs.tobytes()
        if key != self._asked[0]:
            self._asked = key, i64([self._sequences[seq].row for seq in seqs.tolist()])
        return self._asked[1]

    def end(self, seq: int) -> None:
        one = self._sequences.pop(seq)
        self._behind.pop(seq, None)
        self._asked = b"", i64([])
        said = one.said()[-self._past :] if self._past else EMPTY_I32
        self._readers.end(one.row)
        self._free.append(one.row)
        self._old.append(one.own)
        if one.past is not None:
            one.past.readers -= 1
            self._bury(one.past)
        if said.size:
            self._remember(one.tenant, said)

    # ------------------------------------------------------------------ what was answered before

    def _remember(self, tenant: str, said: I32) -> None:
        past = self._answers.get(tenant)
        if past is None or past.planned + said.size > self._past:  # what is old goes as a whole; who still reads it may
            self._replace(past)
            past = self._answers[tenant] = _Past(self._by.automaton())
        self._answers.move_to_end(tenant)
        said = np.concatenate([said, i32([BREAK])])
        past.planned += said.size
        self._later.append((past, said))
        self._kept += said.size
        while self._kept > max(self._past, said.size):  # learned too slowly: what is oldest is not
            late, waiting = self._later.popleft()
            self._kept -= waiting.size
            if not late.replaced:
                late.automaton.learn(waiting[-1:])
        while len(self._answers) > self._tenants:
            self._replace(self._answers.popitem(last=False)[1])

    def _replace(self, past: _Past | None) -> None:
        if past is not None:
            past.replaced = True
            self._bury(past)

    def _bury(self, past: _Past) -> None:
        if past.replaced and not past.readers:
            self._old.append(past.automaton)

    # ------------------------------------------------------------------ between two steps

    def work(self) -> None:
        """See HostDrafter: sequences first, then what others may copy from later, then what is to be forgotten."""
        left = self._by.quick
        while left and self._behind:
            seq, one = next(iter(self._behind.items()))
            left -= self._follow(one, left)
            if not one.waiting.size:
                del self._behind[seq]
        while left and self._later:
            past, waiting = self._later.popleft()
            taken = waiting.size if past.replaced else min(left, waiting.size)
            self._kept -= taken
            if past.replaced:  # for nobody
                continue
            left -= taken
            past.automaton.learn(waiting[:taken])
            if taken < waiting.size:
                self._later.appendleft((past, waiting[taken:]))
        left = 4 * self._by.quick  # forgetting is quicker than learning
        while left and self._old:
            left -= (gone := self._old[-1].shrink(left))
            if not gone:
                self._old.pop()

    def _follow(self, one: _Sequence, most: int) -> int:
        """It goes on with so many of the tokens that wait: how many."""
        taken, one.waiting = one.waiting[:most], one.waiting[most:]
        self._readers.follow(i64([one.row]), i32([taken.size]), taken)
        return taken.size


def suffix(*, config: DraftConfig, **options: Any) -> Suffix:
    return Suffix(config)
