"""The Triton matmuls against float64; rows that do not depend on the batch."""

from __future__ import annotations

import pytest
import torch

from penstock.kernels.activation import reference as activation_reference
from penstock.kernels.activation import triton as activation
from penstock.kernels.gpu import tuned
from penstock.kernels.linear import triton as linear

TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 6e-4}


def case(m: int, n: int, k: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    x, w, bias = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype) / 8, torch.randn(n).to(dtype)
    return x.to(device), w.to(device), bias.to(device), x.double() @ w.double().T + bias.double()


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    got = got.cpu().double()
    assert not got.isnan().any()
    assert (got - want).norm() <= tolerance * want.norm()


@pytest.mark.parametrize(("m", "n", "k"), [(1, 32, 128), (3, 40, 300), (16, 96, 256)])
def test_skinny(m: int, n: int, k: int, dtype: torch.dtype, device: str) -> None:
    x, w, bias, want = case(m, n, k, dtype, device)
    workspace = torch.zeros(linear.workspace_elements(n), device=device)
    workspace[linear.COUNTERS :] = torch.nan
    out = torch.full((m, n), torch.nan, dtype=dtype, device=device)
    linear.skinny(x, w, bias, out=out, workspace=workspace)
    close(out, want, TOLERANCE[dtype])
    assert (workspace[: linear.COUNTERS] == 0).all()
    wide = linear.skinny(x, w, bias, out_dtype=torch.float32, workspace=workspace)
    close(wide, want, 1e-5)
    assert torch.equal(linear.skinny(x, w, bias), out)
    alone = linear.skinny(x[m - 1 :], w, bias, workspace=workspace)
    assert torch.equal(alone[0], out[m - 1])


@pytest.mark.parametrize("kind", activation.KINDS)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 32, 128), (3, 44, 300), (16, 96, 256)])
def test_gated(m: int, n: int, k: int, kind: str, dtype: torch.dtype, device: str) -> None:
    """Gate and up in one launch: the bits of the two kernels one after the other, and float64's values."""
    x, w, bias, want = case(m, n, k, dtype, device)
    workspace = torch.zeros(linear.workspace_elements(n), device=device)
    workspace[linear.COUNTERS :] = torch.nan
    for offset in (bias, None):
        out = torch.full((m, n // 2), torch.nan, dtype=dtype, device=device)
        linear.skinny(x, w, offset, out=out, workspace=workspace, gated=kind)
        parts = activation.gated(kind, linear.skinny(x, w, offset, workspace=workspace))
        if device == "cuda":
            assert torch.equal(out, parts)
        else:  # numpy's matmul gives a column other bits at another place of the tile
            close(out, parts.cpu().double(), TOLERANCE[dtype])
        truth = want if offset is not None else want - bias.double().cpu()
        close(out, activation_reference.gated(kind, truth), 3 * TOLERANCE[dtype])
    with pytest.raises(ValueError, match="gated is one of"):
        linear.skinny(x, w, gated="relu")
    with pytest.raises(ValueError, match="gated is one of"):
        linear.skinny(x, w, gated=kind, out_dtype=torch.float32)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 32, 64), (70, 40, 100)])
def test_invariant(m: int, n: int, k: int, dtype: torch.dtype, device: str) -> None:
    x, w, bias, want = case(m, n, k, dtype, device)
    out = torch.full((m, n), torch.nan, dtype=dtype, device=device)
    linear.invariant(x, w, bias, out=out)
    close(out, want, TOLERANCE[dtype])
    if device == "cuda":
        assert torch.equal(linear.invariant(x[m - 1 :], w, bias)[0], out[m - 1])


def test_dispatch(device: str) -> None:
    x, w, bias, want = case(33, 24, 64, torch.bfloat16, device)
    for rows in (2, 33):
        for deterministic in (False, True):
            for wanted in (torch.bfloat16, torch.float32):
                got = linear.matmul(x[:rows], w, bias, out_dtype=wanted, deterministic=deterministic)
                assert got.dtype == wanted
                close(got, want[:rows], TOLERANCE[torch.bfloat16])
    with pytest.raises(ValueError, match="one dtype"):
        linear.matmul(x, w.float())


def test_pieces_depend_on_the_weight_only() -> None:
    config = {"BLOCK_N": 32, "BLOCK_K": 128, "TARGET": 264, "MAX_SPLITS": 8}
    assert linear.splits_of(4096, 14336, config) == 2
    assert linear.splits_of(128256, 4096, config) == 1
    assert linear.splits_of(256, 256, config) == 1
    assert linear.workspace_elements(64) == linear.COUNTERS + tuned("linear.skinny")["MAX_SPLITS"] * 16 * 64


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (4096, 14336), (1000, 4104)])
def test_big(n: int, k: int, dtype: torch.dtype, device: str) -> None:
    x, w, bias, want = case(300, n, k, dtype, device)
    whole = linear.invariant(x, w, bias)
    close(whole, want, TOLERANCE[dtype])
    for rows in (1, 7, 64, 65):
        assert torch.equal(linear.invariant(x[:rows], w, bias), whole[:rows])
    few = linear.skinny(x[:16], w, bias)
    close(few, want[:16], TOLERANCE[dtype])
    both = linear.skinny(x[:16], w, bias, gated="silu")
    assert torch.equal(both, activation.gated("silu", few))
    for rows in (1, 9):
        assert torch.equal(linear.skinny(x[:rows], w, bias), few[:rows])
        assert torch.equal(linear.skinny(x[:rows], w, bias, gated="silu"), both[:rows])
