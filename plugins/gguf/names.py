"""Names of tensors: those of Hugging Face checkpoints, and those of GGUF files.

What it is: the one table, and which rows of which tensors a file holds in another order: in the architecture "llama" a head's dimensions i and
i + D/2 of queries and keys lie side by side, since its rotation there turns neighbours.
What it does not know: files, forms.
"""

from __future__ import annotations

import re

ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
ROPE_FACTORS = "rope_freqs.weight"
"""What each rotary frequency is divided by: a part of the configuration."""
TURNED = {"self_attn.q_proj": "query", "self_attn.k_proj": "key"}
_LAYERED = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)\Z")


def stored_name(name: str) -> str | None:
    """A Hugging Face name -> the one in the file, or None for one that no file has."""
    found = _LAYERED.match(name)
    if found:
        inner = LAYER.get(found[2])
        return None if inner is None else f"blk.{found[1]}.{inner}.{found[3]}"
    base, _, kind = name.rpartition(".")
    return f"{ENDS[base]}.{kind}" if base in ENDS else None


def turned(name: str) -> str | None:
    """ "query" or "key" where the rows of this (Hugging Face) tensor may lie in another order, else None."""
    found = _LAYERED.match(name)
    return TURNED.get(found[2]) if found else None
