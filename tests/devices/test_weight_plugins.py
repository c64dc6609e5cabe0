"""Weights, models and dtypes that a plugin brings: through the real plugin host, with the least that the contract asks for."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from penstock.core.contract.hookspecs import ModelSpec, WeightSourceSpec, hookimpl
from penstock.core.contract.host import PluginHost
from penstock.core.processes.engine import runner_config
from penstock.core.protocol.config import build
from penstock.core.protocol.errors import CheckpointError, ConfigError, PluginFault
from penstock.core.protocol.sampling import SamplingParams
from penstock.plugins.devices.driver import Driver, Job
from penstock.plugins.devices.loading import model_for
from penstock.plugins.models import register_models
from penstock.plugins.weights.checked import CheckedWeights

Load = Callable[..., Any]
Offer = Callable[..., Any]


class Npz:
    """A weight source of the three methods that are asked for."""

    def __init__(self, path: str, load_format: str, *, dtype: torch.dtype, **_: Any) -> None:
        self.arrays = dict(np.load(Path(path) / "weights.npz"))
        self.dtype, self.load_format = dtype, load_format

    def take(self, name: str, shape: Any) -> torch.Tensor:
        value = torch.from_numpy(self.arrays.pop(name)).to(self.dtype)
        assert list(value.shape) == list(shape)
        return value

    def ignore(self, *names: str) -> None:
        for name in names:
            self.arrays.pop(name, None)

    def finish(self) -> None:
        if self.arrays:
            raise CheckpointError(f"left over: {sorted(self.arrays)}", param=min(self.arrays))


class NpzThatKnows(Npz):
    """With the two more that it may have."""

    def has(self, name: str) -> bool:
        return name in self.arrays

    def identity(self) -> str:
        return "always the same"


def hook(spec: WeightSourceSpec) -> Any:
    @hookimpl
    def register_weight_sources() -> list[WeightSourceSpec]:
        return [spec]

    return register_weight_sources


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch) -> Offer:
    """offer(load formats, factory, ...) -> an engine's plugin host with a plugin per pair."""

    def make(*sources: Any) -> PluginHost:
        names = []
        for at, (formats, factory) in enumerate(zip(sources[::2], sources[1::2], strict=True)):
            spec = WeightSourceSpec(name=f"mine-{at}", api_level=1, load_formats=formats, factory=factory)
            module = types.ModuleType(f"weights_of_mine_{at}")

            vars(module)["register_weight_sources"] = hook(spec)
            monkeypatch.setitem(sys.modules, module.__name__, module)
            names.append(module.__name__)
        return PluginHost("engine", extra=names).load()

    return make


def drawn(runner: Any) -> tuple[list[int], list[bytes]]:
    job = Job(prompt=np.arange(30, dtype=np.int32), params=SamplingParams(temperature=0.0, logprobs=3), max_tokens=5)
    Driver(runner).run([job])
    return job.tokens, job.logprobs


def to_npz(folder: Path, named: dict[str, torch.Tensor]) -> None:
    np.savez(folder / "weights.npz", **{name: value.numpy() for name, value in named.items()})  # type: ignore[arg-type]


def test_a_plugins_load_format_is_served(folder: Path, load: Load, make_tensors: Any, offer: Offer) -> None:
    right = drawn(load(folder))
    (folder / "model.safetensors").unlink()
    to_npz(folder, make_tensors())
    host = offer(["npz"], Npz)
    config = runner_config(build({"model": str(folder), "load_format": "npz", "kv_cache_memory_bytes": 1 << 20}), host)
    assert config.load_format == "npz"
    runner = load(folder, load_format="npz", plugins=host)
    assert drawn(runner) == right
    with pytest.raises(
        ConfigError, match=r"--load-format nzp: no plugin serves it\. Did you mean 'npz'\? Known: auto, dummy, gguf, npz, safetensors"
    ):
        load(folder, load_format="nzp", plugins=host)
    to_npz(folder, make_tensors(seed=1))
    assert load(folder, load_format="npz", plugins=host).fingerprint != runner.fingerprint
    (folder / "config.json").write_text((folder / "config.json").read_text().replace('"dtype"', '"note"'))
    assert load(folder, load_format="npz", plugins=host).dtype == "float32"


def test_a_plugin_that_serves_auto_comes_before_safetensors(folder: Path, load: Load, make_tensors: Any, offer: Offer) -> None:
    plain = drawn(load(folder))
    to_npz(folder, make_tensors(seed=1))
    asked: list[str] = []

    def factory(path: str, load_format: str, **options: Any) -> Npz:
        asked.append(load_format)
        return NpzThatKnows(path, load_format, **options)

    host = offer(["auto", "npz"], factory)
    runner = load(folder, plugins=host)
    assert drawn(runner) != plain
    assert drawn(load(folder, load_format="safetensors", plugins=host)) == plain
    assert asked == ["auto"]
    to_npz(folder, make_tensors(seed=2))
    assert load(folder, plugins=host).fingerprint == runner.fingerprint  # its own word for it
    later = offer(["auto"], Npz, ["auto"], factory)
    load(folder, plugins=later)
    assert asked == ["auto"] * 3


def test_tied_embeddings_of_a_source_that_says_what_it_has(folder: Path, load: Load, rewrite: Any, make_tensors: Any, offer: Offer) -> None:
    whole = make_tensors()
    rewrite(folder, None, tie_word_embeddings=True)
    untied = drawn(load(folder))  # the head differs
    rewrite(folder, {name: value for name, value in whole.items() if name != "lm_head.weight"})
    tied = drawn(load(folder))
    to_npz(folder, whole)
    assert drawn(load(folder, load_format="npz", plugins=offer(["npz"], NpzThatKnows))) == untied
    assert drawn(load(folder, load_format="npz", plugins=offer(["npz"], Npz))) == tied


def test_a_plugins_model_comes_before_the_built_in_one() -> None:
    specs = {spec.name: spec for spec in register_models()}
    mine = ModelSpec(name="mine", api_level=1, architectures=["LlamaForCausalLM"], facts=specs["llama"].facts, factory=lambda **_: None)
    assert model_for("LlamaForCausalLM", {**specs, "mine": mine}) is mine
    assert model_for("Qwen2ForCausalLM", {**specs, "mine": mine}) is specs["qwen2"]


@pytest.mark.parametrize(
    ("take", "said"),
    [
        (lambda value: None, "gave NoneType for the tensor '[a-z._]+', which is no torch.Tensor"),
        (lambda value: value.numpy(), "which is no torch.Tensor"),
        (lambda value: value[:-1], r"of shape \[96, 32\] and torch.float32, and was asked for \[97, 32\]"),
        (lambda value: value.half(), r"and torch.float16, and was asked for \[97, 32\] and torch.float32"),
        (lambda value: {}[3], r"failed for the tensor '[a-z._]+' with KeyError: 3"),
    ],
)
def test_what_a_source_gives_is_looked_at_once(take: Any, said: str) -> None:
    class Source:
        def take(self, name: str, shape: Any) -> Any:
            return take(torch.zeros(*shape))

        def has(self, name: str) -> bool:
            return name == "a"

    def blame(what: Exception | str) -> Exception:
        return PluginFault(f"The weight source 'odd' is broken: take() {what}")

    checked = CheckedWeights(Source(), torch.float32, blame)
    assert checked.has("a")
    with pytest.raises(PluginFault, match=f"The weight source 'odd' is broken: .*{said}"):
        checked.take("model.embed_tokens.weight", (97, 32))
    turned = CheckedWeights(types.SimpleNamespace(take=lambda name, shape: torch.zeros(3, 2).t()), torch.float32, blame)
    assert turned.take("a", (2, 3)).is_contiguous()
