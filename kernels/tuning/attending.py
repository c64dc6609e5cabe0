"""Sections of attention: decode rows, prefill, deterministic mode, and a KV cache of 8 bits.

What it is: their candidates, and loads of one layer over caches that rotate; the truth is softmax by torch, a few rows of each load.
What it does not know: how loads are timed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from penstock.kernels.tuning.search import Tile
from penstock.kernels.tuning.section import Card, Check, Load, Room, Section, Shape, tiles

SIZE = 16
"""Keys of a block."""
MOST_KEYS = 1 << 19
"""Of all sequences of a load."""
KIND = "fp8_e4m3"
Loads = dict[str, Callable[[Room], Load]]


class Pages(NamedTuple):
    """One layer's cache of some sequences."""

    k: Tensor
    v: Tensor
    codes: Any = None

    def read(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, float32 [T, Hkv, D]."""
        if self.codes is not None:
            from penstock.kernels.attention import coded

            found: tuple[Tensor, Tensor] = coded.read_kv(self.k, self.v, self.codes, slots)
            return found
        from penstock.kernels.attention import triton as attention

        return attention.read_kv(self.k, slots).float(), attention.read_kv(self.v, slots).float()


def pages(room: Room, shape: Shape, blocks: int, kind: str) -> Pages:
    """Drawn keys and values, with `kind` as codes."""
    if not kind:
        return Pages(*(room.normal(blocks, shape.kv_heads, SIZE, shape.dim) for _ in range(2)))
    from penstock.kernels.attention import coded

    half = shape.kv_heads * SIZE * shape.dim
    pool = room.zeros(blocks, 2 * half + 2 * shape.kv_heads * SIZE * 2, dtype=torch.uint8)
    codes = pool[:, : 2 * half]
    for first in range(0, blocks, 4096):
        part = codes[first : first + 4096]
        part.copy_(room.normal(*part.shape, dtype=torch.float32).to(torch.float8_e4m3fn).view(torch.uint8))
    scales = pool[:, 2 * half :].view(torch.bfloat16)
    scales.copy_(torch.rand(scales.shape, device=room.device, generator=room.generator) + 0.5)
    caches = codes.view(blocks, 2, shape.kv_heads, SIZE, shape.dim)
    return Pages(caches[:, 0], caches[:, 1], coded.codes_of(kind, scales.view(blocks, 2, shape.kv_heads, SIZE)[:, 0]))


def seen(q: Tensor, found: Pages, table: Tensor, length: int, first: int) -> Tensor:
    """Softmax by torch: rows q [T, Hq, D] of one sequence, at positions `first` and on, over its keys."""
    at = torch.arange(length, device=q.device)
    slots = table[at // SIZE].long() * SIZE + at % SIZE
    group = q.shape[1] // found.k.shape[1]
    keys, values = (part.repeat_interleave(group, 1).transpose(0, 1) for part in found.read(slots))
    scores = q.float().transpose(0, 1) @ keys.transpose(1, 2) * q.shape[2] ** -0.5
    later = at[None] > (first + torch.arange(len(q), device=q.device))[:, None]
    result: Tensor = (scores.masked_fill(later, -torch.inf).softmax(-1) @ values).transpose(0, 1)
    return result


def _decode(shape: Shape, counts: Iterable[tuple[int, int]], kind: str = "", deterministic: bool = False, pinned: bool = False) -> Loads:
    def load(rows: int, length: int, room: Room) -> Load:
        from penstock.kernels.attention import triton as attention

        per = -(-length // SIZE)
        table = room.i32(torch.randperm(rows * per, generator=torch.Generator().manual_seed(3))).view(rows, per)
        lengths = room.i32([length - row % min(3, length) for row in range(rows)])
        q, out = room.normal(rows, shape.heads, shape.dim), room.empty(rows, shape.heads, shape.dim)
        elements = attention.workspace_elements(rows, shape.heads, shape.dim, deterministic=True)
        space, arrivals = room.empty(elements, dtype=torch.float32), room.zeros(rows * shape.kv_heads, dtype=torch.int32)
        scale = shape.dim**-0.5

        def call(found: Pages) -> Tensor:
            return attention.decode_attention(
                q,
                found.k,
                found.v,
                table,
                lengths,
                scale,
                out=out,
                workspace=space,
                counters=arrivals,
                codes=found.codes,
                deterministic=deterministic,
            )

        sets = [
            pages(room, shape, rows * per, kind)
            for _ in range(room.copies(2 * rows * length * shape.kv_heads * shape.dim * (1 if kind else 2)))
        ]
        shown = sorted({0, rows - 1})

        def truth() -> Tensor:
            return torch.cat([seen(q[row : row + 1], sets[0], table[row], int(lengths[row]), int(lengths[row]) - 1) for row in shown])

        checks = [Check(lambda: call(sets[0])[shown], truth, pinned=pinned, tolerance=0.04 if kind else 0.02)]
        if deterministic:  # a row gets the bits that it has as the last of a chunk

            def as_chunk() -> Tensor:
                last = int(lengths[0])
                many = torch.cat([room.normal(min(7, last - 1), shape.heads, shape.dim), q[:1]])
                start = room.i32([0, len(many)])
                return attention.ragged_attention(
                    many, sets[0].k, sets[0].v, table[:1], start, lengths[:1], scale, codes=sets[0].codes, deterministic=True
                )[-1:]

            checks.append(Check(lambda: call(sets[0])[:1], as_chunk, exact=True))
        return Load([functools.partial(call, found) for found in sets], 1, checks)

    return {
        f"{shape.name}, {rows} x {length} keys" + (", decode" if deterministic else ""): functools.partial(load, rows, length)
        for rows, length in counts
        if rows * length <= MOST_KEYS
    }


def _prefill(shape: Shape, counts: Iterable[tuple[int, int, int]], *, dense: bool = False, deterministic: bool = False) -> Loads:
    """(sequences, rows of each, keys before them)."""

    def load(sequences: int, count: int, before: int, room: Room) -> Load:
        from penstock.kernels.attention import triton as attention

        length, tokens = before + count, sequences * count
        per = -(-length // SIZE)
        table = room.i32(torch.randperm(sequences * per, generator=torch.Generator().manual_seed(3))).view(sequences, per)
        qkv = room.normal(tokens, shape.heads + 2 * shape.kv_heads, shape.dim)
        q, k, v = qkv[:, : shape.heads], qkv[:, shape.heads : -shape.kv_heads], qkv[:, -shape.kv_heads :]
        start, lengths = room.i32([count * i for i in range(sequences + 1)]), room.i32([length] * sequences)
        found, out = pages(room, shape, sequences * per, ""), room.empty(tokens, shape.heads, shape.dim)
        at = torch.arange(before, length, device=room.device)
        attention.write_kv(found.k, found.v, k, v, (table[:, at // SIZE].long() * SIZE + at % SIZE).flatten())
        own: dict[str, Any] = {"new_k": k, "new_v": v} if dense else {}

        def call() -> Tensor:
            return attention.ragged_attention(
                q, found.k, found.v, table, start, lengths, shape.dim**-0.5, out=out, deterministic=deterministic, **own
            )

        some = min(16, count)
        ends = torch.cat([torch.arange(some), torch.arange(tokens - some, tokens)]).to(room.device)

        def truth() -> Tensor:
            return torch.cat(
                [
                    seen(q[:some], found, table[0], before + some, before),
                    seen(q[-some:], found, table[-1], length, length - some),
                ]
            )

        return Load([call], 1, [Check(lambda: call()[ends], truth)])

    return {
        f"{shape.name}, {sequences} x {count} rows" + (f" after {before}" if before else ""): functools.partial(
            load, sequences, count, before
        )
        for sequences, count, before in counts
    }


SPLIT = ("BLOCK_N", "SPLITS", "MIN_SPLIT", "AHEAD", "num_warps", "num_stages")
RAGGED = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
DECODES = ((1, 1024), (1, 8192), (16, 1024), (64, 1024), (64, 4096), (256, 512))
CHUNKS = ((1, 4096, 0), (4, 1024, 0), (16, 128, 1024))


def _split_tiles(card: Card) -> list[Tile]:
    ahead = int(card.chained)
    return tiles(
        SPLIT,
        (64, 16, 128, ahead, 4, 2), (64, 16, 128, ahead, 4, 3), (64, 16, 128, ahead, 4, 4), (64, 16, 256, ahead, 4, 2), (64, 16, 256, ahead, 4, 3),
        (128, 16, 256, ahead, 4, 2), (128, 16, 256, ahead, 8, 2), (64, 32, 128, ahead, 4, 2), (32, 16, 128, ahead, 4, 4), (64, 8, 256, ahead, 4, 3),
        (64, 16, 512, ahead, 4, 4), (64, 16, 128, 0, 4, 3), (128, 16, 128, ahead, 4, 3), (64, 16, 64, ahead, 4, 3), (32, 32, 64, ahead, 4, 4),
    )  # fmt: skip


def _split_wide_tiles(card: Card) -> list[Tile]:
    return tiles(
        ("BLOCK_N", "SPLITS", "MIN_SPLIT", "num_warps", "num_stages"),
        *((n, 16, least, w, g) for n in (16, 32, 64) for least, w, g in ((128, 4, 2), (512, 4, 3), (256, 8, 2))),
    )


def _ragged_tiles(card: Card) -> list[Tile]:
    return tiles(
        RAGGED,
        (128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3), (64, 64, 4, 2), (64, 128, 4, 2), (64, 128, 4, 3), (128, 64, 8, 4),
        (128, 64, 8, 2), (64, 32, 4, 4), (128, 32, 8, 4), (64, 64, 4, 4), (128, 64, 4, 3),
    )  # fmt: skip


def _fixed_tiles(card: Card) -> list[Tile]:
    """BLOCK_M is that of both kernels, and how many rows the matrix unit takes at once decides the order in which it adds."""
    return [tile for tile in _ragged_tiles(card) if tile["num_stages"] <= 3]


def _coded_tiles(card: Card) -> list[Tile]:
    return tiles(
        ("BLOCK_N", "TARGET", "MAX_SPLITS", "AHEAD", "num_warps", "num_stages"),
        *((n, target, 32, 1, w, g) for n, w, g in ((128, 4, 3), (128, 4, 2), (64, 4, 3), (64, 4, 4), (128, 8, 3), (256, 8, 2)) for target in (64, 128)),
        (128, 32, 32, 1, 4, 3),
    )  # fmt: skip


def _coded_many_tiles(card: Card) -> list[Tile]:
    return tiles(
        SPLIT, *((n, splits, least, 1, 4, g) for n, g in ((64, 3), (64, 4), (64, 2), (128, 3), (128, 2)) for splits, least in ((4, 1024), (4, 4096), (8, 1024)))
    )  # fmt: skip


def _if(condition: bool, loads: Loads) -> Loads:
    return loads if condition else {}


def _coded(counts: Sequence[tuple[int, int]]) -> Callable[[Shape], Loads]:
    return lambda shape: _if(shape.dim <= 128, _decode(shape, counts, KIND))


def _fixed(shape: Shape) -> Loads:
    return _decode(shape, ((1, 8192), (64, 1024)), deterministic=True) | _prefill(shape, CHUNKS, deterministic=True)


SECTIONS = [
    Section("attention.split", "decode rows", _split_tiles, lambda s: _if(s.dim <= 128, _decode(s, DECODES))),
    Section("attention.split.wide", "decode rows, wide heads", _split_wide_tiles, lambda s: _if(s.dim > 128, _decode(s, DECODES))),
    Section("attention.ragged.dense", "prefill", _ragged_tiles, lambda s: _if(s.dim <= 128, _prefill(s, CHUNKS, dense=True))),
    Section("attention.ragged", "prefill through the pages", _ragged_tiles, lambda s: _if(s.dim <= 128, _prefill(s, CHUNKS))),
    Section("attention.ragged.wide", "prefill, wide heads", _ragged_tiles, lambda s: _if(s.dim > 128, _prefill(s, CHUNKS) | _fixed(s))),
    Section("attention.ragged.fixed", "--deterministic, prefill and decode", _fixed_tiles, lambda s: _if(s.dim <= 128, _fixed(s))),
    Section(
        "attention.split.fixed", "--deterministic, decode rows", lambda card: [{"num_stages": n} for n in (1, 2, 3, 4)],
        lambda s: _decode(s, ((1, 8192), (16, 1024), (64, 1024)), deterministic=True, pinned=True),
    ),
    Section("attention.coded", "KV cache of 8 bits, few rows", _coded_tiles, _coded(((1, 1024), (1, 8192), (16, 2048))), narrow=True),
    Section("attention.coded.many", "KV cache of 8 bits, 64 rows", _coded_many_tiles, _coded(((64, 1024), (64, 4096), (128, 1024))), narrow=True),
    Section("attention.coded.most", "KV cache of 8 bits, 192 rows", _coded_many_tiles, _coded(((192, 512), (256, 1024))), narrow=True),
]  # fmt: skip
