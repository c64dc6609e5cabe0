"""A section on a device: candidates compiled, checked and timed.

What it is: `DeviceStand`, the search's stand. Launches take a candidate because `gpu.trying` puts it in the place of the tables, so that it is checked and
timed through the kernel's own entry. A time is that of a captured graph of the load's calls, replayed. Results are poisoned before each check, computed twice (what
counts arrivals must leave its counters as they were) and compared with torch, and, where other tables share its rows, with the bits of what is in use.
What it does not know: how a winner is found (search.py), files.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from penstock.kernels import gpu
from penstock.kernels.tuning.run import Job
from penstock.kernels.tuning.search import Lost, Tiles, key_of
from penstock.kernels.tuning.section import Card, Check, Load, Room, Section, Shape, poison

REPLAYS, SECONDS = 12, 0.012
"""Of one time: at most so many, and about so long."""
ROTATED = 4
"""Times the caches' size that copies take."""


def room_of(device: torch.device) -> Room:
    """Where loads are timed."""
    facts = torch.cuda.get_device_properties(device)
    return Room(device, rotate_bytes=ROTATED * int(getattr(facts, "L2_cache_size", 0) or 64 << 20))


class DeviceStand:
    """See search.py: Stand. `present`: what is in use."""

    def __init__(self, section: Section, shapes: Sequence[Shape], room: Room, present: Tiles, others: Tiles | None = None) -> None:
        """`others`: of other tables, in use from now on. Raises MemoryError."""
        makers = {name: make for shape in shapes for name, make in section.loads(shape).items()}
        self.loads = list(makers)
        self._present, self._others = present, dict(others or {})
        self._room = room
        try:
            self._loads: list[Load] = [make(room) for make in makers.values()]
        except torch.OutOfMemoryError as error:
            room.clear()
            raise MemoryError(str(error)) from None
        self._truths: dict[tuple[int, int], Tensor] = {}
        self._bits: dict[tuple[int, int], Tensor] = {}
        self._results: dict[tuple[int, int], Tensor] = {}
        self._graphs: dict[tuple[str, int], torch.cuda.CUDAGraph] = {}
        self._pool: Any = None
        self._stream: Any = None
        self.other_bits: set[str] = set()
        """Candidates (`key_of`) with results other than those of what is in use."""

    def prepare(self, candidates: Sequence[Tiles]) -> None:
        """See Stand. Nothing runs."""
        if gpu.interpreting():
            return
        with gpu.compile_only():
            for candidate in candidates:
                with gpu.trying({**self._others, **candidate}):
                    for load in self._loads:
                        exact = (check.truth for check in load.checks if check.exact)
                        for call in (*load.calls[: load.distinct], *(check.call for check in load.checks), *exact):
                            try:
                                call()
                            except Exception:  # said by `check`
                                break

    def check(self, candidate: Tiles) -> str | None:
        """See Stand."""
        with gpu.trying({**self._others, **candidate}):
            try:
                for number, load in enumerate(self._loads):
                    for index, check in enumerate(load.checks):
                        wrong = self._wrong(candidate, (number, index), check)
                        if wrong:
                            return f"{self.loads[number]}: {wrong}"
            except Exception as error:
                return self._failed(candidate, error)
        return None

    def _wrong(self, candidate: Tiles, at: tuple[int, int], check: Check) -> str | None:
        """What is wrong with a result, if anything is."""
        results = []
        for _ in range(2):
            self._room.poison()
            if at in self._results:
                poison(self._results[at])
            result = check.call()
            self._results[at] = result
            results.append(result.clone())
        if not same(*results):
            return "two runs differ"
        if check.exact:
            return None if same(results[0], check.truth()) else "its bits depend on the batch"
        if at not in self._truths:
            self._truths[at] = check.truth()
        wrong = differs(results[0], self._truths[at], check.tolerance)
        if wrong is None:
            if candidate == self._present or at not in self._bits:
                self._bits.setdefault(at, results[0])
            if not same(results[0], self._bits[at]):
                self.other_bits.add(key_of(candidate))
                if check.pinned:
                    return "its bits are not those of the other tiles that take rows of the same batch"
        return wrong

    def _failed(self, candidate: Tiles, error: Exception) -> str:
        """An error's text; raises Lost where the device is gone."""
        text = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        if not gpu.interpreting():
            try:
                torch.cuda.synchronize()
            except Exception as fatal:
                raise Lost(f"{key_of(candidate)}: {text}") from fatal
        return text

    def time(self, candidate: Tiles, load: int) -> float:
        """See Stand: of each of the load's distinct calls once. Raises MemoryError or Lost."""
        try:
            return self._time(self._graph(candidate, load), load)
        except torch.OutOfMemoryError as error:
            raise MemoryError(str(error)) from None
        except RuntimeError as error:  # it has run before, when it was checked
            raise Lost(f"{key_of(candidate)}: {error}") from error

    def _time(self, graph: torch.cuda.CUDAGraph, load: int) -> float:
        calls = self._loads[load]
        clocks: Any = torch.cuda.Event
        events = [(clocks(enable_timing=True), clocks(enable_timing=True)) for _ in range(REPLAYS)]
        graph.replay()
        count = REPLAYS
        for index, (before, after) in enumerate(events):
            before.record()
            graph.replay()
            after.record()
            if index == 0:
                after.synchronize()
                count = max(3, min(REPLAYS, int(SECONDS / max(1e-6, before.elapsed_time(after) / 1e3))))
            if index + 1 == count:
                break
        torch.cuda.synchronize()
        turns = len(calls.calls) / calls.distinct
        median: float = statistics.median(before.elapsed_time(after) for before, after in events[:count])
        return median / 1e3 / turns

    def _graph(self, candidate: Tiles, load: int) -> torch.cuda.CUDAGraph:
        key = key_of(candidate), load
        streams: Any = torch.cuda
        if key not in self._graphs:
            with gpu.trying({**self._others, **candidate}):
                for call in self._loads[load].calls[: self._loads[load].distinct]:
                    call()
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                if self._pool is None:
                    self._pool, self._stream = torch.cuda.graph_pool_handle(), streams.Stream()
                with torch.cuda.stream(self._stream):  # torch.cuda.graph would empty the allocator's cache each time
                    graph.capture_begin(pool=self._pool)
                    try:
                        for call in self._loads[load].calls:
                            call()
                    finally:
                        graph.capture_end()
            self._graphs[key] = graph
        return self._graphs[key]

    def close(self) -> None:
        """Give the memory back."""
        self._graphs.clear()
        self._loads.clear()
        self._room.clear()
        for kept in (self._truths, self._bits, self._results):
            kept.clear()


def same(ours: Tensor, theirs: Tensor) -> bool:
    """Bit by bit, but for NaN's."""
    return ours.shape == theirs.shape and bool(((ours == theirs) | (ours.isnan() & theirs.isnan())).all())


def differs(result: Tensor, truth: Tensor, tolerance: float) -> str | None:
    """See section.py: Check."""
    wide, truth = result.float(), truth.float()
    if not bool(wide.isfinite().all()):
        return "its results are not finite, or not all written"
    bound = tolerance * (truth.square().mean().sqrt() + truth.abs())
    worst = float(((wide - truth).abs() / bound).max())
    return f"its largest error is {worst:.1f} times what rounding explains" if worst > 1 else None


def job_of(section: Section, shapes: Sequence[Shape], card: Card) -> Job:
    """What is to be done for a section: candidates upon the tile in use, each once."""
    base = dict(gpu.tuned(section.name))
    made = {key_of(one): one for one in ({section.name: {**base, **tile}} for tile in section.candidates(card))}
    loads = [name for shape in shapes for name in section.loads(shape)] if card.hopper or not section.hopper else []
    return Job(section.name, section.what, {section.name: base}, list(made.values()), loads)


def card_of(device: torch.device) -> Card:
    """Of a device, or without one of the card that the candidates are written for."""
    if device.type != "cuda":
        return Card()
    major, _ = torch.cuda.get_device_capability(device)
    return Card(torch.cuda.get_device_properties(device).multi_processor_count, major >= 9, major == 9)
