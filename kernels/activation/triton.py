"""Gated activations in Triton; formula and roundings as in reference.py (Shazeer 2020, arXiv:2002.05202), one pass over memory.

out = round(round(act(gate)) * up),   gate = x[:, :I], up = x[:, I:]
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, disable-error-code="no-any-return"

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.checks import require
from penstock.kernels.gpu import chained, tuned
from penstock.kernels.tile import follow, launched, narrow, power

KINDS = ("silu", "gelu_tanh", "gelu")


@triton.jit
def activate(gate, KIND: tl.constexpr):
    """act(gate), float32."""
    if KIND == 0:
        y = gate / (1.0 + tl.exp(-gate))
    elif KIND == 1:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        y = gate / (1.0 + tl.exp(-2.0 * inner))  # 1 + tanh(a) = 2 / (1 + exp(-2a)), without cancellation
    else:
        y = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    return y


@launched
def _gated(x, out, width, stride, KIND: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Grid (T, ceil(I / BLOCK))."""
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(x + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * stride + width + at, mask=inside, other=0.0).to(tl.float32)
    y = narrow(activate(gate, KIND), x.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + at, narrow(y * up, out.dtype.element_ty), mask=inside)


def gated(kind: str, gate_up: Tensor, out: Tensor | None = None, *, config: dict[str, int] | None = None) -> Tensor:
    """gate_up [T, 2I] to [T, I]; kind "silu", "gelu_tanh" or "gelu"."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    require(
        kind in KINDS and gate_up.shape[1] == 2 * width and gate_up.stride(1) == 1, "gate_up must be [T, 2I] and kind one of " + str(KINDS)
    )
    out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device) if out is None else out
    require(out.shape == (rows, width) and out.is_contiguous(), "out must be contiguous, [T, I]")
    if rows:
        config = dict(config or tuned("gated"))
        block = min(config.pop("BLOCK"), power(width))
        _gated[(rows, -(-width // block))](
            gate_up, out, width, gate_up.stride(0), KIND=KINDS.index(kind), BLOCK=block, **chained(), **config
        )
    return out
