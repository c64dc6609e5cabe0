"""What a model plugin gives to a device plugin of this family (paged decoders on a CPU, index columns as int32 tensors).

What it is: the Protocols behind `ModelSpec.factory(facts=..., dtype=..., weights=..., attention=..., max_len=..., progress=...)`: the factory
takes its tensors one by one from `weights`, packs them and returns a `Model`; the device allocates the caches and binds them.
What it does not know: how a model computes, where tensors come from, slots, scheduling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from penstock.core.contract.devices import ModelFacts

Progress = Callable[[float], None]
"""Called with the loaded fraction, 0..1."""


class Weights(Protocol):
    """Named tensors of one checkpoint, by the names that Hugging Face checkpoints have ("model.layers.0.self_attn.q_proj.weight"; a linear layer's
    weight is [outputs, inputs]). The order of calls: `take` and `ignore` in any order and number, then `finish` once. On "cuda" `take` may be called from several
    threads at once.

    It may also have `has(name) -> bool`: whether the tensor is there, taken or not (without it, tied embeddings are one tensor,
    "model.embed_tokens.weight", whatever the files hold), and `identity() -> str`: a text that changes with the contents (without it, size and
    ends of each of the folder's files stand for them); it is called after `finish`.
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


class Attention(Protocol):
    """An attention backend of the CPU.

    The model writes K and V to the cache, the backend reads them. The built-in model families write in the order "cpu-panel16-v1": the cache of a layer
    is a contiguous tensor [num_blocks, Hkv, block_size, D] (block_size and D multiples of 16), but inside a (block, head) the elements are in panel
    order, not row by row. Read it with `read_kv`, never by indexing. (A model family of your own may write with another layout, if its
    backend names one.) Copying whole blocks, which the device does by itself, works for every layout.
    """

    name: str
    """As its spec's."""
    kv_layout: str
    """Names the order of bytes in a block: `penstock.kernels.attention.KV_LAYOUT` beside the built-in families."""
    fused: bool
    """True is for the built-in "native" alone: the model then runs whole steps as one program, and `attend` is never called. Say False."""

    def allocate(self, num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype, layers: int) -> torch.Tensor:
        """The pool [layers, 2 (K, V), num_blocks, ...], not initialised: everything after num_blocks is one block. Beside the built-in families
        exactly `torch.empty(layers, 2, num_blocks, num_kv_heads, block_size, head_dim, dtype=dtype)`. Called once, after the weights are loaded."""
        ...

    def attend(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        block_tables: torch.Tensor,
        q_start: torch.Tensor,
        kv_len: torch.Tensor,
        scale: float,
        window: int,
    ) -> torch.Tensor:
        """Causal attention of every query row over its own sequence: q [T, Hq, D] -> a new tensor [T, Hq, D] of q's dtype.

        Called once a layer and step, on the device's thread. T token rows of R sequences, prefill chunks and decode rows (one token) mixed:

        - `q`: contiguous, bfloat16 or float32, rotated (and normed, where the model does). Query head h reads KV head h // (Hq / Hkv).
        - `k_cache`, `v_cache`: this layer's, `pool[layer, 0]` and `pool[layer, 1]`, of q's dtype. The keys and values of this step's own
          tokens are in them already.
        - `block_tables` [R, B] int32: the sequence's blocks in order. Position p lies in slot `block_tables[r, p // block_size] * block_size
          + p % block_size`. Entries beyond ceil(kv_len / block_size) mean nothing and may be -1.
        - `q_start` [R + 1] int32: sequence r owns the rows q_start[r] to q_start[r + 1] - 1 of q, at least one; q_start[0] is 0, q_start[R] is T.
        - `kv_len` [R] int32: the sequence's length up to this step's end: its last row sits at position kv_len[r] - 1, row i of its n rows at
          position kv_len[r] - n + i. A row sees the positions from 0 to its own.
        - `scale`: multiplies q . k before the softmax.
        - `window`: above 0, a row sees only its last `window` positions, itself included. 0: all of them.

        A row's result should depend on its own sequence and position alone, not on what else is in the step: `--deterministic` tests that bit by
        bit at start, and does not start otherwise. `paged_attention` gives the right values."""
        ...


class Program(Protocol):
    """A model bound to its caches: one step a call. All index tensors are int32 and contiguous."""

    def __call__(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        block_tables: torch.Tensor,
        q_start: torch.Tensor,
        kv_len: torch.Tensor,
        rows: torch.Tensor,
        *,
        hidden: torch.Tensor,
    ) -> None:
        """Compute T tokens of R sequences, write their keys and values to the caches, and write the normalised last hidden states of the token rows
        `rows` (0 to T - 1) to `hidden` [len(rows), H], in the model's dtype.

        `tokens`, `positions` [T]; `slots` [T]: where keys and values go, block * block_size + offset; `block_tables`, `q_start`, `kv_len` as in
        Attention.attend. Raises IndexError for a token, position or block that does not exist: the step fails with it."""
        ...


class Model(Protocol):
    """A loaded model."""

    facts: ModelFacts
    """Those that the factory was given."""
    weights_bytes: int
    """Of all weights in memory, as packed."""
    tables_bytes: int
    """Of what else it keeps: rotary tables."""

    def bind(self, pool: torch.Tensor) -> Program:
        """Bind to the pool that the attention backend allocated: pool[layer, 0] is a layer's K cache, pool[layer, 1] its V cache."""
        ...

    def logits(self, hidden: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """hidden [R, H] -> `out` [R, V] float32, which is returned."""
        ...
