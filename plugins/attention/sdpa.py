"""Attention by torch alone, on any device: rows of keys gathered from the pages, one sequence at a time.

What it is: a second opinion on everything that the kernels do between the projection and the output, and what runs where they do not. Pages hold
[Hkv, block_size, D] row by row. A cache in 8 bits is read as float32, and attention computed so. It looks at lengths, so it cannot be captured.
What it does not know: models, slots.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from penstock.kernels.attention.codes import decode, encode
from penstock.kernels.attention.reference import places_of
from penstock.kernels.rmsnorm.reference import rms_norm
from penstock.kernels.rope.reference import rotate
from penstock.plugins.attention.pages import Cache, Pages
from penstock.plugins.models.api import AttnCall, Columns

Tensor = torch.Tensor


class TorchAttention(Pages):
    """See Attention."""

    name = "torch"
    kv_layout = "paged-bhsd-v1"
    capturable = False
    workspace_bytes = 0
    trees = True

    def store(
        self,
        qkv: Tensor,
        columns: Columns,
        cos_sin: Tensor,
        cache: Cache,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> Tensor:
        """See Attention."""
        size = cache.k.shape[2]
        every = qkv.view(qkv.shape[0], self.heads + 2 * self.kv_heads, self.dim)
        q, k, v = every[:, : self.heads], every[:, self.heads : -self.kv_heads], every[:, -self.kv_heads :]
        if q_norm is not None:
            q = rms_norm(q, q_norm, eps)
        if k_norm is not None:
            k = rms_norm(k, k_norm, eps)
        angles = cos_sin[columns.positions.long()]
        keep = columns.places >= 0
        where = columns.places[keep].long()
        keys, values = rotate(k, angles)[keep], v[keep]
        if self.kv:
            assert cache.k_scale is not None
            assert cache.v_scale is not None
            fixed = cache.fixed or (None, None)
            keys, cache.k_scale[where // size, :, where % size] = encode(keys, self.kv, fixed[0])
            values, cache.v_scale[where // size, :, where % size] = encode(values, self.kv, fixed[1])
        cache.k[where // size, :, where % size] = keys
        cache.v[where // size, :, where % size] = values
        return rotate(q, angles).contiguous()

    def attend(self, q: Tensor, qkv: Tensor, cache: Cache, columns: Columns, call: AttnCall) -> Tensor:
        """See Attention."""
        size = cache.k.shape[2]
        out = torch.zeros_like(q)
        bounds, tables = columns.q_start.tolist(), columns.block_tables()
        for row, (slot, length) in enumerate(zip(columns.slots.tolist(), columns.kv_len.tolist(), strict=True)):
            first, last = bounds[row], bounds[row + 1]
            if slot < 0 or length == 0 or first == last:
                continue
            at = torch.arange(length, device=q.device)
            block = tables[row].long()[at // size]
            keys, values = cache.k[block, :, at % size], cache.v[block, :, at % size]
            if self.kv:
                assert cache.k_scale is not None
                assert cache.v_scale is not None
                keys = decode(keys, cache.k_scale[block, :, at % size], self.kv, torch.float32)
                values = decode(values, cache.v_scale[block, :, at % size], self.kv, torch.float32)
            keys, values = keys.transpose(0, 1)[None], values.transpose(0, 1)[None]
            if columns.ancestors is None or bool((columns.ancestors[first:last] == -1).all()):
                out[first:last] = _attend(q[first:last], keys, values, call)
                continue
            for node in range(first, last):  # its line as a sequence of its own
                line = places_of(columns.ancestors[node], length - last + node)
                out[node] = _attend(q[node][None], keys[:, :, line], values[:, :, line], call)[0]
        return out

    def move(self, pool: Tensor, source: Tensor, target: Tensor) -> None:
        """See Attention."""
        for one in self.caches(pool):
            size = one.k.shape[2]
            for a, b in zip(source.unbind(1), target.unbind(1), strict=True):
                real = (a >= 0) & (b >= 0)
                (i, j), (k, m) = ((places[real] // size, places[real] % size) for places in (a.long(), b.long()))
                for part in (one.k, one.v, one.k_scale, one.v_scale):
                    if part is not None:
                        part[k, :, m] = part[i, :, j]

    def seam(self, longest: int) -> int:
        """Sums never begin anew."""
        return 0


def _attend(q: Tensor, k: Tensor, v: Tensor, call: AttnCall) -> Tensor:
    """q [T, Hq, D], rows at the last of the positions; k, v [1, Hkv, L, D] -> [T, Hq, D]."""
    length, rows = k.shape[2], q.shape[0]
    at, position = torch.arange(length, device=q.device), torch.arange(length - rows, length, device=q.device)[:, None]
    seen = at[None] <= position
    if call.window > 0:
        seen &= at[None] > position - call.window
    return _weighed(q.to(k.dtype).transpose(0, 1)[None], k, v, seen, call)[0].transpose(0, 1)


def _weighed(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, call: AttnCall) -> Tensor:
    """q [1, Hq, T, D]; k, v [1, Hkv, L, D]; seen [T, L] -> [1, Hq, T, D]."""
    if not call.softcap and call.sinks is None:
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=call.scale, enable_gqa=True)
    group = q.shape[1] // k.shape[1]
    scores = q.float() @ k.float().repeat_interleave(group, 1).transpose(2, 3) * call.scale
    if call.softcap:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    total = scores.logsumexp(-1, keepdim=True)
    if call.sinks is not None:
        total = torch.logaddexp(total, call.sinks.float()[None, :, None, None])
    return ((scores - total).exp() @ v.float().repeat_interleave(group, 1)).to(q.dtype)
