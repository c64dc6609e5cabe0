"""Drives a runner with several steps in flight: what the scheduler does with Forward.loose, for tests and benchmarks without one.

What it is: decode rows are planned from bounds while steps with drafts are under way, and a result is looked at only when so many steps are in flight. Prompts are
computed one after the other beside the others' decodes. A step's width changes as `widths` says.
What it does not know: policies, preemption, shared blocks (driver.py has those), how a runner computes.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from penstock.core.protocol.columns import EMPTY_U8, i32
from penstock.core.protocol.errors import EngineFailure
from penstock.core.protocol.messages import Forward, Sample, StepDone
from penstock.plugins.devices.driver import Drivable, Job, collect_prompts, logprobs_of, placing, samplings


@dataclass
class _Flight:
    wait: Callable[[], StepDone]
    rows: list[tuple[Job, int]]
    """Who draws, and how many drafts each computed along."""
    asks: list[Job]
    lookahead: int
    drafts: int


class AheadDriver:
    """Runs jobs to their ends, at most as many as there are slots and blocks for."""

    def __init__(self, runner: Drivable, widths: Sequence[int], *, depth: int = 2) -> None:
        """`widths`: how many drafts step after step makes, from the first on again when they are used up."""
        self.runner = runner
        self.steps = 0
        self.accepted = 0
        self.loose = 0
        """Rows that were planned before it was known where they begin."""
        self._widths = itertools.cycle(widths)
        self._depth = depth
        self._flights: deque[_Flight] = deque()
        self._bound: dict[int, int] = {}
        """By slot: tokens that its history has at most, when everything in flight has landed."""

    def run(self, jobs: Sequence[Job]) -> None:
        """Run all jobs to their ends."""
        size, at = self.runner.block_size, 0
        for slot, job in enumerate(jobs):
            count = -(-(len(job.prompt) + job.max_tokens) // size)
            job.slot, job.blocks, at = slot, list(range(at, at + count)), at + count
        waiting = list(jobs)
        while waiting or self._flights or not all(job.done for job in jobs):
            while len(self._flights) < self._depth and self._plan(jobs, waiting):
                pass
            if not self._flights:
                raise EngineFailure("Jobs are left, but none of them can go on.")
            self._land(self._flights.popleft())

    def _plan(self, jobs: Sequence[Job], waiting: list[Job]) -> bool:
        drafting = {job.slot for flight in self._flights if flight.drafts or flight.lookahead for job, _ in flight.rows}
        rows: list[tuple[Job, int]] = []
        for job in jobs:
            if job.slot in self._bound and self._bound[job.slot] < len(job.prompt) + job.max_tokens:
                room = len(job.prompt) + job.max_tokens - self._bound[job.slot] - 1
                rows.append((job, min(job.drafts, room, self.runner.lookahead)))
        budget = self.runner.max_num_batched_tokens - sum(1 + ahead for _, ahead in rows)
        parts = [] if not waiting or budget < 1 else [(waiting[0], min(budget, len(waiting[0].prompt) - waiting[0].computed))]
        if not rows and not parts:
            return False
        fresh = [job for job, _ in parts if not job.computed]
        drawing = [job for job, count in parts if job.computed + count == len(job.prompt)]
        starts = [self._bound[job.slot] - 1 for job, _ in rows] + [job.computed for job, _ in parts]
        counts = [1 + ahead for _, ahead in rows] + [count for _, count in parts]
        loose = [job.slot in drafting for job, _ in rows]
        everybody = [job for job, _ in rows] + [job for job, _ in parts]
        asks = [index for index in range(len(rows), len(everybody)) if everybody[index].params.prompt_logprobs is not None]
        draws = everybody[: len(rows)] + drawing
        lookahead, drafts = max((ahead for _, ahead in rows), default=0), next(self._widths)
        self.steps += 1
        self.loose += sum(loose)
        slots = i32([job.slot for job in everybody])
        named: dict[str, Any] = {"engine": 0, "epoch": 0, "step": self.steps}
        self.runner.forward(
            Forward(
                **named,
                slots=slots,
                starts=i32(starts),
                counts=i32(counts),
                num_decode=len(rows),
                lookahead=lookahead,
                loose=np.array([*loose, *[0 for _ in parts]], np.uint8) if any(loose) else EMPTY_U8,
                **placing(fresh),
                prompt_rows=i32(asks),
            )
        )
        wait = self.runner.sample(
            Sample(
                **named,
                rows=i32(range(len(draws))),
                slots=slots[: len(draws)],
                positions=i32([*(start + 1 for start in starts[: len(rows)]), *(len(job.prompt) for job in drawing)]),
                places=samplings(fresh),
                lookahead=lookahead,
                drafts=drafts,
                prompt_rows=i32(asks),
                prompt_topk=i32([everybody[index].params.prompt_logprobs or 0 for index in asks]),
            )
        )
        for job, ahead in rows:
            self._bound[job.slot] += 1 + ahead
        for job, count in parts:
            job.computed += count
        for job in drawing:
            waiting.remove(job)
            self._bound[job.slot] = len(job.prompt) + 1
        for job in draws:
            job.drafts = drafts
        self._flights.append(
            _Flight(wait, [*rows, *((job, 0) for job in drawing)], [everybody[index] for index in asks], lookahead, drafts)
        )
        return True

    def _land(self, flight: _Flight) -> None:
        done = flight.wait()
        counts = done.counts.tolist() if flight.lookahead else [1] * len(flight.rows)
        values, at = logprobs_of(done), 0
        where = [] if done.logprobs is None else done.logprobs.positions.tolist()
        for (job, ahead), count in zip(flight.rows, counts, strict=True):
            self._bound[job.slot] -= 1 + ahead - count
            self.accepted += count - 1
            for token in done.tokens[at : at + count].tolist():
                if at in values:
                    if where.pop(0) != job.known:
                        raise EngineFailure("A log-probability is of another position than its token.")
                    job.logprobs.append(values[at])
                job.tokens.append(token)
                at += 1
        self._exact(flight, done)
        if done.prompt_logprobs is not None:
            collect_prompts(done, flight.asks)

    def _exact(self, flight: _Flight, done: StepDone) -> None:
        """Of rows that no step in flight names it is known which drafts stand."""
        named = {job.slot for other in self._flights for job, _ in other.rows}
        for number, (job, _) in enumerate(flight.rows):
            if job.slot not in named:
                job.drafts = int((done.drafts[number * flight.drafts : (number + 1) * flight.drafts] >= 0).sum())
