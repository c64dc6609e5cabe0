"""The decoder family of Llama, Mistral, Qwen2 and Qwen3, built on the kernels' checked entries.

What it is: the names and shapes of a checkpoint's tensors, their packing (q, k and v as one weight, gate and up as one), and the binding
to caches: one whole-step program where the attention backend allows it, otherwise the same composition with the backend's attention.
What it does not know: files, slots, sampling, where blocks come from.
"""

from __future__ import annotations

import torch

from penstock.core.contract.devices import ModelFacts
from penstock.kernels.decoder import DecoderLayer, DecoderProgram
from penstock.kernels.embedding import embedding
from penstock.kernels.linear import PackedLinear, pack, pack_gated
from penstock.kernels.rmsnorm import rms_norm
from penstock.kernels.rope import rope_and_cache
from penstock.plugins.models.api import Attention, Program, Progress, Weights
from penstock.plugins.models.rope import rope_tables
from penstock.plugins.models.tied import ends_of


class Decoder:
    """A loaded decoder: packed weights and the rotary table. See plugins/models/api.py: Model."""

    def __init__(
        self,
        facts: ModelFacts,
        attention: Attention,
        table: torch.Tensor,
        layers: list[DecoderLayer],
        final_norm: torch.Tensor,
        lm_head: PackedLinear,
        cos_sin: torch.Tensor,
    ) -> None:
        self.facts = facts
        self.attention = attention
        self.table = table
        self.layers = layers
        self.final_norm = final_norm
        self.lm_head = lm_head
        self.cos_sin = cos_sin
        self.tables_bytes = cos_sin.nbytes
        self.weights_bytes = table.nbytes + lm_head.nbytes + final_norm.nbytes + sum(map(_layer_bytes, layers))

    def bind(self, pool: torch.Tensor) -> Program:
        """pool [layers, 2, num_blocks, ...]."""
        program = DecoderProgram(
            embedding=self.table,
            layers=self.layers,
            final_norm=self.final_norm,
            lm_head=self.lm_head,
            num_heads=self.facts.num_heads,
            num_kv_heads=self.facts.num_kv_heads,
            head_dim=self.facts.head_dim,
            eps=self.facts.rms_norm_eps,
            cos_sin=self.cos_sin,
            k_caches=list(pool[:, 0]),
            v_caches=list(pool[:, 1]),
        )
        return program if self.attention.fused else StepByStep(program, self.attention)

    def logits(self, hidden: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """hidden [R, H] -> out [R, V] float32."""
        return self.lm_head(hidden, out=out)


class StepByStep:
    """The decoder's step, operation by operation, with a backend's own attention."""

    def __init__(self, program: DecoderProgram, attention: Attention) -> None:
        self._program = program
        self._attention = attention

    def __call__(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        block_tables: torch.Tensor,
        q_start: torch.Tensor,
        kv_len: torch.Tensor,
        rows: torch.Tensor,
        *,
        hidden: torch.Tensor,
    ) -> None:
        """As kernels.decoder.reference, attention apart."""
        p = self._program
        x = embedding(tokens, p.embedding)
        for layer, k_cache, v_cache in zip(p.layers, p.k_caches, p.v_caches, strict=True):
            qkv = layer.qkv(rms_norm(x, layer.attn_norm, p.eps))
            q = rope_and_cache(
                qkv, positions, p.cos_sin, k_cache, v_cache, slots, p.num_heads, p.num_kv_heads, layer.q_norm, layer.k_norm, p.eps
            )
            attended = self._attention.attend(q, k_cache, v_cache, block_tables, q_start, kv_len, p.scale, layer.window)
            x = x + layer.o(attended.reshape(tokens.shape[0], -1))
            x = x + layer.down(layer.gate_up(rms_norm(x, layer.mlp_norm, p.eps)))
        rms_norm(x[rows.long()].contiguous(), p.final_norm, p.eps, out=hidden)


def _layer_bytes(layer: DecoderLayer) -> int:
    norms = (layer.attn_norm, layer.mlp_norm, layer.q_norm, layer.k_norm)
    return sum(part.nbytes for part in (layer.qkv, layer.o, layer.gate_up, layer.down, *norms) if part is not None)


def window_of(facts: ModelFacts, layer: int) -> int:
    """Sliding window of a layer in tokens; 0: full attention."""
    slides = facts.sliding_layers[layer] if facts.sliding_layers else True
    return (facts.sliding_window or 0) if slides else 0


def build_decoder(
    *, facts: ModelFacts, dtype: torch.dtype, weights: Weights, attention: Attention, max_len: int, progress: Progress | None = None
) -> Decoder:
    """Take the checkpoint's tensors, layer by layer, and pack them.

    `max_len` is the longest sequence (rows of the rotary table, and the choice of rope's long form, see rope.py). Raises CheckpointError
    for missing, unexpected or wrong-shaped tensors.
    """
    tell = progress or (lambda fraction: None)
    hidden, dim = facts.hidden_size, facts.head_dim
    q_rows, kv_rows, inner = facts.num_heads * dim, facts.num_kv_heads * dim, facts.intermediate_size

    def bias(name: str, rows: int, present: bool) -> torch.Tensor | None:
        return weights.take(f"{name}.bias", (rows,)) if present else None

    def build_layer(index: int) -> DecoderLayer:
        at = f"model.layers.{index}"
        weights.ignore(f"{at}.self_attn.rotary_emb.inv_freq")
        names = (("q_proj", q_rows), ("k_proj", kv_rows), ("v_proj", kv_rows))
        qkv = torch.cat([weights.take(f"{at}.self_attn.{name}.weight", (rows, hidden)) for name, rows in names])
        qkv_bias = None
        if facts.attention_bias:
            qkv_bias = torch.cat([weights.take(f"{at}.self_attn.{name}.bias", (rows,)) for name, rows in names])
        return DecoderLayer(
            attn_norm=weights.take(f"{at}.input_layernorm.weight", (hidden,)).clone(),
            qkv=pack(qkv, qkv_bias),
            o=pack(
                weights.take(f"{at}.self_attn.o_proj.weight", (hidden, q_rows)),
                bias(f"{at}.self_attn.o_proj", hidden, facts.attention_out_bias),
            ),
            mlp_norm=weights.take(f"{at}.post_attention_layernorm.weight", (hidden,)).clone(),
            gate_up=pack_gated(
                weights.take(f"{at}.mlp.gate_proj.weight", (inner, hidden)),
                weights.take(f"{at}.mlp.up_proj.weight", (inner, hidden)),
                "silu",
                bias(f"{at}.mlp.gate_proj", inner, facts.mlp_bias),
                bias(f"{at}.mlp.up_proj", inner, facts.mlp_bias),
            ),
            down=pack(weights.take(f"{at}.mlp.down_proj.weight", (hidden, inner)), bias(f"{at}.mlp.down_proj", hidden, facts.mlp_bias)),
            q_norm=weights.take(f"{at}.self_attn.q_norm.weight", (dim,)).clone() if facts.qk_norm else None,
            k_norm=weights.take(f"{at}.self_attn.k_norm.weight", (dim,)).clone() if facts.qk_norm else None,
            window=window_of(facts, index),
        )

    ends = ends_of(facts, weights)
    table = ends.table().clone()
    layers = []
    for index in range(facts.num_layers):
        layers.append(build_layer(index))
        tell((index + 1) / (facts.num_layers + 1))
    final_norm = weights.take("model.norm.weight", (hidden,)).clone()
    lm_head = pack(table if ends.head is None else ends.head())
    weights.finish()
    cos_sin = torch.cat(rope_tables(facts, max_len), dim=1).contiguous()
    tell(1.0)
    return Decoder(facts, attention, table, layers, final_norm, lm_head, cos_sin)
