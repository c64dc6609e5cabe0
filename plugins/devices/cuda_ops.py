"""The operations that a step on the device is made of, chosen once at start.

What it is: the `Ops` protocol, and `TorchOps`: plain torch on any device, slow where a loop over sequences is the clearest way. It is what the
runner is tested with on a machine without a GPU, and what the Triton table (plugins/attention/triton.py) is compared with on the device.
Cache: [layers, 2 (K, V), num_blocks, Hkv, block_size, D]. T tokens, R rows (sequences) of the step, S slots, W blocks a table row.
All index tensors are int32; a slot, row or place below 0 is padding: it reads zeros and writes nowhere.
What it does not know: who owns a slot, graphs, steps.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional

from penstock.kernels.activation.reference import gated
from penstock.kernels.rmsnorm.reference import rms_norm
from penstock.kernels.rope.reference import rotate
from penstock.kernels.sampling import torch as sampling

Tensor = torch.Tensor


@dataclass(frozen=True)
class Columns:
    """A step's index tensors: tokens, positions, places [T]; slots, kv_len [R]; q_start [R + 1]; table [S, W]. The first `num_decode` rows
    compute one token each; -1: any may, which only the device knows."""

    tokens: Tensor
    positions: Tensor
    places: Tensor
    slots: Tensor
    kv_len: Tensor
    q_start: Tensor
    table: Tensor
    num_decode: int


@dataclass(frozen=True)
class Settings:
    """Sampling settings, one column a field, indexed by slot: seeds int64, top_k and choices int32, the others float32 [S]."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    choices: Tensor
    repetition: Tensor
    frequency: Tensor
    presence: Tensor


class Ops(Protocol):
    """The whole table of operations of an attention backend on "cuda". Nothing here synchronises, except where `capturable` is False.

    Cache: [layers, 2 (K, V), num_blocks, Hkv, block_size, D]; its inner order is the table's own, for it writes and reads. T tokens, R rows
    (sequences) of the step, S slots, W blocks a table row. All index tensors are int32; a slot, row or place below 0 is padding: it reads zeros
    and writes nowhere. `history` [S, longest] is the tokens of each slot, `table` [S, W] its blocks (-1: none). Plain torch for every
    operation, to begin with or to compare with: `penstock.plugins.devices.cuda_ops.TorchOps`.
    """

    name: str
    """As its spec's."""
    kv_layout: str
    """Names the order of bytes in a block."""
    capturable: bool
    """May be captured in a graph."""
    workspace_bytes: int
    """What it has allocated for itself."""

    def compile_only(self) -> AbstractContextManager[None]:
        """Inside, operations prepare what their first call would (compile, on as many threads as there are cores) and need not compute anything."""
        ...

    def seam(self, longest: int) -> int:
        """Keys after which attention's sums begin anew in deterministic mode, where no sequence has more than `longest`; 0: never."""
        ...

    def allocate(
        self, layers: int, num_blocks: int, kv_heads: int, block_size: int, dim: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """The KV pool, not initialised. Raises torch.OutOfMemoryError."""
        ...

    # --- state of the slots

    def decode_inputs(self, slots: Tensor, starts: Tensor, history: Tensor, table: Tensor, block_size: int) -> Columns:
        """One token a row: that at `starts`, which sees everything up to itself."""
        ...

    def ragged_inputs(
        self, slots: Tensor, starts: Tensor, q_start: Tensor, history: Tensor, table: Tensor, block_size: int, tokens: int, num_decode: int
    ) -> Columns:
        """q_start[r + 1] - q_start[r] tokens of row r, from `starts` on; `tokens` in all, those from q_start[R] on padding."""
        ...

    def place(self, history: Tensor, table: Tensor, slots: Tensor, counts: Tensor, offsets: Tensor, tokens: Tensor) -> None:
        """A slot's history becomes tokens[offset : offset + count], its table row -1."""
        ...

    def set_blocks(self, table: Tensor, slots: Tensor, index: Tensor, ids: Tensor) -> None:
        """table[slot, index] = id."""
        ...

    def copy_blocks(self, pool: Tensor, source: Tensor, target: Tensor) -> None:
        """In every layer of the pool. No target is also a source."""
        ...

    def write_tokens(self, slots: Tensor, positions: Tensor, tokens: Tensor, history: Tensor) -> None:
        """history[slot, position] = max(token, 0)."""
        ...

    # --- the model

    def embed(self, tokens: Tensor, table: Tensor) -> Tensor:
        """Rows of the embedding `table` [V, H]: [T, H]."""
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

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x weight^T + bias, weight [N, K]: [T, N]."""
        ...

    def gated_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """silu(y[:, :I]) * y[:, I:] of y = x weight^T + bias, weight [2I, K]: [T, I]."""
        ...

    def rope(
        self,
        qkv: Tensor,
        columns: Columns,
        cos_sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        heads: int,
        kv_heads: int,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
    ) -> Tensor:
        """Rotate q and k, write k and v to the cache; q [T, Hq, D]. The keys in `qkv` [T, (Hq + 2 Hkv) * D] may be overwritten."""
        ...

    def attend(self, q: Tensor, qkv: Tensor, k_cache: Tensor, v_cache: Tensor, columns: Columns, scale: float, window: int) -> Tensor:
        """[T, Hq, D]. `qkv`: as `rope` left it; who likes may read this step's own keys and values there."""
        ...

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """[R, V] float32."""
        ...

    # --- sampling

    def greedy(self, logits: Tensor) -> Tensor:
        """[R] int32: the first maximum, -1 for a bad row."""
        ...

    def draw(self, logits: Tensor, settings: Settings, slots: Tensor, positions: Tensor) -> Tensor:
        """[R] int32, -1 for a bad row; rows of temperature 0 are greedy. `logits` may be overwritten."""
        ...

    def penalise(self, logits: Tensor, counted: Tensor, counts: Tensor, in_prompt: Tensor, settings: Settings) -> None:
        """In place, on the rows whose `counted` [R] names a slot (counts int32, in_prompt bool [S, V])."""
        ...

    def start_counts(self, counts: Tensor, in_prompt: Tensor, slots: Tensor, history: Tensor, splits: Tensor, ends: Tensor) -> None:
        """Count a slot's history: [0, split) is prompt, [split, end) output."""
        ...

    def count(self, counts: Tensor, counted: Tensor, tokens: Tensor) -> None:
        """counts[counted[r], tokens[r]] += 1 for the rows that are counted and have a token."""
        ...


class TorchOps:
    """See Ops. Not capturable: attention and draws look at values on the host."""

    name = "reference"
    kv_layout = "rows-v1"
    capturable = False
    workspace_bytes = 0

    def compile_only(self) -> AbstractContextManager[None]:
        """See Ops: there is nothing to compile."""
        return nullcontext()

    def seam(self, longest: int) -> int:
        """See Ops."""
        return 0

    def allocate(
        self, layers: int, num_blocks: int, kv_heads: int, block_size: int, dim: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """See Ops."""
        return torch.empty(layers, 2, num_blocks, kv_heads, block_size, dim, dtype=dtype, device=device)

    def decode_inputs(self, slots: Tensor, starts: Tensor, history: Tensor, table: Tensor, block_size: int) -> Columns:
        """See Ops."""
        rows = slots.shape[0]
        q_start = torch.arange(rows + 1, dtype=torch.int32, device=slots.device)
        return self.ragged_inputs(slots, starts, q_start, history, table, block_size, rows, rows)

    def ragged_inputs(
        self, slots: Tensor, starts: Tensor, q_start: Tensor, history: Tensor, table: Tensor, block_size: int, tokens: int, num_decode: int
    ) -> Columns:
        """See Ops."""
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
        """See Ops."""
        for slot, count, offset in zip(slots.tolist(), counts.tolist(), offsets.tolist(), strict=True):
            if slot >= 0:
                history[slot, :count] = tokens[offset : offset + count]
                table[slot] = -1

    def set_blocks(self, table: Tensor, slots: Tensor, index: Tensor, ids: Tensor) -> None:
        """See Ops."""
        real = slots >= 0
        table[slots[real], index[real]] = ids[real]

    def copy_blocks(self, pool: Tensor, source: Tensor, target: Tensor) -> None:
        """See Ops."""
        real = (source >= 0) & (target >= 0)
        pool[:, :, target[real]] = pool[:, :, source[real]]

    def write_tokens(self, slots: Tensor, positions: Tensor, tokens: Tensor, history: Tensor) -> None:
        """See Ops."""
        real = slots >= 0
        history[slots[real], positions[real]] = tokens[real].clamp_min(0)

    def embed(self, tokens: Tensor, table: Tensor) -> Tensor:
        """See Ops."""
        return table.index_select(0, tokens)

    def take_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        """See Ops."""
        return x.index_select(0, rows)

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See Ops."""
        return rms_norm(x, weight, eps)

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See Ops."""
        return rms_norm(residual.add_(x), weight, eps)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See Ops."""
        return functional.linear(x, weight, bias)

    def gated_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See Ops."""
        return gated("silu", functional.linear(x, weight, bias))

    def rope(
        self,
        qkv: Tensor,
        columns: Columns,
        cos_sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        heads: int,
        kv_heads: int,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
    ) -> Tensor:
        """See Ops."""
        size, dim = k_cache.shape[2], k_cache.shape[3]
        every = qkv.view(qkv.shape[0], heads + 2 * kv_heads, dim)
        q, k, v = every[:, :heads], every[:, heads:-kv_heads], every[:, -kv_heads:]
        if q_norm is not None:
            q = rms_norm(q, q_norm, eps)
        if k_norm is not None:
            k = rms_norm(k, k_norm, eps)
        angles = cos_sin[columns.positions]
        keep = columns.places >= 0
        where = columns.places[keep]
        k_cache[where // size, :, where % size] = rotate(k, angles)[keep]
        v_cache[where // size, :, where % size] = v[keep]
        return rotate(q, angles).contiguous()

    def attend(self, q: Tensor, qkv: Tensor, k_cache: Tensor, v_cache: Tensor, columns: Columns, scale: float, window: int) -> Tensor:
        """See Ops."""
        size = k_cache.shape[2]
        out = torch.zeros_like(q)
        bounds = columns.q_start.tolist()
        for row, (slot, length) in enumerate(zip(columns.slots.tolist(), columns.kv_len.tolist(), strict=True)):
            first, last = bounds[row], bounds[row + 1]
            if slot < 0 or length == 0:
                continue
            at = torch.arange(length, device=q.device)
            block = columns.table[slot].long()[at // size]
            keys = k_cache[block, :, at % size].transpose(0, 1)[None]
            values = v_cache[block, :, at % size].transpose(0, 1)[None]
            position = torch.arange(length - (last - first), length, device=q.device)[:, None]
            seen = at[None] <= position
            if window > 0:
                seen &= at[None] > position - window
            attended = functional.scaled_dot_product_attention(
                q[first:last].transpose(0, 1)[None], keys, values, attn_mask=seen, scale=scale, enable_gqa=True
            )
            out[first:last] = attended[0].transpose(0, 1)
        return out

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """See Ops."""
        return functional.linear(hidden.float(), weight.float())

    def greedy(self, logits: Tensor) -> Tensor:
        """See Ops."""
        tokens, values = sampling.greedy(logits)
        return torch.where(torch.isfinite(values), tokens, -1).int()

    def draw(self, logits: Tensor, settings: Settings, slots: Tensor, positions: Tensor) -> Tensor:
        """See Ops."""
        at = slots.clamp_min(0)
        s = settings
        filters = (s.top_k[at], s.top_p[at], s.min_p[at])
        tokens, values = sampling.draw(logits, s.temperature[at], *filters, s.seeds[at], s.choices[at], positions)
        return torch.where(torch.isfinite(values) & (slots >= 0), tokens, -1).int()

    def penalise(self, logits: Tensor, counted: Tensor, counts: Tensor, in_prompt: Tensor, settings: Settings) -> None:
        """See Ops."""
        rows = torch.nonzero(counted >= 0).flatten()
        at = counted[rows]
        logits[rows] = sampling.penalise(
            logits[rows], counts[at], in_prompt[at], settings.repetition[at], settings.frequency[at], settings.presence[at]
        )

    def start_counts(self, counts: Tensor, in_prompt: Tensor, slots: Tensor, history: Tensor, splits: Tensor, ends: Tensor) -> None:
        """See Ops."""
        for slot, split, end in zip(slots.tolist(), splits.tolist(), ends.tolist(), strict=True):
            if slot < 0:
                continue
            counts[slot] = torch.bincount(history[slot, split:end], minlength=counts.shape[1]).int()
            in_prompt[slot] = torch.bincount(history[slot, :split], minlength=counts.shape[1]) > 0

    def count(self, counts: Tensor, counted: Tensor, tokens: Tensor) -> None:
        """See Ops."""
        real = (counted >= 0) & (tokens >= 0)
        counts[counted[real], tokens[real]] += 1
