"""A whole model as a drafter's layers: one call for a step of it.

What it is: `DraftLayers`, which runs a model over the columns of a step, fused where the device's operations can.
What it does not know: where columns come from, whose tokens they are.
"""

from __future__ import annotations

from typing import Any

import torch

from penstock.plugins.models.api import Columns, Model

Tensor = torch.Tensor


class DraftLayers:
    """`caches` as the model's attention makes them."""

    def __init__(self, model: Model, ops: Any, caches: list[Any], dtype: torch.dtype) -> None:
        self._model, self._ops, self._caches, self._dtype = model, ops, caches, dtype
        self._program = ops.fuse(model, caches)

    def run(self, columns: Columns, rows: Tensor | None) -> Tensor | None:
        """The normalised states at these token rows."""
        if self._program is not None:
            wanted = torch.empty(0, dtype=torch.int32) if rows is None else rows
            hidden = torch.empty(len(wanted), self._model.facts.hidden_size, dtype=self._dtype)
            self._program(columns, wanted, hidden)
            return hidden
        x, residual, _ = self._model.step(self._ops, self._caches, columns)
        if rows is None:
            return None
        return self._model.final(self._ops, self._ops.take_rows(x, rows), self._ops.take_rows(residual, rows))

    def logits(self, columns: Columns, rows: Tensor) -> Tensor:
        """[R, V] at these token rows."""
        hidden = self.run(columns, rows)
        assert hidden is not None
        return self._model.logits(hidden)
