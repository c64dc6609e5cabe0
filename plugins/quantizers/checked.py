"""What a quantizer says and gives, looked at before a layer is made of it.

What it is: `CheckedQuantizer`: whatever its calls raise or give that is not what the contract says is told with the quantizer's and the layer's name.
What it does not know: which quantizer it is, formats.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from penstock.core.protocol.errors import PenstockError, described, tamed
from penstock.kernels.linear.scheme import KINDS, Quantised, Scheme
from penstock.plugins.models.api import Weights

T = TypeVar("T")


class CheckedQuantizer:
    """See plugins/models/api.py: Quantizer; `blame(call, what)` makes of what is wrong the error that names the quantizer."""

    def __init__(self, own: Any, blame: Callable[[str, Exception | str], Exception]) -> None:
        self._own = own
        self._blame = blame
        self.method = str(own.method)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def scheme(self, weights: Weights, layer: str, rows: int, inputs: int) -> Scheme | None:
        """See Quantizer.scheme. Raises what `blame` makes of what is none."""
        found = self._asked("scheme", layer, lambda: self._own.scheme(weights, layer, rows, inputs))
        if found is not None and (not isinstance(found, Scheme) or found.kind not in KINDS):
            raise self._blame("scheme", f"returned {found!r:.80} for {layer!r}, which is neither None nor a Scheme of {', '.join(KINDS)}")
        return found

    def read(self, weights: Weights, layer: str, scheme: Scheme, rows: int, inputs: int, device: torch.device) -> Quantised:
        """See Quantizer.read. Raises what `blame` makes of what is no such weight."""
        q: Any = self._asked("read", layer, lambda: self._own.read(weights, layer, scheme, rows, inputs, device))
        wrong = "no Quantised" if not isinstance(q, Quantised) else _wrong(q, scheme, rows, inputs)
        if wrong:
            raise self._blame("read", f"returned {wrong} for {layer!r}")
        read: Quantised = q
        return read

    def _asked(self, call: str, layer: str, of: Callable[[], T]) -> T:
        try:
            return of()
        except (PenstockError, torch.OutOfMemoryError):
            raise
        except BaseException as error:
            raise self._blame(call, f"failed for {layer!r} with {described(tamed(error), 200)}") from error


def _wrong(q: Quantised, scheme: Scheme, rows: int, inputs: int) -> str:
    blocks = (scheme.scale_rows(rows), scheme.groups(inputs))
    if (q.scheme, q.n, q.k) != (scheme, rows, inputs):
        return f"a weight [{q.n}, {q.k}] of another scheme or shape than [{rows}, {inputs}]"
    if q.data.dtype != scheme.dtype or tuple(q.data.shape) != (rows, inputs if scheme.bits == 8 else -(-inputs // 2)):
        return f"data of {list(q.data.shape)} and {q.data.dtype}"
    if not q.scales.is_floating_point() or tuple(q.scales.shape) != blocks:
        return f"scales of {list(q.scales.shape)} and {q.scales.dtype}, not {list(blocks)}"
    if (q.zeros is not None) != scheme.zeros or (q.zeros is not None and (q.zeros.dtype != torch.int16 or tuple(q.zeros.shape) != blocks)):
        return "zero points that its scheme does not have, or other ones"
    if (q.perm is not None) != scheme.permuted or (q.perm is not None and tuple(q.perm.shape) != (inputs,)):
        return "an order of inputs that its scheme does not have, or another one"
    return "" if all(t is None or t.is_contiguous() for t in (q.data, q.scales, q.zeros, q.perm)) else "tensors that are not contiguous"
