"""Sections of the matmuls with quantised weights (4 and 8 bits), and with inputs of 8 bits, too.

What it is: their candidates, and loads that are a decoder layer's weights one after the other; the truth is the weight in full width, by torch.
What it does not know: how loads are timed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from penstock.kernels.linear.scheme import Scheme, dequantise, quantise
from penstock.kernels.tuning.search import Tile
from penstock.kernels.tuning.section import Card, Check, Load, Room, Section, Shape, product, tiles

Loads = dict[str, Callable[[Room], Load]]
WIDE_FROM = 16384
"""Rows of a weight from which w8a8.few.wide is asked (kernels/w8a8/triton.py)."""
SCHEMES = {4: Scheme("int4", 128), 8: Scheme("int8")}
TOKEN = {"fp8": Scheme("fp8_e4m3", activations="token"), "int8": Scheme("int8", activations="token")}
BLOCKS = Scheme("fp8_e4m3", 128, 128, activations="token")
SPLIT = ("BLOCK_N", "TARGET", "MAX_SPLITS", "AHEAD", "num_warps", "num_stages")


class Packed(NamedTuple):
    """A weight in the kernels' order, and what it means."""

    weight: Any
    means: Tensor
    blocks: Tensor | None


def packed(room: Room, scheme: Scheme, n: int, k: int) -> Packed:
    """Drawn, quantised by torch."""
    from penstock.kernels.quantised import layout
    from penstock.kernels.w8a8 import triton as w8a8

    made = quantise(room.normal(n, k, dtype=torch.float32) / 8, scheme)
    weight = layout.allocate(scheme, n, k, room.device)
    layout.fill(weight, made, 0)
    return Packed(layout.tightened(weight), dequantise(made, room.dtype), w8a8.block_scales(weight) if scheme.rows == 128 else None)


def _load(
    room: Room, sizes: dict[str, tuple[int, int]], scheme: Scheme, rows: int, run: Callable[[Packed, Any, Tensor], Tensor], *,
    given: Callable[[Tensor], Any] = lambda x: x, means: Callable[[Any, int], Tensor] = lambda x, k: x, pinned: bool = False,
    deterministic: Callable[[Packed, Tensor], Tensor] | None = None,
) -> Load:  # fmt: skip
    """`run(weight, given(x), out)`; `means(given(x), K)`: what that stands for; `deterministic(weight, x)`: the same in that mode, where the bits are pinned in any case."""
    calls: list[Callable[[], object]] = []
    checks: list[Check] = []
    first = {name: room.kept((scheme, n, k), functools.partial(packed, room, scheme, n, k)) for name, (n, k) in sizes.items()}
    for copy in range(room.copies(sum(one.weight.nbytes for one in first.values()))):
        for name, (n, k) in sizes.items():
            one = first[name] if copy == 0 else room.kept((scheme, n, k, copy), functools.partial(_again, first[name]))
            x, out = given(room.normal(rows, k)), room.empty(rows, n)
            call = functools.partial(run, one, x, out)
            calls.append(call)
            if copy == 0:
                truth = functools.partial(_truth, one, functools.partial(means, x, k))
                checks.append(Check(call, truth, pinned=pinned))
                if deterministic is not None:
                    checks.append(Check(functools.partial(deterministic, one, x), truth, pinned=True))
    return Load(calls, len(sizes), checks)


def _again(one: Packed) -> Packed:
    """In other memory."""
    return one._replace(weight=one.weight._replace(data=one.weight.data.clone(), scales=one.weight.scales.clone()))


def _truth(one: Packed, inputs: Callable[[], Tensor]) -> Tensor:
    return product(inputs(), one.means)


def _quantised(shape: Shape, bits: int, counts: Iterable[int]) -> Loads:
    def load(rows: int, room: Room) -> Load:
        from penstock.kernels.linear import triton as linear
        from penstock.kernels.quantised import triton as quantised

        sizes = {name: size for name, size in shape.weights().items() if name != "lm_head"}
        space = room.zeros(linear.workspace_elements(max(n for n, _ in sizes.values())))

        def run(one: Packed, x: Tensor, out: Tensor) -> Tensor:
            return quantised.matmul(x, one.weight, out=out, workspace=space)

        def fixed(one: Packed, x: Tensor) -> Tensor:
            return quantised.matmul(x, one.weight, workspace=space, deterministic=True)

        return _load(room, sizes, SCHEMES[bits], rows, run, deterministic=fixed if rows <= 64 else None)

    return {f"{shape.name}, int{bits}, rows {rows}": functools.partial(load, rows) for rows in counts}


def _eight(
    shape: Shape,
    table: str,
    counts: Iterable[int],
    kinds: Iterable[str],
    *,
    wide: bool | None = None,
    exact: bool = False,
    blocks: bool = False,
) -> Loads:
    names = [name for name, (n, _) in shape.weights().items() if name != "lm_head" and (wide is None or (n >= WIDE_FROM) == wide)]

    def load(kind: str, rows: int, room: Room) -> Load:
        from penstock.kernels import gpu
        from penstock.kernels.w8a8 import triton as w8a8
        from penstock.kernels.w8a8.rounding import quantise_rows
        from penstock.kernels.w8a8.rows import Rounding

        scheme = BLOCKS if blocks else TOKEN[kind]
        rounding = Rounding(scheme.kind, 128 if blocks else 0)

        def run(one: Packed, x: Any, out: Tensor) -> Tensor:
            y: Tensor = w8a8.matmul(x, one.weight, out=out, exact=exact, blocks=one.blocks, config=gpu.tuned(table))
            return y

        def means(x: Any, k: int) -> Tensor:
            codes: Tensor = x.codes.float()[:, :k]
            scales: Tensor = x.scales.t().repeat_interleave(128, 1)[:, :k] if blocks else x.scales[:, None]
            return codes * scales

        return _load(
            room,
            {name: shape.weights()[name] for name in names},
            scheme,
            rows,
            run,
            given=lambda x: quantise_rows(x, rounding),
            means=means,
            pinned=True,
        )

    return {f"{shape.name}, {kind}, rows {rows}": functools.partial(load, kind, rows) for kind in kinds for rows in counts} if names else {}


def _low_rows(card: Card) -> list[Tile]:
    """Tiles of 16 rows."""
    p, bulk = card.processors, int(card.chained)
    return tiles(
        (*SPLIT, "TMA"),
        (64, 8 * p, 8, 64, 4, 3, 0), (64, 4 * p, 8, 64, 4, 4, 0), (64, 8 * p, 8, 64, 4, 4, 0), (64, 4 * p, 8, 64, 4, 5, 0), (128, 2 * p, 8, 64, 8, 3, 0),
        (128, 4 * p, 8, 64, 8, 4, 0), (128, 4 * p, 8, 64, 4, 3, 0), (32, 8 * p, 8, 64, 4, 4, 0), (128, 2 * p, 8, 64, 8, 4, bulk), (128, 4 * p, 8, 128, 4, 4, bulk),
    )  # fmt: skip


def _rows(card: Card) -> list[Tile]:
    p = card.processors
    return tiles(
        SPLIT,
        (128, 2 * p, 8, 64, 8, 3), (128, 2 * p, 8, 64, 4, 3), (128, p, 8, 64, 8, 3), (128, p, 8, 64, 4, 3), (128, 2 * p, 8, 64, 8, 4),
        (128, 4 * p, 8, 64, 8, 3), (64, 4 * p, 8, 64, 4, 3), (64, 4 * p, 8, 64, 4, 4), (128, 2 * p, 8, 128, 4, 4), (128, p, 8, 64, 8, 2),
    )  # fmt: skip


def _many_rows(card: Card) -> list[Tile]:
    names = ("BLOCK_N", "ROWS", "ROUNDED", "TARGET", "MAX_SPLITS", "AHEAD", "num_warps", "num_stages")
    p = card.processors
    return tiles(names, *((128, rows, 1, target, 4, 64, 8, stages) for rows in (128, 256) for stages in (2, 3, 4) for target in (p, 2 * p)))


def _few(card: Card) -> list[Tile]:
    return tiles(("BN", "STAGES"), (64, 12), (64, 8), (64, 10), (128, 8), (128, 6), (128, 7), (32, 16), (32, 12), (256, 4))


def _stages(most: int) -> Callable[[Card], list[Tile]]:
    """Sizes stay: by them the kernel counts its turns (kernels/w8a8/triton.py). `most`: of their stages a Hopper's shared memory holds."""
    return lambda card: tiles(("GROUP", "num_stages"), *((group, stages) for group in (4, 8, 16) for stages in range(2, most + 1)))


SECTIONS = [
    *(
        Section(f"fragments.{bits}.{tall}", f"weights of {bits} bits, {tall} rows", _low_rows if tall == 16 else _rows,
                functools.partial(_quantised, bits=bits, counts=(1, 16) if tall == 16 else (tall,)), narrow=True)
        for bits in (4, 8) for tall in (16, 32, 64, 128)
    ),
    *(
        Section(f"fragments.{bits}.many", f"weights of {bits} bits, 256 rows and more", _many_rows, functools.partial(_quantised, bits=bits, counts=(256, 1024)), narrow=True)
        for bits in (4, 8)
    ),
    Section("w8a8.few", "inputs of 8 bits, up to 64 rows", _few,
            lambda s: _eight(s, "w8a8.few", (1, 32, 64), ("fp8", "int8"), wide=False), narrow=True, hopper=True),
    Section("w8a8.few.wide", "the same, many outputs", _few,
            lambda s: _eight(s, "w8a8.few.wide", (1, 32, 64), ("fp8", "int8"), wide=True), narrow=True, hopper=True),
    Section("w8a8.low", "inputs of 8 bits, some 128 rows", _stages(6), lambda s: _eight(s, "w8a8.low", (128, 256), ("fp8", "int8")), narrow=True),
    Section("w8a8", "inputs of 8 bits, some 512 rows", _stages(6), lambda s: _eight(s, "w8a8", (512,), ("fp8", "int8")), narrow=True),
    Section("w8a8.many", "FP8 inputs, many rows", _stages(4), lambda s: _eight(s, "w8a8.many", (2048,), ("fp8",)), narrow=True),
    Section("w8a8.many.int8", "int8 inputs, many rows", _stages(4), lambda s: _eight(s, "w8a8.many.int8", (2048,), ("int8",)), narrow=True),
    Section("w8a8.exact", "FP8 inputs, sums in float32", _stages(4), lambda s: _eight(s, "w8a8.exact", (512,), ("fp8",), exact=True), narrow=True),
    Section("w8a8.blocks", "FP8 in blocks of 128 x 128", _stages(6), lambda s: _eight(s, "w8a8.blocks", (512, 2048), ("fp8",), blocks=True), narrow=True),
]  # fmt: skip
