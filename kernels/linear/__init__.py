"""Linear layers over packed weights, plain and gated, wide and quantised."""

from penstock.kernels.linear.api import PackedGated, PackedLinear, pack, pack_gated
from penstock.kernels.linear.quantised import PackedQuantised, PackedQuantisedGated, pack_quantised, pack_quantised_gated

__all__ = [
    "PackedGated",
    "PackedLinear",
    "PackedQuantised",
    "PackedQuantisedGated",
    "pack",
    "pack_gated",
    "pack_quantised",
    "pack_quantised_gated",
]
