"""Row operations: norms, activations, embedding, argmax."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from penstock.kernels.activation import ACTIVATIONS, gated
from penstock.kernels.activation import reference as activation_reference
from penstock.kernels.argmax import argmax
from penstock.kernels.argmax import reference as argmax_reference
from penstock.kernels.embedding import embedding
from penstock.kernels.rmsnorm import add_rms_norm, rms_norm
from penstock.kernels.rmsnorm import reference as norm_reference


def relative(got: Tensor, truth: Tensor) -> float:
    return float(((got.double() - truth.double()).abs() / truth.double().abs().clamp(min=0.05)).max())


def limit(dtype: torch.dtype) -> float:
    return 2**-6 if dtype == torch.bfloat16 else 1e-5


@pytest.mark.parametrize("columns", [1, 7, 16, 80, 256, 777])
@pytest.mark.parametrize("rows", [1, 3, 65])
def test_norm_equals_float64(dtype: torch.dtype, rows: int, columns: int) -> None:
    x, weight = (torch.randn(rows, columns) * 3).to(dtype), torch.randn(columns).to(dtype)
    out = torch.full_like(x, torch.nan)
    truth = norm_reference.rms_norm(x.double(), weight.double(), 1e-5)
    assert relative(rms_norm(x, weight, 1e-5, out=out), truth) < limit(dtype)
    residual = torch.randn(rows, columns).to(dtype)
    total = residual + x
    fused = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, total)
    assert torch.equal(fused, rms_norm(total, weight, 1e-5))


@pytest.mark.usefixtures("compiled")
def test_norm_of_a_row_does_not_know_its_batch(dtype: torch.dtype) -> None:
    x, weight = torch.randn(130, 256).to(dtype), torch.randn(256).to(dtype)
    whole = rms_norm(x, weight, 1e-6)
    for row in (0, 64, 129):
        assert torch.equal(rms_norm(x[row : row + 1], weight, 1e-6), whole[row : row + 1])


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("columns", [1, 5, 16, 50, 1792])
def test_activation_equals_float64(dtype: torch.dtype, kind: str, columns: int) -> None:
    x = (torch.randn(9, 2 * columns) * 4).to(dtype)
    x[0, 0], x[1, 0] = 100.0, -100.0
    out = torch.full((9, columns), torch.nan, dtype=dtype)
    truth = activation_reference.gated(kind, x.double())
    assert relative(gated(kind, x, out=out), truth) < limit(dtype)  # type: ignore[arg-type]
    x[2, 0] = torch.nan
    got = gated(kind, x)  # type: ignore[arg-type]
    assert torch.isnan(got[2, 0])
    assert torch.isnan(got).sum() == 1


def test_embedding(dtype: torch.dtype) -> None:
    table = torch.randn(50, 33).to(dtype)
    ids = torch.randint(0, 50, (70,), dtype=torch.int32)
    assert torch.equal(embedding(ids, table), table[ids.long()])
    assert embedding(ids[:0], table).shape == (0, 33)
    for bad in (-1, 50):
        with pytest.raises(IndexError, match="token id"):
            embedding(torch.tensor([3, bad], dtype=torch.int32), table)


@pytest.mark.parametrize("columns", [1, 3, 16, 17, 4099])
def test_argmax(columns: int) -> None:
    logits = torch.randn(40, columns)
    logits[1] = 2.5  # all equal: the first wins
    logits[2] = -torch.inf
    logits[3, -1] = torch.nan
    logits[4, columns // 2] = torch.inf
    logits[5] = -torch.inf
    logits[5, -1] = -3e38
    logits[6, columns // 2 :] = 9.0
    got = argmax(logits)
    assert torch.equal(got, argmax_reference.argmax(logits))
    assert got[1:7].tolist() == [0, -1, -1, -1, columns - 1, columns // 2]
    assert torch.equal(got[7:], logits[7:].argmax(dim=1).int())


def test_bad_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="weight must have shape"):
        rms_norm(torch.randn(2, 4), torch.randn(5), 1e-5)
    with pytest.raises(ValueError, match="even number"):
        gated("silu", torch.randn(2, 5))
    with pytest.raises(ValueError, match="activation must be"):
        gated("relu", torch.randn(2, 4))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one column"):
        argmax(torch.empty(2, 0))
