"""Plugin discovery: broken plugins stop the start, duplicates name both packages, api levels are checked."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from penstock.core.contract.hookspecs import DeviceSpec, hookimpl
from penstock.core.contract.host import PluginHost
from penstock.core.contract.known import BUILT_IN_NAMES, BUILT_IN_WORDS, check_names
from penstock.core.processes import kernel
from penstock.core.processes.engine import DTYPES as ALIASES
from penstock.core.protocol.config import OPTIONS, build
from penstock.core.protocol.errors import ConfigError, PluginError


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


def test_the_names_that_root_knows_are_those_that_come_with_penstock() -> None:
    engine, edge = PluginHost("engine").load(), PluginHost("edge").load()
    engine.grammars()
    families = {
        "device": {"auto", *engine.devices()},
        "attention_backend": set(engine.attention_backends()),
        "grammar_backend": {*engine._families["grammars"], "xgrammar"},  # which may not be installed
        "scheduling_policy": set(engine.schedule_policies()),
        "transports": set(edge.transports()),
    }
    assert {option: set(names) for option, (_, names) in BUILT_IN_NAMES.items()} == families
    words = {option: set(names) for option, (_, names) in BUILT_IN_WORDS.items()}
    assert words["load_format"] == {word for spec in engine.weight_sources().values() for word in spec.load_formats}
    devices = [engine.devices()[name].factory().capabilities for name in ("cpu", "cuda")]
    assert words["dtype"] == {"auto", *ALIASES, *(dtype for device in devices for dtype in device.dtypes)}
    assert len(words) == 2


def test_no_option_that_plugins_bring_words_for_has_a_fixed_list() -> None:
    assert {name for name, option in OPTIONS.items() if option.choices} == {
        *("kv_cache_dtype", "quality_gate", "queue_full_status", "metrics_compat", "log_level", "log_format", "uvicorn_log_level", "wiring")
    }


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device": "gpu"}, "Known: auto, cpu, cuda."),
        ({"attention_backend": "tritn"}, "--attention-backend tritn: no such plugin. Did you mean 'triton'? Known: native, torch, triton."),
        ({"grammar_backend": "outlines"}, "--grammar-backend outlines: no such plugin. Known: llguidance, xgrammar."),
        ({"scheduling_policy": "lifo"}, "--scheduling-policy lifo: no such plugin."),
        ({"transports": ["openai", "quic"]}, "--transports quic: no such plugin."),
        (
            {"load_format": "safetensor"},
            "--load-format safetensor: not known, and no plugin is installed that could bring it. Did you mean 'saf",
        ),
        ({"dtype": "int3"}, "--dtype int3: not known, and no plugin is installed that could bring it. Known: auto, bfloat16,"),
    ],
)
def test_unknown_names_are_refused_before_any_process_starts(
    options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("a process was started")

    monkeypatch.setattr(kernel, "spawn", never)
    assert kernel.serve(build({"port": 0, **options})) == 1
    assert said in capsys.readouterr().err


def test_a_backend_that_comes_with_an_extra_says_so_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_names(build({}))
    with pytest.raises(ConfigError, match=r"--grammar-backend xgrammar: .* pip install 'penstock\[xgrammar\]'"):
        check_names(build({"grammar_backend": "xgrammar"}))
    with pytest.raises(ConfigError, match=r"--grpc-port 5: grpclib is not installed. It comes with pip install 'penstock\[grpc\]'"):
        check_names(build({"grpc_port": 5}))


def test_names_of_other_packages_are_left_to_the_process_that_loads_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = build({"device": "tpu", "scheduling_policy": "priority", "load_format": "npz", "dtype": "float8"})
    check_names(config, extra=["some.module"])
    with pytest.raises(ConfigError, match="tpu"):
        check_names(config)
    info = tmp_path / "tpu_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tpu-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[penstock.engine]\ntpu = tpu_plugin\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    check_names(config)
    assert "tpu_plugin" not in sys.modules
    with pytest.raises(ConfigError, match="quic"):
        check_names(build({"transports": ["quic"]}))


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


@pytest.mark.parametrize("arguments", [["plugins", "--json"], ["--help"]])
def test_a_broken_root_plugin_is_listed_and_hides_nothing(tmp_path: Path, arguments: list[str]) -> None:
    info = tmp_path / "brk-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: brk\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[penstock.root]\nbrk = brk_gone\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-m", "penstock", *arguments], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout if arguments[0] == "plugins" else done.stderr
    assert "brk" in said
    assert "No module named 'brk_gone'" in said
