"""What a device offers to the core, over numpy columns.

What it is: the Protocols that device, model, attention and weight plugins implement, and the plain structs that describe a model. The
fake device of the tests implements the same.
What it does not know: torch, kernels, which plugin is chosen, the scheduler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import msgspec

from penstock.core.protocol.errors import UnsupportedFeature
from penstock.core.protocol.messages import Forward, Sample, StepDone
from penstock.core.protocol.speculation import SpeculationConfig

RopeType = Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope"]


class RopeFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Rotary embedding of a checkpoint; `params` holds the rope_type's own numbers as config.json spells them."""

    type: RopeType = "default"
    theta: float = 10000.0
    """The base of the frequencies."""
    partial_rotary_factor: float = 1.0
    """The share of head_dim that is rotated, from the front."""
    params: dict[str, Any] = {}
    """For "yarn", say, `factor`, `original_max_position_embeddings`, `beta_fast`."""


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A decoder's shape, read from config.json. Sizes in elements."""

    architecture: str
    """The first of config.json's `architectures`."""
    model_type: str
    """As in config.json."""
    vocab_size: int
    """Rows of the embedding and of the output head: a token id is below it."""
    hidden_size: int
    intermediate_size: int
    """Of the feed-forward part."""
    num_layers: int
    num_heads: int
    """Query heads. Head h reads KV head h // (num_heads / num_kv_heads)."""
    num_kv_heads: int
    """Divides num_heads."""
    head_dim: int
    """Not always hidden_size / num_heads."""
    max_position: int
    """The longest sequence in tokens that the model reaches."""
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    """The embedding table is the output head too."""
    attention_bias: bool = False
    """q, k and v have biases."""
    attention_out_bias: bool = False
    """So has the projection behind attention."""
    mlp_bias: bool = False
    """So have gate, up and down."""
    qk_norm: bool = False
    """The heads of q and k are RMS-normed before they are rotated."""
    hidden_act: str = "silu"
    """Of the gate."""
    sliding_window: int | None = None
    """A position sees only the last so many, itself included. None: all."""
    sliding_layers: list[bool] = []
    """One flag per layer: does it attend within sliding_window only. Empty: all or none, by sliding_window."""
    softcap: bool = False
    """Attention's scores are soft-capped (AttnCall.softcap): a backend that cannot is not chosen."""
    sinks: bool = False
    """Its softmax has sinks (AttnCall.sinks)."""
    rope: RopeFacts = RopeFacts()
    torch_dtype: str = "bfloat16"
    """The checkpoint's own dtype, "bfloat16", "float16" or "float32": what `--dtype auto` starts from."""


class MemoryTable(msgspec.Struct, frozen=True, kw_only=True):
    """Exact bytes, printed at start."""

    weights: int
    workspace: int
    """Everything else that steps need: tables, activations, slots."""
    graphs: int
    """Captured graphs; 0 where there are none."""
    kv: int
    """The KV cache."""
    slack: int
    """What is left of the total."""
    total: int
    """Of the device."""


class DeviceCapabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What a device plugin declares about itself."""

    name: str
    """As its spec's."""
    depth: int
    """Steps that may be in flight: 1, or 2 to have the next step planned while this one runs."""
    dtypes: list[str]
    """Words of --dtype that it computes in."""
    kv_dtypes: tuple[str, ...] = ()
    """Words of --kv-cache-dtype that it stores keys and values in, beside "auto" and those of --dtype: of "fp8_e4m3", "fp8_e5m2", "int8" ("fp8" is the first).
    What its attention backends cannot it refuses itself."""
    deterministic: bool
    """Does it honour --deterministic."""
    load_formats: tuple[str, ...] = ("auto", "safetensors", "dummy")
    """Words of --load-format; weight sources decide, so this only informs."""
    mixed_prefill_tokens: int = 0
    """Tokens of a step from which on each makes it longer; 0: every one does. A GPU needs about the same time to read a layer's weights and to multiply them
    with (multiply-adds per second x 2 bytes / bandwidth) tokens. Where it is above 0, prompts beside decodes are paced unless told otherwise (`--itl-target-ms`)."""
    synchronous: bool = False
    """`Runner.sample` returns when the step is done (a CPU): with a depth above 1 no thread has to wait for its results."""
    bounded_steps: bool = False
    """No step takes minutes: if one does, the device hangs, and `--watchdog-timeout` may end the engine. (A large prefill on a CPU may.)"""
    clones: bool = False
    """Its runner serves Forward.clone_*: the choices of a request are cloned from the first instead of being placed with the prompt again."""
    lookahead: int = 0
    """The most drafts behind a token that its runner makes and verifies: Forward.lookahead, Sample.lookahead and Sample.drafts go up to it. A runner that has
    an attribute `lookahead` says it better, for that depends on what was loaded. 0: one token a row and step."""
    kv_groups: int = 1
    """KV groups, each with its own block table a slot: Forward.block_groups and copy_groups are below it. 1: those columns are empty or 0."""
    adapters: int = 0
    """The most adapters that are resident at once: Forward.place_adapters goes from 0 (none) to it."""
    embeddings: int = 0
    """Rows of embeddings that it holds for Forward.embed_*. 0: it serves none."""
    pool_kinds: tuple[int, ...] = ()
    """Kinds of Sample.pool_kinds that its runner serves."""
    masks: bool = False
    """Its runner serves Sample.mask: answers can be made to obey a grammar."""
    writes: bool = False
    """Its runner serves Forward.write_*: a beam search can be made with it, if it has no lookahead."""
    logit_work: int = 0
    """What a log-probability costs besides the output head, in multiply-adds a logit: sum of exponentials, rank, likeliest tokens. The scheduler makes
    steps with such prompt tokens smaller by it: see `prompt_logprobs_weight`."""


MOST_WEIGHT = 16.0
"""However small the layers are beside the vocabulary, a step takes a sixteenth of its tokens."""


def prompt_logprobs_weight(facts: ModelFacts, device: DeviceCapabilities) -> float:
    """How many plain prompt tokens one with a log-probability counts for in a step's budget, at least 1: what it costs over what a plain one costs, in
    multiply-adds. A plain prompt token passes the layers; only the last one of a prompt needs the output head, which for all of them multiplies
    hidden_size x vocab_size numbers each. Attention over the context is left out: both kinds pay it."""
    heads, kv_heads = facts.num_heads * facts.head_dim, facts.num_kv_heads * facts.head_dim
    layers = facts.num_layers * facts.hidden_size * (2 * heads + 2 * kv_heads + 3 * facts.intermediate_size)
    head = facts.vocab_size * (facts.hidden_size + device.logit_work)
    return max(1.0, min(MOST_WEIGHT, 1.0 + head / max(1, layers)))


class RunnerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a runner is built from: options of the same names, where nothing else is said. Sizes: tokens, rows, bytes."""

    model_path: str
    """The model's folder, absolute, which holds a config.json; or its file."""
    dtype: str
    """"auto" (the checkpoint's), "bfloat16", "float16", "float32", or another word of --dtype, which the device knows or refuses."""
    max_model_len: int | None
    """None: as long as the model and the KV cache reach."""
    block_size: int
    """Tokens of a KV block."""
    max_num_seqs: int
    """Slots: the most sequences that run at once, and the most rows of a step."""
    max_num_batched_tokens: int
    """The most tokens of a step."""
    kv_cache_memory_bytes: int | None
    """None: the device decides."""
    num_gpu_blocks_override: int | None
    """Exactly so many KV blocks; before kv_cache_memory_bytes."""
    gpu_memory_utilization: float
    """The share of the device's memory that may be used, 0 to 1."""
    load_format: str
    """The word for which a weight source is chosen."""
    deterministic: bool
    """A sequence's results must not depend on what else is in the step, bit by bit."""
    enforce_eager: bool
    """No captured graphs."""
    attention_backend: str | None
    """None: the best that fits."""
    seed: int
    """For weights that are made up."""
    threads: int | None
    """Of the host's computing. None: as many as it has cores."""
    max_logprobs: int
    """The most log-probabilities a position that anybody may ask for."""
    kv_cache_dtype: str = "auto"
    """"auto" (what the checkpoint says of its KV cache, else the dtype), "fp8_e4m3", "fp8_e5m2", "int8", or the dtype itself."""
    quantization: str | None = None
    """How wide weights are quantised while they load, or the method that config.json names anyway. None: as the checkpoint is."""
    hf_overrides: dict[str, Any] = {}
    """To be merged over config.json."""
    speculation: SpeculationConfig | None = None
    """The drafters that are asked for, every one with a method and its model's folder; those of `where="host"` are none of the device's business. None: no
    speculation, and nothing of it may cost anything. A runner that cannot raises UnsupportedFeature."""
    plugins: Any = None
    """The engine's PluginHost (core/contract/host.py), from which the device takes models, attention backends, weight sources and quantizers: `plugins.models()`,
    `.attention_backends()`, `.weight_sources()`, `.quantizers()`, `.drafters()` are name -> spec, built-in ones first. None: the built-ins only."""
    lm_head_quantization: str | None = None
    """How a wide output head is quantised while it loads, a word as `quantization`'s. None: it is not."""


READS_NOTHING, READS_TOKENS, READS_ALL = 0, 1, 2
"""See Runner.reads."""

_FORWARD_COLUMNS = (
    "write_slots",
    "clone_src",
    "block_groups",
    "copy_groups",
    "place_adapters",
    "embed_slots",
    "loose",
    "place_unread",
    "read_slots",
)
_SAMPLE_COLUMNS = ("mask_rows", "pool_rows")


def refuse_columns(
    work: Forward | Sample, *, masks: bool = False, writes: bool = False, lookahead: int = 0, loose: bool = False, unread: bool = False
) -> None:
    """For a runner that serves no optional column (but masks, writes, loose rows, unread sequences and so many drafts, if it says so): raises UnsupportedFeature naming the one
    that `work` has."""
    name = "lookahead" if work.lookahead > lookahead else "drafts" if isinstance(work, Sample) and work.drafts > lookahead else ""
    for column in _FORWARD_COLUMNS if isinstance(work, Forward) else _SAMPLE_COLUMNS:
        served = (masks and column == "mask_rows") or (writes and column == "write_slots") or (loose and column == "loose")
        served = served or (unread and column in ("place_unread", "read_slots"))
        if len(getattr(work, column)) and not served:
            name = column
            break
    if name:
        raise UnsupportedFeature(f"This runner does not serve the column {type(work).__name__}.{name}.", param=name)


class Runner(Protocol):
    """A loaded model on a device. All methods are called from the device's own thread, in queue order: for step 1, 2, ... a `forward`, then
    a `sample`. An exception from either ends this life of the engine: it is started anew, and its requests are replayed.

    It may also have `improve() -> bool`: called on that thread while nothing is queued and no step is under way, to do a bounded piece of work
    (tens of ms, a request may wait for it) that makes later steps faster. False: nothing is left to do before the next step.

    It may have `move(work: Move) -> Callable[[], None]`: between two steps, copy whole KV blocks from or to host memory of its own; the returned call
    waits for the bytes as `sample`'s does. And `control(work: Control) -> bytes`: a named call between two steps. Who asks for either is answered
    by a WorkDone, also where the runner lacks it. A PenstockError from them is such an answer (UnsupportedFeature for a name that it does not know);
    any other exception ends the engine, as one of a step does.

    It may have `kv_dtype`, the word of --kv-cache-dtype for what a block holds, where that is not the dtype.
    With drafters (RunnerConfig.speculation) it has `lookahead: int`, the most drafts that it makes behind a token and verifies now that everything is loaded,
    and `drafters: tuple[str, ...]`, their methods, the first asked first: bit i of Sample.drafters and the number i in StepDone.drafters are drafter i. It may have
    `widths: tuple[int, ...]`, the lookaheads that it has prepared (captured graphs for, say), ascending: steps have no others. Without: all up to `lookahead`.
    `masks_ahead: bool` says that it takes masks behind drafts (Sample.mask_rows); without, sequences that obey a grammar have no drafts.
    `loose: bool` says that it takes Forward.loose; without, a step behind one with drafts comes when that has landed.
    `adjusts_ahead: bool`, True where it is absent: False says that it cannot apply penalties and bad words of several tokens behind drafts; sequences with those then have none.
    `reads: tuple[int, ...]` says of each of `drafters` what it needs of a sequence before it can draft: READS_NOTHING; READS_TOKENS, which it can read at any time; or READS_ALL, what is
    seen while the sequence is computed. With it the runner takes Forward.place_unread, and with READS_TOKENS Forward.read_slots. Without, drafters see every sequence.
    """

    facts: ModelFacts
    """What the model turned out to be; `vocab_size` bounds every token id."""
    num_blocks: int
    """KV blocks that there are: ids are 0 to num_blocks - 1, all of them the core's to give out."""
    max_model_len: int
    """The longest sequence in tokens, prompt and output: at most num_blocks * block_size."""
    dtype: str
    """"bfloat16", say."""
    attention: str
    """The backend's name."""
    memory: MemoryTable
    """What takes how much."""
    fingerprint: str
    """Clients see it as system_fingerprint: changes whenever numerics may."""
    kv_layout: str
    """Names the order of bytes in a KV block; equal texts mean that blocks could be exchanged."""

    def forward(self, work: Forward) -> None:
        """Run (CPU) or enqueue (GPU) the model's step; keeps the rows' last hidden states for `sample`, and all of the rows `prompt_rows`."""
        ...

    def sample(self, work: Sample) -> Callable[[], StepDone]:
        """Run or enqueue the draw and the write of tokens into their slots. The returned call waits for the step's results (a GPU waits
        for its copy event on the waiter thread; a CPU returns what is there)."""
        ...

    def warm_up(self, progress: Callable[[str], None]) -> None:
        """Touch every shape that a first request would otherwise pay for; the deterministic self-test runs here. Called once, before any
        step; `progress(phase)` is shown to who waits for the start."""
        ...

    def close(self) -> None:
        """Give everything back. Called once, last."""
        ...


class Device(Protocol):
    """A hardware target."""

    capabilities: DeviceCapabilities
    """Read after `load`."""

    def load(self, config: RunnerConfig, progress: Callable[[str, float], None]) -> Runner:
        """Runs on the device's own thread, once; `progress(phase, fraction 0..1)` may be called from it. Raises ConfigError, CheckpointError or
        UnsupportedFeature naming the flag or field."""
        ...
