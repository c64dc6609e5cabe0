"""What a section of the tuning is: tables that are chosen together, candidates, and the loads that they are timed and checked by.

What it is: `Shape`, the sizes of a model that kernels see; `Card`, those of a device; `Section`, `Load` and `Check`; and `Room`, where a section makes
its tensors: as many copies of what is read as its caches cannot hold, so that each call reads memory.
What it does not know: the sections themselves, time, candidates' fate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from penstock.kernels.tuning.search import Tile

Made = TypeVar("Made")


class Shape(NamedTuple):
    """A model's layers. Gated MLPs; one device."""

    name: str
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    dim: int
    vocab: int
    normed: bool = False
    """Queries and keys have norms of their own."""

    def weights(self) -> dict[str, tuple[int, int]]:
        """[N, K] of each; "gate_up" is gated, "lm_head" has float32 results."""
        return {
            "qkv": ((self.heads + 2 * self.kv_heads) * self.dim, self.hidden),
            "o": (self.hidden, self.heads * self.dim),
            "gate_up": (2 * self.inner, self.hidden),
            "down": (self.hidden, self.inner),
            "lm_head": (self.vocab, self.hidden),
        }


SHAPES = {
    "1b": Shape("1B", 2048, 8192, 32, 8, 64, 128256),  # of Llama 3.2 and 3.1 (arXiv:2407.21783)
    "8b": Shape("8B", 4096, 14336, 32, 8, 128, 128256),
}


class Card(NamedTuple):
    """What candidates depend on."""

    processors: int = 132
    chained: bool = True
    """It has bulk copies and dependent launches."""
    hopper: bool = True


class Check(NamedTuple):
    """A result, and what it must be near."""

    call: Callable[[], Tensor]
    truth: Callable[[], Tensor]
    """By torch, or by another kernel under the same candidate (then `exact`)."""
    exact: bool = False
    """The same bits; and `truth` is asked for each candidate."""
    pinned: bool = False
    """Other tables compute rows of the same batch: the bits must be those of the tiles in use."""
    tolerance: float = 0.02
    """Else a difference may be this share of the truth, and of its root mean square."""


class Load(NamedTuple):
    """Work that is timed as a whole: calls in turn, the first `distinct` of them different from one another, and the same again over other memory."""

    calls: Sequence[Callable[[], object]]
    distinct: int
    checks: Sequence[Check]


class Section(NamedTuple):
    """Tables that are chosen together."""

    name: str
    """Of the table."""
    what: str
    candidates: Callable[[Card], list[Tile]]
    """What is tried, each upon the tile in use."""
    loads: Callable[[Shape], dict[str, Callable[[Room], Load]]]
    """By name; empty where a model of that shape does not use the table."""
    narrow: bool = False
    """Only where weights, inputs or the KV cache have fewer than 16 bits."""
    hopper: bool = False
    """Its kernel is for compute capability 9 alone."""


class Room:
    """Where tensors are made. `copies` 1: nothing is to be timed."""

    def __init__(self, device: torch.device, *, rotate_bytes: int = 0, dtype: torch.dtype = torch.bfloat16) -> None:
        self.device, self.dtype = device, dtype
        self._rotate = rotate_bytes
        self.generator = torch.Generator(device).manual_seed(7)
        self._kept: dict[Any, Any] = {}
        self._outputs: list[Tensor] = []

    def copies(self, nbytes: float) -> int:
        """Of something of so many bytes, so that reading all of them in turn finds none in the caches."""
        return max(1, min(16, -(-self._rotate // max(1, int(nbytes)))))

    def kept(self, key: tuple[Any, ...], make: Callable[[], Made]) -> Made:
        """Made once for all loads of a section: weights."""
        if key not in self._kept:
            self._kept[key] = make()
        made: Made = self._kept[key]
        return made

    def clear(self) -> None:
        """Let go of what was kept."""
        self._kept.clear()
        self._outputs.clear()

    def poison(self) -> None:
        """Whatever is not written from now on is seen."""
        for output in self._outputs:
            poison(output)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Drawn numbers."""
        return torch.randn(*shape, dtype=dtype or self.dtype, device=self.device, generator=self.generator)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Room for results, or for what a kernel keeps there meanwhile."""
        self._outputs.append(torch.empty(shape, dtype=dtype or self.dtype, device=self.device))
        poison(self._outputs[-1])
        return self._outputs[-1]

    def zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """As it says."""
        return torch.zeros(*shape, dtype=dtype, device=self.device)

    def i32(self, values: Any) -> Tensor:
        """On the device."""
        return torch.as_tensor(values).to(torch.int32).to(self.device)


def tiles(names: Sequence[str], *rows: Sequence[int]) -> list[Tile]:
    """Candidates as a table."""
    return [dict(zip(names, row, strict=True)) for row in rows]


def poison(result: Tensor) -> None:
    """What no kernel computes of sound inputs."""
    result.fill_(torch.nan if result.is_floating_point() else -7)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight^T by torch in float32, in pieces of the weight: it need not fit twice."""
    return torch.cat([x.float() @ piece.float().t() for piece in torch.split(weight, 8192)], 1)
