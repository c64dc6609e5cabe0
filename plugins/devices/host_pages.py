"""Host memory for KV blocks, and the copies between it and the pool.

What it is: pages as large as the pool's blocks, page-locked where that means something, given out by number. A block is one contiguous piece in the
pool, so that each costs one copy, whatever the attention backend keeps in it.
What it does not know: which block is whose, when it is worth keeping.
"""

from __future__ import annotations

import numpy as np
import torch

from penstock.core.protocol.columns import Column
from penstock.core.protocol.errors import InvalidRequest
from penstock.plugins.devices.lane import Event, Lane

Tensor = torch.Tensor


class HostPages:
    """Pages 0 to `count` - 1. All calls come from the device's thread."""

    def __init__(self, lane: Lane) -> None:
        self.count = 0
        self._lane = lane
        self._pages: Tensor | None = None

    def take(self, count: int, page_bytes: int) -> int:
        """Have `count` pages instead of those before, whose content is lost; returns their bytes. Raises InvalidRequest for a number that is not
        to be had."""
        if count < 0:
            raise InvalidRequest(f"host_pages must be 0 or more, not {count}.", param="host_pages")
        try:
            words = self._lane.pinned(count * page_bytes // 4)
        except (RuntimeError, MemoryError):
            raise InvalidRequest(f"This machine has no memory for {count} host pages of {page_bytes} bytes.", param="host_pages") from None
        self._pages = words.view(torch.uint8).view(count, page_bytes)
        self.count = count
        return self._pages.nbytes

    def move(self, pool: Tensor, blocks: Column, pages: Column, *, out: bool) -> Event:
        """Copy pair by pair, from blocks to pages with `out`, else back; the event says when all bytes are there. Raises InvalidRequest for a page or a block that
        does not exist, before anything is copied."""
        for name, named, count in (("pages", pages, self.count), ("blocks", blocks, pool.shape[0])):
            if len(named) and not (int(np.min(named)) >= 0 and int(np.max(named)) < count):
                raise InvalidRequest(f"A move names {name} beyond the {count} that there are.", param=name)
        for block, page in zip(blocks.tolist(), pages.tolist(), strict=True):
            assert self._pages is not None
            source, target = (pool[block], self._pages[page]) if out else (self._pages[page], pool[block])
            target.copy_(source, non_blocking=True)
        event = self._lane.event()
        event.record()
        return event
