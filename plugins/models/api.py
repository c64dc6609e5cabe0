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
    """Named tensors of one checkpoint. Each tensor is taken once.

    It may also have `has(name) -> bool`: whether the tensor is there (without it, tied embeddings are one tensor, whatever the files hold), and
    `identity() -> str`: a text that changes with the contents (without it, the folder's files stand for them).
    """

    def take(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """The tensor, contiguous, in the dtype asked for at opening. It may be a view of a mapped file: pack or clone it.
        Raises CheckpointError naming a missing or wrong-shaped tensor."""
        ...

    def ignore(self, *names: str) -> None:
        """These may exist, but are not needed."""
        ...

    def finish(self) -> None:
        """Close. Raises CheckpointError naming tensors that nobody took."""
        ...


class Attention(Protocol):
    """An attention backend, made by `AttentionSpec.factory(facts=..., dtype=...)`."""

    name: str
    kv_layout: str
    fused: bool
    """The whole-step program's own attention is this one: the model may call it as one program."""

    def allocate(self, num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype, layers: int) -> torch.Tensor:
        """The pool [layers, 2 (K, V), num_blocks, ...]: everything after num_blocks is one block."""
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
        """q [T, Hq, D] -> [T, Hq, D], as kernels.attention.paged_attention."""
        ...


class Program(Protocol):
    """A model bound to its caches: one step a call. Arguments as in kernels.decoder.DecoderProgram, int32 tensors."""

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
        """Write the normalised last hidden states of token rows `rows` to `hidden` [len(rows), H]."""
        ...


class Model(Protocol):
    """A loaded model."""

    facts: ModelFacts
    weights_bytes: int
    tables_bytes: int

    def bind(self, pool: torch.Tensor) -> Program:
        """Bind to the pool that the attention backend allocated."""
        ...

    def logits(self, hidden: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """hidden [R, H] -> `out` [R, V] float32."""
        ...
