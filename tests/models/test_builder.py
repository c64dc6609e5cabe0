"""Layers from a checkpoint: read at once as on a CPU, or into memory that was taken before, as for another device."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from penstock.core.contract.devices import ModelFacts
from penstock.kernels.linear.scheme import Quantised, Scheme, quantise
from penstock.plugins.attention.sdpa import TorchAttention
from penstock.plugins.devices.torch_ops import TorchLinear, TorchOps
from penstock.plugins.models.builder import Builder, Part
from penstock.plugins.models.decoder import build_decoder

CPU = torch.device("cpu")


class Named:
    """Weights made up by name, which notes who takes them."""

    def __init__(self, *absent: str) -> None:
        self.taken: list[str] = []
        self.threads: set[int] = set()
        self.finished = 0
        self._absent = absent

    def has(self, name: str) -> bool:
        return name not in self._absent

    def take(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        self.taken.append(name)
        self.threads.add(threading.get_ident())
        generator = torch.Generator().manual_seed(sum(name.encode()))
        return torch.empty(*shape).normal_(0, 1, generator=generator)

    def ignore(self, *names: str) -> None: ...

    def finish(self) -> None:
        self.finished += 1


def facts(**over: Any) -> ModelFacts:
    fields: dict[str, Any] = {
        "architecture": "LlamaForCausalLM", "model_type": "llama", "vocab_size": 31, "hidden_size": 24, "intermediate_size": 40,
        "num_layers": 2, "num_heads": 3, "num_kv_heads": 1, "head_dim": 16, "max_position": 64, "rms_norm_eps": 1e-5, "torch_dtype": "float32",
        "tie_word_embeddings": False,
    }  # fmt: skip
    return ModelFacts(**{**fields, **over})


def build(later: bool, weights: Named, told: list[float] | None = None, **over: Any) -> Any:
    shape = facts(**over)
    builder = Builder(weights, TorchOps(), torch.float32, CPU, None if told is None else told.append)
    if later:
        builder._later = []
    return build_decoder(facts=shape, builder=builder, attention=TorchAttention(shape, torch.float32, CPU, 16), max_len=64)


def held(model: Any) -> list[torch.Tensor]:
    plain, out = model.plain, [model.plain.embedding, model.plain.final_norm, model.plain.head.weight]
    for block in plain.blocks:
        out += [block.attn_norm, block.mlp_norm, *(layer.weight for layer in (block.qkv, block.o, block.gate_up, block.down))]
        out += [layer._bias for layer in (block.qkv, block.o, block.gate_up, block.down) if layer._bias is not None]
        out += [norm for norm in (block.q_norm, block.k_norm) if norm is not None]
    return out


@pytest.mark.parametrize("over", [{}, {"attention_bias": True, "mlp_bias": True, "attention_out_bias": True, "qk_norm": True}])
@pytest.mark.parametrize("tied", [False, True])
def test_both_ways_give_the_same_model(over: dict[str, Any], tied: bool) -> None:
    absent = ("lm_head.weight",) if tied else ()
    told: tuple[list[float], list[float]] = ([], [])
    weights = (Named(*absent), Named(*absent))
    once, later = (build(kind, weights[kind], told[kind], tie_word_embeddings=tied, **over) for kind in (False, True))
    assert len(held(once)) == len(held(later)) > 12
    assert all(torch.equal(a, b) for a, b in zip(held(once), held(later), strict=True))
    distinct = {tensor.data_ptr(): tensor.nbytes for tensor in held(later)}
    assert once.weights_bytes == later.weights_bytes == sum(distinct.values())
    assert sorted(weights[0].taken) == sorted(weights[1].taken)
    assert [w.finished for w in weights] == [1, 1]
    assert len(weights[0].threads) == 1
    assert threading.get_ident() not in weights[1].threads or tied  # tied.py compares two heads before anything is read
    for fractions in told:
        assert fractions == sorted(fractions)
        assert fractions[-1] == 1.0


def test_an_error_of_a_reading_thread_is_the_loads() -> None:
    class Broken(Named):
        def take(self, name: str, shape: Sequence[int]) -> torch.Tensor:
            if name == "model.layers.1.mlp.down_proj.weight":
                raise OSError(name)
            return super().take(name, shape)

    for later in (False, True):
        with pytest.raises(OSError, match="down_proj"):
            build(later, Broken())


def test_what_a_layer_multiplies() -> None:
    weights = Named()
    builder = Builder(weights, TorchOps(), torch.float32, CPU)
    layer = builder.linear([Part("a", 3), Part("b", 5)], 4, bias=True)
    x = torch.randn(2, 4)
    want = [x @ Named().take(f"{n}.weight", (rows, 4)).T + Named().take(f"{n}.bias", (rows,)) for n, rows in (("a", 3), ("b", 5))]
    assert torch.allclose(layer(x), torch.cat(want, 1), atol=1e-6)
    assert (layer.n, layer.k, layer.nbytes) == (8, 4, 8 * 4 * 4 + 8 * 4)
    out = torch.empty(2, 8)
    assert layer(x, None, out) is out
    assert torch.equal(out, layer(x))


class OwnLayers:
    """A quantizer whose layers are its own, for some."""

    method = "own"

    def scheme(self, weights: Any, layer: str, rows: int, inputs: int) -> Scheme | None:
        return Scheme("int8") if "mlp" in layer else None

    def linear(
        self, weights: Any, layers: list[str], scheme: Scheme, rows: list[int], inputs: int, bias: Any, activation: str, device: Any
    ) -> Any:
        return None if activation else TorchLinear(torch.full((sum(rows), inputs), float(len(layers))), None)

    def read(self, weights: Any, layer: str, scheme: Scheme, rows: int, inputs: int, device: torch.device) -> Quantised:
        return quantise(weights.take(f"{layer}.weight", (rows, inputs)), scheme)


def test_a_quantizer_may_bring_layers_of_its_own() -> None:
    shape = facts()
    builder = Builder(Named(), TorchOps(), torch.float32, CPU, None, OwnLayers())
    model = build_decoder(facts=shape, builder=builder, attention=TorchAttention(shape, torch.float32, CPU, 16), max_len=64)
    assert model.plain is not None
    for block in model.plain.blocks:
        assert torch.equal(block.down.weight, torch.ones(24, 40))  # type: ignore[attr-defined]
        assert block.qkv.weight.abs().max() > 1  # type: ignore[attr-defined]
    # gate and up, which these operations hold wide: 80 x 24 float32 in place of a byte each and 80 scales
    assert builder.wide == {Scheme("int8"): (2, 2 * (80 * 24 * 3 - 80 * 4))}
