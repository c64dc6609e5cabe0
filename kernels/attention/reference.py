"""Plain-torch truth of causal attention over the paged cache.

    out[i] = softmax(scale * q[i] . K[lo..p]) V[lo..p],   p = kv_len - rows + i,  lo = max(0, p - window + 1) or 0

for row i of a sequence with `rows` query rows in this step (Vaswani et al. 2017, arXiv:1706.03762; grouped heads: Ainslie et al. 2023,
arXiv:2305.13245; paging: Kwon et al. 2023, arXiv:2309.06180). With `ancestors` (trees of drafts: Miao et al. 2023, arXiv:2305.09781) a row sees of the last 64
entries only those whose bit is 1 in its own, bit i being the entry i places before it. Those that it sees are at the positions 0 to p, in this order, and p is its place less those
that it does not see: `places_of`. Float32 throughout, rounded once at the end.
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
    group = q.shape[1] // k_cache.shape[1]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    for row in range(kv_len.shape[0]):
        first, last, length = int(q_start[row]), int(q_start[row + 1]), int(kv_len[row])
        if first == last:
            continue
        every = _read(row, torch.arange(length), block_tables, k_cache, v_cache, group, wide, scales)
        nodes = None if ancestors is None else ancestors[first:last]
        if nodes is None or bool((nodes == -1).all()):
            out[first:last] = _attended(q[first:last], *every, scale, window).to(q.dtype)
            continue
        for node in range(last - first):  # its line as a sequence of its own
            where = places_of(nodes[node], length - (last - first) + node)
            keys, values = (part[:, where] for part in every)
            out[first + node] = _attended(q[first + node][None], keys, values, scale, window)[0].to(q.dtype)
    return out


def _read(
    row: int, at: Tensor, block_tables: Tensor, k_cache: Tensor, v_cache: Tensor, group: int, wide: torch.dtype, scales: Scales | None
) -> tuple[Tensor, Tensor]:
    """Keys and values at these places of sequence `row`, two [Hq, L, D]."""
    size = k_cache.shape[2]
    slots = block_tables[row].long()[at // size] * size + at % size
    keys = read_kv(k_cache, slots, values=False, scales=scales).to(wide).repeat_interleave(group, dim=1).transpose(0, 1)
    values = read_kv(v_cache, slots, values=True, scales=scales).to(wide).repeat_interleave(group, dim=1).transpose(0, 1)
    return keys, values


def _attended(q: Tensor, keys: Tensor, values: Tensor, scale: float, window: int) -> Tensor:
    """q [T, Hq, D], of the last of all positions."""
    length, rows = keys.shape[1], q.shape[0]
    at, position = torch.arange(length), torch.arange(length - rows, length)[:, None]
    allowed = at[None] <= position
    if window > 0:
        allowed &= at[None] > position - window
    values = values.masked_fill(~allowed.any(0)[:, None], 0)  # what nobody sees may be NaN
    scores = (q.to(values.dtype).transpose(0, 1) @ keys.transpose(1, 2)) * scale
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(dim=-1)
    return (weights @ values).transpose(0, 1)


def places_of(ancestors: Tensor, place: int) -> Tensor:
    """Of the row at `place` with these `ancestors` (one number) the places that it sees, one a position, its own last."""
    back = torch.arange(place, -1, -1, device=ancestors.device)
    return place - back[(back >= 64) | ((ancestors >> back.clamp_max(63)) & 1).bool()]


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
