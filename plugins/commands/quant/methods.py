"""How a weight is rounded when it is known what it will be multiplied by.

What it is: AWQ (Lin et al. 2023, arXiv 2306.00978): inputs that are large on average are made smaller where they come from, and their columns larger, by a
power of their size that is searched for; then each group gets the range that loses least. SmoothQuant (Xiao et al. 2022,
arXiv 2211.10438): the same move by a fixed rule, for servers that round inputs, too. And GPTQ (Frantar et al. 2022, arXiv 2210.17323): columns are rounded one after another, and the error that each makes in the layer's outputs is taken
over by those that follow, as far as the inputs' Gram matrix lets them. All sums are float64.
What it does not know: layers, models, files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from penstock.kernels.linear.scheme import Quantised, Scheme, dequantise, nearest, quantise
from penstock.plugins.commands.quant.forms import scale_dtype_of

Tensor = torch.Tensor


class Rounded(NamedTuple):
    """Weights that read one input. With a `norm` the weights are those of inputs that have it for a factor in place of the one they had."""

    weights: Sequence[Quantised]
    norm: Tensor | None = None


Method = Callable[[Tensor, Sequence[Tensor], Scheme, Tensor | None], Rounded]
"""(inputs [T, K], the weights [N, K] that read them, their scheme, the factor [K] that the inputs have from a norm if nothing else reads them) -> rounded."""
DAMP = 0.01
"""Added to the diagonal of the Gram matrix, as a share of its mean: inputs that hardly vary would make it singular, or count for nothing."""
POWERS = tuple(step / 20 for step in range(21))
"""Of the mean magnitude of an input, by which its column is made larger."""
NARROWER = tuple(1 - step / 20 for step in range(11))
"""Shares of a group's range. Those of scales that are powers of two are 1, 2 (the largest value may lie beyond the range) and 1/2."""
SHARE = 0.5
"""Of SmoothQuant: how much of an input's range goes into its column (alpha)."""
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
        piece = left[:, start:end].T.contiguous()  # a column lies together
        errors = torch.empty_like(piece)
        for j in range(start, end):
            own = piece[j - start]
            if grouped and j % scheme.group == 0:
                # up to date within this piece only; a group is never wider than one
                group = torch.cat((piece[j - start : j - start + scheme.group].T, left[:, end : j + scheme.group]), 1).float()
                scales[:, j // scheme.group] = quantise(group, scheme._replace(group=0), scale_dtype).scales[:, 0]
            column = _column(scales, scheme, j, left.shape[0])
            rounded = nearest((own[:, None] / column).float(), scheme.kind).double() * column
            done[:, j] = rounded[:, 0]
            errors[j - start] = (own - rounded[:, 0]) / upper[j, j]
            piece[j - start + 1 :] -= upper[j, j + 1 : end, None] * errors[j - start]
        left[:, end:] -= errors.T @ upper[start:end, end:]
    return quantise(done.float(), scheme, scale_dtype, scales)


def _column(scales: Tensor, scheme: Scheme, j: int, n: int) -> Tensor:
    """[N, 1] of column j, float64."""
    column = scales[:, j // scheme.group if scheme.group else 0].double()
    return (column if scheme.rows == 1 else column.repeat_interleave(scheme.rows or n)[:n])[:, None]


def gptq_of(word: str) -> Method:
    """For a word of --scheme."""

    def rounded(x: Tensor, weights: Sequence[Tensor], scheme: Scheme, norm: Tensor | None) -> Rounded:
        upper = factor(gram(x))
        return Rounded([gptq(weight, upper, scheme, scale_dtype_of(word, weight.dtype)) for weight in weights])

    return rounded


def loss(found: Tensor, meant: Tensor, h: Tensor) -> float:
    """Sum of squares of what outputs lose, for inputs with the Gram matrix h: trace(d h d^T). The product is in single precision, half the time of a double one and far finer
    than the difference between two powers."""
    d = found.float() - meant.float()
    return float(((d @ h.float()) * d).sum(dtype=torch.float64))


def narrowed(weight: Tensor, h: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Quantised:
    """Rounded to the nearest with the share of each group's range that loses least, inputs taken as independent. Blocks of several rows keep theirs."""
    plain = quantise(weight, scheme, scale_dtype)
    if scheme.rows != 1:
        return plain
    weighs = h.diagonal() + DAMP * h.diagonal().mean()  # an input that few texts have is no free one
    best, least = plain.scales.clone(), torch.full(plain.scales.shape, torch.inf, dtype=torch.float64)
    for share in (1.0, 2.0, 0.5) if scheme.kind == "fp4" else NARROWER:
        scales = (plain.scales.float() * share).to(scale_dtype)
        error = (dequantise(quantise(weight, scheme, scale_dtype, scales)).double() - weight.double()).square() * weighs
        lost = error.view(len(weight), scheme.groups(weight.shape[1]), -1).sum(2)
        best, least = torch.where(lost < least, scales, best), torch.minimum(lost, least)
    return quantise(weight, scheme, scale_dtype, best)


def awq(x: Tensor, weights: Sequence[Tensor], scheme: Scheme, norm: Tensor | None, scale_dtype: torch.dtype) -> Rounded:
    """Weights rounded with the power that loses least of them all; without a norm, or where its factors are not all above 0, as they are."""
    h = gram(x)
    if norm is None or bool((norm <= 0).any()):
        return Rounded([narrowed(weight, h, scheme, scale_dtype) for weight in weights])
    sizes = x.float().abs().mean(0).double().clamp_min(1e-6)
    best: tuple[float, Tensor, Tensor] | None = None
    for power in POWERS:
        by = sizes**power
        by = by / (by.max() * by.min()).sqrt()
        other = (norm.double() / by).to(norm.dtype)  # what can be stored, from which the factor follows exactly
        by = norm.double() / other.double()
        if not bool(torch.isfinite(by).all()):
            continue
        lost = 0.0
        for weight in weights:
            wide = weight.double() * by
            lost += loss(dequantise(quantise(wide.float(), scheme, scale_dtype)) / by.float(), weight, h)
        if best is None or lost < best[0]:
            best = lost, by, other
    assert best is not None  # the power 0 is always finite
    _, by, other = best
    scaled = h / by[:, None] / by
    return Rounded([narrowed((weight.double() * by).float(), scaled, scheme, scale_dtype) for weight in weights], other)


def awq_of(word: str) -> Method:
    """For a word of --scheme."""

    def rounded(x: Tensor, weights: Sequence[Tensor], scheme: Scheme, norm: Tensor | None) -> Rounded:
        return awq(x, weights, scheme, norm, scale_dtype_of(word, weights[0].dtype))

    return rounded


def smoothquant(x: Tensor, weights: Sequence[Tensor], scheme: Scheme, norm: Tensor | None, scale_dtype: torch.dtype) -> Rounded:
    """Rounded to the nearest, after an input's and its column's largest magnitudes were made alike; without a norm, or where that is no finite factor, as
    they are."""
    by = None
    if norm is not None and not bool((norm == 0).any()):
        columns = torch.stack([weight.double().abs().amax(0) for weight in weights]).amax(0)
        factors = x.double().abs().amax(0).clamp_min(1e-5) ** SHARE / columns.clamp_min(1e-5) ** (1 - SHARE)
        other = (norm.double() / factors).to(norm.dtype)  # what can be stored, from which the factor follows exactly
        by = norm.double() / other.double()
    if by is None or not bool(torch.isfinite(by).all()):
        return Rounded([quantise(weight, scheme, scale_dtype) for weight in weights])
    return Rounded([quantise((weight.double() * by).float(), scheme, scale_dtype) for weight in weights], other)


def smoothquant_of(word: str) -> Method:
    """For a word of --scheme."""

    def rounded(x: Tensor, weights: Sequence[Tensor], scheme: Scheme, norm: Tensor | None) -> Rounded:
        return smoothquant(x, weights, scheme, norm, scale_dtype_of(word, weights[0].dtype))

    return rounded


METHODS: Mapping[str, Callable[[str], Method]] = {"gptq": gptq_of, "awq": awq_of, "smoothquant": smoothquant_of}
"""Those that look at inputs."""
