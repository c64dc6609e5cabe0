"""Drafts in steps: which rows compute some along, and what became of them.

What it is: before a step, its width and each row's share of it (none for those who obey a grammar, search with beams or do not want any); behind it, the
lengths of rows whose drafts were right, acceptance by place, by sequence and by drafter, and drafters that are turned off. The device's drafts stand
there since the last step; those of drafters on the host are asked for before a step, and written with it (hosted.py).
Where the device knows by itself how far a step brought its rows (Forward.loose), the next one is planned while that is under way, from bounds: as if all drafts were
there, and right. Elsewhere, and for drafters on the host, which have to be told, it is planned when the one before it has landed.
While there are no drafts, and none are likely to come, most steps are planned and landed as where there are no drafters (`Widths.rest`).
What it does not know: which width is best (widths.py), whom drafters look at (attendance.py), blocks, what drafts are. It is long because what a step has before it
and what is learned behind it are about the same columns.
"""

from __future__ import annotations

import logging
from collections.abc import Generator
from operator import add
from typing import TYPE_CHECKING, Any

import numpy as np

from penstock.core.actors.scheduler.attendance import Attendance
from penstock.core.actors.scheduler.hosted import Hosted
from penstock.core.actors.scheduler.outline import NO_ROWS, Flight, Outline
from penstock.core.actors.scheduler.slots import Index, Rows
from penstock.core.actors.scheduler.tally import Tally, at_least, counted
from penstock.core.actors.scheduler.widths import OFF, REST, Watch, Widths
from penstock.core.protocol.columns import EMPTY_U8, I32, U8, Column
from penstock.core.protocol.errors import ProtocolError
from penstock.core.protocol.messages import SpeculationStats, StepDone
from penstock.core.runtime.actor import Out
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
        self._widths.behind = settings.depth - 1 if settings.loose else 0
        self._come = False
        """A step with drafts has landed, and none without was planned since."""
        self.watches = [Watch(name, clock) for name in settings.drafters or ("drafts",)]
        hosted = settings.hosted or (False,) * len(self.watches)
        self.host = Hosted(board, [number for number, here in enumerate(hosted) if here], len(self.watches), self._lose)
        self._device: U8 = np.array([number for number, here in enumerate(hosted) if not here], np.uint8)
        self._all = (1 << len(self.watches)) - 1
        reads = dict(zip(self._device.tolist(), settings.reads, strict=False))
        self._attendance: Attendance | None = None
        """None: no drafter reads anything."""
        if any(reads.values()):
            self._attendance = Attendance(board, self._widths, clock, [reads.get(number, 0) for number in range(len(self.watches))])
        self._off = 0
        """As bits: those that are off."""
        self.width = self.drafts = self.chosen = self._wanted = 0
        self._rest, self._rested, self._timed_rest = 0, 0, False
        """So many steps more are not looked at, so many were not since somebody looked, and whether that is told to the widths."""
        self._told: SpeculationStats | None = None
        """What `stats` said last, as long as nothing can have changed."""
        self.drafters = 0
        self.last = 0
        """The width of the last step that landed and decoded anything, as it was computed."""
        self._wishes: Column | None = None
        self._stands: I32 | None = np.zeros((settings.max_num_seqs, self._most), np.int32) if settings.masks_ahead else None
        """The drafts themselves, by slot: masks follow them."""
        self._ones: U8 = np.ones(settings.max_num_seqs, np.uint8)
        self._ones.flags.writeable = False
        self._before = -1, 0, True
        """Of the step that landed last: which it was, the width that was chosen for it, whether it had decodes alone."""
        self._finished_ns = 0
        """When it was finished."""
        self.rows = self.drafted = self.accepted = self.draft_ns = self.step_ns = 0
        self.places = [0] * self._most
        self.tally = Tally(board.slots)
        self._alike: tuple[Index, int] = NO_ROWS, 0
        """Slots (the very array) of which each has so many drafts that stand, if that is known."""
        self._none: I32 = np.zeros(settings.max_num_seqs * self._most, np.int32)
        self._none.flags.writeable = False
        self._several = len(self.watches) > 1 or bool(self.host.numbers)
        """Whether it is said of each row whose drafts it has."""
        self._on = -1
        """As bits: the drafters that the last step but those at rest was for."""

    # ------------------------------------------------------------------ who is attended

    def enters(self, outline: Outline, slot: int, wish: int) -> None:
        """A sequence enters a slot: need drafters look at it?"""
        if self._attendance is None:
            return
        if self._attendance.spares(wish):
            self._board.slots.unread[slot] = True
            self._board.slots.num_unread += 1
            outline.unread.add(slot)
        elif self._attendance.idle:
            self._rest = 0  # somebody who is to be tried

    def computes_all(self, wish: int, tokens: int) -> bool:
        """Whether a prompt should be computed whole, whatever of it is in the cache."""
        return self._attendance is not None and self._attendance.whole(wish, tokens)

    # ------------------------------------------------------------------ before a step

    def choose(self, rows: Rows) -> None:
        """The width of the next step, which has these rows."""
        board = self._board
        self.tally.begin(rows.index)
        if self._rest and not board.wishes:
            self._rest -= 1
            self._rested += 1
            return
        slots, count = board.slots, rows.slots.size
        self.width = self._rest = 0
        if self._rested:
            if self._timed_rest:
                self._widths.rested(self._rested)
            self._rested = 0
        self.host.forget()
        slots.beyond = 0
        if not count:  # prompts alone: those that come to their end get drafts for their first step
            slots.narrow(rows)
            return
        self.chosen = 0
        if self._off and any(watch.due() for watch in self.watches):
            self._switched()
        self._wishes = wishes = slots.wish[rows.index] if board.wishes else None
        willing = count if wishes is None else int(np.count_nonzero(wishes >= 0))
        if willing and self._off != self._all:
            self._widths.mixed = bool(board.prefilling)
            if slots.num_unread and self._attendance is not None:
                self.chosen = self._attendance.choose(rows)
            else:
                self.chosen = self._widths.choose(count)
        if not self.chosen and wishes is None:
            self._timed_rest = self._off != self._all
            self._rest = self._widths.rest if self._timed_rest else REST
        forced = wishes is not None and bool((wishes > 0).any())
        self._wanted = max(self.chosen, self._widths.most(count)) if forced else self.chosen
        on = self._all if forced else self._all & ~self._off
        if on != self._on:
            self._on = on
            self.drafters = sum(1 << bit for bit, number in enumerate(self._device.tolist()) if on >> number & 1)
            self.host.on = [number for number in self.host.numbers if on >> number & 1]
        self.drafts = self._wanted if self.drafters else 0
        slots.beyond = self._beyond(count)

    def _beyond(self, rows: int) -> int:
        """Tokens of drafts behind this step for which there should be blocks: a drafter with layers computes all but the last of them. They are a wish: where memory
        might not suffice for everybody they are not asked for, so that nobody is preempted for them."""
        board = self._board
        if self.drafts < 2 or board.groups or board.forking:
            return 0
        used, _, total, _, _, quarantined = board.kv
        each = 2 + (self._wanted + self.drafts) // board.block
        return self.drafts if total - used - quarantined >= 2 * rows * each else 0

    def _most_of(self, rows: Rows) -> I32:
        """Drafts that each row may have in this step."""
        slots, wishes = self._board.slots, self._wishes
        most = np.full(rows.slots.size, self.chosen, np.int32)
        if wishes is not None:
            most[wishes > 0] = self._wanted
            most[wishes < 0] = 0
        room = np.clip(slots.limit[rows.index] - slots.length[rows.index] - 1, 0, None)
        # A choice that has to fork first has none, so that a fork is never denied for want of room for drafts.
        found: I32 = np.minimum(most, room) * (slots.capacity[rows.index] > 0)
        return found

    def share(self, rows: Rows) -> None:
        """How many of the drafts that stand each row computes along."""
        slots = self._board.slots
        if not self._wanted or not rows.slots.size or not slots.any_drafted:
            slots.narrow(rows)
            return
        if rows.left <= self.chosen:
            rows.left = slots.left(rows.index)
        alike = self._wishes is None and not self._board.forking and rows.left > self.chosen
        if alike and self._alike[0] is rows.index:
            if each := min(self._alike[1], self.chosen):
                slots.widen_alike(rows, each)
                self.width = self.chosen
            else:
                slots.narrow(rows)
            return
        slots.widen(rows, np.minimum(slots.drafted[rows.index], self.chosen if alike else self._most_of(rows)))
        if slots.wide:
            self.width = self.chosen if rows.most <= self.chosen else self._wanted

    def ask(self, rows: Rows) -> Generator[Out, Any, None]:
        """Drafts of the host, for rows of which the device has none or less wanted ones."""
        if (
            not self._wanted or not self.host.on or not rows.slots.size or self._board.flights
        ):  # of steps in flight the tokens are not known
            return
        yield from self.host.ask(rows, self._most_of(rows), self._stands)

    def _lose(self, broken: dict[int, str]) -> None:
        """Drafters on the host that failed."""
        for number, why in broken.items():
            self.watches[number].fail(why)
        self._switched()

    def loose(self, rows: Rows) -> U8:
        """Forward.loose for rows that decode in the next step; empty where it is known of all how far they have come and which drafts stand."""
        flights = self._board.flights
        ahead = [flight for flight in flights if flight.width or flight.drafts] if flights else None
        if not ahead:
            return EMPTY_U8
        if any(flight.rows is rows for flight in ahead):
            return self._ones[: rows.slots.size]
        named = np.zeros(self._board.slots.count, np.uint8)
        for flight in ahead:
            named[flight.rows.index] = 1
        found: U8 = named[rows.index]
        return found if found.any() else EMPTY_U8

    def launched(self, flight: Flight, columns: dict[str, Any]) -> dict[str, Any]:
        """What the device makes of it: nobody has drafts that did not get them in this step. Gives the columns with drafts of the host."""
        slots = self._board.slots
        flight.pure = flight.tokens == flight.rows.tokens
        if self._rested:
            flight.resting, self._come = True, False
            return {}
        flight.chosen = self.chosen
        flight.drafts = self.drafts if flight.rows.slots.size else 0
        self._come = self._come and flight.drafts > 0
        flight.early = flight.drafts > 0 and not self._come
        if slots.wide:
            flight.width, flight.most = self.width, flight.rows.most
            flight.ahead = flight.stood = flight.rows.ahead
            flight.drafted = flight.rows.tokens - flight.rows.slots.size
        flight.alone = bool(self.host.numbers and self._wanted and flight.rows.slots.size)
        if not flight.alone and not self._board.settings.loose:
            flight.alone = flight.width > 0 or flight.drafts > 0
        written = self.host.writes(flight, columns) if self.host.numbers else {}
        if self._attendance is not None and flight.chosen and (slots.num_unread or self._attendance.late):
            written |= self._attendance.launched(flight)
        self.host.forget()
        if slots.any_drafted and not flight.drafts:  # else those that it brings are in their place before anybody looks
            slots.drafted[flight.rows.index] = 0
            slots.any_drafted = bool(slots.drafted.any())
            self._alike = NO_ROWS, 0
        return written

    def masked(self, flight: Flight) -> dict[str, Column]:
        """The drafts of rows that obey a grammar, for MaskRequest."""
        if not flight.width:
            return {}
        ahead = flight.stood[flight.masked]
        if self._stands is None or not ahead.any():
            return {}
        rows = self._stands[flight.rows.index[flight.masked]]
        return {"draft_counts": ahead, "drafts": rows[np.arange(rows.shape[1]) < ahead[:, None]]}

    # ------------------------------------------------------------------ behind it

    def landed(self, flight: Flight, done: StepDone) -> None:
        """Before its tokens are looked at: what is learned of drafts, and which stand now."""
        if flight.resting and not done.drafts.size:
            self._before, self._finished_ns = (flight.step, 0, flight.pure), done.finished_ns
            return
        self._told = None
        count = flight.rows.slots.size
        if flight.width:
            self._verified(flight, done)
        if count:
            self.last = flight.most
        kind = flight.step, flight.chosen, flight.pure
        step, chosen, pure = self._before
        if count and (step, pure) == (flight.step - 1, flight.pure) and self._finished_ns < done.finished_ns:
            steady = chosen == flight.chosen and not (flight.early or flight.partial)
            self._widths.timed(count, flight.chosen, done.finished_ns - self._finished_ns, not pure, steady, flight.caught)
        begun, self._before, self._finished_ns = self._finished_ns, kind, done.finished_ns
        if not flight.drafts:
            if done.drafts.size:
                raise ProtocolError(f"step {done.step} brought drafts that nobody asked for")
            return
        self._come = self._come or all(later.drafts for later in self._board.flights)
        self.draft_ns += done.draft_ns
        if (taken := done.finished_ns - (done.started_ns if done.started_ns > begun else begun)) > 0:
            self.step_ns += taken
        if not count:
            return
        if (done.drafts.size and done.drafts.size != count * flight.drafts) or (done.drafters.size and done.drafters.size != count):
            raise ProtocolError(f"step {done.step} has {count} rows and {flight.drafts} drafts a row, but brought {done.drafts.size}")
        self._stand(flight, done)

    def _stand(self, flight: Flight, done: StepDone) -> None:
        """Which drafts there are now; of rows in a later step, which there were for that."""
        slots, index, later = self._board.slots, flight.rows.index, self._board.flights
        made: I32 | int = flight.drafts
        if not done.drafts.size:
            made = 0
        elif np.count_nonzero(done.drafts < self._none[: done.drafts.size]):
            there = done.drafts.reshape(-1, flight.drafts) >= 0
            made = np.where(there.all(axis=1), flight.drafts, np.argmin(there, axis=1)).astype(np.int32)
        if later and later[0].width:
            self._correct(later[0], flight, made)
        if self._stands is not None and self._board.obeying and done.drafts.size:
            self._stands[index, : flight.drafts] = done.drafts.reshape(-1, flight.drafts)
        if self._several:
            slots.drafter[index] = self._device[done.drafters] if done.drafters.size else self._device[0]
        if later and any(not step.drafts for step in later):  # behind which nothing stands
            last = slots.last_step[index] <= flight.step
            index, made = index[last], made if isinstance(made, int) else made[last]
        slots.any_drafted = True
        if isinstance(made, int) and not self.host.numbers:
            if self._alike[0] is index and self._alike[1] == made:
                return
            self._alike = index, made
        else:
            self._alike = NO_ROWS, 0
        slots.drafted[index] = made

    def _correct(self, later: Flight, flight: Flight, made: I32 | int) -> None:
        """The drafts that a later step took to be there, now that it is known."""
        if isinstance(made, int) and made >= later.width:
            return
        most = np.full(self._board.slots.count, self._most, np.int32)
        most[flight.rows.index] = made
        later.stood = np.minimum(later.ahead, most[later.rows.index])

    def _verified(self, flight: Flight, done: StepDone) -> None:
        slots, index, ahead = self._board.slots, flight.rows.index, flight.stood
        size, drafted = ahead.size, flight.drafted
        right, rights = counted(flight, done)
        if ahead is not flight.ahead:  # what stood there by chance may have been right
            right, drafted = np.minimum(right, ahead), int(ahead.sum())
            rights = np.bincount(right)
        full = drafted == size * flight.width  # then counting the rows that had drafts is spared, and those that had wrong ones
        self.tally.add(index, flight.width if full else ahead, right)
        reached = at_least(rights, self._most)
        accepted = sum(reached) - reached[0]
        self.rows += size if full else int(np.count_nonzero(ahead))
        self.drafted += drafted
        self.accepted += accepted
        self.places = list(map(add, self.places, reached[1:]))
        whose = slots.drafter[index] if len(self.watches) > 1 else None
        for number, watch in enumerate(self.watches):
            if whose is None:
                wrong = size - reached[flight.width] if full else int(np.count_nonzero(ahead > right))
                seen, good = accepted + wrong, accepted
            else:
                mine = whose == number
                good = int(right[mine].sum())
                seen = good + int(np.count_nonzero(ahead[mine] > right[mine]))
            if seen and watch.saw(seen, good):
                self._switched()
                log.warning("drafter %s is off: %s", watch.name, watch.reason)
        if flight.chosen:
            if self._board.wishes:
                auto = right[slots.wish[index] == 0]
                reached = at_least(np.bincount(np.minimum(auto, flight.chosen)), self._most)
            attended = None if self._attendance is None else self._attendance.attended(index)
            if attended is not None:
                if self._board.wishes:
                    attended &= slots.wish[index] == 0
                reached = at_least(np.bincount(np.minimum(right[attended], flight.chosen)), self._most)
                if reached[0]:
                    self._widths.verified(flight.chosen, reached, 1 + float(right.mean()))
            elif reached[0]:
                self._widths.verified(flight.chosen, reached)

    def _switched(self) -> None:
        off = sum(1 << number for number, watch in enumerate(self.watches) if watch.state == OFF)
        if self._off & ~off:
            log.info("drafters on trial again: %s", ", ".join(w.name for n, w in enumerate(self.watches) if self._off & ~off & 1 << n))
        self._off = off
        if self._attendance is not None:
            self._attendance.off = off
        self._widths.forget()

    # ------------------------------------------------------------------ for others to look at

    def stats(self) -> SpeculationStats:
        if self._told is None or not self._rested:
            self._told = self._stats()
        return self._told

    def _stats(self) -> SpeculationStats:
        return SpeculationStats(
            drafts=self.rows,
            drafted=self.drafted,
            accepted=self.accepted,
            places=self.places,
            draft_ns=self.draft_ns,
            step_ns=self.step_ns,
            width=self.last,
            states=[self.watches[0].state] if len(self.watches) == 1 else [watch.state for watch in self.watches],
            chosen=self.chosen,
            reasons=[watch.reason if watch.state == OFF else "" for watch in self.watches] if self._off else [],
        )
