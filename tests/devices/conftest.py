"""A tiny random checkpoint without transformers, and runners over it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from penstock.core.contract.devices import RunnerConfig
from penstock.plugins.devices.cpu import CpuDevice

sys.path.insert(0, str(Path(__file__).parents[1] / "devices_gpu"))  # for draft_kit.py: pytest's importlib mode does not

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 200,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "dtype": "float32",
}


def tensors(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    """Every tensor that CONFIG asks for."""
    generator = torch.Generator().manual_seed(seed)
    h, inner, vocab = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, h), "model.norm.weight": (h,), "lm_head.weight": (vocab, h)}
    for layer in range(CONFIG["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.input_layernorm.weight": (h,),
            f"{at}.post_attention_layernorm.weight": (h,),
            f"{at}.self_attn.q_proj.weight": (32, h),
            f"{at}.self_attn.k_proj.weight": (16, h),
            f"{at}.self_attn.v_proj.weight": (16, h),
            f"{at}.self_attn.o_proj.weight": (h, 32),
            f"{at}.mlp.gate_proj.weight": (inner, h),
            f"{at}.mlp.up_proj.weight": (inner, h),
            f"{at}.mlp.down_proj.weight": (h, inner),
        }
    out = {}
    for name, shape in shapes.items():
        value = torch.empty(*shape).normal_(0, 0.3, generator=generator)
        out[name] = (value + 1.0 if name.endswith("norm.weight") else value).to(dtype)
    return out


@pytest.fixture(autouse=True, scope="session")
def _two_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors(), tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def rewrite() -> Callable[..., None]:
    """rewrite(folder, tensors or None, **config changes)."""

    def change(folder: Path, named: dict[str, torch.Tensor] | None = None, **config: Any) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
        if named is not None:
            save_file(named, folder / "model.safetensors")

    return change


@pytest.fixture
def load() -> Callable[..., Any]:
    """load(folder, notes=list, **RunnerConfig fields) -> runner."""

    def build(path: Path, notes: list[str] | None = None, **over: Any) -> Any:
        settings: dict[str, Any] = {
            "model_path": str(path),
            "dtype": "auto",
            "max_model_len": None,
            "block_size": 16,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 64,
            "kv_cache_memory_bytes": 1 << 20,
            "num_gpu_blocks_override": None,
            "gpu_memory_utilization": 0.9,
            "load_format": "auto",
            "deterministic": False,
            "enforce_eager": False,
            "attention_backend": None,
            "seed": 0,
            "threads": 2,
            "max_logprobs": 20,
        }
        said = [] if notes is None else notes
        return CpuDevice().load(RunnerConfig(**{**settings, **over}), lambda phase, fraction: said.append(phase))

    return build


@pytest.fixture
def make_tensors() -> Callable[..., dict[str, torch.Tensor]]:
    return tensors
