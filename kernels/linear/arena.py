"""Memory of packed weights: laid one after the other in large chunks on huge pages.

What it is: `take(bytes)`, a 64-byte aligned view into a chunk that asks the kernel for 2 MiB pages. Streaming weights from many separate small
allocations costs translation misses and stops the hardware prefetcher at every 4 KiB. A chunk is freed with its last view.
What it does not know: what is stored.
"""

from __future__ import annotations

import ctypes
import sys
import threading

import torch
from torch import Tensor

CHUNK = 32 << 20
HUGE = 2 << 20
MADV_HUGEPAGE = 14

_lock = threading.Lock()
_chunk = torch.empty(0, dtype=torch.uint8)
_used = 0


def _new_chunk(size: int) -> Tensor:
    chunk = torch.empty(size + HUGE, dtype=torch.uint8)
    skip = -chunk.data_ptr() % HUGE
    chunk = chunk[skip : skip + size]
    if sys.platform == "linux":  # advice only: without huge pages everything works, slower
        ctypes.CDLL(None).madvise(ctypes.c_void_p(chunk.data_ptr()), ctypes.c_size_t(size), ctypes.c_int(MADV_HUGEPAGE))
    return chunk


def take(size: int) -> Tensor:
    """`size` uninitialised bytes [size] uint8."""
    global _chunk, _used
    with _lock:
        if _used + size > _chunk.shape[0]:
            if size >= CHUNK // 2:  # its own chunk; what is left of the current one stays in use
                return _new_chunk(-(-size // HUGE) * HUGE)[:size]
            _chunk, _used = _new_chunk(CHUNK), 0
        view = _chunk[_used : _used + size]
        _used += -(-size // 64) * 64
        return view
