"""Speed of the CPU kernels on this machine, against its own limits: `python -m penstock.kernels.bench [tiny|small ...]`.

What it is: read bandwidth and float32 matmul rate measured first (the roofs), then linear layers, attention and whole decoder steps, each
as the best of several runs (a shared machine only ever makes things slower), with GB/s, GFLOP/s and the share of the roof.
What it does not know: servers, requests.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.kernels import native
from penstock.kernels.attention import allocate_cache, paged_attention
from penstock.kernels.decoder import DecoderLayer, DecoderProgram
from penstock.kernels.linear import pack, pack_gated


@dataclass(frozen=True)
class Shape:
    """A Llama-like model's sizes."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    dim: int
    inter: int
    vocab: int


SHAPES = {
    "tiny": Shape(hidden=256, layers=8, heads=8, kv_heads=4, dim=32, inter=1792, vocab=4096),
    "small": Shape(hidden=768, layers=24, heads=12, kv_heads=4, dim=64, inter=2048, vocab=16384),
}


def best(call: Callable[[], object], seconds: float = 0.6, least: int = 3) -> float:
    """Shortest time of one call, in seconds."""
    call()
    shortest, until, runs = float("inf"), time.perf_counter() + seconds, 0
    while runs < least or time.perf_counter() < until:
        start = time.perf_counter()
        call()
        shortest = min(shortest, time.perf_counter() - start)
        runs += 1
    return shortest


def bandwidth(megabytes: int) -> float:
    """GB/s of reading that many MB with torch's threads (a float32 sum)."""
    data = torch.ones(megabytes * 262144)
    return data.nbytes / best(data.sum) / 1e9


def random(*shape: int, dtype: torch.dtype, scale: float = 0.05) -> Tensor:
    return (torch.randn(*shape) * scale).to(dtype)


def model(shape: Shape, dtype: torch.dtype, num_blocks: int) -> tuple[DecoderProgram, int]:
    """A random model and the bytes of weights that one step reads."""
    width = (shape.heads + 2 * shape.kv_heads) * shape.dim
    layers = [
        DecoderLayer(
            attn_norm=random(shape.hidden, dtype=dtype),
            qkv=pack(random(width, shape.hidden, dtype=dtype)),
            o=pack(random(shape.hidden, shape.heads * shape.dim, dtype=dtype)),
            mlp_norm=random(shape.hidden, dtype=dtype),
            gate_up=pack_gated(random(shape.inter, shape.hidden, dtype=dtype), random(shape.inter, shape.hidden, dtype=dtype), "silu"),
            down=pack(random(shape.hidden, shape.inter, dtype=dtype)),
        )
        for _ in range(shape.layers)
    ]
    head = pack(random(shape.vocab, shape.hidden, dtype=dtype))
    caches = [[allocate_cache(num_blocks, shape.kv_heads, 16, shape.dim, dtype).zero_() for _ in layers] for _ in range(2)]
    program = DecoderProgram(
        embedding=random(shape.vocab, shape.hidden, dtype=dtype), layers=layers, final_norm=random(shape.hidden, dtype=dtype), lm_head=head,
        num_heads=shape.heads, num_kv_heads=shape.kv_heads, head_dim=shape.dim, eps=1e-5, cos_sin=torch.randn(4096, shape.dim).tanh(),
        k_caches=caches[0], v_caches=caches[1],
    )  # fmt: skip
    weights = [weight for layer in layers for weight in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    return program, head.nbytes + sum(weight.nbytes for weight in weights)


def step(program: DecoderProgram, sequences: int, rows: int, context: int, greedy: bool = True) -> Callable[[], None]:
    """A step of that many sequences with `rows` query rows each, `context` keys each, one result row each."""
    per = -(-context // 16)

    def i32(values: Tensor) -> Tensor:
        return values.to(torch.int32).contiguous()

    tables = i32(torch.arange(sequences * per).view(sequences, per))
    at = torch.arange(context - rows, context).repeat(sequences)
    row = torch.arange(sequences).repeat_interleave(rows)
    slots = i32(tables[row, at // 16] * 16 + at % 16)
    arguments = (i32(torch.arange(sequences * rows) % program.parts.embedding.shape[0]), i32(at), slots, tables)
    more = (i32(torch.arange(sequences + 1) * rows), i32(torch.full((sequences,), context)), i32(torch.arange(1, sequences + 1) * rows - 1))
    chosen = torch.empty(sequences, dtype=torch.int32) if greedy else None
    logits = torch.empty(sequences, program.parts.lm_head.n)
    return lambda: program(*arguments, *more, logits=logits, greedy=chosen)


def line(name: str, seconds: float, gigabytes: float, gigaflop: float, roof_gb: float, roof_gf: float) -> None:
    share = max(gigabytes / roof_gb, gigaflop / roof_gf) / seconds
    print(
        f"{name:44} {seconds * 1e3:9.3f} ms {gigabytes / seconds:7.1f} GB/s {gigaflop / seconds:7.1f} GFLOP/s {share:6.0%} of its roof",
        flush=True,
    )


def main(names: list[str]) -> None:
    """Print the tables."""
    dtype = torch.bfloat16
    dram, cache = bandwidth(512), bandwidth(20)
    square = torch.randn(2048, 2048)
    flops = 2 * 2048**3 / best(lambda: square @ square, 2.0) / 1e9
    print(f"{native.describe()}, {torch.get_num_threads()} threads")
    print(f"roofs: read {dram:.1f} GB/s of 512 MB, {cache:.1f} GB/s of 20 MB; torch float32 2048^3 {flops:.0f} GFLOP/s")
    wide = pack(random(2048, 2048, dtype=dtype))
    for rows in (1, 2, 4, 8, 16, 64, 256, 2048):
        x = random(rows, 2048, dtype=dtype)
        out = torch.empty_like(x)
        gigaflop = 2e-9 * rows * 2048**2
        line(f"linear 2048x2048 bf16, {rows} rows", best(lambda x=x, out=out: wide(x, out)), wide.nbytes / 1e9, gigaflop, cache, flops)  # type: ignore[misc]
    single = pack(random(2048, 2048, dtype=torch.float32))
    for rows in (1, 2048):
        x = random(rows, 2048, dtype=torch.float32)
        gigaflop = 2e-9 * rows * 2048**2
        line(f"linear 2048x2048 fp32, {rows} rows", best(lambda x=x: single(x)), single.nbytes / 1e9, gigaflop, cache, flops)  # type: ignore[misc]
    for name in names:
        shape = SHAPES[name]
        program, weights = model(shape, dtype, 64 * 40)
        roof = cache if weights < 28e6 else dram
        per_token = 2 * (weights / 2 - shape.vocab * shape.hidden)
        one = per_token + 2 * shape.vocab * shape.hidden
        for sequences in (1, 4, 16, 64):
            seconds = best(step(program, sequences, 1, 256), 2.0)
            kv = sequences * 256 * shape.kv_heads * shape.dim * 4 * shape.layers
            line(f"{name} decode, batch {sequences}, context 256", seconds, (weights + kv) / 1e9, one * sequences / 1e9, roof, flops)
        for rows in (512, 2048):
            seconds = best(step(program, 1, rows, rows), 2.0)
            attention = shape.layers * shape.heads * shape.dim * 4 * rows * rows / 2
            line(f"{name} prefill, {rows} tokens", seconds, weights / 1e9, (per_token * rows + attention) / 1e9, roof, flops)
        q = random(2048, shape.heads, shape.dim, dtype=dtype, scale=1.0)
        table = torch.arange(128, dtype=torch.int32).view(1, -1)
        start, length = torch.tensor([0, 2048], dtype=torch.int32), torch.tensor([2048], dtype=torch.int32)
        k_cache, v_cache = program.parts.k_caches[0], program.parts.v_caches[0]
        attend = functools.partial(paged_attention, q, k_cache, v_cache, table, start, length, 0.1)
        seconds = best(attend)
        line(f"{name} prefill attention of one layer, 2048", seconds, 0.0, shape.heads * shape.dim * 4 * 2048**2 / 2 / 1e9, roof, flops)


if __name__ == "__main__":
    main(sys.argv[1:] or list(SHAPES))
