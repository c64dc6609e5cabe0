"""Finds, checks and holds plugins.

What it is: discovery through entry points (`penstock.root`, `penstock.edge`, `penstock.text`, `penstock.engine`), registration with pluggy,
the api_level check, one name -> spec map per family, and the report behind `penstock plugins`. A plugin that cannot load stops the process,
unless broken plugins are to be skipped (then it is named in the report). Hooks and specs of other packages are called through
core/contract/guard.py, so that their exceptions name them.
What it does not know: what a spec's factory makes, the step loop (which never comes here).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from typing import Any, TypeVar, cast

import msgspec
import pluggy

from penstock.core.contract import hookspecs
from penstock.core.contract.families import FAMILIES, Family, Role
from penstock.core.contract.guard import careful, fault, guarded, namesake_of, wrong_field, wrong_reason, wrong_result
from penstock.core.contract.hookspecs import (
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
from penstock.core.contract.known import BUILT_IN as BUILT_IN
from penstock.core.contract.known import package_of
from penstock.core.protocol.config import nearest
from penstock.core.protocol.errors import ConfigError, PluginError, PluginFault, described, tamed

log = logging.getLogger("penstock.plugins")
S = TypeVar("S", bound=Spec)

SKIP = "start with --skip-broken-plugins"


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
        self._infos: dict[str, PluginInfo] = {}
        self._families: dict[str, dict[str, tuple[Spec, PluginInfo]]] = {}

    @property
    def extra(self) -> tuple[str, ...]:
        """Modules that were loaded besides the entry points."""
        return self._extra

    @property
    def hook(self) -> Any:
        """The pluggy relay: `host.hook.request_finished(summary=...)`."""
        return self.manager.hook

    def load(self) -> PluginHost:
        """Import and register everything once. Raises PluginError naming package and reason."""
        found = sorted(
            metadata.entry_points(group=f"penstock.{self.role}"), key=lambda e: (package_of(e) != BUILT_IN, package_of(e), e.name)
        )
        for entry in found:
            info = PluginInfo(name=entry.name, package=package_of(entry), version=_version(entry), role=self.role, target=entry.value)
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
            if info.package != BUILT_IN and not self.manager.get_hookcallers(plugin):
                log.warning("plugin %s of package %s has no function with @hookimpl: it does nothing", info.name, info.package)
            info.hooks = sorted(caller.name for caller in self.manager.get_hookcallers(plugin) or [])
            self._infos[label] = info
            if info.package != BUILT_IN:
                self._guard_hooks(plugin, info)
        except BaseException as raised:  # whatever a stranger's import does
            error = tamed(raised)
            if self.manager.has_plugin(label):
                self.manager.unregister(name=label)
            info.error = described(error)
            if not self._skip_broken:
                raise PluginError(
                    f"Plugin {info.name!r} of package {info.package!r} cannot be loaded ({info.error}). Fix or uninstall it, or {SKIP}."
                ) from error
            log.warning("plugin %s of package %s is skipped: %s", info.name, info.package, info.error)
        self.plugins.append(info)

    def _guard_hooks(self, plugin: Any, info: PluginInfo) -> None:
        """Its hooks' exceptions name it. A broken hook of the start may be skipped: it then has nothing to register and no wish."""
        what = f"Plugin {info.name!r} of package {info.package!r}"
        for caller in self.manager.get_hookcallers(plugin) or []:
            at_start = caller.name.startswith(("register_", "choose_"))
            remedy = f"Fix or uninstall it, or {SKIP}." if at_start else "Fix or uninstall it."
            for implementation in caller.get_hookimpls():
                if implementation.plugin is plugin and not implementation.wrapper and not implementation.hookwrapper:
                    blame = functools.partial(fault, what, caller.name, remedy=remedy)
                    skip = functools.partial(self._skip, info) if at_start and self._skip_broken else None
                    object.__setattr__(implementation, "function", guarded(implementation.function, blame, skip))

    def _skip(self, info: PluginInfo, wrong: PluginFault | str, instead: Any = None) -> Any:
        text = wrong if isinstance(wrong, str) else wrong.message
        info.error = f"{info.error}; {text}" if info.error else text
        log.warning("plugin %s of package %s is skipped: %s", info.name, info.package, text)
        return instead

    def _reject(self, info: PluginInfo, wrong: str, remedy: str = "Fix or uninstall it") -> None:
        """Stop, or go on without."""
        if not self._skip_broken:
            raise PluginError(f"Plugin {info.name!r} of package {info.package!r}: {wrong}. {remedy}, or {SKIP}.")
        self._skip(info, wrong)

    def check(self) -> PluginHost:
        """Look at every family of this process: what is wrong with one is raised, or in the report."""
        for family in FAMILIES.values():
            if self.role in family.roles:
                self.specs(family)
        return self

    def specs(self, family: Family) -> Mapping[str, Spec]:
        """name -> spec of one family; checks type, fields, api_level and duplicate names once."""
        name, hook, kind = family.name, family.hook, family.spec
        if name not in self._families:
            specs: dict[str, tuple[Spec, PluginInfo]] = {}
            caller = getattr(self.manager.hook, hook)
            for implementation in caller.get_hookimpls():
                info = self._infos[self.manager.get_name(implementation.plugin) or "?"]
                found = implementation.function()
                if found is not None and not isinstance(found, (list, tuple)):
                    self._reject(info, f"{hook}() must return a list of {kind.__name__}, not {_a(found)}")
                    continue
                if found is None and info.error is None and info.package != BUILT_IN:
                    log.warning("plugin %s of package %s: %s() returned None: it registers nothing", info.name, info.package, hook)
                for spec in found or []:
                    if not self._fits(spec, family, info):
                        continue
                    if spec.api_level != family.level and family.adapt is not None:
                        spec = family.adapt(spec)
                    if spec.name in specs:
                        other = specs[spec.name][1].package
                        self._reject(
                            info,
                            f"two plugins register the {name} name {spec.name!r}: packages {other!r} and {info.package!r}",
                            "Uninstall one of them",
                        )
                        continue
                    namesake = namesake_of(spec, {key: one for key, (one, _) in specs.items()})
                    if namesake is not None:
                        self._reject(
                            info,
                            f"the {family.noun} {spec.name!r} takes a name of the {family.noun} {namesake!r} of package {specs[namesake][1].package!r}",
                            "Rename it, or leave out that alias",
                        )
                        continue
                    specs[spec.name] = (self._guard_spec(spec, family, info), info)
            self._families[name] = specs
        return {key: spec for key, (spec, _) in self._families[name].items()}

    def _fits(self, spec: Any, family: Family, info: PluginInfo) -> bool:
        if not isinstance(spec, family.spec):
            self._reject(info, f"{family.hook}() must return a list of {family.spec.__name__}, but {_a(spec)} is in it")
        elif (wrong := wrong_field(spec)) is not None:
            self._reject(info, f"the {family.noun} {spec.name!r} is not well-formed: {wrong}")
        elif spec.api_level not in family.levels():
            levels = " and ".join(map(str, family.levels()))
            self._reject(
                info,
                f"the {family.noun} {spec.name!r} has api_level {spec.api_level}, this Penstock speaks {levels}",
                "Install a matching version",
            )
        else:
            return True
        return False

    def _guard_spec(self, spec: Spec, family: Family, info: PluginInfo) -> Spec:
        """The spec with its functions' exceptions naming it. Built-in ones speak for themselves."""
        if info.package == BUILT_IN:
            return spec
        functions: dict[str, Any] = {}
        for field in spec.__struct_fields__:
            function = getattr(spec, field)
            if callable(function):
                can_skip = field in family.without
                blame = functools.partial(_blame, spec, family, info, field, can_skip)
                skip = functools.partial(self._skip, info, instead=family.without[field]) if can_skip and self._skip_broken else None
                checks: dict[str, Callable[[Any], str | None]] = {
                    "factory": functools.partial(wrong_result, family),
                    "supports": wrong_reason,
                }
                wrong = checks.get(field)
                check = functools.partial(_check, wrong, blame) if wrong is not None else None
                functions[field] = guarded(function, blame, skip, check)
        if family.careful:
            functions["factory"] = careful(functions["factory"], family, functools.partial(_blame, spec, family, info))
        return msgspec.structs.replace(spec, **functions)

    def who(self, family: str, name: str) -> str:
        """ "The tokenizer 'x' (plugin 'y' of package 'z')"."""
        spec, info = self._families[family][name]
        return _who(spec, FAMILIES[family], info)

    def blame(self, family: str, name: str, call: str, error: Exception | str) -> PluginFault:
        """For a fault in what the factory of a spec gave: an exception in `call`, or what is wrong with its answer."""
        spec, info = self._families[family][name]
        return _blame(spec, FAMILIES[family], info, call, False, error)

    def _of(self, name: str, kind: type[S]) -> Mapping[str, S]:
        return cast(Mapping[str, S], self.specs(FAMILIES[name]))

    def devices(self) -> Mapping[str, DeviceSpec]:
        return self._of("devices", DeviceSpec)

    def models(self) -> Mapping[str, ModelSpec]:
        return self._of("models", ModelSpec)

    def attention_backends(self) -> Mapping[str, AttentionSpec]:
        return self._of("attention_backends", AttentionSpec)

    def quantizers(self) -> Mapping[str, QuantizerSpec]:
        return self._of("quantizers", QuantizerSpec)

    def drafters(self) -> Mapping[str, DrafterSpec]:
        return self._of("drafters", DrafterSpec)

    def weight_sources(self) -> Mapping[str, WeightSourceSpec]:
        return self._of("weight_sources", WeightSourceSpec)

    def schedule_policies(self) -> Mapping[str, SchedulePolicySpec]:
        return self._of("schedule_policies", SchedulePolicySpec)

    def tokenizers(self) -> Mapping[str, TokenizerSpec]:
        return self._of("tokenizers", TokenizerSpec)

    def chat_renderers(self) -> Mapping[str, ChatRendererSpec]:
        return self._of("chat_renderers", ChatRendererSpec)

    def grammars(self, wanted: str | None = None) -> GrammarSpec | None:
        """`--grammar-backend`: by name, or that of the highest priority."""
        specs = sorted(self._of("grammars", GrammarSpec).values(), key=lambda spec: (-spec.priority, spec.name))
        if wanted is not None:
            return cast(GrammarSpec, self.pick("grammars", wanted, "grammar-backend"))
        return specs[0] if specs else None

    def output_formats(self) -> Mapping[str, FormatSpec]:
        return self._of("output_formats", FormatSpec)

    def transports(self) -> Mapping[str, TransportSpec]:
        return self._of("transports", TransportSpec)

    def actors(self) -> Mapping[str, ActorSpec]:
        """Those with a seat in this process."""
        return {name: spec for name, spec in self._of("actors", ActorSpec).items() if spec.where == self.role}

    def pick(self, family: str, name: str, option: str) -> Spec:
        """The spec called `name`, or ConfigError naming the option and the nearest known name."""
        specs = self._families[family]
        if name not in specs:
            skipped = [f"plugin {info.name!r} of package {info.package!r} ({info.error})" for info in self.plugins if info.error]
            raise ConfigError(
                f"--{option} {name}: no such plugin.{nearest(name, specs)} Known: {', '.join(sorted(specs)) or 'none'}."
                + (f" Skipped as broken: {'; '.join(skipped)}." if skipped else ""),
                param=option,
            )
        spec, info = specs[name]
        self.note(family, spec.name, info.package, f"--{option} {name}")
        return spec

    def note(self, family: str, winner: str, package: str, why: str) -> None:
        self.choices.append(Choice(family=family, winner=winner, package=package, why=why))

    def package_of(self, family: str, name: str) -> str:
        return self._families[family][name][1].package

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


def _who(spec: Spec, family: Family, info: PluginInfo) -> str:
    return f"The {family.noun} {spec.name!r} (plugin {info.name!r} of package {info.package!r})"


def _blame(spec: Spec, family: Family, info: PluginInfo, call: str, can_skip: bool, error: Exception | str) -> PluginFault:
    what = _who(spec, family, info)
    other = SKIP if can_skip else f"choose another with {family.flag}" if family.flag else ""
    return fault(what, call, error, f"Fix or uninstall it{', or ' if other else ''}{other}.")


def _check(wrong: Callable[[Any], str | None], blame: Any, result: Any) -> None:
    what = wrong(result)
    if what is not None:
        raise blame(what)


def _a(found: Any) -> str:
    return f"{type(found).__name__} ({str(found)[:60]!r})" if isinstance(found, (str, int, float)) else type(found).__name__


def _version(entry: metadata.EntryPoint) -> str:
    return entry.dist.version if entry.dist is not None else "?"
