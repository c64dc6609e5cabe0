"""Checked entry of prompt lookup on the host.

    ngrams(slots[R], ends[R], history[S, L], shortest, longest, out[R, K]) -> None

All int32. The definition is in reference.py; the C kernel looks at one row a unit, from the end of the history backwards, and stops at the first place where
`longest` tokens fit.
"""

from __future__ import annotations

import torch

from penstock.kernels import native
from penstock.kernels.checks import require, tensor
from penstock.kernels.drafting import reference
from penstock.kernels.native.bind import check


def ngrams(slots: torch.Tensor, ends: torch.Tensor, history: torch.Tensor, shortest: int, longest: int, out: torch.Tensor) -> None:
    """See the module. Raises IndexError for a slot or an end outside the history."""
    tensor("slots", slots, (None,), torch.int32)
    tensor("ends", ends, slots.shape, torch.int32)
    tensor("history", history, (None, None), torch.int32)
    tensor("out", out, (slots.shape[0], None), torch.int32)
    require(1 <= shortest <= longest, "shortest must be at least 1 and at most longest")
    lib = native.library()
    if lib is None:
        reference.ngrams(slots, ends, history, shortest, longest, out)
        return
    code = lib.lib.ps_ngrams(
        history.data_ptr(), *history.shape, slots.data_ptr(), ends.data_ptr(), len(slots), shortest, longest, out.data_ptr(),
        out.shape[1], torch.get_num_threads(),
    )  # fmt: skip
    check(code)
