"""How a weight is rounded when it is known what it will be multiplied by.

What it is: GPTQ (Frantar et al. 2022, arXiv 2210.17323): columns are rounded one after another, and the error that each makes in the layer's outputs is taken
over by those that follow, as far as the inputs' Gram matrix lets them. All sums are float64.
What it does not know: layers, models, files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from penstock.kernels.linear.scheme import Quantised, Scheme, nearest, quantise
from penstock.plugins.commands.quant.forms import scale_dtype_of

Tensor = torch.Tensor
Method = Callable[[Tensor, Sequence[Tensor], Scheme], Sequence[Quantised]]
"""(inputs [T, K], the weights [N, K] that read them, their scheme) -> each rounded."""
DAMP = 0.01
"""Added to the diagonal of the Gram matrix, as a share of its mean: inputs that hardly vary would make it singular."""
LAZY = 128
"""Columns after which the rest of the weight is brought up to date, in one matmul."""


def gram(x: Tensor) -> Tensor:
    """x^T x of inputs [T, K], float64, summed in pieces."""
    k = x.shape[1]
    total = torch.zeros(k, k, dtype=torch.float64)
    for start in range(0, len(x), 4096):
        wide = x[start : start + 4096].double()
        total += wide.T @ wide
    return total


def factor(h: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped Gram matrix [K, K]: row j says how the columns after j make up for an error in j."""
    h = h.clone()
    diagonal = h.diagonal()
    mean = float(diagonal.mean())
    diagonal[diagonal == 0] = mean or 1.0  # an input that is always 0
    diagonal += DAMP * (mean or 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper


def gptq(weight: Tensor, upper: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Quantised:
    """Round [N, K] for inputs of which `upper` is the factor. A group's scales are found when its first column comes, from what the weight is then; others
    are those of rounding to the nearest. Raises ValueError for a weight with NaN or infinity."""
    plain = quantise(weight, scheme, scale_dtype)
    scales = plain.scales.clone()
    left, k = weight.double().clone(), weight.shape[1]
    done = torch.empty_like(left)
    grouped = scheme.group and scheme.rows == 1
    for start in range(0, k, LAZY):
        end = min(start + LAZY, k)
        errors = torch.empty(left.shape[0], end - start, dtype=torch.float64)
        for j in range(start, end):
            if grouped and j % scheme.group == 0:
                # up to date within this piece only; a group is never wider than one
                group = left[:, j : j + scheme.group].float()
                scales[:, j // scheme.group] = quantise(group, scheme._replace(group=0), scale_dtype).scales[:, 0]
            column = _column(scales, scheme, j, left.shape[0])
            rounded = nearest((left[:, j : j + 1] / column).float(), scheme.kind).double() * column
            done[:, j] = rounded[:, 0]
            errors[:, j - start] = (left[:, j] - rounded[:, 0]) / upper[j, j]
            left[:, j + 1 : end] -= errors[:, j - start, None] * upper[j, None, j + 1 : end]
        left[:, end:] -= errors @ upper[start:end, end:]
    return quantise(done.float(), scheme, scale_dtype, scales)


def _column(scales: Tensor, scheme: Scheme, j: int, n: int) -> Tensor:
    """[N, 1] of column j, float64."""
    column = scales[:, j // scheme.group if scheme.group else 0].double()
    return (column if scheme.rows == 1 else column.repeat_interleave(scheme.rows or n)[:n])[:, None]


def gptq_of(word: str) -> Method:
    """For a word of --scheme."""

    def rounded(x: Tensor, weights: Sequence[Tensor], scheme: Scheme) -> list[Quantised]:
        upper = factor(gram(x))
        return [gptq(weight, upper, scheme, scale_dtype_of(word, weight.dtype)) for weight in weights]

    return rounded
