"""What a quantised weight is: one form for every file format and every device.

What it is: `Scheme`, how the numbers of a weight were made fewer; `Quantised`, its tensors; `dequantise`, the truth in float32; `quantise`, rounding to
the nearest (RTN). Element [n, k] of the weight is

    w[n, k] = (value(data[n, j]) - zeros[n, j // group]) * scales[n // rows, j // group],   k = perm[j] (without perm: k = j)

where `value` is the integer itself ("int4", "int8"), or the number that an 8-bit or 4-bit code means: E4M3 and E5M2 (Micikevicius et al. 2022,
arXiv 2209.05433), E2M1 with a power of two a group of 32 ("mxfp4", OCP Microscaling Formats 1.0), and the 16 quantiles of a normal distribution ("nf4",
Dettmers et al. 2023, arXiv 2305.14314). Readers of checkpoints make this of their own layouts, devices make their own layouts of it.
What it does not know: files, devices, kernels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from penstock.kernels.checks import require

Tensor = torch.Tensor

KINDS = ("int4", "int8", "fp8_e4m3", "fp8_e5m2", "nf4", "fp4")
NIBBLES = ("int4", "nf4", "fp4")
"""Kinds of which two lie in one byte."""
FP8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Values of the sixteen codes of "fp4": sign, two bits of exponent, one of mantissa."""
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
"""Values of the sixteen codes of "nf4", as appendix E of its paper lists them."""
SMALLEST = 1e-12
"""Scales are at least this: a group of zeros stays zeros."""

PART = 1 << 26
"""Elements that are rounded at once."""


class Scheme(NamedTuple):
    """How a weight [N, K] is stored."""

    kind: str
    """One of KINDS."""
    group: int = 0
    """Inputs that share a scale; 0: all of a row."""
    rows: int = 1
    """Outputs that share a scale; 0: all."""
    zeros: bool = False
    """The codes have a zero point a group ("int4" and "int8" only; without, the zero of "int4" is 8, that of "int8" 0)."""
    permuted: bool = False
    """The columns are stored in another order than the inputs (GPTQ's act-order)."""
    activations: str = ""
    """"": inputs are taken as they come; "token": they are rounded to the weight's kind with a scale of their own a row; "tensor": with a fixed scale."""

    @property
    def bits(self) -> int:
        """Of a code."""
        return 4 if self.kind in NIBBLES else 8

    @property
    def dtype(self) -> torch.dtype:
        """Of `data`."""
        return FP8.get(self.kind, torch.int8 if self.kind == "int8" else torch.uint8)

    def groups(self, k: int) -> int:
        """Scales along a row of k inputs."""
        return -(-k // self.group) if self.group else 1

    def scale_rows(self, n: int) -> int:
        """Scales along a column of n outputs."""
        return -(-n // self.rows) if self.rows else 1

    def nbytes(self, n: int, k: int, scale_bytes: int = 4) -> int:
        """Of a weight [n, k] in this form."""
        scales = self.scale_rows(n) * self.groups(k)
        return n * -(-k * self.bits // 8) + scales * scale_bytes + (scales * 2 if self.zeros else 0) + (4 * k if self.permuted else 0)


class Quantised(NamedTuple):
    """A weight [n, k] as its scheme says. All tensors are contiguous and lie on one device."""

    scheme: Scheme
    n: int
    k: int
    data: Tensor
    """[n, k] of the scheme's dtype, or [n, ceil(k / 2)] uint8: column j is the low half of byte j // 2 if j is even, the high half if it is odd."""
    scales: Tensor
    """[scale_rows, groups], floating, finite."""
    zeros: Tensor | None = None
    """[scale_rows, groups] int16."""
    perm: Tensor | None = None
    """[k] int32: column j holds input perm[j]."""
    input_scale: Tensor | None = None
    """[] float32, with activations "tensor": an input is code * input_scale."""

    @property
    def nbytes(self) -> int:
        """Held for it."""
        return sum(t.nbytes for t in (self.data, self.scales, self.zeros, self.perm, self.input_scale) if t is not None)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes 0..15 [N, K] -> [N, ceil(K / 2)] uint8."""
    codes = codes.to(torch.uint8)
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_nibbles(data: Tensor, k: int) -> Tensor:
    """The reverse: [N, K] uint8."""
    return torch.stack((data & 15, data >> 4), dim=2).flatten(1)[:, :k]


def codes_to_values(kind: str, data: Tensor, k: int) -> Tensor:
    """What the codes mean, float32 [N, K], without zero points and scales (of "int4" without zero points: minus 8)."""
    if kind in NIBBLES:
        codes = unpack_nibbles(data, k)
        if kind == "int4":
            return codes.float()
        table = torch.tensor(NF4 if kind == "nf4" else E2M1, device=data.device)
        return table[codes.long()]
    return data.float()


def dequantise(q: Quantised, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [n, k], computed in float32 and rounded once to `dtype`."""
    s = q.scheme
    values = codes_to_values(s.kind, q.data, q.k)
    scales = _spread(q.scales.float(), s, q.n, q.k)
    if q.zeros is not None:
        values = values - _spread(q.zeros.float(), s, q.n, q.k)
    elif s.kind == "int4":
        values = values - 8
    wide = values * scales
    if q.perm is not None:
        wide = torch.empty_like(wide).index_copy_(1, q.perm.long(), wide)
    return wide.to(dtype)


def _spread(blocks: Tensor, scheme: Scheme, n: int, k: int) -> Tensor:
    """One value a block -> one an element [n, k]."""
    if scheme.rows != 1 and blocks.shape[0] > 1:
        blocks = blocks.repeat_interleave(scheme.rows, 0)[:n]
    if scheme.group and blocks.shape[1] > 1:
        blocks = blocks.repeat_interleave(scheme.group, 1)[:, :k]
    return blocks.expand(n, k)


def quantise(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype = torch.float32, scales: Tensor | None = None) -> Quantised:
    """Round a weight [N, K], floating and finite, to the nearest codes. Symmetric schemes reach to the largest magnitude of a block, or have the `scales`
    that are given; those with zero points reach from its least to its largest value, zero included. Raises ValueError for a weight with NaN or infinity."""
    require(weight.dim() == 2 and weight.is_floating_point(), "a weight is [N, K], floating")
    n, k = weight.shape
    part = max(1, PART // max(1, k) // max(1, scheme.rows)) * scheme.rows
    if 0 < part < n:  # a dozen float32 copies of a part at most: a device that holds little more than the codes can still make them
        parts = []
        for at in range(0, n, part):
            own = scales if scales is None or len(scales) == 1 else scales[at // scheme.rows : -(-(at + part) // scheme.rows)]
            parts.append(quantise(weight[at : at + part], scheme, scale_dtype, own))
        zeros = torch.cat([q.zeros for q in parts if q.zeros is not None]) if scheme.zeros else None
        made = scales if scales is not None and len(scales) == 1 else torch.cat([q.scales for q in parts])
        return Quantised(scheme, n, k, torch.cat([q.data for q in parts]), made.contiguous(), zeros)
    wide = weight.float()
    if not bool(torch.isfinite(wide).all()):
        raise ValueError("the weight holds NaN or infinite values")
    blocks = _blocks(wide, scheme)  # [scale_rows, groups, elements]
    zeros = None
    if scheme.zeros:
        require(scheme.kind in ("int4", "int8"), "only integers have zero points")
        low, high = blocks.amin(2).clamp_max(0), blocks.amax(2).clamp_min(0)
        span, least = ((15, 0), (255, -128))[scheme.kind == "int8"]
        scales = ((high - low) / span).clamp_min(SMALLEST).to(scale_dtype)
        zeros = (least - low / scales.float()).round().clamp(least, least + span).to(torch.int16)
    elif scales is None:
        scales = _scales(blocks.abs().amax(2), scheme.kind).to(scale_dtype)
    ratio = wide / _spread(scales.float(), scheme, n, k)
    if zeros is not None:
        ratio = ratio + _spread(zeros.float(), scheme, n, k)
    elif scheme.kind == "int4":
        ratio = ratio + 8
    return Quantised(scheme, n, k, _codes(ratio, scheme.kind).contiguous(), scales.contiguous(), zeros)


def _scales(largest: Tensor, kind: str) -> Tensor:
    """For the largest magnitudes of blocks."""
    if kind == "fp4":  # a power of two: the largest exponent of E2M1 is 2
        return torch.exp2(torch.floor(torch.log2(largest.clamp_min(2.0**-100))) - 2)
    top = {"int4": 7.5, "int8": 127.0, "fp8_e4m3": 448.0, "fp8_e5m2": 57344.0, "nf4": 1.0}[kind]
    return (largest / top).clamp_min(SMALLEST)


def nearest(ratio: Tensor, kind: str) -> Tensor:
    """What numbers [N, K], already divided by their scales, become in a scheme without zero points: float32."""
    raised = 8 if kind == "int4" else 0
    return codes_to_values(kind, _codes(ratio + raised, kind), ratio.shape[1]) - raised


def _codes(ratio: Tensor, kind: str) -> Tensor:
    if kind == "int4":
        return pack_nibbles(ratio.round().clamp(0, 15))
    if kind == "int8":
        return ratio.round().clamp(-128, 127).to(torch.int8)
    if kind in FP8:
        top = torch.finfo(FP8[kind]).max
        return ratio.clamp(-top, top).to(FP8[kind])
    table = torch.tensor(NF4 if kind == "nf4" else E2M1[:8], device=ratio.device)
    seen = ratio if kind == "nf4" else ratio.abs()
    codes = torch.bucketize(seen, (table[1:] + table[:-1]) / 2)
    if kind == "fp4":
        codes = codes + 8 * (ratio < 0)
    return pack_nibbles(codes)


def _blocks(wide: Tensor, scheme: Scheme) -> Tensor:
    """[scale_rows, groups, elements of a block], padded with zeros."""
    n, k = wide.shape
    rows, group = scheme.rows or n, scheme.group or k
    down, across = scheme.scale_rows(n), scheme.groups(k)
    padded = torch.nn.functional.pad(wide, (0, across * group - k, 0, down * rows - n))
    return padded.view(down, rows, across, group).permute(0, 2, 1, 3).reshape(down, across, rows * group)
