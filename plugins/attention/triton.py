"""The Triton kernels as the device's table of operations.

What it is: `TritonOps`, an `Ops` (plugins/devices/cuda_ops.py) over kernels/*/triton.py, with the workspaces that those need, allocated once.
Importing this module imports triton: only the device plugin's factory does it.
What it does not know: slots' owners, graphs, steps.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from penstock.kernels import gpu
from penstock.kernels.activation.triton import gated
from penstock.kernels.argmax.triton import argmax
from penstock.kernels.attention import triton as attention
from penstock.kernels.embedding.triton import embedding, gather_rows
from penstock.kernels.linear import triton as linear
from penstock.kernels.rmsnorm.triton import add_rms_norm, rms_norm
from penstock.kernels.rope.triton import rope_and_cache
from penstock.kernels.sampling import triton as sampling
from penstock.kernels.slots import triton as slot_state
from penstock.plugins.devices.cuda_ops import Columns, Settings

Tensor = torch.Tensor


def _columns(count: int, size: int, device: torch.device) -> tuple[Tensor, ...]:
    """int32 columns, each beginning at a multiple of 64 bytes (kernels are compiled anew for other alignments)."""
    return torch.empty(count, -(-size // 16) * 16, dtype=torch.int32, device=device)[:, :size].unbind()


class TritonOps:
    """See Ops."""

    name = "triton"
    kv_layout = attention.KV_LAYOUT
    capturable = True

    def __init__(
        self, *, device: torch.device, max_rows: int, vocab: int, widest: int, heads: int, dim: int, deterministic: bool = False
    ) -> None:
        """`widest`: the largest number of outputs of a linear layer; `max_rows`: of a decode step, padding included."""
        self.deterministic = deterministic
        self._attention = torch.empty(
            attention.workspace_elements(max_rows, heads, dim, deterministic=deterministic), dtype=torch.float32, device=device
        )
        self._arrivals = torch.zeros(max_rows * heads, dtype=torch.int32, device=device)
        self._linear = torch.zeros(linear.workspace_elements(max(widest, vocab)), dtype=torch.float32, device=device)
        self._sampling = torch.empty(sampling.workspace_elements(max_rows, vocab), dtype=torch.float64, device=device)
        self._steps = torch.arange(max_rows + 1, dtype=torch.int32, device=device)
        self.workspace_bytes = self._attention.nbytes + self._linear.nbytes + self._sampling.nbytes

    def compile_only(self) -> AbstractContextManager[None]:
        """See Ops."""
        return gpu.compile_only()

    def seam(self, longest: int) -> int:
        """See Ops."""
        return attention.segment_of(longest) if self.deterministic else 0

    def allocate(
        self, layers: int, num_blocks: int, kv_heads: int, block_size: int, dim: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """See Ops."""
        return torch.empty(layers, 2, num_blocks, kv_heads, block_size, dim, dtype=dtype, device=device)

    def decode_inputs(self, slots: Tensor, starts: Tensor, history: Tensor, table: Tensor, block_size: int) -> Columns:
        """See Ops."""
        rows = slots.shape[0]
        tokens, positions, places, kv_len = _columns(4, rows, slots.device)
        slot_state.decode_inputs(
            slots, starts, history, table, block_size, tokens=tokens, positions=positions, cache_slots=places, kv_len=kv_len
        )
        return Columns(tokens, positions, places, slots, kv_len, self._steps[: rows + 1], table, rows)

    def ragged_inputs(
        self, slots: Tensor, starts: Tensor, q_start: Tensor, history: Tensor, table: Tensor, block_size: int, tokens: int, num_decode: int
    ) -> Columns:
        """See Ops."""
        ids, positions, places = _columns(3, tokens, slots.device)
        kv_len = torch.empty_like(slots)
        slot_state.ragged_inputs(
            slots, starts, q_start, history, table, block_size, tokens=ids, positions=positions, cache_slots=places, kv_len=kv_len
        )
        return Columns(ids, positions, places, slots, kv_len, q_start, table, num_decode)

    def place(self, history: Tensor, table: Tensor, slots: Tensor, counts: Tensor, offsets: Tensor, tokens: Tensor) -> None:
        """See Ops."""
        slot_state.place(history, table, slots, counts, offsets, tokens)

    def set_blocks(self, table: Tensor, slots: Tensor, index: Tensor, ids: Tensor) -> None:
        """See Ops."""
        slot_state.set_blocks(table, slots, index, ids)

    def copy_blocks(self, pool: Tensor, source: Tensor, target: Tensor) -> None:
        """See Ops."""
        slot_state.copy_blocks(pool.flatten(0, 1), source, target)

    def write_tokens(self, slots: Tensor, positions: Tensor, tokens: Tensor, history: Tensor) -> None:
        """See Ops."""
        slot_state.write_tokens(slots, positions, tokens, history)

    def embed(self, tokens: Tensor, table: Tensor) -> Tensor:
        """See Ops."""
        return embedding(tokens, table)

    def take_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        """See Ops."""
        return gather_rows(x, rows)

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See Ops."""
        return rms_norm(x, weight, eps)

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See Ops."""
        return add_rms_norm(x, residual, weight, eps)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See Ops."""
        return linear.matmul(x, weight, bias, deterministic=self.deterministic, workspace=self._linear)

    def gated_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See Ops."""
        if linear.fuses(x, self.deterministic):
            return linear.skinny(x, weight, bias, workspace=self._linear, gated="silu")
        return gated("silu", self.linear(x, weight, bias))

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
        """See Ops. Outside deterministic mode a prefill's rotated keys also replace those in `qkv`, where `attend` reads them."""
        kept = self._own(qkv, heads, kv_heads)[0] if self._reads_own(columns) else None
        return rope_and_cache(
            qkv,
            columns.positions,
            cos_sin,
            k_cache,
            v_cache,
            columns.places,
            heads,
            kv_heads,
            q_norm=q_norm,
            k_norm=k_norm,
            eps=eps,
            k_out=kept,
        )

    def _reads_own(self, columns: Columns) -> bool:
        """Whether this step's keys are read from its projection: faster than through the pages, but bits then depend on how a prompt was cut."""
        return not self.deterministic and columns.num_decode < columns.slots.shape[0]

    @staticmethod
    def _own(qkv: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor]:
        """The keys' and the values' columns of `qkv`: two [T, Hkv, D]."""
        parts = qkv.view(qkv.shape[0], heads + 2 * kv_heads, -1)
        return parts[:, heads : heads + kv_heads], parts[:, heads + kv_heads :]

    def attend(self, q: Tensor, qkv: Tensor, k_cache: Tensor, v_cache: Tensor, columns: Columns, scale: float, window: int) -> Tensor:
        """See Ops."""
        new_k, new_v = self._own(qkv, q.shape[1], k_cache.shape[1]) if self._reads_own(columns) else (None, None)
        return attention.paged_attention(
            q,
            k_cache,
            v_cache,
            columns.table,
            columns.q_start,
            columns.kv_len,
            scale,
            window,
            num_decode=columns.num_decode,
            table_rows=columns.slots,
            workspace=self._attention,
            counters=self._arrivals,
            deterministic=self.deterministic,
            new_k=new_k,
            new_v=new_v,
        )

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """See Ops."""
        return linear.matmul(hidden, weight, out_dtype=torch.float32, deterministic=self.deterministic, workspace=self._linear)

    def greedy(self, logits: Tensor) -> Tensor:
        """See Ops."""
        return argmax(logits)

    def draw(self, logits: Tensor, settings: Settings, slots: Tensor, positions: Tensor) -> Tensor:
        """See Ops."""
        s = settings
        columns = (s.temperature, s.top_k, s.top_p, s.min_p, s.seeds, s.choices)
        return sampling.draw(logits, *columns, positions, slots=slots, workspace=self._sampling)

    def penalise(self, logits: Tensor, counted: Tensor, counts: Tensor, in_prompt: Tensor, settings: Settings) -> None:
        """See Ops."""
        s = settings
        sampling.penalise_(logits, counted, counts, in_prompt, s.repetition, s.frequency, s.presence, slots=counted)

    def start_counts(self, counts: Tensor, in_prompt: Tensor, slots: Tensor, history: Tensor, splits: Tensor, ends: Tensor) -> None:
        """See Ops."""
        sampling.start_counts(counts, in_prompt, slots, history, slots, splits, ends)

    def count(self, counts: Tensor, counted: Tensor, tokens: Tensor) -> None:
        """See Ops."""
        sampling.count_(counts, counted, tokens)
