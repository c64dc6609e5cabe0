"""Matmuls of 8-bit inputs with 8-bit weights (W8A8), FP8 E4M3 or int8, in Triton.

    y[m, n] = round(x_scale[m] * scales[n] * sum_k code_x[m, k] code_w[n, k] + bias[n])

    y[m, n] = round(sum_g x_scale[g, m] * scales[n / 128, g] * sum_{k in g} code_x[m, k] code_w[n, k] + bias[n]),   groups of 128          (blocks)

What it is: `matmul` over rows that are rounded (rounding.py), and a kernels/quantised `Weight` with one scale a row, or one a block of 128 x 128. Persistent programs, operands and results
moved by the bulk copy engine, tiles in an order that keeps what they share in L2. Sums of int8 are exact. Those of FP8 stay in the matrix unit, as cuBLAS's fast accumulation, or are
carried to float32 after each step of 128 columns (DeepSeek-V3, arXiv 2412.19437, section 3.3.2).
What it does not know: layers, files. Hopper and later have FP8 units; int8 ones are older.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, disable-error-code="no-any-return"

import functools

import torch
import triton
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

FEW = 64
"""Most rows for which hopper.py's kernel is the faster one."""
KINDS = tuple(DTYPES)
TURN = {"w8a8.low": 0.67, "w8a8": 1.0, "w8a8.many": 1.95, "w8a8.many.int8": 1.75}
"""How long a turn of each configuration takes, of the second's: FP8 measured on an H100 (512 to 8,000 rows of 4,096), int8 by what its tiles read and multiply."""


def supports(scheme: Scheme) -> bool:
    """Whether weights of this scheme can be multiplied so, and its inputs are meant to be rounded."""
    return scheme.kind in DTYPES and scheme.group == 0 and not scheme.zeros and scheme.activations in ("token", "tensor")


def supports_blocks(scheme: Scheme) -> bool:
    """The same for weights with a scale a block of 128 x 128, whose inputs are rounded in groups of 128."""
    return scheme.kind == "fp8_e4m3" and scheme.group == STEP and scheme.rows == STEP and scheme.activations == "token"


def block_scales(weight: Weight) -> Tensor:
    """[ceil(n / 128), steps] float32, of such a weight, whose parts have multiples of 128 rows."""
    return weight.scales[:, ::STEP].t().float().contiguous()


@triton.jit
def _put(acc, box, top, at, x_scales, scales, bias, M, N, SCALED: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, ACT: tl.constexpr):
    """Finish sums of rows `top` and on, columns `at` and on, and write them."""
    ROWS: tl.constexpr = acc.shape[0]
    WIDTH: tl.constexpr = acc.shape[1]
    n = at + tl.arange(0, WIDTH)
    y = acc.to(tl.float32)
    if SCALED:
        m = top + tl.arange(0, ROWS)
        y *= tl.load(x_scales + m, mask=m < M, other=0.0)[:, None]
        y *= tl.load(scales + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if GATED:
        gate, up = tl.split(tl.reshape(narrow(y, box.dtype).to(tl.float32), (ROWS, WIDTH // 2, 2)))
        y = narrow(activate(gate, ACT), box.dtype).to(tl.float32) * up
        at = at // 2
    box.store([top, at], narrow(y, box.dtype))


@launched(do_not_specialize=["M"])
def _matmul(
    x_box, w_box, box, x_scales, scales, bias, M, N, STEPS,
    BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr, SUB: tl.constexpr, INT: tl.constexpr, EXACT: tl.constexpr, BLOCKS: tl.constexpr,
    BIAS: tl.constexpr, GATED: tl.constexpr, ACT: tl.constexpr, INTERPRET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (programs), each of which computes tile after tile: the loads of the next one begin while the last is written. x_box [M, STEPS * 128], w_box [ceil(N / 128), STEPS, 128, 128]."""
    follow(PDL)
    down = tl.cdiv(M, BM)
    across = tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), down * across, tl.num_programs(0), flatten=True):
        row, column = swizzled(tile, down, across, GROUP)
        acc = tl.zeros([BM, BN], tl.int32 if INT else tl.float32)
        for step in range(STEPS):
            a = x_box.load([row * BM, step * 128])
            b = tl.reshape(w_box.load([column * BN // 128, step, column * BN % 128, 0]), (BN, 128))
            if BLOCKS:
                m = row * BM + tl.arange(0, BM)
                scale = tl.load(x_scales + step * M + m, mask=m < M, other=0.0) * tl.load(scales + column * BN // 128 * STEPS + step)
                if INTERPRET:
                    acc += tl.dot(a.to(tl.float32), tl.trans(b.to(tl.float32)), input_precision="ieee") * scale[:, None]
                else:
                    acc += tl.dot(a, tl.trans(b)) * scale[:, None]
            elif INTERPRET:
                acc += tl.dot(a.to(tl.float32), tl.trans(b.to(tl.float32)), input_precision="ieee").to(acc.dtype)
            elif INT:
                acc = tl.dot(a, tl.trans(b), acc, out_dtype=tl.int32)
            elif EXACT:
                acc = tl.dot(a, tl.trans(b), acc, max_num_imprecise_acc=128)
            else:
                acc = tl.dot(a, tl.trans(b), acc)
        if SUB == 1:
            _put(acc, box, row * BM, column * BN, x_scales, scales, bias, M, N, not BLOCKS, BIAS, GATED, ACT)
        else:
            low, high = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
            _put(low, box, row * BM, column * BN, x_scales, scales, bias, M, N, not BLOCKS, BIAS, GATED, ACT)
            _put(high, box, row * BM, column * BN + BN // 2, x_scales, scales, bias, M, N, not BLOCKS, BIAS, GATED, ACT)


def matmul(
    x: Tensor | Rounded, weight: Weight, bias: Tensor | None = None, *, out: Tensor | None = None, out_dtype: torch.dtype | None = None,
    gated: str | None = None, exact: bool = False, blocks: Tensor | None = None, config: dict[str, int] | None = None,
) -> Tensor:  # fmt: skip
    """x [M, K], 16-bit floats to be rounded or rows that are, @ weight^T + bias -> [M, N]. gated: as kernels/quantised's, with a result [M, N / 2].

    blocks: scales of a weight in blocks of 128 x 128 (`block_scales`), for rows rounded in groups of 128. `exact`: FP8 sums are carried to float32 every 128 columns, as with blocks always;
    else they stay in the matrix unit, which keeps some 14 bits of them. Few rows on Hopper: hopper.py. However many rows there are, each is summed in one order, so that its result does
    not depend on the others. A configuration without BM is one of hopper.py's."""
    n, scheme = weight.n, weight.scheme
    require(
        supports(scheme) or (blocks is not None and supports_blocks(scheme)),
        "the weight must have 8 bits, a scale a row, and inputs that may be rounded",
    )
    require(gated is None or (gated in ACTIVATIONS and n % 2 == 0), f"gated is one of {ACTIVATIONS}, for 2I weight rows")
    if isinstance(x, Tensor):
        require(x.dim() == 2 and x.shape[1] == weight.k, "x [M, K] must fit the weight and be contiguous along K")
        x = quantise_rows(x, Rounding(scheme.kind, 0 if blocks is None else STEP))
    codes, x_scales, like = x
    steps = weight.steps
    require(codes.shape[1] == steps * STEP and codes.dtype == DTYPES[scheme.kind], "the codes must fit the weight")
    rows, columns = codes.shape[0], n // 2 if gated else n
    asked = out
    if out is None or out.data_ptr() % 16 or out.stride(0) * out.element_size() % 16:  # the bulk copy engine could not write it
        out = torch.empty(rows, -(-columns // 8) * 8, dtype=(out_dtype or like) if out is None else out.dtype, device=codes.device)[
            :, :columns
        ]
    require((asked is None or asked.shape == out.shape) and out.stride(1) == 1, "out must be [M, N], contiguous along N")
    if rows == 0:
        return out if asked is None else asked
    data, act = weight.data.view(DTYPES[scheme.kind]), None if gated is None else ACTIVATIONS.index(gated)
    scales, exact = weight.scales if blocks is None else blocks, exact and scheme.kind != "int8"
    if always() and ("BM" not in config if config else rows <= FEW):
        from penstock.kernels.w8a8 import hopper

        chosen = config or tuned("w8a8.few.wide" if n >= 16384 else "w8a8.few")
        hopper.few(codes, x_scales, data, scales, bias, out, n, steps, exact=exact, blocks=blocks is not None, act=act, config=chosen)
    else:
        config = dict(config or _config(rows, n, scheme.kind, exact, blocks is not None, out.element_size()))
        height, width = config["BM"], config["BN"]
        deep = max(1, width // STEP)
        x_box = TensorDescriptor(codes, [rows, steps * STEP], [steps * STEP, 1], [height, STEP])
        shape, stride = [data.shape[0] // steps // STEP, steps, STEP, STEP], [steps * STEP * STEP, STEP * STEP, STEP, 1]
        w_box = TensorDescriptor(data, shape, stride, [deep, 1, width // deep, STEP])
        box = TensorDescriptor(out, [rows, columns], [out.stride(0), 1], [height, width // config["SUB"] // (2 if gated else 1)])
        tiles = -(-rows // height) * -(-n // width)
        _matmul[(min(tiles, processors()),)](
            x_box, w_box, box, x_scales, scales, bias, rows, n, steps, INT=scheme.kind == "int8", EXACT=exact, BLOCKS=blocks is not None, BIAS=bias is not None,
            GATED=gated is not None, ACT=act or 0, INTERPRET=interpreting(), **chained(), **config,
        )  # fmt: skip
    return out if asked is None or out is asked else asked.copy_(out)


def _config(rows: int, n: int, kind: str, exact: bool, blocks: bool, out_bytes: int) -> dict[str, int]:
    """Of the portable kernel: as wide tiles as leave few processors idle in the last turn."""
    if blocks or exact:
        config = tuned("w8a8.blocks" if blocks else "w8a8.exact")
    else:
        names = ("w8a8.many.int8" if kind == "int8" else "w8a8.many", "w8a8", "w8a8.low")
        config = tuned(min(names, key=lambda name: _turns(rows, n, tuned(name)) * TURN[name]))
    if out_bytes > 2 and "num_stages" in config:  # results need more of the shared memory
        config = {**config, "num_stages": config["num_stages"] - 1}
    return config


def _turns(rows: int, n: int, config: dict[str, int]) -> int:
    """How often each processor takes a tile."""
    tiles = -(-rows // config["BM"]) * -(-n // config["BN"])
    return -(-tiles // processors())


@functools.cache
def processors() -> int:
    """Of the device."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count if torch.cuda.is_available() else 3


@functools.cache
def always() -> bool:
    """Whether there is a kernel for any number of rows, one or many: hopper.py's."""
    if interpreting() or not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return False
    try:
        from penstock.kernels.w8a8 import hopper  # noqa: F401
    except ImportError:  # a Triton whose Gluon is another
        return False
    return True
