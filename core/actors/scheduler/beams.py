"""Beams in slots: what a beam search needs of the scheduler.

What it is: `Group`, the sequences of one request that search together, and what becomes of their rows. The beams of a search are sequences in slots of
their own, that share KV blocks as far as their tokens are the same. They take part in a step all together or not at all, and wait for each of
their steps (`solo`), since only its log-probabilities say how they go on. A beam that is followed stays where it is; one that branches is forked
into the slot of one that is given up: its blocks are shared (KvStep.fork), its tokens written over the other's (Forward.write). Nothing is told
before the search is over: then every hypothesis' tokens come at once. So a search that loses its memory, or its engine, begins anew, and nobody can tell.
Only the prompt's blocks get into the prefix cache.
What it does not know: which beams are followed (search.py), how memory is found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from penstock.core.actors.scheduler.board import Board
from penstock.core.actors.scheduler.outline import Outline
from penstock.core.actors.scheduler.release import Release
from penstock.core.actors.scheduler.search import Hypothesis, Mark, marks_of
from penstock.core.actors.scheduler.slots import DECODE, MANY, Rows
from penstock.core.actors.scheduler.waiting import Group
from penstock.core.protocol.columns import I32, Column, f32, i32, i64
from penstock.core.protocol.messages import FAILED, LENGTH, STOP, LogprobColumns, seq_of
from penstock.core.protocol.wording import FEWER_ANSWERS

Move = tuple[Group, int, int]
"""A beam that branches: its group, the slot that it goes to, the slot that it comes from."""


class Told:
    """What searches that are over have to tell: rows as in StepTokens."""

    def __init__(self) -> None:
        self.seqs: list[int] = []
        self.incarnations: list[int] = []
        self.offsets: list[int] = []
        self.tokens: list[int] = []
        self.reasons: list[int] = []
        self.errors: list[str] = []
        self.marks: list[tuple[int, int, Mark]] = []
        """Row, position, log-probabilities."""

    def add(self, group: Group, choice: int, found: Hypothesis) -> None:
        request, count, first = group.request, len(found.tokens), len(self.seqs)
        self.seqs += [seq_of(request.key, choice)] * count
        self.incarnations += [request.incarnation] * count
        self.offsets += range(count)
        self.tokens += found.tokens.tolist()
        self.reasons += [0] * (count - 1) + [STOP if found.stopped else LENGTH]
        self.marks += [(first + at, request.prompt_len + at, mark) for at, mark in enumerate(marks_of(found.mark))]

    def fail(self, group: Group, error: str, choices: Iterable[int]) -> None:
        for choice in choices:
            self.seqs.append(seq_of(group.request.key, choice))
            self.incarnations.append(group.request.incarnation)
            self.offsets.append(0)
            self.tokens.append(-1)
            self.reasons.append(FAILED)
            self.errors.append(error)

    def behind(self, columns: tuple[Column, Column, Column, Column, Column]) -> tuple[Column, ...]:
        """seqs, incarnations, offsets, tokens and reasons of a step, with these rows behind."""
        mine = (i64(self.seqs), i32(self.incarnations), i32(self.offsets), i32(self.tokens), np.array(self.reasons, np.uint8))
        return tuple(np.concatenate([step, more]) for step, more in zip(columns, mine, strict=True))

    def logprobs(self, before: LogprobColumns | None, rows: int) -> LogprobColumns | None:
        """The step's log-probabilities, of its `rows` rows, and these."""
        if not self.marks:
            return before
        marks = [mark for _, _, mark in self.marks]
        mine = LogprobColumns(
            rows=i32([row + rows for row, _, _ in self.marks]),
            positions=i32([position for _, position, _ in self.marks]),
            counts=i32([len(mark.ids) for mark in marks]),
            ranks=i32([mark.rank for mark in marks]),
            ids=np.concatenate([mark.ids for mark in marks]).astype(np.int32),
            values=f32(np.concatenate([mark.values for mark in marks])),
        )
        if before is None:
            return mine
        names = LogprobColumns.__struct_fields__
        return LogprobColumns(**{name: np.concatenate([getattr(before, name), getattr(mine, name)]) for name in names})


class Beams:
    def __init__(self, board: Board, release: Release) -> None:
        self._board = board
        self._release = release
        self.steps: dict[int, tuple[int, int]] = {}
        """Of the step that landed last, for each beam with a grammar that goes on: whose place in it it goes on from, and the token."""

    # ------------------------------------------------------------------ a step that is planned

    def whole(self, slots: Iterable[int]) -> list[int]:
        """Of these slots those whose group is there as a whole, and those that have none."""
        listed = list(slots)
        here = set(listed)
        short = {slot for group in self._board.groups.values() for slot in group.slots() if not here.issuperset(group.slots())}
        return [slot for slot in listed if slot not in short]

    def pending(self) -> bool:
        """Is there a group with something to write before it goes on?"""
        return any(group.writes for group in self._board.groups.values())

    def moves(self, rows: Rows | None) -> list[Move]:
        """The branches of groups in this step that KV does not know of yet."""
        moving = [group for group in self._board.groups.values() if group.moves]
        if not moving or rows is None:
            return []
        here = set(rows.slots.tolist())
        return [(group, target, source) for group in moving if group.order[0] in here for target, source in group.moves]

    def moved(self, outline: Outline, moves: list[Move], granted: Column) -> None:
        """What KV said to them. It never says no: a beam's own last block takes the copy."""
        board = self._board
        board.again = True
        for (group, target, source), good in zip(moves, granted.tolist(), strict=True):
            assert good, "a beam's blocks could not be shared"
            group.moves = []
            board.slots.given[target] = board.slots.given[source]
            outline.forked |= {target, source}

    def unaffordable(self, short: list[int]) -> list[int]:
        """Of slots that ask for blocks those of groups whose first forks memory does not allow: all of a group's or none."""
        board = self._board
        used, _cached, total, *_ = board.kv
        room = total - used
        refused: list[int] = []
        for group in board.groups.values():
            forks = [slot for slot in short if slot in board.forking and board.slots.holder[slot] in group.members]
            need = len(forks) if group.request.prompt_len % board.block else 0
            if need > room:
                refused += [slot for slot in short if slot in group.slots()]
            else:
                room -= need
        return refused

    def writes(self, rows: Rows | None) -> dict[str, Any]:
        """Columns of the Forward in which the groups of this step go on."""
        writing = [group for group in self._board.groups.values() if group.writes]
        if not writing or rows is None:
            return {}
        here = set(rows.slots.tolist())
        found: list[tuple[int, int, I32]] = []
        for group in writing:
            if group.order[0] in here:
                found += group.writes
                group.writes = []
        if not found:
            return {}
        return {
            "write_slots": np.concatenate([np.full(tokens.size, slot, np.int32) for slot, _, tokens in found]),
            "write_positions": np.concatenate([np.arange(first, first + tokens.size, dtype=np.int32) for _, first, tokens in found]),
            "write_tokens": np.concatenate([tokens for _, _, tokens in found]),
        }

    # ------------------------------------------------------------------ a step that has landed

    def land(self, mine: Column, rows: Rows, logprobs: LogprobColumns | None, bad: Column, blame: Callable[[int], str]) -> Told | None:
        """Rows under the mask `mine` are beams'. `bad` are rows of which nothing could be drawn; `blame(slot)` says why. What searches that are over have to
        tell. `steps` is then what each beam with a grammar goes on with."""
        board = self._board
        board.rows = None
        self.steps = {}
        told: Told | None = None
        row_of = {slot: row for row, slot in enumerate(rows.slots.tolist()) if mine[row]}
        lost = set(rows.slots[bad].tolist()) if bad.size else set()
        holders = [board.slots.holder[slot] for slot in row_of if board.slots.phase[slot] == DECODE]  # not those given up meanwhile
        groups = {holder.request.key: holder.request.group for holder in holders if holder is not None}
        for group in groups.values():
            assert group is not None
            failed = self._failed(group, lost)
            if failed >= 0:
                told = told or Told()
                told.fail(group, blame(failed), group.wanted)
            else:
                assert logprobs is not None
                if self._advance(group, row_of, lost, logprobs):
                    continue
                told = told or Told()
                self._tell(group, told)
            for member in group.members:
                self._release.end(member)
        return told

    def _failed(self, group: Group, lost: set[int]) -> int:
        """The slot of a beam that costs its group the search, or -1. One whose grammar allows nothing more is only a beam that nothing follows."""
        slots, given_up = self._board.slots, self._board.given_up
        for member in group.members:
            if member.slot in lost and (not group.grammar or (member.seq, group.request.incarnation) in given_up):
                if not group.grammar:
                    slots.poisoned[group.slots()] = True
                return member.slot
        return -1

    def _tell(self, group: Group, told: Told) -> None:
        found = group.search.done
        for choice in group.wanted:
            if choice < len(found):
                told.add(group, choice, found[choice])
        missing = [choice for choice in group.wanted if choice >= len(found)]
        told.fail(group, f"{FEWER_ANSWERS}{len(found)}", missing)

    def _advance(self, group: Group, row_of: dict[int, int], lost: set[int], logprobs: LogprobColumns) -> bool:
        """Does the search go on?"""
        slots, search = self._board.slots, group.search
        first = search.length == 0
        order = [member.slot for member in group.members] if first else group.order
        if first:
            slots.poisoned[order[0]] = order[0] in lost
            self._release.commit(order[:1])
            slots.hashed[order] = MANY  # from here on a block's tokens are not final before the search is over
        at = group.request.prompt_len + search.length
        found = [_likeliest(logprobs, row_of[slot]) for slot in order[: search.beams]]
        ids, values = (np.stack([pair[part] for pair in found]) for part in range(2))
        for beam, slot in enumerate(order[: search.beams]):
            if slot in lost:
                values[beam] = -np.inf
        begin = group.request.prompt_len
        step = search.advance(ids, values, lambda beam: slots.history[order[beam], begin:at])
        if step is None:
            return False
        parents, tokens = step
        if first:
            group.order, starts = order, dict.fromkeys(order, at)
        else:
            group.order, starts = self._branch(group, parents, at)
        index = np.array(group.order, np.intp)
        slots.history[index, at] = tokens
        slots.known[index] = at + 1
        group.writes = [(slot, starts[slot], slots.history[slot, starts[slot] : at + 1].copy()) for slot in group.order]
        if group.grammar:
            whence = dict(group.moves)
            for slot, token in zip(group.order, tokens, strict=True):
                self.steps[int(slots.seq[slot])] = int(slots.seq[whence.get(slot, slot)]), token
        return True

    def _branch(self, group: Group, parents: list[int], at: int) -> tuple[list[int], dict[int, int]]:
        """Slots for the next beams, by rank, and from which position on each has other tokens than before."""
        slots, before, begin = self._board.slots, group.order, group.request.prompt_len
        free = [slot for beam, slot in enumerate(before) if beam not in parents]
        order: list[int] = []
        starts: dict[int, int] = {}
        group.moves = []
        for beam, parent in enumerate(parents):
            source = target = before[parent]
            starts.setdefault(source, at)
            if parent in parents[:beam]:
                target = free.pop(0)
                group.moves.append((target, source))
                other = np.flatnonzero(slots.history[target, begin:at] != slots.history[source, begin:at])
                starts[target] = begin + int(other[0]) if other.size else at
                slots.history[target, begin:at] = slots.history[source, begin:at]
            order.append(target)
        return order, starts


def _likeliest(logprobs: LogprobColumns, row: int) -> tuple[I32, Column]:
    """The likeliest tokens of a step's row, without the one that was drawn."""
    at = int(np.flatnonzero(logprobs.rows == row)[0])
    end = int(logprobs.counts[: at + 1].sum())
    first = end - int(logprobs.counts[at]) + 1
    return logprobs.ids[first:end], logprobs.values[first:end]
