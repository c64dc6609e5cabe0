"""A layer of 8-bit integers with zero points, on a kernel that knows none.

    sum_k x[m, k] (code[n, k] - zero[n, g(k)]) scale[n, g(k)] = sum_k x[m, k] code[n, k] scale[n, g(k)] - sum_g (sum_{k in g} x[m, k]) zero[n, g] scale[n, g]

What it is: `Shifted`, a QuantisedLinear over one without zero points whose results are float32: the second sum, a matmul with one column a group, is taken from them; then come bias,
rounding and activation. Both sums are float32, so that no digits are lost between them. Many rows go through in pieces, as float32 results take room.
What it does not know: kernels, the order of codes in memory, deterministic mode (a row's second sum may depend on how many rows there are).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from penstock.kernels.linear.scheme import Quantised, Scheme
from penstock.plugins.models.api import Columns, QuantisedLinear, Stacked

Tensor = torch.Tensor
PIECE = 1024
"""Rows at once."""


def unshifted(scheme: Scheme) -> Scheme:
    """Of the layer below."""
    return scheme._replace(zeros=False, permuted=False, activations="")


class Shifted:
    """See QuantisedLinear. `inner`: of `unshifted(scheme)`, the same rows and inputs, float32 results, no bias; `gated(activation, y)`: of gate beside up."""

    def __init__(
        self,
        inner: QuantisedLinear,
        scheme: Scheme,
        rows: Sequence[int],
        inputs: int,
        bias: Stacked | None,
        activation: str,
        device: torch.device,
        gated: Callable[[str, Tensor], Tensor],
        *,
        head: bool = False,
    ) -> None:
        self.n, self.k = rows[0] if activation else sum(rows), inputs
        self._inner = inner
        self._scheme = scheme
        self._rows = rows
        self._shift = torch.zeros(scheme.groups(inputs), sum(rows), dtype=torch.float32, device=device)
        self._perm = torch.empty(inputs, dtype=torch.int32, device=device) if scheme.permuted else None
        self._bias = bias
        self._joined: Tensor | None = None
        self._activation = activation
        self._gated = gated
        self._head = head
        self.nbytes = inner.nbytes + self._shift.nbytes + (0 if bias is None else sum(part.nbytes for part in bias.parts))

    def fill(self, index: int, part: Quantised) -> None:
        """See QuantisedLinear."""
        assert part.zeros is not None
        first, shift = sum(self._rows[:index]), part.zeros.float() * part.scales.float()
        if self._scheme.rows != 1:
            shift = shift.repeat_interleave(self._scheme.rows or part.n, 0)[: part.n]
        self._shift[:, first : first + part.n] = shift.T.to(self._shift.device)
        if self._perm is not None and part.perm is not None:
            self._perm.copy_(part.perm)
        self._inner.fill(index, part._replace(scheme=unshifted(self._scheme), zeros=None, perm=None, input_scale=None))

    def __call__(self, x: Tensor, columns: Columns | None = None, out: Tensor | None = None) -> Tensor:
        """See Linear."""
        if self._bias is not None and self._joined is None:
            self._joined = self._bias.joined()
        if self._perm is not None:
            x = x.index_select(1, self._perm)
        pieces = [self._some(part) for part in torch.split(x, PIECE)]
        y = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return y if out is None else out.copy_(y)

    def _some(self, x: Tensor) -> Tensor:
        y = self._inner(x)
        group, k = self._scheme.group or self.k, self.k
        padded = torch.nn.functional.pad(x, (0, -k % group)) if k % group else x
        sums = padded.reshape(x.shape[0], -1, group).sum(2, dtype=torch.float32)
        y.addmm_(sums, self._shift, alpha=-1)
        if self._joined is not None:
            y += self._joined
        y = y if self._head else y.to(x.dtype)
        return self._gated(self._activation, y) if self._activation else y
