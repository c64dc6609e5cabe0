"""From a checkpoint's tensors to a device's layers: the one place where a weight becomes a `Linear`.

What it is: a family names its tensors; the builder takes them and lets the device's `Ops` make layers of them. On the host each is packed as it is
read; on another device memory is taken at once and filled at the end, several tensors at a time (reading, page faults and copies overlap).
What it does not know: families, files, how a layer multiplies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from penstock.core.contract.devices import ModelFacts
from penstock.plugins.models.api import Linear, Ops, Progress, Stacked, Weights
from penstock.plugins.models.tied import ends_of

Tensor = torch.Tensor
READERS = 6


class Part(NamedTuple):
    """A linear layer of the checkpoint: "model.layers.0.self_attn.q_proj", without ".weight", and its number of outputs."""

    name: str
    rows: int


class Builder:
    """`nbytes` counts what was built, a tied head once."""

    def __init__(self, weights: Weights, ops: Ops, dtype: torch.dtype, device: torch.device, progress: Progress | None = None) -> None:
        self.device = device
        self.nbytes = 0
        self.weights = weights
        self._ops = ops
        self.dtype = dtype
        self._tell = progress or (lambda fraction: None)
        self._later: list[Callable[[], object]] | None = None if device.type == "cpu" else []

    def tell(self, fraction: float) -> None:
        """Progress, where tensors are read as they are named."""
        if self._later is None:
            self._tell(fraction)

    def ignore(self, *names: str) -> None:
        """See Weights."""
        self.weights.ignore(*names)

    def tensor(self, name: str, *shape: int) -> Tensor:
        """A tensor by itself: a norm's weight."""
        return self._kept(self._stacked([(name, shape)]).joined())

    def linear(self, parts: Sequence[Part], inputs: int, *, bias: bool = False) -> Linear:
        """One layer of one or several of the checkpoint's, which read the same input. Raises CheckpointError for missing or wrong-shaped tensors."""
        weight, biases = self._weight_and_bias(parts, inputs, bias)
        return self._counted(self._ops.linear(weight, biases))

    def gated(self, gate: Part, up: Part, inputs: int, activation: str, *, bias: bool = False) -> Linear:
        """act(gate(x)) * up(x) as one layer."""
        weight, biases = self._weight_and_bias([gate, up], inputs, bias)
        return self._counted(self._ops.gated(weight, biases, activation))

    def ends(self, facts: ModelFacts) -> tuple[Tensor, Callable[[], Linear]]:
        """The embedding table [V, H], and a call that makes the output head, to be made last (tied or not: tied.py)."""
        ends = ends_of(facts, self.weights)
        shape = (facts.vocab_size, facts.hidden_size)
        table = self._kept(self._own(shape, ends.table))

        def head() -> Linear:
            if ends.head is None:
                layer = self._ops.head(table)
                self.nbytes += 0 if getattr(layer, "weight", None) is table else layer.nbytes
                return layer
            return self._counted(self._ops.head(self._own(shape, ends.head)))

        return table, head

    def finish(self) -> None:
        """Read what is still to be read. Raises CheckpointError for tensors that are missing, or that nobody took."""
        if self._later:
            with ThreadPoolExecutor(READERS, thread_name_prefix="weights") as pool:
                for done, _ in enumerate(pool.map(lambda job: job(), self._later), 1):
                    self._tell(done / len(self._later))
            self._later = []
        self.weights.finish()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the readers' threads copied on another stream than the one that will compute
        self.tell(1.0)

    def _weight_and_bias(self, parts: Sequence[Part], inputs: int, bias: bool) -> tuple[Stacked, Stacked | None]:
        weight = self._stacked([(f"{part.name}.weight", (part.rows, inputs)) for part in parts])
        return weight, self._stacked([(f"{part.name}.bias", (part.rows,)) for part in parts]) if bias else None

    def _stacked(self, named: Sequence[tuple[str, tuple[int, ...]]]) -> Stacked:
        if self._later is None:
            return Stacked([self.weights.take(name, shape) for name, shape in named], None)
        whole = torch.empty(sum(shape[0] for _, shape in named), *named[0][1][1:], dtype=self.dtype, device=self.device)
        ends = [sum(shape[0] for _, shape in named[: index + 1]) for index in range(len(named))]
        parts = [whole[end - shape[0] : end] for end, (_, shape) in zip(ends, named, strict=True)]
        for (name, shape), target in zip(named, parts, strict=True):
            self._later.append(lambda name=name, shape=shape, target=target: target.copy_(self.weights.take(name, shape)))  # type: ignore[misc]
        return Stacked(parts, whole)

    def _own(self, shape: tuple[int, ...], take: Callable[[], Tensor]) -> Tensor:
        if self._later is None:
            return take().clone()
        target = torch.empty(shape, dtype=self.dtype, device=self.device)
        self._later.append(lambda: target.copy_(take()))
        return target

    def _kept(self, tensor: Tensor) -> Tensor:
        self.nbytes += tensor.nbytes
        return tensor

    def _counted(self, layer: Linear) -> Linear:
        self.nbytes += layer.nbytes
        return layer
