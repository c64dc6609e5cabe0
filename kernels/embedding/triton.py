"""Row gathers in Triton: embedding look-up and the choice of last tokens. out[i] = table[ids[i]], or zeros where ids[i] < 0 (padding)."""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, disable-error-code="no-any-return"

import torch
import triton.language as tl
from torch import Tensor

from penstock.kernels.checks import require
from penstock.kernels.gpu import chained, tuned
from penstock.kernels.tile import follow, launched, power


@launched
def _gather(ids, table, out, width, stride, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Grid (T, ceil(H / BLOCK))."""
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(ids + row).to(tl.int64)
    value = tl.load(table + index * stride + at, mask=(at < width) & (index >= 0), other=0.0)
    tl.store(out + row * width + at, value, mask=at < width)


def gather_rows(x: Tensor, rows: Tensor, out: Tensor | None = None, *, config: dict[str, int] | None = None) -> Tensor:
    """x [T, H] (rows may be strided), rows [L] int32; [L, H]."""
    count, width = rows.shape[0], x.shape[1]
    out = torch.empty(count, width, dtype=x.dtype, device=x.device) if out is None else out
    require(out.shape == (count, width) and out.is_contiguous() and x.stride(1) == 1, "out must be contiguous, [L, H]")
    if count:
        block = min(4096, power(width))
        _gather[(count, -(-width // block))](rows, x, out, width, x.stride(0), BLOCK=block, **chained(), **(config or tuned("gather")))
    return out


def embedding(ids: Tensor, table: Tensor, out: Tensor | None = None) -> Tensor:
    """ids [T] int32, table [V, H]; [T, H]."""
    return gather_rows(table, ids, out)
