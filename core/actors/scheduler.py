"""The scheduler: what the device computes next, and what became of it.

What it is: a pure state machine (messages in, messages out, time from a Clock) for continuous batching under a token budget: every step
takes one token of each running sequence first, then chunks of prompts that are being computed, then new ones in the policy's order.
It plans from upper bounds as many steps ahead as the device allows: a token's value is unknown until its StepDone, a sequence that turns
out to have stopped still runs in the steps already in flight, and what they draw for it is dropped. Memory that runs out is answered
by preemption with recomputation (never the oldest sequence); what was received stays and is never drawn again.
What it does not know: block ids' contents, texts, loops, sockets, who listens.

Running sequences live in columns indexed by device slot; a step in which nothing starts, ends or crosses a block boundary runs no Python
loop over sequences. Longer than 400 lines, because it is one state machine and reads best in one place; the waiting side is in waiting.py.
Iteration-level scheduling: Orca (Yu et al., 2022); chunked prefill beside decodes: Sarathi-Serve (Agrawal et al., 2024).
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Generator, Iterable
from typing import Any

import msgspec
import numpy as np

from penstock.core.actor import Ask, Out
from penstock.core.actors.waiting import Entry, Request, Sequence, WaitingRoom
from penstock.core.clock import Clock
from penstock.core.columns import EMPTY_I32, EMPTY_I64, I32, I64, U8, Column, i32, i64, u8
from penstock.core.errors import ProtocolError
from penstock.core.hashing import HASH_BYTES, chain
from penstock.core.messages import (
    ABORTED,
    FAILED,
    LENGTH,
    STOP,
    Abort,
    Admit,
    DeviceLost,
    Drain,
    Drained,
    EngineStats,
    Forward,
    KvGrant,
    KvStep,
    LogprobColumns,
    Message,
    Park,
    PeerDown,
    Plan,
    Sample,
    SlotSampling,
    StepDone,
    StepTokens,
    Unpark,
    seq_of,
)
from penstock.core.policy import Running, SchedulePolicy

FREE, PREFILL, DECODE, LEAVING, ENDED = 0, 1, 2, 3, 4
"""Phases of a slot. LEAVING: preempted, waits for its last step in flight (whose token counts). ENDED: the same, but tokens are dropped."""

_MAX_ROUNDS = 4
"""Look-ups with different cache hits may leave budget: so often KV is asked again within one plan."""

Planning = Generator[Out, Any, None]


class SchedulerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Lengths in tokens. `depth` is the number of steps that may be in flight; `vocab` bounds prompt ids."""

    engine: int
    epoch: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    num_blocks: int
    depth: int = 1
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = True
    vocab: int = 2**31 - 1


class _Rows:
    """Columns of sequences that sample in a step, gathered once; `starts` are the positions that they compute."""

    __slots__ = ("incarnations", "left", "mins", "prompts", "room", "seqs", "slots", "starts", "stops")

    slots: I32
    starts: I32
    seqs: I64
    incarnations: I32
    prompts: I32
    mins: I32
    stops: Column
    room: int
    left: int


class _Flight:
    """A step on its way. Row i samples position `positions[i]` of `slots[i]`. `capped`: some row reaches its limit."""

    __slots__ = ("capped", "offsets", "positions", "prompt_requests", "prompt_seqs", "rows", "started", "step", "tokens")

    def __init__(self, step: int, rows: _Rows, positions: I32, offsets: I32, capped: bool, tokens: int) -> None:
        self.step = step
        self.rows = rows
        self.positions = positions
        self.offsets = offsets
        self.capped = capped
        self.tokens = tokens
        self.started: list[tuple[int, int]] = []
        self.prompt_seqs: list[int] = []
        self.prompt_requests: list[Request] = []


class _Draft:
    """A plan in the making."""

    __slots__ = (
        "blocks",
        "budget",
        "chunks",
        "copies",
        "decodes",
        "forked",
        "full",
        "places",
        "prefill_turn",
        "samplings",
        "sources",
        "stalled",
        "started",
    )

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.decodes: I32 = EMPTY_I32
        self.chunks: list[tuple[int, int, int]] = []
        """(slot, start, count)"""
        self.blocks: list[tuple[Column, Column, Column]] = []
        self.copies: list[tuple[Column, Column]] = []
        self.places: list[tuple[int, I32]] = []
        self.samplings: list[SlotSampling] = []
        self.started: list[tuple[int, int]] = []
        self.forked: set[int] = set()
        self.sources: set[int] = set()
        """Slots whose blocks this step copies."""
        self.stalled: set[int] = set()
        self.prefill_turn = False
        self.full = False


class Scheduler:
    """See the module. One StepTokens follows each StepDone; aborted or failed sequences that no step names get one of their own."""

    name = "scheduler"
    takes: frozenset[type[Message]] = frozenset({Admit, Abort, Park, Unpark, KvGrant, StepDone, DeviceLost, Drain, PeerDown, Plan})
    gives: frozenset[type[Message]] = frozenset({Plan, KvStep, Forward, Sample, StepTokens, Drained})

    def __init__(self, settings: SchedulerSettings, policy: SchedulePolicy, clock: Clock) -> None:
        if min(settings.max_num_seqs, settings.max_num_batched_tokens, settings.max_model_len, settings.depth) < 1:
            raise ValueError("max_num_seqs, max_num_batched_tokens, max_model_len and depth must be at least 1")
        self.settings = settings
        self._policy = policy
        self._clock = clock
        slots = settings.max_num_seqs
        self._block = settings.block_size
        self._longest = min(settings.max_model_len, settings.num_blocks * settings.block_size)
        # --- running sequences, by slot
        self._phase: U8 = np.zeros(slots, np.uint8)
        self._seq: I64 = np.zeros(slots, np.int64)
        self._incarnation: I32 = np.zeros(slots, np.int32)
        self._prompt: I32 = np.zeros(slots, np.int32)
        self._computed: I32 = np.zeros(slots, np.int32)
        """Positions whose Forward was given to the device."""
        self._length: I32 = np.zeros(slots, np.int32)
        """Tokens, those being drawn included."""
        self._known: I32 = np.zeros(slots, np.int32)
        """Tokens whose values are known here: history[slot, :known]."""
        self._limit: I32 = np.zeros(slots, np.int32)
        self._capacity: I32 = np.zeros(slots, np.int32)
        """Tokens for which blocks are held."""
        self._hashed: I32 = np.zeros(slots, np.int32)
        """Blocks committed to the prefix cache."""
        self._given: I32 = np.zeros(slots, np.int32)
        """Blocks whose hashes KV got with the look-up."""
        self._last_step: I64 = np.zeros(slots, np.int64)
        self._min_tokens: I32 = np.zeros(slots, np.int32)
        self._stops: I32 = np.full((slots, 4), -1, np.int32)
        self._parked = np.zeros(slots, bool)
        self._poisoned = np.zeros(slots, bool)
        self._history: I32 = np.zeros((slots, self._longest), np.int32)
        self._holder: list[Sequence | None] = [None] * slots
        self._free_slots = list(range(slots))
        self._prefilling: list[int] = []
        """Slots in PREFILL, first admitted first."""
        self._forking: dict[int, int] = {}
        """Slot of a choice that has no blocks yet -> slot whose prompt blocks it will share."""
        self._leaving: list[int] = []
        """Slots in LEAVING or ENDED."""
        self._rows: _Rows | None = None
        """The decoding cohort; None when it must be gathered anew."""
        # --- waiting
        self._requests: dict[int, Request] = {}
        self._live: dict[int, Sequence] = {}
        """Every sequence that has not ended, by seq."""
        self._held: set[int] = set()
        """Sequences whose blocks were not released yet, ended ones included."""
        self._waiting = WaitingRoom(policy)
        self._blocked = False
        """The first in line did not fit; nothing has been released since."""
        self._uncached = 1.0
        """Share of the last admitted prompts that had to be computed: how many look-ups are worth a try."""
        # --- for the next KvStep
        self._releases: list[tuple[int, int, int]] = []
        self._commits: list[tuple[int, int, I32]] = []
        self._commit_due = False
        self._carried: list[tuple[Column, Column, Column]] = []
        # --- steps
        self.step = 0
        self.done_step = 0
        self._flights: deque[_Flight] = deque()
        self._plan_queued = False
        self._again = False
        """Something happened while planning that makes another try worthwhile."""
        self._prefill_turn = False
        """A prompt that must be computed whole did not fit beside the decodes: it goes first."""
        self._failures: list[tuple[Sequence, str]] = []
        self._parked_live = 0
        self._draining = False
        self._drained = False
        self._lost = False
        # --- counters
        self._preempted: list[int] = []
        self._preemptions = 0
        self._prompt_computed = 0
        self._prompt_cached = 0
        self._kv = (0, 0, settings.num_blocks, 0, 0, 0)
        """used, cached, total blocks; prefix queries, hits; quarantined: from the last grant."""
        self.stale = 0
        """Messages of another epoch or out of order, dropped."""
        self._ones: I32 = np.ones(slots, np.int32)
        self._ones.flags.writeable = False
        self._range: I32 = np.arange(slots, dtype=np.int32)
        self._range.flags.writeable = False

    # ============================================================== messages

    def handle(self, message: Message) -> Iterable[Out]:
        if type(message) is Plan:
            return self._plan()
        if type(message) is StepDone:
            return self._step_done(message)
        if type(message) is Admit:
            return self._admit(message)
        if type(message) is Abort:
            return self._abort(message)
        if type(message) is Park:
            return self._park(message.key, True)
        if type(message) is Unpark:
            return self._park(message.key, False)
        if type(message) is Drain:
            self._draining = True
            return self._wake()
        if type(message) is PeerDown and message.role == "text":  # text is gone, and with it everybody who waits for these tokens
            return self._abort(Abort(seqs=i64(list(self._live))))
        if type(message) is PeerDown:
            return ()
        if type(message) is DeviceLost:
            self._lost = self._lost or message.epoch == self.settings.epoch
            return ()
        raise TypeError(f"the scheduler does not take {type(message).__name__}")

    def _wake(self) -> Iterable[Out]:
        """Plan once all queued messages were handled."""
        if not self._plan_queued and not self._lost:
            self._plan_queued = True
            return (Plan(),)
        return ()

    # -------------------------------------------------------------- admission, cancellation, parking

    def _admit(self, admit: Admit) -> Iterable[Out]:
        old = self._requests.get(admit.key)
        if old is not None and old.incarnation >= admit.incarnation:
            self.stale += 1  # said twice
            return
        if old is not None:  # a later life of the same request: the earlier one ends without a word
            for sequence in [s for s in self._live.values() if s.request is old]:
                self._end(sequence)
        choices = admit.choices.tolist()
        error = self._refusal(admit)
        limit = min(admit.prompt.size + admit.max_tokens, self._longest)
        usable = admit.prompt.size // self._block * HASH_BYTES if self.settings.enable_prefix_caching else 0
        request = Request(admit, self._clock.now_ns(), limit, admit.hashes[:usable])
        if error is None and limit <= request.prompt_len:
            error = f"The prompt of {request.prompt_len} tokens leaves no room to answer within {self._longest} tokens."
        if error is not None:
            rows = [(seq_of(admit.key, c), admit.incarnation, 0, FAILED) for c in choices]
            yield self._report(rows, [error] * len(rows))
            return
        self._requests[admit.key] = request
        fresh: list[Sequence] = []
        over: list[tuple[int, int, int, int]] = []
        at = 0
        counts = admit.output_counts.tolist() or [0] * len(choices)
        for choice, count in zip(choices, counts, strict=True):
            sequence = Sequence(request, choice, admit.outputs[at : at + count])
            at += count
            if request.prompt_len + count >= limit:
                over.append((sequence.seq, request.incarnation, count, LENGTH))
                continue
            self._live[sequence.seq] = sequence
            request.live += 1
            if count:
                request.prompt_logprobs_next = request.prompt_len  # they came with or before the first token
                self._enqueue([sequence])
            else:
                fresh.append(sequence)
        if fresh:
            self._enqueue(fresh)
        if not request.live:
            del self._requests[request.key]
        if over:
            yield self._report(over)
        yield from self._wake()

    def _refusal(self, admit: Admit) -> str | None:
        """Why this request can never run here."""
        settings = self.settings
        length = int(admit.prompt.size)
        if self._draining:
            return "The engine is draining and takes nothing new."
        if length == 0:
            return "The prompt has no tokens."
        if length >= settings.max_model_len:
            return f"The prompt has {length} tokens; the engine's context is {settings.max_model_len}."
        if length >= self._longest:
            return f"The prompt has {length} tokens; the KV cache of {settings.num_blocks} blocks holds {self._longest}."
        if not settings.enable_chunked_prefill and length > settings.max_num_batched_tokens:
            return f"The prompt has {length} tokens; without chunked prefill a step takes {settings.max_num_batched_tokens}."
        if int(admit.prompt.min()) < 0 or int(admit.prompt.max()) >= settings.vocab:
            return f"The prompt holds a token id outside 0..{settings.vocab - 1}."
        if admit.prefill_only or admit.kv_handle or admit.adapter:
            return "Disaggregated prefill and adapters are not supported yet."
        return None

    def _enqueue(self, seqs: list[Sequence]) -> None:
        """Into the waiting room; several sequences only if none has outputs."""
        request, outputs = seqs[0].request, seqs[0].outputs
        tokens, hashes = request.prompt, request.hashes
        if outputs.size:
            tokens = np.concatenate([request.prompt, outputs])
            if self.settings.enable_prefix_caching:  # continue the prompt's chain over the blocks that outputs complete
                have = len(hashes) // HASH_BYTES
                hashes += chain(hashes[-HASH_BYTES:] or request.root, tokens[have * self._block :], self._block)
        self._waiting.add(Entry(seqs, tokens, hashes))
        self._blocked = False

    def _abort(self, message: Abort) -> Iterable[Out]:
        rows: list[tuple[int, int, int, int]] = []
        for seq in message.seqs.tolist():
            sequence = self._live.get(seq)
            if sequence is not None:
                rows.append((seq, sequence.request.incarnation, self._received(sequence), ABORTED))
                self._end(sequence)
        if rows:
            yield self._report(rows)
            yield from self._wake()

    def _park(self, key: int, parked: bool) -> Iterable[Out]:
        request = self._requests.get(key)
        if request is None or request.parked == parked:
            return ()
        request.parked = parked
        self._parked_live += request.live if parked else -request.live
        for slot, sequence in enumerate(self._holder):
            if sequence is not None and sequence.request is request:
                self._parked[slot] = parked
        self._rows = None
        self._blocked = False
        return self._wake()

    def _received(self, sequence: Sequence) -> int:
        """How many outputs were given to text."""
        if sequence.slot >= 0:
            return int(self._known[sequence.slot] - self._prompt[sequence.slot])
        return int(sequence.outputs.size)

    def _end(self, sequence: Sequence) -> None:
        """The sequence is over: from now on it is nobody's business but the device's."""
        request = sequence.request
        del self._live[sequence.seq]
        request.live -= 1
        self._parked_live -= request.parked
        if not request.live and self._requests.get(request.key) is request:
            del self._requests[request.key]
        if sequence.entry is not None:
            self._waiting.drop(sequence)
            self._blocked = False
        elif sequence.lead is not None:
            sequence.lead.attached.remove(sequence)
            sequence.lead = None
        else:
            slot = sequence.slot
            others, sequence.attached = sequence.attached, []
            if others:
                self._enqueue(others)
            if self._phase[slot] == PREFILL:
                self._prefilling.remove(slot)
            if self._phase[slot] not in (LEAVING, ENDED):
                self._leaving.append(slot)
            self._phase[slot] = ENDED
            self._rows = None
            self._forking.pop(slot, None)
            self._settle()

    def leftovers(self) -> dict[str, int]:
        """What an idle scheduler still holds: must be empty (for tests and post-mortems)."""
        counts = {
            "live": len(self._live),
            "held": len(self._held),
            "requests": len(self._requests),
            "waiting": len(self._waiting),
            "slots": self.settings.max_num_seqs - len(self._free_slots),
            "prefilling": len(self._prefilling),
            "forking": len(self._forking),
            "leaving": len(self._leaving),
            "releases": len(self._releases),
            "carried": len(self._carried),
            "flights": len(self._flights),
            "parked": self._parked_live,
        }
        return {name: count for name, count in counts.items() if count}

    # ============================================================== slots

    def _settle(self) -> None:
        """Free the slots of sequences that no step in flight names any more."""
        if not self._leaving:
            return
        sources = set(self._forking.values())
        stay: list[int] = []
        for slot in self._leaving:
            if self._last_step[slot] > self.done_step or slot in sources:
                stay.append(slot)
            elif self._phase[slot] == ENDED:
                self._free(slot)
            else:
                self._requeue(slot)
        self._leaving = stay

    def _free(self, slot: int) -> None:
        """The slot and its blocks return; completed blocks stay in the prefix cache."""
        seq = int(self._seq[slot])
        if self._capacity[slot] > 0:
            if not self._poisoned[slot]:
                self._commit(slot)
            self._releases.append((seq, int(self._incarnation[slot]), int(self._poisoned[slot])))
        self._held.discard(seq)
        if self._carried:
            self._carried = [(s[m], i[m], b[m]) for s, i, b in self._carried for m in (s != seq,)]
        sequence = self._holder[slot]
        if sequence is not None:
            sequence.slot = -1
        self._holder[slot] = None
        self._phase[slot] = FREE
        for column in (self._computed, self._known, self._length, self._limit, self._capacity, self._hashed, self._given):
            column[slot] = 0
        self._parked[slot] = False
        self._poisoned[slot] = False
        heapq.heappush(self._free_slots, slot)
        self._rows = None
        self._blocked = False

    def _preempt(self, slot: int) -> bool:
        """The sequence has to wait again: now (True), or as soon as no step in flight names it."""
        if self._last_step[slot] <= self.done_step:
            self._requeue(slot)
            return True
        if self._phase[slot] == PREFILL:
            self._prefilling.remove(slot)
        self._phase[slot] = LEAVING
        self._leaving.append(slot)
        return False

    def _requeue(self, slot: int) -> None:
        """Preempt a sequence that no step in flight names: it waits again, with what was received."""
        sequence = self._holder[slot]
        assert sequence is not None
        prompt, known = int(self._prompt[slot]), int(self._known[slot])
        sequence.outputs = self._history[slot, prompt:known].copy()
        others, sequence.attached = sequence.attached, []
        if self._phase[slot] == PREFILL:
            self._prefilling.remove(slot)
        self._forking.pop(slot, None)
        self._free(slot)
        self._enqueue([sequence, *others])
        self._again = True
        self._preemptions += 1
        self._preempted.append(sequence.seq)

    def _commit(self, slot: int) -> None:
        """Note the blocks that are complete: computed (or given to the device) and of known tokens."""
        if not self.settings.enable_prefix_caching:
            return
        valid = min(int(self._computed[slot]), int(self._known[slot]))
        full, hashed = valid // self._block, int(self._hashed[slot])
        if full > hashed and self._capacity[slot] > 0:
            first = max(hashed, int(self._given[slot]))
            self._commits.append((int(self._seq[slot]), valid, self._history[slot, first * self._block : full * self._block].copy()))
            self._hashed[slot] = full

    def _occupy(self, slot: int, sequence: Sequence, tokens: I32, computed: int, draft: _Draft) -> None:
        """A sequence enters a slot, here and (with the next Forward and Sample) on the device."""
        request = sequence.request
        sequence.slot = slot
        self._holder[slot] = sequence
        self._seq[slot] = sequence.seq
        self._incarnation[slot] = request.incarnation
        self._prompt[slot] = request.prompt_len
        self._history[slot, : tokens.size] = tokens
        self._known[slot] = self._length[slot] = tokens.size
        self._computed[slot] = computed
        self._limit[slot] = request.limit
        self._min_tokens[slot] = request.params.min_tokens
        self._parked[slot] = request.parked
        stops = request.stop_ids
        if len(stops) > self._stops.shape[1]:
            wider = np.full((self._stops.shape[0], len(stops)), -1, np.int32)
            wider[:, : self._stops.shape[1]] = self._stops
            self._stops = wider
        self._stops[slot] = -1
        self._stops[slot, : len(stops)] = stops
        draft.places.append((slot, tokens))
        draft.samplings.append(
            SlotSampling(
                slot=slot, choice=sequence.choice, prompt_len=request.prompt_len, params=request.params, stop_ids=request.banned_ids
            )
        )

    # ============================================================== planning

    def _plan(self) -> Planning:
        self._plan_queued = False
        if self._lost:
            return
        while len(self._flights) < self.settings.depth:
            self._again = False
            made = yield from self._plan_step()
            if self._failures:
                yield from self._fail()
            elif not made and not self._again:
                break
            self._settle()
        if self._releases and not self._flights:  # nothing to compute, but something to give back
            yield from self._ask(_Draft(0), [], [])
        if self._draining and not self._drained and not self._live and not self._flights:
            self._drained = True
            yield Drained(role="engine", id=self.settings.engine)

    def _fail(self) -> Iterable[Out]:
        failures, self._failures = self._failures, []
        rows = [(s.seq, s.request.incarnation, self._received(s), FAILED) for s, _ in failures]
        for sequence, _ in failures:
            self._end(sequence)
        yield self._report(rows, [error for _, error in failures])

    def _plan_step(self) -> Generator[Out, Any, bool]:
        """Plan one step; False if there is nothing to compute now."""
        draft = _Draft(self.settings.max_num_batched_tokens)
        rows = self._select_decodes(draft)
        self._select_chunks(draft)
        entries, room = self._line(draft)
        asked = self._next_entries(entries, draft.budget, room)
        short: list[int] = []
        if rows is not None and rows.room <= 0:
            short = draft.decodes[self._capacity[draft.decodes] <= self._computed[draft.decodes]].tolist()
        if short or asked or self._releases or self._commits or self._commit_due:
            denied = yield from self._ask(draft, short, asked)
            if denied or draft.stalled:
                yield from self._relieve(draft, denied)
                rows = self._still_decoding(draft)
            else:
                if short and rows is not None:
                    rows.room = int((self._capacity[rows.slots] - rows.starts).min())
                if asked:
                    yield from self._more(draft, entries, room)
        if rows is None and not draft.chunks:
            assert not draft.places
            assert not draft.copies
            self._carried += draft.blocks
            return False
        yield from self._launch(draft, rows)
        return True

    def _still_decoding(self, draft: _Draft) -> _Rows | None:
        """After preemptions: the rows that are left."""
        fine = self._phase[draft.decodes] == DECODE
        for slot in draft.stalled:
            fine &= draft.decodes != slot
        draft.decodes = draft.decodes[fine]
        draft.chunks = [c for c in draft.chunks if self._phase[c[0]] == PREFILL]
        self._rows = None
        return self._gather(draft.decodes) if draft.decodes.size else None

    # -------------------------------------------------------------- who

    def _gather(self, slots: I32) -> _Rows:
        rows = _Rows()
        rows.slots = slots
        rows.starts = self._computed[slots]
        rows.seqs = self._seq[slots]
        rows.incarnations = self._incarnation[slots]
        rows.prompts = self._prompt[slots]
        rows.mins = self._min_tokens[slots]
        rows.stops = self._stops[slots]
        rows.room = int((self._capacity[slots] - rows.starts).min(initial=1 << 30))
        rows.left = int((self._limit[slots] - self._length[slots]).min(initial=1 << 30))
        return rows

    def _select_decodes(self, draft: _Draft) -> _Rows | None:
        """Sequences that take one token, as far as the budget goes."""
        rows = self._rows
        if rows is None:
            ready = (self._phase == DECODE) & (self._length < self._limit)
            parked = self._parked & ready
            if parked.any():
                for slot in self._forking:  # finishes its fork first, so that the other's blocks are not held for it
                    parked[slot] = False
                ready &= ~parked
            rows = self._rows = self._gather(np.flatnonzero(ready).astype(np.int32))
        draft.decodes = rows.slots
        most = draft.budget
        if self._prefill_turn and self._prefilling:
            head = self._prefilling[0]
            most -= min(most, int(self._length[head] - self._computed[head]))
        if rows.slots.size > most:  # those that waited longest
            order = np.argsort(self._last_step[rows.slots], kind="stable")[:most]
            draft.decodes = rows.slots[np.sort(order)]
            rows = self._gather(draft.decodes)
            self._rows = None
        draft.budget -= draft.decodes.size
        return rows if rows.slots.size else None

    def _select_chunks(self, draft: _Draft) -> None:
        """Prompts that are being computed, first admitted first."""
        draft.prefill_turn, self._prefill_turn = self._prefill_turn, False
        for slot in self._prefilling:
            if not self._take_chunk(draft, slot):
                break

    def _take_chunk(self, draft: _Draft, slot: int) -> bool:
        start = int(self._computed[slot])
        left = int(self._length[slot]) - start
        count = min(left, draft.budget)
        if count < left and not self.settings.enable_chunked_prefill and left <= self.settings.max_num_batched_tokens:
            self._prefill_turn = not draft.prefill_turn  # whole or not at all: next time it goes before the decodes
            return False
        if count <= 0:
            return False
        draft.chunks.append((slot, start, count))
        draft.budget -= count
        return True

    def _line(self, draft: _Draft) -> tuple[list[Entry], int]:
        """Who may be admitted now, in order, and for how many slots there is room."""
        if not len(self._waiting) or draft.budget <= 0 or (self._blocked and not self._parked.any()):
            return [], 0
        entries = [e for e in self._waiting.ordered(self._clock.now_ns()) if not e.request.parked]
        if not entries:
            return [], 0
        if not self._free_slots:
            self._evict_parked(draft)
        promised = sum(len(holder.attached) for slot in self._prefilling if (holder := self._holder[slot]) is not None)
        return entries, len(self._free_slots) - promised

    def _next_entries(self, entries: list[Entry], budget: int, room: int) -> list[Entry]:
        """Take from the head of the line what this step can probably start."""
        count, tokens = 0, 0.0
        taken: list[Entry] = []
        for entry in entries:
            if room <= 0 or tokens >= budget:
                break
            count += 1
            if entry.seqs[0].seq in self._held:  # an earlier life of it is still in flight
                continue
            room -= len(entry.seqs)
            tokens += max(1.0, entry.tokens.size * self._uncached)
            taken.append(entry)
        del entries[:count]
        return taken

    # -------------------------------------------------------------- memory

    def _ask(self, draft: _Draft, short: list[int], entries: list[Entry]) -> Generator[Out, Any, list[int]]:
        """One KvStep: what is pending, blocks for decoding slots, look-ups for entries (which are placed if granted). Gives the denied
        slots. What is asked for the decoding slots may include their fork."""
        step = self.step + 1
        if self._commit_due:
            self._commit_due = False
            due = np.minimum(self._computed, self._known) // self._block > self._hashed
            for slot in np.flatnonzero(due & (self._capacity > 0)).tolist():
                if not self._poisoned[slot]:
                    self._commit(slot)
        commits, self._commits = self._commits, []
        releases, self._releases = self._releases, []
        forks = [slot for slot in short if slot in self._forking] if self._forking else []
        ask: dict[str, Any] = {}
        if commits:
            ask["commit_seqs"] = i64([c[0] for c in commits])
            ask["commit_lens"] = i32([c[1] for c in commits])
            ask["commit_counts"] = i32([c[2].size for c in commits])
            ask["commit_tokens"] = np.concatenate([c[2] for c in commits])
        if releases:
            ask["release_seqs"] = i64([r[0] for r in releases])
            ask["release_incarnations"] = i32([r[1] for r in releases])
            ask["release_drop"] = u8([r[2] for r in releases])
        if forks:
            ask["fork_src"] = i64([self._seq[self._forking[slot]] for slot in forks])
            ask["fork_dst"] = self._seq[forks]
            ask["fork_lens"] = self._prompt[forks]
        if short or entries:
            ask["reserve_seqs"] = i64([int(self._seq[slot]) for slot in short] + [e.seqs[0].seq for e in entries])
            ask["reserve_lens"] = i32([int(self._computed[slot]) + 1 for slot in short] + [e.tokens.size for e in entries])
        if entries:
            running = self.settings.max_num_seqs - len(self._free_slots) - int(self._parked.sum())
            ask["keep_free"] = min(running, self.settings.num_blocks // 16)
            ask["lookup_seqs"] = i64([e.seqs[0].seq for e in entries])
            ask["lookup_incarnations"] = i32([e.request.incarnation for e in entries])
            ask["lookup_max"] = i32([self._lookup_max(e) for e in entries])
            ask["lookup_counts"] = i32([len(e.hashes) // HASH_BYTES for e in entries])
            ask["lookup_hashes"] = b"".join([e.hashes for e in entries])
            ask["lookup_roots"] = b"".join([e.request.root.ljust(HASH_BYTES, b"\0")[:HASH_BYTES] for e in entries])
            ask["lookup_again"] = u8([e.request.looked_up for e in entries])
        grant: KvGrant = yield Ask(KvStep(step=step, **ask), KvGrant)
        self._kv = (
            grant.total_blocks - grant.free_blocks - grant.cached_blocks,
            grant.cached_blocks,
            grant.total_blocks,
            grant.prefix_queries,
            grant.prefix_hits,
            grant.quarantined,
        )
        if grant.block_ids.size:
            draft.blocks.append((grant.block_seqs, grant.block_index, grant.block_ids))
        if grant.copy_dst.size:
            draft.copies.append((grant.copy_src, grant.copy_dst))
        denied = self._take_grants(draft, short, forks, grant) if short else []
        if entries:
            self._take_entries(draft, entries, grant, len(short))
        return denied

    def _lookup_max(self, entry: Entry) -> int:
        request = entry.request
        if not self.settings.enable_prefix_caching or request.prompt_logprobs_next < request.prompt_len:
            return 0
        return int(entry.tokens.size) - 1

    def _take_grants(self, draft: _Draft, short: list[int], forks: list[int], grant: KvGrant) -> list[int]:
        if forks:
            self._rows = None  # a parked one had been let in to fork
            self._again = True
        for slot, forked in zip(forks, grant.forked.tolist(), strict=True):
            if forked:
                source = self._forking.pop(slot)
                self._held.add(int(self._seq[slot]))
                self._capacity[slot] = -(-int(self._prompt[slot]) // self._block) * self._block
                self._hashed[slot] = self._hashed[source]
                self._given[slot] = self._prompt[slot] // self._block
                draft.forked.add(slot)
                draft.sources.add(source)
            else:  # it holds nothing that waiting could save: it computes its prompt again, later
                draft.stalled.add(slot)
                self._preempt(slot)
        denied: list[int] = []
        for slot, granted in zip(short, grant.granted.tolist(), strict=False):
            if slot in draft.stalled:
                continue
            if granted:
                self._capacity[slot] = max(int(self._capacity[slot]), -(-(int(self._computed[slot]) + 1) // self._block) * self._block)
            else:
                denied.append(slot)
        return denied

    def _take_entries(self, draft: _Draft, entries: list[Entry], grant: KvGrant, offset: int) -> None:
        """Place what was granted; the rest goes on waiting."""
        asked = missed = 0
        for entry, granted, cached in zip(entries, grant.granted[offset:].tolist(), grant.lookup_cached.tolist(), strict=True):
            if not granted:
                if cached >= 0 and not draft.full:
                    draft.full = self._blocked = True
                    self._unblock(draft, entry)
                continue
            asked += entry.tokens.size
            missed += entry.tokens.size - cached
            self._start(draft, entry, cached)
        if asked:
            self._uncached = missed / asked

    def _start(self, draft: _Draft, entry: Entry, cached: int) -> None:
        request, sequences = entry.request, entry.seqs
        self._waiting.remove(entry)
        lead = sequences[0]
        slot = heapq.heappop(self._free_slots)
        self._occupy(slot, lead, entry.tokens, cached, draft)
        self._phase[slot] = PREFILL
        self._capacity[slot] = -(-entry.tokens.size // self._block) * self._block
        self._hashed[slot] = cached // self._block
        self._given[slot] = len(entry.hashes) // HASH_BYTES
        self._held.add(lead.seq)
        self._prefilling.append(slot)
        self._prompt_cached += cached
        request.looked_up = True
        for sequence in sequences:
            if not sequence.started:
                sequence.started = True
                draft.started.append((sequence.seq, cached))
        lead.attached = sequences[1:]
        for other in lead.attached:
            other.lead = lead
        self._take_chunk(draft, slot)

    def _more(self, draft: _Draft, entries: list[Entry], room: int) -> Planning:
        """Cache hits left budget: ask for more."""
        for _ in range(_MAX_ROUNDS - 1):
            promised = sum(len(holder.attached) for slot in self._prefilling if (holder := self._holder[slot]) is not None)
            room = min(room, len(self._free_slots) - promised)
            if draft.full or not entries or draft.budget <= 0 or room <= 0:
                return
            yield from self._ask(draft, [], self._next_entries(entries, draft.budget, room))

    def _unblock(self, draft: _Draft, entry: Entry) -> None:
        """The first in line does not fit. Parked sequences make room; where nothing else holds memory it never will fit."""
        if self._evict_parked(draft):
            return
        if len(self._free_slots) == self.settings.max_num_seqs and not self._releases:
            used, _cached, total, _queries, _hits, quarantined = self._kv
            error = (
                f"The sequence needs {-(-entry.tokens.size // self._block)} KV blocks, but only "
                f"{total - used} of {total} can be had ({quarantined} quarantined)."
            )
            self._failures += [(s, error) for s in entry.seqs]

    def _evict_parked(self, draft: _Draft) -> bool:
        """Preempt one parked sequence that no step names, neither in flight nor in the making."""
        named = {*draft.decodes.tolist(), *draft.sources}
        order = [s for s in self._victims(only_parked=True) if self._last_step[s] <= self.done_step and s not in named]
        if order:
            self._requeue(order[0])
        return bool(order)

    def _victims(self, *, only_parked: bool = False) -> list[int]:
        """Slots that may be preempted, first victim first: parked ones, then by the policy; the last of them is the oldest."""
        able = (self._phase == PREFILL) | (self._phase == DECODE)
        for slot in self._forking.values():
            able[slot] = False
        if only_parked:
            able &= self._parked & (self._phase == DECODE)
        slots = np.flatnonzero(able)
        if not slots.size:
            return []
        holders = [h for s in slots.tolist() if (h := self._holder[s]) is not None]
        arrival = i64([h.request.arrival_ns for h in holders])
        keys = self._policy.victims(
            Running(
                arrival_ns=arrival,
                priority=i32([h.request.priority for h in holders]),
                computed_tokens=self._computed[slots],
                output_tokens=self._length[slots] - self._prompt[slots],
                blocks=self._capacity[slots] // self._block,
            )
        )
        order = np.lexsort((self._seq[slots], arrival, keys, self._parked[slots]))[::-1]
        found: list[int] = slots[order].tolist()
        return found

    def _relieve(self, draft: _Draft, denied: list[int]) -> Planning:
        """Memory ran out for `denied`: preempt until they have what they need, or let them sit this step out."""
        while denied:
            if any(self._last_step[slot] > self.done_step for slot in self._leaving):
                break  # blocks are on their way back
            order = self._victims()
            if order and not self._parked[order[-1]]:
                order.pop()  # the oldest always goes on
            victim = next((slot for slot in order if slot not in draft.forked and slot not in draft.sources), None)
            if victim is None:
                if len(denied) == 1 and len(self._free_slots) == self.settings.max_num_seqs - 1 and not draft.forked:
                    sequence = self._holder[denied[0]]
                    assert sequence is not None
                    self._failures.append((sequence, "The KV cache is exhausted by this sequence alone."))
                break
            if not self._preempt(victim):
                break
            self._blocked = True
            denied = [slot for slot in denied if slot != victim]
            if denied:
                denied = yield from self._ask(draft, denied, [])
        draft.stalled.update(denied)
        self._rows = None

    # -------------------------------------------------------------- launch

    def _launch(self, draft: _Draft, rows: _Rows | None) -> Planning:
        """Give the step to the device and remember what it was."""
        settings = self.settings
        self.step = step = self.step + 1
        columns: dict[str, Any] = {}
        extra: dict[str, Any] = {}
        if not draft.chunks and rows is not None:
            count = rows.slots.size
            slots, starts, counts = rows.slots, rows.starts, self._ones[:count]
            positions: I32 = starts + self._ones[:count]
            sample_rows, sample_slots = self._range[:count], slots
            num_decode = tokens = count
            self._computed[slots] = positions
            self._length[slots] = positions + 1
            self._last_step[slots] = step
            capped = rows.left <= 1
            rows.starts = positions
            rows.room -= 1
            rows.left -= 1
            if capped:
                self._rows = None
            flight = _Flight(step, rows, positions, positions - rows.prompts, capped, tokens)
        else:
            decodes = draft.decodes
            chunks = sorted(draft.chunks, key=lambda c: not self._is_last_token(c))
            num_decode = decodes.size + sum(map(self._is_last_token, chunks))
            slots = np.concatenate([decodes, i32([c[0] for c in chunks])])
            starts = np.concatenate([self._computed[decodes], i32([c[1] for c in chunks])])
            counts = np.concatenate([self._ones[: decodes.size], i32([c[2] for c in chunks])])
            self._computed[slots] = starts + counts
            self._length[decodes] += 1
            self._last_step[slots] = step
            finals: list[int] = []
            final_slots: list[int] = []
            prompt_rows: list[int] = []
            prompts: list[tuple[Sequence, int]] = []
            for row, chunk in enumerate(chunks, decodes.size):
                slot = chunk[0]
                holder = self._holder[slot]
                assert holder is not None
                if self._wants_prompt_logprobs(holder.request, chunk):
                    prompt_rows.append(row)
                    prompts.append((holder, holder.request.params.prompt_logprobs or 0))
                if chunk[1] + chunk[2] == self._length[slot]:
                    sharing = self._finish_prompt(slot, holder, draft)
                    finals += [row] * len(sharing)
                    final_slots += sharing
            sample_rows = np.concatenate([self._range[: decodes.size], i32(finals)])
            sample_slots = np.concatenate([decodes, i32(final_slots)])
            positions = self._length[sample_slots] - 1
            tokens = int(counts.sum())
            self._prompt_computed += tokens - decodes.size
            sampled = self._gather(sample_slots)
            flight = _Flight(step, sampled, positions, positions - sampled.prompts, sampled.left <= 0, tokens)
            flight.prompt_seqs = [s.seq for s, _ in prompts]
            flight.prompt_requests = [s.request for s, _ in prompts]
            if prompt_rows:
                extra["prompt_rows"] = i32(prompt_rows)
                extra["prompt_topk"] = i32([k for _, k in prompts])
            self._rows = None
            self._commit_due = settings.enable_prefix_caching
        if draft.places:
            flight.started = draft.started
            extra["places"] = draft.samplings
            columns["place_slots"] = i32([slot for slot, _ in draft.places])
            columns["place_counts"] = i32([t.size for _, t in draft.places])
            columns["place_tokens"] = np.concatenate([t for _, t in draft.places])
        if draft.copies:
            self._last_step[list(draft.sources)] = step
            columns["copy_src"] = np.concatenate([src for src, _ in draft.copies])
            columns["copy_dst"] = np.concatenate([dst for _, dst in draft.copies])
        if draft.blocks or self._carried:
            self._add_blocks(columns, self._carried + draft.blocks)
            self._carried = []
        self._flights.append(flight)
        yield Forward(
            engine=settings.engine,
            epoch=settings.epoch,
            step=step,
            slots=slots,
            starts=starts,
            counts=counts,
            num_decode=num_decode,
            **columns,
        )
        yield Sample(
            engine=settings.engine,
            epoch=settings.epoch,
            step=step,
            rows=sample_rows,
            slots=sample_slots,
            positions=positions,
            **extra,
        )

    def _is_last_token(self, chunk: tuple[int, int, int]) -> bool:
        return chunk[2] == 1 and chunk[1] + 1 == self._length[chunk[0]]

    def _wants_prompt_logprobs(self, request: Request, chunk: tuple[int, int, int]) -> bool:
        _slot, start, count = chunk
        first, last = start + 1, min(start + count, request.prompt_len - 1)
        return last >= first and last >= request.prompt_logprobs_next

    def _finish_prompt(self, slot: int, lead: Sequence, draft: _Draft) -> list[int]:
        """The last chunk is in this step: its row samples for the slot itself, and for as many of the other choices as find a slot."""
        self._prefilling.remove(slot)
        self._phase[slot] = DECODE
        self._length[slot] += 1
        sharing = [slot]
        others, lead.attached = lead.attached, []
        prompt = lead.request.prompt
        while others and self._free_slots:
            other = others.pop(0)
            other.lead = None
            place = heapq.heappop(self._free_slots)
            self._occupy(place, other, prompt, prompt.size, draft)
            self._phase[place] = DECODE
            self._length[place] += 1
            self._last_step[place] = self.step
            self._forking[place] = slot
            sharing.append(place)
        if others:
            self._enqueue(others)
        return sharing

    def _add_blocks(self, columns: dict[str, Any], blocks: list[tuple[Column, Column, Column]]) -> None:
        """Block table entries of sequences that still have a slot."""
        seqs: list[int] = np.concatenate([b[0] for b in blocks]).tolist() if len(blocks) > 1 else blocks[0][0].tolist()
        slots = i32([holder.slot if (holder := self._live.get(seq)) is not None else -1 for seq in seqs])
        index = np.concatenate([b[1] for b in blocks]) if len(blocks) > 1 else blocks[0][1]
        ids = np.concatenate([b[2] for b in blocks]) if len(blocks) > 1 else blocks[0][2]
        keep = slots >= 0
        if not keep.all():
            slots, index, ids = slots[keep], index[keep], ids[keep]
        columns["block_slots"], columns["block_index"], columns["block_ids"] = slots, index, ids

    # ============================================================== a step is done

    def _step_done(self, done: StepDone) -> Iterable[Out]:
        settings = self.settings
        if done.epoch != settings.epoch or done.engine != settings.engine or not self._flights or self._flights[0].step != done.step:
            self.stale += 1
            return
        flight = self._flights.popleft()
        rows = flight.rows
        if done.tokens.size != rows.slots.size:
            raise ProtocolError(f"step {done.step} sampled {rows.slots.size} rows, but {done.tokens.size} tokens came back")
        self.done_step = done.step
        slots, positions, offsets, tokens, stops = rows.slots, flight.positions, flight.offsets, done.tokens, rows.stops
        seqs, incarnations, mins = rows.seqs, rows.incarnations, rows.mins
        logprobs = done.logprobs
        if self._leaving:
            live = self._phase[slots] != ENDED
            if not live.all():  # tokens drawn for sequences that had already stopped
                kept = np.flatnonzero(live)
                slots, positions, offsets, tokens, stops = slots[kept], positions[kept], offsets[kept], tokens[kept], stops[kept]
                seqs, incarnations, mins = seqs[kept], incarnations[kept], mins[kept]
                logprobs = select_logprobs(logprobs, live)
                bad = np.zeros(live.size, bool)
                bad[done.bad_rows] = True
                bad_rows: Column = np.flatnonzero(bad[kept])
            else:
                bad_rows = done.bad_rows
        else:
            bad_rows = done.bad_rows
        reasons: U8 = np.zeros(tokens.size, np.uint8)
        errors: list[str] = []
        if flight.capped:
            reasons[positions + 1 >= self._limit[slots]] = LENGTH
        hit = stops == tokens[:, None]
        if hit.any():
            reasons[hit.any(axis=1) & (offsets >= mins)] = STOP
        if bad_rows.size:
            tokens = tokens.copy()
            tokens[bad_rows] = -1
            reasons[bad_rows] = FAILED
            errors = ["The model's output for this sequence is not a number."] * bad_rows.size
            self._poisoned[slots[bad_rows]] = True
            fine = reasons != FAILED
            self._history[slots[fine], positions[fine]] = tokens[fine]
            self._known[slots[fine]] = positions[fine] + 1
        else:
            self._history[slots, positions] = tokens
            self._known[slots] = positions + 1
        if settings.enable_prefix_caching and not self._commit_due and not (positions % self._block).all():
            self._commit_due = True
        prompt_logprobs = self._prompt_logprobs(flight, done.prompt_logprobs) if flight.prompt_seqs else None
        if reasons.any():
            for seq in seqs[reasons != 0].tolist():
                self._end(self._live[seq])
        if self._leaving:
            self._settle()
        columns: dict[str, Any] = {}
        if flight.started:
            columns["started_seqs"] = i64([seq for seq, _ in flight.started])
            columns["started_cached"] = i32([cached for _, cached in flight.started])
        if prompt_logprobs is not None:
            columns["prompt_seqs"] = i64(flight.prompt_seqs)
            columns["prompt_logprobs"] = prompt_logprobs
        if errors:
            columns["errors"] = errors
        yield StepTokens(
            engine=settings.engine,
            epoch=settings.epoch,
            step=done.step,
            seqs=seqs,
            incarnations=incarnations,
            offsets=offsets,
            tokens=tokens,
            reasons=reasons,
            stats=self._stats(flight.tokens),
            started_ns=done.started_ns,
            finished_ns=done.finished_ns,
            preempted_seqs=self._take_preempted(),
            logprobs=logprobs,
            **columns,
        )
        yield from self._wake()

    def _prompt_logprobs(self, flight: _Flight, found: LogprobColumns | None) -> LogprobColumns | None:
        """Those that were not delivered before."""
        if found is None:
            return None
        fresh = np.zeros(found.rows.size, bool)
        for row, (seq, request) in enumerate(zip(flight.prompt_seqs, flight.prompt_requests, strict=True)):
            mine = (found.rows == row) & (found.positions >= request.prompt_logprobs_next)
            if request.live and mine.any():
                fresh |= mine
                request.prompt_logprobs_next = int(found.positions[mine].max()) + 1
                if seq not in self._live:  # the choice that computed the prompt was aborted: they belong to the others too
                    flight.prompt_seqs[row] = next(s.seq for s in self._live.values() if s.request is request)
        return _select_rows(found, fresh, found.rows)

    def _take_preempted(self) -> Column:
        if not self._preempted:
            return EMPTY_I64
        preempted, self._preempted = self._preempted, []
        return i64(preempted)

    def _stats(self, batch_tokens: int) -> EngineStats:
        used, cached, total, queries, hits, quarantined = self._kv
        waiting = self._waiting.sequences
        return EngineStats(
            running=len(self._live) - waiting,
            waiting=waiting,
            parked=self._parked_live,
            blocks_used=used,
            blocks_cached=cached,
            blocks_total=total,
            steps=self.done_step,
            preemptions=self._preemptions,
            prefix_queries=queries,
            prefix_hits=hits,
            prompt_computed=self._prompt_computed,
            prompt_cached=self._prompt_cached,
            batch_tokens=batch_tokens,
            quarantined=quarantined,
        )

    def _report(self, rows: list[tuple[int, int, int, int]], errors: list[str] | None = None) -> StepTokens:
        """Ends that no step brought: (seq, incarnation, offset, reason)."""
        return StepTokens(
            engine=self.settings.engine,
            epoch=self.settings.epoch,
            step=self.done_step,
            seqs=i64([r[0] for r in rows]),
            incarnations=i32([r[1] for r in rows]),
            offsets=i32([r[2] for r in rows]),
            tokens=i32([-1] * len(rows)),
            reasons=u8([r[3] for r in rows]),
            stats=self._stats(0),
            preempted_seqs=self._take_preempted(),
            errors=errors or [],
        )


def select_logprobs(columns: LogprobColumns | None, keep: Column) -> LogprobColumns | None:
    """Only the entries whose row is kept (a mask over rows), renumbered to the rows that remain."""
    if columns is None:
        return None
    renumbered = (np.cumsum(keep) - 1).astype(np.int32)
    return _select_rows(columns, keep[columns.rows], renumbered[columns.rows])


def _select_rows(columns: LogprobColumns, keep: Column, rows: Column) -> LogprobColumns:
    """Entries under the mask `keep`, with the row numbers `rows` (one per entry of `columns`)."""
    if keep.all():
        return LogprobColumns(
            rows=rows, positions=columns.positions, counts=columns.counts, ranks=columns.ranks, ids=columns.ids, values=columns.values
        )
    wide = np.repeat(keep, columns.counts)
    return LogprobColumns(
        rows=rows[keep],
        positions=columns.positions[keep],
        counts=columns.counts[keep],
        ranks=columns.ranks[keep],
        ids=columns.ids[wide],
        values=columns.values[wide],
    )
