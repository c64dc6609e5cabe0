"""A norm and the layer behind it: composed as they are, or with the rounding in the norm where the layer asks for it."""

from __future__ import annotations

from typing import Any, cast

import torch

from penstock.kernels.w8a8.rows import Rounded, Rounding
from penstock.plugins.devices.torch_ops import TorchOps
from penstock.plugins.models.rounding import after_norm

EPS = 1e-6


class Plain:
    n, k, nbytes = 3, 4, 0
    rounding: Rounding | None = None

    def __init__(self) -> None:
        self.weight = torch.randn(3, 4)

    def __call__(self, x: torch.Tensor, columns: Any = None, out: Any = None) -> torch.Tensor:
        return x @ self.weight.T


class Eight(Plain):
    rounding: Rounding | None = Rounding("int8")

    def rounded(self, x: Rounded, columns: Any = None, out: Any = None) -> torch.Tensor:
        return (x.codes.float() * x.scales[:, None]) @ self.weight.T


class Rounds(TorchOps):
    def rounded_norm(self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, rounding: Rounding) -> Rounded:
        assert rounding == Rounding("int8")
        y = self.norm(x, weight, eps) if residual is None else self.add_norm(x, residual, weight, eps)
        scales = y.abs().amax(1) / 127
        return Rounded((y / scales[:, None]).round().to(torch.int8), scales, y.dtype)


def test_a_layer_gets_rounded_rows_if_it_asks_for_them() -> None:
    x, weight, columns = torch.randn(5, 4), torch.rand(4), cast("Any", None)
    for residual in (None, torch.randn(5, 4)):
        plain, eight = Plain(), Eight()
        eight.weight = plain.weight
        mine, other = (None if residual is None else residual.clone() for _ in range(2))
        want = after_norm(TorchOps(), x, mine, weight, EPS, plain, columns)
        normed = TorchOps().norm(x if residual is None else x + residual, weight, EPS)
        torch.testing.assert_close(want, normed @ plain.weight.T)
        got = after_norm(Rounds(), x, other, weight, EPS, eight, columns)
        assert 0 < (got - want).norm() < 0.02 * want.norm()
        assert residual is None or torch.equal(cast("torch.Tensor", mine), x + residual)
        assert residual is None or torch.equal(cast("torch.Tensor", other), x + residual)


def test_a_layer_that_asks_for_none_gets_what_it_gets_anyway() -> None:
    eight = Eight()
    eight.rounding = None
    x, weight = torch.randn(5, 4), torch.rand(4)
    got = after_norm(TorchOps(), x, None, weight, EPS, eight, cast("Any", None))
    assert torch.equal(got, eight(TorchOps().norm(x, weight, EPS)))
