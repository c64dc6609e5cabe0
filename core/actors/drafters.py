"""Drafters on the host: what may follow the tokens that are known.

What it is: the actor of the engine's cell that the scheduler asks between two steps. It tells each drafter what sequences began with, how they went on and when they
end, and gives of each sequence the drafts of the first one that has any. A drafter that raises, or gives what are no drafts, is not asked again: drafts
are worth no answer.
What it does not know: steps, slots, how drafts are verified, what a drafter does.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from penstock.core.contract.drafters import HostDrafter
from penstock.core.protocol.columns import EMPTY_I32, I32, I64, U8
from penstock.core.protocol.control import Message
from penstock.core.protocol.errors import described, tamed
from penstock.core.protocol.hashing import HASH_BYTES
from penstock.core.protocol.messages import Draft, Drafted

log = logging.getLogger("penstock.speculation")


class Named(NamedTuple):
    name: str
    drafter: HostDrafter


class HostDrafters:
    """`drafters` in the order in which they are asked; a token id is below `vocab`."""

    name = "drafters"
    takes: frozenset[type[Message]] = frozenset({Draft})
    gives: frozenset[type[Message]] = frozenset({Drafted})

    def __init__(self, drafters: Sequence[Named], vocab: int) -> None:
        self._drafters: list[Named | None] = list(drafters)
        self._vocab = vocab
        self._broken: dict[int, str] = {}
        """Since the last answer: why."""

    def handle(self, message: Message) -> Iterator[Message]:
        assert isinstance(message, Draft)
        for number in range(len(self._drafters)):
            self._tell(number, message)
        found = self._alone(message) if len(self._drafters) == 1 else self._in_turn(message)
        broken, self._broken = self._broken, {}
        yield Drafted(step=message.step, counts=found[0], tokens=found[1], drafters=found[2], broken=broken)

    def _alone(self, message: Draft) -> tuple[I32, I32, U8]:
        """Counts, tokens and numbers of drafters, where there is one."""
        entry, nobody = self._drafters[0], np.zeros(message.seqs.size, np.uint8)
        if entry is None or not message.seqs.size:
            return np.zeros(message.seqs.size, np.int32), EMPTY_I32, nobody
        return *self._asked(0, entry.drafter, message.seqs, message.most), nobody

    def _in_turn(self, message: Draft) -> tuple[I32, I32, U8]:
        """The same of several: each is asked about those of which the ones before it have none."""
        counts, whose = np.zeros(message.seqs.size, np.int32), np.zeros(message.seqs.size, np.uint8)
        places: list[I64] = []
        parts = [EMPTY_I32]
        for number, entry in enumerate(self._drafters):
            rows = np.flatnonzero((message.drafters >> number & 1) & (counts == 0))
            if entry is not None and rows.size:
                mine, tokens = self._asked(number, entry.drafter, message.seqs[rows], message.most[rows])
                counts[rows], whose[rows[mine > 0]] = mine, number
                places.append(rows.repeat(mine))
                parts.append(tokens)
        tokens = np.concatenate(parts)
        return counts, tokens[np.concatenate(places).argsort(kind="stable")] if len(places) > 1 else tokens, whose

    def _tell(self, number: int, message: Draft) -> None:
        entry = self._drafters[number]
        if entry is None:
            return
        drafter = entry.drafter
        try:
            for seq in message.ended.tolist():
                drafter.end(seq)
            news, counts, tokens = message.news, message.counts, message.tokens
            if message.begun.size:
                news, counts, tokens = self._begin(drafter, message)
            many = getattr(drafter, "extend_many", None)
            if many is not None and news.size:
                many(news, counts, tokens)
            elif news.size:
                for seq, end, count in zip(news.tolist(), counts.cumsum().tolist(), counts.tolist(), strict=True):
                    drafter.extend(seq, tokens[end - count : end])
            work = getattr(drafter, "work", None)
            if work is not None:
                work()
        except BaseException as raised:
            self._drop(number, f"it failed with {described(tamed(raised))}")

    def _begin(self, drafter: HostDrafter, message: Draft) -> tuple[I64, I32, I32]:
        """Those that are new; the others, how many tokens each has, and these."""
        begun = np.isin(message.news, message.begun)
        ends = message.counts.cumsum()
        for index, at in enumerate(np.flatnonzero(begun).tolist()):
            root = message.roots[index * HASH_BYTES : (index + 1) * HASH_BYTES]
            drafter.begin(int(message.news[at]), message.tokens[ends[at] - message.counts[at] : ends[at]], root.hex())
        others = ~begun
        return message.news[others], message.counts[others], message.tokens[others.repeat(message.counts)]

    def _asked(self, number: int, drafter: HostDrafter, seqs: I64, most: I32) -> tuple[I32, I32]:
        """Of each sequence so many drafts, and these one behind the other; none from where it fails on."""
        counts, found = np.zeros(seqs.size, np.int32), [EMPTY_I32]
        try:
            many = getattr(drafter, "propose_many", None)
            if many is not None:
                given, tokens = many(seqs, most)
                if given.shape != seqs.shape or given.dtype.kind not in "iu":
                    raise ValueError("propose_many() gave what are no numbers of drafts")
                if tokens.size or given.any():
                    if (given < 0).any() or (given > most).any() or tokens.size != given.sum():
                        raise ValueError("propose_many() gave other numbers of drafts than drafts")
                    found.append(self._tokens(tokens))
                counts = given.astype(np.int32, copy=False)
            else:
                for at, (seq, wanted) in enumerate(zip(seqs.tolist(), most.tolist(), strict=True)):
                    found.append(self._tokens(np.asarray(drafter.propose(seq, wanted)))[:wanted])
                    counts[at] = found[-1].size
        except BaseException as raised:
            self._drop(number, f"it failed with {described(tamed(raised))}")
        return counts, np.concatenate(found) if len(found) > 1 else EMPTY_I32

    def _tokens(self, given: Any) -> I32:
        if not given.size:
            return EMPTY_I32
        if given.dtype.kind not in "iu" or given.ndim != 1 or int(given.min()) < 0 or int(given.max()) >= self._vocab:
            raise ValueError(f"it gave what are no token ids below {self._vocab}")
        found: I32 = given.astype(np.int32, copy=False)
        return found

    def _drop(self, number: int, why: str) -> None:
        entry = self._drafters[number]
        if entry is not None:
            log.warning("drafter %s is not asked any more: %s", entry.name, why)
            self._drafters[number] = None
            self._broken[number] = why
