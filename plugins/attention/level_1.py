"""Attention backends of api_level 1 as today's: for the CPU, over its panel layout.

What it is: `adapt`, which core/contract/families.py calls for a spec of that level. Such a backend allocates the pool [layers, 2, num_blocks, ...] itself and only
reads it: keys and values are written by the kernels. Its table of operations for "cuda" is not spoken any more.
What it does not know: models, slots.
"""

from __future__ import annotations

from typing import Any

import msgspec
import torch

from penstock.core.contract.devices import ModelFacts
from penstock.core.contract.hookspecs import AttentionSpec
from penstock.core.protocol.errors import PluginError
from penstock.kernels.rope import rope_and_cache
from penstock.plugins.attention.pages import Cache
from penstock.plugins.models.api import AttnCall, Columns

Tensor = torch.Tensor


def adapt(spec: AttentionSpec) -> AttentionSpec:
    """Raises PluginError for one that serves "cuda" alone."""
    devices = [name for name in spec.devices if name != "cuda"]
    if not devices:
        raise PluginError(
            f'Attention backend {spec.name} is of api_level 1, which for "cuda" was a whole table of operations. Give an Attention of level 2'
            " (docs/hooks.md)."
        )

    def factory(*, facts: ModelFacts, dtype: torch.dtype, block_size: int, **options: Any) -> Level1Attention:
        return Level1Attention(spec.factory(facts=facts, dtype=dtype), facts, dtype, block_size)

    return msgspec.structs.replace(spec, api_level=2, devices=devices, factory=factory)


class Level1Attention:
    """See Attention."""

    capturable = False
    workspace_bytes = 0

    def __init__(self, own: Any, facts: ModelFacts, dtype: torch.dtype, block_size: int) -> None:
        self.name: str = own.name
        self.kv_layout: str = own.kv_layout
        self.bytes_per_token = 2 * facts.num_kv_heads * facts.head_dim * dtype.itemsize
        self._own = own
        self._facts = facts
        self._dtype = dtype
        self._block_size = block_size

    def allocate(self, num_blocks: int) -> Tensor:
        """[layers, 2, num_blocks, ...], as the backend likes it."""
        facts = self._facts
        pool: Tensor = self._own.allocate(num_blocks, facts.num_kv_heads, self._block_size, facts.head_dim, self._dtype, facts.num_layers)
        return pool

    def caches(self, pool: Tensor) -> list[Cache]:
        """See Attention."""
        return [Cache(layer[0], layer[1]) for layer in pool]

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
        return rope_and_cache(qkv, *at, self._facts.num_heads, self._facts.num_kv_heads, q_norm, k_norm, eps)

    def attend(self, q: Tensor, qkv: Tensor, cache: Cache, columns: Columns, call: AttnCall) -> Tensor:
        """See Attention."""
        at = (columns.block_tables(), columns.q_start, columns.kv_len)
        attended: Tensor = self._own.attend(q, cache.k, cache.v, *at, call.scale, call.window)
        return attended

    def copy(self, pool: Tensor, source: Tensor, target: Tensor) -> None:
        """See Attention."""
        real = (source >= 0) & (target >= 0)
        for layer in pool:
            layer[:, target[real].long()] = layer[:, source[real].long()]

    def seam(self, longest: int) -> int:
        """Level 1 had none."""
        return 0
