"""Finds, checks and holds plugins.

What it is: discovery through entry points (`penstock.root`, `penstock.edge`, `penstock.text`, `penstock.engine`), registration with pluggy,
the api_level check, one name -> spec map per family, and the report behind `penstock plugins`. A plugin that cannot load stops the process,
unless broken plugins are to be skipped (then it is named in the report).
What it does not know: what a spec's factory makes, the step loop (which never comes here).
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any, Literal, TypeVar, cast

import msgspec
import pluggy

from penstock.core import hookspecs
from penstock.core.config import Config, nearest
from penstock.core.errors import ConfigError, PluginError
from penstock.core.hookspecs import (
    API_LEVEL,
    AttentionSpec,
    ChatRendererSpec,
    DeviceSpec,
    ModelSpec,
    SchedulePolicySpec,
    Spec,
    TokenizerSpec,
    TransportSpec,
    WeightSourceSpec,
)

Role = Literal["root", "edge", "text", "engine"]
S = TypeVar("S", bound=Spec)

BUILT_IN = "penstock"

BUILT_IN_NAMES: dict[str, tuple[Role, tuple[str, ...]]] = {
    "device": ("engine", ("auto", "cpu", "cuda")),
    "attention_backend": ("engine", ("native", "torch", "triton")),
    "scheduling_policy": ("engine", ("fcfs", "priority")),
    "transports": ("edge", ("openai",)),
}
"""option -> the process that loads such plugins, and the names that come with Penstock (a test compares). Root knows them without an import."""


def check_names(config: Config, extra: Sequence[str] = ()) -> None:
    """Refuse a name that no installed plugin can bring, before any process starts. Imports no plugin: where other packages' plugins are
    installed their names are unknown here, and the process that loads them says no. Raises ConfigError with the known names."""
    for option, (role, known) in BUILT_IN_NAMES.items():
        given = getattr(config, option)
        wrong = [name for name in (given if isinstance(given, list) else [given]) if name is not None and name not in known]
        if wrong and not extra and all(_package(entry) == BUILT_IN for entry in metadata.entry_points(group=f"penstock.{role}")):
            flag = "--" + option.replace("_", "-")
            raise ConfigError(f"{flag} {wrong[0]}: no such plugin.{nearest(wrong[0], known)} Known: {', '.join(known)}.", param=option)


class PluginInfo(msgspec.Struct, kw_only=True):
    """One row of the report."""

    name: str
    package: str
    version: str
    role: str
    target: str
    hooks: list[str] = []
    error: str | None = None


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """What won a choice, and why."""

    family: str
    winner: str
    package: str
    why: str


class PluginHost:
    """All plugins of one process. `extra` names modules to load besides the entry points (tests, notebooks)."""

    def __init__(self, role: Role, *, extra: Iterable[str] = (), skip_broken: bool = False) -> None:
        self.role: Role = role
        self._extra = tuple(extra)
        self._skip_broken = skip_broken
        self.manager = pluggy.PluginManager(hookspecs.PROJECT)
        self.manager.add_hookspecs(hookspecs)
        self.plugins: list[PluginInfo] = []
        self.choices: list[Choice] = []
        self._families: dict[str, dict[str, tuple[Spec, str]]] = {}

    @property
    def hook(self) -> Any:
        """The pluggy relay: `host.hook.request_finished(summary=...)`."""
        return self.manager.hook

    def load(self) -> PluginHost:
        """Import and register everything once. Raises PluginError naming package and reason."""
        found = sorted(metadata.entry_points(group=f"penstock.{self.role}"), key=lambda e: (_package(e) != BUILT_IN, _package(e), e.name))
        for entry in found:
            info = PluginInfo(name=entry.name, package=_package(entry), version=_version(entry), role=self.role, target=entry.value)
            self._register(info, entry.load)
        for dotted in self._extra:
            info = PluginInfo(name=dotted, package=dotted.split(".")[0], version="-", role=self.role, target=dotted)
            self._register(info, lambda dotted=dotted: importlib.import_module(dotted))
        if os.environ.get("PENSTOCK_TRACE_HOOKS") == "1":
            self.manager.trace.root.setwriter(lambda text: print(text, end="", file=sys.stderr))
            self.manager.enable_tracing()
        return self

    def _register(self, info: PluginInfo, load: Any) -> None:
        label = f"{info.package}:{info.name}"
        try:
            plugin = load()
            if isinstance(plugin, type):
                plugin = plugin()
            self.manager.register(plugin, name=label)
            self.manager.check_pending()
            info.hooks = sorted(caller.name for caller in self.manager.get_hookcallers(plugin) or [])
        except Exception as error:  # whatever a stranger's import does
            if self.manager.has_plugin(label):
                self.manager.unregister(name=label)
            info.error = f"{type(error).__name__}: {error}"
            if not self._skip_broken:
                raise PluginError(
                    f"Plugin {info.name!r} of package {info.package!r} cannot be loaded ({info.error})."
                    " Fix or uninstall it, or start with --skip-broken-plugins."
                ) from error
        self.plugins.append(info)

    def _package_of(self, plugin: Any) -> str:
        return (self.manager.get_name(plugin) or "?").split(":")[0]

    def family(self, name: str, hook: str, kind: type[S]) -> Mapping[str, S]:
        """name -> spec of one family; checks type, api_level and duplicate names once."""
        if name not in self._families:
            specs: dict[str, tuple[Spec, str]] = {}
            caller = getattr(self.manager.hook, hook)
            for implementation in caller.get_hookimpls():
                package = self._package_of(implementation.plugin)
                for spec in implementation.function() or []:
                    self._check(spec, kind, name, package)
                    if spec.name in specs:
                        raise PluginError(
                            f"Two plugins register the {name} name {spec.name!r}: packages {specs[spec.name][1]!r} and {package!r}."
                            " Uninstall one of them."
                        )
                    specs[spec.name] = (spec, package)
            self._families[name] = specs
        return {key: cast(S, spec) for key, (spec, _) in self._families[name].items()}

    def _check(self, spec: Any, kind: type[Spec], family: str, package: str) -> None:
        if not isinstance(spec, kind):
            raise PluginError(f"Package {package!r}: the hook for {family} must return {kind.__name__} items, not {type(spec).__name__}.")
        current = API_LEVEL[family]
        if spec.api_level not in (current, current - 1) or spec.api_level < 1:
            raise PluginError(
                f"Package {package!r}: {family} {spec.name!r} has api_level {spec.api_level}, this Penstock speaks {current}"
                + (f" and {current - 1}" if current > 1 else "")
                + ". Install a matching version."
            )

    def devices(self) -> Mapping[str, DeviceSpec]:
        return self.family("devices", "register_devices", DeviceSpec)

    def models(self) -> Mapping[str, ModelSpec]:
        return self.family("models", "register_models", ModelSpec)

    def attention_backends(self) -> Mapping[str, AttentionSpec]:
        return self.family("attention_backends", "register_attention_backends", AttentionSpec)

    def weight_sources(self) -> Mapping[str, WeightSourceSpec]:
        return self.family("weight_sources", "register_weight_sources", WeightSourceSpec)

    def schedule_policies(self) -> Mapping[str, SchedulePolicySpec]:
        return self.family("schedule_policies", "register_schedule_policies", SchedulePolicySpec)

    def tokenizers(self) -> Mapping[str, TokenizerSpec]:
        return self.family("tokenizers", "register_tokenizers", TokenizerSpec)

    def chat_renderers(self) -> Mapping[str, ChatRendererSpec]:
        return self.family("chat_renderers", "register_chat_renderers", ChatRendererSpec)

    def transports(self) -> Mapping[str, TransportSpec]:
        return self.family("transports", "register_transports", TransportSpec)

    def pick(self, family: str, name: str, option: str) -> Spec:
        """The spec called `name`, or ConfigError naming the option and the nearest known name."""
        specs = self._families[family]
        if name not in specs:
            raise ConfigError(
                f"--{option} {name}: no such plugin.{nearest(name, specs)} Known: {', '.join(sorted(specs)) or 'none'}.", param=option
            )
        spec, package = specs[name]
        self.note(family, spec.name, package, f"--{option} {name}")
        return spec

    def note(self, family: str, winner: str, package: str, why: str) -> None:
        self.choices.append(Choice(family=family, winner=winner, package=package, why=why))

    def package_of(self, family: str, name: str) -> str:
        return self._families[family][name][1]

    def choose_device(self, wanted: str) -> DeviceSpec:
        """`--device`: by name, or the available one that a plugin's choose_device hook or the highest priority picks."""
        specs = self.devices()
        if wanted != "auto":
            spec = cast(DeviceSpec, self.pick("devices", wanted, "device"))
            if not spec.available():
                raise ConfigError(
                    f"--device {wanted}: this machine has no such device. Leave --device out to take what is there.", param="device"
                )
            return spec
        able = sorted((s for s in specs.values() if s.available()), key=lambda s: (-s.priority, s.name))
        if not able:
            raise ConfigError("No device plugin finds usable hardware. Install one, or use --device cpu.", param="device")
        names = [s.name for s in able]
        chosen = self.hook.choose_device(candidates=names)
        if chosen is not None and chosen not in names:
            raise PluginError(f"A choose_device hook chose {chosen!r}, which is not one of {names}.")
        winner = specs[chosen or names[0]]
        self.note("devices", winner.name, self.package_of("devices", winner.name), "choose_device hook" if chosen else "highest priority")
        return winner

    def report(self) -> list[list[str]]:
        """Rows: plugin, package, version, process, hooks (or the error)."""
        return [
            [p.name, p.package, p.version, p.role, ", ".join(p.hooks) if p.error is None else f"broken: {p.error}"] for p in self.plugins
        ]


def _package(entry: metadata.EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "?"


def _version(entry: metadata.EntryPoint) -> str:
    return entry.dist.version if entry.dist is not None else "?"
