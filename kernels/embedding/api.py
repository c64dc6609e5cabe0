"""Checked entry of the embedding look-up.

    embedding(ids[T] int32, table[V, H], out=None) -> [T, H]

dtype bfloat16 or float32, contiguous. An id outside [0, V) raises IndexError.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels import native
from penstock.kernels.checks import FLOATS, tensor
from penstock.kernels.embedding import reference
from penstock.kernels.native.bind import check


def embedding(ids: Tensor, table: Tensor, out: Tensor | None = None) -> Tensor:
    """Rows of `table`."""
    tensor("ids", ids, (None,), torch.int32)
    tensor("table", table, (None, None), *FLOATS)
    if out is None:
        out = torch.empty(ids.shape[0], table.shape[1], dtype=table.dtype)
    else:
        tensor("out", out, (ids.shape[0], table.shape[1]), table.dtype)
    lib = native.library()
    if lib is None:
        if ids.numel():
            check(4 if int(ids.min()) < 0 or int(ids.max()) >= table.shape[0] else 0)
        return out.copy_(reference.embedding(ids, table))
    row_bytes = table.shape[1] * table.element_size()
    threads = torch.get_num_threads()
    check(lib.lib.ps_embedding(ids.data_ptr(), table.data_ptr(), out.data_ptr(), ids.shape[0], table.shape[0], row_bytes, threads))
    return out
