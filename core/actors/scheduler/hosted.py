"""Drafters on the host: what they are asked before a step, and how their drafts get into it.

What it is: of the rows that a step decodes, those of which drafters on the host may say more than the device did are asked about in one message (core/actors/drafters.py answers),
with the tokens that these drafters have not seen yet; the drafts stand in this step alone, and are written with it, behind what others write.
What it does not know: how many drafts a row may have, and which drafters are off (drafting.py says); what became of the drafts; what drafts are.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

import numpy as np

from penstock.core.actors.scheduler.outline import Flight
from penstock.core.actors.scheduler.slots import Index, Rows
from penstock.core.protocol.columns import EMPTY_I32, EMPTY_I64, EMPTY_U8, I32, U8, i32, i64, u8
from penstock.core.protocol.errors import ProtocolError
from penstock.core.protocol.messages import Draft, Drafted
from penstock.core.runtime.actor import Ask, Out

if TYPE_CHECKING:
    from penstock.core.actors.scheduler.board import Board


class Hosted:
    """`numbers`: of all drafters, those that are on the host. `broken` is told the number of one that failed, and why."""

    def __init__(self, board: Board, numbers: list[int], drafters: int, broken: Callable[[dict[int, str]], None]) -> None:
        self._board = board
        self._drafters, self._broken = drafters, broken
        self.numbers = numbers
        self.on: list[int] = []
        """Those that may be asked for the step being planned."""
        self.ended: list[int] = []
        """Sequences that they were told of, and that left their slots."""
        self._tokens: dict[int, I32] = {}
        """Drafts by slot that are written with this step."""

    def ask(self, rows: Rows, most: I32, stands: I32 | None) -> Generator[Out, Any, None]:
        """Asks about rows of which the device has no drafts, or less wanted ones. `most`: of each row; `stands`: where drafts are noted by slot, for masks."""
        slots = self._board.slots
        there = slots.drafted[rows.index] > 0
        wanted = np.flatnonzero((most > 0) & (~there | (slots.drafter[rows.index] > self.on[0])))
        if not wanted.size:
            return
        index = rows.index[wanted]
        asked = np.full(index.size, self._bits(self._drafters), np.uint8)
        if there.any():
            bits = u8([self._bits(before) for before in range(self._drafters + 1)])
            asked = bits[np.where(there[wanted], slots.drafter[index], self._drafters)]
        reply: Drafted = yield Ask(self._question(index, most[wanted], asked), Drafted)
        self._lose(reply)
        ends = np.cumsum(reply.counts)
        if reply.counts.size != index.size or reply.tokens.size != int(reply.counts.sum()) or np.any(reply.counts > most[wanted]):
            raise ProtocolError(f"{index.size} sequences were asked about, but {reply.counts.size} have {reply.tokens.size} drafts")
        for at in np.flatnonzero(reply.counts).tolist():
            slot = int(index[at])
            self._tokens[slot] = reply.tokens[ends[at] - reply.counts[at] : ends[at]]
            slots.drafted[slot] = reply.counts[at]
            slots.drafter[slot] = self.numbers[int(reply.drafters[at])]
            if stands is not None:
                stands[slot, : reply.counts[at]] = self._tokens[slot]
            slots.any_drafted = True

    def _bits(self, before: int) -> int:
        """Those of them that come before that drafter."""
        return sum(1 << bit for bit, number in enumerate(self.numbers) if number in self.on and number < before)

    def _question(self, index: Index, most: I32, asked: U8) -> Draft:
        slots = self._board.slots
        shown, known = slots.shown[index], slots.known[index]
        news = np.flatnonzero(known > shown)
        begun = [holder for slot in index[news[shown[news] == 0]].tolist() if (holder := slots.holder[slot]) is not None]
        counts = known[news] - shown[news]
        if news.size == 1:
            tokens = slots.history[index[news[0]], shown[news[0]] : known[news[0]]].copy()
        else:
            within = np.arange(int(counts.sum())) - (counts.cumsum() - counts).repeat(counts)
            tokens = slots.history[index[news].repeat(counts), shown[news].repeat(counts) + within]
        slots.shown[index] = known
        ended, self.ended = self.ended, []
        return Draft(
            step=self._board.step + 1,
            seqs=slots.seq[index],
            most=most,
            drafters=asked,
            news=slots.seq[index[news]],
            counts=counts,
            tokens=tokens,
            begun=i64([holder.seq for holder in begun]),
            roots=b"".join(holder.request.root for holder in begun),
            ended=i64(ended),
        )

    def farewell(self) -> Generator[Out, Any, None]:
        """Nobody is left: drafters need not remember those who were."""
        ended, self.ended = self.ended, []
        question = Draft(step=self._board.step + 1, seqs=EMPTY_I64, most=EMPTY_I32, drafters=EMPTY_U8, ended=i64(ended))
        self._lose((yield Ask(question, Drafted)))

    def _lose(self, reply: Drafted) -> None:
        if reply.broken:
            self._broken({self.numbers[number]: why for number, why in reply.broken.items()})

    def forget(self) -> None:
        """Drafts of the host stand nowhere but in the step that they are written with."""
        if self._tokens:
            self._board.slots.drafted[list(self._tokens)] = 0
            self._tokens = {}

    def writes(self, flight: Flight, columns: dict[str, Any]) -> dict[str, Any]:
        """The columns of Forward that write these drafts to the device, behind those of others, where the step has any."""
        if not self._tokens or not flight.width:
            return {}
        place: list[tuple[int, int, I32]] = []
        for at in np.flatnonzero(flight.ahead).tolist():
            slot = int(flight.rows.slots[at])
            if slot in self._tokens:
                place.append((slot, int(flight.positions[at]), self._tokens[slot][: int(flight.ahead[at])]))
        if not place:
            return {}
        mine = {
            "write_slots": i32([slot for slot, _, tokens in place for _ in range(tokens.size)]),
            "write_positions": np.concatenate([np.arange(first, first + tokens.size, dtype=np.int32) for _, first, tokens in place]),
            "write_tokens": np.concatenate([tokens for _, _, tokens in place]),
        }
        return {name: np.concatenate([columns[name], column]) if name in columns else column for name, column in mine.items()}
