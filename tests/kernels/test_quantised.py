"""Linear layers over quantised weights: against float64, on odd shapes and groups, every row alone against every batch, and what they hold."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from penstock.kernels import native
from penstock.kernels.linear import scheme as scheme_module
from penstock.kernels.linear.scheme import KINDS, NIBBLES, Quantised, Scheme, dequantise, quantise
from penstock.kernels.quantised.api import PackedQuantised, pack_quantised, pack_quantised_gated

FORMATS = [(kind, zeros) for kind in KINDS for zeros in ((False, True) if kind in ("int4", "int8") else (False,))]
SHAPES = [(16, 16, 0), (1, 1, 0), (50, 33, 7), (130, 257, 100), (48, 72, 1), (33, 1150, 1100), (17, 1300, 0), (64, 256, 32)]
"""(outputs, inputs, group): odd ones, groups that do not divide, groups and rows longer than the scratch memory for many rows."""
LARGEST = {"int4": 8, "int8": 128, "fp8_e4m3": 448, "fp8_e5m2": 57344, "nf4": 1, "fp4": 6}


def codes(scheme: Scheme, n: int, k: int) -> Quantised:
    """Every code of its kind that is a number, with scales of either sign."""
    blocks = scheme.scale_rows(n), scheme.groups(k)
    if scheme.kind in NIBBLES:
        data = torch.randint(0, 256, (n, (k + 1) // 2), dtype=torch.uint8)  # where k is odd, the last half byte is rubbish
    else:
        data = torch.randint(0, 256, (n, k), dtype=torch.uint8)
        if scheme.kind == "fp8_e4m3":
            data[data & 0x7F == 0x7F] = 0
        if scheme.kind == "fp8_e5m2":
            data[data & 0x7C == 0x7C] = 3
        data = data.view(scheme.dtype)
    zeros = torch.randint(-20, 21, blocks, dtype=torch.int16) if scheme.zeros else None
    perm = torch.randperm(k).int() if scheme.permuted else None
    return Quantised(scheme, n, k, data, torch.randn(blocks) / LARGEST[scheme.kind], zeros, perm)


def rows_of(rows: int, k: int, dtype: torch.dtype) -> Tensor:
    """Inputs with NaN before and behind them."""
    whole = torch.full((rows + 6, k), torch.nan, dtype=dtype)
    whole[3 : rows + 3] = torch.randn(rows, k)
    return whole[3 : rows + 3]


def right(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Within the rounding of float32 sums over what is added up, and of the result."""
    truth = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    size = functional.linear(x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs())
    last = 2**-8 if got.dtype == torch.bfloat16 else 0.0
    assert ((got.double() - truth).abs() <= size * 2**-24 * (4 + math.sqrt(x.shape[1])) + truth.abs() * last).all()


@pytest.mark.parametrize(("kind", "zeros"), FORMATS)
@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
def test_equals_float64(dtype: torch.dtype, kind: str, zeros: bool, n: int, k: int, group: int) -> None:
    part = codes(Scheme(kind, group, 1, zeros), n, k)
    bias = torch.randn(n).to(dtype) if n % 2 else None
    layer, wide = pack_quantised([part], bias), dequantise(part)
    for rows in (1, 3, 7):
        x = rows_of(rows, k, dtype)
        for out_dtype in {dtype, torch.float32}:
            right(layer(x, out=torch.full((rows, n), torch.nan, dtype=out_dtype)), x, wide, bias)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("kind", "zeros"), FORMATS)
@pytest.mark.parametrize(("n", "k", "group"), [(520, 97, 0), (24, 1150, 1100), (520, 90, 20)])
def test_a_row_does_not_know_its_batch(kind: str, zeros: bool, n: int, k: int, group: int) -> None:
    """Few rows widen codes in registers, many in scratch memory: the bits are the same."""
    layer, x = pack_quantised([codes(Scheme(kind, group, 1, zeros), n, k)]), rows_of(1000, k, torch.float32)
    torch.set_num_threads(1)
    whole = layer(x)
    assert not whole.isnan().any()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for rows in (*range(1, 71), 120, 210, 513) if threads == 2 else (1, 2, 6, 7, 33, 300):
            at = 1000 - rows - 3
            assert torch.equal(layer(x[at : at + rows]), whole[at : at + rows]), (threads, rows)


@pytest.mark.usefixtures("compiled")
def test_many_rows_equal_float64(dtype: torch.dtype) -> None:
    for scheme in (Scheme("int8"), Scheme("int4", 32, 1, True), Scheme("nf4", 1100), Scheme("fp8_e4m3", 64, 64)):
        part = codes(scheme, 528, 1150)
        x = rows_of(300, 1150, dtype)
        right(pack_quantised([part])(x), x, dequantise(part), None)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(("kind", "zeros"), FORMATS)
def test_gated_is_gate_and_up(dtype: torch.dtype, kind: str, zeros: bool, activation: str) -> None:
    scheme, n, k = Scheme(kind, 24, 1, zeros), 50, 70
    gate, up = codes(scheme, n, k), codes(scheme, n, k)
    biases = torch.randn(n).to(dtype), torch.randn(n).to(dtype)
    act = {"silu": functional.silu, "gelu": functional.gelu, "gelu_tanh": lambda t: functional.gelu(t, approximate="tanh")}[activation]
    for with_bias in (False, True):
        layer = pack_quantised_gated(gate, up, activation, *(biases if with_bias else ()))  # type: ignore[arg-type]
        for rows in (1, 5, 64):
            x = rows_of(rows, k, dtype)
            halves = [
                functional.linear(x.double(), dequantise(half).double(), bias.double() if with_bias else None)
                for half, bias in zip((gate, up), biases, strict=True)
            ]
            truth = act(halves[0]) * halves[1]
            got = layer(x, out=torch.full((rows, n), torch.nan, dtype=dtype)).double()
            scale = halves[0].abs().clamp(min=1) * halves[1].abs().clamp(min=1)
            assert ((got - truth).abs() / scale).max() < (2**-6 if dtype == torch.bfloat16 else 2e-4)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("kind", "zeros"), FORMATS)
def test_a_gated_row_does_not_know_its_batch(kind: str, zeros: bool) -> None:
    scheme = Scheme(kind, 32, 1, zeros)
    layer = pack_quantised_gated(codes(scheme, 300, 80), codes(scheme, 300, 80), "silu")
    x = rows_of(600, 80, torch.bfloat16)
    whole = layer(x)
    for rows in (1, 2, 3, 4, 5, 6, 7, 30, 70, 250):
        assert torch.equal(layer(x[5 : 5 + rows]), whole[5 : 5 + rows])


@pytest.mark.parametrize("scheme", [Scheme("int8"), Scheme("int4", 20, 1, True), Scheme("fp8_e4m3", 32, 32), Scheme("int8", 0, 0)])
def test_parts_lie_one_below_the_other(scheme: Scheme) -> None:
    """Panels are shared by parts whose sizes are no multiples of 16; parts may come in any order."""
    parts = [codes(scheme, n, 65) for n in (40, 9, 33)]
    bias = torch.randn(82)
    layer = PackedQuantised(scheme, [40, 9, 33], 65, bias)
    for index in (2, 0, 1):
        layer.fill(index, parts[index])
    x = rows_of(9, 65, torch.float32)
    right(layer(x), x, torch.cat([dequantise(part) for part in parts]), bias)


@pytest.mark.parametrize("scheme", [Scheme("int4", 16, permuted=True), Scheme("int8", 16, 1, True, True)])
def test_stored_orders_of_inputs(dtype: torch.dtype, scheme: Scheme) -> None:
    part = codes(scheme, 50, 75)
    layer = pack_quantised([part])
    for rows in (1, 8, 40):
        x = rows_of(rows, 75, dtype)
        right(layer(x), x, dequantise(part), None)
    plain = part._replace(perm=None)
    x = rows_of(3, 75, dtype)
    right(pack_quantised([plain])(x), x, dequantise(plain), None)


SCHEMES = (
    Scheme("int4", 128),
    Scheme("int4", 64, 1, True),
    Scheme("fp8_e4m3", 128, 128),
    Scheme("int8"),
    Scheme("fp4", 32),
    Scheme("nf4", 64),
    Scheme("int8", 0, 0),
)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("given", [False, True])
def test_a_weight_rounded_in_parts_is_the_same(monkeypatch: pytest.MonkeyPatch, scheme: Scheme, given: bool) -> None:
    wide = torch.randn(300, 256)
    whole = quantise(wide, scheme)
    scales = whole.scales if given and not scheme.zeros else None
    monkeypatch.setattr(scheme_module, "PART", 256 * 70)
    parts = quantise(wide, scheme, scales=scales)
    for one, other in zip(whole[3:6], parts[3:6], strict=True):
        assert (one is None) == (other is None)
        assert one is None or other is None or torch.equal(one.float(), other.float())


def test_zero_points_left_out_are_the_middle() -> None:
    part = codes(Scheme("int4", 16, 1, True), 20, 40)._replace(zeros=None)
    x = rows_of(3, 40, torch.float32)
    right(pack_quantised([part])(x), x, dequantise(part), None)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("kind", "zeros"), FORMATS)
def test_memory_is_honest(kind: str, zeros: bool) -> None:
    """What is counted is what is allocated, and little more than the checkpoint's bytes."""
    part = codes(Scheme(kind, 128, 1, zeros), 256, 1024)
    bias = torch.zeros(256)
    plain, gated = pack_quantised([part], bias), pack_quantised_gated(part, part, "silu")
    assert plain.packed is not None
    assert gated.packed is not None
    assert plain.nbytes >= plain.packed.data.nbytes + bias.nbytes
    assert part.data.nbytes < plain.packed.data.nbytes <= part.nbytes * 1.06
    assert gated.nbytes == 2 * (plain.nbytes - bias.nbytes) - (64 if kind in NIBBLES else 0)  # the values of the codes are held once


def test_inputs_may_be_wide_or_narrow_and_are_not_changed() -> None:
    layer = pack_quantised([quantise(torch.randn(32, 64), Scheme("int8"))])
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(9, 64).to(dtype)
        before = x.clone()
        assert layer(x).dtype == dtype
        assert torch.equal(x, before)
    assert layer(torch.randn(0, 64)).shape == (0, 32)


def test_bad_parts_are_refused() -> None:
    scheme = Scheme("int4", 16)
    part = codes(scheme, 8, 64)
    layer = PackedQuantised(scheme, [8], 64)
    for wrong in (
        codes(scheme, 9, 64), codes(Scheme("int4", 32), 8, 64), part._replace(data=part.data[:, 1:]), part._replace(scales=part.scales[:, 1:]),
        part._replace(zeros=torch.zeros(8, 4, dtype=torch.int16)), part._replace(perm=torch.arange(64).int()),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            layer.fill(0, wrong)
    nan = codes(Scheme("fp8_e4m3"), 8, 64)
    nan.data.view(torch.uint8)[3, 5] = 0xFF
    with pytest.raises(ValueError, match="NaN"):
        pack_quantised([nan])
    orders = [codes(Scheme("int8", permuted=True), 8, 64) for _ in range(2)]
    twice = orders[0]._replace(perm=torch.zeros(64, dtype=torch.int32))
    with pytest.raises(ValueError, match="once"):
        pack_quantised([twice])
    if native.library() is not None:
        with pytest.raises(ValueError, match="one order"):
            pack_quantised(orders)
    with pytest.raises(ValueError, match="zero points"):
        PackedQuantised(Scheme("nf4", 64, 1, True), [8], 64)
    with pytest.raises(ValueError, match="kind"):
        PackedQuantised(Scheme("int3"), [8], 64)
    with pytest.raises(ValueError, match="shape"):
        layer(torch.randn(2, 63))
    with pytest.raises(ValueError, match="both biases"):
        pack_quantised_gated(part, part, "silu", torch.randn(8))
