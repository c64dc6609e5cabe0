"""Drafts in steps: which rows compute some along, and what became of them.

What it is: before a step, its width and each row's share of it (none for those who obey a grammar, search with beams or do not want any); behind it, the
lengths of rows whose drafts were right, acceptance by place, by sequence and by drafter, and drafters that are turned off. The last step's drafts
stand on the device; here it is known how many, and whose they are.
While drafts are made a step is planned when the one before it has landed: only then it is known how far that brought each row, and what stands there now.
What it does not know: which width is best (widths.py), blocks, what drafts are.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

from penstock.core.actors.scheduler.outline import Flight
from penstock.core.actors.scheduler.slots import Rows
from penstock.core.actors.scheduler.widths import OFF, Watch, Widths
from penstock.core.protocol.columns import I32, Column
from penstock.core.protocol.errors import ProtocolError
from penstock.core.protocol.messages import SpeculationStats, StepDone
from penstock.core.runtime.clock import Clock

if TYPE_CHECKING:
    from penstock.core.actors.scheduler.board import Board

log = logging.getLogger("penstock.speculation")


class Drafting:
    """There where an engine has drafters, and None elsewhere. `width` is what the step being planned was given, `drafts` how many are made behind it."""

    def __init__(self, board: Board, clock: Clock, widths: Widths | None = None) -> None:
        settings = board.settings
        self._board = board
        self._most = settings.lookahead
        self._widths = widths or Widths(settings.widths or range(1, self._most + 1), settings.max_num_batched_tokens, clock)
        self.watches = [Watch(name, clock) for name in settings.drafters or ("drafts",)]
        self._all = (1 << len(self.watches)) - 1
        self.width = self.drafts = self.chosen = 0
        self.drafters = self._all
        self._was_off = 0
        """Of the bits of drafters, those that are off."""
        self._before = -1, -1, 0
        """Of the step that landed last: which it was, the width that was chosen for it, when it was finished."""
        self.rows = self.drafted = self.accepted = self.draft_ns = self.step_ns = 0
        self.places = np.zeros(self._most, np.int64)

    # ------------------------------------------------------------------ before a step

    def plan(self, rows: Rows) -> None:
        """The width of the next step, which has these rows, and their shares of it."""
        board = self._board
        slots, count = board.slots, rows.slots.size
        slots.narrow(rows)
        if not count:  # prompts alone: those that come to their end get drafts for their first step
            self.width, self.drafts = 0, self.chosen
            return
        self.width = self.drafts = self.chosen = 0
        if self._was_off and any(watch.due() for watch in self.watches):
            self._switched()
        wishes = slots.wish[rows.index] if board.wishes else None
        willing = count if wishes is None else int(np.count_nonzero(wishes >= 0))
        if willing and self._was_off != self._all:
            self.chosen = self._widths.choose(count)
        forced = wishes is not None and bool((wishes > 0).any())
        self.drafts = max(self.chosen, self._widths.most(count)) if forced else self.chosen
        if not self.drafts:
            return
        self.drafters = self._all if forced else self._all & ~self._was_off
        ahead: I32 = np.minimum(slots.drafted[rows.index], np.int32(self.chosen))
        if wishes is not None:
            ahead = np.where(wishes > 0, np.minimum(slots.drafted[rows.index], np.int32(self.drafts)), ahead * (wishes == 0))
        room = slots.limit[rows.index] - slots.length[rows.index] - 1
        # A choice that has to fork first has none, so that a fork is never denied for want of room for drafts.
        ahead = np.clip(np.minimum(ahead, room), 0, None) * (slots.capacity[rows.index] > 0)
        most = int(ahead.max())
        if most:
            slots.ahead[rows.index] = ahead
            slots.wide = True
            rows.widen(slots.ahead[rows.index])
            self.width = self.chosen if most <= self.chosen else self.drafts

    def launched(self, flight: Flight) -> None:
        """What the device makes of it: nobody has drafts that did not get them in this step."""
        slots = self._board.slots
        flight.chosen = self.chosen
        flight.drafts = self.drafts if flight.rows.slots.size else 0
        flight.pure = flight.tokens == int(flight.rows.counts.sum())
        if slots.wide:
            flight.width = self.width
            flight.ahead = slots.ahead[flight.rows.index]
        if slots.any_drafted:
            slots.drafted[flight.rows.index] = 0
            slots.any_drafted = bool(slots.drafted.any())

    # ------------------------------------------------------------------ behind it

    def landed(self, flight: Flight, done: StepDone) -> None:
        """Before its tokens are looked at: what is learned of drafts, and which stand now."""
        slots, index, count = self._board.slots, flight.rows.index, flight.rows.slots.size
        if flight.width:
            self._verified(flight, done)
        step, chosen, finished = self._before
        if flight.pure and count and step == flight.step - 1 and chosen == flight.chosen and finished < done.finished_ns:
            self._widths.timed(count, chosen, done.finished_ns - finished)
        self._before = flight.step, flight.chosen if flight.pure else -1, done.finished_ns
        if not flight.drafts:
            if done.drafts.size:
                raise ProtocolError(f"step {done.step} brought drafts that nobody asked for")
            return
        self.draft_ns += done.draft_ns
        self.step_ns += max(0, done.finished_ns - done.started_ns)
        if not count:
            return
        if done.drafts.size not in (0, count * flight.drafts) or done.drafters.size not in (0, count):
            raise ProtocolError(f"step {done.step} has {count} rows and {flight.drafts} drafts a row, but brought {done.drafts.size}")
        if done.drafts.size:
            there = done.drafts.reshape(count, flight.drafts) >= 0
            slots.drafted[index] = np.where(there.all(axis=1), flight.drafts, np.argmin(there, axis=1))
            slots.any_drafted = True
            slots.drafter[index] = done.drafters if done.drafters.size else 0

    def _verified(self, flight: Flight, done: StepDone) -> None:
        slots, index, ahead = self._board.slots, flight.rows.index, flight.ahead
        if done.counts.size != ahead.size or np.any(done.counts < 1) or np.any(done.counts > ahead + 1):
            raise ProtocolError(f"step {done.step} sampled {ahead.size} rows, whose counts cannot be right")
        right = done.counts - 1
        slots.drafts_seen[index] += ahead
        slots.drafts_right[index] += right
        self.rows += int(np.count_nonzero(ahead))
        self.drafted += int(ahead.sum())
        self.accepted += int(right.sum())
        by_place = np.bincount(right, minlength=self._most + 1)
        reached = by_place[::-1].cumsum()[::-1]  # [j]: rows with at least j right
        self.places += reached[1 : self._most + 1]
        verified = right + (ahead > right)
        whose = slots.drafter[index]
        for number, watch in enumerate(self.watches):
            mine = whose == number if len(self.watches) > 1 else slice(None)
            seen = int(verified[mine].sum())
            if seen and watch.saw(seen, int(right[mine].sum())):
                self._switched()
                log.warning("drafter %s is off: %s", watch.name, watch.reason)
        if flight.chosen:
            auto = slots.wish[index] == 0 if self._board.wishes else slice(None)
            mine_right = right[auto]
            if mine_right.size:
                at_least = np.bincount(np.minimum(mine_right, flight.chosen), minlength=flight.chosen + 1)[::-1].cumsum()[::-1]
                self._widths.verified(flight.chosen, at_least.tolist())

    def _switched(self) -> None:
        off = sum(1 << number for number, watch in enumerate(self.watches) if watch.state == OFF)
        if self._was_off & ~off:
            log.info("drafters on trial again: %s", ", ".join(w.name for n, w in enumerate(self.watches) if self._was_off & ~off & 1 << n))
        self._was_off = off
        self._widths.forget()

    # ------------------------------------------------------------------ for others to look at

    def stats(self) -> SpeculationStats:
        return SpeculationStats(
            drafts=self.rows,
            drafted=self.drafted,
            accepted=self.accepted,
            places=self.places.tolist(),
            draft_ns=self.draft_ns,
            step_ns=self.step_ns,
            width=self.chosen,
            states=[watch.state for watch in self.watches],
        )

    def told(self, rows: Rows) -> dict[str, Column]:
        """Of sequences that end: what they had of drafts, as columns of StepTokens."""
        slots, index = self._board.slots, rows.index
        had = np.flatnonzero(slots.drafts_seen[index])
        if not had.size:
            return {}
        index = index[had]
        return {"drafted_seqs": rows.seqs[had], "drafted": slots.drafts_seen[index], "accepted": slots.drafts_right[index]}
