"""A device's operations on the CPU: the project's C kernels on host memory, numpy for the index columns.

What it is: `HostOps`, the `DeviceOps` of the CPU. Nothing is asynchronous here and there is no padding: columns are computed as numpy arrays on the
very memory of the tensors. A plain model with the native attention becomes one C program a step; everything else is composed of the same kernels,
with the same values bit for bit.
What it does not know: who owns a slot, steps, which attention a composed model has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from penstock.core.contract.devices import ModelFacts
from penstock.core.protocol.columns import I32
from penstock.kernels.argmax import argmax
from penstock.kernels.decoder import DecoderLayer, DecoderProgram
from penstock.kernels.drafting import api as drafting
from penstock.kernels.embedding import embedding
from penstock.kernels.linear import PackedGated, PackedLinear, pack, pack_gated
from penstock.kernels.linear.scheme import Scheme
from penstock.kernels.quantised.api import PackedQuantised, PackedQuantisedGated
from penstock.kernels.rmsnorm import rms_norm
from penstock.kernels.sampling import api as sampling
from penstock.plugins.attention.native import NativeAttention
from penstock.plugins.devices.ops import Settings
from penstock.plugins.devices.torch_ops import TorchOps
from penstock.plugins.models.api import Block, Columns, Linear, Model, Program, QuantisedLinear, Stacked

Tensor = torch.Tensor
as_tensor = torch.from_numpy


class HostLinear:
    """A packed weight. See Linear."""

    def __init__(self, packed: PackedLinear | PackedGated, *, wide: bool = False) -> None:
        self.packed = packed
        self.n, self.k, self.nbytes = packed.n, packed.k, packed.nbytes
        self._wide = wide

    def __call__(self, x: Tensor, columns: Columns | None = None, out: Tensor | None = None) -> Tensor:
        """See Linear."""
        if self._wide and isinstance(self.packed, PackedLinear):
            return self.packed(x, out, torch.float32)
        return self.packed(x, out)


class HostQuantised(HostLinear):
    """Packed codes. See QuantisedLinear."""

    def __init__(self, packed: PackedQuantised | PackedQuantisedGated, *, wide: bool = False) -> None:
        super().__init__(packed, wide=wide)
        self.fill = packed.fill


class WholeStep:
    """A plain model as one call. See Program."""

    taps = True

    def __init__(self, program: DecoderProgram) -> None:
        self._run = program.trusted  # HostOps made the columns

    def __call__(self, columns: Columns, rows: Tensor, hidden: Tensor, layers: Tensor | None = None, streams: Tensor | None = None) -> None:
        """See Program."""
        c = columns
        self._run(
            c.tokens, c.positions, c.places, c.table, c.q_start, c.kv_len, rows, None, hidden, None, layers, streams, None, c.ancestors
        )


class OneLayer:
    """A layer by itself, on rows that its caller made, as one call: see HostOps.fuse_layer."""

    def __init__(self, program: DecoderProgram, hidden: int, dtype: torch.dtype) -> None:
        self._run = program.trusted
        self._hidden, self._dtype = hidden, dtype
        self._behind = torch.ones(1, dtype=torch.int32)

    def __call__(self, residual: Tensor, x: Tensor, columns: Columns, rows: Tensor) -> Tensor:
        """`residual` [T, H] and what attention reads [T, K] of all tokens -> the stream [n, H] behind the layer of the token rows `rows` [n]; keys and values of all are
        written."""
        c = columns
        out = torch.empty(len(rows), 1, self._hidden, dtype=self._dtype)
        hidden = torch.empty(len(rows), self._hidden, dtype=self._dtype)
        given = residual.contiguous(), x.contiguous()
        self._run(
            c.tokens, c.positions, c.places, c.table, c.q_start, c.kv_len, rows, None, hidden, None, self._behind, out, given, c.ancestors
        )
        return out[:, 0]


class HostOps(TorchOps):
    """See DeviceOps. What TorchOps has is kept where it is called too rarely to matter."""

    def fuse(self, model: Model, caches: Sequence[Any]) -> Program | None:
        """A model that brings a program of its own (`program(caches)`); or a plain one over the native attention, all of whose layers are packed."""
        own = getattr(model, "program", None)
        if own is not None:
            program: Program = own(caches)
            return program
        plain = model.plain
        if plain is None or type(model.attention) is not NativeAttention or not isinstance(plain.head, HostLinear):
            return None
        layers = [layer for layer in map(_packed_layer, plain.blocks) if layer is not None]
        head = plain.head.packed
        if (
            len(layers) < len(plain.blocks)
            or not isinstance(head, PackedLinear)
            or head.gathers
            or len({b.call.scale for b in plain.blocks}) > 1
        ):
            return None
        whole = DecoderProgram(
            embedding=plain.embedding,
            layers=layers,
            final_norm=plain.final_norm,
            lm_head=head,
            num_heads=model.facts.num_heads,
            num_kv_heads=model.facts.num_kv_heads,
            head_dim=model.facts.head_dim,
            eps=plain.eps,
            cos_sin=plain.cos_sin,
            k_caches=[cache.k for cache in caches],
            v_caches=[cache.v for cache in caches],
            scale=plain.blocks[0].call.scale,
            scales=[model.attention.scales(cache) for cache in caches],
        )
        return WholeStep(whole)

    def fuse_layer(
        self, block: Block, embedding: Tensor, head: Linear, facts: ModelFacts, cos_sin: Tensor, attention: Any, cache: Any
    ) -> OneLayer | None:
        """A layer of a drafter as one call; None: it is composed. `head`: any of as many inputs as the stream has, and of them nothing else is used, as of the embedding."""
        layer = _packed_layer(block)
        packed = head.packed if isinstance(head, HostLinear) else None
        if layer is None or type(attention) is not NativeAttention or not isinstance(packed, PackedLinear) or packed.gathers:
            return None
        program = DecoderProgram(
            embedding=embedding,
            layers=[layer],
            final_norm=block.mlp_norm,
            lm_head=packed,
            num_heads=facts.num_heads,
            num_kv_heads=facts.num_kv_heads,
            head_dim=facts.head_dim,
            eps=facts.rms_norm_eps,
            cos_sin=cos_sin,
            k_caches=[cache.k],
            v_caches=[cache.v],
            scale=block.call.scale,
            scales=[attention.scales(cache)],
        )
        return OneLayer(program, facts.hidden_size, embedding.dtype)

    # --- layers

    def linear(self, weight: Stacked, bias: Stacked | None) -> Linear:
        """See Ops."""
        one = weight.parts[0] if len(weight.parts) == 1 else weight.joined()  # packing copies
        return HostLinear(pack(one, None if bias is None else bias.joined()))

    def gated(self, weight: Stacked, bias: Stacked | None, activation: str) -> Linear:
        """See Ops."""
        gate, up = weight.parts
        gate_bias, up_bias = bias.parts if bias is not None else (None, None)
        return HostLinear(pack_gated(gate, up, activation, gate_bias, up_bias))  # type: ignore[arg-type]

    def head(self, weight: Tensor) -> Linear:
        """See Ops."""
        return HostLinear(pack(weight), wide=True)

    def quantised(
        self, scheme: Scheme, rows: Sequence[int], inputs: int, bias: Stacked | None, activation: str = "", *, head: bool = False
    ) -> QuantisedLinear | None:
        """See Ops. Inputs stay as they are, also where the scheme would have them rounded: that is more exact, and no slower here."""
        if activation:
            gate_bias, up_bias = bias.parts if bias is not None else (None, None)
            return HostQuantised(PackedQuantisedGated(scheme, rows[0], inputs, activation, gate_bias, up_bias))  # type: ignore[arg-type]
        return HostQuantised(PackedQuantised(scheme, rows, inputs, None if bias is None else bias.joined()), wide=head)

    # --- state of the slots

    def decode_inputs(self, slots: Tensor, starts: Tensor, history: Tensor, table: Tensor, block_size: int) -> Columns:
        """See DeviceOps. A table of this step's rows alone, as wide as the longest."""
        at, positions = slots.numpy(), starts.numpy()
        ends: I32 = positions + 1
        blocks = table.numpy()[at, : -(-int(ends.max()) // block_size)]
        steps = _steps(len(at))
        places = blocks[steps[:-1], positions // block_size] * block_size + positions % block_size
        tokens = history.numpy()[at, positions]
        return Columns(
            as_tensor(tokens), starts, as_tensor(places), slots, as_tensor(ends), as_tensor(steps), as_tensor(blocks), len(at), True
        )

    def ragged_inputs(
        self, slots: Tensor, starts: Tensor, q_start: Tensor, history: Tensor, table: Tensor, block_size: int, tokens: int, num_decode: int
    ) -> Columns:
        """See DeviceOps. A table of this step's rows alone, as wide as the longest."""
        at, first, bounds = slots.numpy(), starts.numpy(), q_start.numpy()
        counts = np.diff(bounds)
        ends: I32 = first + counts
        blocks = table.numpy()[at, : -(-int(ends.max()) // block_size)]
        row = np.repeat(_steps(len(at))[:-1], counts)
        positions: I32 = _steps(tokens)[:-1] + (first - bounds[:-1])[row]
        places = blocks[row, positions // block_size] * block_size + positions % block_size
        ids = history.numpy()[at[row], positions]
        columns = (as_tensor(ids), as_tensor(positions), as_tensor(places), slots, as_tensor(ends), q_start, as_tensor(blocks))
        return Columns(*columns, num_decode, True)

    def set_blocks(self, table: Tensor, slots: Tensor, index: Tensor, ids: Tensor) -> None:
        """See DeviceOps."""
        table.numpy()[slots.numpy(), index.numpy()] = ids.numpy()

    def write_tokens(self, slots: Tensor, positions: Tensor, tokens: Tensor, history: Tensor) -> None:
        """See DeviceOps."""
        history.numpy()[slots.numpy(), positions.numpy()] = np.maximum(tokens.numpy(), 0)

    # --- the step

    def embed(self, tokens: Tensor, table: Tensor) -> Tensor:
        """See Ops."""
        return embedding(tokens, table)

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See Ops."""
        return rms_norm(x, weight, eps)

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See Ops."""
        return rms_norm(residual.add_(x), weight, eps)

    # --- sampling

    def greedy(self, logits: Tensor) -> Tensor:
        """See DeviceOps."""
        return argmax(logits)

    def mask(self, logits: Tensor, mask: Tensor, mask_rows: Tensor) -> None:
        """See DeviceOps."""
        sampling.mask_(logits, mask, mask_rows)

    def draw(self, logits: Tensor, settings: Settings, slots: Tensor, positions: Tensor) -> Tensor:
        """See DeviceOps."""
        s, at = settings, slots.numpy()
        columns = (s.temperature, s.top_k, s.top_p, s.min_p, s.seeds, s.choices)
        temperature, top_k, top_p, min_p, seeds, choices = (as_tensor(column.numpy()[at]) for column in columns)
        return sampling.draw(logits, temperature, top_k, top_p, min_p, seeds, choices, positions)

    # --- drafts

    def verify(
        self, tokens: Tensor, slots: Tensor, positions: Tensor, bounds: Tensor, history: Tensor, widest: int
    ) -> tuple[Tensor, Tensor]:
        """See DeviceOps."""
        return drafting.verify(tokens, slots, positions, bounds, history)

    def verify_tree(
        self, tokens: Tensor, slots: Tensor, positions: Tensor, bounds: Tensor, history: Tensor, parents: Tensor, deepest: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See DeviceOps."""
        return drafting.verify_tree(tokens, slots, positions, bounds, history, parents, deepest)

    def put_drafts(self, drafts: Tensor, slots: Tensor, ends: Tensor, history: Tensor, vocab: int) -> None:
        """See DeviceOps."""
        drafting.put_drafts(drafts, slots, ends, history, vocab)

    def ngrams(self, slots: Tensor, ends: Tensor, history: Tensor, shortest: int, longest: int, out: Tensor) -> None:
        """See DeviceOps."""
        drafting.ngrams(slots, ends, history, shortest, longest, out)


_STEPS: I32 = np.arange(4097, dtype=np.int32)


def _steps(count: int) -> I32:
    """0 to count, both included."""
    return _STEPS[: count + 1] if count < len(_STEPS) else np.arange(count + 1, dtype=np.int32)


def _packed_layer(block: Block) -> DecoderLayer | None:
    """For the C program, if it can express this block."""
    layers = (block.qkv, block.o, block.gate_up, block.down)
    if block.call.softcap or block.call.sinks is not None or not all(isinstance(layer, HostLinear) for layer in layers):
        return None
    qkv, o, gate_up, down = (layer.packed for layer in layers)  # type: ignore[attr-defined]
    if not isinstance(gate_up, PackedGated) or any(layer.gathers for layer in (qkv, o, gate_up, down)):
        return None
    return DecoderLayer(block.attn_norm, qkv, o, block.mlp_norm, gate_up, down, block.q_norm, block.k_norm, block.call.window)
