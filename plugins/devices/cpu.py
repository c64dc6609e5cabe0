"""The CPU as a device: from a configuration to a loaded runner.

What it is: the choice of the attention plugin, the dtype, the sizes of KV cache and context, and the loading. Sizes: the KV
cache takes --kv-cache-memory-bytes (1 GiB by default) or exactly --num-gpu-blocks-override blocks; the longest sequence is
--max-model-len, or the model's own length, then reduced if the cache is too small for it (which is said at start).
What it does not know: which model and weights (parts.py), steps (cpu_runner.py), the scheduler.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from penstock.core.contract.devices import DeviceCapabilities, MemoryTable, ModelFacts, Runner, RunnerConfig
from penstock.core.contract.hookspecs import AttentionSpec
from penstock.core.protocol.errors import ConfigError
from penstock.kernels import native
from penstock.plugins.devices import host_limits
from penstock.plugins.devices.cpu_runner import CpuRunner
from penstock.plugins.devices.parts import attention_of, identity, model_of, weights_for
from penstock.plugins.models.config import check_max_len, default_max_len
from penstock.version import __version__

GiB = 1 << 30
DEFAULT_KV_BYTES = GiB
"""Or half of the memory, where that is less (a small container)."""
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class CpuDevice:
    """See core/contract/devices.py: Device. Depth 1: forward and sample run on the calling thread and are over when they return."""

    capabilities = DeviceCapabilities(name="cpu", depth=2, synchronous=True, dtypes=list(DTYPES), deterministic=True)

    def load(self, config: RunnerConfig, progress: Callable[[str, float], None]) -> Runner:
        """Raises ConfigError, CheckpointError or UnsupportedFeature naming the flag or field."""
        progress("reading config", 0.0)
        raw, spec, facts = model_of(config)
        dtype_name = resolve_dtype(config.dtype, facts)
        dtype = DTYPES[dtype_name]
        set_threads(config.threads)
        backend_spec = choose_attention(config, facts, dtype_name)
        backend = backend_spec.factory(facts=facts, dtype=dtype)
        num_blocks, max_len, note = size_cache(config, facts, dtype)
        if note:
            progress(note, 0.0)
        progress("loading weights", 0.0)
        weights = weights_for(config).factory(
            config.model_path, config.load_format, dtype=dtype, seed=config.seed, std=float(raw.get("initializer_range") or 0.02)
        )
        model = spec.factory(
            facts=facts,
            dtype=dtype,
            weights=weights,
            attention=backend,
            max_len=max_len,
            progress=lambda fraction: progress("loading weights", fraction),
        )
        progress("allocating KV cache", 0.0)
        try:
            pool = backend.allocate(num_blocks, facts.num_kv_heads, config.block_size, facts.head_dim, dtype, facts.num_layers)
        except (RuntimeError, MemoryError):  # torch: "can't allocate memory"
            raise too_big(config, num_blocks, block_bytes_of(config, facts, dtype)) from None
        layout = f"{backend.kv_layout}:{dtype_name}:L{facts.num_layers}:H{facts.num_kv_heads}:D{facts.head_dim}:B{config.block_size}"
        runner = CpuRunner(
            facts=facts,
            model=model,
            pool=pool,
            num_blocks=num_blocks,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=max_len,
            dtype=dtype_name,
            attention=backend.name,
            deterministic=config.deterministic,
            fingerprint=fingerprint(raw, dtype_name, backend.name, max_len, identity(config, weights)),
            kv_layout=layout,
            memory=lambda workspace: memory_table(model.weights_bytes, workspace + model.tables_bytes, pool.nbytes),
        )
        progress("loaded", 1.0)
        return runner


def resolve_dtype(wanted: str, facts: ModelFacts) -> str:
    """ "auto" is the checkpoint's dtype, bfloat16 for a float16 one. Raises ConfigError for float16: this device would have to emulate it."""
    name = {"half": "float16", "float": "float32"}.get(wanted, wanted)
    if name == "auto":
        return "bfloat16" if facts.torch_dtype == "float16" else facts.torch_dtype
    if name not in DTYPES:
        raise ConfigError(f"--dtype {wanted} is not supported on the CPU: use bfloat16 (same size, wider range) or float32.", param="dtype")
    return name


def choose_attention(config: RunnerConfig, facts: ModelFacts, dtype: str) -> AttentionSpec:
    """--attention-backend, or a plugin's choice, or the highest priority among those that support the model."""
    able, reasons = [], []
    for spec in attention_of(config).values():
        if "cpu" not in spec.devices:
            continue
        reason = spec.supports(facts, dtype)
        if reason is None:
            able.append(spec)
        else:
            reasons.append(f"{spec.name}: {reason}")
    able.sort(key=lambda spec: (-spec.priority, spec.name))
    names = [spec.name for spec in able]
    wanted = config.attention_backend
    if wanted is None and config.plugins is not None and names:
        wanted = config.plugins.hook.choose_attention_backend(facts=facts, device="cpu", dtype=dtype, candidates=names)
    if wanted is None and names:
        return able[0]
    if wanted in names:
        return able[names.index(wanted)]
    why = f" ({'; '.join(reasons)})" if reasons else ""
    raise ConfigError(
        f"--attention-backend {wanted or 'auto'}: not usable for this model on the CPU{why}. Usable: {', '.join(names) or 'none'}.",
        param="attention_backend",
    )


def set_threads(threads: int | None) -> None:
    """Threads of torch and of the kernels: --threads, or the cores that this process may use, a container's quota considered."""
    count = threads or host_limits.cores()
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)


def size_cache(config: RunnerConfig, facts: ModelFacts, dtype: torch.dtype) -> tuple[int, int, str]:
    """(blocks, longest sequence, note for the operator or ""). Raises ConfigError naming the flag that cannot be met."""
    size = config.block_size
    if size % 16:
        raise ConfigError(f"--block-size {size}: the CPU's cache layout needs a multiple of 16.", param="block_size")
    block_bytes = block_bytes_of(config, facts, dtype)
    limit = config.kv_cache_memory_bytes or min(DEFAULT_KV_BYTES, host_limits.memory_bytes() // 2)
    blocks = config.num_gpu_blocks_override or limit // block_bytes
    if blocks < 1:
        raise ConfigError(
            f"--kv-cache-memory-bytes {limit} holds no block: one of {size} tokens takes {block_bytes} bytes.",
            param="kv_cache_memory_bytes",
        )
    if blocks * block_bytes > host_limits.memory_bytes():
        raise too_big(config, blocks, block_bytes)
    room = blocks * size
    if config.max_model_len is not None:
        check_max_len(facts, config.max_model_len)
        if config.max_model_len > room:
            need = -(-config.max_model_len // size)
            raise ConfigError(
                f"--max-model-len {config.max_model_len} does not fit: the KV cache holds {room} tokens. Lower it, or give"
                f" --kv-cache-memory-bytes {need * block_bytes}.",
                param="max_model_len",
            )
        return blocks, config.max_model_len, ""
    own = default_max_len(facts)
    if own <= room:
        return blocks, own, ""
    return blocks, room, f"max_model_len reduced from {own} to {room}: all that the KV cache of {blocks} blocks holds"


def block_bytes_of(config: RunnerConfig, facts: ModelFacts, dtype: torch.dtype) -> int:
    return 2 * facts.num_layers * facts.num_kv_heads * config.block_size * facts.head_dim * dtype.itemsize


def too_big(config: RunnerConfig, blocks: int, block_bytes: int) -> ConfigError:
    """What to say of a KV cache that this machine has no memory for."""
    name = "num_gpu_blocks_override" if config.num_gpu_blocks_override else "kv_cache_memory_bytes"
    given = config.num_gpu_blocks_override or config.kv_cache_memory_bytes or DEFAULT_KV_BYTES
    return ConfigError(
        f"--{name.replace('_', '-')} {given}: a KV cache of {blocks * block_bytes >> 20} MiB does not fit here: this machine (or its"
        f" container) has {host_limits.memory_bytes() >> 20} MiB of memory, {host_limits.free_bytes() >> 20} MiB of it free. Lower it.",
        param=name,
    )


def memory_table(weights: int, workspace: int, kv: int) -> MemoryTable:
    """Bytes; a CPU has no graphs, and slack is what the machine has left."""
    total = host_limits.memory_bytes()
    return MemoryTable(weights=weights, workspace=workspace, graphs=0, kv=kv, slack=max(0, total - weights - workspace - kv), total=total)


def fingerprint(raw: Mapping[str, Any], dtype: str, attention: str, max_len: int, checkpoint: str) -> str:
    """Changes whenever numerics may: version, torch, kernels, threads, dtype, attention, rope's length, configuration and checkpoint."""
    parts = [
        __version__,
        torch.__version__,
        native.describe(),
        str(torch.get_num_threads()),
        dtype,
        attention,
        str(max_len),
        repr(sorted(raw.items())),
        checkpoint,
    ]
    return "pk_" + hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
