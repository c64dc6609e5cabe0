"""The scheduler: what the device computes next, and what became of it.

What it is: a pure state machine (messages in, messages out, time from a Clock) for continuous batching under a token budget: every step
takes one token of each running sequence first, then chunks of prompts that are being computed, then new ones in the policy's order.
It plans from upper bounds as many steps ahead as the device allows: a token's value is unknown until its StepDone, a sequence that turns
out to have stopped still runs in the steps already in flight, and what they draw for it is dropped. Memory that runs out is answered
by preemption with recomputation (never of the oldest sequence); what was received stays and is never drawn again.
What it does not know: block ids' contents, texts, loops, sockets, who listens.

Where to look: `handle` dispatches; `_plan_step` is the loop's heart. All state is on one Board (board.py); line.py says who takes part, memory.py
gets them blocks, launch.py makes Forward and Sample, landing.py is what became of a step, release.py how sequences leave. A step in which nothing
starts, ends or crosses a block boundary runs no Python loop over sequences and asks KV nothing. How many drafts a step has is said by drafting.py.
It is long because every message that it takes is handled here, and what an Admit is refused for.
Iteration-level scheduling: Orca (Yu et al., 2022); chunked prefill beside decodes: Sarathi-Serve (Agrawal et al., 2024).
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Any

import numpy as np

from penstock.core.actors.scheduler.beams import Beams
from penstock.core.actors.scheduler.board import NOBODY, Board, Planning, SchedulerSettings
from penstock.core.actors.scheduler.drafting import Drafting
from penstock.core.actors.scheduler.landing import Landing
from penstock.core.actors.scheduler.launch import Launch
from penstock.core.actors.scheduler.line import Line
from penstock.core.actors.scheduler.memory import Memory
from penstock.core.actors.scheduler.outline import Outline
from penstock.core.actors.scheduler.release import Release
from penstock.core.actors.scheduler.waiting import Group, Request, Sequence
from penstock.core.actors.scheduler.widths import Widths
from penstock.core.contract.policy import SchedulePolicy
from penstock.core.protocol.columns import EMPTY_I32, i32, i64
from penstock.core.protocol.hashing import HASH_BYTES
from penstock.core.protocol.messages import (
    ABORTED,
    FAILED,
    LENGTH,
    Abort,
    Admit,
    DeviceLost,
    Draft,
    Drafted,
    Drain,
    Drained,
    Drawn,
    Forward,
    GrammarClose,
    GrammarFailed,
    GrammarOpen,
    KvGrant,
    KvStep,
    MaskRequest,
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
from penstock.core.protocol.sampling import Beam
from penstock.core.protocol.wording import GRAMMAR_FAILED
from penstock.core.runtime.actor import Out
from penstock.core.runtime.clock import Clock


class Scheduler:
    """See the module. One StepTokens follows each StepDone; aborted or failed sequences that no step names get one of their own."""

    name = "scheduler"
    takes: frozenset[type[Message]] = frozenset({Admit, Abort, Park, Unpark, PeerDown, KvGrant, StepDone, DeviceLost, Drain, Plan})
    gives: frozenset[type[Message]] = frozenset({Plan, KvStep, Forward, Sample, StepTokens, Drained})

    def __init__(self, settings: SchedulerSettings, policy: SchedulePolicy, clock: Clock, widths: Widths | None = None) -> None:
        if min(settings.max_num_seqs, settings.max_num_batched_tokens, settings.max_model_len, settings.depth) < 1:
            raise ValueError("max_num_seqs, max_num_batched_tokens, max_model_len and depth must be at least 1")
        if settings.grammars:
            self.gives = self.gives | {GrammarOpen, GrammarClose, MaskRequest, Drawn}
            self.takes = self.takes | {GrammarFailed}
        self._board = board = Board(settings, policy, clock)
        if settings.lookahead:
            board.drafting = Drafting(board, clock, widths)
            if board.drafting.host.numbers:
                self.gives, self.takes = self.gives | {Draft}, self.takes | {Drafted}
        self._release = Release(board)
        self._beams = Beams(board, self._release)
        self._line = Line(board, self._release, self._beams)
        self._memory = Memory(board, self._release, self._line, self._beams)
        self._launch = Launch(board, self._release, self._beams)
        self._landing = Landing(board, self._release, self._beams)

    def handle(self, message: Message) -> Iterable[Out]:
        board = self._board
        if type(message) is Plan:
            return self._plan()
        if type(message) is StepDone:
            return self._landing.step_done(message)
        if type(message) is Admit:
            return self._admit(message)
        if type(message) is Abort:
            return self._abort(message.seqs.tolist())
        if type(message) is Park:
            return self._park(message.key, True)
        if type(message) is Unpark:
            return self._park(message.key, False)
        if type(message) is GrammarFailed:
            sequence = board.live.get(message.seq)
            if sequence is not None and sequence.request.incarnation == message.incarnation:
                board.given_up[message.seq, message.incarnation] = ("" if message.broken else GRAMMAR_FAILED) + message.error
            return ()
        if type(message) is Drain:
            board.draining = True
            return board.wake()
        if type(message) is PeerDown:  # text is gone, and with it everybody who waits for these tokens
            return self._abort(list(board.live)) if message.role == "text" else ()
        if type(message) is DeviceLost:
            board.lost = board.lost or message.epoch == board.settings.epoch
            return ()
        raise TypeError(f"the scheduler does not take {type(message).__name__}")

    def _admit(self, admit: Admit) -> Iterable[Out]:
        board = self._board
        old = board.requests.get(admit.key)
        if old is not None and old.incarnation >= admit.incarnation:
            board.stale += 1  # said twice
            return
        if old is not None:  # a later life of the same request: the earlier one ends without a word
            for sequence in [s for s in board.live.values() if s.request is old]:
                self._release.end(sequence)
        choices = admit.choices.tolist()
        limit = min(admit.prompt.size + admit.max_tokens, board.longest)
        error = self._refusal(admit)
        if error is not None:
            yield board.report([(seq_of(admit.key, c), admit.incarnation, 0, FAILED) for c in choices], [error] * len(choices))
            return
        usable = admit.prompt.size // board.block * HASH_BYTES if board.caching else 0
        settings = board.settings
        request = Request(admit, board.clock.now_ns(), limit, admit.hashes[:usable], settings.masks_ahead, settings.adjusts_ahead)
        fresh: list[Sequence] = []
        over: list[tuple[int, int, int, int]] = []
        at = 0
        counts = admit.output_counts.tolist() or [0] * len(choices)
        if request.group is not None:  # there is a sequence for each beam, wanted or not
            choices = list(range(request.group.search.beam.width))
            counts = [0] * len(choices)
            board.groups[request.key] = request.group
        obeying: list[Sequence] = []
        for choice, count in zip(choices, counts, strict=True):
            sequence = Sequence(request, choice, admit.outputs[at : at + count])
            at += count
            if count and request.prompt_len + count >= limit:
                over.append((sequence.seq, request.incarnation, count, LENGTH))
                continue
            board.live[sequence.seq] = sequence
            request.live += 1
            board.wishes += request.wish != 0
            if request.grammar:
                obeying.append(sequence)
            if count:
                request.prompt_logprobs_next = request.prompt_len  # they came with or before the first token
                self._release.enqueue([sequence])
            else:
                fresh.append(sequence)
        if fresh:
            if request.group is not None:
                request.group.members = list(fresh)
            self._release.enqueue(fresh)
        if obeying:
            board.obeying += len(obeying)
            yield from self._close()
            yield GrammarOpen(
                seqs=i64([sequence.seq for sequence in obeying]),
                incarnation=request.incarnation,
                grammar=admit.grammar,
                ends=i32(request.stop_ids) if request.group is None else request.group.search.ends,
                min_tokens=admit.grammar_min_tokens,
                outputs=np.concatenate([sequence.outputs for sequence in obeying]),
                output_counts=i32([sequence.outputs.size for sequence in obeying]),
                beams=request.group is not None,
            )
        if request.live:
            board.requests[admit.key] = request
        if over:
            yield board.report(over)
        yield from board.wake()

    def _refusal(self, admit: Admit) -> str | None:
        """Why this request can never run here."""
        board = self._board
        settings = board.settings
        length = int(admit.prompt.size)
        if board.draining:
            return "The engine is draining and takes nothing new."
        if length == 0:
            return "The prompt has no tokens."
        least = length + min(admit.max_tokens, 1)  # who draws nothing needs room for nothing more
        if least > settings.max_model_len:
            return f"The prompt has {length} tokens; the engine's context is {settings.max_model_len}."
        if least > board.longest:
            return f"The prompt has {length} tokens; the KV cache of {settings.num_blocks} blocks holds {board.longest}."
        if not settings.enable_chunked_prefill and length > settings.max_num_batched_tokens:
            return f"The prompt has {length} tokens; without chunked prefill a step takes {settings.max_num_batched_tokens}."
        if int(admit.prompt.min()) < 0 or int(admit.prompt.max()) >= settings.vocab:
            return f"The prompt holds a token id outside 0..{settings.vocab - 1}."
        if admit.max_tokens < 0:
            return "max_tokens must be 0 or more."
        if admit.prefill_only or admit.kv_handle or admit.adapter:
            return "Disaggregated prefill and adapters are not supported yet."
        if admit.sampling.beam is not None and admit.max_tokens:
            return self._beam_refusal(admit, admit.sampling.beam)
        if admit.grammar and not settings.grammars:
            return "This engine cannot make an answer obey a grammar."
        return None

    def _beam_refusal(self, admit: Admit, beam: Beam) -> str | None:
        board = self._board
        settings, width = board.settings, beam.width
        if not settings.beams:
            return "This engine cannot search with beams."
        if admit.grammar and not settings.grammars:
            return "This engine cannot make an answer obey a grammar."
        if admit.outputs.size:
            return "A beam search does not go on in its middle."
        if not max(admit.choices.tolist()) < width <= min(settings.max_num_seqs, settings.max_num_batched_tokens):
            return f"A search with {width} beams does not fit the engine's {settings.max_num_seqs} sequences."
        limit = min(admit.prompt.size + admit.max_tokens, board.longest)
        if beam.blocks(admit.prompt.size, limit, board.block) > settings.num_blocks:
            return f"The KV cache of {settings.num_blocks} blocks may not hold {width} beams of {limit} tokens."
        if width + admit.eos.size + len(admit.sampling.stop_token_ids) > settings.vocab:
            return f"The vocabulary of {settings.vocab} tokens is too small for {width} beams."
        return None

    def _abort(self, seqs: list[int]) -> Iterable[Out]:
        board = self._board
        rows: list[tuple[int, int, int, int]] = []
        ending: list[Sequence] = []
        for seq in dict.fromkeys(seqs):
            sequence = board.live.get(seq)
            if sequence is None:
                continue
            if sequence.request.group is not None:  # one of its answers or all: they end together
                rows += self._end_group(sequence.request.group, ABORTED)
                continue
            rows.append((seq, sequence.request.incarnation, board.received(sequence), ABORTED))
            ending.append(sequence)
        told: dict[str, Any] = {} if board.drafting is None else board.drafting.tally.told_of(ending)
        for sequence in ending:
            self._release.end(sequence)
        if rows:
            yield board.report(rows, **told)
            yield from board.wake()

    def _end_group(self, group: Group, reason: int) -> list[tuple[int, int, int, int]]:
        """Beams end, before there was anything to tell of them: rows for `report`."""
        for member in group.members:
            self._release.end(member)
        return [(seq_of(group.request.key, choice), group.request.incarnation, 0, reason) for choice in group.wanted]

    def _park(self, key: int, parked: bool) -> Iterable[Out]:
        board = self._board
        request = board.requests.get(key)
        if (
            request is None or request.parked == parked or request.group is not None
        ):  # beams say nothing that a slow client could be late for
            return ()
        request.parked = parked
        board.parked_live += request.live if parked else -request.live
        for slot, sequence in enumerate(board.slots.holder):
            if sequence is not None and sequence.request is request:
                board.slots.parked[slot] = parked
        self._release.note_parked(key, parked)
        board.rows = None
        board.blocked = False
        return board.wake()

    def _plan(self) -> Planning:
        board = self._board
        board.plan_queued = False
        if board.lost:
            return
        if board.closed:
            yield from self._close()
        if board.parks:
            self._release.give_up_parked(board.clock.now_ns())
        giving = bool(board.releases)
        while len(board.flights) < board.settings.depth and not (board.flights and board.flights[-1].alone):
            board.again = False
            if board.anew:
                yield from self._open_anew()
            made = yield from self._plan_step()
            if board.failures:
                yield from self._fail()
            elif not made and not board.again:
                break
            self._release.settle()
        if board.releases and not board.flights:  # nothing to compute, but something to give back
            yield from self._memory.ask(Outline(0), NOBODY, [])
        if board.drafting is not None and board.drafting.host.ended and not board.live and not board.flights:
            yield from board.drafting.host.farewell()
        if giving and not board.flights:  # no step will tell that the blocks came back
            yield board.report([])
        if board.draining and not board.drained and not board.live and not board.flights:
            board.drained = True
            yield Drained(role="engine", id=board.settings.engine)

    def _close(self) -> Iterable[Out]:
        """Grammars of sequences that are over."""
        closed, self._board.closed = self._board.closed, []
        if closed:
            yield GrammarClose(seqs=i64([seq for seq, _ in closed]), incarnations=i32([incarnation for _, incarnation in closed]))

    def _open_anew(self) -> Iterable[Out]:
        """Searches that were preempted stand at the beginning of their grammars again."""
        groups, self._board.anew = self._board.anew, []
        for group in groups:
            members = [member.seq for member in group.members if self._board.live.get(member.seq) is member]
            if members:
                yield GrammarOpen(
                    seqs=i64(members),
                    incarnation=group.request.incarnation,
                    grammar=group.grammar,
                    ends=group.search.ends,
                    min_tokens=group.grammar_min_tokens,
                    output_counts=i32([0] * len(members)),
                    beams=True,
                )

    def _fail(self) -> Iterable[Out]:
        board = self._board
        failures, board.failures = board.failures, []
        rows: list[tuple[int, int, int, int]] = []
        errors: list[str] = []
        for sequence, error in failures:
            if sequence.seq not in board.live:
                continue  # a beam, ended with its group
            if sequence.request.group is not None:
                ended = self._end_group(sequence.request.group, FAILED)
            else:
                ended = [(sequence.seq, sequence.request.incarnation, board.received(sequence), FAILED)]
                self._release.end(sequence)
            rows += ended
            errors += [error] * len(ended)
        yield board.report(rows, errors)

    def _plan_step(self) -> Generator[Out, Any, bool]:
        """Plan one step; False if there is nothing to compute now."""
        board = self._board
        rows = board.rows or self._line.gather()
        if board.drafting is not None:
            board.drafting.choose(rows)
            if board.drafting.host.numbers:
                yield from board.drafting.ask(rows)
            board.drafting.share(rows)
        budget = board.settings.max_num_batched_tokens
        due = bool(board.releases)
        short, reach = board.slots.short(rows)
        quiet = not (short.size or due or board.prefilling or board.carried or self._line.may_admit())
        if quiet and board.groups:
            quiet = not self._beams.pending()
        if quiet and 0 < rows.tokens <= budget:
            yield from self._launch.launch_decodes(rows, {}, None)
            return True
        outline, tokens = Outline(budget), rows.tokens
        self._line.take_decodes(outline, rows)
        self._line.take_chunks(outline)
        entries, room = self._line.entries(outline)
        asked = self._line.next_entries(entries, outline, room)
        if outline.rows is not rows or rows.tokens != tokens:
            short, reach = board.slots.short(outline.rows) if outline.rows is not None else (NOBODY, EMPTY_I32)
        if short.size and outline.rows is not None and (early := self._memory.early(outline.rows)):
            short, reach = board.slots.short(outline.rows, early)
        if short.size or asked or due or (board.groups and self._beams.moves(outline.rows)):
            denied = yield from self._memory.ask(outline, short, asked, reach)
            if denied or outline.stalled:
                yield from self._memory.relieve(outline, denied)
                self._memory.drop_stalled(outline)
            elif asked:
                yield from self._memory.more(outline, entries, room)
        if outline.chunks:
            yield from self._launch.launch_mixed(outline)
        elif outline.rows is not None:
            yield from self._launch.launch_decodes(outline.rows, self._launch._columns(outline), outline)
        else:
            assert not outline.places
            assert not outline.copies
            for seqs, index, ids in outline.blocks:  # not of those who were preempted since
                kept = np.array([board.slot_of(seq) >= 0 for seq in seqs.tolist()], bool)
                board.carried.append((seqs[kept], index[kept], ids[kept]))
            return False
        return True

    # ============================================================== for others to look at

    @property
    def settings(self) -> SchedulerSettings:
        return self._board.settings

    @property
    def progress(self) -> tuple[int, int]:
        return self._board.progress

    @property
    def parks_until_ns(self) -> int | None:
        """When a Plan is due although nothing may run: somebody who is parked gives memory up then."""
        return next(iter(self._board.parks.values()), None)

    @property
    def done_step(self) -> int:
        return self._board.done_step

    @property
    def stale(self) -> int:
        """Messages of another epoch or out of order, dropped."""
        return self._board.stale

    def leftovers(self) -> dict[str, int]:
        return self._board.leftovers()
