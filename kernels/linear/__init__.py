"""Linear layers over packed weights, plain and gated."""

from penstock.kernels.linear.api import PackedGated, PackedLinear, pack, pack_gated

__all__ = ["PackedGated", "PackedLinear", "pack", "pack_gated"]
