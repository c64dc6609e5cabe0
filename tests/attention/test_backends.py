"""Every attention backend that runs here against float64: stored and read again, decode rows and chunks together, scattered and copied pages."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from penstock.core.contract.devices import ModelFacts
from penstock.plugins.attention import register_attention_backends
from penstock.plugins.models.api import AttnCall, Columns

CPU, SIZE = torch.device("cpu"), 16
FACTS = ModelFacts(
    architecture="x", model_type="x", vocab_size=9, hidden_size=9, intermediate_size=9, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=32,
    max_position=99,
)  # fmt: skip
EXAMPLE = Path(__file__).parents[2] / "examples" / "attention_plain" / "penstock_attention_plain.py"


def i32(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make(name: str, dtype: torch.dtype, facts: ModelFacts = FACTS) -> Any:
    specs = {spec.name: spec for spec in register_attention_backends()}
    if name == "plain":
        module = importlib.util.spec_from_file_location("plain_example", EXAMPLE)
        assert module is not None
        assert module.loader is not None
        loaded = importlib.util.module_from_spec(module)
        module.loader.exec_module(loaded)
        specs = {spec.name: spec for spec in loaded.register_attention_backends()}
    return specs[name].factory(facts=facts, dtype=dtype, device=CPU, block_size=SIZE, max_rows=8, deterministic=False)


class Story:
    """Sequences that are stored and attended in two steps: what the backend has to know, and all keys and values in float64."""

    def __init__(self, dtype: torch.dtype, seed: int, norms: bool, rotary: int = 32) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.dtype, self.rotary = dtype, rotary
        angle = torch.rand(99, rotary // 2, generator=self.random) * 6
        self.cos_sin = torch.cat((angle.cos(), angle.sin()), 1)
        self.norms = [self.randn(32) + 1 if norms else None for _ in range(2)]
        self.table = torch.full((9, 5), -1, dtype=torch.int32)
        self.free = torch.randperm(24, generator=self.random).tolist()
        self.keys: dict[int, list[torch.Tensor]] = {}
        self.values: dict[int, list[torch.Tensor]] = {}

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random).to(self.dtype)

    def turned(self, x: torch.Tensor, norm: torch.Tensor | None, positions: torch.Tensor) -> torch.Tensor:
        """[n, H, D], normed and rotated in float64."""
        x = x.double()
        if norm is not None:
            x = (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * norm.double()).to(self.dtype).double()
        half = self.rotary // 2
        cos, sin = self.cos_sin[positions.long()].double()[:, None].split(half, -1)
        low, high, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat((low * cos - high * sin, high * cos + low * sin, rest), -1).to(self.dtype).double()

    def step(self, rows: list[tuple[int, int, int]], padding: int = 0, dense: bool = True) -> tuple[torch.Tensor, Columns, torch.Tensor]:
        """rows of (slot, start, count) -> (qkv, columns, rotated queries in float64)."""
        for slot, start, count in rows:
            for index in range(-(-(start + count) // SIZE)):
                if self.table[slot, index] < 0:
                    self.table[slot, index] = self.free.pop()
        slots, starts, counts = (i32([row[i] for row in rows]) for i in range(3))
        positions = torch.cat([torch.arange(start, start + count) for _, start, count in rows]).int()
        owner = torch.repeat_interleave(slots, counts).long()
        places = self.table[owner, positions.long() // SIZE] * SIZE + positions % SIZE
        qkv = self.randn(len(positions), (6 + 2 * 2) * 32)
        heads = qkv.view(len(positions), 10, 32)
        for token, slot in enumerate(owner.tolist()):
            at = positions[token : token + 1]
            self.keys.setdefault(slot, []).append(self.turned(heads[token : token + 1, 6:8], self.norms[1], at)[0])
            self.values.setdefault(slot, []).append(heads[token, 8:].double())
        q_start = i32([0, *np.cumsum(counts.tolist()).tolist()])
        table = self.table[slots.long()].contiguous() if dense else self.table
        columns = Columns(positions, positions, places.int(), slots, starts + counts, q_start, table, 0, dense)
        return qkv, columns, self.turned(heads[:, :6], self.norms[0], positions)

    def truth(self, columns: Columns, q: torch.Tensor, call: AttnCall) -> torch.Tensor:
        out = torch.zeros_like(q)
        for row, slot in enumerate(columns.slots.tolist()):
            first, last = int(columns.q_start[row]), int(columns.q_start[row + 1])
            k = torch.stack(self.keys[slot]).repeat_interleave(3, 1)
            v = torch.stack(self.values[slot]).repeat_interleave(3, 1)
            at, own = torch.arange(len(k)), torch.arange(len(k) - (last - first), len(k))[:, None]
            seen = at[None] <= own
            if call.window:
                seen &= at[None] > own - call.window
            scores = torch.einsum("qhd,khd->hqk", q[first:last], k) * call.scale
            if call.softcap:
                scores = call.softcap * (scores / call.softcap).tanh()
            weights = scores.masked_fill(~seen, -torch.inf).exp()
            total = weights.sum(-1, keepdim=True)
            if call.sinks is not None:
                total = total + call.sinks.double().exp()[:, None, None]
            out[first:last] = torch.einsum("hqk,khd->qhd", weights / total, v)
        return out


def check(backend: Any, story: Story, cache: Any, step: Any, call: AttnCall) -> None:
    qkv, columns, q = step
    norms = dict(zip(("q_norm", "k_norm"), story.norms, strict=True))
    stored = backend.store(qkv, columns, story.cos_sin, cache, **norms, eps=1e-5)
    close = 1e-5 if story.dtype == torch.float32 else 5e-2
    torch.testing.assert_close(stored.double(), q, atol=close, rtol=close)
    attended = backend.attend(stored, qkv, cache, columns, call)
    torch.testing.assert_close(attended.double(), story.truth(columns, q, call), atol=close, rtol=close)


CALLS = {
    "full": AttnCall(0.2),
    "window": AttnCall(0.2, 5),
    "softcap": AttnCall(0.3, 0, 1.5),
    "sinks": AttnCall(0.2, 7, 0.0, torch.randn(6)),
}
NATIVE = {"full", "window"}


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("name", ["native", "torch", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_two_steps_equal_float64(name: str, kind: str, dtype: torch.dtype) -> None:
    backend, story = make(name, dtype), Story(dtype, seed=len(kind), norms=kind == "window", rotary=24 if kind == "softcap" else 32)
    pool = backend.allocate(24)
    assert (pool.dtype, pool.shape, pool.is_contiguous()) == (torch.uint8, (24, 3 * backend.bytes_per_token * SIZE), True)
    pool.fill_(255)  # NaN everywhere
    cache = backend.caches(pool)[1]
    if name == "native" and kind not in NATIVE:
        with pytest.raises(ValueError, match="neither soft-caps nor sinks"):
            check(backend, story, cache, story.step([(0, 0, 3)]), CALLS[kind])
        return
    check(backend, story, cache, story.step([(3, 0, 20), (0, 0, 1), (5, 0, 33)]), CALLS[kind])
    check(backend, story, cache, story.step([(0, 1, 1), (5, 33, 1), (3, 20, 17)]), CALLS[kind])


@pytest.mark.parametrize("name", ["native", "torch", "plain"])
def test_a_copied_page_is_the_page_in_every_layer(name: str) -> None:
    backend = make(name, torch.float32)
    pool = backend.allocate(8)
    pool.copy_(torch.randint(0, 256, pool.shape, dtype=torch.uint8))
    before = pool.clone()
    backend.copy(pool, i32([2, -1, 5]), i32([7, 3, 0]))
    assert torch.equal(pool[[7, 0]], before[[2, 5]])
    assert torch.equal(pool[1:7], before[1:7])
    assert len(backend.caches(pool)) == 3


@pytest.mark.parametrize("name", ["torch", "plain"])
def test_padding_and_slots_that_are_elsewhere_in_the_table(name: str) -> None:
    """As another device than the CPU has them: rows of the whole table, tokens and sequences that are not there."""
    backend, story = make(name, torch.float32), Story(torch.float32, 2, norms=False)
    pool = backend.allocate(24)
    pool.zero_()
    qkv, columns, q = story.step([(4, 0, 9), (1, 0, 2)], dense=False)
    more = torch.cat((qkv, torch.full((2, 320), torch.nan)))
    padded = columns._replace(
        tokens=torch.cat((columns.tokens, i32([0, 0]))),
        positions=torch.cat((columns.positions, i32([0, 0]))),
        places=torch.cat((columns.places, i32([-1, -1]))),
        slots=torch.cat((columns.slots, i32([-1]))),
        kv_len=torch.cat((columns.kv_len, i32([0]))),
        q_start=torch.cat((columns.q_start, i32([11]))),
    )
    cache = backend.caches(pool)[2]
    stored = backend.store(more, padded, story.cos_sin, cache)
    attended = backend.attend(stored, more, cache, padded, AttnCall(0.2))
    torch.testing.assert_close(attended[:11].double(), story.truth(columns, q, AttnCall(0.2)), atol=1e-5, rtol=1e-5)
    assert not pool.view(torch.float32).isnan().any(), "padding was written"
