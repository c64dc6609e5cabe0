"""The CUDA device's runner on host memory: the same slots, rings, graphs and draws, with plain-torch operations and tiny checkpoints."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from penstock.core.contract.devices import DeviceCapabilities, RunnerConfig
from penstock.core.contract.hookspecs import AttentionSpec
from penstock.plugins.attention.sdpa import TorchAttention
from penstock.plugins.devices.cpu import CpuDevice
from penstock.plugins.devices.cuda import load
from penstock.plugins.devices.lane import HostLane, Lane
from penstock.plugins.devices.torch_ops import TorchOps

sys.path.insert(0, str(Path(__file__).parent))  # for vocabularies.py: pytest's importlib mode does not

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 200,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": True}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 9}
FAMILIES: dict[str, dict[str, Any]] = {"llama": {}, "qwen2": QWEN2, "qwen3": QWEN3, "mistral": MISTRAL}


def tensors(config: dict[str, Any], dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    """Every tensor that the configuration asks for."""
    generator = torch.Generator().manual_seed(seed)
    h, inner, vocab, dim = (config[name] for name in ("hidden_size", "intermediate_size", "vocab_size", "head_dim"))
    q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, h), "model.norm.weight": (h,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, h)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.input_layernorm.weight": (h,),
            f"{at}.post_attention_layernorm.weight": (h,),
            f"{at}.self_attn.q_proj.weight": (q, h),
            f"{at}.self_attn.k_proj.weight": (kv, h),
            f"{at}.self_attn.v_proj.weight": (kv, h),
            f"{at}.self_attn.o_proj.weight": (h, q),
            f"{at}.mlp.gate_proj.weight": (inner, h),
            f"{at}.mlp.up_proj.weight": (inner, h),
            f"{at}.mlp.down_proj.weight": (h, inner),
        }
        if config["model_type"] == "qwen2":
            shapes |= {f"{at}.self_attn.{name}_proj.bias": (rows,) for name, rows in (("q", q), ("k", kv), ("v", kv))}
        if config["model_type"] == "qwen3":
            shapes |= {f"{at}.self_attn.{name}_norm.weight": (dim,) for name in "qk"}
    out = {}
    for name, shape in shapes.items():
        value = torch.empty(*shape).normal_(0, 0.3, generator=generator)
        out[name] = (value + 1.0 if name.endswith("norm.weight") else value).to(dtype)
    return out


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors are tiny: a second thread only makes them wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """make_folder("qwen3", dtype=torch.float32, **config changes) -> a checkpoint folder."""

    def make(family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
        config = {**CONFIG, **FAMILIES[family], "dtype": str(dtype).removeprefix("torch."), **changes}
        folder = tmp_path / f"{family}-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        save_file(tensors(config, dtype), folder / "model.safetensors")
        return folder

    return make


@pytest.fixture
def folder(make_folder: Callable[..., Path]) -> Path:
    return make_folder()


@pytest.fixture
def make_head() -> Callable[..., Path]:
    """make_head(folder, "eagle3" | "mtp") -> the folder of a random drafter for the model there."""

    def make(folder: Path, method: str) -> Path:
        config = json.loads((folder / "config.json").read_text())
        h, inner, dim, layers = (config[name] for name in ("hidden_size", "intermediate_size", "head_dim", "num_hidden_layers"))
        q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
        at, reads = ("midlayer.", 2 * h) if method == "eagle3" else (f"model.layers.{layers}.", h)
        heads = {f"self_attn.{name}_proj": (rows, reads) for name, rows in (("q", q), ("k", kv), ("v", kv))}
        rest = {"self_attn.o_proj": (h, q), "mlp.gate_proj": (inner, h), "mlp.up_proj": (inner, h), "mlp.down_proj": (h, inner)}
        shapes: dict[str, tuple[int, ...]] = {at + name: shape for name, shape in {**heads, **rest}.items()}
        norms = ["input_layernorm", "post_attention_layernorm"]
        if method == "eagle3":
            shapes |= {"fc": (h, 3 * h), "lm_head": (64, h), "norm": (h,)}
            norms.append("hidden_norm")
        else:
            shapes[f"{at}eh_proj"] = (h, 2 * h)
            norms += ["enorm", "hnorm", "shared_head.norm"]
        shapes |= {at + name: (h,) for name in norms}
        generator = torch.Generator().manual_seed(1)
        dtype = getattr(torch, config["dtype"])
        own = {f"{name}.weight": torch.empty(shape).normal_(0, 0.3, generator=generator).to(dtype) for name, shape in shapes.items()}
        if method == "eagle3":
            own["d2t"] = torch.arange(64) // 4
        where = folder.with_name(f"{folder.name}-{method}")
        where.mkdir()
        (where / "config.json").write_text(
            json.dumps({**config, "draft_vocab_size": 64, "eagle_aux_hidden_state_layer_ids": [0, 1, layers]})
        )
        save_file(own, where / "model.safetensors")
        return where

    return make


def settings_for(path: Path, **over: Any) -> RunnerConfig:
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
        "threads": 1,
        "max_logprobs": 20,
    }
    return RunnerConfig(**{**settings, **over})


@pytest.fixture
def config_for() -> Callable[..., RunnerConfig]:
    return settings_for


def torch_ops(*_: Any, **options: Any) -> TorchOps:
    """Operations for any device."""
    return TorchOps()


def make_attention(kind: Callable[..., Any] = TorchAttention) -> Callable[..., Any]:
    """A factory of a kind of attention, for a spec."""
    return lambda *, facts, dtype, device, block_size, **_: kind(facts, dtype, device, block_size)


def reference_backend(attention: Callable[..., Any] = TorchAttention) -> AttentionSpec:
    return AttentionSpec(name="torch", api_level=2, devices=["cuda"], supports=lambda facts, dtype: None, factory=make_attention(attention))


@pytest.fixture
def reference() -> dict[str, Any]:
    """What `load` needs for plain torch."""
    return {"make_ops": torch_ops, "attention": reference_backend()}


@pytest.fixture
def host_runner() -> Callable[..., Any]:
    """host_runner(folder, lane=, ops=, attention=, notes=, **RunnerConfig fields): the CUDA device's runner on host memory, in float32."""

    def build(
        path: Path, lane: Lane | None = None, ops: Any = None, attention: Any = TorchAttention, notes: list[str] | None = None, **over: Any
    ) -> Any:
        said = [] if notes is None else notes
        return load(
            settings_for(path, **over),
            lambda phase, fraction: said.append(phase),
            lane or HostLane(),
            {"float32": torch.float32},
            lambda *_, **options: ops or TorchOps(),
            depth=2,
            attention=reference_backend(attention),
        )

    return build


@pytest.fixture
def cpu_runner() -> Callable[..., Any]:
    """cpu_runner(folder, **RunnerConfig fields): the CPU device's."""
    return lambda path, **over: CpuDevice().load(settings_for(path, **over), lambda phase, fraction: None)


class HostDevice:
    """The CUDA device's runner on host memory, as a Device of depth 2."""

    capabilities = DeviceCapabilities(name="cuda-on-host", depth=2, dtypes=["float32"], deterministic=False)

    def __init__(self, lane: Lane | None = None) -> None:
        self.lane = lane or HostLane()
        self.runner: Any = None

    def load(self, config: RunnerConfig, progress: Callable[[str, float], None]) -> Any:
        dtypes = {"float32": torch.float32}
        self.runner = load(config, progress, self.lane, dtypes, torch_ops, depth=2, attention=reference_backend())
        return self.runner


@pytest.fixture
def host_device() -> type[HostDevice]:
    return HostDevice
