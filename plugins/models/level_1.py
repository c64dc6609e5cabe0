"""Model families of api_level 1 as today's: for the CPU, as one program a step.

What it is: `adapt`, which core/contract/families.py calls for a spec of that level. Such a family takes its tensors and packs them itself, is bound to the pool
[layers, 2, num_blocks, ...] and runs whole steps; other devices cannot compose it.
What it does not know: files, slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import torch

from penstock.core.contract.devices import ModelFacts
from penstock.core.contract.hookspecs import ModelSpec
from penstock.core.protocol.errors import UnsupportedFeature
from penstock.plugins.attention.pages import Cache
from penstock.plugins.models.api import Attention, AttnCall, Columns, Ops, Plain, Program, Stream
from penstock.plugins.models.builder import Builder

Tensor = torch.Tensor
WHOLE = "A model of api_level 1 runs whole steps by its own program; nothing can be composed of it."


def adapt(spec: ModelSpec) -> ModelSpec:
    """Its factory raises UnsupportedFeature on other devices than the CPU."""

    def factory(*, facts: ModelFacts, builder: Builder, attention: Attention, max_len: int) -> Level1Model:
        if builder.device.type != "cpu":
            raise UnsupportedFeature(f"Model family {spec.name} is of api_level 1, which serves on the CPU alone.", param="device")
        own = spec.factory(
            facts=facts,
            dtype=builder.dtype,
            weights=builder.weights,
            attention=AttentionFace(attention),
            max_len=max_len,
            progress=builder.tell,
        )
        return Level1Model(facts, attention, own)

    return msgspec.structs.replace(spec, api_level=2, factory=factory)


class AttentionFace:
    """What level 1 gave to a family as its attention backend."""

    fused = False

    def __init__(self, attention: Attention) -> None:
        self.name, self.kv_layout = attention.name, attention.kv_layout
        self._attention = attention

    def attend(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_tables: Tensor,
        q_start: Tensor,
        kv_len: Tensor,
        scale: float,
        window: int,
    ) -> Tensor:
        """As level 1 documented it: tables of this step's sequences, one row each."""
        rows = torch.arange(len(kv_len), dtype=torch.int32)
        columns = Columns(rows, rows, rows, rows, kv_len, q_start, block_tables, 0, True)  # tokens, positions and places are not looked at
        return self._attention.attend(q, q, Cache(k_cache, v_cache), columns, AttnCall(scale, window))


class Level1Model:
    """See Model. It is run by `program` alone."""

    capturable = False

    def __init__(self, facts: ModelFacts, attention: Attention, own: Any) -> None:
        self.facts = facts
        self.attention = attention
        self.plain: Plain | None = None
        self.weights_bytes: int = own.weights_bytes
        self.tables_bytes: int = own.tables_bytes
        self._own = own

    def program(self, caches: Sequence[Any]) -> Program:
        """The family's own program over one view of the layers' caches."""
        first, second = caches[0].k, caches[0].v
        between = (caches[1].k.storage_offset() if len(caches) > 1 else 0) - first.storage_offset()
        strides = (between, second.storage_offset() - first.storage_offset(), *first.stride())
        bound = self._own.bind(first.as_strided((len(caches), 2, *first.shape), strides if len(caches) > 1 else (0, *strides[1:])))

        def run(columns: Columns, rows: Tensor, hidden: Tensor) -> None:
            c = columns
            bound(c.tokens, c.positions, c.places, c.block_tables(), c.q_start, c.kv_len, rows, hidden=hidden)

        return run

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """See Model."""
        logits: Tensor = self._own.logits(hidden, torch.empty(hidden.shape[0], self.facts.vocab_size) if out is None else out)
        return logits

    def step(self, ops: Ops, caches: Sequence[Any], columns: Columns, taps: Sequence[int] = ()) -> Stream:
        """Level 1 cannot be composed."""
        raise NotImplementedError(WHOLE)

    def final(self, ops: Ops, x: Tensor, residual: Tensor) -> Tensor:
        """Level 1 cannot be composed."""
        raise NotImplementedError(WHOLE)

    def brief(self) -> Level1Model:
        """See Model."""
        return self
