"""Blocks of quantised numbers as GGUF files hold them: what their bytes mean.

What it is: for each form, the values in float32 (`widened`), and for those without a minimum a block the codes and scales of a Scheme
(`quantised`). d, m are 16-bit floats, q the codes, by the file format's own definition:

    Q8_0          w = d q                     32 values, q int8
    Q4_0, Q5_0    w = d (q - 8), d (q - 16)   32 values; the low half of byte i is value i, the high half value i + 16; fifth bits apart
    Q4_1, Q5_1    w = d q + m
    Q4_K, Q5_K    w = (d s) q - (m t)         256 values in 8 groups, s and t 6-bit numbers of a group
    Q2_K          w = (d s) q - (m t)         256 values in 16 groups, s and t 4-bit numbers
    Q3_K          w = (d s) (q - 4)           256 values in 16 groups, s a 6-bit number less 32; third bits apart
    Q6_K          w = (d s) (q - 32)          256 values in 16 groups, s int8

What it does not know: files, devices, names of tensors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from penstock.kernels.linear.scheme import Quantised, Scheme, pack_nibbles
from penstock.plugins.gguf.types import FORMS

Tensor = torch.Tensor
SCHEMES = {
    "Q8_0": Scheme("int8", 32),
    "Q4_0": Scheme("int4", 32),
    "Q5_0": Scheme("int8", 32),
    "Q3_K": Scheme("int8", 16),
    "Q6_K": Scheme("int8", 16),
}
"""Forms that are a Scheme; the others have a minimum a block, which no zero point is."""
BLOCKS = {form.name: form for form in FORMS.values()}
AT_ONCE = 1 << 22
"""Values that are widened in one go, so that what is needed in between stays small."""


def widened(form: str, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes [N, bytes of a row] uint8 -> [N, K], computed in float32 and rounded once to `dtype`. Raises ValueError where a block's numbers are not finite."""
    block = BLOCKS[form]
    n, k = rows.shape[0], rows.shape[1] // block.nbytes * block.values
    out = torch.empty(n, k, dtype=dtype, device=rows.device)
    step = max(1, AT_ONCE // k)
    for start in range(0, n, step):
        part = rows[start : start + step]
        wide = WIDE[form](part.reshape(part.shape[0], -1, block.nbytes)).flatten(1)
        if not bool(torch.isfinite(wide).all()):
            raise ValueError("holds NaN or infinite values")
        out[start : start + step] = wide
    return out


def quantised(form: str, rows: Tensor) -> Quantised:
    """A matrix of one of SCHEMES, from its bytes as in `widened`. Raises ValueError where scales are not finite."""
    block, scheme = BLOCKS[form], SCHEMES[form]
    blocks = rows.view(rows.shape[0], -1, block.nbytes)
    codes, scales = CODES[form](blocks)
    if not bool(torch.isfinite(scales).all()):
        raise ValueError("holds NaN or infinite scales")
    data = pack_nibbles(codes) if scheme.kind == "int4" else codes.to(torch.int8)
    return Quantised(scheme, rows.shape[0], codes.shape[1], data.contiguous(), scales.contiguous())


def _half(blocks: Tensor, start: int) -> Tensor:
    """A 16-bit float of each block: [N, B, 1] float16."""
    return blocks[..., start : start + 2].contiguous().view(torch.float16)


def _split(packed: Tensor, *sizes: int) -> Tensor:
    """[N, B, bytes] -> [N, B, *sizes]."""
    return packed.reshape(*packed.shape[:2], *sizes)


def _nibbles(packed: Tensor) -> Tensor:
    """[N, B, bytes] -> [N, B, 2 * bytes]: all low halves, then all high ones."""
    return torch.cat((packed & 15, packed >> 4), 2)


def _fifth(blocks: Tensor, start: int) -> Tensor:
    """32 bits of each block, in place for fifth bits: [N, B, 32] of 0 or 16."""
    bits = blocks[..., start : start + 4, None] >> torch.arange(8, dtype=torch.uint8, device=blocks.device)
    return (bits & 1).flatten(2) << 4


def _q8_0(blocks: Tensor) -> tuple[Tensor, Tensor]:
    return blocks[..., 2:].contiguous().view(torch.int8).flatten(1), _half(blocks, 0).flatten(1)


def _q4_0(blocks: Tensor) -> tuple[Tensor, Tensor]:
    return _nibbles(blocks[..., 2:]).flatten(1), _half(blocks, 0).flatten(1)


def _q5_0(blocks: Tensor) -> tuple[Tensor, Tensor]:
    codes = _nibbles(blocks[..., 6:]) | _fifth(blocks, 2)
    return (codes.to(torch.int8) - 16).flatten(1), _half(blocks, 0).flatten(1)


def _pairs(packed: Tensor) -> Tensor:
    """64 bytes, 32 for four runs of 32 two-bit numbers: [N, B, 256]."""
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=packed.device)[:, None]
    return ((_split(packed, 2, 1, 32) >> shifts) & 3).flatten(2)


def _q3_k(blocks: Tensor) -> tuple[Tensor, Tensor]:
    bits = torch.arange(8, dtype=torch.uint8, device=blocks.device)[:, None]
    third = ((blocks[..., None, :32] >> bits) & 1).flatten(2) << 2
    codes = (_pairs(blocks[..., 32:96]) | third).to(torch.int8) - 4
    low, high = blocks[..., 96:104], blocks[..., None, 104:108]
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=blocks.device)[:, None]
    sixes = _nibbles(low) | (((high >> shifts) & 3).flatten(2) << 4)
    scales = _half(blocks, 108).float() * (sixes.to(torch.int8) - 32).float()
    return codes.flatten(1), scales.flatten(1)


def _q6_k(blocks: Tensor) -> tuple[Tensor, Tensor]:
    low = _split(blocks[..., :128], 2, 1, 64)  # two halves of 128 values: 64 bytes of low bits, 32 bytes of two high bits
    low = torch.cat((low & 15, low >> 4), 3).flatten(2)  # the values in order: all low halves of 64 bytes, then all high ones
    codes = (low | (_pairs(blocks[..., 128:192]) << 4)).to(torch.int8) - 32
    scales = _half(blocks, 208).float() * blocks[..., 192:208].contiguous().view(torch.int8).float()
    return codes.flatten(1), scales.flatten(1)


CODES: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {"Q8_0": _q8_0, "Q4_0": _q4_0, "Q5_0": _q5_0, "Q3_K": _q3_k, "Q6_K": _q6_k}


def _scaled(form: str) -> Callable[[Tensor], Tensor]:
    scheme = SCHEMES[form]

    def wide(blocks: Tensor) -> Tensor:
        codes, scales = CODES[form](blocks)
        values = codes.float() - (8 if scheme.kind == "int4" else 0)
        return values.reshape(values.shape[0], -1, scheme.group) * scales.float()[..., None]

    return wide


def _q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0).float() * _nibbles(blocks[..., 4:]).float() + _half(blocks, 2).float()


def _q5_1(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[..., 8:]) | _fifth(blocks, 4)
    return _half(blocks, 0).float() * codes.float() + _half(blocks, 2).float()


def _q2_k(blocks: Tensor) -> Tensor:
    fours = blocks[..., :16]
    scale, least = _half(blocks, 80).float() * (fours & 15).float(), _half(blocks, 82).float() * (fours >> 4).float()
    codes = _split(_pairs(blocks[..., 16:80]), 16, 16)
    return (scale[..., None] * codes.float() - least[..., None]).flatten(2)


def _sixes(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The scales and minima of 8 groups, 6 bits each, of 12 bytes: [N, B, 8] twice."""
    first, second, last = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scales = torch.cat((first & 63, (last & 15) | ((first >> 6) << 4)), 2)
    minima = torch.cat((second & 63, (last >> 4) | ((second >> 6) << 4)), 2)
    return scales, minima


def _grouped(blocks: Tensor, codes: Tensor) -> Tensor:
    """(d s) q - (m t) for codes [N, B, 8, 32]."""
    scales, minima = _sixes(blocks[..., 4:16])
    scale, least = _half(blocks, 0).float() * scales.float(), _half(blocks, 2).float() * minima.float()
    return (scale[..., None] * codes.float() - least[..., None]).flatten(2)


def _halves(packed: Tensor) -> Tensor:
    """128 bytes, 32 for two groups: [N, B, 8, 32]."""
    pairs = _split(packed, 4, 1, 32)
    return torch.cat((pairs & 15, pairs >> 4), 3).flatten(2, 3)


def _q4_k(blocks: Tensor) -> Tensor:
    return _grouped(blocks, _halves(blocks[..., 16:]))


def _q5_k(blocks: Tensor) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)[:, None]
    fifth = ((blocks[..., None, 16:48] >> shifts) & 1) << 4
    return _grouped(blocks, _halves(blocks[..., 48:]) | fifth)


WIDE: dict[str, Callable[[Tensor], Tensor]] = {
    **{form: _scaled(form) for form in CODES},
    "Q4_1": _q4_1,
    "Q5_1": _q5_1,
    "Q2_K": _q2_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
}
