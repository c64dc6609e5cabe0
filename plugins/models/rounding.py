"""A norm and the layer behind it, for layers that multiply inputs of 8 bits.

What it is: `after_norm`, by which a family composes the two: where the layer wants rounded inputs, the norm rounds them in its own launch; else it is the plain composition.
What it does not know: how anything is rounded or multiplied.
"""

from __future__ import annotations

from typing import Any, cast

import torch

from penstock.plugins.models.api import Columns, Linear, Ops, RoundingLinear

Tensor = torch.Tensor


def after_norm(ops: Ops, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, layer: Linear, columns: Columns) -> Tensor:
    """layer(norm(x + residual)), the sum being left in `residual`; without a residual layer(norm(x))."""
    rounding = getattr(layer, "rounding", None)
    if rounding is not None:
        rows = cast("Any", ops).rounded_norm(x, residual, weight, eps, rounding)
        return cast("RoundingLinear", layer).rounded(rows, columns)
    return layer(ops.norm(x, weight, eps) if residual is None else ops.add_norm(x, residual, weight, eps), columns)
