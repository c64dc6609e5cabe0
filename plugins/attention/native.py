"""The kernels' own paged attention: by itself, or as a part of the whole-step program.

What it is: the Attention object (plugins/models/api.py) over kernels.rope and kernels.attention. A device that meets it may run a plain model as
one program (plugins/devices/host_ops.py), and these calls are then never made.
What it does not know: models, slots.
"""

from __future__ import annotations

import torch

from penstock.kernels.attention import KV_LAYOUT, Scales, move_kv, paged_attention
from penstock.kernels.rope import rope_and_cache
from penstock.plugins.attention.pages import Cache, Pages
from penstock.plugins.models.api import AttnCall, Columns

Tensor = torch.Tensor


class NativeAttention(Pages):
    """See Attention. Without soft-caps and sinks."""

    name = "native"
    kv_layout = KV_LAYOUT
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
        at = (columns.positions, cos_sin, cache.k, cache.v, columns.places)
        return rope_and_cache(qkv, *at, self.heads, self.kv_heads, q_norm, k_norm, eps, scales=self.scales(cache))

    def attend(self, q: Tensor, qkv: Tensor, cache: Cache, columns: Columns, call: AttnCall) -> Tensor:
        """See Attention."""
        if call.softcap or call.sinks is not None:
            raise ValueError("the native attention has neither soft-caps nor sinks: use --attention-backend torch")
        tables = columns.block_tables()
        at = (tables, columns.q_start, columns.kv_len, call.scale, call.window)
        return paged_attention(q, cache.k, cache.v, *at, scales=self.scales(cache), ancestors=columns.ancestors)

    def move(self, pool: Tensor, source: Tensor, target: Tensor) -> None:
        """See Attention."""
        real = (source >= 0) & (target >= 0)
        if bool(real.any()):
            for cache in self.caches(pool):
                move_kv(cache.k, cache.v, source[real], target[real], self.scales(cache))

    def scales(self, cache: Cache) -> Scales | None:
        """As the kernels want them; None where pages hold the model's elements."""
        if cache.k_scale is None or cache.v_scale is None:
            return None
        return Scales(self.kv, cache.k_scale, cache.v_scale, cache.fixed)

    def seam(self, longest: int) -> int:
        """Sums never begin anew."""
        return 0
