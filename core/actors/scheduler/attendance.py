"""Whom drafters look at: everybody while drafts may pay, hardly anybody while they do not.

What it is: `Attendance`, for engines whose drafters read sequences (layers of their own, hidden states of the model's). What they read they need only if they draft, so that once no
drafts have been best for a while (Widths.idle), or those drafters are off, sequences enter their slots *unread* (Forward.place_unread): nothing is computed, kept or looked up for
them. What is learned needs drafts now and then, though. A drafter that reads tokens alone catches up with sequences when drafts are wanted for them; how much it may
read at once is bounded, and what it takes is paid for as drafts are. One that has to see sequences from their beginning is shown some of those that enter when a trial is due, and the trial is made
once these decode. When drafts pay again, who enters is read; those who are unread have none until they end.
What it does not know: which width is best, what drafters read, who drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from penstock.core.actors.scheduler.outline import Flight
from penstock.core.actors.scheduler.slots import Rows
from penstock.core.actors.scheduler.widths import Widths
from penstock.core.contract.devices import READS_ALL
from penstock.core.protocol.columns import Column, i32
from penstock.core.runtime.clock import Clock

if TYPE_CHECKING:
    from penstock.core.actors.scheduler.board import Board

SHORT = 256
"""Tokens that may be read of a sequence late whatever becomes of it."""
TRIED, MOST = 1024, 4096
"""And of one that may go on for as long as it is: in a trial, and while drafts pay."""
AT_ONCE = 512
"""Tokens that are read late behind one step, or one sequence."""
WHOLE = 1024
"""A prompt up to this long is computed whole if its sequence is for a trial, even if the cache has a part of it: that was perhaps computed while nobody read."""
PATIENCE_NS = 2 * 10**9
"""A trial waits so long for half of the rows to be of those that are read, and then takes what there is."""


class Attendance:
    """`reads`: of every drafter, what it reads (Runner.reads)."""

    def __init__(self, board: Board, widths: Widths, clock: Clock, reads: Sequence[int]) -> None:
        self._board, self._widths, self._clock = board, widths, clock
        self._readers = sum(1 << number for number, read in enumerate(reads) if read)
        self._others = ((1 << len(reads)) - 1) & ~self._readers
        """Drafters that read nothing, as bits: they have drafts for anybody."""
        self._catches_up = READS_ALL not in reads
        self.off = 0
        """Drafters that are off, as bits."""
        self.late: list[tuple[int, int]] = []
        """Slots that are to be read from the next step on, and their sequences."""
        self._since_ns = 0
        """Since when a trial waits for more rows that are read; 0: none does."""

    @property
    def idle(self) -> bool:
        """Those that read make no drafts, and are not about to."""
        widths = self._widths
        return self._readers & ~self.off == 0 or (widths.none if self._catches_up else widths.idle)

    def spares(self, wish: int, entered: bool = True) -> bool:
        """Whether a sequence that enters now is not read; `wish`: its own as to drafts; `entered`: it is in its slot."""
        if wish > 0 or not self.idle:
            return False
        return wish < 0 or self._catches_up or not self._due() or not self._wanted(entered)

    def whole(self, wish: int, tokens: int) -> bool:
        """Whether the prompt of a sequence that enters now, of so many tokens, is to be computed whole."""
        return tokens <= WHOLE and not self._catches_up and self.idle and not self.spares(wish, False)

    def _due(self) -> bool:
        return self._readers & ~self.off != 0 and self._widths.due

    def _wanted(self, entered: bool) -> bool:
        """For a trial half of all are enough."""
        slots = self._board.slots
        running = slots.count - len(slots.free) - entered
        return 2 * (running - slots.num_unread) <= running

    # ------------------------------------------------------------------ before a step

    def choose(self, rows: Rows) -> int:
        """The width of the next step, in which some rows may be unread."""
        slots, widths = self._board.slots, self._widths
        read = int(np.count_nonzero(~slots.unread[rows.index]))
        if not self._catches_up:
            widths.able = bool(self._others & ~self.off) if not read else self._patient(read, rows.index.size)
        chosen = widths.choose(rows.index.size)
        widths.able = True
        if chosen and self._catches_up and self._readers & ~self.off:
            read += self._catch_up(rows, MOST if widths.pays else TRIED)
        return chosen if read or self._others & ~self.off else 0

    def _patient(self, read: int, rows: int) -> bool:
        """Whether a trial that is due is made now."""
        if 2 * read >= rows or not self._widths.due:
            self._since_ns = 0
            return True
        now = self._clock.now_ns()
        self._since_ns = self._since_ns or now
        return now - self._since_ns >= PATIENCE_NS

    def _catch_up(self, rows: Rows, most: int) -> int:
        """Lets some that are unread be read from this step on, short ones first -> how many."""
        slots = self._board.slots
        index = rows.index[slots.unread[rows.index] & (slots.wish[rows.index] >= 0)]
        tokens = slots.computed[index]
        index = index[tokens <= np.maximum(SHORT, np.minimum(slots.limit[index] - tokens, most))]
        index = index[np.argsort(slots.computed[index], kind="stable")]
        fits = int(np.searchsorted(np.cumsum(slots.computed[index]), AT_ONCE, side="right"))
        found = index[: max(1, fits)]
        if found.size:
            slots.unread[found] = False
            slots.num_unread -= found.size
            self.late += zip(found.tolist(), slots.seq[found].tolist(), strict=True)
        return int(found.size)

    def launched(self, flight: Flight) -> dict[str, Any]:
        """The columns that say who is read from this step on."""
        unread = int(np.count_nonzero(self._board.slots.unread[flight.rows.index]))
        flight.partial = 2 * unread > flight.rows.index.size
        if not self.late:
            return {}
        late, self.late = self.late, []
        flight.caught = True
        return {"read_slots": i32([slot for slot, seq in late if self._board.slots.seq[slot] == seq])}

    # ------------------------------------------------------------------ behind it

    def attended(self, index: Column) -> Column | None:
        """Which of these slots' drafts say how apt drafters are; None: all."""
        slots = self._board.slots
        return None if not slots.num_unread or self._others & ~self.off else ~slots.unread[index]
