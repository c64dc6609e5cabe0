"""Checked entry of ragged causal attention over the paged cache.

    paged_attention(q[T, Hq, D], k_cache, v_cache, block_tables[R, B] int32, q_start[R + 1] int32, kv_len[R] int32, scale,
                    window=0, out=None, scales=None, ancestors=None[T] int64) -> [T, Hq, D]
    move_kv(k_cache, v_cache, source[N] int32, target[N] int32, scales=None) -> None

Sequence r owns query rows q_start[r] .. q_start[r+1]-1 (T = q_start[R]; decode: one row), the last of which sits at position kv_len[r]-1:
K and V of all kv_len[r] positions, this step's included, are in the cache already (`rope_and_cache`). block_tables[r] names its blocks
in order; entries beyond ceil(kv_len/block_size) are not read. window > 0: a row sees only its last `window` positions, itself included.
q and caches: bfloat16 or float32, alike, or caches of codes and `scales`; both as in `attention.layout`. A row's result depends only on its own sequence and
position: not on the batch, nor on how a prefill was cut.

`ancestors`, for rows that are nodes of a tree of drafts: of the 64 keys up to its own a row sees those whose bit is 1, bit i being the key i places before it; -1 is causal
attention. Where the key stands is one thing then, its position (what it was rotated by) another: the keys that a row sees are at the positions up to its own, one each and in this order, and its bits
are those that it would have with each of them at its position. Windows count positions. `move_kv` moves the entries of places, one pair after the other; pairs with
a place below 0 are left out.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from penstock.kernels import native
from penstock.kernels.attention import reference
from penstock.kernels.attention.layout import Scales, check_cache, describe
from penstock.kernels.checks import FLOATS, require, tensor
from penstock.kernels.native.bind import check


def check_tables(block_tables: Tensor, q_start: Tensor, kv_len: Tensor) -> None:
    """Raises ValueError unless shapes and dtypes fit each other."""
    tensor("kv_len", kv_len, (None,), torch.int32)
    tensor("q_start", q_start, (kv_len.shape[0] + 1,), torch.int32)
    tensor("block_tables", block_tables, (kv_len.shape[0], None), torch.int32)


def index_error(block_tables: Tensor, q_start: Tensor, kv_len: Tensor, tokens: int, num_blocks: int, block_size: int) -> int:
    """0, or the code (native.bind.INDEX_ERRORS) of the first index that lies outside; the C side has the same check."""
    if int(q_start[0]) != 0 or int(q_start[-1]) != tokens:
        return 1
    if kv_len.shape[0] == 0:
        return 0
    counts = q_start[1:] - q_start[:-1]
    needed = (kv_len + (block_size - 1)) // block_size
    if int(counts.min()) < 0:
        return 1
    if not bool((kv_len >= counts).all()) or int(needed.max()) > block_tables.shape[1]:
        return 2
    named = block_tables[torch.arange(block_tables.shape[1])[None] < needed[:, None]]
    return 3 if named.numel() and (int(named.min()) < 0 or int(named.max()) >= num_blocks) else 0


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
    scales: Scales | None = None,
    ancestors: Tensor | None = None,
) -> Tensor:
    """Attention of every query row over its own sequence; see the module."""
    tensor("q", q, (None, None, None), *FLOATS)
    check_cache(k_cache, v_cache, k_cache.shape[1], q.dtype, scales)
    require(q.shape[2] == k_cache.shape[3], "q and cache differ in head_dim")
    require(q.shape[2] <= 512, "head_dim must be at most 512")
    require(q.shape[1] % k_cache.shape[1] == 0, "the number of heads must be a multiple of the number of KV heads")
    if out is None:
        out = torch.empty_like(q)
    else:
        tensor("out", out, q.shape, q.dtype)
    check_tables(block_tables, q_start, kv_len)
    if ancestors is not None:
        tensor("ancestors", ancestors, (q.shape[0],), torch.int64)
    lib = native.library()
    if lib is None:
        check(index_error(block_tables, q_start, kv_len, q.shape[0], k_cache.shape[0], k_cache.shape[2]))
        return out.copy_(reference.paged_attention(q, k_cache, v_cache, block_tables, q_start, kv_len, scale, window, scales, ancestors))
    program = native.Program(
        heads=q.shape[1], kv_heads=k_cache.shape[1], dim=q.shape[2], bf16=q.dtype == torch.bfloat16, scale=scale
    )  # fmt: skip
    layer = native.Layer(window=window)
    describe(program, layer, k_cache, v_cache, scales)
    step = native.Step(
        tables=block_tables.data_ptr(), q_start=q_start.data_ptr(), kv_len=kv_len.data_ptr(), token_count=q.shape[0],
        sequences=kv_len.shape[0], table_width=block_tables.shape[1], threads=torch.get_num_threads(),
        ancestors=None if ancestors is None else ancestors.data_ptr(),
    )  # fmt: skip
    check(lib.lib.ps_attention(ctypes.byref(program), ctypes.byref(layer), ctypes.byref(step), q.data_ptr(), out.data_ptr()))
    return out


def move_kv(k_cache: Tensor, v_cache: Tensor, source: Tensor, target: Tensor, scales: Scales | None = None) -> None:
    """See the module."""
    check_cache(k_cache, v_cache, k_cache.shape[1], k_cache.dtype, scales)
    tensor("source", source, (None,), torch.int32)
    tensor("target", target, source.shape, torch.int32)
    lib = native.library()
    if lib is None:
        reference.move_kv(k_cache, v_cache, source, target, scales)
        return
    program = native.Program(kv_heads=k_cache.shape[1], dim=k_cache.shape[3])
    layer = native.Layer()
    describe(program, layer, k_cache, v_cache, scales)
    check(
        lib.lib.ps_move_kv(
            ctypes.byref(program), ctypes.byref(layer), source.data_ptr(), target.data_ptr(), source.shape[0], k_cache.element_size()
        )
    )
