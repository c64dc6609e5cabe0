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
from penstock.core.actors.scheduler.outline import Flight, pick_logprobs, select_logprobs
from penstock.core.actors.scheduler.release import Release
from penstock.core.actors.scheduler.slots import ENDED, Rows
from penstock.core.protocol.columns import EMPTY_I32, I32, U8, Column, i32, i64
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


class Landing:
    def __init__(self, board: Board, release: Release, beams: Beams) -> None:
        self._board = board
        self._release = release
        self._beams = beams

    def step_done(self, done: StepDone) -> Iterable[Out]:
        board = self._board
        settings, slots = board.settings, board.slots
        if done.epoch != settings.epoch or done.engine != settings.engine or not board.flights or board.flights[0].step != done.step:
            board.stale += 1
            return
        flight = board.flights.popleft()
        rows, positions, offsets, tokens, logprobs = flight.rows, flight.positions, flight.offsets, done.tokens, done.logprobs
        bad = done.bad_rows
        searching = bool(board.groups)
        if board.drafting is not None:
            board.drafting.landed(flight, done)
        if flight.masked.size and not searching:
            yield _drawn(flight, done)
        beams = slots.solo[rows.index] if searching else None
        if flight.width:
            rows, positions, offsets, tokens, logprobs, bad = self._expand(flight, done)
        elif tokens.size != rows.slots.size or done.counts.size:
            raise ProtocolError(f"step {done.step} sampled {rows.slots.size} rows, but {tokens.size} tokens came back")
        board.done_step = done.step
        everything = rows, logprobs, bad
        if board.leaving or searching:
            counted = slots.phase[rows.index] != ENDED
            if searching:
                counted &= ~slots.solo[rows.index]
            kept = np.flatnonzero(counted)
            if kept.size < tokens.size:  # the others had already stopped, or are beams: what was drawn for them is dropped
                if logprobs is not None:
                    logprobs = select_logprobs(logprobs, kept, tokens.size)
                bad = np.flatnonzero(np.isin(kept, bad))
                rows, positions, offsets, tokens = rows.select(kept), positions[kept], offsets[kept], tokens[kept]
        index = rows.index
        after = positions + (np.int32(1) if flight.width else board.ones[: positions.size])
        reasons: U8 = np.zeros(tokens.size, np.uint8)
        ends = flight.capped or bad.size > 0
        if flight.capped:
            reasons[after >= slots.limit[index]] = LENGTH
        for stops in rows.stops:  # few; cheaper one by one than broadcast
            hit = stops == tokens
            if np.count_nonzero(hit):
                reasons[hit & (offsets >= rows.mins)] = STOP
                ends = True
        if bad.size:
            tokens = tokens.copy()
            tokens[bad] = -1
            errors = self._blamed(index[bad], rows.seqs[bad], rows.incarnations[bad])
            reasons[bad] = FAILED
            slots.poisoned[index[bad]] = True
            fine = reasons != FAILED
            slots.flat[rows.base[fine] + positions[fine]] = tokens[fine]
            slots.known[index[fine]] = after[fine]
        else:
            slots.flat[rows.base + positions] = tokens
            slots.known[index] = after
        if flight.width:  # in order: a row's last token says how far it came
            slots.length[index] = after
            slots.computed[index] = positions
            board.rows = None  # those who sat out may go on
        columns: dict[str, Any] = {}
        if flight.prompts:
            self._add_prompt_logprobs(columns, flight, done.prompt_logprobs)
        if ends:
            if board.drafting is not None:
                columns |= board.drafting.told(rows.select(np.flatnonzero(reasons)))
            for seq in rows.seqs[reasons != 0].tolist():
                self._release.end(board.live[seq])
        seqs, incarnations = rows.seqs, rows.incarnations
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
        if beams is not None and beams.any():
            told = self._beams.land(slots.solo[everything[0].index], *everything, self._blame)
        if searching and flight.masked.size:  # what beams go on with is known now
            assert beams is not None
            yield self._searched(flight, done, beams)
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

    @staticmethod
    def _expand(flight: Flight, done: StepDone) -> tuple[Rows, I32, I32, I32, LogprobColumns | None, Column]:
        """A step of several tokens a row as if each were a row: what follows a row's first stop is dropped. Rows (repeated), positions, offsets, tokens,
        log-probabilities, and which of these are bad."""
        rows, counts, tokens, logprobs = flight.rows, done.counts, done.tokens, done.logprobs
        if int(counts.sum()) != tokens.size:  # that they fit the rows is known
            raise ProtocolError(f"step {done.step} sampled {rows.slots.size} rows, whose counts or {tokens.size} tokens cannot be right")
        row_of = np.repeat(np.arange(counts.size), counts)
        firsts = np.cumsum(counts) - counts
        rows = rows.select(row_of)
        positions = (flight.positions[row_of] + np.arange(tokens.size) - firsts[row_of]).astype(np.int32)
        offsets = positions - rows.prompts
        last = np.zeros(tokens.size, bool)
        last[firsts[done.bad_rows]] = True
        for stops in rows.stops:
            last |= (stops == tokens) & (offsets >= rows.mins)
        if not np.count_nonzero(last):
            return rows, positions, offsets, tokens, logprobs, done.bad_rows
        before = np.cumsum(last) - last
        kept = np.flatnonzero(before == before[firsts[row_of]])
        bad = np.searchsorted(kept, firsts[done.bad_rows])
        if kept.size < tokens.size:
            if logprobs is not None:
                logprobs = select_logprobs(logprobs, kept, tokens.size)
            rows, positions, offsets, tokens = rows.select(kept), positions[kept], offsets[kept], tokens[kept]
        return rows, positions, offsets, tokens, logprobs, bad

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
