"""The decoder step as a composition of the separate operations: what the fused program must equal, bit for bit.

    x = embedding[ids]
    per layer:  x += o(attention(rope(qkv(norm(x)))));  x += down(gated(norm(x)))
    hidden = final_norm(x)[rows];  logits = lm_head(hidden)

Pre-norm Llama blocks (Touvron et al. 2023, arXiv:2302.13971); optional QKV bias (Qwen2) and per-head norms (Qwen3).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from penstock.kernels.attention import paged_attention
from penstock.kernels.embedding import embedding
from penstock.kernels.rmsnorm import rms_norm
from penstock.kernels.rope import rope_and_cache

if TYPE_CHECKING:
    from penstock.kernels.decoder.api import DecoderProgram


def hidden_states(
    program: DecoderProgram,
    tokens: Tensor,
    positions: Tensor,
    slots: Tensor,
    block_tables: Tensor,
    q_start: Tensor,
    kv_len: Tensor,
    rows: Tensor,
) -> Tensor:
    """Normalised last hidden states [L, H] of token rows `rows`."""
    x = embedding(tokens, program.embedding)
    for layer, k_cache, v_cache in zip(program.layers, program.k_caches, program.v_caches, strict=True):
        qkv = layer.qkv(rms_norm(x, layer.attn_norm, program.eps))
        q = rope_and_cache(
            qkv, positions, program.cos_sin, k_cache, v_cache, slots, program.num_heads, program.num_kv_heads,
            layer.q_norm, layer.k_norm, program.eps,
        )  # fmt: skip
        attended = paged_attention(q, k_cache, v_cache, block_tables, q_start, kv_len, program.scale, layer.window)
        x = x + layer.o(attended.view(tokens.shape[0], -1))
        x = x + layer.down(layer.gate_up(rms_norm(x, layer.mlp_norm, program.eps)))
    return rms_norm(x[rows.long()].contiguous(), program.final_norm, program.eps)


def logits(program: DecoderProgram, hidden: Tensor) -> Tensor:
    """[L, V] float32."""
    return program.lm_head(hidden, out_dtype=torch.float32)
