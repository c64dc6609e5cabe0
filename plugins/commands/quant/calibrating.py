"""One pass of calibration texts through a model, whose layers are rounded as the texts come by.

What it is: a quantizer whose layers take their wide weights as views of the files; when a layer is called, with the inputs of all texts at once, it is
rounded for them and multiplies with what it became, so that later layers see the errors of earlier ones. What has been written already is read, not
rounded again.
What it does not know: how a weight is rounded (methods.py), files' names, the terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from penstock.kernels.activation.reference import gated
from penstock.kernels.linear.scheme import Quantised, Scheme, dequantise
from penstock.plugins.commands.quant.comparing import Loaded
from penstock.plugins.commands.quant.forms import NF4_WORD, norm_of
from penstock.plugins.commands.quant.methods import Method
from penstock.plugins.commands.quant.writing import LM_HEAD, Plan, nearest, shard_file, write, write_shard
from penstock.plugins.models.api import Columns, Stacked, Weights
from penstock.plugins.quantizers.bitsandbytes import Bitsandbytes
from penstock.plugins.quantizers.compressed import CompressedTensors

Tensor = torch.Tensor
ROWS = 4096
"""Inputs that are multiplied at once."""


class Observer:
    """See plugins/models/api.py: Quantizer. `stored(layer)` is what has been written of it, `stored.tensor(name)` of a tensor;
    `keep(layer, quantised)` gets the others, after `keep_norm(name, factor)`."""

    method = "calibration"

    def __init__(
        self,
        plan: Plan,
        method: Method,
        stored: Written,
        keep: Callable[[str, Quantised], None],
        keep_norm: Callable[[str, Tensor], None],
    ) -> None:
        self._plan = plan
        self.round = method
        self.stored = stored
        self.keep = keep
        self.keep_norm = keep_norm
        self._architecture = (plan.source.config.get("architectures") or [""])[0]

    def scheme(self, weights: Weights, layer: str, rows: int, inputs: int) -> Scheme | None:
        """See Quantizer. The output head is not called."""
        return None if layer == LM_HEAD else self._plan.schemes.get(layer)

    def read(self, *_: Any) -> Quantised:
        """Never called: `linear` makes all layers."""
        raise NotImplementedError

    def linear(
        self,
        weights: Weights,
        layers: Sequence[str],
        scheme: Scheme,
        rows: Sequence[int],
        inputs: int,
        bias: Stacked | None,
        activation: str,
        device: torch.device,
    ) -> Observed:
        """See Quantizer."""
        wide = [weights.take(f"{layer}.weight", (n, inputs)) for layer, n in zip(layers, rows, strict=True)]
        name = norm_of(layers, self._architecture)
        norm = None if name is None else (name, weights.raw(name))  # type: ignore[attr-defined]
        return Observed(self, layers, wide, scheme, None if bias is None else bias.joined().float(), activation, norm)


class Observed:
    """See Linear. It can be called once."""

    nbytes = 0

    def __init__(
        self,
        observer: Observer,
        layers: Sequence[str],
        wide: list[Tensor],
        scheme: Scheme,
        bias: Tensor | None,
        activation: str,
        norm: tuple[str, Tensor] | None,
    ) -> None:
        self.n, self.k = sum(w.shape[0] for w in wide) // (2 if activation else 1), wide[0].shape[1]
        self._observer = observer
        self._layers = layers
        self._wide = wide
        self._scheme = scheme
        self._bias = bias
        self._activation = activation
        self._norm = norm

    def __call__(self, x: Tensor, columns: Columns | None = None, out: Tensor | None = None) -> Tensor:
        """See Linear."""
        observer = self._observer
        found = [observer.stored(layer) for layer in self._layers]
        norm = None if self._norm is None else observer.stored.tensor(self._norm[0])
        if any(q is None for q in found):
            rounded = observer.round(x, self._wide, self._scheme, None if self._norm is None else self._norm[1])
            found, norm = list(rounded.weights), rounded.norm
            if self._norm is not None and norm is not None:
                observer.keep_norm(self._norm[0], norm)
            for layer, q in zip(self._layers, found, strict=True):
                assert q is not None
                observer.keep(layer, q)
        self._wide = []
        weight = torch.cat([dequantise(q) for q in found if q is not None])
        if self._norm is not None and norm is not None:  # x has the old factor
            weight = (weight.double() * (norm.double() / self._norm[1].double())).float()
        made = []
        for start in range(0, len(x), ROWS):
            piece = x[start : start + ROWS]
            y = torch.nn.functional.linear(piece.float(), weight, self._bias)
            made.append((gated(self._activation, y) if self._activation else y).to(x.dtype))
        y = torch.cat(made)
        return y if out is None else out.copy_(y)


class Written:
    """Layers of the shards that were finished before."""

    def __init__(self, plan: Plan, partial: Path) -> None:
        self._plan = plan
        self._where = {
            name.removesuffix(".weight"): shard_file(plan, partial, index)
            for index, names in enumerate(plan.shards)
            for name in names
            if shard_file(plan, partial, index).is_file()
        }
        self._file_of = {name: shard_file(plan, partial, index) for index, names in enumerate(plan.shards) for name in names}
        self._reader = (Bitsandbytes if plan.word == NF4_WORD else CompressedTensors)(plan.configuration())

    def __call__(self, layer: str) -> Quantised | None:
        """The layer, or None."""
        if layer not in self._where:
            return None
        tensors = Tensors(load_file(self._where[layer]))
        rows, inputs = self._plan.source.shapes[f"{layer}.weight"]
        scheme = self._reader.scheme(tensors, layer, rows, inputs)
        assert scheme is not None
        return self._reader.read(tensors, layer, scheme, rows, inputs, torch.device("cpu"))

    def tensor(self, name: str) -> Tensor | None:
        """A tensor that was not quantised, or None."""
        file = self._file_of[name]
        return load_file(file)[name] if name.removesuffix(".weight") in self._where else None


class Tensors:
    """What a reader needs of Weights."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.raw = tensors.__getitem__
        self.has = tensors.__contains__

    def ignore(self, *names: str) -> None:
        """See Weights."""


def calibrate(
    plan: Plan, partial: Path, method: Method, prompts: Sequence[Sequence[int]], tell: Callable[[int, int, str], None], longest: int
) -> int:
    """Write the shards that are missing: the number of those that were there already. See writing.write."""
    before = [shard_file(plan, partial, index).is_file() for index in range(len(plan.shards))]
    waiting = [{name.removesuffix(".weight") for name in names} & plan.schemes.keys() for names in plan.shards]
    index_of = {layer: index for index, layers in enumerate(waiting) for layer in layers}
    found: dict[str, Quantised] = {}
    norms: dict[str, Tensor] = {}

    def keep(layer: str, q: Quantised) -> None:
        found[layer] = q
        index = index_of[layer]
        waiting[index].discard(layer)
        if not waiting[index]:
            write_shard(plan, partial, index, lambda name, wide, scheme: found.pop(name), norms)
            norms.clear()
        tell(sum(not left for left in waiting), len(waiting), layer)

    observer = Observer(plan, method, Written(plan, partial), keep, norms.__setitem__)
    loaded = Loaded(plan.source.folder, longest=longest, quantizer=observer)
    loaded.run([prompt[: loaded.longest] for prompt in prompts])
    rounded = nearest(plan)
    write(
        plan, partial, lambda name, wide, scheme: rounded(name, wide, scheme) if name == LM_HEAD else found.pop(name)
    )  # what lies outside the layers
    return sum(before)
