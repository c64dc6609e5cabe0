"""Checked entry of the embedding look-up.

    embedding(ids[T] int32, table[V, H], out=None) -> [T, H]

dtype bfloat16 or float32, contiguous. An id outside [0, V) raises IndexError.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels.checks import FLOATS, tensor
from penstock.kernels.embedding import reference


def embedding(ids: Tensor, table: Tensor, out: Tensor | None = None) -> Tensor:
    """Rows of `table`."""
    tensor("ids", ids, (None,), torch.int32)
    tensor("table", table, (None, None), *FLOATS)
    if ids.numel() and not (0 <= int(ids.min()) and int(ids.max()) < table.shape[0]):
        raise IndexError(f"a token id lies outside the table of {table.shape[0]} rows")
    if out is None:
        return reference.embedding(ids, table)
    tensor("out", out, (ids.shape[0], table.shape[1]), table.dtype)
    return out.copy_(reference.embedding(ids, table))
