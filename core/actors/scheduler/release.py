"""How sequences leave their slots.

What it is: the end of a sequence, preemption (it waits again with what was received), and whose turn it is to leave: when memory runs out, or when
its client has been slow for too long. A slot and its blocks return when no step in flight names them any more.
What it does not know: budgets, KV's answers, messages.
"""

from __future__ import annotations

import itertools

import numpy as np

from penstock.core.actors.scheduler.board import Board
from penstock.core.actors.scheduler.outline import Outline
from penstock.core.actors.scheduler.slots import DECODE, ENDED, LEAVING, PREFILL
from penstock.core.actors.scheduler.waiting import Entry, Sequence
from penstock.core.contract.policy import Running
from penstock.core.protocol.columns import Column, i32, i64
from penstock.core.protocol.hashing import HASH_BYTES, chain


class Release:
    def __init__(self, board: Board) -> None:
        self._board = board

    def enqueue(self, seqs: list[Sequence]) -> None:
        """Into the waiting room; several sequences only if none has outputs."""
        board = self._board
        request, outputs = seqs[0].request, seqs[0].outputs
        tokens, hashes = request.prompt, request.hashes
        if outputs.size:
            tokens = np.concatenate([request.prompt, outputs])
            if board.caching:  # continue the prompt's chain over the blocks that outputs complete
                have = len(hashes) // HASH_BYTES
                hashes += chain(hashes[-HASH_BYTES:] or request.root, tokens[have * board.block :], board.block)
        board.waiting.add(Entry(seqs, tokens, hashes))
        board.blocked = False

    def end(self, sequence: Sequence) -> None:
        """The sequence is over: from now on it is nobody's business but the device's."""
        board = self._board
        request = sequence.request
        del board.live[sequence.seq]
        request.live -= 1
        if board.forecast is not None and request.stop_ids and sequence.slot >= 0 and board.slots.known[sequence.slot] < request.limit:
            board.forecast.stopped()
        board.parked_live -= request.parked
        board.wishes -= request.wish != 0
        if request.grammar:
            board.obeying -= 1
            board.closed.append((sequence.seq, request.incarnation))
            board.given_up.pop(board.closed[-1], None)
        if not request.live and board.requests.get(request.key) is request:
            del board.requests[request.key]
            board.parks.pop(request.key, None)
        if request.group is not None and board.groups.get(request.key) is request.group:
            del board.groups[request.key]
        if sequence.entry is not None:
            board.waiting.drop(sequence)
            board.blocked = False
        elif sequence.lead is not None:
            sequence.lead.attached.remove(sequence)
            sequence.lead = None
        else:
            slot, phase = sequence.slot, board.slots.phase
            others, sequence.attached = sequence.attached, []
            if others:
                self.enqueue(others)
            if phase[slot] == PREFILL:
                board.prefilling.remove(slot)
            if phase[slot] != LEAVING:
                board.leaving.append(slot)
            phase[slot] = ENDED
            board.rows = None
            board.forking.pop(slot, None)
            self.settle()

    def settle(self) -> None:
        """Free the slots of sequences that no step in flight names any more."""
        board = self._board
        if not board.leaving:
            return
        sources = set(board.forking.values())
        stay: list[int] = []
        for slot in board.leaving:
            if board.slots.last_step[slot] > board.done_step or slot in sources:
                stay.append(slot)
            elif board.slots.phase[slot] == ENDED:
                self._free(slot)
            else:
                self.requeue(slot)
        board.leaving = stay

    def _free(self, slot: int) -> None:
        """The slot and its blocks return; completed blocks stay in the prefix cache."""
        board = self._board
        slots = board.slots
        seq = int(slots.seq[slot])
        if slots.shown[slot] and board.drafting is not None:
            board.drafting.host.ended.append(seq)
        if slots.capacity[slot] > 0:
            self.commit([slot])
            board.releases.append((seq, int(slots.incarnation[slot]), int(slots.poisoned[slot])))
        board.held.discard(seq)
        if board.carried:
            board.carried = [(s[m], i[m], b[m]) for s, i, b in board.carried for m in (s != seq,)]
        slots.leave(slot)
        board.rows = None
        board.blocked = False

    def preempt(self, slot: int) -> bool:
        """The sequence (with all beams of its group) has to wait again: now (True), or as soon as no step in flight names it."""
        board = self._board
        holder = board.slots.holder[slot]
        if holder is not None and holder.request.group is not None:
            beams = holder.request.group.slots()
            for one in beams:
                board.forking.pop(one, None)
            done = [self._preempt(one) for one in beams]  # each of them, whatever the first says
            return all(done)
        return self._preempt(slot)

    def _preempt(self, slot: int) -> bool:
        board = self._board
        if board.slots.last_step[slot] <= board.done_step:
            self.requeue(slot)
            return True
        if board.slots.phase[slot] == PREFILL:
            board.prefilling.remove(slot)
        board.slots.phase[slot] = LEAVING
        board.leaving.append(slot)
        return False

    def requeue(self, slot: int) -> None:
        """A preempted sequence that no step in flight names waits again, with what was received."""
        board = self._board
        sequence = board.slots.holder[slot]
        assert sequence is not None
        group = sequence.request.group
        if group is None:
            sequence.outputs = board.slots.outputs(slot)
            if board.drafting is not None:
                sequence.drafts = board.drafting.tally.had(slot)
        others, sequence.attached = sequence.attached, []
        if board.slots.phase[slot] == PREFILL:
            board.prefilling.remove(slot)
        board.forking.pop(slot, None)
        self._free(slot)
        board.again = True
        if group is not None:
            group.home += [sequence, *others]
            if len(group.home) < len(group.members):
                return
            group.reset()
            if group.grammar:
                board.anew.append(group)
            sequence = group.members[0]
            others = group.members[1:]
        self.enqueue([sequence, *others])
        board.preemptions += 1
        board.preempted.append(sequence.seq)

    def commit(self, slots: list[int]) -> None:
        """Note the blocks of these slots that are complete, for the prefix cache."""
        board = self._board
        if board.caching:
            board.commits += [commit for slot in slots if (commit := board.slots.complete(slot)) is not None]

    def victims(self, able: Column) -> list[int]:
        """Slots that may be preempted (of the mask `able`), first victim first: parked ones, then by the policy; the last is the oldest."""
        board = self._board
        slots = board.slots
        for slot in board.forking.values():
            able[slot] = False
        found = np.flatnonzero(able)
        if not found.size:
            return []
        holders = [h for s in found.tolist() if (h := slots.holder[s]) is not None]
        arrival = i64([h.request.arrival_ns for h in holders])
        keys = board.policy.victims(
            Running(
                arrival_ns=arrival,
                priority=i32([h.request.priority for h in holders]),
                computed_tokens=slots.computed[found],
                output_tokens=slots.length[found] - slots.prompt[found],
                blocks=slots.capacity[found] // board.block,
            )
        )
        order = np.lexsort((slots.seq[found], arrival, keys, slots.parked[found]))[::-1]
        listed: list[int] = found[order].tolist()
        return listed

    def evict_parked(self, outline: Outline) -> bool:
        """Preempt one parked sequence that no step names, neither in flight nor in the making."""
        board = self._board
        if not board.parked_live:
            return False
        named = set(outline.sources)
        if outline.rows is not None:
            named.update(outline.rows.slots.tolist())
        idle = board.slots.last_step <= board.done_step
        order = [s for s in self.victims(board.slots.parked & idle & (board.slots.phase == DECODE)) if s not in named]
        if order:
            self.requeue(order[0])
        return bool(order)

    def note_parked(self, key: int, parked: bool) -> None:
        board = self._board
        if parked:
            board.parks[key] = board.clock.now_ns() + round(board.settings.park_kv_s * 1e9)
        else:
            board.parks.pop(key, None)

    def give_up_parked(self, now_ns: int) -> None:
        """Requests that have been parked for long enough leave their slots, as if they were preempted; most of their blocks can be had from the prefix
        cache for a while. What cannot leave yet, since others fork from it, is tried again in the next plan."""
        board = self._board
        parks = board.parks
        for key in list(itertools.takewhile(lambda key: parks[key] <= now_ns, parks)):
            request = board.requests[key]
            slots = [slot for slot, sequence in enumerate(board.slots.holder) if sequence is not None and sequence.request is request]
            running = [slot for slot in slots if board.slots.phase[slot] in (PREFILL, DECODE)]
            for slot in sorted(running, key=lambda slot: slot not in board.forking):  # first those that the others must stay for
                if slot not in board.forking.values():
                    self._preempt(slot)
            board.rows = None
            if all(board.slots.phase[slot] not in (PREFILL, DECODE) for slot in running):
                del parks[key]
