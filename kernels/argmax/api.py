"""Checked entry of the greedy choice.

    argmax(logits[M, V] float32, out=None) -> [M] int32

The first index of each row's maximum; -1 where the row is bad: it holds a NaN or +inf, or nothing above -inf. Single -inf entries are
fine (masked tokens).
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels import native
from penstock.kernels.argmax import reference
from penstock.kernels.checks import require, tensor


def argmax(logits: Tensor, out: Tensor | None = None) -> Tensor:
    """First maximum of each row, or -1."""
    tensor("logits", logits, (None, None), torch.float32)
    require(logits.shape[1] > 0, "logits must have at least one column")
    if out is None:
        out = torch.empty(logits.shape[0], dtype=torch.int32)
    else:
        tensor("out", out, (logits.shape[0],), torch.int32)
    lib = native.library()
    if lib is None:
        return out.copy_(reference.argmax(logits))
    lib.lib.ps_argmax(logits.data_ptr(), out.data_ptr(), logits.shape[0], logits.shape[1], torch.get_num_threads())
    return out
