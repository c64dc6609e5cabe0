"""The step between the QKV projection and attention in one Triton kernel: split, per-head norm, rotation, paged write of K and V.

    q, k = rms_norm(q, q_norm), rms_norm(k, k_norm)     where given, per head over D, rounded as in kernels/rmsnorm
    y[:r/2] = x[:r/2] cos - x[r/2:r] sin,  y[r/2:r] = x[r/2:r] cos + x[:r/2] sin,  y[r:] = x[r:]        (Su et al. 2021, arXiv:2104.09864)
    cache[slot // size, :, slot % size] = k, v          where slot >= 0

Each program takes some heads of one token; nothing depends on other tokens. Float32 from load to the one rounding at the end.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, disable-error-code="no-any-return"

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.checks import require
from penstock.kernels.gpu import chained, tuned
from penstock.kernels.tile import make_room, narrow, power, wait


@triton.jit
def _gain(x, factor, q_norm, k_norm, at, inside, is_q, is_k, QNORM: tl.constexpr, KNORM: tl.constexpr):
    """x * factor, rounded, * that head's weight, rounded; float32 in and out. Heads without a norm stay as they are."""
    if QNORM and KNORM:
        dtype = q_norm.dtype.element_ty
        of_q = tl.load(q_norm + at, mask=inside, other=0.0)[None, :]
        of_k = tl.load(k_norm + at, mask=inside, other=0.0)[None, :]
        gain = tl.where(is_q[:, None], of_q, of_k).to(tl.float32)
        on = is_q | is_k
    elif QNORM:
        dtype = q_norm.dtype.element_ty
        gain = tl.load(q_norm + at, mask=inside, other=0.0).to(tl.float32)[None, :]
        on = is_q
    else:
        dtype = k_norm.dtype.element_ty
        gain = tl.load(k_norm + at, mask=inside, other=0.0).to(tl.float32)[None, :]
        on = is_k
    scaled = narrow(x * factor[:, None], dtype).to(tl.float32)
    return tl.where(on[:, None], narrow(scaled * gain, dtype).to(tl.float32), x)


@triton.jit
def _rope(
    qkv, positions, cos_sin, k_cache, v_cache, slots, q_norm, k_norm, out, k_out, eps, stride, k_stride, kb, kh, HQ: tl.constexpr, HKV: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, HALF_P: tl.constexpr, REST_P: tl.constexpr, SIZE: tl.constexpr, QNORM: tl.constexpr,
    KNORM: tl.constexpr, KEEP: tl.constexpr, HEADS_BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (T, ceil((HQ + 2 HKV) / HEADS_BLOCK))."""
    make_room(PDL)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)
    c = tl.arange(0, HALF_P)
    angles = cos_sin + tl.load(positions + token, cache_modifier=".cg").to(tl.int64) * (2 * HALF)
    cos = tl.load(angles + c, mask=c < HALF, other=0.0)[None, :]
    sin = tl.load(angles + HALF + c, mask=c < HALF, other=0.0)[None, :]
    slot = tl.load(slots + token, cache_modifier=".cg")
    wait(PDL)
    is_q = head < HQ
    is_k = (head >= HQ) & (head < HQ + HKV)
    is_v = (head >= HQ + HKV) & (head < HQ + 2 * HKV)
    exists = (head < HQ + 2 * HKV)[:, None]
    half = (c < HALF)[None, :]
    dtype = qkv.dtype.element_ty
    source = qkv + token * stride + (head * D)[:, None]
    low = tl.load(source + c[None, :], mask=exists & half, other=0.0).to(tl.float32)
    high = tl.load(source + HALF + c[None, :], mask=exists & half, other=0.0).to(tl.float32)
    if REST_P > 0:
        e = tl.arange(0, REST_P)
        tail = (e < D - 2 * HALF)[None, :]
        rest = tl.load(source + 2 * HALF + e[None, :], mask=exists & tail, other=0.0).to(tl.float32)
    if QNORM or KNORM:
        square = tl.sum(low * low, 1) + tl.sum(high * high, 1)
        if REST_P > 0:
            square += tl.sum(rest * rest, 1)
        factor = tl.rsqrt(square / D + eps)
        low = _gain(low, factor, q_norm, k_norm, c, c < HALF, is_q, is_k, QNORM, KNORM)
        high = _gain(high, factor, q_norm, k_norm, HALF + c, c < HALF, is_q, is_k, QNORM, KNORM)
        if REST_P > 0:
            rest = _gain(rest, factor, q_norm, k_norm, 2 * HALF + e, e < D - 2 * HALF, is_q, is_k, QNORM, KNORM)
    turn = (is_q | is_k)[:, None]
    first = narrow(tl.where(turn, low * cos - high * sin, low), dtype)
    second = narrow(tl.where(turn, high * cos + low * sin, high), dtype)
    block = tl.where(slot >= 0, slot, 0)
    entry = (block // SIZE).to(tl.int64) * kb + (block % SIZE) * D
    q_at = out + token * (HQ * D) + (head * D)[:, None]
    k_at = k_cache + entry + ((head - HQ) * kh)[:, None]
    v_at = v_cache + entry + ((head - HQ - HKV) * kh)[:, None]
    q_on = is_q[:, None] & half
    k_on = (is_k & (slot >= 0))[:, None] & half
    v_on = (is_v & (slot >= 0))[:, None] & half
    tl.store(q_at + c[None, :], first, mask=q_on)
    tl.store(q_at + HALF + c[None, :], second, mask=q_on)
    tl.store(k_at + c[None, :], first, mask=k_on)
    tl.store(k_at + HALF + c[None, :], second, mask=k_on)
    tl.store(v_at + c[None, :], first, mask=v_on)
    tl.store(v_at + HALF + c[None, :], second, mask=v_on)
    if KEEP:
        kept_at = k_out + token * k_stride + ((head - HQ) * D)[:, None]
        tl.store(kept_at + c[None, :], first, mask=is_k[:, None] & half)
        tl.store(kept_at + HALF + c[None, :], second, mask=is_k[:, None] & half)
    if REST_P > 0:
        kept = narrow(rest, dtype)
        if KEEP:
            tl.store(kept_at + 2 * HALF + e[None, :], kept, mask=is_k[:, None] & tail)
        tl.store(q_at + 2 * HALF + e[None, :], kept, mask=is_q[:, None] & tail)
        tl.store(k_at + 2 * HALF + e[None, :], kept, mask=(is_k & (slot >= 0))[:, None] & tail)
        tl.store(v_at + 2 * HALF + e[None, :], kept, mask=(is_v & (slot >= 0))[:, None] & tail)


def rope_and_cache(
    qkv: Tensor, positions: Tensor, cos_sin: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, num_heads: int, num_kv_heads: int,
    q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 1e-6, out: Tensor | None = None, *,
    k_out: Tensor | None = None, config: dict[str, int] | None = None,
) -> Tensor:  # fmt: skip
    """q [T, Hq, D]; K and V go to the caches. Padding tokens: slot below 0, position 0. See kernels/gpu.py.

    k_out [T, Hkv, D]: also gets the rotated keys; it may be the keys' own columns of qkv. With them and the values' columns `ragged_attention` reads
    this step's keys without the page table.
    """
    tokens, (size, dim) = qkv.shape[0], k_cache.shape[2:]
    require(qkv.shape[1] == (num_heads + 2 * num_kv_heads) * dim and qkv.stride(1) == 1, "qkv must have (Hq + 2 Hkv) * D columns")
    require(k_cache.stride() == v_cache.stride() and k_cache.stride()[1:] == (size * dim, dim, 1), "a block must be contiguous")
    require(cos_sin.dtype == torch.float32 and cos_sin.is_contiguous() and cos_sin.shape[1] <= dim, "cos_sin must be [P, r] float32")
    out = torch.empty(tokens, num_heads, dim, dtype=qkv.dtype, device=qkv.device) if out is None else out
    require(out.shape == (tokens, num_heads, dim) and out.is_contiguous(), "out must be contiguous, [T, Hq, D]")
    if tokens:
        config = dict(config or tuned("rope"))
        heads, half = num_heads + 2 * num_kv_heads, cos_sin.shape[1] // 2
        block = min(config.pop("HEADS_BLOCK"), power(heads))
        _rope[(tokens, -(-heads // block))](
            qkv, positions, cos_sin, k_cache, v_cache, slots, q_norm, k_norm, out, k_out, eps, qkv.stride(0),
            0 if k_out is None else k_out.stride(0), k_cache.stride(0), k_cache.stride(1),
            HQ=num_heads, HKV=num_kv_heads, D=dim, HALF=half, HALF_P=power(half), REST_P=power(dim - 2 * half) if dim > 2 * half else 0,
            SIZE=size, QNORM=q_norm is not None, KNORM=k_norm is not None, KEEP=k_out is not None, HEADS_BLOCK=block, **chained(), **config,
        )  # fmt: skip
    return out
