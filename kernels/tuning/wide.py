"""Sections of the matmuls with weights in 16 bits: skinny ones and the batch-invariant ones.

What it is: their candidates, and loads that are a decoder layer's weights one after the other, as a step reads them.
What it does not know: how loads are timed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from penstock.kernels.activation.reference import gated
from penstock.kernels.tuning.search import Tile
from penstock.kernels.tuning.section import Card, Check, Load, Room, Section, Shape, product, tiles

WIDE_FROM = 16384
"""Rows of a weight from which linear.skinny.wide is asked (kernels/linear/triton.py)."""


def _skinny_tiles(card: Card) -> list[Tile]:
    names = ("BLOCK_N", "BLOCK_K", "TARGET", "MAX_SPLITS", "AHEAD", "TMA", "num_warps", "num_stages")
    p, bulk = card.processors, int(card.chained)
    ahead = 128 if card.chained else 0
    return tiles(
        names,
        (64, 256, 3 * p, 4, ahead, bulk, 4, 3),
        (64, 256, 2 * p, 4, ahead, 0, 4, 3),
        (64, 128, 3 * p, 4, ahead, bulk, 4, 5),
        (64, 128, 3 * p, 4, ahead, 0, 4, 5),
        (32, 256, 2 * p, 4, ahead, 0, 4, 4),
        (32, 256, 4 * p, 4, ahead, bulk, 4, 4),
        (32, 128, 3 * p, 4, ahead, 0, 4, 4),
        (64, 256, 4 * p, 4, 256 if card.chained else 0, bulk, 4, 3),
        (64, 256, 3 * p, 4, 0, bulk, 4, 3),
        (32, 512, 3 * p, 4, ahead, bulk, 4, 3),
        (128, 128, 2 * p, 4, ahead, bulk, 4, 4),
        (64, 256, p, 4, ahead, bulk, 4, 3),
        (16, 512, 4 * p, 4, ahead, 0, 4, 3),
        (128, 128, 2 * p, 4, ahead, bulk, 8, 4),
        (64, 64, 3 * p, 4, ahead, 0, 4, 6),
        (128, 64, 2 * p, 4, ahead, 0, 4, 5),
    )


def _invariant_tiles(card: Card) -> list[Tile]:
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    return tiles(
        names,
        (128, 128, 64, 4, 4), (128, 128, 64, 8, 4), (128, 256, 64, 8, 3), (128, 128, 64, 8, 3), (256, 128, 64, 8, 3), (128, 256, 64, 8, 4),
        (128, 64, 64, 4, 4), (64, 256, 64, 4, 3), (128, 128, 128, 8, 3), (128, 128, 32, 4, 5), (64, 128, 64, 4, 4),
    )  # fmt: skip


def _small_tiles(card: Card) -> list[Tile]:
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    return tiles(
        names,
        (64, 32, 64, 4, 6), (64, 64, 64, 4, 5), (64, 64, 128, 4, 4), (64, 32, 128, 4, 4), (64, 32, 128, 4, 5), (64, 16, 128, 4, 5),
        (64, 16, 64, 4, 8), (64, 32, 64, 4, 8), (64, 128, 64, 4, 4), (64, 128, 64, 4, 5), (64, 32, 256, 4, 3), (64, 64, 64, 4, 7),
    )  # fmt: skip


class Weighed(NamedTuple):
    """One weight, its inputs, and room for results."""

    name: str
    x: Tensor
    weight: Tensor
    out: Tensor

    @property
    def gate(self) -> bool:
        """Rows of gate, then of up."""
        return self.name == "gate_up"

    def truth(self, fused: bool) -> Tensor:
        """By torch."""
        y = product(self.x, self.weight)
        return gated("silu", y.to(self.x.dtype)).float() if fused and self.gate else y


def _load(
    room: Room,
    shape: Shape,
    names: Iterable[str],
    rows: int,
    run: Callable[[Weighed, Tensor, Tensor | None], Tensor],
    *,
    fused: bool,
    pinned: bool,
) -> Load:
    """`run(weight, x, out)` for each of the weights. `fused`: gate and up become one result; `pinned`: see Check."""
    sizes = {name: size for name, size in shape.weights().items() if name in names}
    weights = []
    for copy in range(room.copies(sum(2 * n * k for n, k in sizes.values()))):
        for name, (n, k) in sizes.items():
            weight = room.kept((name, n, k, copy), functools.partial(room.normal, n, k))
            out = room.empty(rows, n // 2 if fused and name == "gate_up" else n, dtype=torch.float32 if name == "lm_head" else None)
            weights.append(Weighed(name, room.normal(rows, k), weight, out))
    calls = [functools.partial(run, one, one.x, one.out) for one in weights]
    checks = [
        Check(call, functools.partial(one.truth, fused), pinned=pinned) for one, call in zip(weights[: len(sizes)], calls, strict=False)
    ]
    for one in weights[: len(sizes)] if rows > 1 else []:  # a row alone, and as the last of all
        checks.append(Check(functools.partial(_last, run, one), functools.partial(run, one, one.x[-1:], None), exact=True))
    return Load(calls, len(sizes), checks)


def _last(run: Callable[[Weighed, Tensor, Tensor | None], Tensor], one: Weighed) -> Tensor:
    return run(one, one.x, one.out)[-1:]


def _skinny(shape: Shape, wide: bool, counts: Iterable[int] = (1, 8, 16)) -> dict[str, Callable[[Room], Load]]:
    names = [name for name, (n, _) in shape.weights().items() if (n >= WIDE_FROM) == wide]

    def load(rows: int, room: Room) -> Load:
        from penstock.kernels.linear import triton as linear

        space = room.zeros(linear.COUNTERS + 4 * linear.SKINNY * max(n for n, _ in shape.weights().values()))

        def run(one: Weighed, x: Tensor, out: Tensor | None) -> Tensor:
            kind = torch.float32 if one.name == "lm_head" else None
            return linear.skinny(x, one.weight, out=out, out_dtype=kind, workspace=space, gated="silu" if one.gate else None)

        return _load(room, shape, names, rows, run, fused=True, pinned=False)

    return {f"{shape.name}, rows {rows}": functools.partial(load, rows) for rows in counts} if names else {}


def _invariant(shape: Shape, counts: Iterable[int]) -> dict[str, Callable[[Room], Load]]:
    def load(rows: int, room: Room) -> Load:
        from penstock.kernels.linear import triton as linear

        def run(one: Weighed, x: Tensor, out: Tensor | None) -> Tensor:
            return linear.invariant(x, one.weight, out=out, out_dtype=torch.float32 if one.name == "lm_head" else None)

        names = [name for name in shape.weights() if rows <= 64 or name != "lm_head"]
        return _load(room, shape, names, rows, run, fused=False, pinned=True)

    return {f"{shape.name}, rows {rows}": functools.partial(load, rows) for rows in counts}


SECTIONS = [
    Section("linear.skinny", "up to 16 rows", _skinny_tiles, lambda shape: _skinny(shape, False)),
    Section("linear.skinny.wide", "up to 16 rows, many outputs", _skinny_tiles, lambda shape: _skinny(shape, True)),
    Section(
        "linear.invariant.small",
        "--deterministic, up to 64 rows",
        _small_tiles,
        lambda shape: _invariant(shape, (1, 16, 64)),
    ),
    Section("linear.invariant", "--deterministic, more rows", _invariant_tiles, lambda shape: _invariant(shape, (256, 2048))),
]
