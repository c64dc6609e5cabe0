"""Matmuls of 8-bit inputs with 8-bit weights (W8A8), FP8 E4M3 or int8, in Triton.

    y[m, n] = round(x_scale[m] * scales[n] * sum_k code_x[m, k] code_w[n, k] + bias[n])

What it is: `matmul` over rows that are rounded (rounding.py), each with a scale of its own, and a kernels/quantised `Weight` with one scale a row, or one a block. On Hopper it is
hopper.py's; the kernel here is the portable one, in which tiles of the weight come by the bulk copy engine, sums of FP8 products are carried to float32 after each step of 128
columns, as the matrix unit keeps few bits of its own sums (DeepSeek-V3, arXiv 2412.19437, section 3.3.2); those of int8 are exact.
What it does not know: layers, files. Hopper and later have FP8 units; int8 ones are older.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, disable-error-code="no-any-return"

import functools
from typing import Any

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
from penstock.kernels.tile import follow, launched, narrow, swizzled
from penstock.kernels.w8a8.rounding import DTYPES, quantise_rows
from penstock.kernels.w8a8.rows import STEP, Rounded, Rounding

FEW, MANY = 128, 1024
"""Rows up to which, and beyond which, tiles are lower and higher."""
KINDS = tuple(DTYPES)


def supports(scheme: Scheme) -> bool:
    """Whether weights of this scheme can be multiplied so, and its inputs are meant to be rounded."""
    return scheme.kind in DTYPES and scheme.group == 0 and not scheme.zeros and scheme.activations in ("token", "tensor")


def supports_blocks(scheme: Scheme) -> bool:
    """The same for weights with a scale a block of 128 x 128, whose inputs are rounded in groups of 128."""
    return scheme.kind == "fp8_e4m3" and scheme.group == STEP and scheme.rows == STEP and scheme.activations == "token"


def block_scales(weight: Weight) -> Tensor:
    """[ceil(n / 128), steps] float32, of such a weight, whose parts have multiples of 128 rows."""
    return weight.scales[:, ::STEP].t().float().contiguous()


@launched(do_not_specialize=["M"])
def _matmul(
    x, box_x, w, box_w, x_scales, scales, bias, out, M, N, STEPS_ALL, out_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr, INT: tl.constexpr,
    BIAS: tl.constexpr, GATED: tl.constexpr, ACT: tl.constexpr, INTERPRET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(M / BLOCK_M) * ceil(N / BLOCK_N)), row blocks in groups so that weights stay in L2. x [M, STEPS_ALL * STEP], w [ceil(N / TILE), STEPS_ALL, TILE, STEP]."""
    row, column = swizzled(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
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


def matmul(
    x: Tensor | Rounded, weight: Weight, bias: Tensor | None = None, *, out: Tensor | None = None, out_dtype: torch.dtype | None = None,
    gated: str | None = None, whole: bool = False, exact: bool = False, blocks: Tensor | None = None, workspace: Tensor | None = None,
    config: dict[str, int] | None = None,
) -> Tensor:  # fmt: skip
    """x [M, K], 16-bit floats to be rounded or rows that are, @ weight^T + bias -> [M, N]. gated: as kernels/quantised's, with a result [M, N / 2].

    Where the Hopper kernels run (hopper.py): `whole`: no K axis is cut, so that a row's result does not depend on the others; `exact`: FP8 sums are carried to float32 every
    128 columns; blocks: scales of a weight in blocks of 128 x 128 (`block_scales`), for rows rounded in groups of 128; workspace: as kernels/linear/triton.py's. Elsewhere results are
    always whole and exact, and there are no blocks. A configuration is that of the portable kernel if it has BLOCK_M."""
    n, scheme = weight.n, weight.scheme
    require(supports(scheme) or (blocks is not None and supports_blocks(scheme)), "the weight must have 8 bits, a scale a row, and inputs that may be rounded")
    require(gated is None or (gated in ACTIVATIONS and n % 2 == 0), f"gated is one of {ACTIVATIONS}, for 2I weight rows")
    if isinstance(x, Tensor):
        require(x.dim() == 2 and x.shape[1] == weight.k, "x [M, K] must fit the weight and be contiguous along K")
        x = quantise_rows(x, Rounding(scheme.kind, 0 if blocks is None else STEP))
    codes, x_scales, like = x
    require(codes.shape[1] == weight.steps * STEP and codes.dtype == DTYPES[scheme.kind], "the codes must fit the weight")
    rows, columns = codes.shape[0], n // 2 if gated else n
    asked = out
    if out is None:
        dtype = out_dtype or like
        out = torch.empty(rows, -(-columns // 8) * 8, dtype=dtype, device=codes.device)[:, :columns]
    require(out.shape == (rows, columns) and out.stride(1) == 1, "out must be [M, N], contiguous along N")
    if rows == 0:
        return out
    data, act = weight.data.view(DTYPES[scheme.kind]), None if gated is None else ACTIVATIONS.index(gated)
    if (config is None or "BM" in config or "BN" in config) and _hopper():
        from penstock.kernels.w8a8 import hopper

        if not hopper.fits(out):
            out = torch.empty(rows, -(-columns // 8) * 8, dtype=out.dtype, device=codes.device)[:, :columns]
        exact = exact and scheme.kind != "int8"
        scales = weight.scales if blocks is None else blocks
        common: dict[str, Any] = {"exact": exact, "blocks": blocks is not None, "act": act}
        if (rows <= hopper.FEW) if config is None else "BM" not in config:
            few = config or tuned("w8a8.hopper.few")
            hopper.few(codes, x_scales, data, scales, bias, out, n, weight.steps, workspace=workspace, whole=whole, config=few, **common)
        else:
            name = "w8a8.hopper.exact" if exact or blocks is not None else f"w8a8.hopper.{scheme.kind}"
            chosen = config or hopper.sized(tuned(name), rows, n, out.element_size())
            hopper.many(codes, x_scales, data, scales, bias, out, n, weight.steps, config=chosen, **common)
        return out if asked is None or out is asked else asked.copy_(out)
    require(blocks is None, "scales of blocks need a Hopper GPU")
    config = dict(config or tuned("w8a8.few" if rows <= FEW else "w8a8" if rows <= MANY else "w8a8.many"))
    block_m, block_n = config["BLOCK_M"], config["BLOCK_N"]
    require(weight.tile % block_n == 0, "BLOCK_N must divide the weight's tile")
    box_x = TensorDescriptor(codes, [rows, codes.shape[1]], [codes.shape[1], 1], [block_m, STEP])
    box_w = TensorDescriptor(data, [data.shape[0], STEP], [STEP, 1], [block_n, STEP])
    tiles = -(-rows // block_m) * -(-n // block_n)
    _matmul[(tiles,)](
        codes, box_x, data, box_w, x_scales, weight.scales, bias, out, rows, n, weight.steps, out.stride(0), TILE=weight.tile, STEP=STEP,
        INT=scheme.kind == "int8", BIAS=bias is not None, GATED=gated is not None, ACT=act or 0, INTERPRET=interpreting(), **chained(), **config,
    )  # fmt: skip
    return out


@functools.cache
def _hopper() -> bool:
    """Whether the Hopper kernels run here."""
    if interpreting() or not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return False
    try:
        from penstock.kernels.w8a8 import hopper  # noqa: F401
    except ImportError:  # a Triton whose Gluon is another
        return False
    return True


def always() -> bool:
    """Whether there is a kernel for any number of rows, one or many: the Hopper ones."""
    return _hopper()
