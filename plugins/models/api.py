"""What model families, attention backends and devices give each other: the seams of one step.

What it is: the Protocols. A family composes `Linear` layers (which a `Builder` made), an `Attention` and the device's `Ops` into one step; the same
family file serves every device. T tokens of R sequences are computed in a step, the index tensors say which.
What it does not know: how any of them computes, where tensors come from, slots, scheduling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from penstock.core.contract.devices import ModelFacts
from penstock.kernels.linear.scheme import Quantised, Scheme
from penstock.kernels.w8a8.rows import Rounded, Rounding

Tensor = torch.Tensor
Progress = Callable[[float], None]
"""Called with the loaded fraction, 0..1."""


class Weights(Protocol):
    """Named tensors of one checkpoint, by the names that Hugging Face checkpoints have ("model.layers.0.self_attn.q_proj.weight"; a linear layer's
    weight is [outputs, inputs]). The order of calls: `take` and `ignore` in any order and number, then `finish` once. On "cuda" `take` may be called from several
    threads at once.

    It may also have `has(name) -> bool`: whether the tensor is there, taken or not (without it, tied embeddings are one tensor,
    "model.embed_tokens.weight", whatever the files hold), and `identity() -> str`: a text that changes with the contents (without it, size and
    ends of each of the folder's files stand for them); it is called after `finish`. With `raw(name) -> Tensor`, the tensor as it is stored, of whatever
    dtype and shape, it serves quantised checkpoints, too; then it has `has` as well. `note(name) -> str | None` is what files say beside their tensors.
    """

    def take(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """The tensor, contiguous, of exactly this shape, in the dtype that the factory was given, on the host (or on the factory's `device`). Called once a
        name. It may be a view of a mapped file: who takes it packs or clones it.
        Raises CheckpointError naming a missing, unreadable or wrong-shaped tensor, UnsupportedFeature for one that is no float."""
        ...

    def ignore(self, *names: str) -> None:
        """These may exist, but are not needed: `finish` must not complain about them. They need not exist."""
        ...

    def finish(self) -> None:
        """Close. Raises CheckpointError naming tensors that nobody took (serving without them would give wrong answers)."""
        ...


class Columns(NamedTuple):
    """A step's index tensors, all int32 and contiguous, on the device. A slot, row or place below 0 is padding: it reads zeros and writes nowhere.

    Sequence r owns the token rows q_start[r] to q_start[r + 1] - 1; its last one sits at position kv_len[r] - 1, and a row sees the positions from 0
    to its own. Its blocks are the row slots[r] of `table`, in order: position p lies in place `table[slots[r], p // block_size] * block_size
    + p % block_size`. Entries beyond ceil(kv_len / block_size) mean nothing and may be -1.
    """

    tokens: Tensor
    """[T] ids."""
    positions: Tensor
    """[T] of each token in its sequence."""
    places: Tensor
    """[T] where its key and value go: block * block_size + offset."""
    slots: Tensor
    """[R] rows of `table`."""
    kv_len: Tensor
    """[R] a sequence's length up to this step's end."""
    q_start: Tensor
    """[R + 1]; q_start[0] is 0."""
    table: Tensor
    """[S, W] blocks of each slot."""
    num_decode: int
    """The first so many sequences compute one token each; -1: any may, which only the device knows."""
    dense: bool = False
    """`table` has the rows of this step's sequences alone, in order. On "cpu" always, and there is no padding."""
    ancestors: Tensor | None = None
    """[T] int64, in a step with trees of drafts: of the 64 entries up to its own a row sees those whose bit is 1, bit i being the entry i places before; -1: all. Those that it
    sees are at the positions up to its own, one each and in this order, so that its own is its place less the number of those that it does not see; windows count positions. Rows of a sequence lie one
    place after the other, as `q_start` and `kv_len` say. In deterministic mode on a device other than "cpu" nodes are sequences of one row. Attention without `trees` never gets it."""

    def block_tables(self) -> Tensor:
        """[R, W] blocks of this step's sequences."""
        return self.table if self.dense else self.table.index_select(0, self.slots.clamp_min(0))


class AttnCall(NamedTuple):
    """What one layer's attention does with its scores."""

    scale: float
    """Multiplies q . k."""
    window: int = 0
    """Above 0, a row sees only its last `window` positions, itself included."""
    softcap: float = 0.0
    """Above 0, a score s becomes softcap * tanh(s / softcap) (Gemma 2, arXiv 2408.00118)."""
    sinks: Tensor | None = None
    """[Hq] float32: exp(sink) is added to a head's softmax denominator (arXiv 2309.17453)."""


class Linear(Protocol):
    """A linear layer in whatever form the device multiplies it. Made by a Builder."""

    n: int
    """Outputs (of a gated layer: of one half)."""
    k: int
    """Inputs."""
    nbytes: int
    """Held in memory for it."""

    def __call__(self, x: Tensor, columns: Columns | None = None, out: Tensor | None = None) -> Tensor:
        """x [T, K] -> [T, N] in x's dtype (of an output head: float32), in `out` if that is given. `columns` are the step's, for layers whose
        weights depend on the row."""
        ...


class RoundingLinear(Linear, Protocol):
    """A linear layer that multiplies inputs of 8 bits. It may be called like any other and then rounds them itself; a norm that comes before it can do that in the same
    launch (`after_norm` in plugins/models/rounding.py)."""

    rounding: Rounding | None
    """What it wants; None: inputs as they come."""

    def rounded(self, x: Rounded, columns: Columns | None = None, out: Tensor | None = None) -> Tensor:
        """As a call, with inputs [T, K] that were rounded so."""
        ...


class Stacked(NamedTuple):
    """Tensors that make one weight or bias together, one below the other."""

    parts: list[Tensor]
    """Each may be a view of a mapped file: pack or clone it."""
    whole: Tensor | None
    """All of them, where they lie in one tensor of their own already (which may get its values later, before the first step)."""

    def joined(self) -> Tensor:
        """One tensor of its own."""
        if self.whole is not None:
            return self.whole
        return torch.cat(self.parts) if len(self.parts) > 1 else self.parts[0].clone()


class Quantizer(Protocol):
    """Reads the quantised layers of a checkpoint, or makes them of wide ones. A layer is named as in Builder's Part: without ".weight".

    It may also have `linear(weights, layers, scheme, rows, inputs, bias, activation, device) -> Linear | None`, for what no Scheme expresses or a kernel of its
    own multiplies: one layer of all `layers` (names), which read the same input and have `rows` outputs each and one `scheme`; with an activation they are gate and
    up. None: it is made of what `read` gives. And `wide(weights, layer, rows, inputs) -> Tensor | None`: for a layer without a Scheme the values [rows, inputs] of what
    no Scheme expresses; None: it is an ordinary tensor.
    """

    method: str
    """For people: what it reads or makes, with the fields that matter ("gptq, 4 bits, groups of 128")."""

    def scheme(self, weights: Weights, layer: str, rows: int, inputs: int) -> Scheme | None:
        """How the layer [rows, inputs] is stored; None: wide, as an ordinary tensor. Called before `read`, from one thread. Raises UnsupportedFeature."""
        ...

    def read(self, weights: Weights, layer: str, scheme: Scheme, rows: int, inputs: int, device: torch.device) -> Quantised:
        """The layer, taken from `weights` once, on `device` or on the host. Called from several threads at once where `Weights.take` is. Raises
        CheckpointError naming a tensor that is missing or wrong."""
        ...


class Attention(Protocol):
    """An attention backend: keys and values of all layers in one pool of pages, a page a block of tokens.

    `AttentionSpec.factory(facts=, dtype=, device=, block_size=, max_rows=, deterministic=)` gives one, with `kv=` besides for a cache of one of the spec's
    kv_dtypes: keys and values are then kept in 8 bits with a scale a token and head (kernels/attention/codes.py says what they mean), and it has
    `fix_scales(scales: list[tuple[float, float] | None])`, called once before serving if the checkpoint has scales of keys and values: a pair a layer, or None, in place of
    those of tokens. What a page looks like inside is the backend's own:
    it alone writes and reads. With an attribute `trees` that is True it reads Columns.ancestors, and has `move(pool, source, target)`: of all layers the entries at places
    `source` go to `target`, int32 [R, N], in a row one after the other (rows have no place in common; pairs with a number below 0 are padding). Without, drafts are
    chains. Everything runs on the device's thread; where `capturable` nothing may wait for the device or look at a value.
    """

    name: str
    """As its spec's."""
    kv_layout: str
    """Names the order of bytes in a page: part of the identity of shared KV."""
    capturable: bool
    """May be captured in a graph."""
    bytes_per_token: int
    """Of one layer."""
    workspace_bytes: int
    """What it has allocated for itself."""

    def allocate(self, num_blocks: int) -> Tensor:
        """The pool: [num_blocks, page bytes] uint8, a page contiguous, not initialised. Raises torch.OutOfMemoryError, on the host RuntimeError."""
        ...

    def caches(self, pool: Tensor) -> list[Any]:
        """What the layers' calls get as `cache`, one a layer: views of the pool."""
        ...

    def store(
        self,
        qkv: Tensor,
        columns: Columns,
        cos_sin: Tensor,
        cache: Any,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> Tensor:
        """Norm (where there are norms [D], RMS with eps) and rotate queries and keys, write keys and values to their places -> q [T, Hq, D].

        `qkv` [T, (Hq + 2 Hkv) * D]: a row holds the heads of q, then those of k, then those of v. `cos_sin` [P, r] float32, row p for position p: r/2
        cosines, then r/2 sines (made by `penstock.plugins.models.rope.rope_tables`). Dimension i < r/2 of a head turns with dimension i + r/2
        (low * cos - high * sin, high * cos + low * sin), those from r on stay. The keys in qkv may be overwritten."""
        ...

    def attend(self, q: Tensor, qkv: Tensor, cache: Any, columns: Columns, call: AttnCall) -> Tensor:
        """Causal attention of every row over its own sequence: [T, Hq, D]. `q` and `qkv`: as `store` left them; this step's keys and values are in the
        cache already. Query head h reads KV head h // (Hq / Hkv).

        A row's result should depend on its own sequence and position alone, not on what else is in the step: `--deterministic` tests that bit by bit at
        start, and does not start otherwise."""
        ...

    def copy(self, pool: Tensor, source: Tensor, target: Tensor) -> None:
        """Pages `source` to pages `target`, int32; pairs with a number below 0 are padding. No target is also a source."""
        ...

    def seam(self, longest: int) -> int:
        """Keys after which sums begin anew in deterministic mode, where no sequence has more than `longest`; 0: never."""
        ...


class QuantisedLinear(Linear, Protocol):
    """A linear layer that gets its weights after it was made."""

    def fill(self, index: int, part: Quantised) -> None:
        """Part `index` of the layer, once each, all before the first call of the layer; from any thread. The part lies on the device or on the host."""
        ...


class Ops(Protocol):
    """What a step is made of beside attention, on one device; the makers of its layers are called while weights load.

    It may also have `quantised(scheme, rows, inputs, bias, activation="", *, head=False) -> QuantisedLinear | None`: a layer whose parts have `rows` outputs each
    and one scheme (with an activation: gate and up; a head gives float32), or None for a scheme that it does not multiply. What it
    does not multiply is dequantised while it loads.

    Where its layers are `RoundingLinear`s it also has `rounded_norm(x, residual, weight, eps, rounding) -> Rounded`: `add_norm`, or without a residual `norm`, with the result rounded so.
    """

    # --- layers

    def linear(self, weight: Stacked, bias: Stacked | None) -> Linear:
        """x weight^T + bias. The parts of `weight` are [n, K] each, of `bias` [n]."""
        ...

    def gated(self, weight: Stacked, bias: Stacked | None, activation: str) -> Linear:
        """act(x gate^T) * (x up^T), the parts of `weight` being gate and up, [I, K] each. `activation`: "silu", "gelu" or "gelu_tanh"."""
        ...

    def head(self, weight: Tensor) -> Linear:
        """x weight^T in float32, weight [V, K]; it may be the embedding table."""
        ...

    # --- the step

    def embed(self, tokens: Tensor, table: Tensor) -> Tensor:
        """Rows of the embedding `table` [V, H]: [T, H], new."""
        ...

    def take_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        """x [T, H] -> x[rows] [len(rows), H]."""
        ...

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMS norm of x [T, H], summed in float32, times weight [H]."""
        ...

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """norm(x + residual); the sum is left in `residual`."""
        ...


class Block(NamedTuple):
    """A layer of the plain kind, pre-norm attention and gated MLP: x += o(attention(qkv(norm(x)))); x += down(gate_up(norm(x)))."""

    attn_norm: Tensor
    qkv: Linear
    o: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    call: AttnCall


class Stream(NamedTuple):
    """Where a step's tokens stand behind the last layer: the last layer's output and the residual stream, two [T, H]. Their normalised sum is what `Model.final`
    gives."""

    x: Tensor
    residual: Tensor
    taps: list[Tensor]
    """The sums [T, H] in front of the layers that were asked for."""


class Model(Protocol):
    """A loaded model: layers, and the order in which they are called. `ModelSpec.factory(facts=, builder=, attention=, max_len=)` gives one."""

    facts: ModelFacts
    """Those that the factory was given."""
    attention: Attention
    """The one that it was given."""
    capturable: bool
    """May be captured in a graph: no step looks at a value."""
    weights_bytes: int
    """Of all weights in memory."""
    tables_bytes: int
    """Of what else it keeps: rotary tables."""
    plain: Plain | None
    """The whole model, where it is of the plain kind: a device may then run a step as one program of its own. None: `step` alone says what it is.
    (On "cpu" a model may bring a program instead: `program(caches) -> Program`.)"""

    def step(self, ops: Ops, caches: Sequence[Any], columns: Columns, taps: Sequence[int] = ()) -> Stream:
        """All T tokens through all layers, keys and values written to `caches` (what `attention.caches` gave). `taps`: layers in front of which the stream
        is kept, ascending; the number of layers means behind the last."""
        ...

    def final(self, ops: Ops, x: Tensor, residual: Tensor) -> Tensor:
        """The normalised hidden states [T, H], the input of `logits`. `residual` may be overwritten."""
        ...

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """hidden [R, H] -> [R, V] float32."""
        ...

    def brief(self) -> Model:
        """With one layer of each kind: what has to be compiled for all of them."""
        ...


class Plain(NamedTuple):
    """A decoder of plain blocks: x = embedding[tokens]; the blocks; norm; head."""

    embedding: Tensor
    blocks: Sequence[Block]
    final_norm: Tensor
    head: Linear
    eps: float
    cos_sin: Tensor


class Program(Protocol):
    """A model and its caches as one call a step.

    With `taps = True` it takes two arguments besides, `layers` [K] int32 and `streams` [T, K, H]: the stream in front of these layers goes there (`Model.step`: taps); that
    behind the last one is of `rows`, which then name every token. Without, a step that somebody looks into is composed."""

    def __call__(self, columns: Columns, rows: Tensor, hidden: Tensor) -> None:
        """Compute the step and write the normalised hidden states of the token rows `rows` [n] int32 to `hidden` [n, H], in the model's dtype.
        Raises IndexError for a token, position or block that does not exist: the step fails with it."""
        ...
