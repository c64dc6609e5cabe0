"""The plugin families, one row each.

What it is: all that the host knows of a family: the process that loads it, its hook and spec, what it is called, which option chooses one of it, what
its factory's result must have, and how a spec of the level before becomes one of today's. A new family is a row here, a spec and a hook
in hookspecs.py, and a plugin that uses them.
What it does not know: plugins, pluggy.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from penstock.core.contract.hookspecs import (
    API_LEVEL,
    ActorSpec,
    AttentionSpec,
    ChatRendererSpec,
    DeviceSpec,
    DrafterSpec,
    FormatSpec,
    GrammarSpec,
    ModelSpec,
    QuantizerSpec,
    SchedulePolicySpec,
    Spec,
    TokenizerSpec,
    TransportSpec,
    WeightSourceSpec,
)

Role = Literal["root", "edge", "text", "engine"]


class Family(NamedTuple):
    name: str
    role: Role
    """The process that loads it."""
    spec: type[Spec]
    """What its hook returns a list of."""
    noun: str
    flag: str = ""
    """The option that chooses another one of it."""
    protocol: str = ""
    """`module:class` whose members the factory's result must have; "" where that belongs to the device plugin."""
    without: Mapping[str, Any] = MappingProxyType({})
    """Functions of the spec whose failure can be skipped, and what is taken for their answer then."""
    adapt: Callable[[Any], Spec] | None = None
    """Makes a spec of the level before one of the current level. Where there is none, the level before is not spoken."""
    careful: str = ""
    """`module:class` that a stranger's factory's result is called through, made of it and of what blames the plugin."""
    also: tuple[Role, ...] = ()
    """Further processes that load it."""

    @property
    def roles(self) -> tuple[Role, ...]:
        return (self.role, *self.also)

    @property
    def hook(self) -> str:
        return f"register_{self.name}"

    @property
    def level(self) -> int:
        return API_LEVEL[self.name]

    def levels(self) -> tuple[int, ...]:
        """The levels that this build speaks, the current one first."""
        return (self.level, self.level - 1) if self.adapt is not None else (self.level,)

    def members(self) -> list[str]:
        """What a factory's result must have. Imported late, for root imports no numpy."""
        if not self.protocol:
            return []
        module, _, name = self.protocol.partition(":")
        protocol = getattr(importlib.import_module(module), name)
        return sorted(member for member in {*vars(protocol), *protocol.__annotations__} if not member.startswith("_"))

    def wrap(self, result: Any, blame: Callable[[str, Exception | str], Exception]) -> Any:
        """What a stranger's factory gave, as it is called: see `careful`."""
        module, _, name = self.careful.partition(":")
        return getattr(importlib.import_module(module), name)(result, blame) if module else result


_CONTRACT = "penstock.core.contract"


def _adapter(module: str) -> Callable[[Any], Spec]:
    """Its `adapt`, imported when the first plugin of the level before comes."""

    def adapt(spec: Any) -> Spec:
        adapted: Spec = importlib.import_module(module).adapt(spec)
        return adapted

    return adapt


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("devices", "engine", DeviceSpec, "device", "--device", f"{_CONTRACT}.devices:Device", without={"available": False}),
        Family(
            "models",
            "engine",
            ModelSpec,
            "model",
            protocol="penstock.plugins.models.api:Model",
            adapt=_adapter("penstock.plugins.models.level_1"),
        ),
        Family(
            "attention_backends",
            "engine",
            AttentionSpec,
            "attention backend",
            "--attention-backend",
            "penstock.plugins.models.api:Attention",
            without={"supports": "its check failed, see `penstock plugins`"},
            adapt=_adapter("penstock.plugins.attention.level_1"),
        ),
        Family("weight_sources", "engine", WeightSourceSpec, "weight source", "--load-format", without={"matches": False}),
        Family("quantizers", "engine", QuantizerSpec, "quantizer", "--quantization", "penstock.plugins.models.api:Quantizer"),
        Family("drafters", "engine", DrafterSpec, "drafter", "--speculative-config"),
        Family(
            "schedule_policies",
            "engine",
            SchedulePolicySpec,
            "scheduling policy",
            "--scheduling-policy",
            f"{_CONTRACT}.policy:SchedulePolicy",
        ),
        Family("tokenizers", "text", TokenizerSpec, "tokenizer", protocol=f"{_CONTRACT}.text:Tokenizer", without={"matches": False}),
        Family(
            "chat_renderers",
            "text",
            ChatRendererSpec,
            "chat renderer",
            protocol=f"{_CONTRACT}.text:ChatRenderer",
            without={"matches": False},
        ),
        Family(
            "grammars",
            "engine",
            GrammarSpec,
            "grammar backend",
            "--grammar-backend",
            protocol=f"{_CONTRACT}.grammars:Grammars",
            also=("text",),
        ),
        Family(
            "output_formats",
            "text",
            FormatSpec,
            "output format",
            protocol=f"{_CONTRACT}.formats:Splitter",
            without={"matches": False},
            careful=f"{_CONTRACT}.splitters:CarefulSplitter",
        ),
        Family(
            "transports",
            "edge",
            TransportSpec,
            "transport",
            "--transports",
            f"{_CONTRACT}.transports:Transport",
            adapt=_adapter("penstock.transports.level_1"),
        ),
        Family("actors", "engine", ActorSpec, "actor", protocol=f"{_CONTRACT}.actors:Seat", also=("text",)),
    )
}
