"""The section `kv8` of gpu_bench: one decode step's attention over a cache in 16 and in 8 bits, by batch and context.

What it is: the store of a step's keys and values and the attention behind it, as a layer of Llama-3.1-8B has them; then, for each batch, microseconds a
thousand keys (the slope of a line through all contexts from LONG on) and the context from which 8 bits are faster.
What it does not know: models, steps.
"""


# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from penstock.kernels.attention.codes import KINDS

if TYPE_CHECKING:
    from penstock.kernels.gpu_bench import Bench

HEADS, KV_HEADS, DIM, SIZE = 32, 8, 128, 16
ROWS = (1, 16, 64)
CONTEXTS = (512, 1024, 2048, 4096, 8192, 32768, 131072)
LONG = 4096
MOST_KEYS = 1 << 21
"""Of all rows together: 8.6 GB in bfloat16."""
WHAT = "store and decode attention"


def kv8(bench: Bench) -> None:
    """All kinds beside one another; bytes are those of the cache, scales included."""
    for rows in ROWS:
        for context in CONTEXTS:
            if rows * context <= MOST_KEYS:
                for kind in ("", *KINDS):
                    calls = _calls(rows, context, kind)
                    size = rows * context * KV_HEADS * 2 * (DIM + 2 if kind else 2 * DIM) / 1e9
                    bench.add(f"{WHAT}, {kind or 'bf16'}", f"{rows} x {context}", calls, gigabytes=size)
                    del calls
                    torch.cuda.empty_cache()
    if not bench.compile_only:
        bench.rows += summary(bench.rows)
        for row in bench.rows:
            if row["what"] == "slope":
                print(
                    f"{row['case']}: {row['us_1k_keys']:.2f} us a thousand keys, {row['of_bf16']:.1%} of bf16's, faster from {row['faster_from']}"
                )


def _calls(rows: int, context: int, kind: str) -> list[Callable[[], object]]:
    from penstock.kernels.attention import coded
    from penstock.kernels.attention import triton as attention
    from penstock.kernels.rope import triton as rope

    dtype, width = (torch.uint8, DIM + 2) if kind else (torch.bfloat16, DIM)
    per = -(-context // SIZE)
    page = 2 * KV_HEADS * SIZE * width
    qkv = torch.randn(rows, (HEADS + 2 * KV_HEADS) * DIM, dtype=torch.bfloat16, device="cuda")
    table = torch.randperm(rows * per, device="cuda").int().view(rows, per)
    at = torch.full((rows,), context, dtype=torch.int32, device="cuda")
    slots = table[:, (context - 1) // SIZE] * SIZE + (context - 1) % SIZE
    angles = torch.rand(context, DIM, device="cuda")
    out = torch.empty(rows, HEADS, DIM, dtype=torch.bfloat16, device="cuda")
    workspace = torch.empty(attention.workspace_elements(rows, HEADS, DIM, codes=bool(kind)), device="cuda")
    arrivals = torch.zeros(rows * KV_HEADS, dtype=torch.int32, device="cuda")
    turned, positions = torch.empty_like(out), at - 1
    calls: list[Callable[[], object]] = []
    for _ in range(max(1, min(8, int(2e8 / (rows * per * page)) + 1))):
        pool = torch.empty(rows * per, page, dtype=dtype, device="cuda")
        if kind:
            pool.random_(0, 256)
            scales = pool[:, 2 * KV_HEADS * SIZE * DIM :].view(torch.bfloat16)
            scales.copy_(torch.rand(scales.shape, device="cuda") * 0.01 + 0.001)
            codes = coded.codes_of(kind, scales.view(-1, 2, KV_HEADS, SIZE)[:, 0])
            caches = pool[:, : 2 * KV_HEADS * SIZE * DIM].view(-1, 2, KV_HEADS, SIZE, DIM)
        else:
            pool.normal_()
            codes, caches = None, pool.view(-1, 2, KV_HEADS, SIZE, DIM)

        def call(k: Any = caches[:, 0], v: Any = caches[:, 1], codes: Any = codes) -> None:
            q = rope.rope_and_cache(qkv, positions, angles, k, v, slots, HEADS, KV_HEADS, out=turned, codes=codes)
            attention.decode_attention(q, k, v, table, at, DIM**-0.5, out=out, workspace=workspace, counters=arrivals, codes=codes)

        calls.append(call)
    return calls


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Slopes and break-even points of the section's rows."""
    times: dict[tuple[str, int], dict[int, float]] = {}
    for row in rows:
        if row["what"].startswith(WHAT) and "us" in row:
            count, context = map(int, row["case"].split(" x "))
            times.setdefault((row["what"].rsplit(", ", 1)[1], count), {})[context] = row["us"]
    found = []
    for (kind, count), by_context in times.items():
        wide = times.get(("bf16", count), {})
        both = sorted(set(by_context) & set(wide))
        far = [context for context in both if context >= LONG]
        if kind == "bf16" or len(far) < 2:
            continue
        mine, theirs = (_slope([(context, values[context]) for context in far]) for values in (by_context, wide))
        slower = [context for context in both if by_context[context] >= wide[context]]
        after = [context for context in both if context > max(slower, default=0)]
        found.append(
            {
                "what": "slope", "case": f"{kind}, {count} rows", "by": "penstock", "config": {}, "us_1k_keys": mine * 1000,
                "of_bf16": mine / theirs, "faster_from": min(after, default=None),
            }
        )  # fmt: skip
    return found


def _slope(points: list[tuple[int, float]]) -> float:
    """Of the least-squares line."""
    x, y = (sum(point[i] for point in points) / len(points) for i in range(2))
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)
