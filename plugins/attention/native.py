"""The kernels' own paged attention, part of the whole-step program.

What it is: the Attention object (plugins/models/api.py) over kernels.attention.
What it does not know: models, slots.
"""

from __future__ import annotations

import torch

from penstock.kernels.attention import KV_LAYOUT, paged_attention


def allocate_pool(num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype, layers: int) -> torch.Tensor:
    """[layers, 2, num_blocks, Hkv, block_size, D], not initialised: pages are touched when blocks are written."""
    return torch.empty(layers, 2, num_blocks, num_kv_heads, block_size, head_dim, dtype=dtype)


class NativeAttention:
    name = "native"
    kv_layout = KV_LAYOUT
    fused = True
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
        return paged_attention(q, k_cache, v_cache, block_tables, q_start, kv_len, scale, window)
