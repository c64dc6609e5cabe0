"""Speed of the Triton kernels on this GPU against its own limits: `python -m penstock.kernels.gpu_bench [--quick] [--out FILE] [section ...]`.

What it is: copy bandwidth and a large bf16 matmul measured first (the roofs), then each kernel in several configurations at the shapes of Llama-3.1-8B,
beside torch's own kernels in the same run. Times are medians of CUDA-graph replays over inputs that rotate through more memory than the L2 holds. The
result is JSON (every measurement) and a table (the best configuration of each row); tuned.json is written from it by hand.
Compiling takes longer than measuring: `main` first starts one process a section that only compiles, all at once. A section that fails or runs out of
time loses its own rows only.
What it does not know: models, servers, requests.
Long: one section a kernel, all run in one go.
"""

# ruff: noqa: B023 (every call is made before the loop variables that it closes over change)
# mypy: disable-error-code="misc, arg-type, call-arg, list-item, no-untyped-call, no-any-return"

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from penstock.kernels.kv_bench import kv8

BF16 = torch.bfloat16
HEADS, KV_HEADS, DIM, HIDDEN, INTER, VOCAB = 32, 8, 128, 4096, 14336, 128256  # Llama-3.1-8B (arXiv:2407.21783)


class OutOfTime(Exception):
    """The time limit of the whole run is reached."""


class Bench:
    """Collects rows; `compile_only` runs every kernel's compilation and nothing else."""

    def __init__(self, limit_s: float, compile_only: bool, quick: bool) -> None:
        self.until = time.monotonic() + limit_s
        self.compile_only, self.quick = compile_only, quick
        self.rows: list[dict[str, Any]] = []
        self.errors: dict[str, str] = {}
        self.copy_gbs = self.matmul_tflops = 0.0

    def time(self, calls: Sequence[Callable[[], object]]) -> float:
        """Median seconds of one call; `calls` are the same work on different memory."""
        if time.monotonic() > self.until:
            raise OutOfTime
        calls[0]()
        if self.compile_only:
            return 1.0
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        repeats = max(1, 8 // len(calls))
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                for call in calls:
                    call()
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(40)]
        graph.replay()
        torch.cuda.synchronize()
        first, last = events[0]
        first.record()
        graph.replay()
        last.record()
        torch.cuda.synchronize()
        count = max(3, min(len(events), int(0.04 / max(1e-6, first.elapsed_time(last) / 1e3))))
        for before, after in events[:count]:
            before.record()
            graph.replay()
            after.record()
        torch.cuda.synchronize()
        return statistics.median(a.elapsed_time(b) for a, b in events[:count]) / 1e3 / (repeats * len(calls))

    def add(
        self, what: str, case: str, calls: Sequence[Callable[[], object]], *, gigabytes: float = 0.0, teraflop: float = 0.0,
        config: dict[str, int] | None = None, by: str = "penstock",
    ) -> None:  # fmt: skip
        """Measure one row; an error in it (too much shared memory, say) is a row too."""
        row: dict[str, Any] = {"what": what, "case": case, "by": by, "config": config or {}}
        try:
            seconds = self.time(calls)
        except OutOfTime:
            raise
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"[:300]
            torch.cuda.synchronize()
        else:
            row["us"] = round(seconds * 1e6, 2)
            if gigabytes:
                row["gb_s"] = round(gigabytes / seconds, 1)
            if teraflop:
                row["tflop_s"] = round(teraflop / seconds, 1)
            if self.matmul_tflops:
                shares = {"copy bandwidth": gigabytes / seconds / self.copy_gbs, "matmul rate": teraflop / seconds / self.matmul_tflops}
                row["roof"], row["share"] = max(shares.items(), key=lambda item: item[1])
                row["share"] = round(row["share"], 3)
        self.rows.append(row)


def randn(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape, dtype=dtype, device="cuda")


def i32(values: Any) -> Tensor:
    return torch.as_tensor(values).to(torch.int32).cuda()


def roofs(bench: Bench) -> None:
    """Copy bandwidth (bytes read plus written) and the bf16 matmul rate."""
    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    bench.add("copy", "4 GiB float32", [lambda: target.copy_(source)], gigabytes=2 * source.nbytes / 1e9, by="torch")
    bench.add("copy by a kernel", "4 GiB float32", [lambda: torch.neg(source, out=target)], gigabytes=2 * source.nbytes / 1e9, by="torch")
    bench.copy_gbs = max(row["gb_s"] for row in bench.rows)
    a, b = randn(8192, 8192), randn(8192, 8192)
    out = torch.empty_like(a)
    bench.add("matmul", "8192^3 bf16", [lambda: torch.mm(a, b, out=out)], teraflop=2 * 8192**3 / 1e12, by="torch")
    bench.matmul_tflops = bench.rows[-1]["tflop_s"]
    norm = source.view(-1, 4096)
    bench.add("read", "4 GiB float32, a sum", [lambda: norm.sum(-1)], gigabytes=source.nbytes / 1e9, by="torch")


SPLIT = [
    {"BLOCK_N": n, "SPLITS": s, "MIN_SPLIT": least, "AHEAD": 1, "num_warps": w, "num_stages": g}
    for n, s, least, w, g in (
        (64, 16, 128, 4, 2), (64, 16, 512, 4, 4), (128, 16, 512, 4, 3), (64, 16, 256, 4, 2), (128, 16, 256, 4, 2), (64, 32, 128, 4, 2),
    )
]  # fmt: skip


def decode(bench: Bench) -> None:
    """Split-KV decode attention; bytes are K and V read once."""
    from penstock.kernels.attention import triton as attention

    for rows, length in ((64, 4096), (1, 1024), (1, 4096), (1, 32768), (64, 1024), (256, 1024)):
        sets = max(1, min(4, int(3e8 / (rows * length * KV_HEADS * DIM * 4))))
        per = length // 16
        caches = [[randn(rows * per, KV_HEADS, 16, DIM) for _ in range(2)] for _ in range(sets)]
        q, out = randn(rows, HEADS, DIM), torch.empty(rows, HEADS, DIM, dtype=BF16, device="cuda")
        tables = i32(torch.randperm(rows * per)).view(rows, per)
        lengths = i32([length] * rows)
        workspace = torch.empty(attention.workspace_elements(rows, HEADS, DIM, deterministic=True), device="cuda")
        arrivals = i32([0] * rows * KV_HEADS)
        gigabytes = rows * length * KV_HEADS * DIM * 4 / 1e9
        for config in SPLIT[:2] if bench.quick else SPLIT:
            calls = [
                lambda c=pair, config=config: attention.decode_attention(
                    q, c[0], c[1], tables, lengths, DIM**-0.5, out=out, workspace=workspace, counters=arrivals, config=config
                )
                for pair in caches
            ]
            bench.add("decode attention", f"{rows} x {length}", calls, gigabytes=gigabytes, config=config)
        for stages in (3, 2, 4):
            config = {"num_stages": stages}
            calls = [
                lambda c=pair, config=config: attention.decode_attention(
                    q, c[0], c[1], tables, lengths, DIM**-0.5, out=out, workspace=workspace, deterministic=True, config=config
                )
                for pair in caches
            ]
            bench.add("decode attention, deterministic", f"{rows} x {length}", calls, gigabytes=gigabytes, config=config)
        del caches, calls


RAGGED = [
    {"BLOCK_M": m, "BLOCK_N": n, "num_warps": w, "num_stages": s}
    for m, n, w, s in (
        (128, 64, 8, 3),
        (128, 128, 8, 2),
        (128, 128, 8, 3),
        (64, 64, 4, 3),
        (64, 128, 4, 2),
        (128, 64, 8, 4),
        (128, 32, 8, 4),
    )
]


def prefill(bench: Bench) -> None:
    """Causal prefill; operations are those of the visible half."""
    from penstock.kernels.attention import triton as attention

    for sequences, length in ((1, 8192), (4, 2048)):
        tokens = sequences * length
        qkv = randn(tokens, HEADS + 2 * KV_HEADS, DIM)
        q, k, v = qkv[:, :HEADS], qkv[:, HEADS:-KV_HEADS], qkv[:, -KV_HEADS:]
        table = i32(torch.randperm(tokens // 16)).view(sequences, -1)
        caches = [torch.zeros(tokens // 16, KV_HEADS, 16, DIM, dtype=BF16, device="cuda") for _ in range(2)]
        at = torch.arange(length, device="cuda")
        where = (table[:, at // 16].long() * 16 + at % 16).flatten()
        attention.write_kv(caches[0], caches[1], k, v, where)
        out = torch.empty(tokens, HEADS, DIM, dtype=BF16, device="cuda")
        start, lengths = i32([length * i for i in range(sequences + 1)]), i32([length] * sequences)
        teraflop = sequences * 4 * HEADS * DIM * length * (length + 1) / 2 / 1e12
        case = f"{sequences} x {length}, causal"
        for config in RAGGED[:2] if bench.quick else RAGGED:
            for name, more in (("prefill attention, paged", {}), ("prefill attention, this step's keys dense", {"new_k": k, "new_v": v})):
                calls = [
                    lambda config=config, more=more: attention.ragged_attention(
                        q, caches[0], caches[1], table, start, lengths, DIM**-0.5, out=out, config=config, **more
                    )
                ]
                bench.add(name, case, calls, teraflop=teraflop, config=config)
        calls = [lambda: attention.ragged_attention(q, caches[0], caches[1], table, start, lengths, DIM**-0.5, out=out, deterministic=True)]
        bench.add("prefill attention, deterministic", case, calls, teraflop=teraflop)
        if bench.compile_only:
            continue
        q4, k4, v4 = (x.reshape(sequences, length, -1, DIM).transpose(1, 2) for x in (q, k, v))
        from torch.nn.attention import SDPBackend, sdpa_kernel

        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):

            def call(backend: SDPBackend = backend) -> None:
                with sdpa_kernel(backend):
                    functional.scaled_dot_product_attention(q4, k4, v4, is_causal=True, enable_gqa=True)

            bench.add("prefill attention, torch SDPA", case, [call], teraflop=teraflop, by=backend.name)


SKINNY = [
    {"BLOCK_N": n, "BLOCK_K": k, "TARGET": t, "MAX_SPLITS": 4, "AHEAD": 128, "TMA": b, "num_warps": w, "num_stages": s}
    for n, k, t, b, w, s in (
        (64, 256, 384, 1, 4, 3), (64, 256, 264, 0, 4, 3), (32, 256, 264, 0, 4, 4), (64, 128, 384, 0, 4, 5),
    )
]  # fmt: skip
WEIGHTS = {
    "qkv": (6144, HIDDEN),
    "o": (HIDDEN, HIDDEN),
    "gate_up": (2 * INTER, HIDDEN),
    "down": (HIDDEN, INTER),
    "lm_head": (VOCAB, HIDDEN),
}


def skinny(bench: Bench) -> None:
    """Few rows against a weight; bytes are the weight's."""
    from penstock.kernels.linear import triton as linear

    workspace = torch.zeros(linear.COUNTERS + 8 * 16 * VOCAB, device="cuda")
    for name, (n, k) in WEIGHTS.items():
        sets = max(1, min(8, int(2.5e8 / (n * k * 2))))
        weights = [randn(n, k) for _ in range(sets)]
        for rows in (1, 16):
            x, out = randn(rows, k), torch.empty(rows, n, dtype=BF16, device="cuda")
            case, gigabytes = f"{name} {n} x {k}, {rows} rows", n * k * 2 / 1e9
            for config in SKINNY[:2] if bench.quick else SKINNY:
                calls = [lambda w=w, config=config: linear.skinny(x, w, out=out, workspace=workspace, config=config) for w in weights]
                bench.add("skinny matmul", case, calls, gigabytes=gigabytes, config=config)
            if not bench.compile_only:
                bench.add(
                    "skinny matmul", case, [lambda w=w: torch.mm(x, w.t(), out=out) for w in weights], gigabytes=gigabytes, by="torch"
                )
        for rows in (2, 4, 8):
            x, out = randn(rows, k), torch.empty(rows, n, dtype=BF16, device="cuda")
            calls = [lambda w=w: linear.skinny(x, w, out=out, workspace=workspace) for w in weights]
            bench.add("skinny matmul, shipped", f"{name} {n} x {k}, {rows} rows", calls, gigabytes=n * k * 2 / 1e9)
        del weights


INVARIANT = [
    {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": w, "num_stages": s}
    for m, n, k, w, s in (
        (128, 128, 64, 8, 4),
        (128, 256, 64, 8, 3),
        (128, 128, 64, 4, 4),
        (64, 64, 64, 4, 5),
        (64, 32, 64, 4, 6),
        (64, 128, 64, 4, 4),
    )
]


def invariant(bench: Bench) -> None:
    """Batch-invariant matmul: what `--deterministic` costs beside cuBLAS."""
    from penstock.kernels.linear import triton as linear

    for rows in (1, 64, 8192):
        for name in ("o", "gate_up", "down"):
            n, k = WEIGHTS[name]
            weights = [randn(n, k) for _ in range(max(1, min(6, int(2.5e8 / (n * k * 2)))) if rows < 100 else 1)]
            x, out = randn(rows, k), torch.empty(rows, n, dtype=BF16, device="cuda")
            case = f"{name} {n} x {k}, {rows} rows"
            work = {"gigabytes": n * k * 2 / 1e9} if rows < 100 else {"teraflop": 2 * rows * n * k / 1e12}
            for config in INVARIANT[:3] if rows > 100 else INVARIANT[3:]:
                calls = [lambda w=w, config=config: linear.invariant(x, w, out=out, config=config) for w in weights]
                bench.add("batch-invariant matmul", case, calls, config=config, **work)
            if not bench.compile_only:
                bench.add("batch-invariant matmul", case, [lambda w=w: torch.mm(x, w.t(), out=out) for w in weights], by="torch", **work)


def quantised(bench: Bench) -> None:
    """Quantised weights in the shipped configurations beside bf16 ones; bytes are the weight's."""
    from penstock.kernels.linear import triton as linear
    from penstock.kernels.linear.scheme import Scheme
    from penstock.kernels.quantised import layout
    from penstock.kernels.quantised import triton as narrow

    schemes = {
        "int4 128": Scheme("int4", 128),
        "int4 128 zeros": Scheme("int4", 128, zeros=True),
        "int8": Scheme("int8"),
        "fp8": Scheme("fp8_e4m3"),
        "mxfp4": Scheme("fp4", 32),
        "nf4": Scheme("nf4", 64),
        "int8, inputs too": Scheme("int8", activations="token"),
        "fp8, inputs too": Scheme("fp8_e4m3", activations="token"),
    }
    workspace = torch.zeros(linear.workspace_elements(VOCAB), device="cuda")
    wide = torch.empty(narrow.PIECE, dtype=BF16, device="cuda")
    device = torch.device("cuda")
    for name, (n, k) in WEIGHTS.items():
        if name == "lm_head":
            continue
        plain = [randn(n, k) for _ in range(max(1, min(8, int(2.5e8 / (n * k * 2)))))]
        packed: dict[str, list[layout.Weight]] = {}
        for kind, scheme in schemes.items():
            packed[kind] = []
            for _ in range(max(1, min(8, int(2.5e8 / scheme.nbytes(n, k))))):
                weight = layout.allocate(scheme, n, k, device)
                weight.data.random_(0, 119)  # no code is NaN
                weight = layout.tightened(weight._replace(scales=torch.full_like(weight.scales, 2.0**-7)))
                if weight.zeros is not None:
                    weight.zeros.fill_(7)
                packed[kind].append(weight)
        for rows in (1, 16, 64, 512) if bench.quick else (1, 16, 32, 64, 128, 512, 4096):
            x, out = randn(rows, k), torch.empty(rows, n, dtype=BF16, device="cuda")
            case = f"{name} {n} x {k}, {rows} rows"
            calls = [lambda w=w: linear.matmul(x, w, out=out, workspace=workspace) for w in plain]
            bench.add("matmul bf16", case, calls, gigabytes=n * k * 2 / 1e9)
            for kind, some in packed.items():
                if some[0].scheme.activations:
                    continue
                calls = [lambda w=w: narrow.matmul(x, w, out=out, workspace=workspace, wide=wide) for w in some]
                bench.add(f"matmul {kind}", case, calls, gigabytes=some[0].nbytes / 1e9)


def eight(bench: Bench) -> None:
    """Inputs of 8 bits, too, in the shipped configurations, beside bf16 and cuBLAS's FP8 products (a scale a tensor, no rounding of inputs); bytes are the weight's."""
    from penstock.kernels.linear import triton as linear
    from penstock.kernels.linear.scheme import Scheme
    from penstock.kernels.quantised import layout
    from penstock.kernels.w8a8 import triton as w8a8
    from penstock.kernels.w8a8.rounding import quantise_rows
    from penstock.kernels.w8a8.rows import Rounding

    workspace = torch.zeros(linear.workspace_elements(VOCAB), device="cuda")
    device = torch.device("cuda")
    counts = (1, 16, 64, 512, 4096) if bench.quick else (1, 16, 32, 64, 128, 256, 512, 1024, 4096, 8192)
    for name, (n, k) in WEIGHTS.items():
        if name == "lm_head":
            continue
        sets = max(2, min(8, int(2.5e8 / (n * k))))
        plain = [randn(n, k) for _ in range(sets)]
        weights = {}
        for kind in ("fp8", "int8"):
            weight = layout.allocate(Scheme({"fp8": "fp8_e4m3"}.get(kind, kind), activations="token"), n, k, device)
            weights[kind] = [
                weight._replace(data=codes_like(weight.data, kind), scales=torch.full_like(weight.scales, 2.0**-7)) for _ in range(sets)
            ]
        blocks = [w._replace(scheme=Scheme("fp8_e4m3", 128, 128, activations="token")) for w in weights["fp8"]]
        scales = torch.rand(-(-n // 128), k // 128, device=device)
        for rows in counts:
            x, out = randn(rows, k), torch.empty(rows, n, dtype=BF16, device="cuda")
            case, work = f"{name} {n} x {k}, {rows} rows", {"gigabytes": n * k / 1e9, "teraflop": 2 * rows * n * k / 1e12}
            bench.add("matmul bf16", case, [lambda w=w: linear.matmul(x, w, out=out, workspace=workspace) for w in plain], **work)
            for kind, some in weights.items():
                rounded = quantise_rows(x, some[0].scheme.kind)
                calls = [lambda w=w, x=rounded: w8a8.matmul(x, w, out=out) for w in some]
                bench.add(f"matmul {kind}, inputs too", case, calls, **work)
                if kind == "fp8":
                    calls = [lambda w=w, x=rounded: w8a8.matmul(x, w, out=out, exact=True) for w in some]
                    bench.add("matmul fp8, inputs too, exact", case, calls, **work)
            calls = [lambda w=w: w8a8.matmul(x, w, out=out) for w in weights["fp8"]]
            bench.add("matmul fp8, inputs too, rounding them", case, calls, **work)
            grouped = quantise_rows(x, Rounding("fp8_e4m3", 128))
            calls = [lambda w=w: w8a8.matmul(grouped, w, out=out, blocks=scales) for w in blocks]
            bench.add("matmul fp8, blocks of 128 x 128, inputs too", case, calls, **work)
            if not bench.compile_only:
                torch_eight(bench, case, quantise_rows(x, "fp8_e4m3").codes, [w.to(torch.float8_e4m3fn) for w in plain], out, work)


def codes_like(data: Tensor, kind: str) -> Tensor:
    """Bytes as normally distributed weights have them: what a multiplication costs in power depends on its numbers."""
    if kind == "fp8":
        return torch.randn(data.shape, device="cuda").to(torch.float8_e4m3fn).view(torch.uint8)
    return (torch.randn(data.shape, device="cuda") * 32).clamp(-127, 127).to(torch.int8).view(torch.uint8)


def torch_eight(bench: Bench, case: str, codes: Tensor, weights: Sequence[Tensor], out: Tensor, work: dict[str, float]) -> None:
    """cuBLAS's FP8 products, one scale a tensor, with its fast accumulation and without."""
    one = torch.ones((), device="cuda")
    if codes.shape[0] % 16:  # what it asks for
        codes = torch.cat([codes, codes.new_zeros(16 - codes.shape[0] % 16, codes.shape[1])])
        out = torch.empty(codes.shape[0], out.shape[1], dtype=BF16, device="cuda")
    for fast in (True, False):
        calls = [lambda w=w: torch._scaled_mm(codes, w.t(), one, one, out_dtype=BF16, out=out, use_fast_accum=fast) for w in weights]
        bench.add("matmul fp8, inputs too" + ("" if fast else ", exact"), case, calls, by="torch", **work)


def rows(bench: Bench) -> None:
    """Fused row-wise kernels at 8k tokens; bytes are inputs and outputs once."""
    from penstock.kernels.activation import triton as activation
    from penstock.kernels.embedding import triton as embedding
    from penstock.kernels.rmsnorm import triton as rmsnorm
    from penstock.kernels.rope import triton as rope
    from penstock.kernels.slots import triton as slots

    tokens = 8192
    x, residual, out = (randn(tokens, HIDDEN) for _ in range(3))
    weight = randn(HIDDEN)
    warps = [{"num_warps": w} for w in (2, 4, 8, 16)]
    for config in warps:
        bench.add(
            "rms_norm",
            f"{tokens} x {HIDDEN}",
            [lambda c=config: rmsnorm.rms_norm(x, weight, 1e-5, out, config=c)],
            gigabytes=2 * x.nbytes / 1e9,
            config=config,
        )
        bench.add(
            "add + rms_norm",
            f"{tokens} x {HIDDEN}",
            [lambda c=config: rmsnorm.add_rms_norm(x, residual, weight, 1e-5, out, config=c)],
            gigabytes=4 * x.nbytes / 1e9,
            config=config,
        )
    table = randn(VOCAB, HIDDEN)
    ids = i32(torch.randint(VOCAB, (tokens,)))
    for config in warps[:3]:
        bench.add(
            "embedding",
            f"{tokens} of {VOCAB} x {HIDDEN}",
            [lambda c=config: embedding.gather_rows(table, ids, out, config=c)],
            gigabytes=2 * out.nbytes / 1e9,
            config=config,
        )
    gate_up, half = randn(tokens, 2 * INTER), torch.empty(tokens, INTER, dtype=BF16, device="cuda")
    for block, w in ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (8192, 8)):
        config = {"BLOCK": block, "num_warps": w}
        bench.add(
            "silu * up",
            f"{tokens} x {INTER}",
            [lambda c=config: activation.gated("silu", gate_up, half, config=c)],
            gigabytes=3 * half.nbytes / 1e9,
            config=config,
        )
    qkv = randn(tokens, (HEADS + 2 * KV_HEADS) * DIM)
    caches = [torch.zeros(1024, KV_HEADS, 16, DIM, dtype=BF16, device="cuda") for _ in range(2)]
    positions, where = i32(torch.arange(tokens)), i32(torch.randperm(1024 * 16)[:tokens])
    cos_sin, q = randn(tokens, DIM, dtype=torch.float32), torch.empty(tokens, HEADS, DIM, dtype=BF16, device="cuda")
    kept = qkv.view(tokens, -1, DIM)[:, HEADS:-KV_HEADS]
    normed = {"q_norm": weight[:DIM], "k_norm": weight[:DIM], "k_out": kept}
    for what, more, gigabytes in (
        ("rope + KV write", {}, 2 * qkv.nbytes / 1e9),
        ("qk-norm + rope + KV write + keys kept", normed, (2 * qkv.nbytes + kept.numel() * 2) / 1e9),
    ):
        for heads, count, w in ((8, 8, 2), (8, 16, 4), (8, 32, 4), (8, 32, 8), (8, 16, 2), (16, 16, 4), (8, 8, 1), (4, 8, 2)):
            config = {"HEADS": heads, "ROWS": count, "num_warps": w}
            calls = [
                lambda c=config, m=more: rope.rope_and_cache(qkv, positions, cos_sin, *caches, where, HEADS, KV_HEADS, out=q, config=c, **m)
            ]
            bench.add(what, f"{tokens} tokens", calls, gigabytes=gigabytes + cos_sin.nbytes / 1e9, config=config)
    pool = randn(64, 512, KV_HEADS, 16, DIM)
    source, target = i32(torch.arange(128)), i32(torch.arange(128) + 256)
    for block, w in ((1024, 4), (2048, 4), (2048, 8)):
        config = {"BLOCK": block, "num_warps": w}
        bench.add(
            "block copy",
            "128 blocks of 64 pools",
            [lambda c=config: slots.copy_blocks(pool, source, target, config=c)],
            gigabytes=2 * 128 * 64 * pool[0, 0].nbytes / 1e9,
            config=config,
        )


def sampling(bench: Bench) -> None:
    """Draws over a vocabulary of 128,256; bytes are the logits once."""
    from penstock.kernels.argmax import triton as argmax
    from penstock.kernels.sampling import triton as kernel

    modes = {"temperature": (1.0, 0, 1.0), "top-p 0.9": (1.0, 0, 0.9), "top-k 50": (1.0, 50, 1.0), "top-k 50, top-p 0.9": (0.8, 50, 0.9)}
    for count in (1, 64, 256):
        flat = randn(count, VOCAB, dtype=torch.float32) * 2.5
        ranks = torch.rand(count, VOCAB, device="cuda").argsort(-1)
        logits = randn(count, VOCAB, dtype=torch.float32) - 1.5 * torch.log1p(
            ranks.float()
        )  # like a language model: a few likely tokens, a long tail
        out = torch.empty(count, dtype=torch.int32, device="cuda")
        space = torch.empty(argmax.workspace_elements(count, VOCAB), dtype=torch.int32, device="cuda")
        gigabytes = logits.nbytes / 1e9
        bench.add("argmax", f"{count} rows", [lambda: argmax.argmax(logits, out, space)], gigabytes=gigabytes)
        workspace = torch.empty(kernel.workspace_elements(count, VOCAB), dtype=torch.float64, device="cuda")
        seeds = torch.randint(2**62, (count,), device="cuda")
        zeros = i32([0] * count)
        for name, (heat, k, p) in modes.items():
            columns = (
                torch.full((count,), heat, device="cuda"),
                i32([k] * count),
                torch.full((count,), p, device="cuda"),
                torch.zeros(count, device="cuda"),
            )
            calls = [lambda c=columns: kernel.draw(logits, *c, seeds, zeros, zeros, out=out, workspace=workspace)]
            bench.add("draw", f"{count} rows, {name}", calls, gigabytes=gigabytes)
            calls = [lambda c=columns: kernel.draw(flat, *c, seeds, zeros, zeros, out=out, workspace=workspace)]
            bench.add("draw, nearly flat logits", f"{count} rows, {name}", calls, gigabytes=gigabytes)
        if not bench.compile_only:
            bench.add("sort for top-p", f"{count} rows", [lambda: logits.sort(dim=-1)], gigabytes=gigabytes, by="torch")


def slots(bench: Bench) -> None:
    """The small launches of a decode step: microseconds inside a graph."""
    from penstock.kernels.slots import triton as kernel

    history, table = i32(torch.zeros(256, 8192)), i32(torch.zeros(256, 512))
    one = {name: i32([0] * 256) for name in ("tokens", "positions", "cache_slots", "kv_len")}
    rows_, starts = i32(list(range(256))), i32([5] * 256)
    bench.add("decode_inputs", "256 rows", [lambda: kernel.decode_inputs(rows_, starts, history, table, 16, **one)])
    bench.add("write_tokens", "256 rows", [lambda: kernel.write_tokens(rows_, starts, one["tokens"], history)])
    many = {name: i32([0] * 8192) for name in ("tokens", "positions", "cache_slots")}
    q_start = i32([32 * i for i in range(257)])
    bench.add(
        "ragged_inputs",
        "256 rows, 8192 tokens",
        [lambda: kernel.ragged_inputs(rows_, starts, q_start, history, table, 16, kv_len=one["kv_len"], **many)],
    )


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "roofs": roofs, "decode": decode, "prefill": prefill, "skinny": skinny, "rows": rows, "sampling": sampling, "slots": slots, "invariant": invariant,
    "quantised": quantised, "eight": eight, "kv8": kv8,
}  # fmt: skip


def best(rows_: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The fastest configuration of each (what, case, by), in order of appearance."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in rows_:
        key = (row["what"], row["case"], row["by"])
        if "us" in row and ("us" not in found.get(key, {}) or row["us"] < found[key]["us"]):
            found[key] = row
    return list(found.values())


def line(row: dict[str, Any]) -> str:
    rate = f"{row['tflop_s']:.0f} TF/s" if "tflop_s" in row else f"{row['gb_s']:.0f} GB/s" if "gb_s" in row else ""
    config = " ".join(str(value) for value in row["config"].values())
    share = f"{row['share']:.0%}" if row.get("share") else ""
    return f"{row['what'][:38]:38} {row['case'][:30]:30} {row['by'][:9]:9} {row['us']:9.1f} us {rate:>9} {share:>5} {config}"


def compile_first(names: list[str], quick: bool) -> None:
    """One process a section, all at once, so that the measuring process finds everything in Triton's cache."""
    command = [sys.executable, "-m", "penstock.kernels.gpu_bench", "--compile-only", *(["--quick"] if quick else [])]
    children = [subprocess.Popen([*command, name], stdout=subprocess.DEVNULL) for name in names if name != "roofs"]
    for child in children:
        child.wait()


def main() -> None:
    """Measure and print; see the module."""
    parser = argparse.ArgumentParser(description="Speed of the Triton kernels on this GPU")
    parser.add_argument("sections", nargs="*", default=[], help=", ".join(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="two configurations a kernel")
    parser.add_argument("--out", type=Path, help="write every measurement as JSON")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds for measuring")
    parser.add_argument("--warm", action="store_true", help="Triton's cache is filled already: do not compile first")
    parser.add_argument("--compile-only", action="store_true", help="fill Triton's cache")
    options = parser.parse_args()
    names = options.sections or list(SECTIONS)
    torch.manual_seed(1)
    bench = Bench(options.limit, options.compile_only, options.quick)
    if options.compile_only:
        import triton

        run = triton.runtime.jit.JITFunction.run
        triton.runtime.jit.JITFunction.run = lambda self, *args, warmup, **more: run(self, *args, warmup=True, **more)
    else:
        started = time.monotonic()
        if not options.warm:
            compile_first(names, options.quick)
        print(f"compiled in {time.monotonic() - started:.0f} s", flush=True)
        bench.until = time.monotonic() + options.limit
    if "roofs" not in names and not options.compile_only:
        names.insert(0, "roofs")
    for name in names:
        try:
            SECTIONS[name](bench)
        except Exception as error:
            bench.errors[name] = "".join(traceback.format_exception(error))[-1500:]
        torch.cuda.empty_cache()
        if not options.compile_only:
            print(f"{name}: {time.monotonic() - bench.until + options.limit:.0f} s", flush=True)
        if options.out:
            facts = {
                "device": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "commit": os.environ.get("BENCH_COMMIT", ""),
                "date": time.strftime("%Y-%m-%d"),
            }
            options.out.write_text(json.dumps({**facts, "errors": bench.errors, "rows": bench.rows}, indent=1))
    if not options.compile_only:
        for row in best(bench.rows):
            print(line(row))
    for name, text in bench.errors.items():
        print(f"{name} failed:\n{text}")


if __name__ == "__main__":
    main()
