"""From an outline to a Forward and a Sample.

What it is: the columns of a step, for decodes alone (no Python loop over sequences) and for steps with prompts in them; bookkeeping of what is
now under way.
What it does not know: who was chosen and why, KV.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from penstock.core.actors.scheduler.beams import Beams
from penstock.core.actors.scheduler.board import Board, Planning
from penstock.core.actors.scheduler.outline import Flight, Outline, mask_request
from penstock.core.actors.scheduler.release import Release
from penstock.core.actors.scheduler.slots import DECODE, Rows
from penstock.core.actors.scheduler.waiting import Request, Sequence
from penstock.core.protocol.columns import EMPTY_U8, I32, Column, i32
from penstock.core.protocol.messages import Forward, Sample


class Launch:
    def __init__(self, board: Board, release: Release, beams: Beams) -> None:
        self._board = board
        self._release = release
        self._beams = beams

    def launch_decodes(self, rows: Rows, columns: dict[str, Any], outline: Outline | None) -> Planning:
        """A step of decodes only: every row takes one token, or as many of its drafts besides as turn out right."""
        board = self._board
        slots, at, count = board.slots, rows.at, rows.slots.size
        board.step = step = board.step + 1
        starts, ones = rows.starts, rows.ones
        positions = starts + ones
        width = board.drafting.width if board.drafting is not None and slots.wide else 0
        counts = rows.counts if width else ones
        ends = starts + counts if width else positions  # at most: see Slots.computed
        slots.computed[at] = ends
        slots.length[at] = ends + ones
        slots.last_step[at] = step
        flight = Flight(step, rows, positions, rows.left <= 1 + width, rows.tokens)
        loose = EMPTY_U8 if board.drafting is None else board.drafting.loose(rows)
        rows.starts = ends
        rows.left -= 1 + width
        if rows.left <= 0 or board.groups:
            board.rows = None
        extra: dict[str, Any] = {}
        if outline is not None:
            if outline.sources:
                slots.last_step[list(outline.sources)] = step
            flight.started = outline.started
            if outline.samplings:
                extra["places"] = outline.samplings
        return self._emit(flight, rows.slots, starts, counts, count, board.range[:count], columns, extra, loose)

    def launch_mixed(self, outline: Outline) -> Planning:
        """A step with prompts in it."""
        board = self._board
        slots = board.slots
        board.step = step = board.step + 1
        decodes = outline.rows.slots if outline.rows is not None else board.range[:0]
        chunks = sorted(outline.chunks, key=lambda c: not self._is_last_token(c))
        num_decode = decodes.size + len([c for c in chunks if self._is_last_token(c)])
        rows = np.concatenate([decodes, i32([c[0] for c in chunks])])
        starts = np.concatenate([slots.computed[decodes], i32([c[1] for c in chunks])])
        counts = np.concatenate([outline.rows.counts if outline.rows is not None else decodes, i32([c[2] for c in chunks])])
        slots.computed[rows] = starts + counts
        slots.length[decodes] += counts[: decodes.size]
        loose = EMPTY_U8
        if board.drafting is not None and outline.rows is not None:
            loose = board.drafting.loose(outline.rows)
            if loose.size:
                loose = np.concatenate([loose, np.zeros(len(chunks), np.uint8)])
        slots.last_step[rows] = step
        if outline.sources:
            slots.last_step[list(outline.sources)] = step
        finals: list[int] = []
        final_slots: list[int] = []
        prompt_rows: list[int] = []
        prompts: list[tuple[int, Request]] = []
        scored: list[Sequence] = []
        for row, (slot, start, count) in enumerate(chunks, decodes.size):
            holder = slots.holder[slot]
            assert holder is not None
            request = holder.request
            last = min(start + count, request.prompt_len - 1)
            if last > start and last >= request.prompt_logprobs_next:
                prompt_rows.append(row)
                prompts.append((holder.seq, request))
            if start + count == slots.length[slot] and request.draws_nothing:
                board.prefilling.remove(slot)
                slots.phase[slot] = DECODE  # at its limit already: never gathered; its end comes with this step
                scored.append(holder)
            elif start + count == slots.length[slot]:
                sharing = self._finish_prompt(outline, slot, holder)
                finals += [row] * len(sharing)
                final_slots += sharing
        sampled = slots.gather(np.concatenate([decodes, i32(final_slots)]))
        positions = slots.length[sampled.index] - board.ones[: sampled.slots.size]
        positions[: decodes.size] = starts[: decodes.size] + board.ones[: decodes.size]
        tokens = int(counts.sum())
        flight = Flight(step, sampled, positions, sampled.left <= 0, tokens)
        flight.started, flight.prompts, flight.scored = outline.started, prompts, scored
        if board.pace is not None:
            pairs = sum(count * (2 * start + count) // 2 for _, start, count in chunks)
            flight.beside = int(decodes.size), int(starts[: decodes.size].sum()), pairs, board.pace.limit_ns
        board.prompt_computed += tokens - int(counts[: decodes.size].sum())
        board.rows = None
        extra: dict[str, Any] = {}
        if outline.samplings:
            extra["places"] = outline.samplings
        columns = self._columns(outline)
        if prompt_rows:
            columns["prompt_rows"] = extra["prompt_rows"] = i32(prompt_rows)
            extra["prompt_topk"] = i32([request.params.prompt_logprobs or 0 for _, request in prompts])
        sample_rows = np.concatenate([board.range[: decodes.size], i32(finals)])
        return self._emit(flight, rows, starts, counts, num_decode, sample_rows, columns, extra, loose)

    def _is_last_token(self, chunk: tuple[int, int, int]) -> bool:
        board = self._board
        slot, start, count = chunk
        holder = board.slots.holder[slot]
        return count == 1 and start + 1 == int(board.slots.length[slot]) and holder is not None and not holder.request.draws_nothing

    def _finish_prompt(self, outline: Outline, slot: int, lead: Sequence) -> list[int]:
        """The last chunk is in this step: its row samples for the slot itself, and for as many of the other choices as find a slot."""
        board = self._board
        slots = board.slots
        board.prefilling.remove(slot)
        slots.phase[slot] = DECODE
        slots.length[slot] += 1
        sharing = [slot]
        others, lead.attached = lead.attached, []
        prompt = lead.request.prompt
        room = len(slots.free)
        if board.groups and lead.request.group is None:  # what is promised to beams, they get
            room -= sum(len(holder.attached) for one in board.prefilling if (holder := slots.holder[one]) and holder.request.group)
        while others and room > 0:
            room -= 1
            other = others.pop(0)
            other.lead = None
            place = slots.enter(other, prompt, prompt.size, DECODE)
            if board.settings.clones:
                outline.clone(place, other, slot)
            else:
                outline.place(place, other, prompt)
            if slots.unread[slot]:
                slots.unread[place] = True
                slots.num_unread += 1
                outline.unread.add(place)
            slots.length[place] += 1
            slots.last_step[place] = board.step
            board.forking[place] = slot
            sharing.append(place)
        if others:
            self._release.enqueue(others)
        return sharing

    def _columns(self, outline: Outline) -> dict[str, Any]:
        board = self._board
        carried, board.carried = board.carried, []
        columns = outline.columns(carried, board.slots, board.live)
        if board.groups:
            columns |= self._beams.writes(outline.rows)
        return columns

    def _emit(
        self,
        flight: Flight,
        slots: I32,
        starts: I32,
        counts: I32,
        num_decode: int,
        sample_rows: I32,
        columns: dict[str, Any],
        extra: dict[str, Any],
        loose: Column,
    ) -> Planning:
        board = self._board
        engine, epoch = board.settings.engine, board.settings.epoch
        board.flights.append(flight)
        if loose.size:
            flight.loose, columns["loose"] = True, loose
        if board.obeying:
            flight.masked = np.flatnonzero(board.slots.grammar[flight.rows.index])
            extra["masked"] = flight.masked.size > 0
        drafting = board.drafting
        if drafting is not None:
            columns |= drafting.launched(flight, columns)
            if flight.width:
                columns["lookahead"] = extra["lookahead"] = flight.width
            if flight.drafts:
                extra["drafts"], extra["drafters"] = flight.drafts, drafting.drafters
        yield Forward(
            engine=engine, epoch=epoch, step=flight.step, slots=slots, starts=starts, counts=counts, num_decode=num_decode, **columns
        )
        yield Sample(
            engine=engine,
            epoch=epoch,
            step=flight.step,
            rows=sample_rows,
            slots=flight.rows.slots,
            positions=flight.positions,
            **extra,
        )
        if flight.masked.size:
            # Which drafts stand is said by the step ahead; and who makes masks is asked in the order of steps.
            flight.asks = (flight.width > 0 and flight.loose) or any(ahead.asks for ahead in board.flights)
            if not flight.asks:
                yield mask_request(flight, {} if drafting is None or not flight.width else drafting.masked(flight))
