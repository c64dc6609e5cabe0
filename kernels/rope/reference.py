"""Plain-torch truth of the fused step between the QKV projection and attention.

    q, k, v = split(qkv)
    q, k = rms_norm(q, q_norm), rms_norm(k, k_norm)                 where the model has them (Qwen3), per head over D
    y[:r/2] = x[:r/2] * cos - x[r/2:r] * sin,  y[r/2:r] = x[r/2:r] * cos + x[:r/2] * sin,  y[r:] = x[r:]
    cache[slot] = k, v

Rotary embedding: Su et al. 2021, arXiv:2104.09864, in the half-split pairing of Hugging Face. The rotation is done in float32 from
the float32 table and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels.attention.layout import Scales, write_kv
from penstock.kernels.rmsnorm.reference import rms_norm


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """x [T, H, D]; cos_sin [T, r] (cosines, then sines). Result in x's dtype."""
    half = cos_sin.shape[-1] // 2
    table = cos_sin if x.dtype == torch.float64 else cos_sin.float()
    cos, sin = table[:, None, :half].to(torch.float64 if x.dtype == torch.float64 else torch.float32), table[:, None, half:]
    wide = x if x.dtype == torch.float64 else x.float()
    low, high = wide[..., :half], wide[..., half : 2 * half]
    return torch.cat((low * cos - high * sin, high * cos + low * sin, wide[..., 2 * half :]), dim=-1).to(x.dtype)


def rope_and_cache(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    num_heads: int,
    num_kv_heads: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    scales: Scales | None = None,
) -> Tensor:
    """Returns q [T, Hq, D]; writes K and V. Slots below 0 are not written."""
    tokens, dim = qkv.shape[0], k_cache.shape[3]
    heads = qkv.view(tokens, num_heads + 2 * num_kv_heads, dim)
    q, k, v = heads[:, :num_heads], heads[:, num_heads:-num_kv_heads], heads[:, -num_kv_heads:]
    if q_norm is not None:
        q = rms_norm(q, q_norm, eps)
    if k_norm is not None:
        k = rms_norm(k, k_norm, eps)
    table = cos_sin[positions.long()]
    write_kv(k_cache, v_cache, rotate(k, table), v, slots, scales)
    return rotate(q, table).contiguous()
