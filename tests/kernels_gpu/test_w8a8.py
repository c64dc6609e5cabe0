"""Triton matmuls of 8-bit inputs and weights, against float64 over the very codes."""

from __future__ import annotations

import pytest
import torch

from penstock.kernels.activation.reference import gated
from penstock.kernels.linear.scheme import Scheme, dequantise, quantise
from penstock.kernels.quantised import layout
from penstock.kernels.w8a8 import triton as w8a8
from penstock.kernels.w8a8.rounding import quantise_rows
from penstock.kernels.w8a8.rows import Rounding

CONFIG = {"BLOCK_M": 64, "BLOCK_N": 64, "GROUP": 2, "num_warps": 4, "num_stages": 3}


@pytest.mark.parametrize("kind", w8a8.KINDS)
@pytest.mark.parametrize(("m", "k"), [(3, 40), (5, 300)])
def test_rows_are_rounded_with_a_scale_of_their_own(kind: str, m: int, k: int, dtype: torch.dtype, device: str) -> None:
    x = (torch.randn(m, k) * torch.tensor([1e-3, 1.0, 50.0, 0.0, 1.0])[:m, None]).to(dtype)
    codes, scales = (t.cpu() for t in quantise_rows(x.to(device), kind)[:2])
    assert codes.shape == (m, -(-k // 128) * 128)
    assert not codes[:, k:].float().any()
    top = 127.0 if kind == "int8" else 448.0
    torch.testing.assert_close(scales, (x.float().abs().amax(1) / top).clamp_min(1e-12), rtol=1e-6, atol=0)
    meant = codes[:, :k].float() * scales[:, None]
    step = scales[:, None] / 2 if kind == "int8" else (x.float().abs() / 16).clamp_min(scales[:, None] * 2**-9)
    assert ((meant - x.float()).abs() <= step * 1.001).all()


@pytest.mark.parametrize(
    "scheme",
    [Scheme("int8", activations="token"), Scheme("fp8_e4m3", 0, 0, activations="tensor"), Scheme("fp8_e4m3", activations="token")],
    ids=str,
)
@pytest.mark.parametrize(("m", "n", "k"), [(3, 72, 200), (70, 200, 256)])
def test_products(scheme: Scheme, m: int, n: int, k: int, dtype: torch.dtype, device: str) -> None:
    q = quantise(torch.randn(n, k) / 8, scheme)
    weight = layout.allocate(scheme, n, k, torch.device(device))
    layout.fill(weight, q, 0)
    x, bias = torch.randn(m, k).to(dtype).to(device), torch.randn(n).to(dtype)
    codes, scales = (t.cpu() for t in quantise_rows(x, scheme.kind)[:2])
    want = (codes[:, :k].double() * scales.double()[:, None]) @ dequantise(q).double().T + bias.double()
    out = torch.full((m, n), torch.nan, dtype=torch.float32, device=device)
    config = None if device == "cuda" else CONFIG
    assert w8a8.matmul(x, weight, bias.to(device), out=out, config=config) is out
    got = out.cpu().double()
    assert (got - want).norm() <= (1e-5 if scheme.kind == "int8" else 1e-3) * want.norm()
    half = w8a8.matmul(x, weight, config=config).cpu().double()
    assert (half - (want - bias.double())).norm() <= 5e-3 * want.norm()
    alone = w8a8.matmul(x[m - 1 :], weight, bias.to(device), out_dtype=torch.float32, config=config)
    assert torch.equal(alone[0], out[m - 1])


def test_gated(dtype: torch.dtype, device: str) -> None:
    scheme, (m, inner, k) = Scheme("fp8_e4m3", activations="token"), (5, 100, 160)
    parts = [quantise(torch.randn(inner, k) / 8, scheme) for _ in range(2)]
    weight = layout.allocate(scheme, 2 * inner, k, torch.device(device))
    for index, part in enumerate(parts):
        layout.fill(weight, part, index, 2)
    x = torch.randn(m, k).to(dtype).to(device)
    codes, scales = (t.cpu() for t in quantise_rows(x, scheme.kind)[:2])
    gate_up = (codes[:, :k].double() * scales.double()[:, None]) @ torch.cat([dequantise(part).double() for part in parts]).T
    got = w8a8.matmul(x, weight, gated="silu", config=None if device == "cuda" else CONFIG).cpu().double()
    want = gated("silu", gate_up)
    assert (got - want).norm() <= 1e-2 * want.norm()


def test_what_is_not_meant_for_it(device: str) -> None:
    for other in (Scheme("int8"), Scheme("int8", 128, activations="token"), Scheme("int4", 128, activations="token"), Scheme("fp8_e4m3")):
        assert not w8a8.supports(other)
    weight = layout.allocate(Scheme("int8"), 64, 128, torch.device(device))
    with pytest.raises(ValueError, match="inputs that may be rounded"):
        w8a8.matmul(torch.zeros(1, 128, device=device, dtype=torch.bfloat16), weight)
