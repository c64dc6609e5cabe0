"""The Triton kernels as an attention backend: split-KV decode, ragged prefill, and everything between.

What it is: the Attention object (plugins/models/api.py) over kernels/attention/triton.py and kernels/rope/triton.py, with the workspaces that those
need, allocated once. Importing this module imports triton: only the backend's factory does it.
What it does not know: models, slots' owners, graphs, steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from penstock.core.contract.devices import ModelFacts
from penstock.kernels.attention import coded
from penstock.kernels.attention import triton as attention
from penstock.kernels.rope.triton import rope_and_cache
from penstock.kernels.slots import triton as slot_state
from penstock.plugins.attention.pages import Pages
from penstock.plugins.models.api import AttnCall, Columns

Tensor = torch.Tensor


class Coded(NamedTuple):
    """One layer's: a Cache with what the kernels want to know of its codes, if it has any."""

    k: Tensor
    v: Tensor
    codes: coded.Codes | None
    fixed: tuple[float, float] | None


class TritonAttention(Pages):
    """See Attention."""

    name = "triton"
    capturable = True
    trees = True

    def __init__(
        self,
        facts: ModelFacts,
        dtype: torch.dtype,
        device: torch.device,
        block_size: int,
        *,
        max_rows: int,
        deterministic: bool = False,
        kv: str = "",
    ) -> None:
        """`max_rows`: of a decode step, padding included."""
        super().__init__(facts, dtype, device, block_size, kv)
        self.kv_layout = coded.KV_LAYOUT if kv else attention.KV_LAYOUT
        self.deterministic = deterministic
        elements = attention.workspace_elements(max_rows, self.heads, self.dim, deterministic=deterministic, codes=bool(kv))
        self._workspace = torch.empty(elements, dtype=torch.float32, device=device)
        self._arrivals = torch.zeros(max_rows * self.heads, dtype=torch.int32, device=device)
        self.workspace_bytes = self._workspace.nbytes

    def seam(self, longest: int) -> int:
        """See Attention."""
        return attention.segment_of(longest) if self.deterministic else 0

    def caches(self, pool: Tensor) -> list[Any]:
        """See Attention."""
        plain = super().caches(pool)
        return [
            Coded(cache.k, cache.v, None if cache.k_scale is None else coded.codes_of(self.kv, cache.k_scale), cache.fixed)
            for cache in plain
        ]

    def copy(self, pool: Tensor, source: Tensor, target: Tensor) -> None:
        """See Attention."""
        # one group, whose stride must not grow with the pool: the kernel was compiled for a small one
        slot_state.copy_blocks(pool.as_strided((1, *pool.shape), (pool.stride(0), *pool.stride())), source, target)

    def move(self, pool: Tensor, source: Tensor, target: Tensor) -> None:
        """See Attention."""
        layers, _, heads, size, dim = self._page
        if not self.kv:
            attention.move_kv(pool.view(self._dtype).view(-1, *self._page), source, target)
            return
        codes = 2 * layers * heads * size * dim
        words = pool[:, codes:].view(torch.int32).view(-1, layers, heads, size)
        attention.move_kv(pool[:, :codes].view(-1, *self._page), source, target, words)

    def store(
        self,
        qkv: Tensor,
        columns: Columns,
        cos_sin: Tensor,
        cache: Coded,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> Tensor:
        """See Attention. Outside deterministic mode a prefill's rotated keys also replace those in `qkv`, where `attend` reads them."""
        kept = self._own(qkv)[0] if self._reads_own(columns) else None
        at = (columns.positions, cos_sin, cache.k, cache.v, columns.places, self.heads, self.kv_heads)
        return rope_and_cache(qkv, *at, q_norm=q_norm, k_norm=k_norm, eps=eps, k_out=kept, codes=cache.codes, fixed=cache.fixed)

    def _reads_own(self, columns: Columns) -> bool:
        """Whether this step's keys are read from its projection: faster than through the pages, but bits then depend on how a prompt was cut."""
        return not self.deterministic and columns.num_decode < columns.slots.shape[0]

    def _own(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """The keys' and the values' columns of `qkv`: two [T, Hkv, D]."""
        parts = qkv.view(qkv.shape[0], self.heads + 2 * self.kv_heads, -1)
        return parts[:, self.heads : self.heads + self.kv_heads], parts[:, self.heads + self.kv_heads :]

    def attend(self, q: Tensor, qkv: Tensor, cache: Coded, columns: Columns, call: AttnCall) -> Tensor:
        """See Attention."""
        new_k, new_v = self._own(qkv) if self._reads_own(columns) else (None, None)
        return attention.paged_attention(
            q,
            cache.k,
            cache.v,
            columns.table,
            columns.q_start,
            columns.kv_len,
            call.scale,
            call.window,
            softcap=call.softcap,
            sinks=call.sinks,
            num_decode=columns.num_decode,
            table_rows=columns.slots,
            workspace=self._workspace,
            counters=self._arrivals,
            deterministic=self.deterministic,
            new_k=new_k,
            new_v=new_v,
            codes=cache.codes,
            ancestors=columns.ancestors,
        )
