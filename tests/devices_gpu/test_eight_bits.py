"""Layers of the CUDA device that round their inputs to 8 bits, on a Hopper GPU: what norms hand them, fixed scales, blocks, any batch alike."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from penstock.kernels.activation.reference import gated
from penstock.kernels.linear.scheme import Scheme, dequantise, quantise

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")]
FP8, INT8 = Scheme("fp8_e4m3", activations="token"), Scheme("int8", activations="token")
BLOCKS, FIXED = Scheme("fp8_e4m3", 128, 128, activations="token"), Scheme("int8", activations="tensor")
K, EPS = 384, 1e-6


class Facts:
    vocab_size, hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim = 64, K, 512, 4, 2, 32


def layer(
    scheme: Scheme, rows: list[int], activation: str = "", scale: float | None = None, deterministic: bool = False
) -> tuple[Any, Any, torch.Tensor]:
    """(ops, layer, what its weight means)."""
    from penstock.plugins.devices.triton_ops import TritonOps

    ops = TritonOps(cast("Any", Facts), torch.device("cuda"), max_rows=8, deterministic=deterministic)
    made = ops.quantised(scheme, rows, K, None, activation)
    assert made is not None
    parts = []
    for index, count in enumerate(rows):
        q = quantise(torch.randn(count, K) / 8, scheme)
        if scale is not None:
            q = q._replace(input_scale=torch.tensor(scale / (index + 1), device="cuda"))
        parts.append(dequantise(q).double())
        made.fill(index, q)
    torch.cuda.synchronize()
    return ops, made, torch.cat(parts)


@pytest.mark.parametrize("scheme", [FP8, INT8, BLOCKS], ids=["fp8", "int8", "blocks"])
@pytest.mark.parametrize("activation", ["", "silu"])
@pytest.mark.parametrize("rows", [1, 40, 300])
def test_a_norm_rounds_for_the_layer_behind_it(scheme: Scheme, activation: str, rows: int) -> None:
    from penstock.plugins.models.rounding import after_norm

    ops, made, meant = layer(scheme, [256, 256] if activation else [256, 128, 128], activation)
    x, residual = (torch.randn(rows, K, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    weight = torch.rand(K, device="cuda", dtype=torch.bfloat16)
    other = residual.clone()
    got = after_norm(ops, x, residual, weight, EPS, made, cast("Any", None))
    normed = ops.add_norm(x, other, weight, EPS)
    assert torch.equal(residual, other)
    assert torch.equal(got, made(normed))
    want = normed.cpu().double() @ meant.T
    want = gated(activation, want) if activation else want
    assert (got.cpu().double() - want).norm() <= 0.06 * want.norm()


def test_a_fixed_scale_is_used() -> None:
    _, made, meant = layer(FIXED, [128, 128], scale=0.02)
    assert made.rounding.scale.item() == pytest.approx(0.02)  # the widest of both parts'
    x = torch.randn(70, K, device="cuda", dtype=torch.bfloat16) * 2
    codes = (x.double() / 0.02).round().clamp(-127, 127)
    want = (codes * 0.02).cpu() @ meant.T
    assert (made(x).cpu().double() - want).norm() <= 6e-3 * want.norm()


def test_without_a_fixed_scale_in_the_files_each_row_has_its_own() -> None:
    _, made, _ = layer(FIXED, [128])
    assert made.rounding.scale is None


@pytest.mark.parametrize("scheme", [FP8, INT8, BLOCKS], ids=["fp8", "int8", "blocks"])
@pytest.mark.parametrize("activation", ["", "silu"])
def test_in_deterministic_mode_a_row_is_the_same_in_any_batch(scheme: Scheme, activation: str) -> None:
    _, made, _ = layer(scheme, [2048, 2048], activation, deterministic=True)
    x = torch.randn(700, K, device="cuda", dtype=torch.bfloat16)
    every = made(x)
    for start, end in ((0, 1), (699, 700), (3, 60), (100, 400)):
        assert torch.equal(made(x[start:end]), every[start:end])


@pytest.mark.parametrize("scheme", [Scheme("int8", zeros=True), Scheme("int8", 128, zeros=True), Scheme("int8", 32, zeros=True)], ids=str)
@pytest.mark.parametrize("activation", ["", "silu"])
@pytest.mark.parametrize("rows", [1, 40, 1100])
def test_zero_points_of_integers(scheme: Scheme, activation: str, rows: int) -> None:
    _, made, meant = layer(scheme, [256, 256] if activation else [256, 128, 128], activation)
    x = torch.randn(rows, K, device="cuda", dtype=torch.bfloat16)
    want = x.cpu().double() @ meant.T
    want = gated(activation, want) if activation else want
    assert (made(x).cpu().double() - want).norm() <= 0.01 * want.norm()


def test_zero_points_of_integers_are_wide_where_bits_must_not_depend_on_a_batch() -> None:
    from penstock.plugins.devices.triton_ops import TritonOps

    ops = TritonOps(cast("Any", Facts), torch.device("cuda"), max_rows=8, deterministic=True)
    assert ops.quantised(Scheme("int8", zeros=True), [256], K, None, "") is None
