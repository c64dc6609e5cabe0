"""Matmuls with a weight whose codes are widened in registers, in Triton.

    y[m, n] = round(sum_g scales[g, n] * sum_{k in g} x[m, k] (value(code[n, k]) - zero[g, n]) + bias[n]),   x in bf16 or fp16, float32 sums

What it is: `matmul` over a `Weight` (layout.py), and the kernel for the order by steps; fragments.py has the one for fragments. A tile of the product is computed transposed: the weight's rows
are the rows of the matrix instruction, so that codes go from memory to registers as they are, are widened there (recipes.py), and never return to shared memory wide. Scales multiply the
float32 sums of a group, so that a weight is never rounded. Beyond FEW rows (fragments: MANY) pieces of the weight are widened into memory instead. The K axis is cut as in
kernels/linear/triton.py: pieces in a fixed order, whoever comes last adds them up.
What it does not know: layers, files.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, disable-error-code="no-any-return"

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from penstock.kernels.activation.triton import KINDS as ACTIVATIONS
from penstock.kernels.activation.triton import activate
from penstock.kernels.activation.triton import gated as activated
from penstock.kernels.checks import require
from penstock.kernels.gpu import chained, interpreting, tuned
from penstock.kernels.linear.triton import COUNTERS
from penstock.kernels.quantised import fragments
from penstock.kernels.quantised.layout import KINDS, Weight
from penstock.kernels.quantised.recipes import RECIPES
from penstock.kernels.tile import fetch_ahead, follow, launched, narrow

ROWS = (16, 32, 64)
"""Heights of a tile: rows of x."""
FEW, MANY = 256, 1536
"""Most rows for which codes are widened in registers, and the same where there is a tile for so many."""
PIECE = 64 << 20
"""Elements of a weight that are widened at once where nobody says."""


@triton.jit
def _halves(codes, KIND: tl.constexpr):
    """Both halves of bytes as float32, for the interpreter: minus 8, or E2M1."""
    low = (codes & 15).to(tl.int32)
    high = (codes >> 4).to(tl.int32)
    if KIND == 1:
        return low.to(tl.float32) - 8, high.to(tl.float32) - 8
    else:
        return _e2m1(low), _e2m1(high)


@triton.jit
def _e2m1(code):
    exponent = (code >> 1) & 3
    mantissa = (code & 1).to(tl.float32)
    size = tl.where(exponent == 0, 0.5 * mantissa, (1 + 0.5 * mantissa) * tl.exp2((exponent - 1).to(tl.float32)))
    return tl.where(code >= 8, -size, size)


@triton.jit
def _bytes(codes, KIND: tl.constexpr):
    """Bytes as float32, for the interpreter: int8, or E4M3."""
    code = codes.to(tl.int32)
    if KIND == 0:
        return tl.where(code >= 128, code - 256, code).to(tl.float32)
    else:
        exponent = (code >> 3) & 15
        mantissa = (code & 7).to(tl.float32) / 8
        size = tl.where(exponent == 0, mantissa * 0.015625, (1 + mantissa) * tl.exp2((exponent - 7).to(tl.float32)))
        return tl.where(code >= 128, -size, size)


@launched(do_not_specialize=["M"])
def _matmul(
    x, w, box, scales, zeros, bias, out, counters, partial, M, N, K, STEPS_ALL, x_stride, out_stride,
    KIND: tl.constexpr, RECIPE: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, TILE: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr,
    SPLITS: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, ACT: tl.constexpr, AHEAD: tl.constexpr,
    INTERPRET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(N / BLOCK_N), SPLITS, ceil(M / ROWS)). w [ceil(N / TILE), STEPS_ALL, TILE, C] bytes; scales and zeros [groups, N]; GROUP 0: one a row. GATED: rows of w alternate
    gate, up."""
    NIBBLE: tl.constexpr = (KIND == 1) or (KIND == 3)
    WIDTH: tl.constexpr = 2 * C if NIBBLE else C
    column = tl.program_id(0)
    piece = tl.program_id(1)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, C)
    steps = tl.cdiv(STEPS_ALL, SPLITS)
    first = piece * steps
    last = tl.minimum(first + steps, STEPS_ALL)
    tile = tl.minimum(n // TILE, (N - 1) // TILE).to(tl.int64)
    rows = w + (tile * STEPS_ALL * TILE + n % TILE)[:, None] * C
    if PDL and AHEAD > 0:
        early = tl.minimum(first * (TILE * C) + (column * BLOCK_N) % TILE * C + tl.arange(0, AHEAD) * 128, STEPS_ALL * (TILE * C) - 1)
        fetch_ahead(w + ((column * BLOCK_N) // TILE).to(tl.int64) * (STEPS_ALL * TILE * C) + early)
    follow(PDL)
    here = (m < M)[None, :]
    left = x + tl.where(m < M, m, 0).to(tl.int64)[None, :] * x_stride
    like = x.dtype.element_ty
    acc = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for step in range(first, last):
        if box is not None:
            codes = box.load([(column * BLOCK_N // TILE * STEPS_ALL + step) * TILE + column * BLOCK_N % TILE, 0])
        else:
            codes = tl.load(rows + (step * (TILE * C) + c)[None, :])
        k = step * WIDTH + c
        if EVEN:
            a = tl.load(left + k[:, None], mask=here, other=0.0)
        else:
            a = tl.load(left + k[:, None], mask=here & (k < K)[:, None], other=0.0)
        if NIBBLE:
            if EVEN:
                b = tl.load(left + (k + C)[:, None], mask=here, other=0.0)
            else:
                b = tl.load(left + (k + C)[:, None], mask=here & (k + C < K)[:, None], other=0.0)
            if INTERPRET:
                low, high = _halves(codes, KIND)
                if zeros is not None:
                    low += 8 - tl.load(
                        zeros + (k // GROUP if GROUP > 0 else 0 * k)[None, :] * N + n[:, None], mask=(n < N)[:, None], other=0.0
                    ).to(tl.float32)
                    high += 8 - tl.load(
                        zeros + ((k + C) // GROUP if GROUP > 0 else 0 * k)[None, :] * N + n[:, None], mask=(n < N)[:, None], other=0.0
                    ).to(tl.float32)
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            elif zeros is not None:
                ONE: tl.constexpr = 128.0 if like == tl.bfloat16 else 1024.0
                g = step * WIDTH // GROUP if GROUP > 0 else 0
                less = tl.load(zeros + g * N + n, mask=n < N, other=0.0).to(tl.float32) + ONE
                less = tl.broadcast_to(less.to(like)[:, None], [BLOCK_N, C])
                more = less
                if GROUP == C:
                    more = tl.load(zeros + (step * WIDTH + C) // GROUP * N + n, mask=n < N, other=0.0).to(tl.float32) + ONE
                    more = tl.broadcast_to(more.to(like)[:, None], [BLOCK_N, C])
                low, high = tl.inline_asm_elementwise(
                    RECIPE, "=r,=r,=r,=r,r,r,r,r,r", [codes, less, more], dtype=(like, like), is_pure=True, pack=4
                )
            else:
                low, high = tl.inline_asm_elementwise(RECIPE, "=r,=r,=r,=r,r", [codes], dtype=(like, like), is_pure=True, pack=4)
            if GROUP > 0:
                g = step * WIDTH // GROUP
                s = tl.load(scales + g * N + n, mask=n < N, other=0.0).to(tl.float32)
                if GROUP == C:
                    t = tl.load(scales + (step * WIDTH + C) // GROUP * N + n, mask=n < N, other=0.0).to(tl.float32)
                    acc += tl.dot(low, a) * s[:, None]
                    acc += tl.dot(high, b) * t[:, None]
                else:
                    acc += tl.dot(high, b, tl.dot(low, a)) * s[:, None]
            else:
                acc = tl.dot(high, b, tl.dot(low, a, acc))
        else:
            if INTERPRET:
                value = _bytes(codes, KIND)
                a = a.to(tl.float32)
            else:
                value = tl.inline_asm_elementwise(RECIPE, "=r,=r,r", [codes], dtype=like, is_pure=True, pack=4)
            if GROUP > 0:
                s = tl.load(scales + step * WIDTH // GROUP * N + n, mask=n < N, other=0.0).to(tl.float32)
                acc += tl.dot(value, a) * s[:, None]
            else:
                acc = tl.dot(value, a, acc)
    if GROUP == 0:
        acc *= tl.load(scales + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    final = True
    inside = here & (n < N)[:, None]
    if SPLITS > 1:
        cells = partial + (m.to(tl.int64)[None, :] * N + n[:, None])
        tl.store(cells + piece.to(tl.int64) * M * N, acc, mask=inside)
        tl.debug_barrier()
        counter = counters + tl.program_id(2) * tl.num_programs(0) + column
        final = tl.atomic_add(counter, 1, sem="acq_rel") == SPLITS - 1
        if final:
            acc = tl.zeros([BLOCK_N, ROWS], tl.float32)
            for other in tl.static_range(SPLITS):
                acc += tl.load(cells + tl.full([], other, tl.int64) * M * N, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(counter, 0)
    if final:
        dtype = out.dtype.element_ty
        if BIAS:
            acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        if GATED:
            pair = tl.permute(tl.reshape(narrow(acc, dtype).to(tl.float32), (BLOCK_N // 2, 2, ROWS)), (0, 2, 1))
            gate, up = tl.split(pair)
            value = narrow(narrow(activate(gate, ACT), dtype).to(tl.float32) * up, dtype)
            half = column * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            tl.store(out + m.to(tl.int64)[None, :] * out_stride + half[:, None], value, mask=here & (half < N // 2)[:, None])
        else:
            tl.store(out + m.to(tl.int64)[None, :] * out_stride + n[:, None], narrow(acc, dtype), mask=inside)


@launched
def _widen(
    w, scales, zeros, out, FIRST, N, K, STEPS_ALL, ROWS_OUT,
    KIND: tl.constexpr, RECIPE: tl.constexpr, TILE: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr,
    INTERPRET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, STEPS_ALL). Tile FIRST + i of w -> rows TILE i and on of out [ROWS_OUT, K]; GATED: even rows to the first half, odd ones to the second."""
    NIBBLE: tl.constexpr = (KIND == 1) or (KIND == 3)
    WIDTH: tl.constexpr = 2 * C if NIBBLE else C
    tile = tl.program_id(0)
    step = tl.program_id(1)
    r = tl.arange(0, TILE)
    c = tl.arange(0, C)
    n = (FIRST + tile) * TILE + r
    like = out.dtype.element_ty
    follow(PDL)
    codes = tl.load(w + (((FIRST + tile).to(tl.int64) * STEPS_ALL + step) * TILE + r)[:, None] * C + c[None, :])
    g = step * WIDTH // GROUP if GROUP > 0 else 0
    s = tl.load(scales + g * N + n, mask=n < N, other=0.0).to(tl.float32)
    z = tl.zeros([TILE], tl.float32)
    if zeros is not None:
        z = 8 - tl.load(zeros + g * N + n, mask=n < N, other=0.0).to(tl.float32)
    row = tile * TILE + r
    if GATED:
        row = row // 2 + (row % 2) * (ROWS_OUT // 2)
    k = step * WIDTH + c
    target = out + row.to(tl.int64)[:, None] * K + k[None, :]
    if NIBBLE:
        if INTERPRET:
            low, high = _halves(codes, KIND)
        else:
            low, high = tl.inline_asm_elementwise(RECIPE, "=r,=r,=r,=r,r", [codes], dtype=(like, like), is_pure=True, pack=4)
        tl.store(target, narrow((low.to(tl.float32) + z[:, None]) * s[:, None], like), mask=(n < N)[:, None] & (k < K)[None, :])
        if GROUP == C:
            g += 1
            s = tl.load(scales + g * N + n, mask=n < N, other=0.0).to(tl.float32)
            if zeros is not None:
                z = 8 - tl.load(zeros + g * N + n, mask=n < N, other=0.0).to(tl.float32)
        value = narrow((high.to(tl.float32) + z[:, None]) * s[:, None], like)
        tl.store(target + C, value, mask=(n < N)[:, None] & (k + C < K)[None, :])
    else:
        if INTERPRET:
            value = _bytes(codes, KIND)
        else:
            value = tl.inline_asm_elementwise(RECIPE, "=r,=r,r", [codes], dtype=like, is_pure=True, pack=4)
        tl.store(target, narrow(value.to(tl.float32) * s[:, None], like), mask=(n < N)[:, None] & (k < K)[None, :])


def splits_of(n: int, steps: int, config: dict[str, int]) -> int:
    """Pieces of the K axis, as in kernels/linear/triton.py, at least two steps each."""
    columns = -(-n // config["BLOCK_N"])
    return max(1, min(config["MAX_SPLITS"], config["TARGET"] // columns, steps // 2))


def widens(weight: Weight, rows: int, dtype: torch.dtype) -> bool:
    """Whether so many rows are multiplied with the weight in full width (but never in deterministic mode)."""
    return rows > (MANY if weight.fragments and fragments.for_many(weight, dtype) else FEW)


def matmul(
    x: Tensor, weight: Weight, bias: Tensor | None = None, *, out: Tensor | None = None, out_dtype: torch.dtype | None = None,
    gated: str | None = None, workspace: Tensor | None = None, deterministic: bool = False, wide: Tensor | None = None,
    config: dict[str, int] | None = None,
) -> Tensor:  # fmt: skip
    """x [M, K] @ weight^T + bias -> [M, N] in x's dtype or `out_dtype`. gated "silu", "gelu_tanh" or "gelu": rows of the weight (and of the bias) alternate gate, up; the
    result is [M, N / 2]. `workspace`: as kernels/linear/triton.py's, `wide`: at least a tile's rows [K] of x's dtype as one run (the more, the fewer launches).

    Where `widens` says so the weight is widened piece by piece, rounded to x's dtype, and multiplied by torch (cuBLAS). `deterministic`: never, and no K axis is cut, so that a row's result does not depend on the others."""
    (rows, k), n = x.shape, weight.n
    require(x.dim() == 2 and k == weight.k and x.stride(1) == 1, "x [M, K] must fit the weight and be contiguous along K")
    require(gated is None or (gated in ACTIVATIONS and n % 2 == 0), f"gated is one of {ACTIVATIONS}, for 2I weight rows")
    width_out = n // 2 if gated else n
    if out is None:
        out = torch.empty(rows, width_out, dtype=out_dtype or x.dtype, device=x.device)
    require(out.shape == (rows, width_out) and out.stride(1) == 1, "out must be [M, N], contiguous along N")
    if rows == 0:
        return out
    if config is None and not deterministic and widens(weight, rows, x.dtype):
        return _many(x, weight, bias, out, gated, wide)
    if weight.fragments:
        return fragments.product(x, weight, bias, out, gated=gated, workspace=workspace, deterministic=deterministic, config=config)
    tall = next((height for height in ROWS if rows <= height), ROWS[-1])
    config = dict(config or tuned(f"quantised.{tall}"))
    scheme, c = weight.scheme, weight.columns
    nibble = scheme.bits == 4
    width = 2 * c if nibble else c
    steps = weight.steps
    tall = config.pop("ROWS", tall)
    splits = 1 if deterministic else splits_of(n, steps, config)
    columns, heights = -(-n // config["BLOCK_N"]), -(-rows // tall)
    counters = partial = None
    if splits > 1 and workspace is not None:
        splits = max(1, min(splits, (workspace.numel() - COUNTERS) // (rows * n)))
    if splits > 1:
        require(columns * heights <= COUNTERS, "the weight has too many columns for the counters")
        if workspace is None:
            workspace = torch.zeros(COUNTERS + splits * rows * n, dtype=torch.float32, device=x.device)
        counters, partial = workspace[:COUNTERS].view(torch.int32), workspace[COUNTERS:]
    config = {name: value for name, value in config.items() if name not in ("TARGET", "MAX_SPLITS")}
    recipe = RECIPES[scheme.kind + ("z" if weight.zeros is not None else ""), x.dtype == torch.bfloat16]
    box = None
    if (
        config.pop("TMA", 0)
        and weight.tile % config["BLOCK_N"] == 0
        and weight.zeros is None
        and (interpreting() or chained()["PDL"])
        and c >= 16
    ):
        box = TensorDescriptor(weight.data, [weight.data.shape[0], c], [c, 1], [config["BLOCK_N"], c])
    _matmul[(columns, splits, heights)](
        x, weight.data, box, weight.scales, weight.zeros, bias, out, counters, partial, rows, n, k, steps, x.stride(0), out.stride(0),
        KIND=KINDS.index(scheme.kind), RECIPE=recipe, ROWS=tall, TILE=weight.tile, C=c, GROUP=scheme.group, SPLITS=splits, EVEN=k % width == 0, BIAS=bias is not None,
        GATED=gated is not None, ACT=ACTIVATIONS.index(gated) if gated else 0, INTERPRET=interpreting(), **chained(), **{"AHEAD": 0, **config},
    )  # fmt: skip
    return out


def _many(x: Tensor, weight: Weight, bias: Tensor | None, out: Tensor, gated: str | None, wide: Tensor | None) -> Tensor:
    """As `matmul`, through pieces of the weight in full width."""
    scheme, (n, k) = weight.scheme, (weight.n, weight.k)
    tile = weight.tile
    tiles = -(-n // tile)
    if wide is None:
        wide = torch.empty(max(tile * k, min(PIECE, tiles * tile * k)), dtype=x.dtype, device=x.device)
    require(wide.dtype == x.dtype and wide.numel() >= tile * k, "wide must hold a tile of the weight in x's dtype")
    pieces = -(-tiles // (wide.numel() // (tile * k)))
    piece = -(-tiles // pieces)  # of about one size
    for first in range(0, tiles, piece):
        some = min(piece, tiles - first)
        start, rows = first * tile, min(n - first * tile, some * tile)
        part = wide[: rows * k].view(rows, k)
        if weight.fragments:
            fragments.widen(weight, first, some, part, gated is not None)
        else:
            _widen[(some, weight.steps)](
                weight.data, weight.scales, weight.zeros, part, first, n, k, weight.steps, rows, KIND=KINDS.index(scheme.kind),
                RECIPE=RECIPES[scheme.kind, x.dtype == torch.bfloat16], TILE=tile, C=weight.columns, GROUP=scheme.group, GATED=gated is not None,
                INTERPRET=interpreting(), num_warps=4 if scheme.bits == 4 else 8, **chained(),
            )  # fmt: skip
        own = None if bias is None else bias[start : start + rows]
        if gated:
            if own is not None:
                own = own.view(-1, 2).t().reshape(-1)
            half = activated(gated, _product(x, part, own, x.dtype), out=out if piece >= tiles and out.is_contiguous() else None)
            if half is not out:
                out[:, start // 2 : (start + rows) // 2] = half
        else:
            target = out[:, start : start + rows]
            if out.dtype == x.dtype and x.is_cuda:  # cuBLAS writes rows of any stride
                torch.mm(x, part.t(), out=target) if own is None else torch.addmm(own, x, part.t(), out=target)
            else:
                target.copy_(_product(x, part, own, out.dtype))
    return out


def _product(x: Tensor, part: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    if dtype == x.dtype:
        return torch.mm(x, part.t()) if bias is None else torch.addmm(bias, x, part.t())
    y = torch.mm(x, part.t(), out_dtype=dtype) if x.is_cuda else x.float() @ part.float().t()
    return y if bias is None else y.add_(bias)
