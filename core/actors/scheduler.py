"""The scheduler: what the device computes next, and what became of it.

What it is: a pure state machine (messages in, messages out, time from a Clock) for continuous batching under a token budget: every step
takes one token of each running sequence first, then chunks of prompts that are being computed, then new ones in the policy's order.
It plans from upper bounds as many steps ahead as the device allows: a token's value is unknown until its StepDone, a sequence that turns
out to have stopped still runs in the steps already in flight, and what they draw for it is dropped. Memory that runs out is answered
by preemption with recomputation (never of the oldest sequence); what was received stays and is never drawn again.
What it does not know: block ids' contents, texts, loops, sockets, who listens.

Where to look: `handle` dispatches; `_plan_step` is the loop's heart (who: `_take_decodes`, `_take_chunks`, `_line`; memory: `_ask`,
`_relieve`; launch: `_launch_decodes`, `_launch_mixed`); `_step_done` is what became of it. Running sequences are columns (slots.py), waiting
ones entries (waiting.py). A step in which nothing starts, ends or crosses a block boundary runs no Python loop over sequences and asks KV
nothing. Longer than 400 lines, because it is one state machine and reads best in one place.
Iteration-level scheduling: Orca (Yu et al., 2022); chunked prefill beside decodes: Sarathi-Serve (Agrawal et al., 2024).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from typing import Any

import msgspec
import numpy as np

from penstock.core.actor import Ask, Out
from penstock.core.actors.draft import Blocks, Draft, Flight, pick_logprobs, select_logprobs
from penstock.core.actors.slots import DECODE, ENDED, LEAVING, PREFILL, Commit, Index, Rows, Slots
from penstock.core.actors.waiting import Entry, Request, Sequence, WaitingRoom
from penstock.core.clock import Clock
from penstock.core.columns import EMPTY_I64, I32, U8, Column, i32, i64, u8
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
    StepDone,
    StepTokens,
    Unpark,
    seq_of,
)
from penstock.core.policy import Running, SchedulePolicy

_MAX_ROUNDS = 4
"""Look-ups with different cache hits may leave budget: so often KV is asked again within one plan."""

_NOBODY: Index = np.empty(0, np.intp)

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
    mixed_prefill_tokens: int = 0
    """Prompt tokens in a step that also decodes; 0: what the budget leaves."""
    mixed_prefill_gives_way: bool = False
    """Whether that bound rises where many sequences wait for each that runs: see `Scheduler._mixed_most`."""
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = True
    vocab: int = 2**31 - 1


class Scheduler:
    """See the module. One StepTokens follows each StepDone; aborted or failed sequences that no step names get one of their own."""

    name = "scheduler"
    takes: frozenset[type[Message]] = frozenset({Admit, Abort, Park, Unpark, PeerDown, KvGrant, StepDone, DeviceLost, Drain, Plan})
    gives: frozenset[type[Message]] = frozenset({Plan, KvStep, Forward, Sample, StepTokens, Drained})

    def __init__(self, settings: SchedulerSettings, policy: SchedulePolicy, clock: Clock) -> None:
        if min(settings.max_num_seqs, settings.max_num_batched_tokens, settings.max_model_len, settings.depth) < 1:
            raise ValueError("max_num_seqs, max_num_batched_tokens, max_model_len and depth must be at least 1")
        self.settings = settings
        self._policy = policy
        self._clock = clock
        self._block = settings.block_size
        self._caching = settings.enable_prefix_caching
        self._longest = min(settings.max_model_len, settings.num_blocks * settings.block_size)
        # --- running
        self._slots = Slots(settings.max_num_seqs, self._longest, settings.block_size)
        self._rows: Rows | None = None
        """The decoding cohort; None when it must be gathered anew."""
        self._prefilling: list[int] = []
        """Slots in PREFILL, first admitted first."""
        self._forking: dict[int, int] = {}
        """Slot of a choice that has no blocks yet -> slot whose prompt blocks it will share."""
        self._leaving: list[int] = []
        """Slots in LEAVING or ENDED."""
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
        self._prefill_turn = False
        """A prompt that must be computed whole did not fit beside the decodes: it goes first."""
        # --- for the next KvStep, the next Forward, the next StepTokens
        self._releases: list[tuple[int, int, int]] = []
        self._commits: list[Commit] = []
        self._carried: list[Blocks] = []
        self._preempted: list[int] = []
        self._failures: list[tuple[Sequence, str]] = []
        # --- steps
        self.step = 0
        self.done_step = 0
        self._flights: deque[Flight] = deque()
        self._plan_queued = False
        self._again = False
        """Something happened while planning that makes another try worthwhile."""
        self._draining = False
        self._drained = False
        self._lost = False
        # --- counters
        self._parked_live = 0
        self._preemptions = 0
        self._prompt_computed = 0
        self._prompt_cached = 0
        self._kv = (0, 0, settings.num_blocks, 0, 0, 0)
        """used, cached, total blocks; prefix queries, hits; quarantined: from the last grant."""
        self.stale = 0
        """Messages of another epoch or out of order, dropped."""
        self._ones: I32 = np.ones(settings.max_num_seqs, np.int32)
        self._ones.flags.writeable = False
        self._range: I32 = np.arange(settings.max_num_seqs, dtype=np.int32)
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
            return self._abort(message.seqs.tolist())
        if type(message) is Park:
            return self._park(message.key, True)
        if type(message) is Unpark:
            return self._park(message.key, False)
        if type(message) is Drain:
            self._draining = True
            return self._wake()
        if type(message) is PeerDown:  # text is gone, and with it everybody who waits for these tokens
            return self._abort(list(self._live)) if message.role == "text" else ()
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
        limit = min(admit.prompt.size + admit.max_tokens, self._longest)
        error = self._refusal(admit)
        if error is not None:
            yield self._report([(seq_of(admit.key, c), admit.incarnation, 0, FAILED) for c in choices], [error] * len(choices))
            return
        usable = admit.prompt.size // self._block * HASH_BYTES if self._caching else 0
        request = Request(admit, self._clock.now_ns(), limit, admit.hashes[:usable])
        fresh: list[Sequence] = []
        over: list[tuple[int, int, int, int]] = []
        at = 0
        counts = admit.output_counts.tolist() or [0] * len(choices)
        for choice, count in zip(choices, counts, strict=True):
            sequence = Sequence(request, choice, admit.outputs[at : at + count])
            at += count
            if count and request.prompt_len + count >= limit:
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
        if request.live:
            self._requests[admit.key] = request
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
        least = length + min(admit.max_tokens, 1)  # who draws nothing needs room for nothing more
        if least > settings.max_model_len:
            return f"The prompt has {length} tokens; the engine's context is {settings.max_model_len}."
        if least > self._longest:
            return f"The prompt has {length} tokens; the KV cache of {settings.num_blocks} blocks holds {self._longest}."
        if not settings.enable_chunked_prefill and length > settings.max_num_batched_tokens:
            return f"The prompt has {length} tokens; without chunked prefill a step takes {settings.max_num_batched_tokens}."
        if int(admit.prompt.min()) < 0 or int(admit.prompt.max()) >= settings.vocab:
            return f"The prompt holds a token id outside 0..{settings.vocab - 1}."
        if admit.max_tokens < 0:
            return "max_tokens must be 0 or more."
        if admit.prefill_only or admit.kv_handle or admit.adapter:
            return "Disaggregated prefill and adapters are not supported yet."
        return None

    def _enqueue(self, seqs: list[Sequence]) -> None:
        """Into the waiting room; several sequences only if none has outputs."""
        request, outputs = seqs[0].request, seqs[0].outputs
        tokens, hashes = request.prompt, request.hashes
        if outputs.size:
            tokens = np.concatenate([request.prompt, outputs])
            if self._caching:  # continue the prompt's chain over the blocks that outputs complete
                have = len(hashes) // HASH_BYTES
                hashes += chain(hashes[-HASH_BYTES:] or request.root, tokens[have * self._block :], self._block)
        self._waiting.add(Entry(seqs, tokens, hashes))
        self._blocked = False

    def _abort(self, seqs: list[int]) -> Iterable[Out]:
        rows: list[tuple[int, int, int, int]] = []
        for seq in seqs:
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
        for slot, sequence in enumerate(self._slots.holder):
            if sequence is not None and sequence.request is request:
                self._slots.parked[slot] = parked
        self._rows = None
        self._blocked = False
        return self._wake()

    def _received(self, sequence: Sequence) -> int:
        """How many outputs were given to text."""
        if sequence.slot >= 0:
            return int(self._slots.known[sequence.slot] - self._slots.prompt[sequence.slot])
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
            slot, phase = sequence.slot, self._slots.phase
            others, sequence.attached = sequence.attached, []
            if others:
                self._enqueue(others)
            if phase[slot] == PREFILL:
                self._prefilling.remove(slot)
            if phase[slot] != LEAVING:
                self._leaving.append(slot)
            phase[slot] = ENDED
            self._rows = None
            self._forking.pop(slot, None)
            self._settle()

    @property
    def progress(self) -> tuple[int, int]:
        """(steps done, what should make more of them: living sequences that are not parked, steps in flight)."""
        return self.done_step, len(self._live) - self._parked_live + len(self._flights)

    def leftovers(self) -> dict[str, int]:
        """What an idle scheduler still holds: must be empty (for tests and post-mortems)."""
        counts = {
            "live": len(self._live),
            "held": len(self._held),
            "requests": len(self._requests),
            "waiting": len(self._waiting),
            "slots": self._slots.count - len(self._slots.free),
            "prefilling": len(self._prefilling),
            "forking": len(self._forking),
            "leaving": len(self._leaving),
            "releases": len(self._releases),
            "carried": len(self._carried),
            "flights": len(self._flights),
            "parked": self._parked_live,
        }
        return {name: count for name, count in counts.items() if count}

    # ============================================================== leaving a slot

    def _settle(self) -> None:
        """Free the slots of sequences that no step in flight names any more."""
        if not self._leaving:
            return
        sources = set(self._forking.values())
        stay: list[int] = []
        for slot in self._leaving:
            if self._slots.last_step[slot] > self.done_step or slot in sources:
                stay.append(slot)
            elif self._slots.phase[slot] == ENDED:
                self._free(slot)
            else:
                self._requeue(slot)
        self._leaving = stay

    def _free(self, slot: int) -> None:
        """The slot and its blocks return; completed blocks stay in the prefix cache."""
        slots = self._slots
        seq = int(slots.seq[slot])
        if slots.capacity[slot] > 0:
            self._commit([slot])
            self._releases.append((seq, int(slots.incarnation[slot]), int(slots.poisoned[slot])))
        self._held.discard(seq)
        if self._carried:
            self._carried = [(s[m], i[m], b[m]) for s, i, b in self._carried for m in (s != seq,)]
        slots.leave(slot)
        self._rows = None
        self._blocked = False

    def _preempt(self, slot: int) -> bool:
        """The sequence has to wait again: now (True), or as soon as no step in flight names it."""
        if self._slots.last_step[slot] <= self.done_step:
            self._requeue(slot)
            return True
        if self._slots.phase[slot] == PREFILL:
            self._prefilling.remove(slot)
        self._slots.phase[slot] = LEAVING
        self._leaving.append(slot)
        return False

    def _requeue(self, slot: int) -> None:
        """A preempted sequence that no step in flight names waits again, with what was received."""
        sequence = self._slots.holder[slot]
        assert sequence is not None
        sequence.outputs = self._slots.outputs(slot)
        others, sequence.attached = sequence.attached, []
        if self._slots.phase[slot] == PREFILL:
            self._prefilling.remove(slot)
        self._forking.pop(slot, None)
        self._free(slot)
        self._enqueue([sequence, *others])
        self._again = True
        self._preemptions += 1
        self._preempted.append(sequence.seq)

    def _commit(self, slots: list[int]) -> None:
        """Note the blocks of these slots that are complete, for the prefix cache."""
        if self._caching:
            self._commits += [commit for slot in slots if (commit := self._slots.complete(slot)) is not None]

    # ============================================================== planning

    def _plan(self) -> Planning:
        self._plan_queued = False
        if self._lost:
            return
        giving = bool(self._releases)
        while len(self._flights) < self.settings.depth:
            self._again = False
            made = yield from self._plan_step()
            if self._failures:
                yield from self._fail()
            elif not made and not self._again:
                break
            self._settle()
        if self._releases and not self._flights:  # nothing to compute, but something to give back
            yield from self._ask(Draft(0), _NOBODY, [])
        if giving and not self._flights:  # no step will tell that the blocks came back
            yield self._report([])
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
        rows = self._rows or self._gather()
        budget = self.settings.max_num_batched_tokens
        due = bool(self._releases)
        short = rows.index[self._slots.short(rows)]
        quiet = not (short.size or due or self._prefilling or self._carried or self._may_admit())
        if quiet and 0 < rows.slots.size <= budget:
            yield from self._launch_decodes(rows, {}, None)
            return True
        draft = Draft(budget)
        self._take_decodes(draft, rows)
        self._take_chunks(draft)
        entries, room = self._line(draft)
        asked = self._next_entries(entries, draft.budget, room)
        if draft.rows is not rows:
            short = draft.rows.index[self._slots.short(draft.rows)] if draft.rows is not None else _NOBODY
        if short.size or asked or due:
            denied = yield from self._ask(draft, short, asked)
            if denied or draft.stalled:
                yield from self._relieve(draft, denied)
                self._drop_stalled(draft)
            elif asked:
                yield from self._more(draft, entries, room)
        if draft.chunks:
            yield from self._launch_mixed(draft)
        elif draft.rows is not None:
            yield from self._launch_decodes(draft.rows, self._columns(draft), draft)
        else:
            assert not draft.places
            assert not draft.copies
            self._carried += draft.blocks
            return False
        return True

    # -------------------------------------------------------------- who

    def _gather(self) -> Rows:
        """Every sequence that can take one token."""
        slots = self._slots
        ready = (slots.phase == DECODE) & (slots.length < slots.limit)
        if self._parked_live:
            parked = slots.parked.copy()
            for slot in self._forking:  # finishes its fork first, so that the other's blocks are not held for it
                parked[slot] = False
            ready &= ~parked
        self._rows = slots.gather(np.flatnonzero(ready).astype(np.int32))
        return self._rows

    def _take_decodes(self, draft: Draft, rows: Rows) -> None:
        """Sequences that take one token, as far as the budget goes."""
        most = draft.budget
        if self._prefill_turn and self._prefilling:
            head = self._prefilling[0]
            most -= min(most, int(self._slots.length[head] - self._slots.computed[head]))
        if rows.slots.size > most:  # those that waited longest, then those that have least
            order = np.lexsort((rows.starts - rows.prompts, self._slots.last_step[rows.index]))[:most]
            rows = self._slots.gather(rows.slots[np.sort(order)])
            self._rows = None
        if rows.slots.size:
            draft.rows = rows
            draft.budget -= rows.slots.size
            if self.settings.mixed_prefill_tokens:
                draft.budget = min(draft.budget, self._mixed_most(rows.slots.size))

    def _mixed_most(self, running: int) -> int:
        """Prompt tokens for a step with so many decodes. Every token delays all that run, so the bound gives way to how many wait for each two that run:
        when many do, how fast the queue is worked off matters more than a few milliseconds between tokens. A sequence counts with no more tokens than
        the bound, so that a long prompt by itself never raises it."""
        most = self.settings.mixed_prefill_tokens
        if self.settings.mixed_prefill_gives_way:
            slots = self._slots
            count, tokens = self._waiting.demand(most, parked=self._parked_live > 0)
            tokens += sum(min(most, int(slots.length[slot] - slots.computed[slot])) for slot in self._prefilling)
            most = max(most, tokens * (count + len(self._prefilling)) // (2 * running))
        return most

    def _take_chunks(self, draft: Draft) -> None:
        """Prompts that are being computed, first admitted first."""
        draft.prefill_turn, self._prefill_turn = self._prefill_turn, False
        for slot in self._prefilling:
            if not self._take_chunk(draft, slot):
                break

    def _take_chunk(self, draft: Draft, slot: int) -> bool:
        start = int(self._slots.computed[slot])
        left = int(self._slots.length[slot]) - start
        count = min(left, draft.budget)
        if count < left and not self.settings.enable_chunked_prefill and left <= self.settings.max_num_batched_tokens:
            self._prefill_turn = not draft.prefill_turn  # whole or not at all: next time it goes before the decodes
            return False
        if count <= 0:
            return False
        draft.chunks.append((slot, start, count))
        draft.budget -= count
        return True

    def _may_admit(self) -> bool:
        """Is it worth looking at who waits?"""
        return len(self._waiting) > 0 and (self._parked_live > 0 or (len(self._slots.free) > 0 and not self._blocked))

    def _line(self, draft: Draft) -> tuple[list[Entry], int]:
        """Who may be admitted now, in order, and for how many slots there is room."""
        if draft.budget <= 0 or not self._may_admit():
            return [], 0
        entries = [e for e in self._waiting.ordered(self._clock.now_ns()) if not e.request.parked]
        if not entries:
            return [], 0
        if not self._slots.free:
            self._evict_parked(draft)
        return entries, self._room()

    def _room(self) -> int:
        """Free slots that are not promised to the other choices of a prompt that is being computed."""
        promised = sum(len(holder.attached) for slot in self._prefilling if (holder := self._slots.holder[slot]) is not None)
        return len(self._slots.free) - promised

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

    def _ask(self, draft: Draft, short: Index, entries: list[Entry]) -> Generator[Out, Any, list[int]]:
        """One KvStep: what is pending, blocks for decoding slots (which may first have to fork), look-ups for entries (which are placed if
        granted). Gives the denied slots."""
        slots, listed = self._slots, short.tolist()
        ask: dict[str, Any] = {}
        if entries:  # blocks need a name only before somebody looks for them (or when they are given back)
            self._commit(slots.incomplete())
        if self._commits:
            ask["commit_seqs"] = i64([c[0] for c in self._commits])
            ask["commit_lens"] = i32([c[1] for c in self._commits])
            ask["commit_counts"] = i32([c[2].size for c in self._commits])
            ask["commit_tokens"] = np.concatenate([c[2] for c in self._commits])
            self._commits = []
        if self._releases:
            ask["release_seqs"] = i64([r[0] for r in self._releases])
            ask["release_incarnations"] = i32([r[1] for r in self._releases])
            ask["release_drop"] = u8([r[2] for r in self._releases])
            self._releases = []
        forks = [slot for slot in listed if slot in self._forking] if self._forking else []
        if forks:
            ask["fork_src"] = slots.seq[[self._forking[slot] for slot in forks]]
            ask["fork_dst"] = slots.seq[forks]
            ask["fork_lens"] = slots.prompt[forks]
        if short.size:
            ask["reserve_seqs"] = slots.seq[short]
            ask["reserve_lens"] = slots.computed[short] + self._ones[: short.size]
        if entries:
            self._ask_for_entries(ask, short, entries)
        grant: KvGrant = yield Ask(KvStep(step=self.step + 1, **ask), KvGrant)
        used = grant.total_blocks - grant.free_blocks - grant.cached_blocks
        self._kv = (used, grant.cached_blocks, grant.total_blocks, grant.prefix_queries, grant.prefix_hits, grant.quarantined)
        draft.take(grant)
        denied: list[int] = []
        if forks:
            self._take_forks(draft, forks, grant)
        if short.size:
            denied = self._take_grants(draft, listed, grant.granted.tolist())
        if entries:
            self._take_entries(draft, entries, grant, short.size)
        return denied

    def _ask_for_entries(self, ask: dict[str, Any], short: Index, entries: list[Entry]) -> None:
        seqs, lens = [e.seqs[0].seq for e in entries], [e.tokens.size for e in entries]
        running = self._slots.count - len(self._slots.free) - (np.count_nonzero(self._slots.parked) if self._parked_live else 0)
        ask["keep_free"] = min(running, self.settings.num_blocks // 16)  # room to grow for those that run
        ask["lookup_seqs"] = i64(seqs)
        ask["lookup_incarnations"] = i32([e.request.incarnation for e in entries])
        ask["lookup_max"] = i32([self._lookup_max(e) for e in entries])
        ask["lookup_counts"] = i32([len(e.hashes) // HASH_BYTES for e in entries])
        ask["lookup_hashes"] = b"".join([e.hashes for e in entries])
        ask["lookup_roots"] = b"".join([e.request.root for e in entries])
        ask["lookup_again"] = u8([e.request.looked_up for e in entries])
        ask["reserve_seqs"] = np.concatenate([self._slots.seq[short], ask["lookup_seqs"]])
        ask["reserve_lens"] = np.concatenate([self._slots.computed[short] + self._ones[: short.size], i32(lens)])

    def _lookup_max(self, entry: Entry) -> int:
        request = entry.request
        if not self._caching or request.prompt_logprobs_next < request.prompt_len:
            return 0
        return int(entry.tokens.size) - 1

    def _take_forks(self, draft: Draft, forks: list[int], grant: KvGrant) -> None:
        slots = self._slots
        self._rows = None  # a parked one may have been let in to fork
        self._again = True
        for slot, forked in zip(forks, grant.forked.tolist(), strict=True):
            if forked:
                source = self._forking.pop(slot)
                self._held.add(int(slots.seq[slot]))
                slots.capacity[slot] = slots.whole(int(slots.prompt[slot]))
                slots.hashed[slot] = slots.hashed[source]
                slots.given[slot] = slots.prompt[slot] // self._block
                draft.forked.add(slot)
                draft.sources.add(source)
            else:  # it holds nothing that waiting could save: it computes its prompt again, later
                draft.stalled.add(slot)
                self._preempt(slot)

    def _take_grants(self, draft: Draft, short: list[int], granted: list[int]) -> list[int]:
        slots = self._slots
        denied: list[int] = []
        for slot, good in zip(short, granted, strict=False):
            if slot in draft.stalled:
                continue
            if good:
                slots.capacity[slot] = slots.whole(slots.computed.item(slot) + 1)
            else:
                denied.append(slot)
        return denied

    def _take_entries(self, draft: Draft, entries: list[Entry], grant: KvGrant, offset: int) -> None:
        """Place what was granted; the rest goes on waiting."""
        asked = missed = 0
        for entry, granted, cached in zip(entries, grant.granted[offset:].tolist(), grant.lookup_cached.tolist(), strict=True):
            if granted:
                asked += entry.tokens.size
                missed += entry.tokens.size - cached
                self._start(draft, entry, cached)
            elif cached >= 0 and not draft.full:  # not merely deferred
                self._waiting.note_cached(entry, cached)
                draft.full = self._blocked = True
                self._unblock(draft, entry)
        if asked:
            self._uncached = missed / asked

    def _start(self, draft: Draft, entry: Entry, cached: int) -> None:
        slots, request, sequences = self._slots, entry.request, entry.seqs
        self._waiting.remove(entry)
        lead = sequences[0]
        slot = slots.enter(lead, entry.tokens, cached, PREFILL)
        slots.capacity[slot] = slots.whole(entry.tokens.size)
        slots.hashed[slot] = cached // self._block
        slots.given[slot] = len(entry.hashes) // HASH_BYTES
        draft.place(slot, lead, entry.tokens)
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

    def _more(self, draft: Draft, entries: list[Entry], room: int) -> Planning:
        """Cache hits left budget: ask for more."""
        for _ in range(_MAX_ROUNDS - 1):
            room = self._room()
            if draft.full or not entries or draft.budget <= 0 or room <= 0:
                return
            asked = self._next_entries(entries, draft.budget, room)
            if asked:
                yield from self._ask(draft, _NOBODY, asked)

    def _unblock(self, draft: Draft, entry: Entry) -> None:
        """The first in line does not fit. Parked sequences make room; where nothing else holds memory it never will fit."""
        if self._evict_parked(draft):
            return
        if len(self._slots.free) == self._slots.count and not self._releases:
            used, _cached, total, _queries, _hits, quarantined = self._kv
            need = self._slots.whole(entry.tokens.size) // self._block
            error = f"The sequence needs {need} KV blocks, but only {total - used} of {total} can be had ({quarantined} quarantined)."
            self._failures += [(s, error) for s in entry.seqs]

    def _evict_parked(self, draft: Draft) -> bool:
        """Preempt one parked sequence that no step names, neither in flight nor in the making."""
        if not self._parked_live:
            return False
        named = set(draft.sources)
        if draft.rows is not None:
            named.update(draft.rows.slots.tolist())
        idle = self._slots.last_step <= self.done_step
        order = [s for s in self._victims(self._slots.parked & idle & (self._slots.phase == DECODE)) if s not in named]
        if order:
            self._requeue(order[0])
        return bool(order)

    def _victims(self, able: Column) -> list[int]:
        """Slots that may be preempted (of the mask `able`), first victim first: parked ones, then by the policy; the last is the oldest."""
        slots = self._slots
        for slot in self._forking.values():
            able[slot] = False
        found = np.flatnonzero(able)
        if not found.size:
            return []
        holders = [h for s in found.tolist() if (h := slots.holder[s]) is not None]
        arrival = i64([h.request.arrival_ns for h in holders])
        keys = self._policy.victims(
            Running(
                arrival_ns=arrival,
                priority=i32([h.request.priority for h in holders]),
                computed_tokens=slots.computed[found],
                output_tokens=slots.length[found] - slots.prompt[found],
                blocks=slots.capacity[found] // self._block,
            )
        )
        order = np.lexsort((slots.seq[found], arrival, keys, slots.parked[found]))[::-1]
        listed: list[int] = found[order].tolist()
        return listed

    def _relieve(self, draft: Draft, denied: list[int]) -> Planning:
        """Memory ran out for `denied`: preempt until they have what they need, or let them sit this step out."""
        slots = self._slots
        while denied:
            if any(slots.last_step[slot] > self.done_step for slot in self._leaving):
                break  # blocks are on their way back
            order = self._victims((slots.phase == PREFILL) | (slots.phase == DECODE))
            if order and not slots.parked[order[-1]]:
                order.pop()  # the oldest always goes on
            victim = next((slot for slot in order if slot not in draft.forked and slot not in draft.sources), None)
            if victim is None:
                if len(denied) == 1 and len(slots.free) == slots.count - 1 and not draft.forked:
                    sequence = slots.holder[denied[0]]
                    assert sequence is not None
                    self._failures.append((sequence, "The KV cache is exhausted by this sequence alone."))
                break
            if not self._preempt(victim):
                break
            self._blocked = True  # what it gave is not for those who wait
            denied = [slot for slot in denied if slot != victim]
            if denied:
                denied = yield from self._ask(draft, np.array(denied, np.intp), [])
        draft.stalled.update(denied)

    def _drop_stalled(self, draft: Draft) -> None:
        """After a want of memory: only rows that are still running and have what they need."""
        phase = self._slots.phase
        self._rows = None
        draft.chunks = [c for c in draft.chunks if phase[c[0]] == PREFILL]
        if draft.rows is not None:
            fine = [slot for slot in draft.rows.slots.tolist() if phase[slot] == DECODE and slot not in draft.stalled]
            draft.rows = self._slots.gather(i32(fine)) if fine else None

    # -------------------------------------------------------------- launch

    def _launch_decodes(self, rows: Rows, columns: dict[str, Any], draft: Draft | None) -> Planning:
        """A step of decodes only: every row takes one token."""
        slots, index, count = self._slots, rows.index, rows.slots.size
        self.step = step = self.step + 1
        starts, ones = rows.starts, self._ones[:count]
        positions = starts + ones
        slots.computed[index] = positions
        slots.length[index] = positions + ones
        slots.last_step[index] = step
        flight = Flight(step, rows, positions, rows.left <= 1, count)
        rows.starts = positions
        rows.left -= 1
        if rows.left <= 0:
            self._rows = None
        extra: dict[str, Any] = {}
        if draft is not None:
            if draft.sources:
                slots.last_step[list(draft.sources)] = step
            flight.started = draft.started
            if draft.samplings:
                extra["places"] = draft.samplings
        return self._launch(flight, rows.slots, starts, ones, count, self._range[:count], columns, extra)

    def _launch_mixed(self, draft: Draft) -> Planning:
        """A step with prompts in it."""
        slots = self._slots
        self.step = step = self.step + 1
        decodes = draft.rows.slots if draft.rows is not None else self._range[:0]
        chunks = sorted(draft.chunks, key=lambda c: not self._is_last_token(c))
        num_decode = decodes.size + len([c for c in chunks if self._is_last_token(c)])
        rows = np.concatenate([decodes, i32([c[0] for c in chunks])])
        starts = np.concatenate([slots.computed[decodes], i32([c[1] for c in chunks])])
        counts = np.concatenate([self._ones[: decodes.size], i32([c[2] for c in chunks])])
        slots.computed[rows] = starts + counts
        slots.length[decodes] += 1
        slots.last_step[rows] = step
        if draft.sources:
            slots.last_step[list(draft.sources)] = step
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
                self._prefilling.remove(slot)
                slots.phase[slot] = DECODE  # at its limit already: never gathered; its end comes with this step
                scored.append(holder)
            elif start + count == slots.length[slot]:
                sharing = self._finish_prompt(draft, slot, holder)
                finals += [row] * len(sharing)
                final_slots += sharing
        sampled = slots.gather(np.concatenate([decodes, i32(final_slots)]))
        positions = slots.length[sampled.index] - self._ones[: sampled.slots.size]
        tokens = int(counts.sum())
        flight = Flight(step, sampled, positions, sampled.left <= 0, tokens)
        flight.started, flight.prompts, flight.scored = draft.started, prompts, scored
        self._prompt_computed += tokens - decodes.size
        self._rows = None
        extra: dict[str, Any] = {}
        if draft.samplings:
            extra["places"] = draft.samplings
        if prompt_rows:
            extra["prompt_rows"] = i32(prompt_rows)
            extra["prompt_topk"] = i32([request.params.prompt_logprobs or 0 for _, request in prompts])
        sample_rows = np.concatenate([self._range[: decodes.size], i32(finals)])
        return self._launch(flight, rows, starts, counts, num_decode, sample_rows, self._columns(draft), extra)

    def _is_last_token(self, chunk: tuple[int, int, int]) -> bool:
        slot, start, count = chunk
        holder = self._slots.holder[slot]
        return count == 1 and start + 1 == int(self._slots.length[slot]) and holder is not None and not holder.request.draws_nothing

    def _finish_prompt(self, draft: Draft, slot: int, lead: Sequence) -> list[int]:
        """The last chunk is in this step: its row samples for the slot itself, and for as many of the other choices as find a slot."""
        slots = self._slots
        self._prefilling.remove(slot)
        slots.phase[slot] = DECODE
        slots.length[slot] += 1
        sharing = [slot]
        others, lead.attached = lead.attached, []
        prompt = lead.request.prompt
        while others and slots.free:
            other = others.pop(0)
            other.lead = None
            place = slots.enter(other, prompt, prompt.size, DECODE)
            draft.place(place, other, prompt)
            slots.length[place] += 1
            slots.last_step[place] = self.step
            self._forking[place] = slot
            sharing.append(place)
        if others:
            self._enqueue(others)
        return sharing

    def _columns(self, draft: Draft) -> dict[str, Any]:
        carried, self._carried = self._carried, []
        return draft.columns(carried, self._slot_of)

    def _slot_of(self, seq: int) -> int:
        sequence = self._live.get(seq)
        return -1 if sequence is None else sequence.slot

    def _launch(
        self,
        flight: Flight,
        slots: I32,
        starts: I32,
        counts: I32,
        num_decode: int,
        sample_rows: I32,
        columns: dict[str, Any],
        extra: dict[str, Any],
    ) -> Planning:
        engine, epoch = self.settings.engine, self.settings.epoch
        self._flights.append(flight)
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

    # ============================================================== a step is done

    def _step_done(self, done: StepDone) -> Iterable[Out]:
        settings, slots = self.settings, self._slots
        if done.epoch != settings.epoch or done.engine != settings.engine or not self._flights or self._flights[0].step != done.step:
            self.stale += 1
            return
        flight = self._flights.popleft()
        rows, positions, offsets, tokens, logprobs = flight.rows, flight.positions, flight.offsets, done.tokens, done.logprobs
        if tokens.size != rows.slots.size:
            raise ProtocolError(f"step {done.step} sampled {rows.slots.size} rows, but {tokens.size} tokens came back")
        self.done_step = done.step
        bad = done.bad_rows
        if self._leaving:
            kept = np.flatnonzero(slots.phase[rows.index] != ENDED)
            if kept.size < tokens.size:  # the others had already stopped: what was drawn for them is dropped
                if logprobs is not None:
                    logprobs = select_logprobs(logprobs, kept, tokens.size)
                bad = np.flatnonzero(np.isin(kept, bad))
                rows, positions, offsets, tokens = rows.select(kept), positions[kept], offsets[kept], tokens[kept]
        index = rows.index
        after = positions + self._ones[: positions.size]
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
            reasons[bad] = FAILED
            slots.poisoned[index[bad]] = True
            fine = reasons != FAILED
            slots.flat[rows.base[fine] + positions[fine]] = tokens[fine]
            slots.known[index[fine]] = after[fine]
        else:
            slots.flat[rows.base + positions] = tokens
            slots.known[index] = after
        columns: dict[str, Any] = {}
        if flight.prompts:
            self._add_prompt_logprobs(columns, flight, done.prompt_logprobs)
        if ends:
            for seq in rows.seqs[reasons != 0].tolist():
                self._end(self._live[seq])
        seqs, incarnations = rows.seqs, rows.incarnations
        if flight.scored:
            scored = [s for lead in flight.scored if self._live.get(lead.seq) is lead for s in (*lead.attached, lead)]
            for sequence in scored:
                self._end(sequence)
            zeros = np.zeros(len(scored), np.int32)
            seqs = np.concatenate([seqs, i64([s.seq for s in scored])])
            incarnations = np.concatenate([incarnations, i32([s.request.incarnation for s in scored])])
            offsets, tokens = np.concatenate([offsets, zeros]), np.concatenate([tokens, zeros - 1])
            reasons = np.concatenate([reasons, np.full(len(scored), LENGTH, np.uint8)])
        if self._leaving:
            self._settle()
        if flight.started:
            columns["started_seqs"] = i64([seq for seq, _ in flight.started])
            columns["started_cached"] = i32([cached for _, cached in flight.started])
        if bad.size:
            columns["errors"] = ["The model's output for this sequence is not a number."] * bad.size
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

    def _add_prompt_logprobs(self, columns: dict[str, Any], flight: Flight, found: LogprobColumns | None) -> None:
        """Those that were not delivered before; under a living choice's name, since they belong to all choices."""
        if found is None:
            return
        fresh = np.zeros(found.rows.size, bool)
        seqs: list[int] = []
        for row, (seq, request) in enumerate(flight.prompts):
            if request.live:
                mine = (found.rows == row) & (found.positions >= request.prompt_logprobs_next)
                fresh |= mine
                request.prompt_logprobs_next = int(found.positions[mine].max(initial=request.prompt_logprobs_next - 1)) + 1
                if seq not in self._live:
                    seq = next(s.seq for s in self._live.values() if s.request is request)
            seqs.append(seq)
        columns["prompt_seqs"] = i64(seqs)
        columns["prompt_logprobs"] = pick_logprobs(found, fresh, found.rows)

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
