"""The pool that the built-in attention backends share: pages, block-major.

What it is: one page holds a block's keys and values of all layers, [layers, 2 (K, V), Hkv, block_size, D] of the model's dtype, so that a block is one
contiguous piece to copy, swap or send. In 8 bits (`kv`) a page holds codes of one byte in that order, and behind all of them the scales of every token and head,
[layers, 2, Hkv, block_size] bfloat16 (kernels/attention/codes.py): still one contiguous piece that explains itself. What lies inside a (layer, K or V) is each backend's own.
What it does not know: attention, who owns a block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from penstock.core.contract.devices import ModelFacts
from penstock.kernels.attention.codes import KINDS

Tensor = torch.Tensor
SCALE_BYTES = 2
"""Of the scale of a token and head."""


class Cache(NamedTuple):
    """One layer's: two views [num_blocks, Hkv, block_size, D] of the pool, each block contiguous; in 8 bits of uint8, with two more for the scales."""

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    """[num_blocks, Hkv, block_size] bfloat16, each block contiguous."""
    v_scale: Tensor | None = None
    fixed: tuple[float, float] | None = None
    """The checkpoint's scales of keys and values, which every token of this layer gets; None: each token and head its own."""


def token_bytes(facts: ModelFacts, dtype: torch.dtype, kv: str = "") -> int:
    """Of a token in one layer; `kv`: one of KINDS, or "" for the model's dtype."""
    return 2 * facts.num_kv_heads * (facts.head_dim + SCALE_BYTES if kv else facts.head_dim * dtype.itemsize)


class Pages:
    """See plugins/models/api.py: Attention, the part about the pool."""

    def __init__(self, facts: ModelFacts, dtype: torch.dtype, device: torch.device, block_size: int, kv: str = "") -> None:
        if kv and kv not in KINDS:
            raise ValueError(f"a KV cache of {kv!r} is not known, only {', '.join(KINDS)}")
        self.heads, self.kv_heads, self.dim = facts.num_heads, facts.num_kv_heads, facts.head_dim
        self.bytes_per_token = token_bytes(facts, dtype, kv)
        self.kv = kv
        self._page = (facts.num_layers, 2, facts.num_kv_heads, block_size, facts.head_dim)
        self._dtype = dtype
        self._device = device
        self._fixed: list[tuple[float, float] | None] = [None] * facts.num_layers

    def fix_scales(self, scales: list[tuple[float, float] | None]) -> None:
        """See Attention: before `caches`."""
        self._fixed = list(scales)

    def allocate(self, num_blocks: int) -> Tensor:
        """[num_blocks, page bytes] uint8. Of codes zeros: kernels read what lies behind a sequence's last key, which counts for nothing if it is a number."""
        layers, _, _, block_size, _ = self._page
        make = torch.zeros if self.kv else torch.empty
        return make(num_blocks, layers * self.bytes_per_token * block_size, dtype=torch.uint8, device=self._device)

    def caches(self, pool: Tensor) -> list[Cache]:
        """One a layer."""
        if not self.kv:
            pages = pool.view(self._dtype).view(-1, *self._page)
            return [Cache(pages[:, layer, 0], pages[:, layer, 1]) for layer in range(self._page[0])]
        layers, _, heads, block_size, dim = self._page
        bytes_of_codes = 2 * layers * heads * block_size * dim
        codes = pool[:, :bytes_of_codes].view(-1, *self._page)
        scales = pool[:, bytes_of_codes:].view(torch.bfloat16).view(-1, *self._page[:-1])
        return [Cache(codes[:, i, 0], codes[:, i, 1], scales[:, i, 0], scales[:, i, 1], fixed) for i, fixed in enumerate(self._fixed)]

    def copy(self, pool: Tensor, source: Tensor, target: Tensor) -> None:
        """Whole pages, in every layer at once."""
        real = (source >= 0) & (target >= 0)
        pool[target[real].long()] = pool[source[real].long()]
