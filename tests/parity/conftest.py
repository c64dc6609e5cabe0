"""Tiny random checkpoints made by transformers itself, and runners over them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.core.contract.devices import RunnerConfig
from penstock.plugins.devices.cpu import CpuDevice

SHAPE: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
}


@pytest.fixture(autouse=True, scope="session")
def _two_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """checkpoint("LlamaForCausalLM", dtype=torch.float32, shard="1GB", **config) -> (folder, the transformers model in float32)."""

    def make(
        architecture: str, *, dtype: torch.dtype = torch.float32, shard: str = "1GB", seed: int = 0, **config: Any
    ) -> tuple[Path, Any]:
        import transformers

        torch.manual_seed(seed)
        kind = architecture.removesuffix("ForCausalLM")
        settings = getattr(transformers, kind + "Config")(**{**SHAPE, "head_dim": 16, **config}, attn_implementation="eager")
        model = getattr(transformers, architecture)(settings).to(dtype).eval()
        with torch.no_grad():
            for name, value in model.named_parameters():
                if name.endswith((".bias", "norm.weight")):  # not left at 0 and 1, or a mix-up would not show
                    value.add_(torch.randn_like(value) * 0.3)
        folder = tmp_path / f"{kind}-{len(list(tmp_path.iterdir()))}"
        model.save_pretrained(folder, max_shard_size=shard)
        if dtype != torch.float32:  # read again: the cast rounded the rotary frequencies too, which loading does not
            model = getattr(transformers, architecture).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        return folder, model

    return make


def config_for(path: Path, **over: Any) -> RunnerConfig:
    settings: dict[str, Any] = {
        "model_path": str(path),
        "dtype": "auto",
        "max_model_len": None,
        "block_size": 16,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,
        "kv_cache_memory_bytes": 1 << 23,
        "num_gpu_blocks_override": None,
        "gpu_memory_utilization": 0.9,
        "load_format": "auto",
        "deterministic": False,
        "enforce_eager": False,
        "attention_backend": None,
        "seed": 0,
        "threads": 1,
        "max_logprobs": 20,
    }
    return RunnerConfig(**{**settings, **over})


@pytest.fixture
def load() -> Callable[..., Any]:
    """load(folder, **RunnerConfig fields) -> runner."""

    def build(path: Path, **over: Any) -> Any:
        return CpuDevice().load(config_for(path, **over), lambda phase, fraction: None)

    return build


@pytest.fixture
def edit_config() -> Callable[..., None]:
    """edit_config(folder, drop=[names], **fields) rewrites config.json."""

    def edit(folder: Path, drop: tuple[str, ...] = (), **fields: Any) -> None:
        path = folder / "config.json"
        raw = json.loads(path.read_text())
        for name in drop:
            raw.pop(name, None)
        raw.update(fields)
        path.write_text(json.dumps(raw))

    return edit
