"""An attention backend as a plugin: plain torch, in float32, one sequence at a time. For reading and for comparing, not for speed.

Install it beside Penstock (`pip install ./examples/attention_plain`) and start with `--attention-backend plain`, on a CPU or a GPU.
`--deterministic` refuses it: torch's sums depend on how many rows there are.
What it does not know: models, where blocks come from. It has a pool of pages, gets projections and index columns, and gives what was attended.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from penstock.core.contract.devices import ModelFacts
from penstock.core.contract.hookspecs import AttentionSpec, hookimpl

if TYPE_CHECKING:
    import torch

    from penstock.plugins.attention.pages import Cache
    from penstock.plugins.models.api import AttnCall, Columns


class PlainAttention:
    """torch is imported in the methods, not at the top: only an engine that chose this backend pays for it."""

    name = "plain"
    kv_layout = "plain-rows-v1"
    capturable = False  # it looks at lengths
    workspace_bytes = 0

    def __init__(self, facts: ModelFacts, dtype: torch.dtype, device: torch.device, block_size: int) -> None:
        from penstock.plugins.attention.pages import Pages

        pages = Pages(facts, dtype, device, block_size)  # a page: [layers, 2, Hkv, block_size, D]
        self.bytes_per_token = pages.bytes_per_token
        self.allocate, self.caches, self.copy = pages.allocate, pages.caches, pages.copy
        self.heads, self.kv_heads, self.block_size = facts.num_heads, facts.num_kv_heads, block_size

    def store(
        self,
        qkv: torch.Tensor,
        columns: Columns,
        cos_sin: torch.Tensor,
        cache: Cache,
        q_norm: torch.Tensor | None = None,
        k_norm: torch.Tensor | None = None,
        eps: float = 0.0,
    ) -> torch.Tensor:
        import torch

        def normed(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
            x = x.float()
            return x if weight is None else x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight.float()

        def rotated(x: torch.Tensor) -> torch.Tensor:
            half = angles.shape[-1] // 2
            cos, sin = angles[:, None, :half], angles[:, None, half:]
            low, high, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
            return torch.cat((low * cos - high * sin, high * cos + low * sin, rest), dim=-1).to(qkv.dtype)

        angles = cos_sin[columns.positions.long()]
        heads = qkv.view(qkv.shape[0], self.heads + 2 * self.kv_heads, -1)
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        real = columns.places >= 0
        block, offset = columns.places[real].long() // self.block_size, columns.places[real].long() % self.block_size
        cache.k[block, :, offset] = rotated(normed(k, k_norm))[real]
        cache.v[block, :, offset] = v[real]
        return rotated(normed(q, q_norm))

    def attend(self, q: torch.Tensor, qkv: torch.Tensor, cache: Cache, columns: Columns, call: AttnCall) -> torch.Tensor:
        import torch

        out = torch.zeros_like(q)
        group = self.heads // self.kv_heads
        bounds, tables = columns.q_start.tolist(), columns.block_tables()
        for r, length in enumerate(columns.kv_len.tolist()):
            first, end = bounds[r], bounds[r + 1]
            if length == 0:  # padding
                continue
            positions = torch.arange(length, device=q.device)
            block, offset = tables[r][positions // self.block_size].long(), positions % self.block_size
            keys = cache.k[block, :, offset].float().repeat_interleave(group, dim=1)  # [length, Hq, D]
            values = cache.v[block, :, offset].float().repeat_interleave(group, dim=1)
            own = positions[length - (end - first) :, None]
            seen = positions[None] <= own
            if call.window > 0:
                seen &= positions[None] > own - call.window
            scores = torch.einsum("qhd,khd->hqk", q[first:end].float(), keys) * call.scale
            if call.softcap:
                scores = call.softcap * torch.tanh(scores / call.softcap)
            scores = scores.masked_fill(~seen, float("-inf"))
            if call.sinks is not None:  # one more thing to look at, which has no value
                scores = torch.cat((scores, call.sinks.float()[:, None, None].expand(-1, end - first, 1)), dim=-1)
            out[first:end] = torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1)[..., :length], values).to(q.dtype)
        return out

    def seam(self, longest: int) -> int:
        return 0


def supports(facts: ModelFacts, dtype: str) -> str | None:
    return None if facts.head_dim % 16 == 0 else f"head_dim {facts.head_dim} is no multiple of 16"


def factory(*, facts: ModelFacts, dtype: torch.dtype, device: torch.device, block_size: int, **options: object) -> PlainAttention:
    return PlainAttention(facts, dtype, device, block_size)


@hookimpl
def register_attention_backends() -> list[AttentionSpec]:
    return [
        AttentionSpec(
            name="plain",
            api_level=2,
            doc="plain torch, one sequence at a time",
            devices=["cpu", "cuda"],
            supports=supports,
            factory=factory,
            priority=-1,  # never by itself
        )
    ]
