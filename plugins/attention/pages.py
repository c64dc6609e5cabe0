"""The pool that the built-in attention backends share: pages, block-major.

What it is: one page holds a block's keys and values of all layers, [layers, 2 (K, V), Hkv, block_size, D] of the model's dtype, so that a block is one
contiguous piece to copy, swap or send. What lies inside a (layer, K or V) is each backend's own.
What it does not know: attention, who owns a block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from penstock.core.contract.devices import ModelFacts

Tensor = torch.Tensor


class Cache(NamedTuple):
    """One layer's: two views [num_blocks, Hkv, block_size, D] of the pool, each block contiguous."""

    k: Tensor
    v: Tensor


class Pages:
    """See plugins/models/api.py: Attention, the part about the pool."""

    def __init__(self, facts: ModelFacts, dtype: torch.dtype, device: torch.device, block_size: int) -> None:
        self.heads, self.kv_heads, self.dim = facts.num_heads, facts.num_kv_heads, facts.head_dim
        self.bytes_per_token = 2 * facts.num_kv_heads * facts.head_dim * dtype.itemsize
        self._page = (facts.num_layers, 2, facts.num_kv_heads, block_size, facts.head_dim)
        self._dtype = dtype
        self._device = device

    def allocate(self, num_blocks: int) -> Tensor:
        """[num_blocks, page bytes] uint8."""
        layers, _, _, block_size, _ = self._page
        return torch.empty(num_blocks, layers * self.bytes_per_token * block_size, dtype=torch.uint8, device=self._device)

    def caches(self, pool: Tensor) -> list[Cache]:
        """One a layer."""
        pages = pool.view(self._dtype).view(-1, *self._page)
        return [Cache(pages[:, layer, 0], pages[:, layer, 1]) for layer in range(self._page[0])]

    def copy(self, pool: Tensor, source: Tensor, target: Tensor) -> None:
        """Whole pages, in every layer at once."""
        real = (source >= 0) & (target >= 0)
        pool[target[real].long()] = pool[source[real].long()]
