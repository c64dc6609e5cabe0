"""What the Triton kernels share: launches that may only compile, rounding that is the same under the interpreter, chained launches, and sizes.
Imports triton: import it only from triton.py files."""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, disable-error-code="no-any-return,misc"

import triton
import triton.language as tl

from penstock.kernels import gpu

INTERPRETED = tl.constexpr(gpu.interpreting())


class _Launched(triton.JITFunction):
    def run(self, *args, grid, warmup, **options):
        """Launch, or only compile where `gpu.compile_only` says so."""
        return super().run(*args, grid=grid, warmup=warmup or gpu.compiling(), **options)


def launched(function=None, **options):
    """Marks a kernel that is launched (triton.jit: one that others call). Options as triton.jit's."""
    if function is None:
        return lambda function: launched(function, **options)
    return triton.jit(function, **options) if gpu.interpreting() else _Launched(function, **options)


@triton.jit
def narrow(x, like: tl.constexpr):
    """float32 x rounded to nearest even in dtype `like` (the interpreter would truncate a plain cast to bfloat16)."""
    if like == tl.float32:
        return x
    elif INTERPRETED and like == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return bits.to(tl.float32, bitcast=True).to(like)
    else:
        return x.to(like)


@triton.jit
def follow(PDL: tl.constexpr):
    """Begin a kernel that was launched with `chained()`: let the next one in the stream take its place on the device already, then wait until
    the one before has finished and its writes can be seen (programmatic dependent launch, CUDA programming guide). Every program calls it
    before it reads or writes anything that another kernel touches; since each kernel waits so, finished means that all before it are."""
    make_room(PDL)
    wait(PDL)


@triton.jit
def make_room(PDL: tl.constexpr):
    """The first half of `follow`."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """The second half. Between the two a kernel may read constants, and a step's index tensors: those are written by launches that are not chained,
    which have ended before any chained kernel behind them begins. It reads them past the first-level cache (.cg), which may still hold
    what the last step's kernel saw at the same address."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def fetch_ahead(pointers):
    """Ask for the cache lines of these addresses to be brought into L2; nothing waits for them."""
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def swizzled(program, down, across, GROUP: tl.constexpr):
    """(row, column) of a program's tile among down x across: GROUP rows of tiles, column by column, then the next, so that what they share stays in L2."""
    width = GROUP * across
    group = program // width
    height = tl.minimum(down - group * GROUP, GROUP)
    return group * GROUP + (program % width) % height, (program % width) // height


def power(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << max(0, size - 1).bit_length()
