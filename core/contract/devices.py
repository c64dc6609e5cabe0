"""What a device offers to the core, over numpy columns.

What it is: the Protocols that device, model, attention and weight plugins implement, and the plain structs that describe a model. The
fake device of the tests implements the same.
What it does not know: torch, kernels, which plugin is chosen, the scheduler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import msgspec

from penstock.core.protocol.messages import Forward, Sample, StepDone

RopeType = Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope"]


class RopeFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Rotary embedding of a checkpoint; `params` holds the rope_type's own numbers as config.json spells them."""

    type: RopeType = "default"
    theta: float = 10000.0
    partial_rotary_factor: float = 1.0
    params: dict[str, Any] = {}


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A decoder's shape, read from config.json. Sizes in elements."""

    architecture: str
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    hidden_act: str = "silu"
    sliding_window: int | None = None
    sliding_layers: list[bool] = []
    """One flag per layer: does it attend within sliding_window only. Empty: all or none, by sliding_window."""
    rope: RopeFacts = RopeFacts()
    torch_dtype: str = "bfloat16"


class MemoryTable(msgspec.Struct, frozen=True, kw_only=True):
    """Exact bytes, printed at start."""

    weights: int
    workspace: int
    graphs: int
    kv: int
    slack: int
    total: int


class DeviceCapabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What a device plugin declares about itself."""

    name: str
    depth: int
    """Steps that may be in flight."""
    dtypes: list[str]
    deterministic: bool
    load_formats: tuple[str, ...] = ("auto", "safetensors", "dummy")
    mixed_prefill_tokens: int = 0
    """Prompt tokens that a step which also decodes should not exceed, for even inter-token latency, unless many wait; 0: no advice. A GPU needs about the same
    time to read a layer's weights and to multiply them with (multiply-adds per second x 2 bytes / bandwidth) tokens: beyond that, tokens cost time."""
    synchronous: bool = False
    """`Runner.sample` returns when the step is done (a CPU): with a depth above 1 no thread has to wait for its results."""
    bounded_steps: bool = False
    """No step takes minutes: if one does, the device hangs, and `--watchdog-timeout` may end the engine. (A large prefill on a CPU may.)"""


class RunnerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a runner is built from. Sizes: tokens, rows, bytes."""

    model_path: str
    dtype: str
    """"auto" (the checkpoint's), "bfloat16", "float16", "float32", or another word of --dtype, which the device knows or refuses."""
    max_model_len: int | None
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_cache_memory_bytes: int | None
    num_gpu_blocks_override: int | None
    gpu_memory_utilization: float
    load_format: str
    deterministic: bool
    enforce_eager: bool
    attention_backend: str | None
    seed: int
    threads: int | None
    max_logprobs: int
    hf_overrides: dict[str, Any] = {}
    plugins: Any = None
    """The engine's PluginHost, from which the device takes models, attention backends and weight sources. None: the built-ins only."""


class Runner(Protocol):
    """A loaded model on a device. All methods are called from the device's own thread, in queue order.

    It may also have `improve() -> bool`: called on that thread while nothing is queued and no step is under way, to do a bounded piece of work
    (tens of ms, a request may wait for it) that makes later steps faster. False: nothing is left to do before the next step.
    """

    facts: ModelFacts
    num_blocks: int
    max_model_len: int
    dtype: str
    attention: str
    memory: MemoryTable
    fingerprint: str
    kv_layout: str

    def forward(self, work: Forward) -> None:
        """Run (CPU) or enqueue (GPU) the model's step; keeps the rows' last hidden states for `sample`."""
        ...

    def sample(self, work: Sample) -> Callable[[], StepDone]:
        """Run or enqueue the draw and the write of tokens into their slots. The returned call waits for the step's results (a GPU waits
        for its copy event on the waiter thread; a CPU returns what is there)."""
        ...

    def warm_up(self, progress: Callable[[str], None]) -> None:
        """Touch every shape that a first request would otherwise pay for; the deterministic self-test runs here."""
        ...

    def close(self) -> None: ...


class Device(Protocol):
    """A hardware target. `load` runs on the device's own thread; `progress(phase, fraction 0..1)` may be called from it."""

    capabilities: DeviceCapabilities

    def load(self, config: RunnerConfig, progress: Callable[[str, float], None]) -> Runner: ...
