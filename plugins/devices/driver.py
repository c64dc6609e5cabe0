"""Drives a runner directly: a few sequences through Forward and Sample, without scheduler, KV manager or processes.

What it is: the smallest honest batcher, for self-tests, parity tests and benchmarks: random or fixed chunks, ragged batches, scattered
blocks, shared prefixes, preemption with recomputation. Everything it decides comes from its options and one random generator.
What it does not know: policies, prefix hashes, requests, how a runner computes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from penstock.core.protocol.columns import EMPTY_I32, EMPTY_U8, I32, i32, u8
from penstock.core.protocol.errors import CheckpointError, EngineFailure
from penstock.core.protocol.messages import Forward, Sample, SlotSampling, StepDone
from penstock.core.protocol.sampling import SamplingParams


class Drivable(Protocol):
    """What is needed of a runner."""

    facts: Any
    num_blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    lookahead: int

    def forward(self, work: Forward) -> None: ...

    def sample(self, work: Sample) -> Callable[[], StepDone]: ...


@dataclass(eq=False)
class Job:
    """One sequence. `tokens` and `logprobs` (the values column of each drawn token, as bytes) grow while it runs."""

    prompt: I32
    params: SamplingParams
    max_tokens: int
    choice: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[bytes] = field(default_factory=list)
    computed: int = 0
    slot: int = -1
    blocks: list[int] = field(default_factory=list)
    shared: int = 0
    prompt_logprobs: dict[int, tuple[list[int], list[float]]] = field(default_factory=dict)
    drafts: int = 0
    """That stand behind its last token on the device."""
    unread: bool = False
    """Drafters do not look at it."""
    stop_ids: tuple[int, ...] = ()

    @property
    def done(self) -> bool:
        return len(self.tokens) >= self.max_tokens

    @property
    def known(self) -> int:
        return len(self.prompt) + len(self.tokens)


@dataclass(frozen=True)
class Options:
    """How a run is cut. `chunk` (rng -> tokens) bounds a prefill row; `at_once` sequences run together; `scatter` shuffles free blocks;
    `share` lets a sequence start on the full blocks of an earlier equal prefix; `preempt` is the chance per step to drop a running sequence; `lookahead` (rng ->
    drafts) is how many a step puts behind what it draws; the next one verifies them all. `told` (job ->
    tokens) are drafts that the host writes there instead, as many as the runner verifies. `unread`: the chance that drafters do not look at a sequence that enters a slot; `late`:
    the chance per step that they do afterwards."""

    chunk: Callable[[random.Random], int] | None = None
    at_once: int | None = None
    scatter: bool = False
    share: bool = False
    preempt: float = 0.0
    seed: int = 0
    lookahead: Callable[[random.Random], int] | None = None
    told: Callable[[Job], Sequence[int]] | None = None
    unread: float = 0.0
    late: float = 0.0


class Driver:
    """Runs jobs on a runner. One driver owns the runner's blocks and slots while it lives."""

    def __init__(self, runner: Drivable, options: Options | None = None) -> None:
        self.runner = runner
        self.options = options or Options()
        self.rng = random.Random(self.options.seed)
        self.free = list(range(runner.num_blocks))
        if self.options.scatter:
            self.rng.shuffle(self.free)
        else:
            self.free.reverse()
        self.refs: dict[int, int] = {}
        self.cache: dict[bytes, int] = {}
        self.steps = 0
        self.ahead = 0
        self.accepted = 0
        """Drafts that were right, of those `drafted` that were verified."""
        self.drafted = 0

    def run(self, jobs: Sequence[Job]) -> None:
        """Run all jobs to their end."""
        waiting = list(jobs)
        running: list[Job] = []
        slots = list(range(self.runner.max_num_seqs))
        limit = min(self.options.at_once or len(slots), len(slots))
        while waiting or running:
            if running and self.rng.random() < self.options.preempt:
                victim = running.pop(self.rng.randrange(len(running)))
                slots.append(victim.slot)
                self._drop(victim)
                waiting.insert(0, victim)
            fresh: list[Job] = []
            while waiting and len(running) < limit and len(self.free) >= self._blocks_of(waiting[0]):
                job = waiting.pop(0)
                job.slot = slots.pop(0)
                job.unread = bool(self.options.unread) and self.rng.random() < self.options.unread
                self._admit(job)
                fresh.append(job)
                running.append(job)
            if not running:
                raise MemoryError("a job does not fit into the runner's cache")
            self._step(running, fresh)
            for job in [job for job in running if job.done]:
                running.remove(job)
                slots.append(job.slot)
                self._drop(job)

    def _blocks_of(self, job: Job) -> int:
        return -(-(len(job.prompt) + job.max_tokens - 1) // self.runner.block_size)  # the last token is never computed

    def _admit(self, job: Job) -> None:
        size = self.runner.block_size
        history = np.concatenate([job.prompt, i32(job.tokens)])
        job.blocks = []
        if self.options.share:
            for index in range((len(history) - 1) // size):
                block = self.cache.get(history[: (index + 1) * size].tobytes())
                if block is None:
                    break
                job.blocks.append(block)
        job.shared = len(job.blocks)
        job.computed = job.shared * size
        job.blocks += [self.free.pop() for _ in range(self._blocks_of(job) - job.shared)]
        for block in job.blocks:
            self.refs[block] = self.refs.get(block, 0) + 1

    def _drop(self, job: Job) -> None:
        for index, block in enumerate(job.blocks):
            self.refs[block] -= 1
            kept = self.options.share and (index + 1) * self.runner.block_size <= job.computed
            if self.refs[block] == 0 and not (kept and block in self.cache.values()):
                self.free.insert(0, block)
        job.blocks, job.computed, job.slot, job.drafts = [], 0, -1, 0

    def _step(self, running: Sequence[Job], fresh: Sequence[Job]) -> None:
        rows: list[tuple[Job, int]] = []
        budget = self.runner.max_num_batched_tokens
        lookahead = self.ahead
        self.ahead = ahead = 0 if self.options.lookahead is None else self.options.lookahead(self.rng)
        decode: set[int] = set()
        written: list[tuple[Job, list[int]]] = []
        for job in running:
            if self.options.told is not None and job.known - job.computed == 1 and job.tokens and budget > 1:
                room = min(self.runner.lookahead, job.max_tokens - len(job.tokens) - 1, budget - 1)
                written.append((job, list(self.options.told(job))[: max(0, room)]))
                job.drafts = len(written[-1][1])
                lookahead = max(lookahead, job.drafts)
            left = job.known - job.computed
            if left == 1 and job.drafts and lookahead and budget > 0:
                left += min(lookahead, job.drafts, job.max_tokens - len(job.tokens) - 1, budget - 1)
                decode.add(id(job))
                job.drafts = left - 1
                rows.append((job, left))
                budget -= left
                continue
            job.drafts = 0
            cut = self.options.chunk(self.rng) if self.options.chunk is not None and left > 1 else left
            count = max(1, min(left, cut, budget))
            if budget > 0:
                rows.append((job, count))
                budget -= count
        rows.sort(key=lambda row: row[1] != 1 and id(row[0]) not in decode)
        asks = [index for index, (job, _) in enumerate(rows) if job.params.prompt_logprobs is not None and job.computed < len(job.prompt)]
        self.steps += 1
        late = [job for job in running if job.unread and job not in fresh and self.rng.random() < self.options.late]
        for job in late:
            job.unread = False
        self.runner.forward(
            Forward(
                engine=0,
                epoch=0,
                step=self.steps,
                slots=i32([job.slot for job, _ in rows]),
                starts=i32([job.computed for job, _ in rows]),
                counts=i32([count for _, count in rows]),
                num_decode=sum(1 for job, count in rows if count == 1 or id(job) in decode),
                lookahead=lookahead,
                **placing(fresh),
                place_unread=u8([job.unread for job in fresh]) if self.options.unread else EMPTY_U8,
                read_slots=i32([job.slot for job in late]),
                prompt_rows=i32(asks),
                write_slots=i32([job.slot for job, drafts in written for _ in drafts]),
                write_positions=i32([job.known + at for job, drafts in written for at in range(len(drafts))]),
                write_tokens=i32([token for _, drafts in written for token in drafts]),
            )
        )
        draw = [index for index, (job, count) in enumerate(rows) if job.computed + count >= job.known]
        done = self.runner.sample(
            Sample(
                engine=0,
                epoch=0,
                step=self.steps,
                rows=i32(draw),
                slots=i32([rows[index][0].slot for index in draw]),
                positions=i32([rows[index][0].known for index in draw]),
                places=samplings(fresh),
                lookahead=lookahead,
                drafts=ahead,
                prompt_rows=i32(asks),
                prompt_topk=i32([rows[index][0].params.prompt_logprobs or 0 for index in asks]),
            )
        )()
        if len(done.bad_rows):
            raise CheckpointError(
                "The model's logits are not finite (NaN or infinite) when it is tried at start: its weights are broken, or overflow in this dtype. Copy the"
                " checkpoint again, or give another --dtype.",
                param="model",
            )
        counts = done.counts.tolist() if lookahead else [1] * len(draw)
        for (job, count), took in zip(rows, _spread(draw, counts, len(rows)), strict=True):
            job.computed += count - job.drafts + max(0, took - 1)
            self.drafted += job.drafts
            job.drafts = 0
        values = logprobs_of(done)
        every, at = done.tokens.tolist(), 0
        for number, (index, count) in enumerate(zip(draw, counts, strict=True)):
            job = rows[index][0]
            for token in every[at : at + count]:
                job.tokens.append(token)
                if at in values:
                    job.logprobs.append(values[at])
                at += 1
            self.accepted += count - 1
            job.drafts = int((done.drafts[number * ahead : (number + 1) * ahead] >= 0).sum())
        if at != len(every):
            raise EngineFailure(f"A step said that it drew {at} tokens, and brought {len(every)}.")
        if self.options.share:
            size = self.runner.block_size
            for job, _ in rows:
                history = np.concatenate([job.prompt, i32(job.tokens)])
                for index in range(job.computed // size):
                    self.cache.setdefault(history[: (index + 1) * size].tobytes(), job.blocks[index])
        if done.prompt_logprobs is not None:
            collect_prompts(done, [rows[index][0] for index in asks])


def placing(fresh: Sequence[Job]) -> dict[str, Any]:
    """Columns of Forward that put jobs into their slots: their tokens, and their blocks."""
    places, sizes = [np.concatenate([job.prompt, i32(job.tokens)]) for job in fresh], [len(job.blocks) for job in fresh]
    slots = i32([job.slot for job in fresh])
    return {
        "place_slots": slots,
        "place_counts": i32([len(tokens) for tokens in places]),
        "place_tokens": np.concatenate(places) if places else EMPTY_I32,
        "block_slots": np.repeat(slots, sizes),
        "block_index": i32([index for size in sizes for index in range(size)]),
        "block_ids": i32([block for job in fresh for block in job.blocks]),
    }


def samplings(fresh: Sequence[Job]) -> list[SlotSampling]:
    """How they want to be drawn for, as Sample says it."""
    return [
        SlotSampling(slot=job.slot, choice=job.choice, prompt_len=len(job.prompt), params=job.params, stop_ids=i32(job.stop_ids))
        for job in fresh
    ]


def _spread(draw: Sequence[int], counts: Sequence[int], rows: int) -> list[int]:
    """Tokens that each row drew."""
    found = [0] * rows
    for index, count in zip(draw, counts, strict=True):
        found[index] = count
    return found


def logprobs_of(done: StepDone) -> dict[int, bytes]:
    """Row of the step -> its log-probabilities as bytes."""
    columns = done.logprobs
    if columns is None:
        return {}
    ends = np.cumsum(columns.counts)
    return {
        int(row): columns.values[end - count : end].tobytes() for row, end, count in zip(columns.rows, ends, columns.counts, strict=True)
    }


def collect_prompts(done: StepDone, jobs: Sequence[Job]) -> None:
    columns = done.prompt_logprobs
    assert columns is not None
    at = 0
    for row, position, count in zip(columns.rows.tolist(), columns.positions.tolist(), columns.counts.tolist(), strict=True):
        jobs[row].prompt_logprobs[position] = (columns.ids[at : at + count].tolist(), columns.values[at : at + count].tolist())
        at += count
