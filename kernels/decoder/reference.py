"""The decoder step as a composition of the separate operations: what the fused program must equal, bit for bit.

    x = embedding[ids]
    per layer:  x += o(attention(rope(qkv(norm(x)))));  x += down(gated(norm(x)))
    hidden = final_norm(x)[rows];  logits = lm_head(hidden)
    taps: x in front of a layer; behind the last one x[rows]

Pre-norm Llama blocks (Touvron et al. 2023, arXiv:2302.13971); optional QKV bias (Qwen2) and per-head norms (Qwen3).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from penstock.kernels.attention import paged_attention
from penstock.kernels.decoder.parts import DecoderParts
from penstock.kernels.embedding import embedding
from penstock.kernels.rmsnorm import rms_norm
from penstock.kernels.rope import rope_and_cache


def hidden_states(
    parts: DecoderParts,
    tokens: Tensor,
    positions: Tensor,
    slots: Tensor,
    block_tables: Tensor,
    q_start: Tensor,
    kv_len: Tensor,
    rows: Tensor,
    taps: Mapping[int, Tensor] | None = None,
    given: tuple[Tensor, Tensor] | None = None,
    ancestors: Tensor | None = None,
) -> Tensor:
    """Normalised last hidden states [L, H] of token rows `rows`. `taps`: by layer, where the stream in front of it goes, [T, H]. `given`: x, and what the first layer reads."""
    x, taps = embedding(tokens, parts.embedding) if given is None else given[0], taps or {}
    caches = zip(parts.layers, parts.k_caches, parts.v_caches, parts.scales, strict=True)
    for index, (layer, k_cache, v_cache, scales) in enumerate(caches):
        if index in taps:
            taps[index].copy_(x)
        qkv = layer.qkv(rms_norm(x, layer.attn_norm, parts.eps) if given is None or index else given[1])
        q = rope_and_cache(
            qkv, positions, parts.cos_sin, k_cache, v_cache, slots, parts.num_heads, parts.num_kv_heads,
            layer.q_norm, layer.k_norm, parts.eps, None, scales,
        )  # fmt: skip
        attended = paged_attention(q, k_cache, v_cache, block_tables, q_start, kv_len, parts.scale, layer.window, None, scales, ancestors)
        x = x + layer.o(attended.view(tokens.shape[0], -1))
        x = x + layer.down(layer.gate_up(rms_norm(x, layer.mlp_norm, parts.eps)))
    wanted = x[rows.long()].contiguous()
    if len(parts.layers) in taps:
        taps[len(parts.layers)][: len(wanted)].copy_(wanted)
    return rms_norm(wanted, parts.final_norm, parts.eps)


def logits(parts: DecoderParts, hidden: Tensor) -> Tensor:
    """[L, V] float32."""
    return parts.lm_head(hidden, out_dtype=torch.float32)
