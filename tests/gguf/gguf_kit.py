"""Hugging Face folders made into GGUF files by the `gguf` package's own writer and table of names, and single blocks of each form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import quantize
from safetensors.torch import load_file, save_file

ARCH = {"llama": gguf.MODEL_ARCH.LLAMA, "mistral": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}
KIND = gguf.GGMLQuantizationType
NORMAL, CONTROL, USER, UNUSED = 1, 3, 4, 5


def convert(
    folder: Path,
    target: Path,
    form: str = "F32",
    *,
    forms: dict[str, str] | None = None,
    pre: str = "smollm",
    leave: tuple[str, ...] = (),
    **fields: Any,
) -> Path:
    """`form` of the matrices, `forms` of some of them by their names in the file; `leave` tensors out; `fields` over those of the folder (None: left
    out), "__" for a dot."""
    config = json.loads((folder / "config.json").read_text())
    arch = ARCH[config["model_type"]]
    writer = gguf.GGUFWriter(target, gguf.MODEL_ARCH_NAMES[arch])
    set_fields(writer, fields_of(config) | tokens_of(folder, config, pre), {key.replace("__", "."): v for key, v in fields.items()})
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    for name, tensor in load_file(folder / "model.safetensors").items():
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        if stored in leave:
            continue
        value = tensor.float().numpy()
        if arch == gguf.MODEL_ARCH.LLAMA and ".attn_q." in stored:
            value = side_by_side(value, config["num_attention_heads"])
        if arch == gguf.MODEL_ARCH.LLAMA and ".attn_k." in stored:
            value = side_by_side(value, config["num_key_value_heads"])
        add(writer, stored, value, (forms or {}).get(stored, form) if value.ndim > 1 else "F32")
    write(writer)
    return target


def add(writer: gguf.GGUFWriter, name: str, value: np.ndarray, form: str) -> None:
    """As it is stored in this form."""
    kind = KIND[form]
    if form == "F32":
        writer.add_tensor(name, value)
    elif form == "F16":
        writer.add_tensor(name, value.astype(np.float16))
    else:
        writer.add_tensor(name, blocks_for(value.shape, form) if form in RANDOM else quantize(value, kind), raw_dtype=kind)


def write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def set_fields(writer: gguf.GGUFWriter, fields: dict[str, Any], over: dict[str, Any]) -> None:
    for key, value in (fields | over).items():
        if value is None or key == "general.architecture":
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


def fields_of(config: dict[str, Any]) -> dict[str, Any]:
    """Of the architecture."""
    arch = gguf.MODEL_ARCH_NAMES[ARCH[config["model_type"]]]
    rope = config.get("rope_parameters") or {}
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    found = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        "vocab_size": config["vocab_size"],
    }
    return {f"{arch}.{key}": value for key, value in found.items()}


def tokens_of(folder: Path, config: dict[str, Any], pre: str) -> dict[str, Any]:
    """The fields of a byte-level tokenizer; where the folder has none, one of made-up tokens."""
    file = folder / "tokenizer.json"
    if not file.exists():
        return made_up_tokens(config["vocab_size"], pre)
    described = json.loads(file.read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    ids = {token: text for text, token in described["model"]["vocab"].items()}
    added = {item["id"]: item for item in described["added_tokens"]}
    count = max(*ids, *added, config["vocab_size"] - 1) + 1
    texts = [added[i]["content"] if i in added else ids.get(i, f"[PAD{i}]") for i in range(count)]
    kinds = [(CONTROL if added[i]["special"] else USER) if i in added else NORMAL if i in ids else UNUSED for i in range(count)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in described["model"]["merges"]]
    at = {text: token for token, text in enumerate(texts)}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": at[settings["bos_token"]],
        "tokenizer.ggml.eos_token_id": at[settings["eos_token"]],
        "tokenizer.ggml.padding_token_id": at[settings["pad_token"]],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": settings["chat_template"],
    }


def made_up_tokens(count: int, pre: str) -> dict[str, Any]:
    texts = [chr(0x4E00 + i) for i in range(count)]
    texts[2] = texts[0] + texts[1]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": [NORMAL] * count,
        "tokenizer.ggml.merges": [f"{texts[0]} {texts[1]}"],
        "tokenizer.ggml.eos_token_id": count - 1,
    }


def side_by_side(value: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys as the architecture "llama" stores them: dimension i of a head, then i + D/2."""
    halves = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(value.shape))


RANDOM = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""Forms that the package cannot write -> the places of 16-bit floats in a block, all else of which may be any bytes."""


def blocks_for(shape: tuple[int, ...], form: str, seed: int = 0) -> np.ndarray:
    """Random bytes of this form, their scales small and finite: [rows, bytes]."""
    values, nbytes = gguf.GGML_QUANT_SIZES[KIND[form]]
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (int(np.prod(shape)) // values, nbytes), dtype=np.uint8)
    for place in RANDOM[form]:
        scales = random.uniform(-0.002, 0.002, len(blocks)).astype(np.float16)
        blocks[:, place : place + 2] = scales[:, None].view(np.uint8)
    return blocks.reshape(shape[0], -1)


def torch_rows(rows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(rows, copy=True))


def folder_of(folder: Path, config: dict[str, Any], dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """A Hugging Face folder of random weights for a configuration of one of the families. It has no tokenizer."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inner, width = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        linear = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries)}
        shapes |= {f"{at}self_attn.{name}_proj.weight": shape for name, shape in linear.items()}
        shapes |= {f"{at}mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes |= {f"{at}mlp.down_proj.weight": (hidden, inner)}
        shapes |= {f"{at}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        biased = "qkv" if config["model_type"] == "qwen2" else "qkvo" if config.get("attention_bias") else ""
        shapes |= {f"{at}self_attn.{name}_proj.bias": (linear[name][0],) for name in biased}
        if config["model_type"] == "qwen3":
            shapes |= {f"{at}self_attn.{name}_norm.weight": (width,) for name in "qk"}
    tensors = {}
    for name, shape in shapes.items():
        value = torch.empty(*shape).normal_(0, 0.3, generator=generator)
        tensors[name] = (value + 1.0 if name.endswith("norm.weight") else value).to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder
