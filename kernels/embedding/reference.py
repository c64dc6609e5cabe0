"""Plain-torch truth of the embedding look-up: out[i] = table[ids[i]]."""

from __future__ import annotations

from torch import Tensor


def embedding(ids: Tensor, table: Tensor) -> Tensor:
    """ids [T], table [V, H]; [T, H]."""
    return table[ids.long()]
