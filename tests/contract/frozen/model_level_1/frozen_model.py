"""A plugin as somebody wrote it against level 1 of model families. Never edited: it must go on working at the level after.

What it is: a Llama without biases, built of the CPU's kernels. What it does not know: anything that came later.
"""

import torch

from penstock.core.hookspecs import ModelSpec, hookimpl
from penstock.kernels.embedding import embedding
from penstock.kernels.linear import pack, pack_gated
from penstock.kernels.rmsnorm import rms_norm
from penstock.kernels.rope import rope_and_cache


class Model:
    def __init__(self, facts, weights, attention, max_len):  # type: ignore[no-untyped-def]
        self.facts, self.attention = facts, attention
        h, dim, inner = facts.hidden_size, facts.head_dim, facts.intermediate_size
        q, kv = facts.num_heads * dim, facts.num_kv_heads * dim
        self.table = weights.take("model.embed_tokens.weight", (facts.vocab_size, h)).clone()
        self.layers = []
        for index in range(facts.num_layers):
            at = f"model.layers.{index}."
            parts = [weights.take(f"{at}self_attn.{n}_proj.weight", (rows, h)) for n, rows in (("q", q), ("k", kv), ("v", kv))]
            self.layers.append(
                {
                    "norm": weights.take(f"{at}input_layernorm.weight", (h,)).clone(),
                    "qkv": pack(torch.cat(parts)),
                    "o": pack(weights.take(f"{at}self_attn.o_proj.weight", (h, q))),
                    "mlp_norm": weights.take(f"{at}post_attention_layernorm.weight", (h,)).clone(),
                    "gate_up": pack_gated(
                        weights.take(f"{at}mlp.gate_proj.weight", (inner, h)), weights.take(f"{at}mlp.up_proj.weight", (inner, h)), "silu"
                    ),
                    "down": pack(weights.take(f"{at}mlp.down_proj.weight", (h, inner))),
                }
            )
        self.norm = weights.take("model.norm.weight", (h,)).clone()
        self.head = pack(weights.take("lm_head.weight", (facts.vocab_size, h)))
        weights.finish()
        inverse = 1.0 / (facts.rope.theta ** (torch.arange(0, dim, 2, dtype=torch.int64).to(torch.float32) / dim))
        angles = torch.arange(max_len, dtype=torch.float32)[:, None] * inverse
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1).contiguous()
        self.weights_bytes, self.tables_bytes = self.table.nbytes, self.cos_sin.nbytes

    def bind(self, pool):  # type: ignore[no-untyped-def]
        facts, eps = self.facts, self.facts.rms_norm_eps

        def program(tokens, positions, slots, block_tables, q_start, kv_len, rows, *, hidden):  # type: ignore[no-untyped-def]
            x = embedding(tokens, self.table)
            for index, layer in enumerate(self.layers):
                k_cache, v_cache = pool[index, 0], pool[index, 1]
                qkv = layer["qkv"](rms_norm(x, layer["norm"], eps))
                q = rope_and_cache(
                    qkv, positions, self.cos_sin, k_cache, v_cache, slots, facts.num_heads, facts.num_kv_heads, None, None, eps
                )
                attended = self.attention.attend(q, k_cache, v_cache, block_tables, q_start, kv_len, facts.head_dim**-0.5, 0)
                x = x + layer["o"](attended.reshape(len(tokens), -1))
                x = x + layer["down"](layer["gate_up"](rms_norm(x, layer["mlp_norm"], eps)))
            rms_norm(x[rows.long()].contiguous(), self.norm, eps, out=hidden)

        return program

    def logits(self, hidden, out):  # type: ignore[no-untyped-def]
        return self.head(hidden, out=out)


def facts_of(config):  # type: ignore[no-untyped-def]
    from penstock.plugins.models.config import decoder_facts

    return decoder_facts({**config, "architectures": ["LlamaForCausalLM"], "model_type": "llama"})


def factory(*, facts, dtype, weights, attention, max_len, progress=None):  # type: ignore[no-untyped-def]
    return Model(facts, weights, attention, max_len)


@hookimpl
def register_models():  # type: ignore[no-untyped-def]
    return [ModelSpec(name="frozen-model", api_level=1, architectures=["FrozenForCausalLM"], facts=facts_of, factory=factory)]
