"""Matmuls with a weight [N, K] in Triton: a skinny one at weight bandwidth, and a batch-invariant one.

    y[m, n] = round(sum_k x[m, k] weight[n, k] + bias[n]),   bf16 or fp16 in, float32 sums

`skinny` (up to 16 rows): all rows share one tile, so each weight is read once; the K axis is cut into a number of pieces that depends on N and
K only, each piece writes its float32 sums, and whoever comes last for a column block (an atomic counter) adds the pieces in ascending order
(split-K as in Stream-K, Osama et al. 2023, arXiv:2301.03598, with a fixed order instead of a running sum). While the kernel before still runs, each
program asks for its first weights to be brought into L2: they never change. With `gated`, weight rows i and N / 2 + i meet in one tile and
out = act(row i) * row (N / 2 + i), rounded as kernels/activation rounds: bit by bit what the two kernels give.
`invariant` (any rows): every row's sum runs over K in the same steps whatever M is, so a row gives the same bits alone and in a batch (the problem:
He et al. 2025, "Defeating nondeterminism in LLM inference"). Its few-rows tile has the same K steps and matrix instruction depth; the device
tests compare the two bit by bit.
`matmul` chooses; beyond 16 rows and outside deterministic mode it is torch (cuBLAS). What it does not know: layers, activations.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, disable-error-code="no-any-return"

import torch
import triton.language as tl
from torch import Tensor
from torch.nn import functional
from triton.tools.tensor_descriptor import TensorDescriptor

from penstock.kernels.activation.triton import KINDS, activate
from penstock.kernels.checks import require
from penstock.kernels.gpu import chained, interpreting, tuned
from penstock.kernels.tile import fetch_ahead, follow, launched, narrow, swizzled

SKINNY = 16
"""Most rows of the skinny kernel."""
COUNTERS = 8192
"""Column blocks that a workspace can count: int32 cells at its start, zero between calls."""


@launched(do_not_specialize=["M"])
def _skinny(
    x, w, box, bias, out, counters, partial, M, N, K, x_stride, w_stride, out_stride, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr, WIDE: tl.constexpr, GATED: tl.constexpr, KIND: tl.constexpr,
    AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(N / BLOCK_N), SPLITS). box: the weight's descriptor, where the bulk copy engine reads it. AHEAD: elements of each weight
    row that are asked for early."""
    ROWS: tl.constexpr = 16
    column = tl.program_id(0)
    piece = tl.program_id(1)
    m = tl.arange(0, ROWS)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    steps = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS)
    first = piece * steps
    last = tl.minimum(first + steps, tl.cdiv(K, BLOCK_K))
    here = (m < M)[:, None]
    columns = (n < N)[:, None]
    acc = tl.zeros([ROWS, BLOCK_N], tl.float32)
    if GATED:
        source = n // 2 + (n % 2) * (N // 2)
    else:
        source = n
    rows = source.to(tl.int64)[:, None] * w_stride
    if PDL and AHEAD > 0:
        # (clamped: an address outside the weight may be nobody's)
        within = tl.minimum(first * BLOCK_K + tl.arange(0, AHEAD // 64) * 64, K - 1)
        fetch_ahead(w + tl.minimum(source, N - 1).to(tl.int64)[:, None] * w_stride + within[None, :])
    follow(PDL)
    for step in range(first, last):
        at = step * BLOCK_K + k
        if EVEN:
            a = tl.load(x + m[:, None] * x_stride + at[None, :], mask=here, other=0.0)
        else:
            a = tl.load(x + m[:, None] * x_stride + at[None, :], mask=here & (at < K)[None, :], other=0.0)
        if box is not None:
            b = box.load([column * BLOCK_N, step * BLOCK_K])
        elif EVEN:
            b = tl.load(w + rows + at[None, :], mask=columns, other=0.0)
        else:
            b = tl.load(w + rows + at[None, :], mask=columns & (at < K)[None, :], other=0.0)
        if WIDE:
            acc = tl.dot(a.to(tl.float32), tl.trans(b.to(tl.float32)), acc, input_precision="ieee")
        else:
            acc = tl.dot(a, tl.trans(b), acc)
    final = True
    if SPLITS > 1:
        cells = partial + (m[:, None] * N + n[None, :])
        tl.store(cells + piece * (ROWS * N), acc, mask=here & (n < N)[None, :])
        tl.debug_barrier()
        final = tl.atomic_add(counters + column, 1, sem="acq_rel") == SPLITS - 1
        if final:
            acc = tl.zeros([ROWS, BLOCK_N], tl.float32)
            for other in tl.static_range(SPLITS):
                acc += tl.load(cells + other * (ROWS * N), mask=here & (n < N)[None, :], other=0.0, cache_modifier=".cg")
            tl.store(counters + column, 0)
    if final:
        if BIAS:
            acc += tl.load(bias + source, mask=n < N, other=0.0).to(tl.float32)[None, :]
        if GATED:
            dtype = out.dtype.element_ty
            gate, up = tl.split(tl.reshape(narrow(acc, dtype).to(tl.float32), (ROWS, BLOCK_N // 2, 2)))
            value = narrow(narrow(activate(gate, KIND), dtype).to(tl.float32) * up, dtype)
            half = column * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            tl.store(out + m[:, None] * out_stride + half[None, :], value, mask=here & (half < N // 2)[None, :])
        else:
            tl.store(out + m[:, None] * out_stride + n[None, :], narrow(acc, out.dtype.element_ty), mask=here & (n < N)[None, :])


@launched(do_not_specialize=["M"])
def _invariant(
    x, w, bias, out, M, N, K, x_stride, w_stride, out_stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, FEW: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(M / BLOCK_M) * ceil(N / BLOCK_N)), row blocks in groups so that weights stay in L2."""
    row, column = swizzled(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    m = row * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows beyond the edge are never stored. A tile with few rows does not read them (all at one address would queue at one slice of L2); elsewhere
    # reading row 0 again is cheaper than a mask. Real rows get the same bits either way.
    left = x + tl.where(m < M, m, 0).to(tl.int64)[:, None] * x_stride + k[None, :]
    right = w + tl.where(n < N, n, 0).to(tl.int64)[:, None] * w_stride + k[None, :]
    here = (m < M)[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(tl.cdiv(K, BLOCK_K)):
        if EVEN:
            if FEW:
                a = tl.load(left, mask=here, other=0.0)
            else:
                a = tl.load(left)
            b = tl.load(right)
        else:
            inside = (k < K - step * BLOCK_K)[None, :]
            a = tl.load(left, mask=here & inside, other=0.0)
            b = tl.load(right, mask=inside, other=0.0)
        if WIDE:
            acc = tl.dot(a.to(tl.float32), tl.trans(b.to(tl.float32)), acc, input_precision="ieee")
        else:
            acc = tl.dot(a, tl.trans(b), acc)
        left += BLOCK_K
        right += BLOCK_K
    if BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out + m.to(tl.int64)[:, None] * out_stride + n[None, :], narrow(acc, out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :]
    )


def _prepare(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None, out_dtype: torch.dtype | None, columns: int | None = None
) -> Tensor:
    columns = weight.shape[0] if columns is None else columns
    require(x.dim() == 2 and weight.dim() == 2 and x.shape[1] == weight.shape[1], "x [M, K] and weight [N, K] do not fit each other")
    require(x.dtype == weight.dtype and (bias is None or bias.dtype == x.dtype), "x, weight and bias must have one dtype")
    require(x.stride(1) == 1 and weight.stride(1) == 1, "x and weight must be contiguous along K")
    if out is None:
        out = torch.empty(x.shape[0], columns, dtype=out_dtype or x.dtype, device=x.device)
    require(out.shape == (x.shape[0], columns) and out.stride(1) == 1, "out must be [M, N], contiguous along N")
    return out


def splits_of(n: int, k: int, config: dict[str, int]) -> int:
    """Pieces of the K axis: enough programs for the device, at least 4 steps each. Depends on the weight's shape only."""
    columns, steps = -(-n // config["BLOCK_N"]), -(-k // config["BLOCK_K"])
    return max(1, min(config["MAX_SPLITS"], config["TARGET"] // columns, steps // 4))


def _skinny_config(n: int) -> dict[str, int]:
    return tuned("linear.skinny.wide" if n >= 16384 else "linear.skinny")


def workspace_elements(n: int) -> int:
    """float32 elements that a workspace for weights of up to n rows must have. Zero-fill it once; calls on one stream may share it."""
    most = max(tuned(name)["MAX_SPLITS"] for name in ("linear.skinny", "linear.skinny.wide"))
    return COUNTERS + most * SKINNY * n


def skinny(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None, out_dtype: torch.dtype | None = None,
    workspace: Tensor | None = None, gated: str | None = None, config: dict[str, int] | None = None,
) -> Tensor:  # fmt: skip
    """x [M <= 16, K] at weight bandwidth. Row results depend neither on M nor on the other rows.

    gated "silu", "gelu_tanh" or "gelu": weight holds gate [N / 2, K], then up [N / 2, K]; the result is [M, N / 2], in x's dtype."""
    (rows, k), n = x.shape, weight.shape[0]
    if gated is not None:
        require(
            gated in KINDS and n % 2 == 0 and out_dtype in (None, x.dtype), f"gated is one of {KINDS}, for 2I weight rows, in x's dtype"
        )
    out = _prepare(x, weight, bias, out, out_dtype, n // 2 if gated else n)
    require(rows <= SKINNY, f"the skinny kernel takes at most {SKINNY} rows")
    if rows == 0:
        return out
    config = dict(config or _skinny_config(n))
    splits = splits_of(n, k, config)
    columns = -(-n // config["BLOCK_N"])
    config = {name: value for name, value in config.items() if name not in ("TARGET", "MAX_SPLITS")}
    counters = partial = box = None
    able = gated is None and (interpreting() or chained()["PDL"]) and weight.is_contiguous()
    aligned = k * weight.element_size() % 16 == 0 and weight.data_ptr() % 16 == 0
    if config.pop("TMA", 0) and able and aligned:
        box = TensorDescriptor(weight, [n, k], [k, 1], [config["BLOCK_N"], config["BLOCK_K"]])
    if splits > 1:
        require(columns <= COUNTERS, "the weight has too many columns for the counters")
        if workspace is None:
            workspace = torch.zeros(COUNTERS + splits * SKINNY * n, dtype=torch.float32, device=x.device)
        require(workspace.numel() >= COUNTERS + splits * SKINNY * n, "the workspace is too small")
        counters, partial = workspace[:COUNTERS].view(torch.int32), workspace[COUNTERS:]
    _skinny[(columns, splits)](
        x, weight, box, bias, out, counters, partial, rows, n, k, x.stride(0), weight.stride(0), out.stride(0), SPLITS=splits,
        EVEN=k % config["BLOCK_K"] == 0, BIAS=bias is not None, WIDE=interpreting() or x.dtype == torch.float32, GATED=gated is not None,
        KIND=KINDS.index(gated) if gated else 0, **chained(), **{"AHEAD": 0, **config},
    )  # fmt: skip
    return out


def invariant(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None, out_dtype: torch.dtype | None = None,
    config: dict[str, int] | None = None,
) -> Tensor:  # fmt: skip
    """x [M, K]; a row's result does not depend on M or on the other rows."""
    out = _prepare(x, weight, bias, out, out_dtype)
    (rows, k), n = x.shape, weight.shape[0]
    if rows == 0:
        return out
    config = dict(config or tuned("linear.invariant.small" if rows <= 64 else "linear.invariant"))
    blocks = -(-rows // config["BLOCK_M"]) * -(-n // config["BLOCK_N"])
    _invariant[(blocks,)](
        x, weight, bias, out, rows, n, k, x.stride(0), weight.stride(0), out.stride(0), GROUP=8, FEW=rows < config["BLOCK_M"], EVEN=k % config["BLOCK_K"] == 0,
        BIAS=bias is not None, WIDE=interpreting() or x.dtype == torch.float32, **config,
    )  # fmt: skip
    return out


def fuses(x: Tensor, deterministic: bool) -> bool:
    """Whether `skinny` takes these rows, and with them a gated activation."""
    return not deterministic and x.shape[0] <= SKINNY and x.dtype != torch.float32


def matmul(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None, out_dtype: torch.dtype | None = None,
    deterministic: bool = False, workspace: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x [M, K] @ weight [N, K]^T + bias; see kernels/gpu.py."""
    if deterministic:
        return invariant(x, weight, bias, out=out, out_dtype=out_dtype)
    if fuses(x, deterministic):
        return skinny(x, weight, bias, out=out, out_dtype=out_dtype, workspace=workspace)
    out = _prepare(x, weight, bias, out, out_dtype)
    if out.dtype == x.dtype:
        if bias is None:
            return torch.mm(x, weight.t(), out=out)
        return torch.addmm(bias, x, weight.t(), out=out)
    if x.device.type == "cuda":
        torch.mm(x, weight.t(), out_dtype=out.dtype, out=out)
        return out if bias is None else out.add_(bias)
    return out.copy_(functional.linear(x.float(), weight.float(), None if bias is None else bias.float()))
