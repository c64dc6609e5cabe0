"""Families and attention backends that give what they must not: refused at start, with their names, before anything is served."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
import torch

from penstock.core.contract.devices import ModelFacts
from penstock.core.contract.hookspecs import AttentionSpec, ModelSpec, hookimpl
from penstock.core.contract.host import PluginHost
from penstock.core.protocol.errors import PluginFault, UnsupportedFeature
from penstock.plugins.attention.sdpa import TorchAttention
from penstock.plugins.models.config import decoder_facts
from penstock.plugins.models.decoder import build_decoder

Load = Callable[..., Any]
MODULE = "penstock_odd_parts"


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Callable[..., PluginHost]:
    """host(attention=factory, model=factory, facts=function) -> a host with one plugin that brings them."""

    def make(attention: Any = None, model: Any = None, facts: Any = decoder_facts) -> PluginHost:
        module = ModuleType(MODULE)

        @hookimpl
        def register_attention_backends() -> list[AttentionSpec]:
            return [AttentionSpec(name="odd", api_level=2, devices=["cpu"], supports=lambda f, d: None, factory=attention or plain)]

        @hookimpl
        def register_models() -> list[ModelSpec]:
            made = model or build_decoder
            return [ModelSpec(name="odd-model", api_level=2, architectures=["LlamaForCausalLM"], facts=facts, factory=made, priority=9)]

        module.register_attention_backends = register_attention_backends  # type: ignore[attr-defined]
        module.register_models = register_models  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, MODULE, module)
        return PluginHost("engine", extra=[MODULE]).load()

    return make


def plain(*, facts: ModelFacts, dtype: torch.dtype, device: torch.device, block_size: int, **options: Any) -> Any:
    return TorchAttention(facts, dtype, device, block_size)


def changed(**changes: Any) -> Any:
    def make(**options: Any) -> Any:
        made = plain(**options)
        for name, value in changes.items():
            setattr(made, name, value)
        return made

    return make


class NoCopy:
    """All but one member."""

    def __init__(self, real: Any) -> None:
        for name in (
            "name",
            "kv_layout",
            "capturable",
            "bytes_per_token",
            "workspace_bytes",
            "allocate",
            "caches",
            "store",
            "attend",
            "seam",
        ):
            setattr(self, name, getattr(real, name))


ODD_ATTENTION: dict[str, tuple[Any, str]] = {
    "nothing": (lambda **_: None, "returned NoneType, which is no attention backend: it has no 'allocate'"),
    "no copy": (lambda **options: NoCopy(plain(**options)), "it has no 'copy'"),
    "bytes as a text": (changed(bytes_per_token="7"), "whose 'bytes_per_token' is '7', not int"),
    "no bytes": (changed(bytes_per_token=0), "whose 'bytes_per_token' is 0"),
    "no layout": (changed(kv_layout=None), "whose 'kv_layout' is None, not a text"),
    "small pool": (changed(allocate=lambda n: torch.empty(n, 8, dtype=torch.uint8)), "returned a tensor of 8 bytes for one block"),
    "no pool": (changed(allocate=lambda n: None), "allocate() returned NoneType for one block"),
    "failing pool": (changed(allocate=lambda n: 1 / 0), "allocate() failed with ZeroDivisionError"),
    "a cache short": (changed(caches=lambda pool: [0]), "caches() returned 1, not one for each of 2 layers"),
}


@pytest.mark.parametrize("kind", ODD_ATTENTION)
def test_an_attention_backend_that_is_none_is_named(kind: str, folder: Path, load: Load, host: Any) -> None:
    factory, said = ODD_ATTENTION[kind]
    with pytest.raises(PluginFault, match=re.escape(said)) as caught:
        load(folder, plugins=host(attention=factory), attention_backend="odd")
    assert "'odd'" in str(caught.value)
    assert MODULE in str(caught.value)


ODD_FACTS: dict[str, tuple[Any, str]] = {
    "a dictionary": (lambda config: {}, "facts() returned dict, not ModelFacts"),
    "no layers": (lambda config: msgspec.structs.replace(decoder_facts(config), num_layers=0), "returned num_layers 0"),
    "a text": (lambda config: msgspec.structs.replace(decoder_facts(config), vocab_size="97"), "returned vocab_size '97'"),
    "heads": (lambda config: msgspec.structs.replace(decoder_facts(config), num_kv_heads=3), "for 3 KV heads"),
}


@pytest.mark.parametrize("kind", ODD_FACTS)
def test_facts_that_cannot_be_are_the_familys(kind: str, folder: Path, load: Load, host: Any) -> None:
    facts, said = ODD_FACTS[kind]
    with pytest.raises(PluginFault, match=re.escape(said)) as caught:
        load(folder, plugins=host(facts=facts))
    assert "'odd-model'" in str(caught.value)


def with_member(name: str, value: Any) -> Any:
    def make(**parts: Any) -> Any:
        model = build_decoder(**parts)
        if value is None and name == "step":
            return type("Less", (), {})()
        setattr(model, name, value)
        return model

    return make


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        (lambda **_: None, "returned NoneType, which is no model"),
        (with_member("step", None), "which is no model: it has no 'attention'"),
        (with_member("weights_bytes", None), "whose 'weights_bytes' is None"),
    ],
)
def test_a_model_that_is_none_is_named(factory: Any, said: str, folder: Path, load: Load, host: Any) -> None:
    with pytest.raises(PluginFault, match=re.escape(said)) as caught:
        load(folder, plugins=host(model=factory))
    assert "'odd-model'" in str(caught.value)
    assert MODULE in str(caught.value)


def test_a_family_with_soft_caps_gets_a_backend_that_has_them(folder: Path, load: Load, host: Any) -> None:
    capped = lambda config: msgspec.structs.replace(decoder_facts(config), softcap=True)  # noqa: E731
    assert load(folder, plugins=host(facts=capped, attention=lambda **options: plain(**options))).attention in ("torch", "odd")
    assert load(folder).attention == "native"


def test_the_family_of_the_highest_priority_is_taken(folder: Path, load: Load, host: Any) -> None:
    def refuses(**parts: Any) -> Any:
        raise UnsupportedFeature("chosen", param="model")

    with pytest.raises(UnsupportedFeature, match="chosen"):
        load(folder, plugins=host(model=refuses))
