"""The decoder family on a device: fused weights, and one step over an `Ops` table.

What it is: q, k and v as one weight, gate and up as one, each read straight into its place on the device (several at a time: reading,
page faults and copies overlap), and the step as a composition of Ops. Biases, head norms, windows and tied embeddings as
plugins/models/decoder.py has them.
What it does not know: slots, steps, files, sampling.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from penstock.core.contract.devices import ModelFacts
from penstock.plugins.devices.cuda_ops import Columns, Ops
from penstock.plugins.models.api import Progress, Weights
from penstock.plugins.models.rope import rope_tables
from penstock.plugins.models.tied import ends_of

Tensor = torch.Tensor
READERS = 6


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer's weights on the device."""

    attn_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    o: Tensor
    o_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    window: int


class DeviceDecoder:
    """A loaded decoder. `step` returns (last layer's output, residual stream), whose normalised sum `final` gives. The runner also reads `facts`,
    `table` (its dtype is the model's), `weights_bytes` and `tables_bytes`."""

    def __init__(self, facts: ModelFacts, table: Tensor, layers: list[Layer], final_norm: Tensor, lm_head: Tensor, cos_sin: Tensor) -> None:
        self.facts = facts
        self.table = table
        self.layers = layers
        self.final_norm = final_norm
        self.lm_head = lm_head
        self.cos_sin = cos_sin
        self.tables_bytes = cos_sin.nbytes
        kept = [table, final_norm, *([] if lm_head is table else [lm_head])]
        kept += [part for layer in layers for part in vars(layer).values() if isinstance(part, torch.Tensor)]
        self.weights_bytes = sum(part.nbytes for part in kept)

    def brief(self) -> DeviceDecoder:
        """With one layer of each kind: what has to be compiled for all of them."""
        kinds = {layer.window: layer for layer in reversed(self.layers)}
        return DeviceDecoder(self.facts, self.table, list(kinds.values()), self.final_norm, self.lm_head, self.cos_sin)

    def step(self, ops: Ops, pool: Tensor, columns: Columns) -> tuple[Tensor, Tensor]:
        """pool [layers, 2, ...] -> two [T, H]."""
        facts, eps = self.facts, self.facts.rms_norm_eps
        heads, kv_heads = facts.num_heads, facts.num_kv_heads
        scale = float(facts.head_dim**-0.5)
        residual = ops.embed(columns.tokens, self.table)
        x = ops.norm(residual, self.layers[0].attn_norm, eps)
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            k_cache, v_cache = pool[index, 0], pool[index, 1]
            qkv = ops.linear(x, layer.qkv, layer.qkv_bias)
            q = ops.rope(qkv, columns, self.cos_sin, k_cache, v_cache, heads, kv_heads, layer.q_norm, layer.k_norm, eps)
            attended = ops.attend(q, qkv, k_cache, v_cache, columns, scale, layer.window)
            x = ops.linear(attended.view(attended.shape[0], -1), layer.o, layer.o_bias)
            x = ops.add_norm(x, residual, layer.mlp_norm, eps)
            x = ops.linear(ops.gated_linear(x, layer.gate_up, layer.gate_up_bias), layer.down, layer.down_bias)
            if index < last:
                x = ops.add_norm(x, residual, self.layers[index + 1].attn_norm, eps)
        return x, residual

    def final(self, ops: Ops, x: Tensor, residual: Tensor) -> Tensor:
        """The normalised hidden states, the input of `logits`. `residual` is overwritten."""
        return ops.add_norm(x, residual, self.final_norm, self.facts.rms_norm_eps)

    def logits(self, ops: Ops, hidden: Tensor) -> Tensor:
        """[R, V] float32."""
        return ops.logits(hidden, self.lm_head)


def build_device_decoder(
    *,
    facts: ModelFacts,
    dtype: torch.dtype,
    weights: Weights,
    max_len: int,
    device: torch.device,
    progress: Progress | None = None,
) -> DeviceDecoder:
    """Take the checkpoint's tensors straight to `device`. Raises CheckpointError for missing, unexpected or wrong-shaped tensors, and
    torch.OutOfMemoryError."""
    tell = progress or (lambda fraction: None)
    hidden, dim, inner = facts.hidden_size, facts.head_dim, facts.intermediate_size
    q_rows, kv_rows = facts.num_heads * dim, facts.num_kv_heads * dim
    reads: list[Callable[[], Tensor]] = []

    def read(target: Tensor, name: str) -> None:
        reads.append(lambda: target.copy_(weights.take(name, tuple(target.shape))))

    def end(take: Callable[[], Tensor]) -> Tensor:
        target = torch.empty((facts.vocab_size, hidden), dtype=dtype, device=device)
        reads.append(lambda: target.copy_(take()))
        return target

    def one(name: str, *shape: int) -> Tensor:
        target = torch.empty(shape, dtype=dtype, device=device)
        read(target, name)
        return target

    def fused(names: list[tuple[str, int]], suffix: str, *rest: int) -> Tensor:
        target = torch.empty((sum(rows for _, rows in names), *rest), dtype=dtype, device=device)
        at = 0
        for name, rows in names:
            read(target[at : at + rows], f"{name}.{suffix}")
            at += rows
        return target

    def layer(index: int) -> Layer:
        at = f"model.layers.{index}"
        weights.ignore(f"{at}.self_attn.rotary_emb.inv_freq")
        qkv = [(f"{at}.self_attn.q_proj", q_rows), (f"{at}.self_attn.k_proj", kv_rows), (f"{at}.self_attn.v_proj", kv_rows)]
        gate_up = [(f"{at}.mlp.gate_proj", inner), (f"{at}.mlp.up_proj", inner)]
        slides = facts.sliding_layers[index] if facts.sliding_layers else True
        return Layer(
            attn_norm=one(f"{at}.input_layernorm.weight", hidden),
            qkv=fused(qkv, "weight", hidden),
            qkv_bias=fused(qkv, "bias") if facts.attention_bias else None,
            o=one(f"{at}.self_attn.o_proj.weight", hidden, q_rows),
            o_bias=one(f"{at}.self_attn.o_proj.bias", hidden) if facts.attention_out_bias else None,
            mlp_norm=one(f"{at}.post_attention_layernorm.weight", hidden),
            gate_up=fused(gate_up, "weight", hidden),
            gate_up_bias=fused(gate_up, "bias") if facts.mlp_bias else None,
            down=one(f"{at}.mlp.down_proj.weight", hidden, inner),
            down_bias=one(f"{at}.mlp.down_proj.bias", hidden) if facts.mlp_bias else None,
            q_norm=one(f"{at}.self_attn.q_norm.weight", dim) if facts.qk_norm else None,
            k_norm=one(f"{at}.self_attn.k_norm.weight", dim) if facts.qk_norm else None,
            window=(facts.sliding_window or 0) if slides else 0,
        )

    ends = ends_of(facts, weights)
    table = end(ends.table)
    layers = [layer(index) for index in range(facts.num_layers)]
    final_norm = one("model.norm.weight", hidden)
    lm_head = table if ends.head is None else end(ends.head)
    with ThreadPoolExecutor(READERS, thread_name_prefix="weights") as pool:
        for done, _ in enumerate(pool.map(lambda job: job(), reads), 1):
            tell(done / len(reads))
    weights.finish()
    cos_sin = torch.cat(rope_tables(facts, max_len), dim=1).contiguous().to(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # the readers' threads copied on another stream than the one that will compute
    return DeviceDecoder(facts, table, layers, final_norm, lm_head, cos_sin)
