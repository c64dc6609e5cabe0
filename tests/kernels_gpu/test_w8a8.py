"""Triton matmuls of 8-bit inputs and weights, against float64 over the very codes."""

from __future__ import annotations

import pytest
import torch

from penstock.kernels.activation.reference import gated
from penstock.kernels.linear.scheme import Scheme, dequantise, quantise
from penstock.kernels.quantised import layout
from penstock.kernels.rmsnorm.triton import add_rms_norm, rms_norm, rounded_norm
from penstock.kernels.w8a8 import triton as w8a8
from penstock.kernels.w8a8.rounding import quantise_rows
from penstock.kernels.w8a8.rows import Rounding

HOPPER = pytest.mark.skipif(not w8a8.always(), reason="needs a Hopper GPU")
CONFIG = {"BM": 64, "BN": 256, "GROUP": 2, "SUB": 2, "num_warps": 4, "num_stages": 3}


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


def test_rows_are_rounded_in_groups(dtype: torch.dtype, device: str) -> None:
    x = (torch.randn(3, 300) * torch.tensor([1e-3, 1.0, 50.0])[:, None]).to(dtype)
    rounded = quantise_rows(x.to(device), Rounding("fp8_e4m3", 128))
    codes, scales = rounded.codes.cpu(), rounded.scales.cpu()
    assert codes.shape == (3, 384)
    assert scales.shape == (3, 3)
    groups = torch.nn.functional.pad(x.float(), (0, 84)).view(3, 3, 128)
    torch.testing.assert_close(scales.T, groups.abs().amax(2) / 448, rtol=1e-6, atol=0)
    meant = codes.float().view(3, 3, 128) * scales.T[:, :, None]
    assert ((meant - groups).abs() <= (groups.abs() / 16).clamp_min(scales.T[:, :, None] * 2**-9) * 1.001).all()


@pytest.mark.parametrize("kind", w8a8.KINDS)
def test_a_fixed_scale_cuts_off_what_lies_beyond(kind: str, dtype: torch.dtype, device: str) -> None:
    scale = torch.tensor(0.01, device=device)
    x = torch.tensor([[0.52, -0.26, 1e3, -1e3, 0.0]], dtype=dtype)
    rounded = quantise_rows(x.to(device), Rounding(kind, 0, scale))
    top = 127.0 if kind == "int8" else 448.0
    assert rounded.scales.tolist() == [pytest.approx(0.01)]
    assert rounded.codes[0, :5].cpu().float().tolist() == [52.0, -26.0, top, -top, 0.0]


@pytest.mark.parametrize("rounding", [Rounding("fp8_e4m3"), Rounding("int8"), Rounding("fp8_e4m3", 128)], ids=str)
@pytest.mark.parametrize("add", [False, True], ids=["plain", "added"])
def test_a_norm_that_rounds_gives_what_rounding_its_result_gives(rounding: Rounding, add: bool, dtype: torch.dtype, device: str) -> None:
    x, weight = torch.randn(3, 200).to(dtype).to(device), torch.rand(200).to(dtype).to(device)
    residual = torch.randn(3, 200).to(dtype).to(device) if add else None
    mine = None if residual is None else residual.clone()
    found = rounded_norm(x, mine, weight, 1e-6, rounding)
    normed = rms_norm(x, weight, 1e-6) if residual is None else add_rms_norm(x, residual, weight, 1e-6)
    want = quantise_rows(normed, rounding)
    assert torch.equal(found.codes.view(torch.uint8), want.codes.view(torch.uint8))
    assert torch.equal(found.scales, want.scales)
    assert found.dtype == dtype
    assert mine is None or residual is None or torch.equal(mine, residual)


@pytest.mark.parametrize(
    "scheme",
    [Scheme("int8", activations="token"), Scheme("fp8_e4m3", 0, 0, activations="tensor"), Scheme("fp8_e4m3", activations="token")],
    ids=str,
)
@pytest.mark.parametrize("wide", [False, True], ids=["chosen", "wide"])
@pytest.mark.parametrize(("m", "n", "k"), [(3, 72, 200), (70, 400, 256)])
def test_products(scheme: Scheme, wide: bool, m: int, n: int, k: int, dtype: torch.dtype, device: str) -> None:
    q = quantise(torch.randn(n, k) / 8, scheme)
    weight = layout.allocate(scheme, n, k, torch.device(device))
    layout.fill(weight, q, 0)
    x, bias = torch.randn(m, k).to(dtype).to(device), torch.randn(n).to(dtype)
    codes, scales = (t.cpu() for t in quantise_rows(x, scheme.kind)[:2])
    want = (codes[:, :k].double() * scales.double()[:, None]) @ dequantise(q).double().T + bias.double()
    out = torch.full((m, n), torch.nan, dtype=torch.float32, device=device)
    config = CONFIG if wide else None
    assert w8a8.matmul(x, weight, bias.to(device), out=out, config=config) is out
    got = out.cpu().double()
    assert (got - want).norm() <= (1e-5 if scheme.kind == "int8" else 3e-3) * want.norm()
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
    got = w8a8.matmul(x, weight, gated="silu", config=CONFIG).cpu().double()
    want = gated("silu", gate_up)
    assert (got - want).norm() <= 1e-2 * want.norm()


FP8, INT8 = Scheme("fp8_e4m3", activations="token"), Scheme("int8", activations="token")
BLOCKS = Scheme("fp8_e4m3", 128, 128, activations="token")


def test_blocks(dtype: torch.dtype, device: str) -> None:
    m, n, k = 70, 300, 256
    weight, meant, blocks = made(BLOCKS, n, k, device)
    assert blocks is not None
    assert blocks.shape == (3, 2)
    rows = quantise_rows(torch.randn(m, k).to(dtype).to(device), Rounding("fp8_e4m3", 128))
    codes, spread = rows.codes.cpu().double(), rows.scales.cpu().double().T.repeat_interleave(128, 1)
    want = (codes * spread) @ meant.T
    got = w8a8.matmul(rows, weight, out_dtype=torch.float32, blocks=blocks).cpu().double()
    assert (got - want).norm() <= 1e-3 * want.norm()


def made(scheme: Scheme, n: int, k: int, device: str = "cuda") -> tuple[layout.Weight, torch.Tensor, torch.Tensor | None]:
    """A weight on the device, what it means in float64, and its scales where they are of blocks."""
    q = quantise(torch.randn(n, k) / 8 * (1 + torch.arange(k) // 128), scheme)
    weight = layout.allocate(scheme, n, k, torch.device(device))
    layout.fill(weight, q, 0)
    return weight, dequantise(q).double(), w8a8.block_scales(weight) if scheme.group else None


@HOPPER
@pytest.mark.gpu
@pytest.mark.parametrize("scheme", [FP8, INT8, BLOCKS], ids=["fp8", "int8", "blocks"])
@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 72, 200), (64, 256, 1024), (65, 200, 256), (200, 640, 2048), (257, 1000, 384), (1030, 2304, 1024)]
)
def test_hopper(scheme: Scheme, exact: bool, m: int, n: int, k: int) -> None:
    weight, meant, blocks = made(scheme, n, k)
    x, bias = torch.randn(m, k, device="cuda", dtype=torch.bfloat16), torch.randn(n, dtype=torch.bfloat16, device="cuda")
    rows = quantise_rows(x, Rounding(scheme.kind, scheme.group))
    codes, scales = rows.codes.cpu().double(), rows.scales.cpu().double()
    spread = scales.T.repeat_interleave(128, 1) if scheme.group else scales[:, None]
    want = (codes * spread)[:, :k] @ meant.T + bias.cpu().double()
    for dtype, bound in (
        (torch.float32, 3e-3 if scheme is FP8 and not exact else 1e-3 if scheme is not INT8 else 1e-5),
        (torch.bfloat16, 5e-3),
    ):
        got = w8a8.matmul(rows, weight, bias, out_dtype=dtype, exact=exact, blocks=blocks)
        assert got.dtype == dtype
        assert (got.cpu().double() - want).norm() <= bound * want.norm()
    out = torch.full((m, n + 3), torch.nan, device="cuda", dtype=torch.bfloat16)
    assert w8a8.matmul(rows, weight, bias, out=out[:, :n], exact=exact, blocks=blocks).data_ptr() == out.data_ptr()
    assert (out[:, :n].cpu().double() - want).norm() <= 5e-3 * want.norm()
    assert out[:, n:].isnan().all()


@HOPPER
@pytest.mark.gpu
@pytest.mark.parametrize("scheme", [FP8, INT8, BLOCKS], ids=["fp8", "int8", "blocks"])
@pytest.mark.parametrize("gate", [None, "silu"])
def test_a_row_is_the_same_in_any_batch(scheme: Scheme, gate: str | None) -> None:
    weight, _, blocks = made(scheme, 1536, 4096)
    x = torch.randn(2000, 4096, device="cuda", dtype=torch.bfloat16)
    every = w8a8.matmul(x, weight, gated=gate, blocks=blocks)
    for start, end in ((0, 1), (1999, 2000), (5, 69), (60, 260), (17, 1000), (100, 1300)):
        assert torch.equal(w8a8.matmul(x[start:end], weight, gated=gate, blocks=blocks), every[start:end])


@HOPPER
@pytest.mark.gpu
@pytest.mark.parametrize("m", [5, 300])
def test_gated_on_hopper(m: int) -> None:
    inner, k = 640, 512
    parts = [quantise(torch.randn(inner, k) / 8, FP8) for _ in range(2)]
    weight = layout.allocate(FP8, 2 * inner, k, torch.device("cuda"))
    for index, part in enumerate(parts):
        layout.fill(weight, part, index, 2)
    rows = quantise_rows(torch.randn(m, k, device="cuda", dtype=torch.bfloat16), "fp8_e4m3")
    gate_up = (rows.codes.cpu().double() * rows.scales.cpu().double()[:, None]) @ torch.cat([dequantise(part).double() for part in parts]).T
    want = gated("silu", gate_up)
    assert (w8a8.matmul(rows, weight, gated="silu").cpu().double() - want).norm() <= 1e-2 * want.norm()


def test_what_is_not_meant_for_it(device: str) -> None:
    for other in (Scheme("int8"), Scheme("int8", 128, activations="token"), Scheme("int4", 128, activations="token"), Scheme("fp8_e4m3")):
        assert not w8a8.supports(other)
    weight = layout.allocate(Scheme("int8"), 64, 128, torch.device(device))
    with pytest.raises(ValueError, match="inputs that may be rounded"):
        w8a8.matmul(torch.zeros(1, 128, device=device, dtype=torch.bfloat16), weight)
