"""The CPU cache's layout: how a key or value element lies inside its block.

What it is: allocation, and slow torch readers and writers for tests, tools and the reference kernels. A cache tensor of one layer is
declared [num_blocks, Hkv, block_size, D]; block_size and D are multiples of 16. A block is contiguous; from one to the next it may be
further (a pool's block holds those of all layers, one behind the other). Inside a (block, head) the bytes are in *panel order*,
the order of the packed weights of `kernels.linear`, so that q @ K^T and p @ V run on the linear layers' micro-kernel: with il = 2
elements interleaved for bfloat16 (il = 1 for float32 and codes) and groups of 16 keys,

    K: [block_size/16][D/il][16 keys][il]                 V: [block_size/16][D/16][16/il keys][16 dims][il keys]

Blocks stay whole: copying, swapping or hashing whole blocks needs no knowledge of the order.

A cache of eight bits holds codes (attention/codes.py) in the same order, and elsewhere in the same pages lie their scales, `Scales`.
What it does not know: attention, block tables, who owns a block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from penstock.kernels.attention.codes import KINDS, decode, encode, round_up
from penstock.kernels.checks import blocks, require
from penstock.kernels.native.bind import FORMATS, Layer, Program

KV_LAYOUT = "cpu-panel16-v1"
"""Name of this layout, part of the KV identity key."""
GROUP = 16


class Scales(NamedTuple):
    """Of a layer's two caches of codes."""

    kind: str
    """What their codes are: of codes.KINDS."""
    k: Tensor
    """[num_blocks, Hkv, block_size] bfloat16, as far from block to block as the caches."""
    v: Tensor
    fixed: tuple[float, float] | None = None
    """Scales of keys and values that every token gets; None: each token and head its own."""


def allocate_cache(num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """One layer's K or V cache, not initialised (unwritten slots are never read)."""
    require(block_size % GROUP == 0 and head_dim % GROUP == 0, "block_size and head_dim must be multiples of 16")
    return torch.empty(num_blocks, num_kv_heads, block_size, head_dim, dtype=dtype)


def check_cache(k_cache: Tensor, v_cache: Tensor, num_kv_heads: int, dtype: torch.dtype, scales: Scales | None = None) -> None:
    """Raises ValueError unless both are caches of the same shape, of `dtype` or of codes with their scales, with as far from block to block."""
    blocks("k_cache", k_cache, (None, num_kv_heads, None, None), dtype if scales is None else torch.uint8)
    if scales is not None:
        require(scales.kind in KINDS, f"a cache's codes must be {', '.join(KINDS)}, not {scales.kind}")
        for name, value in (("the keys' scales", scales.k), ("the values' scales", scales.v)):
            blocks(name, value, k_cache.shape[:3], torch.bfloat16)
            alike = value.shape[0] == 1 or block_bytes(value) == block_bytes(k_cache)  # of one block strides say nothing
            require(alike, f"{name} must be as far from block to block as the caches")
    blocks("v_cache", v_cache, k_cache.shape, k_cache.dtype)
    require(k_cache.stride() == v_cache.stride(), "the caches must have the same strides")
    require(k_cache.shape[2] % GROUP == 0 and k_cache.shape[3] % GROUP == 0, "block_size and head_dim must be multiples of 16")


def block_bytes(cache: Tensor) -> int:
    """From the beginning of one block to that of the next."""
    return cache.stride(0) * cache.element_size()


def describe(program: Program, layer: Layer, k_cache: Tensor, v_cache: Tensor, scales: Scales | None) -> None:
    """Fill in what the C side must know of a layer's caches."""
    program.blocks, program.block_size, program.block_bytes = k_cache.shape[0], k_cache.shape[2], block_bytes(k_cache)
    layer.k_cache, layer.v_cache = k_cache.data_ptr(), v_cache.data_ptr()
    if scales is not None:
        program.kv_format = FORMATS[scales.kind]
        layer.k_scales, layer.v_scales = scales.k.data_ptr(), scales.v.data_ptr()
        if scales.fixed is not None:
            layer.k_fixed, layer.v_fixed = round_up(torch.tensor(scales.fixed)).tolist()


def _interleaved(cache: Tensor) -> int:
    return 2 if cache.element_size() == 2 else 1


def _k_view(cache: Tensor) -> Tensor:
    blocks, heads, size, dim = cache.shape
    il = _interleaved(cache)
    return cache.view(blocks, heads, size // GROUP, dim // il, GROUP, il).permute(0, 2, 4, 1, 3, 5)  # block, group, key, head, dim/il, il


def _v_view(cache: Tensor) -> Tensor:
    blocks, heads, size, dim = cache.shape
    il = _interleaved(cache)
    panels = cache.view(blocks, heads, size // GROUP, dim // GROUP, GROUP // il, GROUP, il)
    return panels.permute(0, 2, 4, 6, 1, 3, 5)  # block, group, key/il, il, head, dim/16, 16


def write_kv(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor, scales: Scales | None = None) -> None:
    """k, v [T, Hkv, D] into slots [T] (below 0: skipped)."""
    keep = slots >= 0
    slots, k, v = slots[keep].long(), k[keep], v[keep]
    size, dim = k_cache.shape[2], k_cache.shape[3]
    block, group, key = slots // size, slots % size // GROUP, slots % GROUP
    if scales is not None:
        fixed = scales.fixed or (None, None)
        k, scales.k[block, :, slots % size] = encode(k, scales.kind, fixed[0])
        v, scales.v[block, :, slots % size] = encode(v, scales.kind, fixed[1])
    k_view, v_view = _k_view(k_cache), _v_view(v_cache)
    il = k_view.shape[-1]
    k_view[block, group, key] = k.reshape(*k.shape[:2], dim // il, il)
    v_view[block, group, key // il, key % il] = v.reshape(*v.shape[:2], dim // GROUP, GROUP)


def copy_entry(k_cache: Tensor, v_cache: Tensor, source: int, target: int) -> None:
    """The key and the value at one place as they are stored, codes or not, to another."""
    (a, i), (b, j) = divmod(source, k_cache.shape[2]), divmod(target, k_cache.shape[2])
    k, v = _k_view(k_cache), _v_view(v_cache)
    il = k.shape[-1]
    k[b, j // GROUP, j % GROUP] = k[a, i // GROUP, i % GROUP].clone()
    v[b, j // GROUP, j % GROUP // il, j % il] = v[a, i // GROUP, i % GROUP // il, i % il].clone()


def read_kv(cache: Tensor, slots: Tensor, *, values: bool, scales: Scales | None = None) -> Tensor:
    """The keys (or, with `values`, the values) at slots [T]: [T, Hkv, D]; of codes, float32."""
    slots = slots.long()
    size, dim = cache.shape[2], cache.shape[3]
    block, group, key = slots // size, slots % size // GROUP, slots % GROUP
    if values:
        view = _v_view(cache)
        il = view.shape[3]
        found = view[block, group, key // il, key % il].reshape(len(slots), cache.shape[1], dim)
    else:
        found = _k_view(cache)[block, group, key].reshape(len(slots), cache.shape[1], dim)
    if scales is None:
        return found
    return decode(found, (scales.v if values else scales.k)[block, :, slots % size], scales.kind)
