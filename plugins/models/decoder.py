"""The decoder family of Llama, Mistral, Qwen2 and Qwen3, for every device.

What it is: the names and shapes of a checkpoint's tensors, which of them are one layer (q, k and v; gate and up), and the step as a composition of
layers, attention and the device's operations (pre-norm blocks: Touvron et al. 2023, arXiv 2302.13971; biases on q, k and v in Qwen2, norms of the
heads in Qwen3).
What it does not know: files, devices, slots, sampling, where blocks come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from penstock.core.contract.devices import ModelFacts
from penstock.plugins.models.api import Attention, AttnCall, Block, Columns, Linear, Ops, Plain, Stream
from penstock.plugins.models.builder import Builder, Part
from penstock.plugins.models.rope import rope_tables
from penstock.plugins.models.rounding import after_norm

Tensor = torch.Tensor


class Decoder:
    """See plugins/models/api.py: Model."""

    capturable = True

    def __init__(
        self,
        facts: ModelFacts,
        attention: Attention,
        embedding: Tensor,
        blocks: Sequence[Block],
        final_norm: Tensor,
        head: Linear,
        cos_sin: Tensor,
        weights_bytes: int,
    ) -> None:
        self.facts = facts
        self.attention = attention
        self.plain: Plain | None = Plain(embedding, blocks, final_norm, head, facts.rms_norm_eps, cos_sin)
        self.weights_bytes = weights_bytes
        self.tables_bytes = cos_sin.nbytes
        self._embedding = embedding
        self._blocks = blocks
        self._final_norm = final_norm
        self._head = head
        self._cos_sin = cos_sin
        self._eps = facts.rms_norm_eps

    def brief(self) -> Decoder:
        """One layer for each window."""
        kinds = {block.call.window: block for block in reversed(self._blocks)}
        rest = (self._final_norm, self._head, self._cos_sin, self.weights_bytes)
        return Decoder(self.facts, self.attention, self._embedding, list(kinds.values()), *rest)

    def step(self, ops: Ops, caches: Sequence[Any], columns: Columns, taps: Sequence[int] = ()) -> Stream:
        """See Model."""
        eps, attention, kept = self._eps, self.attention, []
        residual = ops.embed(columns.tokens, self._embedding)
        x, last = residual, len(self._blocks) - 1
        for index, (block, cache) in enumerate(zip(self._blocks, caches, strict=False)):
            qkv = after_norm(ops, x, residual if index else None, block.attn_norm, eps, block.qkv, columns)
            if index in taps:
                kept.append(residual.clone())
            q = attention.store(qkv, columns, self._cos_sin, cache, block.q_norm, block.k_norm, eps)
            attended = attention.attend(q, qkv, cache, columns, block.call)
            x = block.o(attended.view(attended.shape[0], -1), columns)
            x = block.down(after_norm(ops, x, residual, block.mlp_norm, eps, block.gate_up, columns), columns)
        if last + 1 in taps:
            kept.append(x + residual)
        return Stream(x, residual, kept)

    def final(self, ops: Ops, x: Tensor, residual: Tensor) -> Tensor:
        """See Model."""
        return ops.add_norm(x, residual, self._final_norm, self._eps)

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """See Model."""
        return self._head(hidden, None, out)


def window_of(facts: ModelFacts, layer: int) -> int:
    """Sliding window of a layer in tokens; 0: full attention."""
    slides = facts.sliding_layers[layer] if facts.sliding_layers else True
    return (facts.sliding_window or 0) if slides else 0


def build_decoder(*, facts: ModelFacts, builder: Builder, attention: Attention, max_len: int) -> Decoder:
    """Name the checkpoint's tensors, layer by layer.

    `max_len` is the longest sequence (rows of the rotary table, and the choice of rope's long form, see rope.py). Raises CheckpointError
    for missing, unexpected or wrong-shaped tensors.
    """
    hidden, dim, inner = facts.hidden_size, facts.head_dim, facts.intermediate_size
    q_rows, kv_rows = facts.num_heads * dim, facts.num_kv_heads * dim

    def block(index: int) -> Block:
        at = f"model.layers.{index}"
        builder.ignore(f"{at}.self_attn.rotary_emb.inv_freq")
        heads = [Part(f"{at}.self_attn.{name}_proj", rows) for name, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows))]
        gate, up = (Part(f"{at}.mlp.{name}_proj", inner) for name in ("gate", "up"))
        return Block(
            attn_norm=builder.tensor(f"{at}.input_layernorm.weight", hidden),
            qkv=builder.linear(heads, hidden, bias=facts.attention_bias),
            o=builder.linear([Part(f"{at}.self_attn.o_proj", hidden)], q_rows, bias=facts.attention_out_bias),
            mlp_norm=builder.tensor(f"{at}.post_attention_layernorm.weight", hidden),
            gate_up=builder.gated(gate, up, hidden, "silu", bias=facts.mlp_bias),
            down=builder.linear([Part(f"{at}.mlp.down_proj", hidden)], inner, bias=facts.mlp_bias),
            q_norm=builder.tensor(f"{at}.self_attn.q_norm.weight", dim) if facts.qk_norm else None,
            k_norm=builder.tensor(f"{at}.self_attn.k_norm.weight", dim) if facts.qk_norm else None,
            call=AttnCall(float(dim**-0.5), window_of(facts, index)),
        )

    table, make_head = builder.ends(facts)
    blocks = []
    for index in range(facts.num_layers):
        blocks.append(block(index))
        builder.tell((index + 1) / (facts.num_layers + 1))
    final_norm = builder.tensor("model.norm.weight", hidden)
    head = make_head()
    cos_sin = torch.cat(rope_tables(facts, max_len), dim=1).contiguous().to(builder.device)
    builder.finish()
    return Decoder(facts, attention, table, blocks, final_norm, head, cos_sin, builder.nbytes)
