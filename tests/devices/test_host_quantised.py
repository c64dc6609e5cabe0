"""Quantised layers on the CPU: a model of them is held as codes, is one program, and means what its dequantised weights mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from penstock.core.contract.devices import ModelFacts
from penstock.kernels import native
from penstock.kernels.linear.scheme import Quantised, Scheme, dequantise, quantise
from penstock.plugins.attention.native import NativeAttention
from penstock.plugins.devices.host_ops import HostOps
from penstock.plugins.models.builder import Builder
from penstock.plugins.models.decoder import build_decoder

CPU, LENGTH = torch.device("cpu"), 21
FACTS = ModelFacts(
    architecture="Qwen2ForCausalLM", model_type="qwen2", vocab_size=61, hidden_size=64, intermediate_size=80, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=16, max_position=64, torch_dtype="float32", tie_word_embeddings=False, attention_bias=True,
)  # fmt: skip


def made_up(name: str, shape: Sequence[int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return torch.empty(*shape).normal_(0, 0.3, generator=generator)


class Wide:
    """Weights made up by name; with a quantizer, what its codes mean."""

    def __init__(self, quantizer: Rounding | None = None, dtype: torch.dtype = torch.float32) -> None:
        self._quantizer = quantizer
        self._dtype = dtype

    def has(self, name: str) -> bool:
        return True

    def take(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        layer = name.removesuffix(".weight")
        if self._quantizer is None or self._quantizer.scheme(self, layer, *shape[:1], shape[-1]) is None or layer == name:
            return made_up(name, shape).to(self._dtype)
        return dequantise(self._quantizer.read(self, layer, self._quantizer.own, shape[0], shape[1], CPU))

    def ignore(self, *names: str) -> None: ...

    def finish(self) -> None: ...


class Rounding:
    """A quantizer of everything but norms and the embedding table."""

    method = "rounding"

    def __init__(self, own: Scheme) -> None:
        self.own = own

    def scheme(self, weights: Any, layer: str, rows: int, inputs: int) -> Scheme | None:
        return self.own if layer.endswith(("_proj", "lm_head")) else None

    def read(self, weights: Any, layer: str, scheme: Scheme, rows: int, inputs: int, device: torch.device) -> Quantised:
        part = quantise(made_up(f"{layer}.weight", (rows, inputs)), scheme._replace(permuted=False))._replace(scheme=scheme)
        generator = torch.Generator().manual_seed(len(layer))
        return part._replace(perm=torch.randperm(inputs, generator=generator).int() if scheme.permuted else None)


def build(weights: Any, quantizer: Any, dtype: torch.dtype = torch.float32) -> tuple[Any, Builder]:
    builder = Builder(weights, HostOps(), dtype, CPU, None, quantizer)
    return build_decoder(facts=FACTS, builder=builder, attention=NativeAttention(FACTS, dtype, CPU, 16), max_len=64), builder


def step(model: Any, *, fused: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states of every token, by one program or composed; and their logits."""
    ops = HostOps()
    caches = model.attention.caches(model.attention.allocate(4))
    history = torch.zeros(2, 64, dtype=torch.int32)
    history[1, :LENGTH] = torch.arange(LENGTH) * 7 % 61
    blocks = torch.tensor([[-1, -1, -1], [3, 1, -1]], dtype=torch.int32)
    one, start = torch.tensor([1], dtype=torch.int32), torch.tensor([0], dtype=torch.int32)
    columns = ops.ragged_inputs(one, start, torch.tensor([0, LENGTH], dtype=torch.int32), history, blocks, 16, LENGTH, 0)
    if not fused:
        stream = model.step(ops, caches, columns)
        hidden = model.final(ops, stream.x, stream.residual)
    else:
        program = ops.fuse(model, caches)
        assert program is not None
        hidden = torch.empty(LENGTH, 64, dtype=stream_dtype(model))
        program(columns, torch.arange(LENGTH).int(), hidden)
    return hidden, model.logits(hidden)


def stream_dtype(model: Any) -> torch.dtype:
    table: torch.Tensor = model.plain.embedding
    return table.dtype


SCHEMES = [
    Scheme("int8", activations="token"), Scheme("int4", 32, 1, True), Scheme("int4", 16), Scheme("fp8_e4m3", 0, 0, activations="tensor"),
    Scheme("fp8_e4m3", 48, 32), Scheme("fp8_e5m2"), Scheme("nf4", 64), Scheme("fp4", 32),
]  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_codes_mean_what_they_mean_wide(scheme: Scheme) -> None:
    model, builder = build(Wide(), Rounding(scheme))
    truth, wide = build(Wide(Rounding(scheme)), None)
    assert not builder.wide
    if native.library() is not None:
        assert model.weights_bytes < wide.nbytes * 0.6
    for mine, theirs in zip(step(model, fused=False), step(truth, fused=False), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", [Scheme("int8"), Scheme("int4", 32, 1, True), Scheme("fp4", 32)], ids=str)
def test_the_whole_step_is_the_composed_one(dtype: torch.dtype, scheme: Scheme) -> None:
    if native.library() is None:
        pytest.skip(native.describe())
    model, _ = build(Wide(dtype=dtype), Rounding(scheme), dtype)
    for mine, theirs in zip(step(model, fused=True), step(model, fused=False), strict=True):
        assert torch.equal(mine, theirs)


def test_parts_with_orders_of_their_own() -> None:
    """Layers of one input that are stored in different orders are layers of their own; no program gathers."""
    scheme = Scheme("int4", 16, permuted=True)
    model, _ = build(Wide(), Rounding(scheme))
    truth, _ = build(Wide(Rounding(scheme)), None)
    assert HostOps().fuse(model, model.attention.caches(model.attention.allocate(4))) is None
    for mine, theirs in zip(step(model, fused=False), step(truth, fused=False), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
