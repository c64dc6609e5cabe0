"""What became of a step.

What it is: StepDone to StepTokens: which of the drawn tokens count, what ends with them, and the log-probabilities that go along.
What it does not know: planning.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
import numpy as np

from penstock.core.actors.scheduler.beams import Beams
from penstock.core.actors.scheduler.board import Board
from penstock.core.actors.scheduler.outline import Flight, mask_request, pick_logprobs, select_logprobs
from penstock.core.actors.scheduler.pace import Pace
from penstock.core.actors.scheduler.release import Release
from penstock.core.actors.scheduler.slots import ENDED, Index, Rows
from penstock.core.protocol.columns import EMPTY_I32, I32, I64, U8, Column, i32, i64
from penstock.core.protocol.errors import ProtocolError
from penstock.core.protocol.messages import (
    FAILED,
    LENGTH,
    STOP,
    Drawn,
    LogprobColumns,
    StepDone,
    StepTokens,
)
from penstock.core.protocol.wording import NOTHING_ALLOWED
from penstock.core.runtime.actor import Out

NOT_A_NUMBER = "The model's output for this sequence is not a number."


class _Tokens:
    """What a step drew, token by token. `several`: rows have several, row i `counts[i]` of them; else each is its own row. `offsets` are in the outputs, `places` in
    Slots.flat; `bad` are those of which nothing could be drawn."""

    __slots__ = (
        "_of",
        "_stops",
        "bad",
        "counts",
        "ends",
        "incarnations",
        "logprobs",
        "offsets",
        "places",
        "rows",
        "seqs",
        "several",
        "tokens",
    )

    def __init__(self, rows: Rows, tokens: I32, offsets: I32, places: I64, logprobs: LogprobColumns | None, bad: Column, ends: I32) -> None:
        self.rows = rows
        self.tokens = tokens
        self.offsets = offsets
        self.places = places
        self.logprobs = logprobs
        self.bad = bad
        self.ends = ends
        """Of each row: the position behind its last."""
        self.several = False
        self.seqs, self.incarnations = rows.seqs, rows.incarnations

    def spread(self, counts: I32, table: I64) -> None:
        """There are several a row; `table` is Rows.table, a line for each token."""
        self.several, self.counts = True, counts
        self._of: Index | None = None
        pairs = table.view(np.int32)
        self.seqs, self.incarnations, self._stops = table[:, 1], pairs[:, 5], pairs[:, 6:]

    @property
    def of(self) -> Index:
        """The row of each, where rows have several."""
        if self._of is None:
            self._of = np.arange(self.counts.size).repeat(self.counts)
        return self._of

    def column(self, column: Column) -> Column:
        """One of the rows', for each token."""
        return column[self.of] if self.several else column

    def stops(self, number: int) -> Column:
        """That one of Rows.stops, for each token."""
        return self._stops[:, number] if self.several and number < 2 else self.column(self.rows.stops[number])

    def positions(self) -> I32:
        found: I32 = self.offsets + self.column(self.rows.prompts)
        return found

    def which(self, tokens: Index) -> Rows:
        """The rows of these tokens."""
        return self.rows.select(self.of[tokens] if self.several else tokens)

    def each(self) -> Rows:
        """A row for each token."""
        return self.rows.select(self.of) if self.several else self.rows

    def ended(self) -> Column | None:
        """Which are stops of their rows; None: none is."""
        found: Column | None = None
        for number, stops in enumerate(self.rows.stops):  # few; cheaper one by one than broadcast
            hit = (self.stops(number) if self.several else stops) == self.tokens
            if np.count_nonzero(hit):
                hit &= self.offsets >= self.column(self.rows.mins)
                found = hit if found is None else found | hit
        return found

    def keep(self, kept: Index) -> None:
        """Only these tokens."""
        if self.logprobs is not None:
            self.logprobs = select_logprobs(self.logprobs, kept, self.tokens.size)
        self.bad = np.flatnonzero(np.isin(kept, self.bad))
        if self.several:
            self._of, self._stops = self.of[kept], self._stops[kept]
        else:
            self.rows, self.ends = self.rows.select(kept), self.ends[kept]
        self.seqs, self.incarnations = self.seqs[kept], self.incarnations[kept]
        self.tokens, self.offsets, self.places = self.tokens[kept], self.offsets[kept], self.places[kept]


class Landing:
    def __init__(self, board: Board, release: Release, beams: Beams) -> None:
        self._board = board
        self._release = release
        self._beams = beams
        self._finished_ns = 0
        """When the last step was finished."""

    def _timed(self, pace: Pace, flight: Flight, done: StepDone) -> None:
        """What the pace learns of a step: from the end of the one before on, if it was under way by then."""
        ns = done.finished_ns - max(done.started_ns, self._finished_ns)
        self._finished_ns = done.finished_ns
        if flight.beside is not None:
            rows, positions, pairs, limit_ns = flight.beside
            pace.times.learn(flight.tokens, positions, pairs, True, ns)
            if rows:
                pace.beside(ns, limit_ns)
        elif flight.rows.slots.size:
            pace.rested(ns)
            if pace.due():
                pace.times.learn(flight.tokens, int(flight.positions.sum()), 0, False, ns)

    def step_done(self, done: StepDone) -> Iterable[Out]:
        board = self._board
        settings, slots = board.settings, board.slots
        if done.epoch != settings.epoch or done.engine != settings.engine or not board.flights or board.flights[0].step != done.step:
            board.stale += 1
            return
        flight = board.flights.popleft()
        searching = bool(board.groups)
        if board.drafting is not None:
            board.drafting.landed(flight, done)
        if board.pace is not None:
            self._timed(board.pace, flight, done)
        if flight.masked.size and not searching:
            yield _drawn(flight, done)
        beams = slots.solo[flight.rows.index] if searching else None
        drawn = self._spread(flight, done) if flight.width else self._single(flight, done)
        ended = drawn.ended()
        if drawn.several and (ended is not None or drawn.bad.size):
            ended = self._cut(drawn, ended)
        board.done_step = done.step
        everything = (drawn.each(), drawn.logprobs, drawn.bad) if searching else None
        if board.leaving or searching:
            counted = slots.phase[flight.rows.index] != ENDED
            if searching:
                counted &= ~slots.solo[flight.rows.index]
            kept = np.flatnonzero(drawn.column(counted))
            if kept.size < drawn.tokens.size:  # the others had already stopped, or are beams: what was drawn for them is dropped
                drawn.keep(kept)
                ended = None if ended is None else ended[kept]
        rows, tokens, offsets, logprobs, bad = drawn.rows, drawn.tokens, drawn.offsets, drawn.logprobs, drawn.bad
        reasons: U8 = np.zeros(tokens.size, np.uint8)
        ends = flight.capped or bad.size > 0
        if flight.capped:
            reasons[drawn.positions() + 1 >= slots.limit[drawn.column(rows.index)]] = LENGTH
        if ended is not None and np.count_nonzero(ended):
            reasons[ended] = STOP
            ends = True
        if bad.size:
            drawn.tokens = tokens = tokens.copy()
            tokens[bad] = -1
            index = drawn.column(rows.index)[bad]
            errors = self._blamed(index, drawn.seqs[bad], drawn.incarnations[bad])
            reasons[bad] = FAILED
            slots.poisoned[index] = True
        self._receive(flight, done, drawn, bad)
        if board.forecast is not None and len(rows.stops):
            board.forecast.drew(int(np.count_nonzero(drawn.stops(0) >= 0)))
        columns: dict[str, Any] = {}
        if flight.prompts:
            self._add_prompt_logprobs(columns, flight, done.prompt_logprobs)
        if ends:
            if board.pace is not None and (over := int(np.count_nonzero(reasons))):
                board.pace.answered(int(offsets[reasons != 0].sum()) + over, over)
            if board.drafting is not None:
                columns |= board.drafting.tally.told(drawn.which(np.flatnonzero(reasons)))
            for seq in drawn.seqs[reasons != 0].tolist():
                self._release.end(board.live[seq])
        seqs, incarnations = drawn.seqs, drawn.incarnations
        if flight.scored:
            scored = [s for lead in flight.scored if board.live.get(lead.seq) is lead for s in (*lead.attached, lead)]
            for sequence in scored:
                self._release.end(sequence)
            zeros = np.zeros(len(scored), np.int32)
            seqs = np.concatenate([seqs, i64([s.seq for s in scored])])
            incarnations = np.concatenate([incarnations, i32([s.request.incarnation for s in scored])])
            offsets, tokens = np.concatenate([offsets, zeros]), np.concatenate([tokens, zeros - 1])
            reasons = np.concatenate([reasons, np.full(len(scored), LENGTH, np.uint8)])
        told = None
        if everything is not None and beams is not None and beams.any():
            told = self._beams.land(slots.solo[everything[0].index], *everything, self._blame)
        if searching and flight.masked.size:  # what beams go on with is known now
            assert beams is not None
            yield self._searched(flight, done, beams)
        if board.flights and board.flights[0].asks:  # which drafts it has, and what came before them, is known now
            later = board.flights[0]
            later.asks = False
            yield mask_request(later, {} if board.drafting is None else board.drafting.masked(later))
        if board.leaving:
            self._release.settle()
        if told is not None:
            logprobs = told.logprobs(logprobs, seqs.size)
            seqs, incarnations, offsets, tokens, reasons = told.behind((seqs, incarnations, offsets, tokens, reasons))
        if flight.started:
            columns["started_seqs"] = i64([seq for seq, _ in flight.started])
            columns["started_cached"] = i32([cached for _, cached in flight.started])
        if bad.size:
            columns["errors"] = errors
        if told is not None and told.errors:
            columns["errors"] = columns.get("errors", []) + told.errors
        yield StepTokens(
            engine=settings.engine,
            epoch=settings.epoch,
            step=done.step,
            seqs=seqs,
            incarnations=incarnations,
            offsets=offsets,
            tokens=tokens,
            reasons=reasons,
            stats=board.stats(flight.tokens),
            started_ns=done.started_ns,
            finished_ns=done.finished_ns,
            preempted_seqs=board.take_preempted(),
            logprobs=logprobs,
            **columns,
        )
        yield from board.wake()

    def _searched(self, flight: Flight, done: StepDone, beams: Column) -> Drawn:
        """As `_drawn`, where some of the rows may be beams: not what was drawn for them counts, but what they go on with."""
        drawn = _drawn(flight, done)
        sources, tokens = drawn.seqs.copy(), drawn.tokens.copy()
        firsts = np.cumsum(drawn.counts) - drawn.counts if drawn.counts.size else np.arange(tokens.size)
        for at in np.flatnonzero(beams[flight.masked]).tolist():
            sources[at], tokens[firsts[at]] = self._beams.steps.get(int(drawn.seqs[at]), (drawn.seqs[at], -1))
        return msgspec.structs.replace(drawn, sources=sources, tokens=tokens)

    def _blame(self, slot: int) -> str:
        """Why nothing could be drawn for this beam."""
        slots = self._board.slots
        index = np.array([slot])
        return self._blamed(index, slots.seq[index], slots.incarnation[index])[0]

    def _blamed(self, index: Column, seqs: Column, incarnations: Column) -> list[str]:
        """Why nothing could be drawn for these rows."""
        obeying, why = self._board.slots.grammar[index].tolist(), self._board.given_up
        return [
            why.get(key, NOTHING_ALLOWED if obeys else NOT_A_NUMBER)
            for obeys, key in zip(obeying, zip(seqs.tolist(), incarnations.tolist(), strict=True), strict=True)
        ]

    def _single(self, flight: Flight, done: StepDone) -> _Tokens:
        """A step of one token a row."""
        rows, tokens = flight.rows, done.tokens
        if tokens.size != rows.slots.size or done.counts.size:
            raise ProtocolError(f"step {done.step} sampled {rows.slots.size} rows, but {tokens.size} tokens came back")
        positions = self._board.slots.known[rows.index] if flight.loose else flight.positions
        places = rows.base + positions.astype(np.int64)  # of one type: adding others is slower
        return _Tokens(rows, tokens, positions - rows.prompts, places, done.logprobs, done.bad_rows, positions + rows.ones)

    def _spread(self, flight: Flight, done: StepDone) -> _Tokens:
        """A step of several tokens a row, as many as they should be. Where each goes follows from what is known, since no step before this one is under way."""
        board = self._board
        rows, counts, tokens = flight.rows, done.counts, done.tokens
        firsts = flight.firsts
        known = board.slots.known[rows.at]
        shift = known - firsts
        table = rows.table()
        np.add(rows.base, shift.astype(np.int64), out=table[:, 0])
        np.subtract(shift, rows.prompts, out=table.view(np.int32)[:, 4])
        each = table.repeat(counts.astype(np.intp), axis=0)
        offsets, places = each.view(np.int32)[:, 4] + board.steps[: tokens.size], each[:, 0] + board.places[: tokens.size]
        bad = firsts[done.bad_rows] if done.bad_rows.size else done.bad_rows
        drawn = _Tokens(rows, tokens, offsets, places, done.logprobs, bad, known + counts)
        drawn.spread(counts, each)
        return drawn

    @staticmethod
    def _cut(drawn: _Tokens, ended: Column | None) -> Column | None:
        """What follows a row's first stop, or its failure, is dropped."""
        last = np.zeros(drawn.tokens.size, bool) if ended is None else ended.copy()
        last[drawn.bad] = True
        before = np.cumsum(last) - last
        firsts = np.searchsorted(drawn.of, drawn.of)
        kept = np.flatnonzero(before == before[firsts])
        if kept.size < drawn.tokens.size:
            drawn.keep(kept)
            ended = None if ended is None else ended[kept]
        return ended

    def _receive(self, flight: Flight, done: StepDone, drawn: _Tokens, bad: Column) -> None:
        """The tokens are in the histories; and bounds of rows whose drafts were not all right come down."""
        board = self._board
        slots, rows, index = board.slots, flight.rows, drawn.rows.at
        places, tokens = drawn.places, drawn.tokens
        whole = not bad.size and (not drawn.several or tokens.size == done.tokens.size)
        if whole:
            slots.flat[places] = tokens
            slots.known[index] = drawn.ends
        else:
            fine = np.ones(tokens.size, bool)
            fine[bad] = False
            slots.flat[places[fine]] = tokens[fine]
            of = drawn.of[fine] if drawn.several else fine.nonzero()[0]
            slots.known[index] += np.bincount(of, minlength=drawn.rows.slots.size).astype(np.int32)
        if not flight.width:
            return
        if board.rows is not None and board.rows is rows and not flight.capped:
            # Where nobody else is under way, all tokens there are are known.
            length = drawn.ends if whole and not board.flights else rows.starts + rows.ones - (flight.ahead - flight.right)
            rows.starts = starts = length - rows.ones
            slots.computed[rows.at] = starts
            slots.length[rows.at] = length
        else:
            lacking = flight.ahead - flight.right
            slots.computed[index] -= lacking
            slots.length[index] -= lacking
            board.rows = None  # who had come to its limit, by its bound, may go on

    def _add_prompt_logprobs(self, columns: dict[str, Any], flight: Flight, found: LogprobColumns | None) -> None:
        """Those that were not delivered before; under a living choice's name, since they belong to all choices."""
        board = self._board
        if found is None:
            return
        fresh = np.zeros(found.rows.size, bool)
        seqs: list[int] = []
        for row, (seq, request) in enumerate(flight.prompts):
            if request.live:
                mine = (found.rows == row) & (found.positions >= request.prompt_logprobs_next)
                fresh |= mine
                request.prompt_logprobs_next = int(found.positions[mine].max(initial=request.prompt_logprobs_next - 1)) + 1
                if seq not in board.live:
                    seq = next(s.seq for s in board.live.values() if s.request is request)
            seqs.append(seq)
        columns["prompt_seqs"] = i64(seqs)
        columns["prompt_logprobs"] = pick_logprobs(found, fresh, found.rows)


def _drawn(flight: Flight, done: StepDone) -> Drawn:
    rows, which = flight.rows, flight.masked
    tokens, bad, counts = done.tokens[which] if not flight.width else done.tokens, np.isin(which, done.bad_rows), EMPTY_I32
    if flight.width:  # some may have several
        counts = done.counts[which]
        firsts = (np.cumsum(done.counts) - done.counts)[which]
        at = np.repeat(firsts - np.cumsum(counts) + counts, counts) + np.arange(int(counts.sum()))
        tokens, bad = tokens[at], np.repeat(bad, counts)
    if done.bad_rows.size:
        tokens = np.where(bad, np.int32(-1), tokens)
    return Drawn(step=done.step, seqs=rows.seqs[which], incarnations=rows.incarnations[which], tokens=tokens, counts=counts)
