"""The step between the QKV projection and attention in one Triton kernel: split, per-head norm, rotation, paged write of K and V.

    q, k = rms_norm(q, q_norm), rms_norm(k, k_norm)     where given, per head over D, rounded as in kernels/rmsnorm
    y[:r/2] = x[:r/2] cos - x[r/2:r] sin,  y[r/2:r] = x[r/2:r] cos + x[:r/2] sin,  y[r:] = x[r:]        (Su et al. 2021, arXiv:2104.09864)
    cache[slot // size, :, slot % size] = k, v          where slot >= 0; in 8 bits: their codes and scales

Each program takes a few heads of a few tokens, either of queries and keys, which turn, or of values, which are only copied; nothing depends on other
tokens. Float32 from load to the one rounding at the end.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, disable-error-code="no-any-return"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.attention.coded import Codes, code_of, scale_of
from penstock.kernels.attention.codes import LARGEST
from penstock.kernels.checks import require
from penstock.kernels.gpu import chained, tuned
from penstock.kernels.tile import launched, make_room, narrow, power, wait

FEW_TOKENS, SOME_TOKENS = 128, 1024
"""Of so many, in 8 bits, each program takes little: to encode is many instructions, and a step waits for them."""


@triton.jit
def _gain(x, factor, weight, like: tl.constexpr):
    """x * factor, rounded, * weight, rounded; float32 out."""
    scaled = narrow(x * factor, like).to(tl.float32)
    return narrow(scaled * weight.to(tl.float32), like).to(tl.float32)


@triton.jit
def _turn(
    qkv, positions, cos_sin, k_cache, entry, slot, q_norm, k_norm, out, k_out, eps, token, head, exists, stride, k_stride, kh, HQ: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, HALF_P: tl.constexpr, REST_P: tl.constexpr, NORM: tl.constexpr, KEEP: tl.constexpr, PDL: tl.constexpr,
    scales, fixed, stores_keys, SIZE: tl.constexpr, KIND: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Queries and keys: a row is a head of a token. Whose it is only decides addresses, so that no element is computed twice or selected; but where all are
    queries (not `stores_keys`) there is nothing to encode."""
    c = tl.arange(0, HALF_P)[None, :]
    half = c < HALF
    dtype = qkv.dtype.element_ty
    is_q = head < HQ
    position = tl.load(positions + token, mask=exists, other=0, cache_modifier=".cg").to(tl.int64)
    angles = (cos_sin + position * (2 * HALF))[:, None]
    cos = tl.load(angles + c, mask=half, other=0.0)
    sin = tl.load(angles + HALF + c, mask=half, other=0.0)
    if NORM:
        weight = tl.where(is_q, q_norm, k_norm)[:, None]
        low_weight = tl.load(weight + c, mask=half, other=0.0)
        high_weight = tl.load(weight + HALF + c, mask=half, other=0.0)
    wait(PDL)
    source = (qkv + token * stride + head * D)[:, None]
    on = exists[:, None] & half
    low = tl.load(source + c, mask=on, other=0.0).to(tl.float32)
    high = tl.load(source + HALF + c, mask=on, other=0.0).to(tl.float32)
    if REST_P > 0:
        e = tl.arange(0, REST_P)[None, :]
        tail = e < D - 2 * HALF
        rest = tl.load(source + 2 * HALF + e, mask=exists[:, None] & tail, other=0.0).to(tl.float32)
    if NORM:
        square = tl.sum(low * low + high * high, 1)
        if REST_P > 0:
            square += tl.sum(rest * rest, 1)
        factor = tl.rsqrt(square / D + eps)[:, None]
        low = _gain(low, factor, low_weight, dtype)
        high = _gain(high, factor, high_weight, dtype)
        if REST_P > 0:
            rest = _gain(rest, factor, tl.load(weight + 2 * HALF + e, mask=tail, other=0.0), dtype)
    first = narrow(low * cos - high * sin, dtype)
    second = narrow(high * cos + low * sin, dtype)
    if KIND != "":
        target = (out + token * (HQ * D) + head * D)[:, None]
        writes = (exists & is_q)[:, None]
    else:
        target = tl.where(is_q, out + token * (HQ * D) + head * D, k_cache + entry + (head - HQ) * kh)[:, None]
        writes = (exists & (is_q | (slot >= 0)))[:, None]
    tl.store(target + c, first, mask=writes & half)
    tl.store(target + HALF + c, second, mask=writes & half)
    if KEEP:
        kept = (k_out + token * k_stride + (head - HQ) * D)[:, None]
        keeps = (exists & (head >= HQ))[:, None]
        tl.store(kept + c, first, mask=keeps & half)
        tl.store(kept + HALF + c, second, mask=keeps & half)
    if REST_P > 0:
        third = narrow(rest, dtype)
        tl.store(target + 2 * HALF + e, third, mask=writes & tail)
        if KEEP:
            tl.store(kept + 2 * HALF + e, third, mask=keeps & tail)
    if KIND != "":  # noqa: SIM102 (known when compiled, the inner one is not)
        if stores_keys:
            low = tl.where(half, first.to(tl.float32), 0.0)
            high = tl.where(half, second.to(tl.float32), 0.0)
            size = tl.maximum(tl.max(tl.abs(low), 1), tl.max(tl.abs(high), 1))
            broken = tl.sum((low - low) + (high - high), 1)
            if REST_P > 0:
                rest = tl.where(tail, third.to(tl.float32), 0.0)
                size = tl.maximum(size, tl.max(tl.abs(rest), 1))
                broken += tl.sum(rest - rest, 1)
            scale = scale_of(size, broken, fixed, LARGEST)
            stores = exists & (head >= HQ) & (slot >= 0)
            tl.store(scales + (head - HQ) * (2 * SIZE), scale.to(tl.bfloat16), mask=stores)
            codes = (k_cache + entry + (head - HQ) * kh)[:, None]
            tl.store(codes + c, code_of(low, scale[:, None], KIND, LARGEST), mask=stores[:, None] & half)
            tl.store(codes + HALF + c, code_of(high, scale[:, None], KIND, LARGEST), mask=stores[:, None] & half)
            if REST_P > 0:
                tl.store(codes + 2 * HALF + e, code_of(rest, scale[:, None], KIND, LARGEST), mask=stores[:, None] & tail)


@launched
def _rope(
    qkv, positions, cos_sin, k_cache, v_cache, slots, q_norm, k_norm, out, k_out, eps, tokens, stride, k_stride, kb, kh, HQ: tl.constexpr,
    HKV: tl.constexpr, D: tl.constexpr, D_P: tl.constexpr, HALF: tl.constexpr, HALF_P: tl.constexpr, REST_P: tl.constexpr, SIZE: tl.constexpr,
    NORM: tl.constexpr, KEEP: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, PDL: tl.constexpr, scales=None, sb=None, fixed_k=None,
    fixed_v=None, KIND: tl.constexpr = "", LARGEST: tl.constexpr = 0.0,
):  # fmt: skip
    """Grid (ceil(T / TOKENS), ceil((HQ + HKV) / HEADS) + ceil(HKV / HEADS)): programs of queries and keys, then of values."""
    make_room(PDL)
    row = tl.arange(0, TOKENS * HEADS)
    token = tl.program_id(0).to(tl.int64) * TOKENS + row // HEADS
    slot = tl.load(slots + token, mask=token < tokens, other=-1, cache_modifier=".cg")
    block = tl.where(slot >= 0, slot, 0)
    entry = (block // SIZE).to(tl.int64) * kb + (block % SIZE) * D
    turning: tl.constexpr = (HQ + HKV + HEADS - 1) // HEADS
    own = None
    if KIND != "":  # pairs, of a key and a value
        own = scales + (block // SIZE).to(tl.int64) * sb + block % SIZE * 2
    if tl.program_id(1) < turning:
        head = tl.program_id(1) * HEADS + row % HEADS
        _turn(
            qkv, positions, cos_sin, k_cache, entry, slot, q_norm, k_norm, out, k_out, eps, token, head, (head < HQ + HKV) & (token < tokens),
            stride, k_stride, kh, HQ, D, HALF, HALF_P, REST_P, NORM, KEEP, PDL, own, fixed_k, (tl.program_id(1) + 1) * HEADS > HQ, SIZE, KIND, LARGEST,
        )  # fmt: skip
    else:
        wait(PDL)
        kv_head = (tl.program_id(1) - turning) * HEADS + row % HEADS
        d = tl.arange(0, D_P)[None, :]
        there = ((slot >= 0) & (kv_head < HKV))[:, None] & (d < D)
        value = tl.load((qkv + token * stride + (HQ + HKV + kv_head) * D)[:, None] + d, mask=there, other=0.0)
        if KIND != "":
            wide = value.to(tl.float32)
            scale = scale_of(tl.max(tl.abs(wide), 1), tl.sum(wide - wide, 1), fixed_v, LARGEST)
            tl.store(own + kv_head * (2 * SIZE) + 1, scale.to(tl.bfloat16), mask=(slot >= 0) & (kv_head < HKV))
            place = (block // SIZE).to(tl.int64) * kb + block % SIZE + kv_head * kh  # by dimension: see attention/coded.py
            tl.store((v_cache + place)[:, None] + d * SIZE, code_of(wide, scale[:, None], KIND, LARGEST), mask=there)
        else:
            tl.store((v_cache + entry + kv_head * kh)[:, None] + d, value, mask=there)


def rope_and_cache(
    qkv: Tensor, positions: Tensor, cos_sin: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, num_heads: int, num_kv_heads: int,
    q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 1e-6, out: Tensor | None = None, *,
    k_out: Tensor | None = None, codes: Codes | None = None, fixed: tuple[float, float] | None = None, config: dict[str, int] | None = None,
) -> Tensor:  # fmt: skip
    """q [T, Hq, D]; K and V go to the caches. Padding tokens: slot below 0, position 0. See kernels/gpu.py.

    k_out [T, Hkv, D]: also gets the rotated keys; it may be the keys' own columns of qkv. With them and the values' columns `ragged_attention` reads
    this step's keys without the page table. codes: the caches get 8 bits (attention/coded.py), with `fixed` by these scales of keys and values instead of
    a token's own.
    """
    tokens, (size, dim) = qkv.shape[0], k_cache.shape[2:]
    require(qkv.shape[1] == (num_heads + 2 * num_kv_heads) * dim and qkv.stride(1) == 1, "qkv must have (Hq + 2 Hkv) * D columns")
    require(k_cache.stride() == v_cache.stride() and k_cache.stride()[1:] == (size * dim, dim, 1), "a block must be contiguous")
    require(codes is None or k_cache.dtype == v_cache.dtype == torch.uint8, "caches of codes are uint8")
    require(cos_sin.dtype == torch.float32 and cos_sin.is_contiguous() and cos_sin.shape[1] <= dim, "cos_sin must be [P, r] float32")
    out = torch.empty(tokens, num_heads, dim, dtype=qkv.dtype, device=qkv.device) if out is None else out
    require(out.shape == (tokens, num_heads, dim) and out.is_contiguous(), "out must be contiguous, [T, Hq, D]")
    require((q_norm is None) == (k_norm is None), "queries and keys have norms, or neither")
    if tokens:
        config = dict(config or tuned(_config(tokens, q_norm is not None, codes is not None)))
        half = cos_sin.shape[1] // 2
        heads = min(config.pop("HEADS"), power(num_heads + num_kv_heads))
        rows = max(1, config.pop("ROWS") * 64 // (heads * power(half)))  # ROWS is for heads of 128: shorter ones make more rows
        coded: dict[str, Any] = {}
        if codes is not None:
            own = {"fixed_k": fixed and fixed[0], "fixed_v": fixed and fixed[1]}
            coded = {"scales": codes.scales, "sb": codes.scales.stride(0), **own, "KIND": codes.kind, "LARGEST": LARGEST[codes.kind]}
        _rope[(-(-tokens // rows), -(-(num_heads + num_kv_heads) // heads) - (-num_kv_heads // heads))](
            qkv, positions, cos_sin, k_cache, v_cache, slots, q_norm, k_norm, out, k_out, eps, tokens, qkv.stride(0),
            0 if k_out is None else k_out.stride(0), k_cache.stride(0), k_cache.stride(1),
            HQ=num_heads, HKV=num_kv_heads, D=dim, D_P=power(dim), HALF=half, HALF_P=power(half),
            REST_P=power(dim - 2 * half) if dim > 2 * half else 0, SIZE=size, NORM=q_norm is not None, KEEP=k_out is not None,
            HEADS=heads, TOKENS=rows, **coded, **chained(), **config,
        )  # fmt: skip
    return out


def _config(tokens: int, normed: bool, coded: bool) -> str:
    """Which of the tuned ones."""
    if coded and tokens <= FEW_TOKENS:
        return "rope.few"
    if normed or not coded:
        return "rope.normed" if normed else "rope"
    return "rope.coded" if tokens <= SOME_TOKENS else "rope.coded.many"
