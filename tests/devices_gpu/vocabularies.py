"""Checkpoints with another tokenizer: the same tokens by other numbers, or fewer of them.

What it is: `spelled_out`, which gives a made-up checkpoint texts for its tokens, and `renumbered`, which shuffles a checkpoint's vocabulary, tokens and rows of the embedding alike, and may leave out the words that the last merges make. Where nothing
is left out the model says the same texts; where words are missing it reads their parts, which it has seen too, if more rarely.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ROWS = "model.embed_tokens.weight", "lm_head.weight"
"""Tensors with a row for each token."""
LETTERS = "abcdefghijklmnopqrstuvwxyz012345"


def spelled_out(folder: Path, size: int, seed: int = 0) -> None:
    """A tokenizer of so many texts for a checkpoint that has none: single letters, and pairs of what was there before."""
    texts, merges, rng = list(LETTERS), list[list[str]](), random.Random(seed)
    while len(texts) < size:
        pair = [rng.choice(texts), rng.choice(LETTERS)]
        if "".join(pair) not in texts and len("".join(pair)) < 5:
            texts.append("".join(pair))
            merges.append(pair)
    described = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {"type": "BPE", "vocab": {text: at for at, text in enumerate(texts)}, "merges": merges},
    }
    (folder / "tokenizer.json").write_text(json.dumps(described))


def renumbered(source: Path, folder: Path, merges: float = 1.0, seed: int = 1) -> Path:
    """`merges`: the share of the merges that stays, the first ones."""
    folder.mkdir()
    described: dict[str, Any] = json.loads((source / "tokenizer.json").read_text())
    model, added = described["model"], described["added_tokens"]
    made = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    model["merges"] = made[: int(merges * len(made))]
    gone = {"".join(pair) for pair in made[len(model["merges"]) :]} - {"".join(pair) for pair in model["merges"]}
    texts = {
        **model["vocab"],
        **{one["content"]: one["id"] for one in added},
    }  # all in the vocabulary, since added tokens elsewhere get numbers of the library's choice
    old = sorted(token for text, token in texts.items() if text not in gone)
    random.Random(seed).shuffle(old)
    new = {token: at for at, token in enumerate(old)}
    model["vocab"] = {text: new[token] for text, token in texts.items() if token in new}
    for one in added:
        one["id"] = new[one["id"]]
    described["added_tokens"] = sorted(added, key=lambda one: int(one["id"]))
    (folder / "tokenizer.json").write_text(json.dumps(described))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (source / name).exists():
            shutil.copy(source / name, folder)
    for name in ("config.json", "generation_config.json"):
        if not (source / name).exists():
            continue
        raw = json.loads((source / name).read_text())
        raw |= {
            key: [new[one] for one in value] if isinstance(value, list) else new[value]
            for key, value in raw.items()
            if key.endswith("_token_id")
        }
        if "vocab_size" in raw:
            raw["vocab_size"] = len(old)
        (folder / name).write_text(json.dumps(raw))
    tensors = load_file(source / "model.safetensors")
    tensors |= {name: tensors[name][torch.tensor(old)].contiguous() for name in ROWS if name in tensors}
    save_file(tensors, folder / "model.safetensors")
    return folder
