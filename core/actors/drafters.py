"""Drafters on the host: what may follow the tokens that are known.

What it is: the actor of the engine's cell that the scheduler asks between two steps. It tells each drafter what sequences began with, how they went on and when they
end, and gives of each sequence the drafts of the first one that has any. A drafter that raises, or gives what are no drafts, is not asked again: drafts
are worth no answer.
What it does not know: steps, slots, how drafts are verified, what a drafter does.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from penstock.core.contract.drafters import HostDrafter
from penstock.core.protocol.columns import EMPTY_I32, I32, i32
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
        counts, found, whose = [], [], []
        for seq, most, bits in zip(message.seqs.tolist(), message.most.tolist(), message.drafters.tolist(), strict=True):
            tokens, number = self._first(seq, most, bits)
            counts.append(tokens.size)
            whose.append(number)
            found.append(tokens)
        broken, self._broken = self._broken, {}
        yield Drafted(
            step=message.step,
            counts=i32(counts),
            tokens=np.concatenate(found) if found else EMPTY_I32,
            drafters=np.array(whose, np.uint8),
            broken=broken,
        )

    def _tell(self, number: int, message: Draft) -> None:
        entry = self._drafters[number]
        if entry is None:
            return
        try:
            for seq in message.ended.tolist():
                entry.drafter.end(seq)
            begun = set(message.begun.tolist())
            roots = iter(range(0, len(message.roots), HASH_BYTES))
            ends = np.cumsum(message.counts)
            for seq, end, count in zip(message.news.tolist(), ends.tolist(), message.counts.tolist(), strict=True):
                tokens = message.tokens[end - count : end]
                if seq in begun:
                    at = next(roots)
                    entry.drafter.begin(seq, tokens, message.roots[at : at + HASH_BYTES].hex())
                else:
                    entry.drafter.extend(seq, tokens)
            work = getattr(entry.drafter, "work", None)
            if work is not None:
                work()
        except BaseException as raised:
            self._drop(number, f"it failed with {described(tamed(raised))}")

    def _first(self, seq: int, most: int, bits: int) -> tuple[I32, int]:
        """The drafts of the first of these drafters that has any, and its number."""
        for number, entry in enumerate(self._drafters):
            if entry is None or not bits >> number & 1:
                continue
            try:
                tokens = np.asarray(entry.drafter.propose(seq, most))
                if tokens.size:
                    if tokens.dtype.kind not in "iu" or tokens.ndim != 1 or int(tokens.min()) < 0 or int(tokens.max()) >= self._vocab:
                        raise ValueError(f"propose() gave what are no token ids below {self._vocab}")
                    return tokens[:most].astype(np.int32), number
            except BaseException as raised:
                self._drop(number, f"it failed with {described(tamed(raised))}")
        return EMPTY_I32, 0

    def _drop(self, number: int, why: str) -> None:
        entry = self._drafters[number]
        if entry is not None:
            log.warning("drafter %s is not asked any more: %s", entry.name, why)
            self._drafters[number] = None
            self._broken[number] = why
