"""From a checkpoint's tensors to a device's layers: the one place where a weight becomes a `Linear`.

What it is: a family names its tensors; the builder takes them and lets the device's `Ops` make layers of them. On the host each is packed as it is
read; on another device memory is taken at once and filled at the end, several tensors at a time (reading, page faults and copies overlap).
Where the checkpoint has a layer in quantised form, or is to be quantised while it loads, the quantizer reads it, and the device multiplies it as it is, if it
can; what it cannot is dequantised here, which `wide` counts. Parts of one layer that are stored in different ways become layers of their own.
What it does not know: families, files, formats, how a layer multiplies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, cast

import torch

from penstock.core.contract.devices import ModelFacts
from penstock.core.protocol.errors import ConfigError
from penstock.kernels.activation.reference import gated
from penstock.kernels.linear.scheme import Quantised, Scheme, dequantise
from penstock.plugins.models.api import Columns, Linear, Ops, Progress, QuantisedLinear, Quantizer, Stacked, Weights
from penstock.plugins.models.tied import HEAD, Ends, ends_of

Tensor = torch.Tensor
READERS = 6


class Part(NamedTuple):
    """A linear layer of the checkpoint: "model.layers.0.self_attn.q_proj", without ".weight", and its number of outputs."""

    name: str
    rows: int


class Beside:
    """Layers that read one input, their outputs side by side: what one layer with as many parts would give. With an activation they are gate and up."""

    def __init__(self, layers: Sequence[Linear], activation: str = "") -> None:
        self.n = layers[0].n if activation else sum(layer.n for layer in layers)
        self.k = layers[0].k
        self.nbytes = sum(layer.nbytes for layer in layers)
        self._layers = layers
        self._activation = activation

    def __call__(self, x: Tensor, columns: Columns | None = None, out: Tensor | None = None) -> Tensor:
        """See Linear."""
        y = torch.cat([layer(x, columns) for layer in self._layers], 1)
        if self._activation:
            y = gated(self._activation, y)
        return y if out is None else out.copy_(y)


class Given:
    """A source of one tensor, which is there already. See Weights."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def take(self, name: str, shape: Sequence[int]) -> Tensor:
        """See Weights."""
        return self._tensor


class Builder:
    """`nbytes` counts what was built, a tied head once; `wide` the layers that are quantised in the checkpoint, but not on the device, and the bytes that this takes; `rounded` is how the output
    head was quantised while it was loaded."""

    def __init__(
        self,
        weights: Weights,
        ops: Ops,
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress | None = None,
        quantizer: Quantizer | None = None,
        rounding: Quantizer | None = None,
    ) -> None:
        """`rounding`: makes a quantised output head of a wide one."""
        self.device = device
        self.nbytes = 0
        self.rounded: Scheme | None = None
        self.wide: dict[Scheme, tuple[int, int]] = {}
        self.weights = weights
        self._quantizer = quantizer
        self._rounding = rounding
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
        return self._counted(self._layer(parts, inputs, bias))

    def gated(self, gate: Part, up: Part, inputs: int, activation: str, *, bias: bool = False) -> Linear:
        """act(gate(x)) * up(x) as one layer."""
        return self._counted(self._layer([gate, up], inputs, bias, activation))

    def ends(self, facts: ModelFacts) -> tuple[Tensor, Callable[[], Linear]]:
        """The embedding table [V, H], and a call that makes the output head, to be made last (tied or not: tied.py)."""
        part, inputs = Part(HEAD.removesuffix(".weight"), facts.vocab_size), facts.hidden_size
        stored = self._scheme(part, inputs)
        ends = ends_of(facts, self.weights, quantised=stored is not None)
        shape = (part.rows, inputs)
        if stored is not None:
            if self._rounding is not None:
                raise ConfigError(
                    "--lm-head-quantization: the checkpoint's output head is quantised already. Leave the option out.",
                    param="lm_head_quantization",
                )
            table = self._kept(self._own(shape, ends.table))

            return table, lambda: self._counted(self._layer([part], inputs, False, head=True))
        if self._rounding is not None:
            return self._rounded(self._rounding, part, inputs, ends)
        table = self._kept(self._own(shape, ends.table))

        def head() -> Linear:
            if ends.head is None:
                layer = self._ops.head(table)
                self.nbytes += 0 if getattr(layer, "weight", None) is table else layer.nbytes
                return layer
            return self._counted(self._ops.head(self._own(shape, ends.head)))

        return table, head

    def _rounded(self, rounding: Quantizer, part: Part, inputs: int, ends: Ends) -> tuple[Tensor, Callable[[], Linear]]:
        """A wide embedding table, and a head rounded from it if they are tied, else from its own tensor."""
        shape = (part.rows, inputs)
        scheme = rounding.scheme(self.weights, part.name, part.rows, inputs)
        make = getattr(self._ops, "quantised", None)
        layer: QuantisedLinear | None = None if make is None or scheme is None else make(scheme, [part.rows], inputs, None, "", head=True)
        if scheme is None or layer is None:
            raise ConfigError(
                f"--lm-head-quantization: {rounding.method} cannot be multiplied on this device as an output head of {part.rows} x {inputs}. Try int8.",
                param="lm_head_quantization",
            )
        self.rounded = scheme

        def rounded(wide: Tensor) -> None:
            q = rounding.read(cast(Weights, Given(wide)), part.name, scheme, part.rows, inputs, self.device)
            layer.fill(0, q)

        if ends.head is not None:
            taken = ends.head
            table = self._kept(self._own(shape, ends.table))
            self._do(lambda: rounded(taken()))
        elif self._later is None:
            table = self._kept(self._own(shape, ends.table))
            rounded(table)
        else:  # what is read once serves both
            table = self._kept(torch.empty(shape, dtype=self.dtype, device=self.device))

            def both() -> None:
                wide = ends.table()
                table.copy_(wide)
                rounded(wide)

            self._do(both)
        return table, lambda: self._counted(layer)

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

    def _scheme(self, part: Part, inputs: int) -> Scheme | None:
        return None if self._quantizer is None else self._quantizer.scheme(self.weights, part.name, part.rows, inputs)

    def _layer(self, parts: Sequence[Part], inputs: int, bias: bool, activation: str = "", *, head: bool = False) -> Linear:
        schemes = [self._scheme(part, inputs) for part in parts]
        scheme = schemes[0]
        if len(set(schemes)) > 1 or (len(parts) > 1 and scheme is not None and scheme.permuted):  # each part has an order of its own
            return Beside([self._layer([part], inputs, bias) for part in parts], activation)
        biases = self._stacked([(f"{part.name}.bias", (part.rows,)) for part in parts]) if bias else None
        quantised = None if scheme is None else self._quantised(parts, scheme, inputs, biases, activation, head)
        if quantised is not None:
            return quantised
        weight = self._stacked([(f"{part.name}.weight", (part.rows, inputs)) for part in parts], scheme)
        if head:
            return self._ops.head(weight.joined())
        return self._ops.gated(weight, biases, activation) if activation else self._ops.linear(weight, biases)

    def _quantised(
        self, parts: Sequence[Part], scheme: Scheme, inputs: int, bias: Stacked | None, activation: str, head: bool
    ) -> Linear | None:
        own = getattr(self._quantizer, "linear", None)
        if own is not None:
            made: Linear | None = own(
                self.weights, [part.name for part in parts], scheme, [part.rows for part in parts], inputs, bias, activation, self.device
            )
            if made is not None:
                return made
        make = getattr(self._ops, "quantised", None)
        layer: QuantisedLinear | None = (
            None if make is None else make(scheme, [part.rows for part in parts], inputs, bias, activation, head=head)
        )
        if layer is None:
            layers, more = self.wide.get(scheme, (0, 0))
            elements = sum(part.rows for part in parts) * inputs
            as_stored = sum(scheme.nbytes(part.rows, inputs) for part in parts)
            self.wide[scheme] = layers + 1, more + elements * self.dtype.itemsize - as_stored
            return None
        for index, part in enumerate(parts):
            self._do(lambda index=index, part=part: layer.fill(index, self._read(part.name, scheme, part.rows, inputs)))  # type: ignore[misc]
        return layer

    def _read(self, name: str, scheme: Scheme, rows: int, inputs: int) -> Quantised:
        assert self._quantizer is not None
        return self._quantizer.read(self.weights, name, scheme, rows, inputs, self.device)

    def _do(self, job: Callable[[], object]) -> None:
        """Now, or where several are read at once."""
        if self._later is None:
            job()
        else:
            self._later.append(job)

    def _take(self, name: str, shape: tuple[int, ...], scheme: Scheme | None) -> Tensor:
        """As it is stored, or what is stored in a quantised form as the ordinary tensor that it means."""
        if scheme is None:
            own = None if self._quantizer is None or len(shape) != 2 else getattr(self._quantizer, "wide", None)
            value: Tensor | None = None if own is None else own(self.weights, name.removesuffix(".weight"), *shape)
            return self.weights.take(name, shape) if value is None else value.to(self.dtype)
        return dequantise(self._read(name.removesuffix(".weight"), scheme, *shape), self.dtype)

    def _stacked(self, named: Sequence[tuple[str, tuple[int, ...]]], scheme: Scheme | None = None) -> Stacked:
        if self._later is None:
            return Stacked([self._take(name, shape, scheme) for name, shape in named], None)
        whole = torch.empty(sum(shape[0] for _, shape in named), *named[0][1][1:], dtype=self.dtype, device=self.device)
        ends = [sum(shape[0] for _, shape in named[: index + 1]) for index in range(len(named))]
        parts = [whole[end - shape[0] : end] for end, (_, shape) in zip(ends, named, strict=True)]
        for (name, shape), target in zip(named, parts, strict=True):
            self._later.append(lambda name=name, shape=shape, target=target: target.copy_(self._take(name, shape, scheme)))  # type: ignore[misc]
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
