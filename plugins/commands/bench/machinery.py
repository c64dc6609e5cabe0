"""`penstock bench machinery`: what the scheduler computes a step, from a StepDone to the next Sample.

What it is: the scheduler as the engine has it and the KV manager behind it, in one thread, with a device that computes nothing: it says at once that every row has
drawn, with drafts as many of them right as a seed says. Microseconds a step: the median of a run (and the mean, which steps that are longer now and then count in), and of
several runs the lowest and the median. In a run of its own each part is timed, calls of other parts left out; what that costs makes the parts' sum a little more than
the whole. What the KV manager computes is told, and counts nowhere.
What it does not know: processes, sockets, models.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from penstock.core.actors.kv import KvManager
from penstock.core.actors.scheduler import Scheduler, SchedulerSettings
from penstock.core.protocol.columns import EMPTY_I32, i32
from penstock.core.protocol.hashing import CacheKey
from penstock.core.protocol.messages import Admit, Forward, KvStep, Message, Plan, Sample, StepDone, StepTokens
from penstock.core.protocol.sampling import SamplingParams
from penstock.core.runtime.actor import Ask
from penstock.core.runtime.clock import FakeClock
from penstock.plugins.policies.fcfs import FirstComeFirstServed

SETTLED = 150
"""Steps before the first that is timed: the widths have been learned by then."""
STEP_NS = 10_000_000
"""Of each step, as the device says: the same with drafts and without, so that the most drafts are the best."""
KV = "the KV manager"

BEHIND: dict[type, str] = {StepTokens: "planning, the rest", Forward: "Sample", Sample: "behind the Sample"}
FIRST = "landing, the rest"
OF_DRAFTING = {
    "landed": "drafts: learning",
    "_verified": "drafts: which were right",
    "_stand": "drafts: which stand",
    "choose": "drafts: choosing the width",
    "share": "drafts: sharing",
    "launched": "drafts: launched",
    "loose": "drafts: who is loose",
    "stats": "drafts: statistics",
}
OF_LANDING = {"_spread": "where each token goes", "_single": "where each token goes", "_receive": "histories and bounds"}
OF_SLOTS = {"short": "who needs blocks", "reach": "who needs blocks", "hold": "who needs blocks", "narrow": "drafts: sharing"}


class Bench:
    """`rows` sequences that all go on, with `drafts` each (0: there are no drafters); `gaps`: between any two slots that are taken one is free."""

    def __init__(self, rows: int, drafts: int, *, block: int, depth: int, steps: int, gaps: bool = False, seed: int = 0) -> None:
        longest = 64 + (SETTLED + steps + 8) * (1 + drafts)
        slots = 2 * rows if gaps else rows
        blocks = slots * (-(-longest // block) + 1)
        settings = SchedulerSettings(
            engine=0, epoch=1, max_num_seqs=slots, max_num_batched_tokens=max(2048, slots * (1 + drafts)), max_model_len=longest,
            block_size=block, num_blocks=2 * blocks, depth=depth, lookahead=drafts, loose=depth > 1,
        )  # fmt: skip
        self.clock = FakeClock()
        self.scheduler = Scheduler(settings, FirstComeFirstServed(), self.clock)
        self._kv = KvManager(2 * blocks, block, enable_prefix_caching=True)
        self._random = np.random.default_rng(seed)
        self._queue: deque[Message] = deque()
        self._flying: deque[tuple[Forward, Sample]] = deque()
        self._kv_ns = 0
        self.parts: Parts | None = None
        self._forward: Forward | None = None
        root = CacheKey(weights="bench", layout="bench").root()
        for key in range(slots):
            ends = gaps and key % 2 > 0
            self._queue.append(
                Admit(
                    key=key + 1, incarnation=1, prompt=i32([key % 500] * (20 + key % 16)), hashes=b"", root_hash=root, choices=i32([0]),
                    sampling=SamplingParams(temperature=0), max_tokens=4 if ends else longest, eos=i32([2]), arrival_ns=key,
                )
            )  # fmt: skip
        self._route()
        while not self._flying or self._flying[0][1].rows.size != rows:
            self.step()

    def step(self) -> tuple[int, int, bool]:
        """One StepDone: ns until it is handled and the next Sample is out, those of the KV manager, and whether it was a step with drafts or there are none at all."""
        forward, sample = self._flying.popleft()
        self._queue.append(self._done(forward, sample))
        wide = sample.lookahead > 0 or not self.scheduler.settings.lookahead
        self._kv_ns = 0
        if self.parts is not None:
            self.parts.begin()
        begun = time.perf_counter_ns()
        self._route()
        return time.perf_counter_ns() - begun - self._kv_ns, self._kv_ns, wide

    def _done(self, forward: Forward, sample: Sample) -> StepDone:
        self.clock.advance(STEP_NS / 1e9)
        now, rows = self.clock.now_ns(), sample.rows.size
        counts, drawn = EMPTY_I32, rows
        if sample.lookahead:
            counts = self._random.integers(1, forward.counts[sample.rows], endpoint=True, dtype=np.int32)
            drawn = int(counts.sum())
        drafts = np.full(rows * sample.drafts, 7, np.int32)
        return StepDone(
            engine=0, epoch=1, step=sample.step, slots=sample.slots, tokens=np.full(drawn, 5, np.int32), counts=counts, drafts=drafts,
            started_ns=now - STEP_NS, finished_ns=now,
        )  # fmt: skip

    def _route(self) -> None:
        """What the cell does."""
        queue, kv, parts = self._queue, self._kv, self.parts
        while queue:
            handling: Any = self.scheduler.handle(queue.popleft())
            if not hasattr(handling, "send"):
                queue.extend(handling)
                continue
            answer: Any = None
            while True:
                try:
                    out = handling.send(answer)
                except StopIteration:
                    break
                answer, kind = None, type(out)
                if kind is Ask:
                    assert type(out.question) is KvStep
                    if parts is not None:
                        parts.enter(KV)
                    begun = time.perf_counter_ns()
                    (answer,) = kv.handle(out.question)
                    self._kv_ns += time.perf_counter_ns() - begun
                    if parts is not None:
                        parts.leave()
                elif kind is Plan:
                    queue.append(out)
                elif kind is Forward:
                    self._forward = out
                elif kind is Sample:
                    assert self._forward is not None
                    self._flying.append((self._forward, out))
                if parts is not None and kind in BEHIND:
                    parts.begin_rest(BEHIND[kind])


class Parts:
    """Where the time goes: methods that are timed while `on`, each without what it calls of the others; and the rest, by the message that it is before."""

    def __init__(self, scheduler: Scheduler) -> None:
        board = scheduler._board
        self.ns: dict[str, int] = {}
        self.rest = FIRST
        self._open: list[str] = []
        self._at = 0
        self._undo: list[tuple[Any, str]] = []
        for owner, named in ((board.drafting, OF_DRAFTING), (scheduler._landing, OF_LANDING), (board.slots, OF_SLOTS)):
            if owner is not None:
                for name, part in named.items():
                    setattr(owner, name, self._timed(getattr(owner, name), part))
                    self._undo.append((owner, name))

    def close(self) -> None:
        for owner, name in self._undo:
            delattr(owner, name)

    def _timed(self, method: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*given: Any) -> Any:
            self.enter(part)
            found = method(*given)
            self.leave()
            return found

        return timed

    def _count(self) -> None:
        now = time.perf_counter_ns()
        part = self._open[-1] if self._open else self.rest
        self.ns[part] = self.ns.get(part, 0) + now - self._at
        self._at = now

    def enter(self, part: str) -> None:
        self._count()
        self._open.append(part)

    def leave(self) -> None:
        self._count()
        self._open.pop()

    def begin_rest(self, rest: str) -> None:
        self._count()
        self.rest = rest

    def begin(self) -> None:
        self.ns, self.rest, self._at = {}, FIRST, time.perf_counter_ns()

    def end(self) -> dict[str, int]:
        self._count()
        return self.ns


def measured(rows: int, drafts: int, *, block: int, depth: int, steps: int, repeats: int, gaps: bool = False) -> dict[str, Any]:
    """Of steps with so many rows: `us` (the lowest of the runs' medians), `median_us` (their median), `mean_us` and `kv_us` (the lowest of the means), and `parts` by name
    (medians)."""
    bench = Bench(rows, drafts, block=block, depth=depth, steps=steps * (repeats + 1) + 2, gaps=gaps)
    for _ in range(SETTLED):
        bench.step()
    runs: list[float] = []
    means: list[float] = []
    kv: list[float] = []
    for _ in range(repeats):
        taken = [(ns, kv_ns) for ns, kv_ns, wide in (bench.step() for _ in range(steps)) if wide]
        runs.append(statistics.median(ns for ns, _ in taken) / 1e3)
        means.append(
            statistics.fmean(sorted(ns for ns, _ in taken)[: len(taken) - len(taken) // 50]) / 1e3
        )  # but for what else ran meanwhile
        kv.append(statistics.fmean(kv_ns for _, kv_ns in taken) / 1e3)
    return {
        "rows": rows,
        "drafts": drafts,
        "us": min(runs),
        "median_us": statistics.median(runs),
        "mean_us": min(means),
        "kv_us": min(kv),
        "parts": _parts(bench, steps),
    }


def _parts(bench: Bench, steps: int) -> dict[str, float]:
    bench.parts = parts = Parts(bench.scheduler)
    found: list[dict[str, int]] = []
    for _ in range(steps):
        if bench.step()[2]:
            found.append(parts.end())
    bench.parts = None
    parts.close()
    names = dict.fromkeys(name for one in found for name in one if name != KV)
    medians = {name: statistics.median(one.get(name, 0) for one in found) / 1e3 for name in names}
    return dict(sorted(medians.items(), key=lambda one: -one[1]))


def table(results: list[dict[str, Any]]) -> Iterator[str]:
    """As Markdown: a row for the whole and each part, a column for each number of rows and drafts."""
    yield "| microseconds a step | " + " | ".join(f"{one['rows']} rows, {one['drafts']} drafts" for one in results) + " |"
    yield "|---" * (1 + len(results)) + "|"
    for name, key in (
        ("all", "us"),
        ("all, median run", "median_us"),
        ("all, mean", "mean_us"),
        ("besides: the KV manager, mean", "kv_us"),
    ):
        yield f"| {name} | " + " | ".join(f"{one[key]:.1f}" for one in results) + " |"
    for part in dict.fromkeys(part for one in results for part in one["parts"]):
        yield f"| {part} | " + " | ".join(f"{one['parts'][part]:.1f}" if part in one["parts"] else "" for one in results) + " |"
