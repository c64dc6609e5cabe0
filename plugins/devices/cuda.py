"""An NVIDIA GPU as a device: from a configuration to a loaded runner with a measured memory table.

What it is: the dtypes, and the order in which memory is taken: weights, workspace (the
largest step is run), graphs (the largest is captured and measured), then the KV cache gets the exact remainder of
--gpu-memory-utilization. If the driver refuses that, the cache shrinks, which is said, before the first graph that serves is captured.
Sizes otherwise as on the CPU: --num-gpu-blocks-override, --kv-cache-memory-bytes, --max-model-len.
What it does not know: which model, weights and attention (loading.py), steps (runner.py), Triton, the scheduler.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable

import msgspec
import torch

from penstock.core.contract.devices import DeviceCapabilities, MemoryTable, ModelFacts, Runner, RunnerConfig
from penstock.core.contract.hookspecs import AttentionSpec
from penstock.core.protocol.errors import ConfigError
from penstock.kernels import gpu, tables
from penstock.kernels.attention.codes import KINDS
from penstock.plugins.devices import cpu
from penstock.plugins.devices.drafting import load_drafters, most_drafts, trees_of
from penstock.plugins.devices.lane import CudaLane, Lane
from penstock.plugins.devices.loading import choose, fingerprint, load_model
from penstock.plugins.devices.ops import DeviceOps
from penstock.plugins.devices.runner import DeviceRunner, padded_rows
from penstock.plugins.models.config import check_max_len, default_max_len
from penstock.version import __version__

log = logging.getLogger("penstock.cuda")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
DEPTH = 2
MIXED_PREFILL_TOKENS = 256
"""Measured on an H200 (docs/benchmarks/h200.md): 60 decodes with 150 prompt tokens take 9.7 ms, with 400 13.7, with 900 25.6."""
GRAPH_RESERVE = 24 << 20
"""Bytes kept for each planned batch size beyond the largest one, whose memory they share: what a graph's nodes and outputs take."""
SHRINK = 0.95
SMALLEST = 0.5
"""The cache is not made smaller than this share of what was planned: then something else is wrong."""


LOGIT_WORK = 8192
"""Multiply-adds. Measured on an H100, 256 rows of 128,256 logits and 4,096 hidden numbers: the head takes 0.48 ms, the rest of a log-probability 0.63 ms
(none likeliest) to 1.12 ms (20)."""


class CudaDevice:
    """See core/contract/devices.py: Device. Depth 2: the host launches step n+1 while the device computes step n."""

    capabilities = DeviceCapabilities(
        name="cuda",
        depth=DEPTH,
        dtypes=list(DTYPES),
        kv_dtypes=KINDS,
        deterministic=True,
        mixed_prefill_tokens=MIXED_PREFILL_TOKENS,
        bounded_steps=True,
        masks=True,
        writes=True,
        logit_work=LOGIT_WORK,
    )

    def load(self, config: RunnerConfig, progress: Callable[[str, float], None]) -> Runner:
        """Raises ConfigError, CheckpointError or UnsupportedFeature naming the flag or field."""
        progress("starting the GPU", 0.0)
        gc.collect()  # an engine that this process closed may still have the memory
        torch.cuda.empty_cache()
        device = torch.device("cuda", torch.cuda.current_device())
        lane = CudaLane(device)
        lane.bind()
        return load(config, progress, lane, DTYPES, depth=DEPTH)


def triton_ops(facts: ModelFacts, device: torch.device, *, max_rows: int, deterministic: bool) -> DeviceOps:
    """The kernels' operations; imports triton."""
    from penstock.plugins.devices.triton_ops import TritonOps

    say_tables()
    return TritonOps(facts, device, max_rows=max_rows, deterministic=deterministic)


def own_tiles(device: torch.device) -> list[tuple[str, dict[str, int]]]:
    """Of the user's own table: other tiles may mean other last bits. The shipped ones belong to the version."""
    return sorted(tables.own().tiles.items()) if device.type == "cuda" else []


def say_tables() -> None:
    """Which tiles the kernels run in, and what is wrong with the user's own table."""
    own = tables.own()
    if own.problem is not None:
        log.warning("%s Until then kernels run in shipped tiles.", own.problem)
    if own.table is not None:
        log.info("tiles of %s: %s", own.table.path, ", ".join(sorted(own.table.tiles)) or "none better than the shipped ones")
        others = [
            f"{name} {own.table.facts.get(name.lower())}, not {now}"
            for name, now in (("Penstock", __version__), ("Triton", tables.triton_version()))
            if own.table.facts.get(name.lower()) != now
        ]
        if others:
            log.info("these tiles were measured with %s: `penstock tune` looks whether there are better ones now", " and ".join(others))
    elif (card := gpu.without_table()) is not None:
        log.warning(
            "%s has no tiles of its own: kernels run in default ones. On an H100 these took a fifth longer for one row of decode."
            " `penstock tune` measures better ones in minutes, once.",
            card,
        )
    else:
        log.info("tiles: those shipped for this card")


def load(
    config: RunnerConfig,
    progress: Callable[[str, float], None],
    lane: Lane,
    dtypes: dict[str, torch.dtype],
    make_ops: Callable[..., DeviceOps] = triton_ops,
    *,
    depth: int,
    attention: AttentionSpec | None = None,
) -> DeviceRunner:
    """A runner on any lane; see CudaDevice.load. `make_ops(facts, device, max_rows=, deterministic=)`; `attention`: not chosen among the plugins,
    but given."""
    progress("reading config", 0.0)
    if config.block_size < 16 or config.block_size & (config.block_size - 1):
        raise ConfigError(f"--block-size {config.block_size}: the GPU's cache layout needs a power of two from 16 on.", param="block_size")

    def check(facts: ModelFacts) -> None:
        if config.max_model_len is not None:
            check_max_len(facts, config.max_model_len)

    choice = choose(config, "cuda", dtypes, other="bfloat16", attention=attention, check=check)
    facts = choice.facts
    ahead = most_drafts(config)
    max_rows = padded_rows(config.max_num_seqs * (1 + ahead), ahead)
    max_len = config.max_model_len or default_max_len(facts)
    ops = make_ops(facts, lane.device, max_rows=max_rows, deterministic=config.deterministic)
    with lane.loading():
        model, checkpoint = load_model(config, choice, ops, lane.device, max_len=max_len, max_rows=max_rows, progress=progress)
        capturable = ops.capturable and model.capturable and model.attention.capturable
        graphs = not config.enforce_eager and (capturable or lane.device.type == "cpu")
        drafters, lookahead = load_drafters(
            config, choice, model, ops, lane, max_len=max_len, max_rows=max_rows, progress=progress, graphs=graphs
        )
    name = torch.cuda.get_device_name(lane.device) if lane.device.type == "cuda" else "cpu"
    rounded = (config.quantization, config.lm_head_quantization)
    parts = (name, choice.dtype_name, choice.attention.name, max_len, config.deterministic, rounded, sorted(choice.raw.items()), choice.kv)
    # Where a tree's rows share tiles of keys, sums are taken in another order than without.
    trees = () if config.deterministic else trees_of(config)
    runner = DeviceRunner(
        facts=facts,
        model=model,
        ops=ops,
        lane=lane,
        num_blocks=1,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=max_len,
        dtype=choice.dtype_name,
        torch_dtype=choice.dtype,
        deterministic=config.deterministic,
        fingerprint=fingerprint(*parts, *own_tiles(lane.device), *trees, checkpoint),
        graphs=graphs,
        depth=depth,
        kv_dtype=choice.kv_name,
        lookahead=lookahead,
        drafters=drafters,
    )
    if capturable:
        progress("compiling kernels", 0.0)
        runner.compile_ahead()
    size_cache(config, runner, lane, progress)
    progress("loaded", 1.0)
    return runner


def size_cache(config: RunnerConfig, runner: DeviceRunner, lane: Lane, progress: Callable[[str, float], None]) -> None:
    """Measure workspace and graphs, give the cache what is left (or what was asked for), fill in the memory table.
    Raises ConfigError naming the flag that cannot be met."""
    block_bytes = runner.allocate(1).nbytes
    weights = runner.memory.weights
    host = lane.device.type == "cpu"
    total = 0 if host else torch.cuda.get_device_properties(lane.device).total_memory
    graphs = before = 0
    if not host:
        progress("measuring workspace", 0.0)
        gc.collect()
        torch.cuda.empty_cache()  # what loading left over is not workspace
        runner.exercise(config.max_num_seqs, config.max_num_batched_tokens)
        before = lane.used()
        if runner.graphs_planned:
            progress("measuring the largest graph", 0.0)
            runner.capture_largest()
            graphs = max(0, lane.used() - before) + GRAPH_RESERVE * runner.graphs_planned
            runner.drop_graphs()
            gc.collect()
            torch.cuda.empty_cache()
    runner.graph_reserve = graphs
    limit = int(total * config.gpu_memory_utilization)
    if config.num_gpu_blocks_override:
        blocks = config.num_gpu_blocks_override
    elif config.kv_cache_memory_bytes or host:
        blocks = (config.kv_cache_memory_bytes or cpu.DEFAULT_KV_BYTES) // block_bytes
    else:
        blocks = (limit - before - graphs) // block_bytes
    if blocks < 1 and config.kv_cache_memory_bytes:
        raise ConfigError(
            f"No room for a KV cache: --kv-cache-memory-bytes {config.kv_cache_memory_bytes} is less than one block of {block_bytes} bytes.",
            param="kv_cache_memory_bytes",
        )
    if blocks < 1:
        raise ConfigError(
            f"No room for a KV cache: of {limit >> 20} MiB (--gpu-memory-utilization {config.gpu_memory_utilization:g} of {total >> 20} MiB)"
            f" weights take {weights >> 20} MiB, everything else {(before + graphs - weights) >> 20} MiB.",
            param="gpu_memory_utilization",
        )
    wanted, pool = blocks, None
    asked = (
        "num_gpu_blocks_override" if config.num_gpu_blocks_override else "kv_cache_memory_bytes" if config.kv_cache_memory_bytes else None
    )
    progress("allocating KV cache", 0.0)
    while pool is None:
        try:
            pool = runner.allocate(blocks)
        except torch.OutOfMemoryError:
            gc.collect()
            torch.cuda.empty_cache()
            blocks = int(blocks * SHRINK)
            if blocks < max(1, int(wanted * SMALLEST)):
                blame = asked or "gpu_memory_utilization"
                raise ConfigError(
                    f"The driver gives no memory for a KV cache of {wanted} blocks ({wanted * block_bytes >> 20} MiB), nor for half of it:"
                    f"{'' if asked else ' is something else running on this GPU?'} Lower --{blame.replace('_', '-')}.",
                    param=blame,
                ) from None
            progress(f"KV cache reduced to {blocks} of {wanted} blocks: the driver refused more", 0.0)
    runner.resize(pool, blocks)
    _fit_length(config, runner, block_bytes, progress)
    workspace = max(runner.state_bytes, before - weights - block_bytes)
    table = MemoryTable(weights=weights, workspace=workspace, graphs=graphs, kv=pool.nbytes, slack=0, total=total)
    slack = total - weights - workspace - graphs - pool.nbytes
    runner.memory = msgspec.structs.replace(table, slack=max(0, slack), total=total or weights + workspace + pool.nbytes)


def _fit_length(config: RunnerConfig, runner: DeviceRunner, block_bytes: int, progress: Callable[[str, float], None]) -> None:
    room = runner.num_blocks * runner.block_size
    if runner.max_model_len <= room:
        return
    if config.max_model_len is not None:
        need = -(-config.max_model_len // runner.block_size) * block_bytes
        raise ConfigError(
            f"--max-model-len {config.max_model_len} does not fit: the KV cache holds {room} tokens. Lower it, or give"
            f" --kv-cache-memory-bytes {need}.",
            param="max_model_len",
        )
    progress(f"max_model_len reduced from {runner.max_model_len} to {room}: all that the KV cache holds", 0.0)
    runner.max_model_len = room
