"""Attention by torch's scaled_dot_product_attention over keys gathered from the paged cache.

What it is: a second opinion on the same cache layout, one sequence at a time.
What it does not know: models, slots.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from penstock.kernels.attention import KV_LAYOUT, read_kv
from penstock.plugins.attention.native import allocate_pool


class TorchAttention:
    name = "torch"
    kv_layout = KV_LAYOUT
    fused = False
    allocate = staticmethod(allocate_pool)

    def attend(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        block_tables: torch.Tensor,
        q_start: torch.Tensor,
        kv_len: torch.Tensor,
        scale: float,
        window: int,
    ) -> torch.Tensor:
        """See Attention.attend."""
        out = torch.empty_like(q)
        size = k_cache.shape[2]
        bounds = q_start.tolist()
        for row, length in enumerate(kv_len.tolist()):
            first, last = bounds[row], bounds[row + 1]
            at = torch.arange(length)
            slots = block_tables[row].long()[at // size] * size + at % size
            keys = read_kv(k_cache, slots, values=False).transpose(0, 1)[None]
            values = read_kv(v_cache, slots, values=True).transpose(0, 1)[None]
            position = torch.arange(length - (last - first), length)[:, None]
            seen = at[None] <= position
            if window > 0:
                seen &= at[None] > position - window
            attended = functional.scaled_dot_product_attention(
                q[first:last].transpose(0, 1)[None], keys, values, attn_mask=seen, scale=scale, enable_gqa=True
            )
            out[first:last] = attended[0].transpose(0, 1)
        return out
