"""Blocks for the next step.

What it is: the one question to KV that a plan asks (KvStep, KvGrant), forks, prompts that are placed with what the cache had of them, and what is
done when memory runs out: preemption, never of the oldest sequence, or a step's pause.
What it does not know: block ids' contents, launches.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np

from penstock.core.actors.scheduler.beams import Beams
from penstock.core.actors.scheduler.board import NOBODY, Board, Planning
from penstock.core.actors.scheduler.line import Line
from penstock.core.actors.scheduler.outline import Outline
from penstock.core.actors.scheduler.release import Release
from penstock.core.actors.scheduler.slots import DECODE, PREFILL, Index, Rows
from penstock.core.actors.scheduler.waiting import Entry
from penstock.core.protocol.columns import I32, Column, i32, i64, u8
from penstock.core.protocol.hashing import HASH_BYTES
from penstock.core.protocol.messages import (
    KvGrant,
    KvStep,
)
from penstock.core.runtime.actor import Ask, Out

EARLY = 3
"""Steps for which blocks are asked for early. More would save little, and one question would take longer than all that lies between two."""
_MAX_ROUNDS = 4
"""Look-ups with different cache hits may leave budget: so often KV is asked again within one plan."""


class Memory:
    def __init__(self, board: Board, release: Release, line: Line, beams: Beams) -> None:
        self._board = board
        self._release = release
        self._line = line
        self._beams = beams

    def early(self, rows: Rows) -> int:
        """How many tokens further the blocks are to reach that are asked for now: where there is enough for everybody whoever needs one within some steps is asked for with the
        first, so that KV need not be asked in every step."""
        board = self._board
        if board.groups or board.forking or board.blocked:
            return 0
        used, _, total, _, _, quarantined = board.kv
        tokens = EARLY * (1 + rows.most)
        each = 2 + (tokens + board.slots.beyond) // board.block
        return tokens if total - used - quarantined >= 2 * rows.slots.size * each else 0

    def ask(self, outline: Outline, short: Index, entries: list[Entry], reach: I32 | None = None) -> Generator[Out, Any, list[int]]:
        """One KvStep: what is pending, blocks for decoding slots (which may first have to fork), look-ups for entries (which are placed if
        granted). `reach`: of these slots, where it is known. Gives the denied slots."""
        board = self._board
        refused: list[int] = []
        if board.groups and board.forking:
            refused = self._beams.unaffordable(short.tolist())
            if refused and board.releases:  # what comes back may be enough
                yield from self.ask(outline, NOBODY, [])
                refused = self._beams.unaffordable(short.tolist())
            short, reach = short[~np.isin(short, refused)], None
            entries = [] if refused else entries  # nobody who waits goes before those that run
        slots = board.slots
        ask: dict[str, Any] = {}
        if entries:  # blocks need a name only before somebody looks for them (or when they are given back)
            self._release.commit(slots.incomplete())
        if board.commits:
            ask["commit_seqs"] = i64([c[0] for c in board.commits])
            ask["commit_lens"] = i32([c[1] for c in board.commits])
            ask["commit_counts"] = i32([c[2].size for c in board.commits])
            ask["commit_tokens"] = np.concatenate([c[2] for c in board.commits])
            board.commits = []
        if board.releases:
            ask["release_seqs"] = i64([r[0] for r in board.releases])
            ask["release_incarnations"] = i32([r[1] for r in board.releases])
            ask["release_drop"] = u8([r[2] for r in board.releases])
            board.releases = []
        forks = [slot for slot in short.tolist() if slot in board.forking] if board.forking else []
        moves = self._beams.moves(outline.rows) if board.groups else []
        if forks and board.groups:  # beams' first, for whom there is enough
            forks.sort(key=lambda slot: slots.solo.item(slot), reverse=True)
        if forks or moves:
            ask["fork_src"] = slots.seq[[source for _, _, source in moves] + [board.forking[slot] for slot in forks]]
            ask["fork_dst"] = slots.seq[[target for _, target, _ in moves] + forks]
            ask["fork_lens"] = np.concatenate([slots.computed[[target for _, target, _ in moves]], slots.prompt[forks]])
        if reach is None:
            reach = slots.reach(short)
        if short.size:
            ask["reserve_seqs"] = outline.asked = slots.seq[short]
            ask["reserve_lens"] = reach
        if entries:
            self._ask_for_entries(ask, short, reach, entries)
        grant: KvGrant = yield Ask(KvStep(step=board.step + 1, **ask), KvGrant)
        used = grant.total_blocks - grant.free_blocks - grant.cached_blocks
        board.kv = (used, grant.cached_blocks, grant.total_blocks, grant.prefix_queries, grant.prefix_hits, grant.quarantined)
        outline.take(grant)
        denied: list[int] = refused
        if moves:
            self._beams.moved(outline, moves, grant.forked[: len(moves)])
        if forks:
            self._take_forks(outline, forks, grant.forked[len(moves) :])
        if short.size:
            denied = refused + self._take_grants(outline, short, grant.granted[: short.size], reach)
        if entries:
            self._take_entries(outline, entries, grant, short.size)
        return denied

    def _ask_for_entries(self, ask: dict[str, Any], short: Index, reach: I32, entries: list[Entry]) -> None:
        board = self._board
        seqs, lens = [e.seqs[0].seq for e in entries], [e.tokens.size for e in entries]
        running = board.slots.count - len(board.slots.free) - (np.count_nonzero(board.slots.parked) if board.parked_live else 0)
        ask["keep_free"] = min(running, board.settings.num_blocks // 16)  # room to grow for those that run
        ask["lookup_seqs"] = i64(seqs)
        ask["lookup_incarnations"] = i32([e.request.incarnation for e in entries])
        ask["lookup_max"] = i32([self._lookup_max(e) for e in entries])
        ask["lookup_counts"] = i32([len(e.hashes) // HASH_BYTES for e in entries])
        ask["lookup_hashes"] = b"".join([e.hashes for e in entries])
        ask["lookup_roots"] = b"".join([e.request.root for e in entries])
        ask["lookup_again"] = u8([e.request.looked_up for e in entries])
        ask["reserve_seqs"] = np.concatenate([board.slots.seq[short], ask["lookup_seqs"]])
        ask["reserve_lens"] = np.concatenate([reach, i32(lens)])

    def _lookup_max(self, entry: Entry) -> int:
        board = self._board
        request = entry.request
        if not board.caching or request.tells_prompt:
            return 0
        if board.drafting is not None and board.drafting.computes_all(request.wish, entry.tokens.size):
            return 0
        return int(entry.tokens.size) - 1

    def _take_forks(self, outline: Outline, forks: list[int], granted: Column) -> None:
        board = self._board
        slots = board.slots
        board.rows = None  # a parked one may have been let in to fork
        board.again = True
        for slot, forked in zip(forks, granted.tolist(), strict=True):
            if forked:
                source = board.forking.pop(slot)
                board.held.add(int(slots.seq[slot]))
                slots.capacity[slot] = slots.whole(int(slots.prompt[slot]))
                slots.hashed[slot] = slots.hashed[source]
                slots.given[slot] = slots.prompt[slot] // board.block
                outline.forked.add(slot)
                if slots.solo[slot] and board.groups:  # a beam's, which is in the same steps as its source, or in none
                    outline.forked.add(source)
                else:
                    outline.sources.add(source)
            else:  # it holds nothing that waiting could save: it computes its prompt again, later
                outline.stalled.add(slot)
                self._release.preempt(slot)

    def _take_grants(self, outline: Outline, short: Index, granted: Column, reach: I32) -> list[int]:
        slots = self._board.slots
        if outline.stalled:
            left = ~np.isin(short, list(outline.stalled))
            short, granted, reach = short[left], granted[left], reach[left]
            outline.asked = outline.asked[left]
        if np.count_nonzero(granted) == granted.size:
            slots.hold(short, reach)
            outline.short = short
            return []
        had = granted != 0
        slots.hold(short[had], reach[had])
        denied: list[int] = short[~had].tolist()
        return denied

    def _take_entries(self, outline: Outline, entries: list[Entry], grant: KvGrant, offset: int) -> None:
        """Place what was granted; the rest goes on waiting."""
        board = self._board
        asked = missed = 0
        for entry, granted, cached in zip(entries, grant.granted[offset:].tolist(), grant.lookup_cached.tolist(), strict=True):
            if granted:
                asked += entry.tokens.size
                missed += entry.tokens.size - cached
                self._start(outline, entry, cached)
            elif cached >= 0 and not outline.full:  # not merely deferred
                board.waiting.note_cached(entry, cached)
                outline.full = board.blocked = True
                self._unblock(outline, entry)
        if asked:
            board.uncached = missed / asked

    def _start(self, outline: Outline, entry: Entry, cached: int) -> None:
        board = self._board
        slots, request, sequences = board.slots, entry.request, entry.seqs
        board.waiting.remove(entry)
        lead = sequences[0]
        slot = slots.enter(lead, entry.tokens, cached, PREFILL)
        slots.capacity[slot] = slots.whole(entry.tokens.size)
        slots.hashed[slot] = cached // board.block
        slots.given[slot] = len(entry.hashes) // HASH_BYTES
        outline.place(slot, lead, entry.tokens)
        if board.drafting is not None:
            board.drafting.enters(outline, slot, request.wish)
        board.held.add(lead.seq)
        board.prefilling.append(slot)
        board.prompt_cached += cached
        request.looked_up = True
        for sequence in sequences:
            if not sequence.started:
                sequence.started = True
                outline.started.append((sequence.seq, cached))
        lead.attached = sequences[1:]
        for other in lead.attached:
            other.lead = lead
        self._line.take_chunk(outline, slot)

    def more(self, outline: Outline, entries: list[Entry], room: int) -> Planning:
        """Cache hits left budget: ask for more."""
        for _ in range(_MAX_ROUNDS - 1):
            room = self._line.room()
            if outline.full or self._board.blocked or not entries or outline.budget <= 0 or room <= 0:
                return
            asked = self._line.next_entries(entries, outline, room)
            if asked:
                yield from self.ask(outline, NOBODY, asked)

    def _unblock(self, outline: Outline, entry: Entry) -> None:
        """The first in line does not fit. Parked sequences make room; where nothing else holds memory it never will fit."""
        board = self._board
        if self._release.evict_parked(outline):
            return
        if len(board.slots.free) == board.slots.count and not board.releases:
            used, _cached, total, _queries, _hits, quarantined = board.kv
            need = board.slots.whole(entry.tokens.size) // board.block
            error = f"The sequence needs {need} KV blocks, but only {total - used} of {total} can be had ({quarantined} quarantined)."
            board.failures += [(s, error) for s in entry.seqs]

    def relieve(self, outline: Outline, denied: list[int]) -> Planning:
        """Memory ran out for `denied`: preempt until they have what they need, or let them sit this step out."""
        board = self._board
        outline.short = NOBODY
        slots = board.slots
        while denied:
            if any(slots.last_step[slot] > board.done_step for slot in board.leaving):
                break  # blocks are on their way back
            order = self._release.victims((slots.phase == PREFILL) | (slots.phase == DECODE))
            if order and not slots.parked[order[-1]]:
                kept = self._family(order[-1])  # the oldest always goes on
                order = [slot for slot in order if slot not in kept]
            busy = outline.forked | outline.sources
            victim = next((slot for slot in order if busy.isdisjoint(self._family(slot))), None)
            if victim is None:
                alone = self._family(denied[0])
                if alone.issuperset(denied) and len(slots.free) == slots.count - len(alone) and not outline.forked:
                    holders = [holder for slot in alone if (holder := slots.holder[slot]) is not None]
                    board.failures += [(holder, "The KV cache is exhausted by this sequence alone.") for holder in holders]
                break
            gone = self._family(victim)
            if not self._release.preempt(victim):
                break
            board.blocked = True  # what it gave is not for those who wait
            denied = [slot for slot in denied if slot not in gone]
            if denied:
                denied = yield from self.ask(outline, np.array(denied, np.intp), [])
        outline.stalled.update(denied)

    def _family(self, slot: int) -> set[int]:
        """The slot, with those of all beams of its group."""
        holder = self._board.slots.holder[slot]
        return {slot} if holder is None or holder.request.group is None else set(holder.request.group.slots())

    def drop_stalled(self, outline: Outline) -> None:
        """After a want of memory: only rows that are still running and have what they need."""
        board = self._board
        phase = board.slots.phase
        board.rows = None
        for group in board.groups.values():
            if not outline.stalled.isdisjoint(group.slots()):
                outline.stalled.update(group.slots())
        outline.chunks = [c for c in outline.chunks if phase[c[0]] == PREFILL]
        if outline.rows is not None:
            fine = [slot for slot in outline.rows.slots.tolist() if phase[slot] == DECODE and slot not in outline.stalled]
            narrow = outline.rows.tokens == outline.rows.slots.size or outline.forked  # there may be no blocks for drafts
            outline.rows = board.slots.gather(i32(fine)) if fine else None
            if narrow or not fine:
                board.slots.narrow(outline.rows)
