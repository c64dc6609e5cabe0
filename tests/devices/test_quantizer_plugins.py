"""A quantizer that a plugin brings: through the real plugin host, used, before built-in ones, and blamed for what it gets wrong."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from penstock.core.contract.hookspecs import QuantizerSpec, hookimpl
from penstock.core.contract.host import PluginHost
from penstock.core.protocol.errors import PluginFault
from penstock.core.protocol.sampling import SamplingParams
from penstock.kernels.linear.scheme import Quantised, Scheme, quantise
from penstock.plugins.devices.driver import Driver, Job

Load = Callable[..., Any]


class Halves:
    """Weights rounded to int8 with one scale for all; notes what it read."""

    method = "halves"

    def __init__(self, **given: Any) -> None:
        self.given, self.layers = given, []

    layers: list[str]

    def scheme(self, weights: Any, layer: str, rows: int, inputs: int) -> Scheme | None:
        return Scheme("int8", 0, 0) if layer != "lm_head" else None

    def read(self, weights: Any, layer: str, scheme: Scheme, rows: int, inputs: int, device: torch.device) -> Quantised:
        self.layers.append(layer)
        return quantise(weights.take(f"{layer}.weight", (rows, inputs)), scheme)


class Raises(Halves):
    def read(self, *_: Any) -> Quantised:
        raise RuntimeError("boom")


class OtherShape(Halves):
    def read(self, weights: Any, layer: str, scheme: Scheme, rows: int, inputs: int, device: torch.device) -> Quantised:
        return super().read(weights, layer, scheme, rows, inputs, device)._replace(n=rows + 1)


class NoScheme(Halves):
    def scheme(self, *_: Any) -> Any:
        return "int8"


class WrongScales(Halves):
    def read(self, weights: Any, layer: str, scheme: Scheme, rows: int, inputs: int, device: torch.device) -> Quantised:
        return super().read(weights, layer, scheme, rows, inputs, device)._replace(scales=torch.ones(2, 2))


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], PluginHost]:
    def make(factory: Callable[..., Any]) -> PluginHost:
        module = types.ModuleType("quantizers_of_mine")

        @hookimpl
        def register_quantizers() -> list[QuantizerSpec]:
            return [QuantizerSpec(name="mine", api_level=1, methods=["halves"], schemes=["int8", "mine"], factory=factory)]

        vars(module)["register_quantizers"] = register_quantizers
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return PluginHost("engine", extra=[module.__name__]).load()

    return make


def drawn(runner: Any) -> tuple[list[int], list[bytes]]:
    job = Job(prompt=np.arange(30, dtype=np.int32), params=SamplingParams(temperature=0.0, logprobs=3), max_tokens=5)
    Driver(runner).run([job])
    return job.tokens, job.logprobs


@pytest.mark.parametrize("word", ["mine", "int8"])
def test_a_plugins_word_is_served_before_a_built_in_one(word: str, folder: Path, load: Load, offer: Any) -> None:
    made: list[Halves] = []
    host = offer(lambda **given: made.append(Halves(**given)) or made[-1])
    runner = load(folder, quantization=word, plugins=host)
    assert made[0].given["method"] == word
    assert (made[0].given["config"], made[0].given["device"], made[0].given["facts"].hidden_size) == ({}, "cpu", 32)
    assert len(made[0].layers) == 14
    assert drawn(runner)[1] != drawn(load(folder))[1]


def test_a_method_of_config_json_is_served(folder: Path, load: Load, rewrite: Any, offer: Any) -> None:
    rewrite(folder, quantization_config={"quant_method": "halves", "strength": 3})
    made: list[Halves] = []
    load(folder, plugins=offer(lambda **given: made.append(Halves(**given)) or made[-1]))
    assert made[0].given["config"] == {"quant_method": "halves", "strength": 3}


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Raises, "boom"),
        (OtherShape, "another scheme or shape"),
        (NoScheme, "neither None nor a Scheme"),
        (WrongScales, r"scales of \[2, 2\]"),
    ],
)
def test_what_a_plugin_gets_wrong_is_its_fault(kind: type[Halves], says: str, folder: Path, load: Load, offer: Any) -> None:
    with pytest.raises(PluginFault, match=says) as error:
        load(folder, quantization="mine", plugins=offer(kind))
    assert "mine" in error.value.message


def test_the_way_of_quantising_is_part_of_the_fingerprint(folder: Path, load: Load) -> None:
    prints = [load(folder, quantization=word).fingerprint for word in (None, "int8", "fp8")]
    assert len(set(prints)) == 3
