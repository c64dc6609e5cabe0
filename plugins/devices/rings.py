"""What crosses between host and device in a step: columns up, results down.

What it is: rings of pinned buffers, one entry for each step that may be in flight and one more, so that the host writes a buffer only after
the device has read it. The scheduler's depth keeps that true by itself; an entry's event proves it (and `lane.waits` counts if it ever had to
be waited for).
What it does not know: what the numbers mean.
"""

from __future__ import annotations

import numpy as np
import torch

from penstock.core.protocol.columns import Column
from penstock.plugins.devices.lane import Event, Lane

Tensor = torch.Tensor
ALIGN = 4
"""Words."""


class _Entry:
    def __init__(self, lane: Lane, size: int) -> None:
        size = 0 if lane.direct else size
        self.pinned = lane.pinned(size)
        self.array = self.pinned.numpy()
        self.event: Event = lane.event()
        self.used = False

    def free(self, lane: Lane) -> None:
        if self.used and not self.event.query():
            lane.waits += 1
            self.event.synchronize()


class Upload:
    """int32 columns to the device in one copy. What `send` returns is overwritten by the next `send`, in the lane's order. Grows when a
    step needs more (placing long histories); with `fixed` it never moves, so that graphs may read it. With `beside` large columns travel while the lane
    computes, once all that was enqueued before `done_reading` has happened."""

    def __init__(self, lane: Lane, entries: int, size: int, *, fixed: bool = False, beside: bool = False) -> None:
        self._lane = lane
        self._fixed = fixed
        self._read: Event | None = lane.event() if beside else None
        self._entries = [_Entry(lane, size) for _ in range(entries)]
        self.staging = torch.zeros(0 if lane.direct else size, dtype=torch.int32, device=lane.device)
        self._next = 0
        self.copies = 0

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.staging.nbytes

    def _take(self, size: int) -> _Entry:
        index = self._next
        self._next = (index + 1) % len(self._entries)
        entry = self._entries[index]
        entry.free(self._lane)
        if size > entry.array.size:
            if self._fixed:
                raise ValueError(f"{size} words do not fit into a fixed upload of {entry.array.size}")
            entry = self._entries[index] = _Entry(self._lane, max(size, 2 * entry.array.size))
        if size > self.staging.numel():
            self.staging = torch.zeros(max(size, 2 * self.staging.numel()), dtype=torch.int32, device=self._lane.device)
        return entry

    def send(self, *columns: Column) -> list[Tensor]:
        """Device views of the columns, in order; each begins at a multiple of 16 bytes (kernels are compiled anew for other alignments). Of a
        direct lane, the columns themselves."""
        if self._lane.direct:
            return [torch.from_numpy(column if column.flags.writeable else column.copy()) for column in columns]
        sizes = [-(-column.size // ALIGN) * ALIGN for column in columns]
        total = sum(sizes)
        entry = self._take(total)
        views = []
        at = 0
        for column, size in zip(columns, sizes, strict=True):
            entry.array[at : at + column.size] = column
            views.append(self.staging[at : at + column.size])
            at += size
        self._copy(entry, total)
        return views

    def send_rows(self, width: int, padding: int, *columns: Column) -> None:
        """Columns of equal length n <= width, each at a multiple of `width`, the first padded with `padding`: a graph's fixed inputs."""
        entry = self._take(width * len(columns))
        count = columns[0].size
        entry.array[count:width] = padding
        for index, column in enumerate(columns):
            entry.array[index * width : index * width + count] = column
        self._copy(entry, width * len(columns))

    def send_parts(self, *parts: tuple[Column, int, int]) -> None:
        """(column, width, padding) one behind the other: a graph's fixed inputs, each filled up to its width."""
        total = sum(width for _, width, _ in parts)
        entry = self._take(total)
        at = 0
        for column, width, padding in parts:
            entry.array[at : at + column.size] = column
            entry.array[at + column.size : at + width] = padding
            at += width
        self._copy(entry, total)

    def _copy(self, entry: _Entry, total: int) -> None:
        if self._read is not None:
            self._lane.copy_beside(self.staging[:total], entry.pinned[:total], self._read, entry.event)
        else:
            self.staging[:total].copy_(entry.pinned[:total], non_blocking=True)
            entry.event.record()
        entry.used = True
        self.copies += 1

    def done_reading(self) -> None:
        """Everything that reads the columns is enqueued: the next ones may come when it has run."""
        if self._read is not None:
            self._read.record()


class Download:
    """One entry a step: `size` int32 words that come back, and the event that says so."""

    def __init__(self, lane: Lane, entries: int, size: int) -> None:
        self._lane = lane
        self._entries = [_Entry(lane, size) for _ in range(entries)]
        self._next = 0

    def take(self) -> Landing:
        """The next entry, to be filled by `Landing.bring` and closed by `Landing.close`."""
        entry = self._entries[self._next]
        self._next = (self._next + 1) % len(self._entries)
        entry.free(self._lane)
        return Landing(self._lane, entry)


class Landing:
    """Results of one step on their way to the host."""

    def __init__(self, lane: Lane, entry: _Entry) -> None:
        self._lane = lane
        self._entry = entry
        self._count = 0
        self._tokens: Tensor | None = None
        self._more: list[Tensor] = []

    def bring(self, tokens: Tensor) -> None:
        """tokens [R] int32: the part that every step has."""
        self._count = tokens.shape[0]
        if self._lane.direct:
            self._tokens = tokens
            return
        self._entry.pinned[: self._count].copy_(tokens, non_blocking=True)

    def also(self, value: Tensor) -> int:
        """Any 32-bit tensor, through memory of its own; returns its index for `more`."""
        flat = value.contiguous().view(-1).view(torch.int32)
        if self._lane.direct:
            self._more.append(flat)
            return len(self._more) - 1
        target = self._lane.pinned(flat.shape[0])
        target.copy_(flat, non_blocking=True)
        self._more.append(target)
        return len(self._more) - 1

    def close(self) -> Event:
        """Record the event. Nothing may be added after."""
        self._entry.event.record()
        self._entry.used = True
        return self._entry.event

    def tokens(self) -> Column:
        """After the event: a copy that outlives the entry."""
        if self._tokens is not None:
            return self._tokens.numpy()
        return self._entry.array[: self._count].copy()

    def more(self, index: int, dtype: type) -> Column:
        """After the event: the values as a flat column of int32 or float32."""
        found: Column = self._more[index].numpy().view(np.dtype(dtype))
        return found
