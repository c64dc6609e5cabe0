"""Moving single entries of the paged cache in Triton: what is left of a tree of drafts is brought into one line.

What it is: `move_kv`, which copies keys, values and scales of places as they are stored, in all layers at once, one pair of places after the other.
What it does not know: attention, trees, who owns a block.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, disable-error-code="no-any-return"

import torch
import triton.language as tl
from torch import Tensor

from penstock.kernels.checks import require
from penstock.kernels.tile import launched, power

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@launched(do_not_specialize_on_alignment=["source", "target"])
def _move(
    pages, scales, source, target, page_stride, scale_stride, HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SIZE: tl.constexpr,
    N: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """Grid (R, layers * 2, Hkv). A place is written after the pairs before it were read: whoever comes later in a row lies behind."""
    row = tl.program_id(0)
    part = tl.program_id(1)  # of a layer its keys, then its values
    head = tl.program_id(2)
    d = tl.arange(0, DP)
    base = (part * HEADS + head) * SIZE * D
    for i in range(N):
        a = tl.load(source + row * N + i)
        b = tl.load(target + row * N + i)
        if (a >= 0) & (b >= 0) & (a != b):
            step = d * 0 + 1
            across = D
            if CODES:  # values lie by dimension
                step = tl.where(part % 2 == 1, SIZE, 1) + d * 0
                across = tl.where(part % 2 == 1, 1, D)
            here = pages + (a // SIZE).to(tl.int64) * page_stride + base + a % SIZE * across + d * step
            there = pages + (b // SIZE).to(tl.int64) * page_stride + base + b % SIZE * across + d * step
            tl.store(there, tl.load(here, mask=d < D), mask=d < D)
            if CODES:  # a word has both scales
                words = (part // 2 * HEADS + head) * SIZE
                one = tl.load(scales + (a // SIZE).to(tl.int64) * scale_stride + words + a % SIZE)
                tl.store(scales + (b // SIZE).to(tl.int64) * scale_stride + words + b % SIZE, one, mask=part % 2 == 0)
        tl.debug_barrier()


def move_kv(pages: Tensor, source: Tensor, target: Tensor, scales: Tensor | None = None) -> None:
    """pages [num_blocks, layers, 2, Hkv, block_size, D], a page contiguous; source, target int32 places [R, N], a pair with a number below 0 is left out; no place of
    a row's is another row's. Of codes (uint8, values by dimension) `scales` int32 [num_blocks, layers, Hkv, block_size] are the words of coded.Codes."""
    rows, count = source.shape
    _, layers, two, heads, size, dim = pages.shape
    require(two == 2 and source.is_contiguous() and target.is_contiguous() and target.shape == source.shape, "what is moved does not fit")
    if not rows or not count:
        return
    of_codes = scales is not None
    _move[(rows, layers * 2, heads)](
        pages.view(_INTEGERS[pages.element_size()]), scales, source, target, pages.stride(0), 0 if scales is None else scales.stride(0),
        HEADS=heads, D=dim, DP=power(max(16, dim)), SIZE=size, N=count, CODES=of_codes, num_warps=1,
    )  # fmt: skip
