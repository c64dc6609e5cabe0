"""What a whole-step program is made of: weights, caches and sizes of a Llama-like decoder.

What it is: two plain records, given by the checked entry to the C program and to its reference alike.
What it does not know: how a step is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from penstock.kernels.attention.layout import Scales
from penstock.kernels.linear import PackedGated, PackedLinear


@dataclass(frozen=True, eq=False)
class DecoderLayer:
    """One layer's weights. qkv: [(Hq + 2 Hkv) * D, H]; window: 0 for full attention."""

    attn_norm: Tensor
    qkv: PackedLinear
    o: PackedLinear
    mlp_norm: Tensor
    gate_up: PackedGated
    down: PackedLinear
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    window: int = 0


@dataclass(frozen=True, eq=False)
class DecoderParts:
    """A model bound to its caches. embedding [V, H]; final_norm [H]; cos_sin [P, r] float32; one K and one V cache a layer,
    and, where they hold codes, the scales of each."""

    embedding: Tensor
    layers: list[DecoderLayer]
    final_norm: Tensor
    lm_head: PackedLinear
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    scale: float
    cos_sin: Tensor
    k_caches: list[Tensor]
    v_caches: list[Tensor]
    scales: list[Scales | None]
