"""A quantised weight in the order in which the Triton kernel reads it.

What it is: `Weight`, `allocate` and `fill`, which puts what a reader gave (kernels/linear/scheme.py) there. Tiles of some rows (64, of 8-bit codes 128) and one step of the K axis are each
one run of bytes, and the steps of these rows follow one another. A step is C columns of one byte; of 4-bit codes a byte holds two, column j of the step and column C + j, so
that each half of the bytes is a contiguous run of inputs. Rows of gate and up alternate in a gated layer. What lies behind the last row or input is zeros.
What it does not know: the kernel's arithmetic, layers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from penstock.kernels.checks import require
from penstock.kernels.linear.scheme import NIBBLES, Quantised, Scheme, unpack_nibbles

KINDS = ("int8", "int4", "fp8_e4m3", "fp4")
"""Kinds of codes that the kernel widens; their places are the kernel's KIND."""
TILES = {4: 64, 8: 128}
"""Rows of the weight that lie together, by bits of a code."""
COLUMNS = 128
"""Most columns that are read at once."""


class Weight(NamedTuple):
    """A weight [n, k] in the kernel's order. Made by `allocate`, filled by `fill`."""

    scheme: Scheme
    n: int
    k: int
    columns: int
    """C of the kernel."""
    data: Tensor
    """[ceil(n / tile) * steps * tile, C] uint8: tiles of so many rows and one step, the steps of these rows one behind the other."""
    scales: Tensor
    """[groups, n] float32, or float16 (`tightened`)."""
    zeros: Tensor | None
    """[groups, n] float16: 0 to 16."""

    @property
    def tile(self) -> int:
        """Rows of a tile."""
        return TILES[self.scheme.bits]

    @property
    def steps(self) -> int:
        """Along K."""
        return self.data.shape[0] // (-(-self.n // self.tile) * self.tile)

    @property
    def nbytes(self) -> int:
        """Held for it."""
        return self.data.nbytes + self.scales.nbytes + (0 if self.zeros is None else self.zeros.nbytes)


def supports(scheme: Scheme) -> bool:
    """Whether the kernel multiplies such a weight."""
    group, nibble = scheme.group, scheme.kind in NIBBLES
    return (
        scheme.kind in KINDS
        and not (scheme.zeros and not nibble)
        and (group == 0 or (group >= 16 and (group & (group - 1) == 0 or group % COLUMNS == 0)))
    )


def allocate(scheme: Scheme, n: int, k: int, device: torch.device) -> Weight:
    """Memory for a weight."""
    require(supports(scheme), "the kernel does not multiply this scheme")
    columns = min(COLUMNS, scheme.group or COLUMNS)
    width = 2 * columns if scheme.bits == 4 else columns
    steps = -(-k // width)
    groups = -(-steps * width // scheme.group) if scheme.group else 1  # what lies behind the last input is read, and is 0
    tile = TILES[scheme.bits]
    data = torch.zeros(-(-n // tile) * steps * tile, columns, dtype=torch.uint8, device=device)
    scales = torch.zeros(groups, n, dtype=torch.float32, device=device)
    zeros = torch.zeros(groups, n, dtype=torch.float16, device=device) if scheme.zeros else None
    return Weight(scheme, n, k, columns, data, scales, zeros)


def fill(weight: Weight, part: Quantised, first: int, every: int = 1) -> None:
    """Put rows there: row i of `part` becomes row first + i * every."""
    scheme, c, tile = weight.scheme, weight.columns, weight.tile
    rows = torch.arange(part.n, device=weight.data.device) * every + first
    tiles = weight.data.view(-1, weight.steps, tile, c)
    device = weight.data.device
    data = part.data.to(device)
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
        target[: source.shape[1], rows] = source.t().to(target.dtype)


def _padded(codes: Tensor, multiple: int) -> Tensor:
    return torch.nn.functional.pad(codes, (0, -codes.shape[1] % multiple))


def tightened(weight: Weight) -> Weight:
    """With scales in float16, if that holds each of them exactly; to be called when all is filled."""
    half = weight.scales.half()
    return weight._replace(scales=half) if torch.equal(half.float(), weight.scales) else weight
