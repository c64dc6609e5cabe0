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
    """`history` I32 and `digest` U64 [slots, width], `length` I64 (tokens known to the device), `table` I32 (-1: no block), `sampling`. `need(ok, what)`
    raises FakeViolation."""

    def __init__(self, slots: int, width: int, block_size: int, vocab: int, need: Callable[[bool, str], None]) -> None:
        self.history = np.zeros((slots, width), np.int32)
        self.length = np.zeros(slots, np.int64)
        self.digest = np.zeros((slots, width), np.uint64)
        self.table = np.full((slots, -(-width // block_size)), -1, np.int32)
        self.sampling: list[SlotSampling | None] = [None] * slots
        self._powers = powers(width)
        self._vocab = vocab
        self._need = need

    def place(self, slots: Column, counts: Column, tokens: Column) -> None:
        """Sequences enter slots: a new history each, no blocks, no sampling state."""
        at = 0
        for slot, count in zip(slots.tolist(), counts.tolist(), strict=True):
            self._place(slot, tokens[at : at + count])
            at += count
        self._need(at == len(tokens), "place_tokens is longer than place_counts say")

    def _place(self, slot: int, tokens: npt.NDArray[Any]) -> None:
        count = len(tokens)
        self._need(0 < count < self.history.shape[1], f"slot {slot} is placed with {count} tokens")
        self._need(bool(((tokens >= 0) & (tokens < self._vocab)).all()), f"slot {slot} is placed with a token outside the vocabulary")
        self.history[slot, :count] = tokens
        self.length[slot] = count
        with np.errstate(over="ignore"):
            self.digest[slot, :count] = np.cumsum((tokens.astype(np.uint64) + np.uint64(1)) * self._powers[:count])
        self.table[slot] = -1
        self.sampling[slot] = None

    def append(self, into: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], tokens: npt.NDArray[np.int32]) -> None:
        """One token a slot, behind which its history ends. No slot comes twice."""
        self._need(bool((positions < self.history.shape[1]).all()), "a token goes beyond the longest sequence")
        self.history[into, positions] = tokens
        self.length[into] = positions + 1
        with np.errstate(over="ignore"):
            add = (tokens.astype(np.uint64) + np.uint64(1)) * self._powers[positions]
            self.digest[into, positions] = self.digest[into, positions - 1] + add
