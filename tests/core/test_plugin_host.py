"""Plugin discovery: broken plugins stop the start, duplicates name both packages, api levels are checked."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

from penstock.core.errors import ConfigError, PluginError
from penstock.core.hookspecs import DeviceSpec, hookimpl
from penstock.core.plugin_host import PluginHost


def device(name: str, *, level: int = 1, priority: int = 0, available: bool = True) -> DeviceSpec:
    def factory() -> Any:
        raise AssertionError("not called")

    return DeviceSpec(name=name, api_level=level, available=lambda: available, factory=factory, priority=priority)


def module(monkeypatch: pytest.MonkeyPatch, name: str, specs: list[Any], choice: str | None = None) -> str:
    mod = types.ModuleType(name)

    @hookimpl
    def register_devices() -> list[Any]:
        return specs

    @hookimpl
    def choose_device(candidates: list[str]) -> str | None:
        return choice

    mod.register_devices = register_devices  # type: ignore[attr-defined]
    mod.choose_device = choose_device  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, mod)
    return name


def host(*extra: str, skip: bool = False) -> PluginHost:
    return PluginHost("engine", extra=extra, skip_broken=skip).load()


def test_built_ins_come_through_entry_points() -> None:
    loaded = PluginHost("engine").load()
    assert {"cpu"} <= set(loaded.devices())
    assert {"fcfs", "priority"} <= set(loaded.schedule_policies())
    assert all(p.package == "penstock" and p.hooks for p in loaded.plugins)


def test_missing_module_stops_the_start_and_names_it() -> None:
    with pytest.raises(PluginError, match="no_such_plugin_module"):
        host("no_such_plugin_module")


def test_broken_plugin_can_be_skipped_and_is_reported() -> None:
    loaded = host("no_such_plugin_module", skip=True)
    assert any("broken: ModuleNotFoundError" in row[4] for row in loaded.report())


def test_unknown_hook_is_a_broken_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    mod = types.ModuleType("typo_plugin")

    @hookimpl
    def register_devicez() -> list[Any]:
        return []

    mod.register_devicez = register_devicez  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "typo_plugin", mod)
    with pytest.raises(PluginError, match="register_devicez"):
        host("typo_plugin")


def test_duplicate_names_name_both_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    a = module(monkeypatch, "pkg_a", [device("x")])
    b = module(monkeypatch, "pkg_b", [device("x")])
    with pytest.raises(PluginError) as caught:
        host(a, b).devices()
    assert "pkg_a" in caught.value.message
    assert "pkg_b" in caught.value.message


@pytest.mark.parametrize("level", [2, 0, 99])
def test_wrong_api_level(monkeypatch: pytest.MonkeyPatch, level: int) -> None:
    name = module(monkeypatch, "pkg_level", [device("x", level=level)])
    with pytest.raises(PluginError, match="api_level"):
        host(name).devices()


def test_wrong_type(monkeypatch: pytest.MonkeyPatch) -> None:
    name = module(monkeypatch, "pkg_type", ["cpu"])
    with pytest.raises(PluginError, match="DeviceSpec"):
        host(name).devices()


def test_choice_by_priority_hook_and_name(monkeypatch: pytest.MonkeyPatch) -> None:
    name = module(monkeypatch, "pkg_fast", [device("fast", priority=9), device("gone", priority=10, available=False)])
    loaded = host(name)
    assert loaded.choose_device("auto").name == "fast"
    assert loaded.choose_device("cpu").name == "cpu"
    with pytest.raises(ConfigError, match="no such device"):
        loaded.choose_device("gone")
    with pytest.raises(ConfigError, match="Did you mean 'fast'"):
        loaded.choose_device("fsat")
    picky = host(module(monkeypatch, "pkg_picky", [device("slow", priority=-5)], choice="slow"))
    assert picky.choose_device("auto").name == "slow"
    wrong = host(module(monkeypatch, "pkg_wrong", [], choice="nonsense"))
    with pytest.raises(PluginError, match="nonsense"):
        wrong.choose_device("auto")


def test_register_commands_adds_to_the_group() -> None:
    import click

    group = click.Group("penstock")
    PluginHost("root").load().hook.register_commands(group=group)
    assert {"bench", "chat"} <= set(group.commands)


@pytest.mark.parametrize(
    ("role", "hook", "names"),
    [
        ("engine", "register_devices", {"cpu"}),
        ("engine", "register_schedule_policies", {"fcfs", "priority"}),
        ("engine", "register_attention_backends", {"native", "torch"}),
        ("edge", "register_transports", {"openai"}),
    ],
)
def test_built_ins_register_by_hooks(role: Any, hook: str, names: set[str]) -> None:
    found = {spec.name for specs in getattr(PluginHost(role).load().hook, hook)() for spec in specs}
    assert names <= found


@pytest.mark.parametrize(
    ("role", "hook"),
    [
        ("engine", "register_models"),
        ("engine", "register_weight_sources"),
        ("text", "register_tokenizers"),
        ("text", "register_chat_renderers"),
    ],
)
def test_built_in_families_are_not_empty(role: Any, hook: str) -> None:
    assert any(getattr(PluginHost(role).load().hook, hook)())
