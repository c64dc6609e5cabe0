"""Checked entry of the fused step between the QKV projection and attention.

    rope_and_cache(qkv[T, (Hq + 2 Hkv) * D], positions[T] int32, cos_sin[P, r] float32, k_cache, v_cache, slots[T] int32,
                   num_heads, num_kv_heads, q_norm[D] | None, k_norm[D] | None, eps=1e-6, out=None, scales=None)
                   -> q [T, Hq, D]

qkv, caches and norms: bfloat16 or float32, all alike, or caches of codes and `scales`. `cos_sin` holds r/2 cosines, then r/2 sines, of each table row (attention scaling
already multiplied in); r <= D is even, r < D is a partial rotary factor. `positions` index the table's rows (a longrope table may be
two tables one after the other). `slots`: block * block_size + offset in the cache, below 0: do not write. Caches as in
`attention.layout`: allocate [num_blocks, Hkv, block_size, D], contents in panel order. Positions and slots out of range raise IndexError.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from penstock.kernels import native
from penstock.kernels.attention.layout import Scales, check_cache, describe
from penstock.kernels.checks import FLOATS, require, tensor
from penstock.kernels.native.bind import check
from penstock.kernels.rope import reference


def rope_and_cache(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    num_heads: int,
    num_kv_heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    out: Tensor | None = None,
    scales: Scales | None = None,
) -> Tensor:
    """Split, norm, rotate, write the cache, return q; see the module."""
    tensor("qkv", qkv, (None, None), *FLOATS)
    check_cache(k_cache, v_cache, num_kv_heads, qkv.dtype, scales)
    tokens, dim = qkv.shape[0], k_cache.shape[3]
    require(qkv.shape[1] == (num_heads + 2 * num_kv_heads) * dim, "qkv must have (num_heads + 2 num_kv_heads) * head_dim columns")
    tensor("cos_sin", cos_sin, (None, None), torch.float32)
    require(cos_sin.shape[1] % 2 == 0 and cos_sin.shape[1] <= dim, "cos_sin must have an even number of columns, at most head_dim")
    tensor("positions", positions, (tokens,), torch.int32)
    tensor("slots", slots, (tokens,), torch.int32)
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None:
            tensor(name, norm, (dim,), qkv.dtype)
    if out is None:
        out = torch.empty(tokens, num_heads, dim, dtype=qkv.dtype)
    else:
        tensor("out", out, (tokens, num_heads, dim), qkv.dtype)
    if tokens == 0:
        return out
    lib = native.library()
    if lib is None:
        check(5 if int(positions.min()) < 0 or int(positions.max()) >= cos_sin.shape[0] else 0)
        check(6 if int(slots.max()) >= k_cache.shape[0] * k_cache.shape[2] else 0)
        return out.copy_(
            reference.rope_and_cache(qkv, positions, cos_sin, k_cache, v_cache, slots, num_heads, num_kv_heads, q_norm, k_norm, eps, scales)
        )
    program = native.Program(
        heads=num_heads, kv_heads=num_kv_heads, dim=dim, bf16=qkv.dtype == torch.bfloat16, rotary=cos_sin.shape[1],
        table_rows=cos_sin.shape[0], eps=eps, cos_sin=cos_sin.data_ptr(),
    )  # fmt: skip
    norms = [None if norm is None else norm.float() for norm in (q_norm, k_norm)]
    addresses = [None if norm is None else norm.data_ptr() for norm in norms]
    layer = native.Layer(q_norm=addresses[0], k_norm=addresses[1])
    describe(program, layer, k_cache, v_cache, scales)
    check(
        lib.lib.ps_rope(
            ctypes.byref(program), ctypes.byref(layer), qkv.data_ptr(), positions.data_ptr(), slots.data_ptr(), tokens, out.data_ptr(),
            torch.get_num_threads(),
        )
    )  # fmt: skip
    return out
