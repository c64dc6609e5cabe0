"""The fake device's slots: histories with a running digest, block tables, sampling states.

What it is: what Forward and Sample write into slots, applied and refereed. The digest of a position depends on every token up to it, so that equal
digests mean equal histories.
What it does not know: blocks' contents, rows, which token is drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from penstock.core.protocol.columns import Column
from penstock.core.protocol.messages import SlotSampling

U64 = npt.NDArray[np.uint64]

_PRIME = np.uint64(0x9E3779B97F4A7C15)


class FakeViolation(AssertionError):
    """The work that came breaks the device contract."""


def powers(count: int) -> U64:
    """Odd multipliers, one a position."""
    with np.errstate(over="ignore"):
        return np.cumprod(np.full(count, _PRIME, np.uint64), dtype=np.uint64) | np.uint64(1)


def mix(value: U64) -> U64:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): spreads every input bit over all output bits."""
    with np.errstate(over="ignore"):
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))


class FakeSlots:
    """`history` I32 and `digest` U64 [slots, width], `length` I64 (tokens placed, drawn or written), `sure` I64 (those that cannot be taken back: all but
    written ones behind the last drawn), `drafts` I64 (the device's own, behind `length`), `table` I32 (-1: no block), `sampling`, `unread`, `adapter` I64. The adapter
    and embeddings are part of the digest. `need(ok, what)`
    raises FakeViolation."""

    def __init__(self, slots: int, width: int, block_size: int, vocab: int, need: Callable[[bool, str], None]) -> None:
        self.history = np.zeros((slots, width), np.int32)
        self.length = np.zeros(slots, np.int64)
        self.sure = np.zeros(slots, np.int64)
        self.drafts = np.zeros(slots, np.int64)
        self.digest = np.zeros((slots, width), np.uint64)
        self.table = np.full((slots, -(-width // block_size)), -1, np.int32)
        self.sampling: list[SlotSampling | None] = [None] * slots
        self.unread = np.zeros(slots, np.bool_)
        self.adapter = np.zeros(slots, np.int64)
        self._powers = powers(width)
        self._vocab = vocab
        self._need = need

    def place(self, slots: Column, counts: Column, tokens: Column, adapters: Column, resident: int) -> None:
        """Sequences enter slots: a new history each, no blocks, no sampling state. `adapters` are 0 to `resident`; empty: 0."""
        self._need(len(adapters) in (0, len(slots)), "place_adapters is not as long as place_slots")
        self._need(bool(((adapters >= 0) & (adapters <= resident)).all()), f"an adapter is named beyond the {resident} that are resident")
        at = 0
        for i, (slot, count) in enumerate(zip(slots.tolist(), counts.tolist(), strict=True)):
            self.adapter[slot] = adapters[i] if len(adapters) else 0
            self._place(slot, tokens[at : at + count])
            at += count
        self._need(at == len(tokens), "place_tokens is longer than place_counts say")

    def skip(self, placed: Column, unread: Column, read: Column) -> None:
        """Of those placed some are not looked at by drafters that read, and others are from now on."""
        self._need(len(unread) in (0, len(placed)), "place_unread is not as long as place_slots")
        self.unread[placed] = unread > 0 if len(unread) else False
        self._need(bool(self.unread[read].all()), "a slot is to be read that is already")
        self.unread[read] = False

    def _place(self, slot: int, tokens: npt.NDArray[Any]) -> None:
        count = len(tokens)
        self._need(0 < count < self.history.shape[1], f"slot {slot} is placed with {count} tokens")
        self._need(bool(((tokens >= 0) & (tokens < self._vocab)).all()), f"slot {slot} is placed with a token outside the vocabulary")
        self.history[slot, :count] = tokens
        self.length[slot] = self.sure[slot] = count
        self.drafts[slot] = 0
        with np.errstate(over="ignore"):
            digest = np.cumsum((tokens.astype(np.uint64) + np.uint64(1)) * self._powers[:count])
            self.digest[slot, :count] = digest + self._base(slot)
        self.table[slot] = -1
        self.sampling[slot] = None

    def _base(self, slot: int) -> np.uint64:
        """What the digest of every position has of the adapter; 0 without one."""
        return np.uint64(self.adapter[slot]) << np.uint64(40)

    def embed(self, slots: Column, starts: Column, counts: Column, rows: Column, held: int) -> None:
        """Rows of `held` embeddings stand for the tokens at positions of a history."""
        self._need(len(slots) == len(starts) == len(counts) == len(rows), "the embed columns differ in length")
        for slot, start, count, row in zip(slots.tolist(), starts.tolist(), counts.tolist(), rows.tolist(), strict=True):
            self._need(0 <= start < start + count <= self.length[slot], f"slot {slot} gets embeddings outside its history")
            self._need(row >= 0 and row + count <= held, f"an embedding is named beyond the {held} that are held")
            for position in range(start, start + count):
                before = self.digest[slot, position - 1] if position else self._base(slot)
                with np.errstate(over="ignore"):
                    part = mix(np.array([row + position - start], np.uint64) + _PRIME)[0] * self._powers[position]
                    self.digest[slot, position:] += before + part - self.digest[slot, position]

    def append(self, into: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], tokens: npt.NDArray[np.int32]) -> None:
        """One token a slot, behind which its history ends. No slot comes twice."""
        self._need(bool((positions < self.history.shape[1]).all()), "a token goes beyond the longest sequence")
        self.length[into] = self.sure[into] = positions + 1
        self.drafts[into] = 0
        self._extend(into, positions, tokens)

    def _extend(self, into: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], tokens: npt.NDArray[np.int32]) -> None:
        self.history[into, positions] = tokens
        with np.errstate(over="ignore"):
            add = (tokens.astype(np.uint64) + np.uint64(1)) * self._powers[positions]
            self.digest[into, positions] = self.digest[into, positions - 1] + add

    def clone(self, sources: Column, targets: Column, lens: Column) -> None:
        self._need(len(sources) == len(targets) == len(lens), "the clone columns differ in length")
        self._need(len(set(targets.tolist())) == len(targets), "two clones go into one slot")
        self._need(bool(((lens > 0) & (lens <= self.sure[sources])).all()), "a clone takes more than its source has for sure")
        self.history[targets], self.digest[targets] = self.history[sources], self.digest[sources]
        self.table[targets] = self.table[sources]
        self.length[targets] = self.sure[targets] = lens
        self.adapter[targets], self.unread[targets] = self.adapter[sources], self.unread[sources]
        self.drafts[targets] = 0
        for slot in targets.tolist():
            self.sampling[slot] = None

    def write(self, slots: Column, positions: Column, tokens: Column) -> None:
        self._need(len(slots) == len(positions) == len(tokens), "the write columns differ in length")
        self._need(bool(((tokens >= 0) & (tokens < self._vocab)).all()), "a token outside the vocabulary is written")
        ends: dict[int, int] = {}
        for slot, position, token in zip(slots.tolist(), positions.tolist(), tokens.tolist(), strict=True):
            fits = position == ends[slot] if slot in ends else 0 < position <= self.length[slot]
            self._need(fits, f"slot {slot} is written at position {position}, which leaves a gap or goes back")
            self._need(position < self.history.shape[1], "a write goes beyond the longest sequence")
            ends[slot] = position + 1
            self._extend(np.array([slot]), np.array([position]), np.array([token], np.int32))
        for slot, end in ends.items():
            first = end - slots.tolist().count(slot)
            self.length[slot], self.sure[slot], self.drafts[slot] = end, min(first, self.sure[slot]), 0

    def assume(self, slot: int, count: int) -> None:
        """Whatever stands behind its history are drafts, so many of them."""
        first = int(self.length[slot]) + int(self.drafts[slot])
        for position in range(first, int(self.length[slot]) + count):
            self._need(position < self.history.shape[1], "a draft lies beyond the longest sequence")
            self._extend(np.array([slot]), np.array([position]), self.history[[slot], [position]])
        self.drafts[slot] = max(int(self.drafts[slot]), count)

    def draft(
        self,
        into: npt.NDArray[np.int64],
        counts: npt.NDArray[np.int64],
        guess: Callable[[U64, npt.NDArray[np.int64]], npt.NDArray[np.int32]],
    ) -> npt.NDArray[np.int32]:
        """Put up to `counts` tokens behind each of these slots' histories: `guess(digest, slots)` of everything before. [len(into) x the most], -1 where there
        is none, also for want of room."""
        out = np.full((len(into), int(counts.max(initial=0))), -1, np.int32)
        for k in range(out.shape[1]):
            at = self.length[into] + k
            fits = np.nonzero((at < self.history.shape[1]) & (k < counts))[0]
            slots, at = into[fits], at[fits]
            tokens = guess(self.digest[slots, at - 1], slots)
            self._extend(slots, at, tokens)
            self.drafts[slots] = k + 1
            out[fits, k] = tokens
        return out
