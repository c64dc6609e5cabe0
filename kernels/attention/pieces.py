"""What the split-KV kernels share: the sum of a row's pieces.

What it is: a function of Triton kernels.
What it does not know: keys, pages.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, disable-error-code="no-any-return"

import triton
import triton.language as tl

from penstock.kernels.tile import narrow


@triton.jit
def add_up(
    out, lse, partial, partial_lse, sinks, r, row, group, pieces, HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_P: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, SPLITS: tl.constexpr, SINKS: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """The pieces of sequence r's row and one group of heads, always in the same order: `_combine` by the program that came last."""
    h = tl.arange(0, GROUP_P)
    d = tl.arange(0, DP)
    s = tl.arange(0, SPLITS)
    ours = group * GROUP + h
    cells = (r * HEADS + ours).to(tl.int64)[:, None] * SPLITS + s[None, :]
    there = (h < GROUP)[:, None] & (s < pieces)[None, :]
    parts = tl.load(partial_lse + cells, mask=there, other=float("-inf"), cache_modifier=".cg")
    inside = there[:, :, None] & (d < D)[None, None, :]
    values = tl.load(partial + cells[:, :, None] * D + d[None, None, :], mask=inside, other=0.0, cache_modifier=".cg")
    top = tl.max(parts, 1)
    if SINKS:
        sink = tl.load(sinks + ours, mask=h < GROUP, other=0.0) * 1.4426950408889634
        top = tl.maximum(top, sink)
    top = tl.where(h < GROUP, top, 0.0)
    weight = tl.exp2(parts - top[:, None])
    whole_sum = tl.sum(weight, 1)
    if SINKS:
        whole_sum += tl.exp2(sink - top)
    whole_sum = tl.where(h < GROUP, whole_sum, 1.0)
    merged = tl.sum(values * weight[:, :, None], 1) / whole_sum[:, None]
    target = out + row * HEADS * D + (ours * D)[:, None] + d[None, :]
    tl.store(target, narrow(merged, out.dtype.element_ty), mask=(h < GROUP)[:, None] & (d < D)[None, :])
    if LSE:
        tl.store(lse + row * HEADS + ours, (top + tl.log2(whole_sum)) * 0.6931471805599453, mask=h < GROUP)
