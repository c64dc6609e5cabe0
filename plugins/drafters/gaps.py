"""What a drafter's layer has not read yet of sequences that went on without it, and what it would have read.

What it is: `Gaps`, for layers that feed on the model's hidden states (heads.py). How far each slot was read, and a ring for each slot with the model's states at its last
positions since, so that a drafter that is asked again after a while has all of a text before it. What fell out of a ring is never read: drafts are poorer then, and no
less right. Host memory alone: where nothing waits, a step's states cost a copy.
What it does not know: layers, what the states are of.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from penstock.core.protocol.columns import I32, Column, i32
from penstock.core.protocol.messages import Forward

Tensor = torch.Tensor
LONGEST = 128
"""Positions of a ring that are read."""
AHEAD = 16
"""And so many more, over which drafts that turn out wrong are written."""
WAITING = 32
"""Steps whose states wait to be written to the rings, at most: many are written in about the time of one."""
BYTES = 64 << 20
"""Of all rings, as far as that is enough for one position that is read in each."""


class Missing(NamedTuple):
    """Rows of positions that were not read, one behind the other."""

    slots: I32
    starts: I32
    counts: I32
    states: Tensor
    """[sum of counts, W]."""


class Gaps:
    """Of `slots` slots, whose states are `width` numbers of `dtype` a position."""

    def __init__(self, slots: int, width: int, dtype: torch.dtype, bytes_: int = BYTES) -> None:
        self.length = max(1, min(LONGEST, bytes_ // max(1, slots * width * dtype.itemsize) - AHEAD))
        self._size = self.length + AHEAD
        self._ring = torch.zeros(slots, self._size, width, dtype=dtype)
        # numpy has no bfloat16, and indexes faster: numbers of the same size stand for it.
        self._words = self._ring.view(torch.int16 if dtype.itemsize == 2 else torch.int32).numpy()
        self._read: I32 = np.zeros(slots, np.int32)
        """For each slot: positions before this one were read; -1: those before its next step's start."""
        self._entered = False
        """Somebody may have -1."""
        self._waiting: list[tuple[Forward, int, Tensor]] = []
        """What `keep` was given and is not in the rings yet, in order."""

    @property
    def nbytes(self) -> int:
        """Of the rings."""
        return self._ring.nbytes

    def enter(self, slots: Column) -> None:
        """Sequences enter these slots. What lies in the blocks that they begin on was read by this, too."""
        self._read[slots] = -1
        self._entered = True

    def skip(self, slots: Column) -> None:
        """Sequences enter these slots of which nothing is read or kept."""
        self._read[slots] = 0

    def begin(self, work: Forward) -> None:
        """A step begins."""
        if self._entered:
            read = self._read[work.slots]
            self._read[work.slots] = np.where(read < 0, work.starts, read)
            self._entered = bool((self._read < 0).any())

    def keep(self, work: Forward, rows: int, states: Tensor) -> None:
        """The first `rows` rows of the step will not be read now: their states [tokens, W], in order, which nobody writes to afterwards."""
        self._waiting.append((work, rows, states))
        if len(self._waiting) >= WAITING or len(states) > WAITING:
            self._write()

    def _write(self) -> None:
        """What waits. Of two states for one place the later one stays."""
        if not self._waiting:
            return
        places = [_places(work, rows, len(states)) for work, rows, states in self._waiting]
        slots, positions = (np.concatenate(column) for column in zip(*places, strict=True))
        states = self._waiting[0][2] if len(self._waiting) == 1 else torch.cat([states for _, _, states in self._waiting])
        self._waiting = []
        # Places that are named twice are written in order.
        self._words[slots, positions % self._size] = states.view(torch.int16 if states.dtype.itemsize == 2 else torch.int32).numpy()

    def read(self, slots: Column, ends: Column) -> None:
        """These slots were read up to these positions."""
        self._read[slots] = ends

    def missing(self, work: Forward, kept: Column | None = None) -> Missing | None:
        """What rows of the step have not read before its start, as far as it is there. `kept`: rows of which something may be there; None: all."""
        firsts = np.maximum(self._read[work.slots], work.starts - self.length)
        lacking = np.flatnonzero(firsts < work.starts if kept is None else (firsts < work.starts) & kept)
        if not lacking.size:
            return None
        self._write()
        slots, starts = work.slots[lacking], firsts[lacking]
        counts = work.starts[lacking] - starts
        row = np.repeat(np.arange(lacking.size), counts)
        positions = starts[row] + np.arange(len(row), dtype=np.int32) - (np.cumsum(counts) - counts)[row]
        states = self._ring[torch.from_numpy(slots[row]).long(), torch.from_numpy(positions % self._size).long()]
        return Missing(slots, i32(starts), i32(counts), states)


def _places(work: Forward, rows: int, tokens: int) -> tuple[I32, I32]:
    """(slot, position) of each of the `tokens` tokens that the first `rows` rows have."""
    slots, positions = work.slots[:rows], work.starts[:rows]
    if tokens > rows:
        counts = work.counts[:rows]
        within = np.arange(tokens, dtype=np.int32) - np.repeat(np.cumsum(counts) - counts, counts)
        slots, positions = np.repeat(slots, counts), np.repeat(positions, counts) + within
    return i32(slots), i32(positions)
