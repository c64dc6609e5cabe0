"""The shipped heads of Brook have their published layouts, load, and guess about as well as their cards say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import brook_model
import evaluate_heads
import pytest
import torch
from brook_heads import load_head
from safetensors import safe_open
from tokenizers import Tokenizer

from penstock.plugins.demo_model import brook_path, draft_path, eagle3_path, medusa_path, mtp_path

HEADS = [medusa_path(), eagle3_path(), mtp_path()]
# Tokens per pass of Brook that the plain modules must reach with four guesses on a few prompts of each task.
FLOORS = {"brook-medusa": 1.5, "brook-eagle3": 2.5, "brook-mtp": 2.5}


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def _layout(folder: Path) -> dict[str, tuple[str, list[int]]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: (one.get_dtype(), one.get_shape()) for name, one in slices.items()}


def _layer(prefix: str, width: int, intermediate: int) -> dict[str, tuple[str, list[int]]]:
    sizes = {
        "self_attn.q_proj": [256, width], "self_attn.k_proj": [128, width], "self_attn.v_proj": [128, width],
        "self_attn.o_proj": [256, 256], "mlp.gate_proj": [intermediate, 256], "mlp.up_proj": [intermediate, 256],
        "mlp.down_proj": [256, intermediate], "input_layernorm": [256], "post_attention_layernorm": [256],
    }  # fmt: skip
    return {f"{prefix}{name}.weight": ("BF16", size) for name, size in sizes.items()}


def test_the_draft_and_the_heads_are_small() -> None:
    files = [file for folder in (draft_path(), *HEADS) for file in folder.iterdir()]
    assert sum(file.stat().st_size for file in files) <= 6_000_000


@pytest.mark.parametrize("folder", HEADS, ids=lambda folder: folder.name)
def test_a_head_has_config_weights_and_card(folder: Path) -> None:
    assert {file.name for file in folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("# Brook-")
    for name in _layout(folder):
        part = name.removesuffix(".weight").removesuffix(".bias").split(".")[-1]
        assert re.search(rf"\b{part}\b", card), name
    assert _config(folder)["torch_dtype"] == "bfloat16"


def test_medusa_has_the_layout_of_its_repository() -> None:
    config = _config(medusa_path())
    assert config["architectures"] == ["MedusaModel"]
    assert config["original_lm_head"] is True
    heads, blocks = config["medusa_num_heads"], config["medusa_num_layers"]
    wanted: dict[str, tuple[str, list[int]]] = {}
    for head in range(heads):
        for block in range(blocks):
            wanted[f"{head}.{block}.linear.weight"] = ("BF16", [256, 256])
            wanted[f"{head}.{block}.linear.bias"] = ("BF16", [256])
    assert _layout(medusa_path()) == wanted


def test_eagle3_has_the_layout_of_its_repository() -> None:
    config = _config(eagle3_path())
    size = config["draft_vocab_size"]
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert len(config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]) == 3
    wanted = _layer("midlayer.", 512, config["intermediate_size"])
    wanted |= {"midlayer.hidden_norm.weight": ("BF16", [256]), "fc.weight": ("BF16", [256, 768]), "norm.weight": ("BF16", [256])}
    wanted |= {"lm_head.weight": ("BF16", [size, 256]), "d2t": ("I64", [size]), "t2d": ("BOOL", [4096])}
    assert _layout(eagle3_path()) == wanted


def test_mtp_has_the_layout_of_deepseeks() -> None:
    config = _config(mtp_path())
    assert config["num_nextn_predict_layers"] == 1
    prefix = f"model.layers.{config['num_hidden_layers']}."
    wanted = _layer(prefix, 256, config["intermediate_size"])
    for name, size in {"enorm": [256], "hnorm": [256], "eh_proj": [256, 512], "shared_head.norm": [256]}.items():
        wanted[f"{prefix}{name}.weight"] = ("BF16", size)
    assert _layout(mtp_path()) == wanted


def test_the_draft_vocabulary_maps_both_ways() -> None:
    with safe_open(eagle3_path() / "model.safetensors", "pt") as file:
        d2t, t2d = file.get_tensor("d2t"), file.get_tensor("t2d")
    tokens = torch.arange(len(d2t)) + d2t
    assert tokens.tolist() == t2d.nonzero().flatten().tolist()
    end = _config(brook_path())["eos_token_id"][0]
    assert end in tokens.tolist()


def test_the_heads_guess_what_brook_says() -> None:
    target = brook_model.load_model(brook_path(), torch.device("cpu"), torch.float32)
    tokenizer = Tokenizer.from_file(str(brook_path() / "tokenizer.json"))
    heads: dict[str, Any] = {folder.name: load_head(folder, target) for folder in HEADS}
    tasks = ("chat", "rewriting", "JSON by schema")
    results = evaluate_heads.measure_heads(target, tokenizer, heads, count=5, lengths=(4,), only=tasks)
    for name, floor in FLOORS.items():
        assert results[name]["4"]["all"]["tokens_per_pass"] > floor, results[name]
