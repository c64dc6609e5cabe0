"""Matmuls of 8-bit inputs and weights for few rows on Hopper, in Gluon, the part of Triton in which a kernel says itself which warps do what.

What it is: `few`, formulas as in triton.py. One warp brings tiles by the bulk copy engine, weights before the kernel ahead has ended, for they never change; four multiply. The K axis is not
cut: on an H100 adding up the pieces cost more than idle processors did, and so a row's result does not depend on the others.
What it does not know: how rows were rounded, layers.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, disable-error-code="no-any-return,misc"

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from penstock.kernels import gpu
from penstock.kernels.activation.triton import activate
from penstock.kernels.tile import make_room, wait

HEIGHT = 64
"""Rows of a tile of `few`."""
DTYPES = {
    torch.float8_e4m3fn: gl.float8e4nv,
    torch.int8: gl.int8,
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.float32: gl.float32,
}


class _Launched(GluonJITFunction):
    def run(self, *args, grid, warmup, **options):
        """Launch, or only compile where `gpu.compile_only` says so."""
        return super().run(*args, grid=grid, warmup=warmup or gpu.compiling(), **options)


def _launched(function):
    return _Launched(function, do_not_specialize=["M"])


@gluon.jit
def _put(
    acc, box, stage, x_scales, scales, bias, top, at, M, N, SCALED: gl.constexpr, BIAS: gl.constexpr, GATED: gl.constexpr, ACT: gl.constexpr
):  # fmt: skip
    """Finish sums of rows `top` and on, columns `at` and on, and write them."""
    ROWS: gl.constexpr = acc.shape[0]
    WIDTH: gl.constexpr = acc.shape[1]
    LAYOUT: gl.constexpr = acc.type.layout
    y = acc.to(gl.float32)
    m = top + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    n = at + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    if SCALED:
        y *= gl.load(x_scales + m, mask=m < M, other=0.0)[:, None]
        y *= gl.load(scales + n, mask=n < N, other=0.0).to(gl.float32)[None, :]
    if BIAS:
        y += gl.load(bias + n, mask=n < N, other=0.0).to(gl.float32)[None, :]
    if GATED:
        gate, up = y.to(box.dtype).to(gl.float32).reshape([ROWS, WIDTH // 2, 2]).split()
        y = activate(gate, ACT).to(box.dtype).to(gl.float32) * up
        at = at // 2
    tma.store_wait(0)
    stage.store(y.to(box.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(box, [top, at], stage)


@gluon.jit
def _bring(x_box, w_box, xs, ws, full, empty, top, column, STEPS, ROWS: gl.constexpr, PDL: gl.constexpr):
    """The warp that brings tiles: weights, which never change, before it waits for the kernel ahead."""
    S: gl.constexpr = xs.shape[0]
    BN: gl.constexpr = ws.shape[1]
    BYTES: gl.constexpr = (ROWS + BN) * 128
    base = column * BN // 128 * STEPS * 128 + column * BN % 128
    early = gl.minimum(STEPS, S)
    for i in range(early):
        mbarrier.expect(full.index(i), BYTES)
        tma.async_copy_global_to_shared(w_box, [base + i * 128, 0], full.index(i), ws.index(i))
    wait(PDL)
    for i in range(early):
        tma.async_copy_global_to_shared(x_box, [top, i * 128], full.index(i), xs.index(i).slice(0, ROWS))
    slot = 0
    phase = 0
    for i in range(S, STEPS):
        bar = full.index(slot)
        mbarrier.wait(empty.index(slot), phase)
        mbarrier.expect(bar, BYTES)
        tma.async_copy_global_to_shared(w_box, [base + i * 128, 0], bar, ws.index(slot))
        tma.async_copy_global_to_shared(x_box, [top, i * 128], bar, xs.index(slot).slice(0, ROWS))
        slot += 1
        if slot == S:
            slot = 0
            phase ^= 1


@gluon.jit
def _multiply(
    box, xs, ws, full, empty, stage, x_scales, scales, bias, top, column, M, N, STEPS,
    EXACT: gl.constexpr, BLOCKS: gl.constexpr, BIAS: gl.constexpr, GATED: gl.constexpr, ACT: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Four warps that multiply."""
    S: gl.constexpr = xs.shape[0]
    BM: gl.constexpr = xs.shape[1]
    BN: gl.constexpr = ws.shape[1]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 32])
    acc = gl.zeros([BM, BN], gl.int32 if xs.dtype == gl.int8 else gl.float32, LAYOUT)
    m = top + gl.arange(0, BM, layout=gl.SliceLayout(1, LAYOUT))
    wait(PDL)
    slot = 0
    phase = 0
    before = 0
    if EXACT:
        zero = gl.zeros([BM, BN], gl.float32, LAYOUT)
        for step in range(STEPS):
            if BLOCKS:
                scale = gl.load(scales + column * BN // 128 * STEPS + step)
                own = gl.load(x_scales + step * M + m, mask=m < M, other=0.0) * scale
            mbarrier.wait(full.index(slot), phase)
            part = warpgroup_mma(xs.index(slot), ws.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
            part = warpgroup_mma_wait(0, deps=(part,))
            mbarrier.arrive(empty.index(slot))
            if BLOCKS:
                acc += part * own[:, None]
            else:
                acc += part
            slot += 1
            if slot == S:
                slot = 0
                phase ^= 1
    else:
        for step in range(STEPS):
            mbarrier.wait(full.index(slot), phase)
            acc = warpgroup_mma(xs.index(slot), ws.index(slot).permute((1, 0)), acc, use_acc=step > 0, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            mbarrier.arrive(empty.index(before), pred=step > 0)
            before = slot
            slot += 1
            if slot == S:
                slot = 0
                phase ^= 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
    _put(acc, box, stage, x_scales, scales, bias, top, column * BN, M, N, not BLOCKS, BIAS, GATED, ACT)
    tma.store_wait(0)


@_launched
def _few(
    x_box, w_box, box, x_scales, scales, bias, M, N, STEPS, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    EXACT: gl.constexpr, BLOCKS: gl.constexpr, BIAS: gl.constexpr, GATED: gl.constexpr, ACT: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Grid (ceil(N / BN), ceil(M / BM)). Of a tile's BM rows as many are read as x_box has: filling up with zeros takes the copy engine longer than reading, and a row never
    meets another."""
    xs = gl.allocate_shared_memory(x_box.dtype, [STAGES, BM, 128], x_box.layout)
    ws = gl.allocate_shared_memory(w_box.dtype, [STAGES, BN, 128], w_box.layout)
    stage = gl.allocate_shared_memory(box.dtype, box.block_type.shape, box.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    make_room(PDL)
    ROWS: gl.constexpr = x_box.block_type.shape[0]
    column = gl.program_id(0)
    top = gl.program_id(1) * BM
    gl.warp_specialize([
        (_multiply, (box, xs, ws, full, empty, stage, x_scales, scales, bias, top, column, M, N, STEPS, EXACT, BLOCKS, BIAS, GATED, ACT, PDL)),
        (_bring, (x_box, w_box, xs, ws, full, empty, top, column, STEPS, ROWS, PDL)),
    ], [1], [40])  # fmt: skip


def _box(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Of a matrix [.., columns contiguous], in pieces of so many rows and columns."""
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], DTYPES[tensor.dtype])
    return TensorDescriptor(tensor, list(tensor.shape), [tensor.stride(0), 1], [rows, columns], layout)


def few(
    codes: Tensor, x_scales: Tensor, data: Tensor, scales: Tensor, bias: Tensor | None, out: Tensor, n: int, steps: int, *, exact: bool, blocks: bool,
    act: int | None, config: dict[str, int],
) -> None:  # fmt: skip
    """codes [M, steps * 128], data [ceil(n / 128) * steps * 128, 128], out [M, n], of a gated activation's number `act` [M, n / 2]."""
    rows, width = codes.shape[0], config["BN"]
    tall = min(HEIGHT, max(16, 1 << (rows - 1).bit_length()))
    _few[(-(-n // width), -(-rows // HEIGHT))](
        _box(codes, tall, 128), _box(data, width, 128), _box(out, HEIGHT, width // (1 if act is None else 2)), x_scales, scales,
        scales if bias is None else bias, rows, n, steps, BM=HEIGHT, EXACT=exact or blocks, BLOCKS=blocks, BIAS=bias is not None, GATED=act is not None,
        ACT=act or 0, num_warps=4, **config, **gpu.chained(),
    )  # fmt: skip
