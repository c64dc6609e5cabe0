"""A quantised weight in the order in which the Triton kernels read it.

What it is: `Weight`, `allocate` and `fill`, which puts what a reader gave (kernels/linear/scheme.py) there. Two orders:

- fragments (kernels/quantised/fragments.py): tiles of 128 rows; a tile is a run of units, of 64 columns of 4-bit codes or 32 of 8-bit ones, each 4096 bytes: 16 for each
  of 32 threads of each of 8 groups of 16 rows. In such a group thread 4 g + t has rows g and g + 8 and of each 16 columns 2 t, 2 t + 1, 2 t + 8 and 2 t + 9: what the
  instructions mma.m16n8k16 and wgmma want of the registers of their first operand (PTX ISA, "matrix fragments"). Byte by byte: [16 columns][8 columns][row g or g + 8]
  [even or odd column]. A byte of two codes has column j of the unit in its low half and column 32 + j in its high half. Scales and zero points lie by tile, group, row.
- steps (kernels/quantised/triton.py, kernels/w8a8): tiles of 64 rows, of 8-bit codes 128, and one step of C bytes of the K axis, row by row, the steps of a tile one behind
  the other. A byte of two codes has column j of the step and column C + j. It is for weights whose inputs may be rounded, too, and for groups of 16.

Rows of gate and up alternate in a gated layer. What lies behind the last row or input is zeros, and scales of 1.
What it does not know: the kernels' arithmetic, layers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from penstock.kernels.checks import require
from penstock.kernels.linear.scheme import NIBBLES, Quantised, Scheme, unpack_nibbles

KINDS = ("int8", "int4", "fp8_e4m3", "fp4", "nf4", "fp8_e5m2")
"""Kinds of codes that the kernels widen; their places are the kernels' KIND."""
TILES = {4: 64, 8: 128}
"""Rows of the weight that lie together in the order by steps, by bits of a code."""
COLUMNS = 128
"""Most columns that are read at once."""
ROWS_OF_TILE, LINE = 128, 32
"""Rows of a tile of fragments, and lines of 128 bytes of one of its units."""


class Weight(NamedTuple):
    """A weight [n, k] in the kernel's order. Made by `allocate`, filled by `fill`."""

    scheme: Scheme
    n: int
    k: int
    columns: int
    """C of the order by steps."""
    data: Tensor
    """uint8: fragments [ceil(n / 128) * units * 32, 128], or [ceil(n / tile) * steps * tile, C]."""
    scales: Tensor
    """fragments [ceil(n / 128), groups, 128], or [groups, n]; float32, or float16, or (`tightened`) exponents as bytes: by
    pairs of groups, and of these by 16 rows, g, first or second group, row g or g + 8."""
    zeros: Tensor | None
    """As the scales, 0 to 16: float16, of fragments uint8, the rows of 16 in the order 0, 8, 1, 9 and so on."""
    fragments: bool = False

    @property
    def tile(self) -> int:
        """Rows of a tile."""
        return ROWS_OF_TILE if self.fragments else TILES[self.scheme.bits]

    @property
    def steps(self) -> int:
        """Along K."""
        return self.data.shape[0] // (-(-self.n // self.tile) * self.tile)

    @property
    def unit(self) -> int:
        """Columns of a unit of fragments."""
        return 64 if self.scheme.bits == 4 else 32

    @property
    def units(self) -> int:
        """Along K."""
        return self.data.shape[0] // (-(-self.n // ROWS_OF_TILE) * LINE)

    @property
    def exponents(self) -> bool:
        """Whether scales are 2^(byte - 127)."""
        return self.scales.dtype == torch.uint8

    def strides(self) -> tuple[int, int]:
        """Bytes from a tile of fragments to the next, and from a unit to the next."""
        return self.units * LINE * 128, LINE * 128

    def pairs(self) -> Tensor | None:
        """Zero points of fragments, two in a word of 16 bits: of rows g and g + 8."""
        return None if self.zeros is None else self.zeros.view(torch.int16)

    def plain_scales(self) -> Tensor:
        """Of fragments whose scales are exponents: by tile, group, row, float32."""
        tiles, groups, _ = self.scales.shape
        bytes_ = self.scales.view(tiles, groups // 2, 8, 8, 2, 2).permute(0, 1, 4, 2, 5, 3).reshape(tiles, groups, ROWS_OF_TILE)
        return torch.exp2(bytes_.float() - 127)

    @property
    def nbytes(self) -> int:
        """Held for it."""
        return self.data.nbytes + self.scales.nbytes + (0 if self.zeros is None else self.zeros.nbytes)


def supports(scheme: Scheme) -> bool:
    """Whether the kernels multiply such a weight."""
    group, nibble = scheme.group, scheme.kind in NIBBLES
    return (
        scheme.kind in KINDS
        and not (scheme.zeros and not nibble)
        and (group == 0 or (group >= 16 and (group & (group - 1) == 0 or group % COLUMNS == 0)))
        and (in_fragments(scheme) or scheme.kind in KINDS[:4])
    )


def in_fragments(scheme: Scheme) -> bool:
    """Whether a weight lies in fragments: not where inputs may be rounded, too, for which kernels/w8a8 has its own tiles."""
    blocks = scheme.kind == "fp8_e4m3" and scheme.group == scheme.rows == 128
    rounded_too = scheme.activations != "" and scheme.kind in ("int8", "fp8_e4m3") and (scheme.group == 0 or blocks)
    return not rounded_too and (scheme.group == 0 or scheme.group >= 32)


def allocate(scheme: Scheme, n: int, k: int, device: torch.device) -> Weight:
    """Memory for a weight."""
    require(supports(scheme), "the kernel does not multiply this scheme")
    fragments = in_fragments(scheme)
    columns = COLUMNS if fragments else min(COLUMNS, scheme.group or COLUMNS)
    width = 2 * columns if scheme.bits == 4 and not fragments else columns
    steps = -(-k // width)
    groups = -(-steps * width // scheme.group) if scheme.group else 1  # what lies behind the last input is read, and is 0
    if fragments:
        tiles = -(-n // ROWS_OF_TILE)
        data = torch.zeros(tiles * steps * (COLUMNS * scheme.bits // 32) * 4, 128, dtype=torch.uint8, device=device)
        shape: tuple[int, ...] = (tiles, groups, ROWS_OF_TILE)
    else:
        tile = TILES[scheme.bits]
        data = torch.zeros(-(-n // tile) * steps * tile, columns, dtype=torch.uint8, device=device)
        shape = (groups, n)
    scales = torch.ones(shape, dtype=torch.float32, device=device)
    zeros = torch.zeros(shape, dtype=torch.uint8 if fragments else torch.float16, device=device) if scheme.zeros else None
    return Weight(scheme, n, k, columns, data, scales, zeros, fragments)


def fill(weight: Weight, part: Quantised, first: int, every: int = 1) -> None:
    """Put rows there: row i of `part` becomes row first + i * every."""
    scheme, c, tile = weight.scheme, weight.columns, weight.tile
    device = weight.data.device
    rows = torch.arange(part.n, device=device) * every + first
    data = part.data.to(device)
    if weight.fragments:
        _fill_fragments(weight, data, part.k, rows)
    else:
        tiles = weight.data.view(-1, weight.steps, tile, c)
        if scheme.bits == 4:
            low, high = _padded(unpack_nibbles(data, part.k), 2 * c).view(part.n, -1, 2, c).unbind(2)
            tiles[rows // tile, :, rows % tile] = low | (high << 4)
        else:
            tiles[rows // tile, :, rows % tile] = _padded(data.view(torch.uint8), c).view(part.n, -1, c)
    scales = part.scales.to(device)
    for source, target in ((scales, weight.scales), (None if part.zeros is None else part.zeros.to(device), weight.zeros)):
        if source is None or target is None:
            continue
        if scheme.rows != 1:
            source = source.repeat_interleave(scheme.rows or part.n, 0)[: part.n]
        if weight.fragments:
            at = rows % tile
            if target is weight.zeros:
                at = at // 16 * 16 + at % 8 * 2 + at % 16 // 8
            target[rows // tile, : source.shape[1], at] = source.to(target.dtype)
        else:
            target[: source.shape[1], rows] = source.t().to(target.dtype)


def _fill_fragments(weight: Weight, data: Tensor, k: int, rows: Tensor) -> None:
    n, units = rows.shape[0], weight.units
    # [tile, unit, 16 rows, g, t, 16 columns, 8 columns, g or g + 8, even or odd] -> row, then what lies along it
    cells = weight.data.view(-1, units, 8, 8, 4, 2, 2, 2, 2).permute(0, 2, 7, 3, 1, 5, 6, 4, 8)
    if weight.scheme.bits == 4:
        low, high = _padded(unpack_nibbles(data, k), units * 64).view(n, units, 2, 2, 2, 4, 2).unbind(2)
        codes = low | (high << 4)
    else:
        codes = _padded(data.view(torch.uint8), units * 32).view(n, units, 2, 2, 4, 2)
    cells[rows // 128, rows % 128 // 16, rows % 16 // 8, rows % 8] = codes


def _padded(codes: Tensor, multiple: int) -> Tensor:
    return torch.nn.functional.pad(codes, (0, -codes.shape[1] % multiple))


def tightened(weight: Weight) -> Weight:
    """With scales in fewer bytes, if those hold each of them exactly; to be called when all is filled."""
    scales = weight.scales
    if weight.fragments and weight.scheme.kind == "fp4" and weight.scheme.group == 32:
        mantissa, exponent = torch.frexp(scales)
        if bool(
            ((mantissa == 0.5) & (exponent > -117) & (exponent < 122)).all()
        ):  # so far from the ends of bfloat16 that products are exact
            tiles, groups, _ = scales.shape
            bytes_ = (exponent + 126).to(torch.uint8).view(tiles, groups // 2, 2, 8, 2, 8).permute(0, 1, 3, 5, 2, 4)
            return weight._replace(scales=bytes_.reshape(tiles, groups, ROWS_OF_TILE).contiguous())
    half = scales.half()
    return weight._replace(scales=half) if torch.equal(half.float(), scales) else weight
