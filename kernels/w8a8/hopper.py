"""Matmuls of 8-bit inputs and weights on Hopper, in Gluon, the part of Triton in which a kernel says itself which warps do what.

    y[m, n] = round(x_scale[m] * scales[n] * sum_k code_x[m, k] code_w[n, k] + bias[n])
    y[m, n] = round(sum_g x_scale[g, m] * scales[n / 128, g] * sum_{k in g} code_x[m, k] code_w[n, k] + bias[n]),   groups of 128          (blocks)

What it is: `many`, a persistent kernel in which one warp brings tiles by the bulk copy engine and two groups of four warps multiply, each half of a tile's rows; and `few`, in tiles of 64 rows, in
which weights are asked for before the kernel ahead has ended, and the K axis may be cut as in kernels/linear/triton.py (pieces in a fixed order, whoever comes last adds them up). Neither
looks at other rows: where K is not cut a row's result is the same in each.
Sums of FP8 products stay in the matrix unit, which keeps some 14 bits of them (cuBLAS's fast accumulation); with `exact` and with blocks they are carried to float32 after each 128
columns (DeepSeek-V3, arXiv 2412.19437, section 3.3.2). Those of int8 are exact.
What it does not know: how rows were rounded, layers.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, disable-error-code="no-any-return,misc"

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from penstock.kernels import gpu
from penstock.kernels.activation.triton import activate
from penstock.kernels.linear.triton import COUNTERS
from penstock.kernels.tile import make_room, swizzled, wait

HEIGHT = 64
"""Rows of a tile of `few`."""
FEW = 256
"""Most rows for which `few` is the faster one: each 64 read the weight again, mostly from L2."""
DTYPES = {torch.float8_e4m3fn: gl.float8e4nv, torch.int8: gl.int8, torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}


class _Launched(GluonJITFunction):
    def run(self, *args, grid, warmup, **options):
        """Launch, or only compile where `gpu.compile_only` says so."""
        return super().run(*args, grid=grid, warmup=warmup or gpu.compiling(), **options)


def _launched(function):
    return _Launched(function, do_not_specialize=["M"])


@gluon.jit
def _put(
    acc, index: gl.constexpr, box, stage, x_scales, scales, bias, row, column, M, N, WIDTH: gl.constexpr, WARPS: gl.constexpr, SCALED: gl.constexpr,
    BIAS: gl.constexpr, GATED: gl.constexpr, ACT: gl.constexpr,
):  # fmt: skip
    """Piece `index` of a tile that begins at (row, column): scaled, finished and written. acc [ROWS, WIDTH]."""
    ROWS: gl.constexpr = acc.shape[0]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, WIDTH, 32])
    y = gl.convert_layout(acc, LAYOUT, assert_trivial=True).to(gl.float32)
    m = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    n = column + index * WIDTH + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    if SCALED:
        y *= gl.load(x_scales + m, mask=m < M, other=0.0)[:, None]
        y *= gl.load(scales + n, mask=n < N, other=0.0).to(gl.float32)[None, :]
    if BIAS:
        y += gl.load(bias + n, mask=n < N, other=0.0).to(gl.float32)[None, :]
    at = column + index * WIDTH
    if GATED:
        gate, up = y.to(box.dtype).to(gl.float32).reshape([ROWS, WIDTH // 2, 2]).split()
        y = activate(gate, ACT).to(box.dtype).to(gl.float32) * up
        at = at // 2
    tma.store_wait(0)
    stage.store(y.to(box.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(box, [row, at], stage)


@gluon.jit
def _finish(
    acc, box, stage, x_scales, scales, bias, row, column, M, N, SUB: gl.constexpr, WARPS: gl.constexpr, SCALED: gl.constexpr, BIAS: gl.constexpr,
    GATED: gl.constexpr, ACT: gl.constexpr,
):  # fmt: skip
    """A tile, written in SUB pieces."""
    ROWS: gl.constexpr = acc.shape[0]
    WIDTH: gl.constexpr = acc.shape[1] // SUB
    if SUB == 1:
        _put(acc, 0, box, stage, x_scales, scales, bias, row, column, M, N, WIDTH, WARPS, SCALED, BIAS, GATED, ACT)
    else:
        low, high = acc.reshape([ROWS, 2, WIDTH]).permute((0, 2, 1)).split()
        _put(low, 0, box, stage, x_scales, scales, bias, row, column, M, N, WIDTH, WARPS, SCALED, BIAS, GATED, ACT)
        _put(high, 1, box, stage, x_scales, scales, bias, row, column, M, N, WIDTH, WARPS, SCALED, BIAS, GATED, ACT)


@gluon.jit
def _bring(x_box, w_box, xs, ws, full, empty, M, N, STEPS, GROUP: gl.constexpr, PDL: gl.constexpr):
    """The warp that brings tiles."""
    S: gl.constexpr = xs.shape[0]
    BM: gl.constexpr = xs.shape[1]
    BN: gl.constexpr = ws.shape[1]
    down = gl.cdiv(M, BM)
    across = gl.cdiv(N, BN)
    wait(PDL)
    slot = 0
    phase = 1
    for tile in range(gl.program_id(0), down * across, gl.num_programs(0)):
        row, column = swizzled(tile, down, across, GROUP)
        for step in range(STEPS):
            bar = full.index(slot)
            mbarrier.wait(empty.index(slot), phase)
            mbarrier.expect(bar, (BM + BN) * 128)
            tma.async_copy_global_to_shared(x_box, [row * BM, step * 128], bar, xs.index(slot))
            for part in gl.static_range(BN // 128):
                first = ((column * (BN // 128) + part) * STEPS + step) * 128
                tma.async_copy_global_to_shared(w_box, [first, 0], bar, ws.index(slot).slice(part * 128, 128))
            slot += 1
            if slot == S:
                slot = 0
                phase ^= 1


@gluon.jit
def _multiply(
    box, xs, ws, full, empty, stages, x_scales, scales, bias, M, N, STEPS, PART: gl.constexpr, SUB: gl.constexpr, GROUP: gl.constexpr, BIAS: gl.constexpr,
    GATED: gl.constexpr, ACT: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Four warps that multiply rows PART * BM / 2 and on of each tile."""
    S: gl.constexpr = xs.shape[0]
    BM: gl.constexpr = xs.shape[1]
    BN: gl.constexpr = ws.shape[1]
    ROWS: gl.constexpr = BM // 2
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 32])
    down = gl.cdiv(M, BM)
    across = gl.cdiv(N, BN)
    wait(PDL)
    slot = 0
    phase = 0
    for tile in range(gl.program_id(0), down * across, gl.num_programs(0)):
        row, column = swizzled(tile, down, across, GROUP)
        acc = gl.zeros([ROWS, BN], gl.int32 if xs.dtype == gl.int8 else gl.float32, LAYOUT)
        before = slot
        for step in range(STEPS):
            mbarrier.wait(full.index(slot), phase)
            acc = warpgroup_mma(
                xs.index(slot).slice(PART * ROWS, ROWS), ws.index(slot).permute((1, 0)), acc, use_acc=step > 0, is_async=True
            )  # fmt: skip
            acc = warpgroup_mma_wait(1, deps=(acc,))
            mbarrier.arrive(empty.index(before), pred=step > 0)
            before = slot
            slot += 1
            if slot == S:
                slot = 0
                phase ^= 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(before))
        _finish(
            acc, box, stages.index(PART), x_scales, scales, bias, row * BM + PART * ROWS, column * BN, M, N, SUB, 4, True, BIAS, GATED, ACT
        )  # fmt: skip
    tma.store_wait(0)


@gluon.jit
def _multiply_exactly(
    box, xs, ws, full, empty, stages, x_scales, scales, bias, M, N, STEPS, PART: gl.constexpr, BLOCKS: gl.constexpr, GROUP: gl.constexpr, BIAS: gl.constexpr,
    GATED: gl.constexpr, ACT: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """As `_multiply`, two times 64 rows, whose sums are carried to float32 after each step; the other four warps multiply meanwhile."""
    S: gl.constexpr = xs.shape[0]
    BM: gl.constexpr = xs.shape[1]
    BN: gl.constexpr = ws.shape[1]
    ROWS: gl.constexpr = BM // 2
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 32])
    down = gl.cdiv(M, BM)
    across = gl.cdiv(N, BN)
    wait(PDL)
    slot = 0
    phase = 0
    zero = gl.zeros([64, BN], gl.float32, LAYOUT)
    stage = stages.index(PART)
    for tile in range(gl.program_id(0), down * across, gl.num_programs(0)):
        row, column = swizzled(tile, down, across, GROUP)
        top = row * BM + PART * ROWS
        upper = gl.zeros([64, BN], gl.float32, LAYOUT)
        lower = gl.zeros([64, BN], gl.float32, LAYOUT)
        m = top + gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
        for step in range(STEPS):
            if BLOCKS:
                scale = gl.load(scales + column * STEPS + step)
                first = gl.load(x_scales + step * M + m, mask=m < M, other=0.0) * scale
                second = gl.load(x_scales + step * M + 64 + m, mask=m + 64 < M, other=0.0) * scale
            mbarrier.wait(full.index(slot), phase)
            b = ws.index(slot).permute((1, 0))
            part = warpgroup_mma(xs.index(slot).slice(PART * ROWS, 64), b, zero, use_acc=False, is_async=True)
            part = warpgroup_mma_wait(0, deps=(part,))
            if BLOCKS:
                upper += part * first[:, None]
            else:
                upper += part
            part = warpgroup_mma(xs.index(slot).slice(PART * ROWS + 64, 64), b, zero, use_acc=False, is_async=True)
            part = warpgroup_mma_wait(0, deps=(part,))
            mbarrier.arrive(empty.index(slot))
            if BLOCKS:
                lower += part * second[:, None]
            else:
                lower += part
            slot += 1
            if slot == S:
                slot = 0
                phase ^= 1
        _finish(upper, box, stage, x_scales, scales, bias, top, column * BN, M, N, 1, 4, not BLOCKS, BIAS, GATED, ACT)
        _finish(lower, box, stage, x_scales, scales, bias, top + 64, column * BN, M, N, 1, 4, not BLOCKS, BIAS, GATED, ACT)
    tma.store_wait(0)


@_launched
def _many(
    x_box, w_box, box, x_scales, scales, bias, M, N, STEPS, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, SUB: gl.constexpr,
    EXACT: gl.constexpr, BLOCKS: gl.constexpr, BIAS: gl.constexpr, GATED: gl.constexpr, ACT: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Grid (programs). x_box [M, STEPS * 128], w_box [ceil(N / 128) * STEPS * 128, 128]."""
    xs = gl.allocate_shared_memory(x_box.dtype, [STAGES, BM, 128], x_box.layout)
    ws = gl.allocate_shared_memory(w_box.dtype, [STAGES, BN, 128], w_box.layout)
    stages = gl.allocate_shared_memory(box.dtype, [2, box.block_type.shape[0], box.block_type.shape[1]], box.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    make_room(PDL)
    if EXACT:
        gl.warp_specialize([
            (_multiply_exactly, (box, xs, ws, full, empty, stages, x_scales, scales, bias, M, N, STEPS, 0, BLOCKS, GROUP, BIAS, GATED, ACT, PDL)),
            (_multiply_exactly, (box, xs, ws, full, empty, stages, x_scales, scales, bias, M, N, STEPS, 1, BLOCKS, GROUP, BIAS, GATED, ACT, PDL)),
            (_bring, (x_box, w_box, xs, ws, full, empty, M, N, STEPS, GROUP, PDL)),
        ], [4, 1], [232, 40])  # fmt: skip
    else:
        gl.warp_specialize([
            (_multiply, (box, xs, ws, full, empty, stages, x_scales, scales, bias, M, N, STEPS, 0, SUB, GROUP, BIAS, GATED, ACT, PDL)),
            (_multiply, (box, xs, ws, full, empty, stages, x_scales, scales, bias, M, N, STEPS, 1, SUB, GROUP, BIAS, GATED, ACT, PDL)),
            (_bring, (x_box, w_box, xs, ws, full, empty, M, N, STEPS, GROUP, PDL)),
        ], [4, 1], [232, 40])  # fmt: skip


@gluon.jit
def _bring_few(x_box, w_box, xs, ws, full, empty, top, column, first, count, STEPS, PDL: gl.constexpr):
    """The warp that brings tiles: weights, which never change, before it waits for the kernel ahead."""
    S: gl.constexpr = xs.shape[0]
    BN: gl.constexpr = ws.shape[1]
    BYTES: gl.constexpr = (xs.shape[1] + BN) * 128
    base = column * BN // 128 * STEPS * 128 + column * BN % 128
    early = gl.minimum(count, S)
    for i in range(early):
        mbarrier.expect(full.index(i), BYTES)
        tma.async_copy_global_to_shared(w_box, [base + (first + i) * 128, 0], full.index(i), ws.index(i))
    wait(PDL)
    for i in range(early):
        tma.async_copy_global_to_shared(x_box, [top, (first + i) * 128], full.index(i), xs.index(i))
    slot = 0
    phase = 0
    for i in range(S, count):
        bar = full.index(slot)
        mbarrier.wait(empty.index(slot), phase)
        mbarrier.expect(bar, BYTES)
        tma.async_copy_global_to_shared(w_box, [base + (first + i) * 128, 0], bar, ws.index(slot))
        tma.async_copy_global_to_shared(x_box, [top, (first + i) * 128], bar, xs.index(slot))
        slot += 1
        if slot == S:
            slot = 0
            phase ^= 1


@gluon.jit
def _multiply_few(
    box, xs, ws, full, empty, stage, x_scales, scales, bias, counters, partial, top, column, piece, first, count, M, N, STEPS, SPLITS: gl.constexpr,
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
        for step in range(count):
            if BLOCKS:
                scale = gl.load(scales + column * BN // 128 * STEPS + first + step)
                own = gl.load(x_scales + (first + step) * M + m, mask=m < M, other=0.0) * scale
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
        for step in range(count):
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
    if SPLITS > 1:
        n = column * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, LAYOUT))
        cells = partial + m[:, None] * N + n[None, :]
        inside = (m < M)[:, None] & (n < N)[None, :]
        gl.store(cells + piece * M * N, acc.to(gl.float32), mask=inside)
        gl.thread_barrier()
        counter = counters + top // BM * gl.num_programs(0) + column
        if gl.atomic_add(counter, 1, sem="acq_rel") == SPLITS - 1:
            total = gl.zeros([BM, BN], gl.float32, LAYOUT)
            for other in gl.static_range(SPLITS):
                total += gl.load(cells + other * M * N, mask=inside, other=0.0, cache_modifier=".cg")
            gl.store(counter, 0)
            _finish(total, box, stage, x_scales, scales, bias, top, column * BN, M, N, 1, 4, not BLOCKS, BIAS, GATED, ACT)
    else:
        _finish(acc, box, stage, x_scales, scales, bias, top, column * BN, M, N, 1, 4, not BLOCKS, BIAS, GATED, ACT)
    tma.store_wait(0)


@_launched
def _few(
    x_box, w_box, box, x_scales, scales, bias, counters, partial, M, N, STEPS, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, SPLITS: gl.constexpr,
    EXACT: gl.constexpr, BLOCKS: gl.constexpr, BIAS: gl.constexpr, GATED: gl.constexpr, ACT: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Grid (ceil(N / BN), SPLITS, ceil(M / BM))."""
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
    column = gl.program_id(0)
    piece = gl.program_id(1)
    top = gl.program_id(2) * BM
    each = gl.cdiv(STEPS, SPLITS)
    first = piece * each
    count = gl.maximum(gl.minimum(STEPS - first, each), 0)
    gl.warp_specialize([
        (_multiply_few, (box, xs, ws, full, empty, stage, x_scales, scales, bias, counters, partial, top, column, piece, first, count, M, N, STEPS, SPLITS, EXACT, BLOCKS, BIAS, GATED, ACT, PDL)),
        (_bring_few, (x_box, w_box, xs, ws, full, empty, top, column, first, count, STEPS, PDL)),
    ], [1], [40])  # fmt: skip


def _box(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Of a matrix [.., columns contiguous], in pieces of so many rows and columns."""
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], DTYPES[tensor.dtype])
    return TensorDescriptor(tensor, list(tensor.shape), [tensor.stride(0), 1], [rows, columns], layout)


def fits(out: Tensor) -> bool:
    """Whether results can be written by the bulk copy engine."""
    return out.data_ptr() % 16 == 0 and out.stride(0) * out.element_size() % 16 == 0


def splits_of(n: int, steps: int, config: dict[str, int]) -> int:
    """Pieces of the K axis: enough programs for the device, at least four steps each. Depends on the weight's shape only."""
    return max(1, min(config["MAX_SPLITS"], config["TARGET"] // -(-n // config["BN"]), steps // 4))


def few(
    codes: Tensor, x_scales: Tensor, data: Tensor, scales: Tensor, bias: Tensor | None, out: Tensor, n: int, steps: int, *, workspace: Tensor | None,
    whole: bool, exact: bool, blocks: bool, act: int | None, config: dict[str, int],
) -> None:  # fmt: skip
    """codes [M, steps * 128], data [ceil(n / 128) * steps * 128, 128]. act: a gated activation's number; `whole`: no K axis is cut. workspace: as kernels/linear/triton.py's."""
    rows, config = codes.shape[0], dict(config)
    splits = 1 if whole else splits_of(n, steps, config)
    config = {name: value for name, value in config.items() if name not in ("TARGET", "MAX_SPLITS")}
    counters = partial = scales
    if splits > 1:
        if workspace is None:
            workspace = torch.zeros(COUNTERS + splits * rows * n, dtype=torch.float32, device=codes.device)
        splits = max(1, min(splits, (workspace.numel() - COUNTERS) // (rows * n)))
        if -(-n // config["BN"]) * -(-rows // HEIGHT) > COUNTERS:
            splits = 1
        counters, partial = workspace[:COUNTERS].view(torch.int32), workspace[COUNTERS:]
    width = config["BN"] // (1 if act is None else 2)
    columns, heights = -(-n // config["BN"]), -(-rows // HEIGHT)
    _few[(columns, splits, heights)](
        _box(codes, HEIGHT, 128), _box(data, config["BN"], 128), _box(out, HEIGHT, width), x_scales, scales, scales if bias is None else bias, counters, partial,
        rows, n, steps, BM=HEIGHT, SPLITS=splits, EXACT=exact or blocks, BLOCKS=blocks, BIAS=bias is not None, GATED=act is not None, ACT=act or 0, num_warps=4,
        **config, **gpu.chained(),
    )  # fmt: skip


def many(
    codes: Tensor, x_scales: Tensor, data: Tensor, scales: Tensor, bias: Tensor | None, out: Tensor, n: int, steps: int, *, exact: bool, blocks: bool,
    act: int | None, config: dict[str, int],
) -> None:  # fmt: skip
    """As `few`, any number of rows."""
    rows, config = codes.shape[0], dict(config)
    height, width = config["BM"], config["BN"]
    exact = exact or blocks
    piece = width // (1 if exact else config["SUB"]) // (1 if act is None else 2)
    tiles = -(-rows // height) * -(-n // width)
    _many[(min(tiles, _processors()),)](
        _box(codes, height, 128), _box(data, 128, 128), _box(out, 64 if exact else height // 2, piece), x_scales, scales, scales if bias is None else bias,
        rows, n, steps, EXACT=exact, BLOCKS=blocks, BIAS=bias is not None, GATED=act is not None, ACT=act or 0, num_warps=4, **config, **gpu.chained(),
    )  # fmt: skip


@functools.cache
def _processors() -> int:
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


def sized(config: dict[str, int], rows: int, n: int, out_bytes: int) -> dict[str, int]:
    """A configuration for that many rows: where wide tiles would leave processors idle, tiles of 128 columns; where results are wide, one buffer less."""
    config = dict(config)
    if config["BN"] > 128:
        wide, narrow = (_waves(rows, n, config["BM"], width) * width for width in (config["BN"], 128))
        if narrow < 0.9 * wide:
            config |= {"BN": 128, "SUB": 1}
    if out_bytes > 2:
        config["STAGES"] -= 1
    return config


def _waves(rows: int, n: int, height: int, width: int) -> int:
    return -(-(-(-rows // height) * -(-n // width)) // _processors())
