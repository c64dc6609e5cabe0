"""A step in the making, and a step on its way.

What it is: `Outline` collects what one plan decides until it becomes a Forward and a Sample; `Flight` is what the scheduler remembers of a
step until its StepDone; and the selection of log-probability rows.
What it does not know: how decisions are made.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from penstock.core.actors.scheduler.slots import Index, Rows, Slots
from penstock.core.actors.scheduler.waiting import Entry, Request, Sequence
from penstock.core.protocol.columns import EMPTY_I32, EMPTY_I64, I32, Column, i32, u8
from penstock.core.protocol.messages import KvGrant, LogprobColumns, MaskRequest, SlotSampling

NO_ROWS: Index = np.empty(0, np.intp)

MANY_BLOCKS = 24
"""From so many on columns are cheaper than a loop."""
Blocks = tuple[Column, Column, Column]
"""seqs, index, ids: as in KvGrant."""


class Outline:
    """`budget` tokens are left; `rows` decode, `chunks` are (slot, start, count) of prompts."""

    __slots__ = (
        "asked",
        "blocks",
        "budget",
        "chunks",
        "clones",
        "copies",
        "forked",
        "full",
        "kept",
        "order",
        "places",
        "prefill_turn",
        "rows",
        "samplings",
        "short",
        "small",
        "sources",
        "stalled",
        "started",
        "unread",
    )

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.kept = self.small = 0
        """Of the budget, for prompts with at most `small` tokens to go: see Share."""
        self.order: list[Entry] | None = None
        """Who waits, where somebody looked already."""
        self.rows: Rows | None = None
        self.chunks: list[tuple[int, int, int]] = []
        self.blocks: list[Blocks] = []
        self.copies: list[tuple[Column, Column]] = []
        self.places: list[tuple[int, I32]] = []
        self.unread: set[int] = set()
        """Slots of these that drafters need not look at."""
        self.clones: list[tuple[int, int, int]] = []
        """Source slot, target slot, tokens."""
        self.samplings: list[SlotSampling] = []
        self.started: list[tuple[int, int]] = []
        self.forked: set[int] = set()
        self.sources: set[int] = set()
        """Slots whose blocks this step copies."""
        self.stalled: set[int] = set()
        """Slots that sit this step out for want of memory."""
        self.short: Index = NO_ROWS
        """Slots that were asked for, if all got their blocks."""
        self.asked: Column = EMPTY_I64
        """Sequences that were asked for last."""
        self.full = False
        """Memory denied somebody who waits: nobody behind may overtake."""
        self.prefill_turn = False

    def place(self, slot: int, sequence: Sequence, tokens: I32) -> None:
        """The sequence enters its slot on the device."""
        self.places.append((slot, tokens))
        self._enter(slot, sequence)

    def clone(self, slot: int, sequence: Sequence, source: int) -> None:
        """The same, with the prompt that another slot holds."""
        self.clones.append((source, slot, sequence.request.prompt_len))
        self._enter(slot, sequence)

    def _enter(self, slot: int, sequence: Sequence) -> None:
        request = sequence.request
        self.samplings.append(
            SlotSampling(
                slot=slot, choice=sequence.choice, prompt_len=request.prompt_len, params=request.params, stop_ids=request.banned_ids
            )
        )

    def take(self, grant: KvGrant) -> None:
        if grant.block_ids.size:
            self.blocks.append((grant.block_seqs, grant.block_index, grant.block_ids))
        if grant.copy_dst.size:
            self.copies.append((grant.copy_src, grant.copy_dst))

    def columns(self, carried: list[Blocks], slots: Slots, live: dict[int, Sequence]) -> dict[str, Any]:
        """The parts of Forward besides its rows, but for those that lost their slot meanwhile. `live`: Board.live."""
        columns: dict[str, Any] = {}
        if self.places:
            columns["place_slots"] = i32([slot for slot, _ in self.places])
            columns["place_counts"] = i32([t.size for _, t in self.places])
            columns["place_tokens"] = np.concatenate([t for _, t in self.places])
            if self.unread:
                columns["place_unread"] = u8([slot in self.unread for slot, _ in self.places])
        if self.clones:
            columns["clone_src"], columns["clone_dst"], columns["clone_lens"] = (i32([c[k] for c in self.clones]) for k in range(3))
        if self.copies:
            columns["copy_src"] = np.concatenate([src for src, _ in self.copies])
            columns["copy_dst"] = np.concatenate([dst for _, dst in self.copies])
        blocks = carried + self.blocks if carried else self.blocks
        if blocks:
            seqs, index, ids = blocks[0] if len(blocks) == 1 else (np.concatenate([b[i] for b in blocks]) for i in range(3))
            if len(blocks) == 1 and seqs.size == self.short.size >= MANY_BLOCKS and np.count_nonzero(seqs == self.asked) == seqs.size:
                columns["block_slots"], columns["block_index"], columns["block_ids"] = self.short.astype(np.int32), index, ids
                return columns
            listed = [-1 if (sequence := live.get(seq)) is None else sequence.slot for seq in seqs.tolist()]
            held = i32(listed)
            if -1 in listed:
                keep = held >= 0
                held, index, ids = held[keep], index[keep], ids[keep]
            columns["block_slots"], columns["block_index"], columns["block_ids"] = held, index, ids
        return columns


class Flight:
    """Row i samples position `positions[i]` of `rows.slots[i]`; where it is `loose` that is known when it lands, and they are the last that it can be. `capped`:
    some row may reach its limit. `tokens` are all that the step computes. `ahead`: drafts that each row computes along, where `width` is above 0, `drafted` in all, `most` in a row; `stood`: of these,
    drafts that turned out to be there; `right`: once it has landed, those that were right, whether they stood or not, and `firsts`: where the tokens of each row begin; `drafts`: how many are made behind it; `chosen`: the width
    that was found best; `early`: planned before the first step that made any had landed; `alone`: the next step is planned when it has landed; `pure`: decodes alone; `partial`: of most rows
    drafters know nothing; `caught`: they read behind it what they had missed of some. `masked`: which rows draw under a mask; `asks`: for which it
    is not asked before the step ahead has landed. `prompts`: whose prompt log-probabilities it brings. `scored`: whose prompt is complete with it and who draw nothing. `beside`: of a step
    with prompts, where there is a pace: rows that decode, the positions they read, the pairs of positions that prompts attend, and the pace's limit."""

    right: I32
    firsts: I32

    __slots__ = (
        *(
            "ahead",
            "alone",
            "asks",
            "beside",
            "capped",
            "caught",
            "chosen",
            "drafted",
            "drafts",
            "early",
            "firsts",
            "loose",
            "masked",
            "most",
            "partial",
            "positions",
            "prompts",
            "pure",
            "resting",
            "right",
            "rows",
            "scored",
            "started",
            "step",
            "stood",
            "tokens",
        ),
        "width",
    )

    def __init__(self, step: int, rows: Rows, positions: I32, capped: bool, tokens: int) -> None:
        self.step = step
        self.rows = rows
        self.positions = positions
        self.capped = capped
        self.tokens = tokens
        self.ahead: I32 = EMPTY_I32
        self.stood: I32 = EMPTY_I32
        self.width = self.drafts = self.drafted = self.chosen = self.most = 0
        self.partial = self.caught = False
        self.pure = self.alone = self.loose = self.asks = self.early = self.resting = False
        self.masked: Index = NO_ROWS
        self.started: list[tuple[int, int]] = []
        self.prompts: list[tuple[int, Request]] = []
        self.scored: list[Sequence] = []
        self.beside: tuple[int, int, int, float] | None = None


def mask_request(flight: Flight, drafts: dict[str, Column]) -> MaskRequest:
    """For its masked rows, with the columns of `drafts`."""
    rows, which = flight.rows, flight.masked
    return MaskRequest(
        step=flight.step, rows=which.astype(np.int32), seqs=rows.seqs[which], incarnations=rows.incarnations[which], **drafts
    )


def select_logprobs(columns: LogprobColumns, kept: Column, total: int) -> LogprobColumns:
    """Only the entries whose row is in `kept` (of `total` rows), renumbered to the rows that remain."""
    number = np.full(total, -1, np.int32)
    number[kept] = np.arange(kept.size, dtype=np.int32)
    rows = number[columns.rows]
    return pick_logprobs(columns, rows >= 0, rows)


def pick_logprobs(columns: LogprobColumns, keep: Column, rows: Column) -> LogprobColumns:
    """Entries under the mask `keep`, with the row numbers `rows` (one per entry of `columns`)."""
    wide = np.repeat(keep, columns.counts)
    return LogprobColumns(
        rows=rows[keep],
        positions=columns.positions[keep],
        counts=columns.counts[keep],
        ranks=columns.ranks[keep],
        ids=columns.ids[wide],
        values=columns.values[wide],
    )
