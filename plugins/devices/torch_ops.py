"""A device's operations in plain torch, on any device.

What it is: `TorchOps`, slow where a loop over sequences is the clearest way. It is what the runner is tested with on a machine without a GPU, and
what the Triton table is compared with on the device.
What it does not know: who owns a slot, graphs, steps, attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn import functional

from penstock.kernels.activation.reference import gated
from penstock.kernels.drafting import reference as drafting
from penstock.kernels.rmsnorm.reference import rms_norm
from penstock.kernels.sampling import torch as sampling
from penstock.kernels.slots import reference as slot_state
from penstock.plugins.devices.ops import Ahead, Settings
from penstock.plugins.models.api import Columns, Linear, Model, Program, Stacked

Tensor = torch.Tensor


class TorchLinear:
    """A weight [n, K] as it is. `wide`: computed and given in float32. Gated: [2 n, K]."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, activation: str = "", wide: bool = False) -> None:
        self.weight = weight
        self.n, self.k = weight.shape[0] // (2 if activation else 1), weight.shape[1]
        self.nbytes = weight.nbytes + (0 if bias is None else bias.nbytes)
        self._bias = bias
        self._activation = activation
        self._wide = wide

    def __call__(self, x: Tensor, columns: Columns | None = None, out: Tensor | None = None) -> Tensor:
        """See Linear."""
        y = functional.linear(x.float(), self.weight.float()) if self._wide else functional.linear(x, self.weight, self._bias)
        if self._activation:
            y = gated(self._activation, y)
        return y if out is None else out.copy_(y)


class TorchOps:
    """See DeviceOps. Not capturable: some look at values on the host."""

    capturable = False
    workspace_bytes = 0

    def compile_only(self) -> AbstractContextManager[None]:
        """See DeviceOps: there is nothing to compile."""
        return nullcontext()

    def fuse(self, model: Model, caches: Sequence[Any]) -> Program | None:
        """See DeviceOps: never."""
        return None

    def linear(self, weight: Stacked, bias: Stacked | None) -> Linear:
        """See DeviceOps."""
        return TorchLinear(weight.joined(), None if bias is None else bias.joined())

    def gated(self, weight: Stacked, bias: Stacked | None, activation: str) -> Linear:
        """See DeviceOps."""
        return TorchLinear(weight.joined(), None if bias is None else bias.joined(), activation=activation)

    def head(self, weight: Tensor) -> Linear:
        """See DeviceOps."""
        return TorchLinear(weight, None, wide=True)

    def decode_inputs(self, slots: Tensor, starts: Tensor, history: Tensor, table: Tensor, block_size: int) -> Columns:
        """See DeviceOps."""
        rows = slots.shape[0]
        q_start = torch.arange(rows + 1, dtype=torch.int32, device=slots.device)
        return self.ragged_inputs(slots, starts, q_start, history, table, block_size, rows, rows)

    def ragged_inputs(
        self, slots: Tensor, starts: Tensor, q_start: Tensor, history: Tensor, table: Tensor, block_size: int, tokens: int, num_decode: int
    ) -> Columns:
        """See DeviceOps."""
        counts = q_start.diff()
        index = torch.arange(tokens, device=slots.device)
        owner = (torch.searchsorted(q_start, index, right=True) - 1).clamp(0, slots.shape[0] - 1)
        slot = slots[owner]
        real = (slot >= 0) & (index < q_start[-1])
        at = slot.clamp_min(0)
        positions = torch.where(real, index - q_start[owner] + starts[owner], 0).int()
        block = table[at, positions // block_size]
        place = torch.where(real & (block >= 0), block * block_size + positions % block_size, -1)
        kv_len = torch.where((slots >= 0) & (counts > 0), starts + counts, 0).int()
        ids = torch.where(real, history[at, positions], 0)
        return Columns(ids, positions, place, slots, kv_len, q_start, table, num_decode)

    def place(self, history: Tensor, table: Tensor, slots: Tensor, counts: Tensor, offsets: Tensor, tokens: Tensor) -> None:
        """See DeviceOps."""
        for slot, count, offset in zip(slots.tolist(), counts.tolist(), offsets.tolist(), strict=True):
            if slot >= 0:
                history[slot, :count] = tokens[offset : offset + count]
                table[slot] = -1

    def set_blocks(self, table: Tensor, slots: Tensor, index: Tensor, ids: Tensor) -> None:
        """See DeviceOps."""
        real = slots >= 0
        table[slots[real], index[real]] = ids[real]

    def write_tokens(self, slots: Tensor, positions: Tensor, tokens: Tensor, history: Tensor) -> None:
        """See DeviceOps."""
        real = slots >= 0
        history[slots[real], positions[real]] = tokens[real].clamp_min(0)

    def find_ends(self, slots: Tensor, places: Tensor, lens: Tensor) -> None:
        """See DeviceOps."""
        slot_state.find_ends(slots, places, lens)

    # --- the step

    def embed(self, tokens: Tensor, table: Tensor) -> Tensor:
        """See DeviceOps."""
        return table.index_select(0, tokens)

    def take_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        """See DeviceOps."""
        return x.index_select(0, rows)

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See DeviceOps."""
        return rms_norm(x, weight, eps)

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See DeviceOps."""
        return rms_norm(residual.add_(x), weight, eps)

    def greedy(self, logits: Tensor) -> Tensor:
        """See DeviceOps."""
        tokens, values = sampling.greedy(logits)
        return torch.where(torch.isfinite(values), tokens, -1).int()

    def draw(self, logits: Tensor, settings: Settings, slots: Tensor, positions: Tensor) -> Tensor:
        """See DeviceOps."""
        at = slots.clamp_min(0)
        s = settings
        filters = (s.top_k[at], s.top_p[at], s.min_p[at])
        tokens, values = sampling.draw(logits, s.temperature[at], *filters, s.seeds[at], s.choices[at], positions)
        return torch.where(torch.isfinite(values) & (slots >= 0), tokens, -1).int()

    def penalise(
        self,
        logits: Tensor,
        counted: Tensor,
        slots: Tensor,
        counts: Tensor,
        in_prompt: Tensor,
        settings: Settings,
        ahead: Ahead | None = None,
    ) -> None:
        """See DeviceOps."""
        rows = torch.nonzero(counted >= 0).flatten()
        at, slot = counted[rows].long(), slots[rows].long()
        here = counts[at]
        for back in range(1, 1 + (0 if ahead is None else ahead.deepest)):
            assert ahead is not None
            deep = torch.nonzero(ahead.depths[rows] >= back).flatten()
            here[deep, ahead.history[slot[deep], ahead.positions[rows[deep]].long() - back].long()] += 1
        s = settings
        logits[rows] = sampling.penalise(logits[rows], here, in_prompt[at], s.repetition[slot], s.frequency[slot], s.presence[slot])

    def add_bias(self, logits: Tensor, rows: Tensor, ids: Tensor, values: Tensor) -> None:
        """See DeviceOps."""
        real = rows >= 0
        logits.index_put_((rows[real].long(), ids[real].long()), values[real], accumulate=True)

    def mask(self, logits: Tensor, mask: Tensor, mask_rows: Tensor) -> None:
        """See DeviceOps."""
        sampling.mask_(logits, mask, mask_rows)

    def ban_words(
        self,
        logits: Tensor,
        history: Tensor,
        rows: Tensor,
        slots: Tensor,
        positions: Tensor,
        words: Tensor,
        starts: Tensor,
        sizes: Tensor,
        longest: int,
    ) -> None:
        """See DeviceOps."""
        row = rows.clamp_min(0).long()
        slot, ends, last = slots[row].long(), positions[row].long(), (starts + sizes - 1).long()
        left = torch.nonzero((rows >= 0) & (slot >= 0) & (ends >= sizes - 1)).flatten()
        back = 1  # one token after the other, backwards: words that still fit become few at once
        while left.numel():
            whole = sizes[left] <= back
            banned = left[whole]
            logits[row[banned], words[last[banned]].long()] = -torch.inf
            left = left[~whole]
            left = left[history[slot[left], ends[left] - back] == words[last[left] - back]]
            back += 1

    def start_counts(
        self, counts: Tensor, in_prompt: Tensor, counted: Tensor, slots: Tensor, history: Tensor, splits: Tensor, ends: Tensor
    ) -> None:
        """See DeviceOps."""
        columns = (counted.tolist(), slots.tolist(), splits.tolist(), ends.tolist())
        for row, slot, split, end in zip(*columns, strict=True):
            if row < 0:
                continue
            counts[row] = torch.bincount(history[slot, split:end], minlength=counts.shape[1]).int()
            in_prompt[row] = torch.bincount(history[slot, :split], minlength=counts.shape[1]) > 0

    def count(self, counts: Tensor, counted: Tensor, tokens: Tensor) -> None:
        """See DeviceOps."""
        real = (counted >= 0) & (tokens >= 0)
        where = counted[real].long(), tokens[real].long()
        counts.index_put_(where, torch.ones_like(tokens[real]), accumulate=True)

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

    def tree_moves(
        self, sources: Tensor, counts: Tensor, slots: Tensor, positions: Tensor, bounds: Tensor, table: Tensor, block_size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See DeviceOps."""
        return drafting.tree_moves(sources, counts, slots, positions, bounds, table, block_size)

    def put_drafts(self, drafts: Tensor, slots: Tensor, ends: Tensor, history: Tensor, vocab: int) -> None:
        """See DeviceOps."""
        drafting.put_drafts(drafts, slots, ends, history, vocab)

    def ngrams(self, slots: Tensor, ends: Tensor, history: Tensor, shortest: int, longest: int, out: Tensor) -> None:
        """See DeviceOps."""
        drafting.ngrams(slots, ends, history, shortest, longest, out)
