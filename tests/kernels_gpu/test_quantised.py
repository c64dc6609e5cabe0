"""The Triton matmuls over quantised weights against float64, on every kind of codes; padding is poisoned."""

from __future__ import annotations

import pytest
import torch

from penstock.kernels.activation import reference as activation_reference
from penstock.kernels.linear import triton as linear
from penstock.kernels.linear.scheme import Quantised, Scheme, dequantise, quantise
from penstock.kernels.quantised import fragments, layout
from penstock.kernels.quantised import triton as quantised

SCHEMES = [
    Scheme("int8"), Scheme("int8", 128), Scheme("int4", 128), Scheme("int4", 128, zeros=True), Scheme("int4", 32, zeros=True), Scheme("int4", zeros=True),
    Scheme("int4", 256), Scheme("fp8_e4m3"), Scheme("fp8_e4m3", 128, 64), Scheme("fp8_e4m3", 0, 0), Scheme("fp4", 32), Scheme("fp4", 16),
    Scheme("int4", 32), Scheme("int4", 64), Scheme("int8", activations="token"), Scheme("nf4", 64), Scheme("fp8_e5m2"),
]  # fmt: skip
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 6e-4}
TABLE = {torch.bfloat16: 3e-3, torch.float16: 4e-4}
"""Where values of a table are rounded ("nf4"), on a GPU and with sums in float32."""
TILES = [
    {"ROWS": 16, "BLOCK_N": 32, "TARGET": 64, "MAX_SPLITS": 3, "num_warps": 2, "num_stages": 4},
    {"ROWS": 16, "BLOCK_N": 64, "TARGET": 1, "MAX_SPLITS": 1, "TMA": 0, "num_warps": 4, "num_stages": 3},
    {"ROWS": 32, "BLOCK_N": 256, "TARGET": 64, "MAX_SPLITS": 2, "num_warps": 8, "num_stages": 3},
    {"ROWS": 64, "BLOCK_N": 128, "TARGET": 64, "MAX_SPLITS": 2, "num_warps": 4, "num_stages": 3},
    {"ROWS": 128, "BLOCK_N": 128, "TARGET": 64, "MAX_SPLITS": 2, "ROUNDED": 1, "num_warps": 8, "num_stages": 3},
    {"ROWS": 32, "BLOCK_N": 128, "TARGET": 1, "MAX_SPLITS": 1, "ROUNDED": 1, "STEP": 64, "num_warps": 8, "num_stages": 5},
]
"""Shapes of a tile of kernels/quantised/fragments.py."""
MANY = 5
"""Times the tolerance, where a weight is rounded before it is multiplied."""


def made(scheme: Scheme, n: int, k: int, device: str) -> tuple[Quantised, layout.Weight]:
    q = quantise(torch.randn(n, k) / 8, scheme, torch.float16 if scheme.bits == 4 else torch.float32)
    weight = layout.allocate(scheme, n, k, torch.device(device))
    layout.fill(weight, q, 0)
    return q, layout.tightened(weight)


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    got = got.cpu().double()
    assert not got.isnan().any()
    assert (got - want).norm() <= tolerance * want.norm()


def few(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    if device != "cuda":  # the interpreter is slow: fewer rows are many there
        monkeypatch.setattr(quantised, "FEW", 8)
        monkeypatch.setattr(quantised, "MANY", 8)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 72, 300), (5, 96, 512)])
def test_few_rows(scheme: Scheme, m: int, n: int, k: int, dtype: torch.dtype, device: str) -> None:
    q, weight = made(scheme, n, k, device)
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
    want = x.double() @ dequantise(q).double().T + bias.double()
    x, bias = x.to(device), bias.to(device)
    workspace = torch.zeros(linear.workspace_elements(n), device=device)
    workspace[linear.COUNTERS :] = torch.nan
    out = torch.full((m, n), torch.nan, dtype=dtype, device=device)
    assert quantised.matmul(x, weight, bias, out=out, workspace=workspace) is out
    close(out, want, TOLERANCE[dtype])
    assert (workspace[: linear.COUNTERS] == 0).all()
    exact = TABLE[dtype] if scheme.kind == "nf4" and device == "cuda" else 1e-5
    close(quantised.matmul(x, weight, bias, out_dtype=torch.float32, workspace=workspace), want, exact)
    alone = quantised.matmul(x[m - 1 :], weight, bias, workspace=workspace)
    assert torch.equal(alone[0], out[m - 1])
    strided = torch.full((m, k + 8), torch.nan, dtype=dtype, device=device)
    strided[:, :k] = x
    assert torch.equal(quantised.matmul(strided[:, :k], weight, bias, workspace=workspace), out)


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme("int4", 128),
        Scheme("int4", 64, zeros=True),
        Scheme("int8"),
        Scheme("fp8_e4m3", 128, 64),
        Scheme("fp4", 32),
        Scheme("nf4", 64),
    ],
    ids=str,
)
@pytest.mark.parametrize("config", TILES, ids=lambda config: f"{config['ROWS']} x {config['BLOCK_N']}")
def test_tiles(scheme: Scheme, config: dict[str, int], dtype: torch.dtype, device: str) -> None:
    m, n, k = 35, 152, 576
    if dtype == torch.float16 and device == "cpu":
        pytest.skip("the interpreter is slow")
    q, weight = made(scheme, n, k, device)
    x = torch.randn(m, k).to(dtype)
    got = quantised.matmul(x.to(device), weight, out_dtype=torch.float32, config=config)
    rounded = config.get("ROUNDED") or (scheme.kind == "nf4" and device == "cuda")
    close(got, x.double() @ dequantise(q).double().T, TABLE[dtype] if rounded else 1e-5)


@pytest.mark.parametrize("scheme", [Scheme("int4", 128), Scheme("int4", 128, zeros=True), Scheme("int8"), Scheme("nf4", 64)], ids=str)
def test_more_rows_than_are_multiplied_exactly(scheme: Scheme, device: str) -> None:
    m, n, k = fragments.EXACT + 2, 136, 256
    q, weight = made(scheme, n, k, device)
    x = torch.randn(m, k).bfloat16()
    want = x.double() @ dequantise(q).double().T
    close(quantised.matmul(x.to(device), weight, out_dtype=torch.float32), want, 1e-5 if scheme.group == 0 else TABLE[torch.bfloat16])
    exact = quantised.matmul(x.to(device), weight, out_dtype=torch.float32, deterministic=True)
    close(exact, want, TABLE[torch.bfloat16] if scheme.kind == "nf4" and device == "cuda" else 1e-5)


def test_scales_that_a_byte_holds(device: str) -> None:
    """Powers of two within the range where products are exact, and others."""
    for scales, byte in (
        (torch.tensor([2.0**-100, 2.0**9]), True),
        (torch.tensor([2.0**-120, 1.0]), False),
        (torch.tensor([1.5, 1.0]), False),
    ):
        weight = layout.allocate(Scheme("fp4", 32), 2, 64, torch.device(device))
        layout.fill(weight, quantise(torch.randn(2, 64), Scheme("fp4", 32))._replace(scales=scales.view(2, 1).expand(2, 2).contiguous()), 0)
        assert layout.tightened(weight).exponents == byte


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("offset", [False, True])
def test_many_rows_in_pieces(scheme: Scheme, offset: bool, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch, device)
    m, n, k = quantised.MANY + 3, 200, 264
    q, weight = made(scheme, n, k, device)
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype) if offset else torch.zeros(n, dtype=dtype)
    want = x.double() @ dequantise(q).double().T + bias.double()
    given = bias.to(device) if offset else None
    for tiles in (1, 2, 8):
        wide = torch.full((tiles * weight.tile * k,), torch.nan, dtype=dtype, device=device)
        close(quantised.matmul(x.to(device), weight, given, wide=wide), want, MANY * TOLERANCE[dtype])
        close(quantised.matmul(x.to(device), weight, given, wide=wide, out_dtype=torch.float32), want, MANY * TOLERANCE[dtype])


@pytest.mark.parametrize("scheme", [Scheme("int8"), Scheme("int4", 32, zeros=True), Scheme("fp4", 32)], ids=str)
@pytest.mark.parametrize("many", [False, True])
def test_gated(scheme: Scheme, many: bool, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch, device)
    m, inner, k = (quantised.MANY + 2) if many else 3, 100, 160
    parts = [quantise(torch.randn(inner, k) / 8, scheme, torch.float16) for _ in range(2)]
    weight = layout.allocate(scheme, 2 * inner, k, torch.device(device))
    for index, part in enumerate(parts):
        layout.fill(weight, part, index, 2)
    x, bias = torch.randn(m, k).to(dtype), torch.randn(2 * inner).to(dtype)
    gate_up = x.double() @ torch.cat([dequantise(part).double() for part in parts]).T + bias.double()
    together = bias.view(2, -1).t().reshape(-1).to(device)
    for wide in (None, torch.full((weight.tile * k,), torch.nan, dtype=dtype, device=device)):
        got = quantised.matmul(x.to(device), weight, together, gated="silu", wide=wide)
        close(got, activation_reference.gated("silu", gate_up), 6 * TOLERANCE[dtype])


def test_nothing_and_what_does_not_fit(device: str) -> None:
    _, weight = made(Scheme("int8"), 64, 128, device)
    assert quantised.matmul(torch.empty(0, 128, device=device, dtype=torch.bfloat16), weight).shape == (0, 64)
    with pytest.raises(ValueError, match="must fit the weight"):
        quantised.matmul(torch.zeros(1, 64, device=device, dtype=torch.bfloat16), weight)
    for other in (
        Scheme("nf4", 16),
        Scheme("fp8_e5m2", 16),
        Scheme("int8", 128, zeros=True),
        Scheme("int4", 8),
        Scheme("int4", 48),
    ):
        assert not layout.supports(other)
        with pytest.raises(ValueError, match="does not multiply"):
            layout.allocate(other, 64, 96, torch.device(device))


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_rows_do_not_depend_on_the_batch_where_that_is_asked_for(scheme: Scheme) -> None:
    _, weight = made(scheme, 256, 1024, "cuda")
    x = torch.randn(200, 1024, device="cuda", dtype=torch.bfloat16)
    whole = quantised.matmul(x, weight, deterministic=True)
    for rows in (1, 7, 16, 20, 64, 65, 128):
        assert torch.equal(quantised.matmul(x[:rows], weight, deterministic=True), whole[:rows]), rows
