"""Linear layers: against float64, on odd shapes, and every row alone against every batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from penstock.kernels.linear import pack, pack_gated

ROWS = (1, 2, 3, 5, 6, 7, 17, 63, 64, 65, 130)


def rand(*shape: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(*shape) * 0.5).to(dtype)


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


def tolerance(dtype: torch.dtype, size: float) -> float:
    return size * (2**-8 if dtype == torch.bfloat16 else 2e-6)


@pytest.mark.parametrize(("n", "k"), [(16, 16), (1, 1), (50, 33), (130, 257), (256, 512), (17, 1792)])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_float64(dtype: torch.dtype, n: int, k: int, bias: bool) -> None:
    weight, shift = rand(n, k, dtype=dtype), rand(n, dtype=dtype) if bias else None
    layer = pack(weight, shift)
    for rows in ROWS:
        x = rand(rows, k, dtype=dtype)
        truth = functional.linear(x.double(), weight.double(), None if shift is None else shift.double())
        got = layer(x, out=poisoned(rows, n, dtype=dtype))
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), truth, rtol=tolerance(dtype, 1), atol=tolerance(torch.float32, 4 + k / 16))
        wide = layer(x, out=poisoned(rows, n, dtype=torch.float32))
        torch.testing.assert_close(wide.double(), truth, rtol=2e-6, atol=tolerance(torch.float32, 4 + k / 16))


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh", "gelu"])
@pytest.mark.parametrize(("n", "k", "bias"), [(48, 64, False), (50, 33, True), (300, 256, True)])
def test_gated_equals_float64(dtype: torch.dtype, kind: str, n: int, k: int, bias: bool) -> None:
    gate, up = rand(n, k, dtype=dtype), rand(n, k, dtype=dtype)
    biases = (rand(n, dtype=dtype), rand(n, dtype=dtype)) if bias else (None, None)
    layer = pack_gated(gate, up, kind, *biases)  # type: ignore[arg-type]
    act = {"silu": functional.silu, "gelu": functional.gelu, "gelu_tanh": lambda t: functional.gelu(t, approximate="tanh")}[kind]
    for rows in (1, 2, 5, 7, 64, 130):
        x = rand(rows, k, dtype=dtype)
        doubles = [None if b is None else b.double() for b in biases]
        truth = act(functional.linear(x.double(), gate.double(), doubles[0])) * functional.linear(x.double(), up.double(), doubles[1])
        got = layer(x, out=poisoned(rows, n, dtype=dtype)).double()
        scale = truth.abs().clamp(min=1.0)
        limit = 2**-6 if dtype == torch.bfloat16 else 1e-4
        assert ((got - truth).abs() / scale).max() < limit


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("n", "k"), [(50, 33), (512, 256), (256, 1792), (1000, 768)])
def test_a_row_does_not_know_its_batch(dtype: torch.dtype, n: int, k: int) -> None:
    layer = pack(rand(n, k, dtype=dtype), rand(n, dtype=dtype))
    gated = pack_gated(rand(n, k, dtype=dtype), rand(n, k, dtype=dtype), "silu")
    x = rand(300, k, dtype=dtype)
    for run in (layer, gated):
        torch.set_num_threads(2)
        whole = run(x)
        assert torch.equal(whole, run(x))
        for rows in ROWS:
            at = 300 - rows - 3
            assert torch.equal(run(x[at : at + rows]), whole[at : at + rows])
        torch.set_num_threads(1)
        assert torch.equal(run(x), whole)
        assert torch.equal(run(x[9:10]), whole[9:10])


def test_inputs_are_not_changed_and_memory_is_exact(dtype: torch.dtype) -> None:
    weight = rand(32, 64, dtype=dtype)
    layer = pack(weight)
    x = rand(9, 64, dtype=dtype)
    before = x.clone()
    layer(x)
    assert torch.equal(x, before)
    assert layer.nbytes >= weight.nbytes


def test_bad_inputs_are_refused() -> None:
    layer = pack(torch.randn(8, 4))
    with pytest.raises(ValueError, match="shape"):
        layer(torch.randn(2, 5))
    with pytest.raises(ValueError, match="x must be torch"):
        layer(torch.randn(2, 4).double())
    with pytest.raises(ValueError, match="contiguous"):
        layer(torch.randn(4, 2).t())
    with pytest.raises(ValueError, match="out must have shape"):
        layer(torch.randn(2, 4), out=torch.empty(2, 9))
    with pytest.raises(ValueError, match="bias"):
        pack(torch.randn(8, 4), torch.randn(7))
    with pytest.raises(ValueError, match="both biases"):
        pack_gated(torch.randn(8, 4), torch.randn(8, 4), "silu", torch.randn(8))
    assert layer(torch.randn(0, 4)).shape == (0, 8)
