"""Speed of the CPU kernels on this machine, against its own limits: `python -m penstock.kernels.bench [tiny|small ...]`, or `... bench kv [...]`
for the KV cache alone.

What it is: read bandwidth and float32 matmul rate measured first (the roofs), then linear layers, attention and whole decoder steps, each
as the best of several runs (a shared machine only ever makes things slower), with GB/s, GFLOP/s and the share of the roof; and layers and steps of
quantised weights and of a KV cache of eight bits, taken in turns with bfloat16 ones and given as how many times as fast.
What it does not know: servers, requests.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.kernels import native
from penstock.kernels.attention import Scales, paged_attention
from penstock.kernels.attention.codes import KINDS, encode
from penstock.kernels.attention.layout import describe
from penstock.kernels.decoder import DecoderLayer, DecoderProgram
from penstock.kernels.linear import PackedGated, PackedLinear, pack, pack_gated
from penstock.kernels.linear.scheme import Scheme, quantise
from penstock.kernels.quantised.api import pack_quantised, pack_quantised_gated


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
SCHEMES = {
    "bf16": None,
    "int8": Scheme("int8"),
    "fp8": Scheme("fp8_e4m3", 128, 128),
    "int4": Scheme("int4", 128),
    "int4 zeros": Scheme("int4", 128, 1, True),
}
CONTEXTS = (256, 1024, 4096, 8192)
HEADS = {
    **{word: (scheme, None) for word, scheme in SCHEMES.items()},
    "int8 + head int8": (Scheme("int8"), Scheme("int8")),
    "int4 + head int8": (Scheme("int4", 128), Scheme("int8")),
    "int4 + head int4": (Scheme("int4", 128), Scheme("int4", 128)),
}
"""Whole steps: how the layers are stored, and the output head."""
BEYOND_CACHES = 160e6
"""Bytes of bfloat16 weights that are streamed from memory."""


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


def linear(scheme: Scheme | None, n: int, k: int, dtype: torch.dtype) -> PackedLinear:
    weight = random(n, k, dtype=dtype)
    return pack(weight) if scheme is None else pack_quantised([quantise(weight, scheme)])


def gated(scheme: Scheme | None, n: int, k: int, dtype: torch.dtype) -> PackedGated:
    gate, up = random(n, k, dtype=dtype), random(n, k, dtype=dtype)
    return pack_gated(gate, up, "silu") if scheme is None else pack_quantised_gated(quantise(gate, scheme), quantise(up, scheme), "silu")


def pool(shape: Shape, num_blocks: int, kind: str) -> tuple[list[Tensor], list[Tensor], list[Scales]]:
    """Caches of codes of random keys and values, as a pool has them: a block of all layers, scales behind its codes."""
    page = (shape.layers, 2, shape.kv_heads, 16, shape.dim)
    codes, scales = encode(torch.randn(num_blocks, *page), kind)
    pages = torch.cat((codes.flatten(1), scales.view(torch.uint8).flatten(1)), 1)
    k_v = pages[:, : codes[0].numel()].view(-1, *page)
    of = pages[:, codes[0].numel() :].view(torch.bfloat16).view(-1, *page[:-1])
    layers = range(shape.layers)
    return [k_v[:, i, 0] for i in layers], [k_v[:, i, 1] for i in layers], [Scales(kind, of[:, i, 0], of[:, i, 1]) for i in layers]


def model(
    shape: Shape, dtype: torch.dtype, num_blocks: int, scheme: Scheme | None = None, head_scheme: Scheme | None = None, kv: str = ""
) -> tuple[DecoderProgram, int]:
    """A random model and the bytes of weights that one step reads. `kv`: of codes.KINDS."""
    width = (shape.heads + 2 * shape.kv_heads) * shape.dim
    layers = [
        DecoderLayer(
            attn_norm=random(shape.hidden, dtype=dtype),
            qkv=linear(scheme, width, shape.hidden, dtype),
            o=linear(scheme, shape.hidden, shape.heads * shape.dim, dtype),
            mlp_norm=random(shape.hidden, dtype=dtype),
            gate_up=gated(scheme, shape.inter, shape.hidden, dtype),
            down=linear(scheme, shape.hidden, shape.inter, dtype),
        )
        for _ in range(shape.layers)
    ]
    head = linear(head_scheme, shape.vocab, shape.hidden, dtype)
    if kv:
        k_caches, v_caches, scales = pool(shape, num_blocks, kv)
    else:
        wide = torch.randn(num_blocks, shape.layers, 2, shape.kv_heads, 16, shape.dim).to(dtype)
        k_caches, v_caches, scales = [wide[:, i, 0] for i in range(shape.layers)], [wide[:, i, 1] for i in range(shape.layers)], []
    program = DecoderProgram(
        embedding=random(shape.vocab, shape.hidden, dtype=dtype), layers=layers, final_norm=random(shape.hidden, dtype=dtype), lm_head=head,
        num_heads=shape.heads, num_kv_heads=shape.kv_heads, head_dim=shape.dim, eps=1e-5, cos_sin=torch.randn(2 * max(CONTEXTS), shape.dim).tanh(),
        k_caches=k_caches, v_caches=v_caches, scales=scales,
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


def in_turns(calls: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """Shortest time of each, in seconds, all of them in every round: what slows the machine slows them alike."""
    shortest = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            start = clock()
            call()
            shortest[name] = min(shortest[name], clock() - start)
    return shortest


def ratios(title: str, seconds: dict[str, float]) -> None:
    wide = seconds["bf16"]
    print(
        f"{title:44} {wide * 1e3:9.3f} ms bf16;",
        ", ".join(f"{name} {wide / took:.2f}x" for name, took in seconds.items() if name != "bf16"),
        flush=True,
    )


def quantised(name: str, shape: Shape) -> None:
    """Layers of one shape, so many that they come from memory, and whole steps."""
    dtype = torch.bfloat16
    for n, k in ((2 * shape.inter, shape.hidden), (shape.hidden, shape.inter)):
        copies = -(-int(BEYOND_CACHES) // (2 * n * k))
        held = {word: [linear(scheme, n, k, dtype) for _ in range(copies)] for word, scheme in SCHEMES.items()}
        for rows in (1, 4, 16, 64, 512):
            x, used = random(rows, k, dtype=dtype), copies if rows <= 16 else min(copies, 4)
            out = torch.empty(rows, n, dtype=dtype)
            calls = {
                word: functools.partial(lambda layers, x, out: [layer(x, out) for layer in layers], held[word][:used], x, out)
                for word in held
            }
            seconds = in_turns(calls, 10 if rows <= 64 else 4)
            ratios(f"{name} linear {n}x{k}, {rows} rows", {word: took / used for word, took in seconds.items()})
    programs = {word: model(shape, dtype, 64 * 40, scheme, head)[0] for word, (scheme, head) in HEADS.items()}
    for sequences, rows, context in ((1, 1, 256), (4, 1, 256), (16, 1, 256), (1, 512, 512)):
        steps = {word: step(program, sequences, rows, context) for word, program in programs.items()}
        ratios(f"{name} step, {sequences} x {rows} tokens, context {context}", in_turns(steps, 10 if rows == 1 else 3))


def attention(program: DecoderProgram, context: int) -> list[Callable[[], object]]:
    """Attention of one row in each layer, without what Python costs."""
    parts, lib = program.parts, native.library()
    assert lib is not None, native.describe()
    q = random(1, parts.num_heads, parts.head_dim, dtype=torch.bfloat16, scale=1.0)
    out, table = torch.empty_like(q), torch.randperm(-(-context // 16)).int()
    start, length = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([context], dtype=torch.int32)
    calls: list[Callable[[], object]] = []
    kept = (q, out, table, start, length)
    for k_cache, v_cache, scales in zip(parts.k_caches, parts.v_caches, parts.scales, strict=True):
        whole = native.Program(heads=parts.num_heads, kv_heads=parts.num_kv_heads, dim=parts.head_dim, bf16=1, scale=parts.scale)
        layer = native.Layer()
        describe(whole, layer, k_cache, v_cache, scales)
        one = native.Step(
            tables=table.data_ptr(), q_start=start.data_ptr(), kv_len=length.data_ptr(), token_count=1, sequences=1, table_width=len(table),
            threads=torch.get_num_threads(),
        )  # fmt: skip
        structs = (ctypes.byref(whole), ctypes.byref(layer), ctypes.byref(one))
        calls.append(lambda structs=structs, kept=kept: lib.lib.ps_attention(*structs, kept[0].data_ptr(), kept[1].data_ptr()))  # type: ignore[misc]
    return calls


def cached(name: str, shape: Shape) -> None:
    """A KV cache of eight bits: attention of one row; whole steps, as processor time of one thread, of which other processes take nothing."""
    threads = torch.get_num_threads()
    programs = {kind or "bf16": model(shape, torch.bfloat16, max(CONTEXTS) // 16, kv=kind)[0] for kind in ("", *KINDS)}
    for context in CONTEXTS:
        layers = {f"{w} {i}": call for w, p in programs.items() for i, call in enumerate(attention(p, context))}
        shortest = in_turns(layers, 40)
        each = {w: sum(took for word, took in shortest.items() if word.split()[0] == w) for w in programs}
        ratios(f"{name} attention of a step, context {context}", each)
        torch.set_num_threads(1)
        steps = {w: step(p, 1, 1, context) for w, p in programs.items()}
        ratios(f"{name} step, 1 token, context {context}, 1 thread", in_turns(steps, 20, time.process_time))
        torch.set_num_threads(threads)
    torch.set_num_threads(1)
    steps = {w: step(p, 1, 1024, 1024) for w, p in programs.items()}
    ratios(f"{name} step, 1 x 1024 tokens, 1 thread", in_turns(steps, 3, time.process_time))
    torch.set_num_threads(threads)


def main(names: list[str]) -> None:
    """Print the tables."""
    if names[:1] == ["kv"]:
        print(f"{native.describe()}, {torch.get_num_threads()} threads")
        for name in names[1:] or SHAPES:
            cached(name, SHAPES[name])
        return
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
        quantised(name, shape)
        cached(name, shape)


if __name__ == "__main__":
    main(sys.argv[1:] or list(SHAPES))
