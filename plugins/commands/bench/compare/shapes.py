"""Models whose weights are random: speed depends on shapes, so a comparison needs no checkpoint.

What it is: `written` makes a Hugging Face folder that every engine reads: a Llama in bfloat16, and a tokenizer of bytes and made-up words as large as its vocabulary (servers turn
each token into text, so each must have some). The shapes are those of docs/benchmarks/cpu.md. What it does not know: what is measured with it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 1792,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "tie_word_embeddings": False,
    },
    "small": {
        "vocab_size": 16384,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
}
"""14.7 and 163.6 million parameters."""
COMMON: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
SPECIAL = ("<s>", "</s>", "<pad>")
SPREAD = 0.02


def written(root: Path, name: str) -> str:
    """The folder, which is called as the shape is."""
    from safetensors.torch import save_file

    config = {**COMMON, **SHAPES[name]}
    folder = root / name
    folder.mkdir()
    save_file(tensors(config), folder / "model.safetensors", {"format": "pt"})
    (folder / "tokenizer.json").write_text(tokenizer(config["vocab_size"]), encoding="utf-8")
    begin, end, pad = SPECIAL
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin, "eos_token": end, "pad_token": pad, "add_bos_token": False}
    for file, content in (
        ("config.json", config),
        ("tokenizer_config.json", words),
        ("generation_config.json", {"bos_token_id": 0, "eos_token_id": 1}),
    ):
        (folder / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return str(folder)


def tensors(config: dict[str, Any]) -> dict[str, Any]:
    import torch

    seeded = torch.Generator().manual_seed(1)
    hidden, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    layer = {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
    }
    layer |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    shapes = {"model.embed_tokens": (config["vocab_size"], hidden)}
    shapes |= {} if config["tie_word_embeddings"] else {"lm_head": (config["vocab_size"], hidden)}
    norms = ["model.norm"]
    for index in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{index}.{part}": size for part, size in layer.items()}
        norms += [f"model.layers.{index}.input_layernorm", f"model.layers.{index}.post_attention_layernorm"]
    found = {f"{part}.weight": (torch.randn(size, generator=seeded) * SPREAD).bfloat16() for part, size in shapes.items()}
    return found | {f"{part}.weight": torch.ones(hidden, dtype=torch.bfloat16) for part in norms}


def tokenizer(vocab: int) -> str:
    """tokenizer.json: special tokens, the 256 bytes, and words that no text has."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*SPECIAL, *bytes_, *(f"Ġw{index}" for index in range(vocab - len(SPECIAL) - len(bytes_)))]
    made = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    return str(made.to_str())
