"""Split of the fused QKV row, per-head norm, rotary embedding, and the write of K and V into the paged cache."""

from penstock.kernels.rope.api import rope_and_cache

__all__ = ["rope_and_cache"]
