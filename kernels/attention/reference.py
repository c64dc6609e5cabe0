"""Plain-torch truth of causal attention over the paged cache.

    out[i] = softmax(scale * q[i] . K[lo..p]) V[lo..p],   p = kv_len - rows + i,  lo = max(0, p - window + 1) or 0

for row i of a sequence with `rows` query rows in this step (Vaswani et al. 2017, arXiv:1706.03762; grouped heads: Ainslie et al. 2023,
arXiv:2305.13245; paging: Kwon et al. 2023, arXiv:2309.06180). With `ancestors` (trees of drafts: Miao et al. 2023, arXiv:2305.09781) a row sees of the last 64
keys only those whose bit is 1 in its own, bit i being the key i places before it. Float32 throughout, rounded once at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels.attention.layout import Scales, copy_entry, read_kv


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    q_start: Tensor,
    kv_len: Tensor,
    scale: float,
    window: int,
    scales: Scales | None = None,
    ancestors: Tensor | None = None,
) -> Tensor:
    """q [T, Hq, D]; [T, Hq, D] in q's dtype."""
    out = torch.empty_like(q)
    size = k_cache.shape[2]
    group = q.shape[1] // k_cache.shape[1]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    for row in range(kv_len.shape[0]):
        first, last, length = int(q_start[row]), int(q_start[row + 1]), int(kv_len[row])
        if first == last:
            continue
        at = torch.arange(length)
        slots = block_tables[row].long()[at // size] * size + at % size
        keys = read_kv(k_cache, slots, values=False, scales=scales).to(wide).repeat_interleave(group, dim=1).transpose(0, 1)
        values = read_kv(v_cache, slots, values=True, scales=scales).to(wide).repeat_interleave(group, dim=1).transpose(0, 1)
        position = torch.arange(length - (last - first), length)[:, None]
        allowed = at[None] <= position
        if window > 0:
            allowed &= at[None] > position - window
        if ancestors is not None:
            allowed &= seen_by(ancestors[first:last], position - at[None])
        values = values.masked_fill(~allowed.any(0)[:, None], 0)  # what nobody sees may be NaN
        scores = (q[first:last].to(wide).transpose(0, 1) @ keys.transpose(1, 2)) * scale
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(dim=-1)
        out[first:last] = (weights @ values).transpose(0, 1).to(q.dtype)
    return out


def seen_by(ancestors: Tensor, back: Tensor) -> Tensor:
    """Whether each row of `ancestors` [T] int64 lets the keys `back` [T, L] places before its own be seen."""
    return (back >= 64) | ((back >= 0) & ((ancestors[:, None] >> back.clamp(0, 63)) & 1).bool())


def move_kv(k_cache: Tensor, v_cache: Tensor, source: Tensor, target: Tensor, scales: Scales | None = None) -> None:
    """Entries of the places `source` to `target` [N], one after the other; pairs with a place below 0 are left out."""
    size = k_cache.shape[2]
    for a, b in zip(source.tolist(), target.tolist(), strict=True):
        if a < 0 or b < 0:
            continue
        copy_entry(k_cache, v_cache, a, b)
        if scales is not None:
            for part in (scales.k, scales.v):
                part[b // size, :, b % size] = part[a // size, :, a % size]
