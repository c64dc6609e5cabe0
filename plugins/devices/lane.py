"""A stream, its events, its pinned memory and its graphs, behind one small face.

What it is: `CudaLane`, and `HostLane`, which does the same on host memory at once, so that everything above runs and is tested without a GPU
(a captured graph is a call that is made again; its outputs stay at their addresses, as a real graph's do).
What it does not know: models, steps, slots.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

Outputs = tuple[torch.Tensor, ...]


class Event(Protocol):
    """A point in the lane's work."""

    def record(self) -> None: ...

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Any) -> float:
        """Milliseconds until `end`."""
        ...


class Graph(Protocol):
    """A captured piece of work. `outputs` stay at their addresses and are overwritten by each replay."""

    outputs: Outputs

    def replay(self) -> None: ...


class Lane(Protocol):
    device: torch.device
    direct: bool
    """Its memory is the host's and nothing is ever under way: columns need not be copied."""
    waits: int
    """Times that a launching call had to wait for the device: 0, unless a ring is too short."""

    def bind(self) -> None:
        """Make this lane the current one on the calling thread."""
        ...

    def pinned(self, count: int) -> torch.Tensor:
        """[count] int32 on the host, page-locked where that means something."""
        ...

    def event(self) -> Event: ...

    def capture(self, body: Callable[[], Outputs]) -> Graph: ...

    def copy_beside(self, target: torch.Tensor, source: torch.Tensor, free: Event, done: Event) -> None:
        """Copy while the lane is at work, as soon as `free` has happened; what is enqueued from here on comes after `done`."""
        ...

    def forget(self) -> None:
        """All graphs are gone: the next one takes memory of its own."""
        ...

    def synchronize(self) -> None:
        """Wait for everything. Never in the step loop."""
        ...

    def used(self) -> int:
        """Bytes of the device that are taken, by whomever."""
        ...

    def loading(self) -> AbstractContextManager[None]:
        """While weights come: what they needed on the way can be given back whole."""
        ...


class CudaLane:
    """One CUDA stream; graphs share one memory pool, since replays never overlap."""

    direct = False

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.waits = 0
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._beside: torch.cuda.Stream | None = None
        self._pool: Any = None

    def bind(self) -> None:
        torch.cuda.set_stream(self._stream)

    def pinned(self, count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.int32, pin_memory=True)

    def event(self) -> Event:
        return _CudaEvent(self._stream)

    def capture(self, body: Callable[[], Outputs]) -> Graph:
        """Capture without synchronising: the stream may be busy, and the waiter thread may wait on events meanwhile (thread-local mode)."""
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            outputs = body()
        finally:
            graph.capture_end()
        return _CudaGraph(graph, outputs)

    def copy_beside(self, target: torch.Tensor, source: torch.Tensor, free: Event, done: Event) -> None:
        assert isinstance(free, _CudaEvent)
        assert isinstance(done, _CudaEvent)
        if self._beside is None:
            self._beside = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        free.hold(self._beside)
        with torch.cuda.stream(self._beside):
            target.copy_(source, non_blocking=True)
        done.record_on(self._beside)
        done.hold(self._stream)

    def forget(self) -> None:
        self._pool = None

    def synchronize(self) -> None:
        self._stream.synchronize()

    def used(self) -> int:
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        # Weights that are rounded on the device leave holes where the wide ones were: 10 GB of a 70B model. Segments that grow and shrink page by page have none.
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
        try:
            yield
        finally:
            torch._C._accelerator_setAllocatorSettings("expandable_segments:False")
            torch.cuda.empty_cache()


class _CudaEvent:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        # blocking: who waits sleeps. A spinning waiter takes a core for nothing, since the next step is under way by then.
        self._event = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
        self._stream = stream

    def record(self) -> None:
        self._event.record(self._stream)

    def record_on(self, stream: torch.cuda.Stream) -> None:
        self._event.record(stream)

    def hold(self, stream: torch.cuda.Stream) -> None:
        """What comes next on that stream waits for the event, if it was ever recorded."""
        self._event.wait(stream)

    def query(self) -> bool:
        return bool(self._event.query())  # type: ignore[no-untyped-call]

    def synchronize(self) -> None:
        self._event.synchronize()

    def elapsed_time(self, end: Any) -> float:
        return float(self._event.elapsed_time(end._event))


class _CudaGraph:
    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: Outputs) -> None:
        self._graph = graph
        self.outputs = outputs

    def replay(self) -> None:
        self._graph.replay()


class HostLane:
    """Everything happens at once, on the calling thread. `direct` is for the CPU as a device; without it, columns travel as they would to
    another one, and `make_event` lets tests hold results back."""

    def __init__(self, make_event: Callable[[], Event] | None = None, *, direct: bool = False) -> None:
        self.device = torch.device("cpu")
        self.direct = direct
        self.waits = 0
        self._make_event = make_event or _HostEvent

    def bind(self) -> None:
        """There is one lane on a host."""

    def pinned(self, count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.int32)

    def event(self) -> Event:
        return self._make_event()

    def capture(self, body: Callable[[], Outputs]) -> Graph:
        return _HostGraph(body)

    def copy_beside(self, target: torch.Tensor, source: torch.Tensor, free: Event, done: Event) -> None:
        target.copy_(source)
        done.record()

    def forget(self) -> None:
        """Graphs take no memory here."""

    def synchronize(self) -> None:
        """Nothing is ever under way."""

    def used(self) -> int:
        return 0

    def loading(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()


class _HostEvent:
    def __init__(self) -> None:
        self._at = 0.0

    def record(self) -> None:
        self._at = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        """It is over already."""

    def elapsed_time(self, end: Any) -> float:
        return (float(end._at) - self._at) * 1e3


class _HostGraph:
    def __init__(self, body: Callable[[], Outputs]) -> None:
        self._body = body
        self.outputs: Outputs = ()

    def replay(self) -> None:
        """The first one makes the outputs: capturing runs nothing."""
        fresh = self._body()
        if not self.outputs:
            self.outputs = tuple(output.clone() for output in fresh)
        for kept, value in zip(self.outputs, fresh, strict=True):
            kept.copy_(value)
