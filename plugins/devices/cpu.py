"""The CPU as a device: from a configuration to a loaded runner.

What it is: the dtypes, the sizes of KV cache and context, and the order of loading. Sizes: the KV
cache takes --kv-cache-memory-bytes (1 GiB by default) or exactly --num-gpu-blocks-override blocks; the longest sequence is
--max-model-len, or the model's own length, then reduced if the cache is too small for it (which is said at start).
What it does not know: which model, weights and attention (loading.py), steps (runner.py), the scheduler.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from penstock.core.contract.devices import DeviceCapabilities, MemoryTable, ModelFacts, Runner, RunnerConfig
from penstock.core.protocol.errors import ConfigError
from penstock.kernels import native
from penstock.kernels.attention.codes import KINDS
from penstock.plugins.attention.pages import token_bytes
from penstock.plugins.devices import host_limits
from penstock.plugins.devices.drafting import load_drafters
from penstock.plugins.devices.host_ops import HostOps
from penstock.plugins.devices.lane import HostLane
from penstock.plugins.devices.loading import choose, fingerprint, load_model
from penstock.plugins.devices.runner import DeviceRunner
from penstock.plugins.models.config import check_max_len, default_max_len

GiB = 1 << 30
DEFAULT_KV_BYTES = GiB
"""Or half of the memory, where that is less (a small container)."""
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
LOGIT_WORK = 768
"""Multiply-adds. Measured on two cores without AVX-512: a logit's share of a log-probability takes 1.1 (none likeliest) to 2.6 times (20) what one of the head
with 256 multiply-adds takes."""


class CpuDevice:
    """See core/contract/devices.py: Device. Depth 1: forward and sample run on the calling thread and are over when they return."""

    capabilities = DeviceCapabilities(
        name="cpu",
        depth=2,
        synchronous=True,
        dtypes=list(DTYPES),
        kv_dtypes=KINDS,
        deterministic=True,
        masks=True,
        writes=True,
        logit_work=LOGIT_WORK,
    )

    def load(self, config: RunnerConfig, progress: Callable[[str, float], None]) -> Runner:
        """Raises ConfigError, CheckpointError or UnsupportedFeature naming the flag or field."""
        progress("reading config", 0.0)
        choice = choose(config, "cpu", DTYPES, other="bfloat16")
        facts, dtype = choice.facts, choice.dtype
        set_threads(config.threads)
        num_blocks, max_len, note = size_cache(config, facts, dtype, choice.kv.kind)
        if note:
            progress(note, 0.0)
        lane = HostLane(direct=True)
        ops = HostOps()
        model, checkpoint = load_model(config, choice, ops, lane.device, max_len=max_len, max_rows=config.max_num_seqs, progress=progress)
        drafters, lookahead = load_drafters(
            config, choice, model, ops, lane, max_len=max_len, max_rows=config.max_num_seqs, progress=progress
        )
        own = sum(drafter.page_bytes for drafter in drafters)
        if own:
            num_blocks, max_len, note = size_cache(config, facts, dtype, choice.kv.kind, own)
            if note:
                progress(note, 0.0)
        progress("allocating KV cache", 0.0)
        parts = (
            native.describe(),
            torch.get_num_threads(),
            choice.dtype_name,
            choice.attention.name,
            max_len,
            config.quantization,
            config.lm_head_quantization,
            sorted(choice.raw.items()),
            choice.kv,
        )
        try:
            runner = DeviceRunner(
                facts=facts,
                model=model,
                ops=ops,
                lane=lane,
                num_blocks=num_blocks,
                block_size=config.block_size,
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_model_len=max_len,
                dtype=choice.dtype_name,
                torch_dtype=dtype,
                deterministic=config.deterministic,
                fingerprint=fingerprint(*parts, checkpoint),
                graphs=False,
                depth=self.capabilities.depth,
                kv_dtype=choice.kv_name,
                lookahead=lookahead,
                drafters=drafters,
            )
        except (RuntimeError, MemoryError):  # torch: "can't allocate memory"
            raise too_big(config, num_blocks, block_bytes_of(config, facts, dtype, choice.kv.kind) + own) from None
        runner.memory = memory_table(runner.memory.weights, runner.state_bytes, runner.pool_bytes)
        progress("loaded", 1.0)
        return runner


def set_threads(threads: int | None) -> None:
    """Threads of torch and of the kernels: --threads, or the cores that this process may use, a container's quota considered."""
    count = threads or host_limits.cores()
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)


def size_cache(config: RunnerConfig, facts: ModelFacts, dtype: torch.dtype, kv: str = "", own: int = 0) -> tuple[int, int, str]:
    """(blocks, longest sequence, note for the operator or ""). `own`: bytes of a block that are not the model's. Raises ConfigError naming the flag that
    cannot be met."""
    size = config.block_size
    if size % 16:
        raise ConfigError(f"--block-size {size}: the CPU's cache layout needs a multiple of 16.", param="block_size")
    block_bytes = block_bytes_of(config, facts, dtype, kv) + own
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


def block_bytes_of(config: RunnerConfig, facts: ModelFacts, dtype: torch.dtype, kv: str = "") -> int:
    return facts.num_layers * config.block_size * token_bytes(facts, dtype, kv)


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
