"""Ragged attention over the paged KV cache."""

from penstock.kernels.attention.api import move_kv, paged_attention
from penstock.kernels.attention.layout import KV_LAYOUT, Scales, allocate_cache, read_kv, write_kv

__all__ = ["KV_LAYOUT", "Scales", "allocate_cache", "move_kv", "paged_attention", "read_kv", "write_kv"]
