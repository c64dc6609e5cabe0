"""Drafts that were verified: what a StepDone says of them, and what each sequence had.

What it is: how many drafts of each row were right (`counted`, which refuses what cannot be), of how many rows so many were (`at_least`); and `Tally`, drafts and right ones by sequence. While the
same sequences decode, these are kept beside their columns: adding there is cheaper.
What it does not know: widths, drafters, which drafts stand.
"""

from __future__ import annotations

from itertools import accumulate

import numpy as np

from penstock.core.actors.scheduler.outline import NO_ROWS, Flight
from penstock.core.actors.scheduler.slots import Index, Rows, Slots
from penstock.core.actors.scheduler.waiting import Sequence
from penstock.core.protocol.columns import EMPTY_I32, I32, Column, i32, i64
from penstock.core.protocol.errors import ProtocolError
from penstock.core.protocol.messages import StepDone


def counted(flight: Flight, done: StepDone) -> tuple[I32, Column]:
    """Drafts of each row that were right, whether they stood or not, and of how many rows so many were; and where the tokens of each begin."""
    counts, ahead = done.counts, flight.ahead
    if counts.size == ahead.size:
        ends = np.add.accumulate(counts, out=np.empty(counts.size, np.int32))
        flight.firsts, flight.right = ends - counts, counts - flight.rows.ones
        rights = _numbers(flight.right) if ends.item(-1) == done.tokens.size else None
        alike = flight.drafted == flight.most * ahead.size
        if rights is not None and rights.size <= 1 + flight.most and (alike or not np.count_nonzero(flight.right > ahead)):
            return flight.right, rights
    raise ProtocolError(f"step {done.step} sampled {ahead.size} rows, whose counts or {done.tokens.size} tokens cannot be right")


def _numbers(column: I32) -> Column | None:
    """How often there is each number from 0 on; None: one is below."""
    try:
        return np.bincount(column)
    except ValueError:
        return None


def at_least(rights: Column, most: int) -> list[int]:
    """[j]: of how many rows at least j drafts were right; `rights`: of how many so many were."""
    found = list(accumulate(rights.tolist()[::-1]))[::-1]
    return found if len(found) > most else found + [0] * (1 + most - len(found))


class Tally:
    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._index: Index = NO_ROWS
        self._each, self._ahead, self._right = 0, EMPTY_I32, EMPTY_I32
        """What is not in the columns of these slots yet: drafts that each of them had, those that each had besides, and right ones."""

    def begin(self, index: Index) -> None:
        """A step of these slots."""
        if index is not self._index:
            self._settle()

    def add(self, index: Index, ahead: I32 | int, right: I32) -> None:
        """They had so many drafts verified, or each as many; and so many were right."""
        if index is not self._index:
            self._settle()
            self._index, self._ahead, self._right = index, np.zeros(index.size, np.int32), np.zeros(index.size, np.int32)
        if isinstance(ahead, int):
            self._each += ahead
        else:
            self._ahead += ahead
        self._right += right

    def _settle(self) -> None:
        """What rows had of drafts is their sequences', before others are in their slots."""
        slots, index = self._slots, self._index
        if index.size:
            slots.drafts_seen[index] += self._ahead + np.int32(self._each)
            slots.drafts_right[index] += self._right
            self._index, self._each = NO_ROWS, 0

    def told(self, rows: Rows) -> dict[str, Column]:
        """Of sequences that end: what they had of drafts, as columns of StepTokens."""
        slots, index = self._slots, rows.index
        self._settle()
        had = np.flatnonzero(slots.drafts_seen[index])
        if not had.size:
            return {}
        index = index[had]
        return {"drafted_seqs": rows.seqs[had], "drafted": slots.drafts_seen[index], "accepted": slots.drafts_right[index]}

    def had(self, slot: int) -> tuple[int, int]:
        """Drafts of its sequence that were verified, and the right ones."""
        self._settle()
        slots = self._slots
        return slots.drafts_seen.item(slot), slots.drafts_right.item(slot)

    def told_of(self, sequences: list[Sequence]) -> dict[str, Column]:
        """The same of sequences that may wait for a slot."""
        had = [(one.seq, *(one.drafts if one.slot < 0 else self.had(one.slot))) for one in sequences]
        had = [one for one in had if one[1]]
        if not had:
            return {}
        return {
            "drafted_seqs": i64([one[0] for one in had]),
            "drafted": i32([one[1] for one in had]),
            "accepted": i32([one[2] for one in had]),
        }
