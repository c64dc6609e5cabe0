"""Checked entry of ragged causal attention over the paged cache.

    paged_attention(q[T, Hq, D], k_cache, v_cache, block_tables[R, B] int32, q_start[R + 1] int32, kv_len[R] int32, scale,
                    window=0, out=None) -> [T, Hq, D]

Sequence r owns query rows q_start[r] .. q_start[r+1]-1 (T = q_start[R]; decode: one row), the last of which sits at position kv_len[r]-1:
K and V of all kv_len[r] positions, this step's included, are in the cache already (`rope_and_cache`). block_tables[r] names its blocks
in order; entries beyond ceil(kv_len/block_size) are not read. window > 0: a row sees only its last `window` positions, itself included.
q and caches: bfloat16 or float32, alike; caches as in `attention.layout`. A row's result depends only on its own sequence and
position: not on the batch, nor on how a prefill was cut.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels.attention import reference
from penstock.kernels.attention.layout import check_cache
from penstock.kernels.checks import FLOATS, require, tensor


def check_tables(block_tables: Tensor, q_start: Tensor, kv_len: Tensor, tokens: int, num_blocks: int, block_size: int) -> None:
    """Raises ValueError or IndexError unless every sequence's rows and blocks lie inside."""
    tensor("kv_len", kv_len, (None,), torch.int32)
    rows = kv_len.shape[0]
    tensor("q_start", q_start, (rows + 1,), torch.int32)
    tensor("block_tables", block_tables, (rows, None), torch.int32)
    counts = q_start[1:] - q_start[:-1]
    require(rows > 0 or tokens == 0, "there are query rows but no sequence")
    if rows == 0:
        return
    require(
        int(q_start[0]) == 0 and int(q_start[-1]) == tokens and int(counts.min()) >= 0,
        "q_start must rise from 0 to the number of query rows",
    )
    require(bool((kv_len >= counts).all()), "kv_len must count this step's rows too")
    needed = (kv_len + (block_size - 1)) // block_size
    require(int(needed.max()) <= block_tables.shape[1], "block_tables has too few columns for kv_len")
    used = torch.arange(block_tables.shape[1])[None] < needed[:, None]
    named = block_tables[used]
    if named.numel() and not (0 <= int(named.min()) and int(named.max()) < num_blocks):
        raise IndexError("a block table names a block outside the cache")


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    q_start: Tensor,
    kv_len: Tensor,
    scale: float,
    window: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of every query row over its own sequence; see the module."""
    tensor("q", q, (None, None, None), *FLOATS)
    check_cache(k_cache, v_cache, k_cache.shape[1], q.dtype)
    require(q.shape[2] == k_cache.shape[3], "q and cache differ in head_dim")
    require(q.shape[1] % k_cache.shape[1] == 0, "the number of heads must be a multiple of the number of KV heads")
    check_tables(block_tables, q_start, kv_len, q.shape[0], k_cache.shape[0], k_cache.shape[2])
    if out is None:
        out = torch.empty_like(q)
    else:
        tensor("out", out, q.shape, q.dtype)
    return out.copy_(reference.paged_attention(q, k_cache, v_cache, block_tables, q_start, kv_len, scale, window))
