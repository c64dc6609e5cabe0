"""The greedy choice in Triton: the first index of each row's maximum, -1 for a bad row, as in reference.py. Pieces of a row, then their merge."""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, disable-error-code="no-any-return"

import torch
import triton.language as tl
from torch import Tensor

from penstock.kernels.checks import require
from penstock.kernels.gpu import chained, tuned
from penstock.kernels.tile import follow, launched, power


@launched
def _pieces(logits, tops, firsts, V, stride, CHUNK: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr, PDL: tl.constexpr):
    """Grid (M, PIECES): largest value (NaN if there is one) and its first index."""
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    where = tl.full([BLOCK], 2147483647, tl.int32)
    wrong = tl.zeros([BLOCK], tl.int32)
    for first in range(0, CHUNK, BLOCK):
        at = piece * CHUNK + first + tl.arange(0, BLOCK)
        x = tl.load(logits + row * stride + at, mask=at < V, other=float("-inf"))
        wrong = wrong | (x != x).to(tl.int32)
        better = x > best
        best = tl.where(better, x, best)
        where = tl.where(better, at, where)
    top = tl.max(best, 0)
    first_index = tl.min(tl.where(best == top, where, 2147483647), 0)
    tl.store(tops + row * PIECES + piece, tl.where(tl.max(wrong, 0) > 0, float("inf"), top))
    tl.store(firsts + row * PIECES + piece, first_index)


@launched
def _merge(tops, firsts, out, PIECES: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Grid (M)."""
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    top = tl.load(tops + row * PIECES + at, mask=at < PIECES, other=float("-inf"))
    first = tl.load(firsts + row * PIECES + at, mask=at < PIECES, other=2147483647)
    best = tl.max(top, 0)
    token = tl.min(tl.where(top == best, first, 2147483647), 0)
    finite = (best > float("-inf")) & (best < float("inf"))
    tl.store(out + row, tl.where(finite, token, -1))


def _shape(vocab: int) -> tuple[int, dict[str, int]]:
    config = tuned("argmax")
    return -(-vocab // config["CHUNK"]), config


def workspace_elements(rows: int, vocab: int) -> int:
    """int32 elements that `argmax` needs."""
    return 2 * rows * _shape(vocab)[0]


def argmax(logits: Tensor, out: Tensor | None = None, workspace: Tensor | None = None) -> Tensor:
    """logits [M, V] float32 to [M] int32."""
    rows, vocab = logits.shape
    require(logits.dtype == torch.float32 and logits.stride(1) == 1 and vocab > 0, "logits must be [M, V] float32")
    out = torch.empty(rows, dtype=torch.int32, device=logits.device) if out is None else out
    if rows:
        pieces, config = _shape(vocab)
        cells = rows * pieces
        workspace = torch.empty(2 * cells, dtype=torch.int32, device=logits.device) if workspace is None else workspace
        require(workspace.dtype == torch.int32 and workspace.numel() >= 2 * cells, "the workspace is too small")
        tops, firsts = workspace[:cells].view(torch.float32), workspace[cells : 2 * cells]
        _pieces[(rows, pieces)](logits, tops, firsts, vocab, logits.stride(0), PIECES=pieces, **chained(), **config)
        _merge[(rows,)](tops, firsts, out, PIECES=pieces, BLOCK=power(pieces), num_warps=1, **chained())
    return out
