"""A plugin as somebody wrote it against level 1 of attention backends. Never edited: it must go on working at the level after.

What it is: plain torch over the CPU's panel layout. What it does not know: anything that came later.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from penstock.core.contract.devices import ModelFacts
from penstock.core.hookspecs import AttentionSpec, hookimpl

if TYPE_CHECKING:
    import torch


class PlainAttention:
    """`penstock.kernels` is imported here, not at the top: only an engine that chose this backend pays for torch."""

    name = "frozen-plain"
    fused = False

    def __init__(self) -> None:
        from penstock.kernels.attention import KV_LAYOUT

        self.kv_layout = KV_LAYOUT

    def allocate(self, num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype, layers: int) -> torch.Tensor:
        import torch

        return torch.empty(layers, 2, num_blocks, num_kv_heads, block_size, head_dim, dtype=dtype)

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
        import torch

        from penstock.kernels.attention import read_kv

        out = torch.empty_like(q)
        block_size = k_cache.shape[2]
        group = q.shape[1] // k_cache.shape[1]
        for r, length in enumerate(kv_len.tolist()):
            first, end = int(q_start[r]), int(q_start[r + 1])
            positions = torch.arange(length)
            slots = block_tables[r][positions // block_size] * block_size + positions % block_size
            keys = read_kv(k_cache, slots, values=False).float().repeat_interleave(group, dim=1)  # [length, Hq, D]
            values = read_kv(v_cache, slots, values=True).float().repeat_interleave(group, dim=1)
            own = torch.arange(length - (end - first), length)[:, None]
            seen = positions[None] <= own
            if window > 0:
                seen &= positions[None] > own - window
            scores = torch.einsum("qhd,khd->hqk", q[first:end].float(), keys) * scale
            shares = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
            out[first:end] = torch.einsum("hqk,khd->qhd", shares, values).to(q.dtype)
        return out


def supports(facts: ModelFacts, dtype: str) -> str | None:
    if dtype not in ("bfloat16", "float32"):
        return f"dtype {dtype} is not supported"
    return None if facts.head_dim % 16 == 0 else f"head_dim {facts.head_dim} is no multiple of 16"


def factory(*, facts: ModelFacts, dtype: torch.dtype, **options: object) -> PlainAttention:
    return PlainAttention()


@hookimpl
def register_attention_backends() -> list[AttentionSpec]:
    return [
        AttentionSpec(
            name="frozen-plain",
            api_level=1,
            doc="plain torch, one sequence at a time",
            devices=["cpu"],
            supports=supports,
            factory=factory,
            priority=-1,  # never by itself
        )
    ]
