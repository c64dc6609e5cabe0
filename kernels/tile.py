"""What the Triton kernels share: rounding that is the same under the interpreter, and sizes. Imports triton: import it only from triton.py files."""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, disable-error-code="no-any-return"

import triton
import triton.language as tl

from penstock.kernels.gpu import interpreting

INTERPRETED = tl.constexpr(interpreting())


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


def power(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << max(0, size - 1).bit_length()
