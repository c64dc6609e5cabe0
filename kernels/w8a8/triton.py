"""Matmuls of 8-bit inputs with 8-bit weights (W8A8), FP8 E4M3 or int8, in Triton.

    y[m, n] = round(x_scale[m] * scales[n] * sum_k code_x[m, k] code_w[n, k] + bias[n])

What it is: `quantise_rows`, which rounds each row of x to codes with a scale of its own (its largest magnitude becomes 448 or 127), and `matmul` over them and a
kernels/quantised `Weight` with one scale a row. Tiles of the weight come by the bulk copy engine. Sums of FP8 products are carried to float32 after each step of 128
columns, as the matrix unit keeps few bits of its own sums (DeepSeek-V3, arXiv 2412.19437, section 3.3.2); those of int8 are exact.
What it does not know: layers, files. Hopper and later have FP8 units; int8 ones are older.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, disable-error-code="no-any-return"

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from penstock.kernels.activation.triton import KINDS as ACTIVATIONS
from penstock.kernels.activation.triton import activate
from penstock.kernels.checks import require
from penstock.kernels.gpu import chained, interpreting, tuned
from penstock.kernels.linear.scheme import Scheme
from penstock.kernels.quantised.layout import Weight
from penstock.kernels.tile import INTERPRETED, follow, launched, narrow, power

STEP = 128
"""Columns of a step."""
FEW, MANY = 128, 1024
"""Rows up to which, and beyond which, tiles are lower and higher."""
KINDS = {"fp8_e4m3": torch.float8_e4m3fn, "int8": torch.int8}


def supports(scheme: Scheme) -> bool:
    """Whether weights of this scheme can be multiplied so, and its inputs are meant to be rounded."""
    return scheme.kind in KINDS and scheme.group == 0 and not scheme.zeros and scheme.activations in ("token", "tensor")


@launched
def _quantise(x, codes, scales, K, x_stride, width, TOP: tl.constexpr, INT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Grid (rows). Columns from K to width become 0."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    follow(PDL)
    value = tl.load(x + row * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(value), axis=0) / TOP, 1e-12)
    ratio = tl.minimum(tl.maximum(value / scale, -TOP), TOP)
    if INT:
        code = tl.floor(ratio + 0.5).to(tl.int8)
    else:
        if INTERPRETED:  # whose cast cuts off
            step = tl.exp2(tl.maximum(tl.floor(tl.log2(tl.maximum(tl.abs(ratio), 1e-9))), -6.0) - 3)
            ratio = tl.floor(ratio / step + 0.5) * step
        code = ratio.to(tl.float8e4nv)
    tl.store(codes + row * width + k, code, mask=k < width)
    tl.store(scales + row, scale)


@launched(do_not_specialize=["M"])
def _matmul(
    x, box_x, w, box_w, x_scales, scales, bias, out, M, N, STEPS_ALL, out_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr, INT: tl.constexpr,
    BIAS: tl.constexpr, GATED: tl.constexpr, ACT: tl.constexpr, INTERPRET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(M / BLOCK_M) * ceil(N / BLOCK_N)), row blocks in groups so that weights stay in L2. x [M, STEPS_ALL * STEP], w [ceil(N / TILE), STEPS_ALL, TILE, STEP]."""
    program = tl.program_id(0)
    down = tl.cdiv(M, BLOCK_M)
    across = tl.cdiv(N, BLOCK_N)
    width = GROUP * across
    group = program // width
    height = tl.minimum(down - group * GROUP, GROUP)
    row = group * GROUP + (program % width) % height
    column = (program % width) // height
    m = row * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    follow(PDL)
    first = column * BLOCK_N // TILE * STEPS_ALL * TILE + column * BLOCK_N % TILE
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32 if INT else tl.float32)
    for step in range(STEPS_ALL):
        a = box_x.load([row * BLOCK_M, step * STEP])
        b = box_w.load([first + step * TILE, 0])
        if INTERPRET:
            acc += tl.dot(a.to(tl.float32), tl.trans(b.to(tl.float32)), input_precision="ieee").to(acc.dtype)
        elif INT:
            acc = tl.dot(a, tl.trans(b), acc, out_dtype=tl.int32)
        else:
            acc = tl.dot(a, tl.trans(b), acc, max_num_imprecise_acc=STEP)
    y = acc.to(tl.float32) * tl.load(x_scales + m, mask=m < M, other=0.0)[:, None]
    y *= tl.load(scales + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    dtype = out.dtype.element_ty
    target = out + m.to(tl.int64)[:, None] * out_stride
    if GATED:
        gate, up = tl.split(tl.reshape(narrow(y, dtype).to(tl.float32), (BLOCK_M, BLOCK_N // 2, 2)))
        value = narrow(narrow(activate(gate, ACT), dtype).to(tl.float32) * up, dtype)
        half = column * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        tl.store(target + half[None, :], value, mask=(m < M)[:, None] & (half < N // 2)[None, :])
    else:
        tl.store(target + n[None, :], narrow(y, dtype), mask=(m < M)[:, None] & (n < N)[None, :])


def quantise_rows(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """x [M, K] -> (codes [M, K rounded up to STEP], zeros behind; scales [M] float32)."""
    (rows, k), dtype = x.shape, KINDS[kind]
    width = -(-k // STEP) * STEP
    codes = torch.empty(rows, width, dtype=dtype, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        integer = dtype == torch.int8
        _quantise[(rows,)](
            x,
            codes,
            scales,
            k,
            x.stride(0),
            width,
            TOP=127.0 if integer else 448.0,
            INT=integer,
            BLOCK=power(width),
            num_warps=8,
            **chained(),
        )
    return codes, scales


def matmul(
    x: Tensor, weight: Weight, bias: Tensor | None = None, *, out: Tensor | None = None, out_dtype: torch.dtype | None = None,
    gated: str | None = None, config: dict[str, int] | None = None,
) -> Tensor:  # fmt: skip
    """x [M, K] bf16 or fp16 @ weight^T + bias -> [M, N]. gated: as kernels/quantised's, with a result [M, N / 2]."""
    (rows, k), n = x.shape, weight.n
    require(supports(weight.scheme), "the weight must have 8 bits, a scale a row, and inputs that may be rounded")
    require(x.dim() == 2 and k == weight.k and x.stride(1) == 1, "x [M, K] must fit the weight and be contiguous along K")
    require(gated is None or (gated in ACTIVATIONS and n % 2 == 0), f"gated is one of {ACTIVATIONS}, for 2I weight rows")
    if out is None:
        out = torch.empty(rows, n // 2 if gated else n, dtype=out_dtype or x.dtype, device=x.device)
    require(out.shape == (rows, n // 2 if gated else n) and out.stride(1) == 1, "out must be [M, N], contiguous along N")
    if rows == 0:
        return out
    kind = weight.scheme.kind
    codes, x_scales = quantise_rows(x, kind)
    config = dict(config or tuned("w8a8.few" if rows <= FEW else "w8a8" if rows <= MANY else "w8a8.many"))
    block_m, block_n = config["BLOCK_M"], config["BLOCK_N"]
    require(weight.tile % block_n == 0, "BLOCK_N must divide the weight's tile")
    data = weight.data.view(KINDS[kind])
    box_x = TensorDescriptor(codes, [rows, codes.shape[1]], [codes.shape[1], 1], [block_m, STEP])
    box_w = TensorDescriptor(data, [data.shape[0], STEP], [STEP, 1], [block_n, STEP])
    blocks = -(-rows // block_m) * -(-n // block_n)
    _matmul[(blocks,)](
        codes, box_x, data, box_w, x_scales, weight.scales, bias, out, rows, n, weight.steps, out.stride(0), TILE=weight.tile, STEP=STEP,
        INT=kind == "int8", BIAS=bias is not None, GATED=gated is not None, ACT=ACTIVATIONS.index(gated) if gated else 0, INTERPRET=interpreting(), **chained(), **config,
    )  # fmt: skip
    return out
