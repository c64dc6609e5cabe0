"""Sections of the kernels that read and write rows: norms, rotation, gated activations, the largest logit.

What it is: their candidates and loads, at few rows (decode) and many (prefill).
What it does not know: how loads are timed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from penstock.kernels.activation.reference import gated as gated_by_torch
from penstock.kernels.rmsnorm.reference import rms_norm as rms_norm_by_torch
from penstock.kernels.rope.reference import rotate
from penstock.kernels.tuning.search import Tile
from penstock.kernels.tuning.section import Card, Check, Load, Room, Section, Shape, tiles

COUNTS = (16, 256, 4096)
SIZE = 16


def _each(shape: Shape, load: Callable[[int, Room], Load], counts: tuple[int, ...] = COUNTS) -> dict[str, Callable[[Room], Load]]:
    return {f"{shape.name}, rows {rows}": functools.partial(load, rows) for rows in counts}


def _norms(shape: Shape) -> dict[str, Callable[[Room], Load]]:
    def load(rows: int, room: Room) -> Load:
        from penstock.kernels.rmsnorm import triton as rmsnorm

        weight = room.normal(shape.hidden)
        copies = room.copies(6 * rows * shape.hidden)
        sets = [(room.normal(rows, shape.hidden), room.normal(rows, shape.hidden), room.empty(rows, shape.hidden)) for _ in range(copies)]
        calls = [functools.partial(rmsnorm.add_rms_norm, x, residual, weight, 1e-5, out) for x, residual, out in sets]
        x, _, out = sets[0]
        check = Check(lambda: rmsnorm.rms_norm(x, weight, 1e-5, out), lambda: rms_norm_by_torch(x, weight, 1e-5))
        return Load(calls, 1, [check])

    return _each(shape, load)


def _gates(shape: Shape) -> dict[str, Callable[[Room], Load]]:
    def load(rows: int, room: Room) -> Load:
        from penstock.kernels.activation import triton as activation

        copies = room.copies(6 * rows * shape.inner)
        sets = [(room.normal(rows, 2 * shape.inner), room.empty(rows, shape.inner)) for _ in range(copies)]
        calls = [functools.partial(activation.gated, "silu", x, out) for x, out in sets]
        return Load(calls, 1, [Check(calls[0], lambda: gated_by_torch("silu", sets[0][0]))])

    return _each(shape, load)


def _turns(shape: Shape, normed: bool) -> dict[str, Callable[[Room], Load]]:
    def load(rows: int, room: Room) -> Load:
        from penstock.kernels.attention import triton as attention
        from penstock.kernels.rope import triton as rope

        heads, kv, dim = shape.heads, shape.kv_heads, shape.dim
        blocks = -(-rows // SIZE) + 8
        positions, angles = room.i32(torch.arange(rows)), room.normal(rows, dim, dtype=torch.float32)
        slots = room.i32(torch.randperm(blocks * SIZE, generator=torch.Generator().manual_seed(5))[:rows])
        norms: dict[str, Any] = {"q_norm": room.normal(dim), "k_norm": room.normal(dim)} if normed else {}
        sets = [
            (
                room.normal(rows, (heads + 2 * kv) * dim),
                *(room.empty(blocks, kv, SIZE, dim) for _ in range(2)),
                room.empty(rows, heads, dim),
            )
            for _ in range(room.copies(4 * rows * (heads + 2 * kv) * dim))
        ]

        def call(qkv: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
            return rope.rope_and_cache(qkv, positions, angles, k, v, slots, heads, kv, out=out, **norms)

        def turned() -> Tensor:
            qkv, k, v, out = sets[0]
            q = call(qkv, k, v, out)
            return torch.cat([q, attention.read_kv(k, slots), attention.read_kv(v, slots)], 1)

        def truth() -> Tensor:
            parts = sets[0][0].view(rows, -1, dim)
            q, k, v = parts[:, :heads], parts[:, heads:-kv], parts[:, -kv:]
            if normed:
                q, k = rms_norm_by_torch(q, norms["q_norm"], 1e-6), rms_norm_by_torch(k, norms["k_norm"], 1e-6)
            return torch.cat([rotate(q, angles), rotate(k, angles), v], 1)

        return Load([functools.partial(call, *one) for one in sets], 1, [Check(turned, truth)])

    return _each(shape, load) if normed == shape.normed else {}


def _largest(shape: Shape) -> dict[str, Callable[[Room], Load]]:
    def load(rows: int, room: Room) -> Load:
        from penstock.kernels.argmax import triton as argmax

        sets = [room.normal(rows, shape.vocab, dtype=torch.float32) for _ in range(room.copies(4 * rows * shape.vocab))]
        out = room.empty(rows, dtype=torch.int32)
        space = room.zeros(2 * rows * -(-shape.vocab // 256), dtype=torch.int32)
        calls = [functools.partial(argmax.argmax, logits, out, space) for logits in sets]
        return Load(calls, 1, [Check(calls[0], lambda: sets[0].argmax(-1).int(), exact=True)])

    return _each(shape, load, (1, 64))


def _argmax_tiles(card: Card) -> list[Tile]:
    return tiles(
        ("CHUNK", "BLOCK", "num_warps"),
        *((chunk, block, w) for chunk, block in ((2048, 2048), (4096, 4096), (4096, 2048), (8192, 4096)) for w in (4, 8)),
    )


def _rope_tiles(card: Card) -> list[Tile]:
    names = ("HEADS", "ROWS", "num_warps")
    return tiles(
        names,
        *(
            (h, r, w)
            for h, r, w in (
                (8, 16, 4),
                (8, 8, 1),
                (8, 8, 2),
                (8, 16, 2),
                (8, 32, 4),
                (8, 32, 8),
                (16, 16, 4),
                (4, 8, 2),
                (4, 4, 1),
                (2, 2, 1),
            )
        ),
    )


def _warps(card: Card) -> list[Tile]:
    return [{"num_warps": warps} for warps in (2, 4, 8, 16)]


def _gated_tiles(card: Card) -> list[Tile]:
    return tiles(("BLOCK", "num_warps"), (8192, 8), (4096, 8), (4096, 4), (2048, 4), (2048, 8), (1024, 4), (1024, 2), (8192, 16))


SECTIONS = [
    Section("rmsnorm", "norms", _warps, _norms),
    Section("rope", "rotation, store of keys and values", _rope_tiles, lambda shape: _turns(shape, False)),
    Section("rope.normed", "the same with norms of queries and keys", _rope_tiles, lambda shape: _turns(shape, True)),
    Section("gated", "gated activations", _gated_tiles, _gates),
    Section("argmax", "greedy choice", _argmax_tiles, _largest),
]
