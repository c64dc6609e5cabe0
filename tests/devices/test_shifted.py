"""Zero points of 8-bit integers over a layer that knows none: what the weight means, in float64, for groups, an order of inputs, several parts, bias and activation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from penstock.kernels.activation.reference import gated
from penstock.kernels.linear.scheme import Quantised, Scheme, dequantise, quantise
from penstock.plugins.devices.shifted import PIECE, Shifted, unshifted
from penstock.plugins.models.api import Stacked

K = 96
SCHEMES = [Scheme("int8", zeros=True), Scheme("int8", 32, zeros=True), Scheme("int8", 64, zeros=True), Scheme("int8", 0, 0, zeros=True)]


class Plain:
    """Without zero points, float32."""

    nbytes = 1

    def __init__(self, scheme: Scheme, rows: list[int]) -> None:
        self.scheme = scheme
        self.parts: list[torch.Tensor | None] = [None] * len(rows)

    def fill(self, index: int, part: Quantised) -> None:
        assert part.scheme == self.scheme
        self.parts[index] = dequantise(part)

    def __call__(self, x: torch.Tensor, columns: Any = None, out: Any = None) -> torch.Tensor:
        return x.float() @ torch.cat([part for part in self.parts if part is not None]).T


def made(
    scheme: Scheme, rows: list[int], activation: str = "", *, bias: bool = False, head: bool = False
) -> tuple[Shifted, torch.Tensor, Any]:
    """(the layer, what its weight means, its bias)."""
    biases = torch.randn(sum(rows)).bfloat16() if bias else None
    stacked = None if biases is None else Stacked(list(biases.split(rows)), None)
    inner: Any = Plain(unshifted(scheme), rows)
    layer = Shifted(inner, scheme, rows, K, stacked, activation, torch.device("cpu"), gated, head=head)
    meant = []
    for index, count in enumerate(rows):
        q = quantise(torch.randn(count, K) + 2, scheme._replace(permuted=False))  # far from the middle
        q = q._replace(scheme=scheme, perm=torch.randperm(K).int() if scheme.permuted else None)
        assert q.zeros is not None
        assert q.zeros.abs().max() > 10
        layer.fill(index, q)
        meant.append(dequantise(q).double())
    return layer, torch.cat(meant), biases


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("count", [1, PIECE + 3])
def test_results_are_those_of_the_weight(scheme: Scheme, count: int) -> None:
    layer, weight, bias = made(scheme, [24, 16], bias=True)
    x = torch.randn(count, K).bfloat16()
    want = x.double() @ weight.T + bias.double()
    out = torch.full((count, 40), torch.nan, dtype=torch.bfloat16)
    assert layer(x, None, out) is out
    assert (out.double() - want).norm() < 3e-3 * want.norm()
    assert layer.nbytes == 1 + 4 * 40 * scheme.groups(K) + 80


def test_a_head_keeps_float32_and_an_order_of_inputs_is_followed() -> None:
    layer, weight, _ = made(Scheme("int8", 32, zeros=True, permuted=True), [48], head=True)
    x = torch.randn(5, K).bfloat16()
    want = x.double() @ weight.T
    assert (layer(x).double() - want).norm() < 1e-5 * want.norm()


def test_gate_and_up() -> None:
    layer, weight, _ = made(SCHEMES[0], [24, 24], "silu")
    x = torch.randn(5, K).bfloat16()
    want = gated("silu", x.double() @ weight.T)
    assert (layer.n, layer(x).shape) == (24, (5, 24))
    assert (layer(x).double() - want).norm() < 6e-3 * want.norm()
