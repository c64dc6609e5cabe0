"""Tensors that a weight source gave, looked at before anything is made of them.

What it is: `CheckedWeights`: whatever `take` raises or gives that is not the tensor that was asked for is said with the source's and the tensor's name.
What it does not know: which source it is, what the names mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from penstock.core.protocol.errors import CheckpointError, PenstockError, described, tamed


class CheckedWeights:
    """See plugins/models/api.py: Weights; `blame` makes of what is wrong the error that names the source. What else it has is reached through this. `finite`: a tensor with
    NaN or infinity is refused as well."""

    def __init__(self, own: Any, dtype: torch.dtype, blame: Callable[[Exception | str], Exception], finite: bool = False) -> None:
        self._own = own
        self._dtype = dtype
        self._blame = blame
        self._finite = finite

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def take(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """See Weights.take. Raises what `blame` makes of what is no such tensor."""
        try:
            value = self._own.take(name, shape)
        except PenstockError:
            raise
        except BaseException as error:
            raise self._blame(f"failed for the tensor {name!r} with {described(tamed(error), 200)}") from error
        if not isinstance(value, torch.Tensor):
            raise self._blame(f"gave {type(value).__name__} for the tensor {name!r}, which is no torch.Tensor")
        if list(value.shape) != list(shape) or value.dtype != self._dtype:
            raise self._blame(
                f"gave the tensor {name!r} of shape {list(value.shape)} and {value.dtype}, and was asked for {list(shape)} and {self._dtype}"
            )
        if self._finite and not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"The tensor {name!r} holds NaN or infinity. Copy the checkpoint again from where it came from.")
        return value if value.is_contiguous() else value.contiguous()
