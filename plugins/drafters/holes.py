"""Blocks that hold the model's keys and values and not a draft model's.

What it is: `Holes`. A draft model's keys and values lie in the model's blocks, and come along where sequences share a prefix; but while nobody wants drafts it reads nothing, and its part of
a block stays what it was. Which blocks are so is noted as they are given, so that a sequence which begins on some of them has those read before anything is drafted for it. Blocks that
come back from host memory are taken for whole, and some that are read later for holes: a wrong note costs an apt draft or a second reading, and no token.
What it does not know: how anything is read.
"""

from __future__ import annotations

import numpy as np

from penstock.core.protocol.columns import I32, Column
from penstock.core.protocol.messages import Forward


class Holes:
    """Of `slots` slots, in blocks of `size` tokens."""

    def __init__(self, slots: int, size: int) -> None:
        self._size = size
        self._skipped = np.zeros(slots, bool)
        """Slots whose sequences are not read."""
        self._lacks = np.zeros(0, bool)
        """By block."""
        self._begun: dict[int, Column] = {}
        """Slot -> the blocks that its sequence begins on and that are to be read."""
        self._starts: I32 = np.zeros(slots, np.int32)
        """Of the step that is noted, by slot."""

    def bind(self, blocks: int) -> None:
        """There are so many blocks, which hold nothing yet."""
        self._lacks = np.zeros(blocks, bool)

    def skip(self, slots: Column) -> None:
        """Sequences in these slots are not read."""
        self._skipped[slots] = True

    def attend(self, slots: Column) -> None:
        """They are."""
        self._skipped[slots] = False
        for slot in slots.tolist() if self._begun else ():
            self._begun.pop(slot, None)

    def note(self, work: Forward, have: I32) -> None:
        """A step gives blocks. `have`, by slot: positions before this one are read, -1 for all before the step's start; it is lowered where a sequence begins on holes."""
        lacks = self._lacks
        if len(work.copy_src):
            lacks[work.copy_dst] = lacks[work.copy_src]
        ids, slots, firsts = work.block_ids, work.block_slots, work.block_index * np.int32(self._size)
        if not len(ids):
            return
        starts = self._starts
        starts[slots] = 0
        starts[work.slots] = work.starts
        begins = firsts < starts[slots]
        fresh = ~begins
        lacks[ids[fresh]] = self._skipped[slots[fresh]] | ((have[slots] >= 0) & (have[slots] < firsts - self._size))[fresh]
        found = begins & lacks[ids] & ~self._skipped[slots] & (have[slots] < 0)
        for slot in set(slots[found].tolist()):
            mine = found & (slots == slot)
            have[slot] = int(firsts[mine].min())
            self._begun[slot] = ids[mine]

    def filled(self, slots: Column) -> None:
        """What these slots' sequences begin on was read."""
        if self._begun:
            for slot in slots.tolist():
                blocks = self._begun.pop(slot, None)
                if blocks is not None:
                    self._lacks[blocks] = False
