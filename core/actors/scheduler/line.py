"""Who takes part in the next step.

What it is: within a budget of tokens: one token of each running sequence first, then chunks of prompts that are being computed, then whoever
waits, in the policy's order. Beside decodes the pace says how much of it prompts get, and what of that is kept for short ones: then a long prompt that would get
nothing now is passed by short ones that are not of less priority. A prompt token whose log-probability is wanted takes as much of the budget as it costs, so that steps with such tokens
take those who decode beside them no longer than others.
What it does not know: blocks, launches.
"""

from __future__ import annotations

import math

import numpy as np

from penstock.core.actors.scheduler.beams import Beams
from penstock.core.actors.scheduler.board import Board
from penstock.core.actors.scheduler.forecast import Outlook
from penstock.core.actors.scheduler.outline import Outline
from penstock.core.actors.scheduler.pace import Needs, Pace
from penstock.core.actors.scheduler.release import Release
from penstock.core.actors.scheduler.slots import DECODE, Rows
from penstock.core.actors.scheduler.waiting import Entry
from penstock.core.protocol.columns import i32
from penstock.core.protocol.messages import PaceStats

LOOKED_AT = 64
"""So many who wait are asked whether they are short: more do not begin in one step."""


class Line:
    def __init__(self, board: Board, release: Release, beams: Beams) -> None:
        self._board = board
        self._release = release
        self._beams = beams
        settings = board.settings
        self._weight = settings.prompt_logprobs_weight if settings.enable_chunked_prefill else 1.0

    def gather(self) -> Rows:
        """Every sequence that can take one token."""
        board = self._board
        slots = board.slots
        slots.narrow(None)  # which drafts they have is not said yet
        ready = (slots.phase == DECODE) & (slots.length < slots.limit)
        if board.groups:
            ready &= ~slots.solo | (slots.last_step <= board.done_step)
        if board.parked_live:
            parked = slots.parked.copy()
            for slot in board.forking:  # finishes its fork first, so that the other's blocks are not held for it
                parked[slot] = False
            ready &= ~parked
        board.rows = slots.gather(ready.nonzero()[0].astype(np.int32), ascending=True)
        return board.rows

    def take_decodes(self, outline: Outline, rows: Rows) -> None:
        """Sequences that take one token, as far as the budget goes."""
        board = self._board
        most = outline.budget
        if board.prefill_turn and board.prefilling:
            head = board.prefilling[0]
            most -= min(most, int(board.slots.length[head] - board.slots.computed[head]))
        if rows.tokens > most:
            board.slots.narrow(rows)
        if rows.slots.size > most:  # those that waited longest, then those that have least
            order = np.lexsort((rows.starts - rows.prompts, board.slots.last_step[rows.index]))[:most]
            chosen = rows.slots[np.sort(order)]
            rows = board.slots.gather(i32(self._beams.whole(chosen.tolist())) if board.groups else chosen)
            board.rows = None
        if rows.slots.size:
            outline.rows = rows
            outline.budget -= rows.tokens
            if board.pace is not None:
                self._paced(board.pace, rows, outline)
            if board.settings.mixed_prefill_tokens:
                outline.budget = min(outline.budget, board.settings.mixed_prefill_tokens)

    def _paced(self, pace: Pace, rows: Rows, outline: Outline) -> None:
        """Prompt tokens beside these rows. Of those who wait only as many count as there are free slots for."""
        board = self._board
        slots, waiting = board.slots, board.waiting
        begun = [int(slots.length[slot] - slots.computed[slot]) for slot in board.prefilling]
        ahead: list[int] = []
        tokens = float(sum(begun))
        if len(waiting):
            count, asked = waiting.demand(parked=board.parked_live > 0)
            tokens += asked * board.uncached * min(1.0, len(slots.free) / max(count, 1))
            if slots.free and not board.blocked:
                outline.order = self._order()
                ahead = [math.ceil(entry.uncached * board.uncached) for entry in outline.order[: min(len(slots.free), LOOKED_AT)]]
        before = int(slots.computed[board.prefilling[0]]) if board.prefilling else 0
        needs = Needs(begun, ahead, math.ceil(tokens), before)
        share = pace.choose(rows.tokens, int(rows.starts.sum()), needs, outline.budget, slots.goal(rows.index))
        outline.budget, outline.kept, outline.small = share
        if tokens:
            board.paced = PaceStats(limit_ns=round(pace.limit_ns), prompt_tokens=share.tokens)

    def take_chunks(self, outline: Outline) -> None:
        """Prompts that are being computed, first admitted first; what is kept for short ones, long ones leave."""
        board = self._board
        outline.prefill_turn, board.prefill_turn = board.prefill_turn, False
        for slot in list(board.prefilling):
            if not self.take_chunk(outline, slot) and not outline.kept:
                break

    def take_chunk(self, outline: Outline, slot: int) -> bool:
        board = self._board
        start = int(board.slots.computed[slot])
        left = int(board.slots.length[slot]) - start
        holder = board.slots.holder[slot]
        weight = self._weight if holder is not None and holder.request.tells_prompt else 1.0
        most = outline.budget
        if left > outline.small:
            most -= min(most, outline.kept)
        else:
            outline.kept -= min(outline.kept, left)
        if weight > 1.0:
            most = min(most, max(1, int(most / weight)))  # one at least, however little is left: a prompt must come to its end
        count = min(left, most)
        if count < left and not board.settings.enable_chunked_prefill and left <= board.settings.max_num_batched_tokens:
            board.prefill_turn = not outline.prefill_turn  # whole or not at all: next time it goes before the decodes
            return False
        if count <= 0:
            return False
        outline.chunks.append((slot, start, count))
        outline.budget -= min(outline.budget, math.ceil(count * weight))
        return True

    def _order(self) -> list[Entry]:
        board = self._board
        return [entry for entry in board.waiting.ordered(board.clock.now_ns()) if not entry.request.parked]

    def may_admit(self) -> bool:
        """Is it worth looking at who waits?"""
        board = self._board
        return len(board.waiting) > 0 and (board.parked_live > 0 or (len(board.slots.free) > 0 and not board.blocked))

    def entries(self, outline: Outline) -> tuple[list[Entry], int]:
        """Who may be admitted now, in order, and for how many slots there is room."""
        board = self._board
        if outline.budget <= 0 or not self.may_admit():
            return [], 0
        entries = outline.order or self._order()
        if not entries:
            return [], 0
        need = 1 if entries[0].request.group is None else len(entries[0].seqs)
        while len(board.slots.free) < need and self._release.evict_parked(outline):
            pass
        return entries, self.room()

    def room(self) -> int:
        """Free slots that are not promised to the other choices of a prompt that is being computed."""
        board = self._board
        promised = sum(len(holder.attached) for slot in board.prefilling if (holder := board.slots.holder[slot]) is not None)
        return len(board.slots.free) - promised

    def next_entries(self, entries: list[Entry], outline: Outline, room: int) -> list[Entry]:
        """Take from the head of the line what this step can probably start; `entries` keeps the others."""
        if not entries:
            return []
        board = self._board
        budget, kept = outline.budget, outline.kept
        reached, tokens = 0, 0.0
        taken: list[Entry] = []
        passed: list[Entry] = []
        outlook = None
        if board.forecast is not None:
            used, _, total, _, _, quarantined = board.kv
            outlook = board.forecast.outlook(board.slots, total - quarantined, used)
        for entry in entries:
            if room <= 0 or tokens >= budget:
                break
            if entry.request.group is not None and room < len(entry.seqs):
                break  # all of its beams or none; nobody overtakes
            share = self._weight if entry.request.tells_prompt else board.uncached  # of those the cache is not asked
            wanted = max(1.0, entry.uncached * share)
            if wanted > outline.small:
                wanted = min(wanted, budget - tokens - kept)
                if wanted <= 0:  # it would hold memory and get no further: one that was here before is still being computed
                    passed.append(entry)
                    reached += 1
                    continue
            elif passed and entry.request.priority > passed[0].request.priority:
                break
            else:
                kept -= min(kept, math.ceil(wanted))
            if outlook is not None and not self._will_fit(outlook, entry):
                board.blocked = True
                break
            reached += 1
            starting = entry.seqs[:1] if entry.request.group is None else entry.seqs
            if any(sequence.seq in board.held for sequence in starting):  # an earlier life of it is still in flight
                continue
            room -= len(entry.seqs)
            tokens += wanted
            taken.append(entry)
        entries[:reached] = passed
        return taken

    def _will_fit(self, outlook: Outlook, entry: Entry) -> bool:
        """Also when it has grown."""
        request, size = entry.request, entry.tokens.size
        share = 1.0 if request.tells_prompt else self._board.uncached
        return outlook.admits(size, size * share, request.limit, len(request.stop_ids) > 0, len(entry.seqs))
