"""What is wrong with a plugin is said with its name: specs, hooks, factories, policies at start and at run time."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import click
import numpy as np
import pytest
import trio

from penstock.core.contract.fake_device import FakeDevice, FakeOptions
from penstock.core.contract.families import FAMILIES
from penstock.core.contract.hookspecs import (
    AttentionSpec,
    ChatRendererSpec,
    DeviceSpec,
    FormatSpec,
    GrammarSpec,
    ModelSpec,
    SchedulePolicySpec,
    TokenizerSpec,
    TransportSpec,
    hookimpl,
)
from penstock.core.contract.host import PluginHost
from penstock.core.contract.policy import CheckedPolicy, probe
from penstock.core.processes.engine import Engine
from penstock.core.processes.text_side import TextSide, first_match
from penstock.core.protocol.columns import EMPTY_I32, i32
from penstock.core.protocol.config import build
from penstock.core.protocol.errors import CheckpointError, ConfigError, PenstockError, PluginError, PluginFault
from penstock.core.protocol.messages import Admit
from penstock.core.protocol.model_folder import demo_folder
from penstock.core.protocol.sampling import SamplingParams
from penstock.plugins.policies.fcfs import FirstComeFirstServed
from penstock.plugins.policies.priority import PriorityWithAgeing
from penstock.plugins.tokenizers.hugging_face import HuggingFaceTokenizer

Add = Callable[..., str]


@pytest.fixture
def add(monkeypatch: pytest.MonkeyPatch) -> Add:
    """add(hook name, function) makes a plugin module `strange.plugin` and returns its name."""

    def make(hook: str, function: Callable[..., Any], name: str = "strange") -> str:
        module = types.ModuleType(name)
        function.__name__ = hook
        setattr(module, hook, hookimpl(function))
        monkeypatch.setitem(sys.modules, name, module)
        return name

    return make


def engine_host(*extra: str, skip: bool = False) -> PluginHost:
    return PluginHost("engine", extra=extra, skip_broken=skip).load()


def device(**fields: Any) -> DeviceSpec:
    return DeviceSpec(**{"name": "odd", "api_level": 1, "available": lambda: True, "factory": FakeDevice, "priority": 99, **fields})


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "a misspelt field": (lambda: [DeviceSpec(nmae="odd", api_level=1)], "register_devices() failed with TypeError: .*nmae"),  # type: ignore[call-arg]
    "a spec without a list": (device, r"register_devices\(\) must return a list of DeviceSpec, not DeviceSpec"),
    "a text": (lambda: "odd", r"must return a list of DeviceSpec, not str \('odd'\)"),
    "another spec": (
        lambda: [SchedulePolicySpec(name="odd", api_level=1, factory=FirstComeFirstServed)],
        "but SchedulePolicySpec is in it",
    ),
    "a field of the wrong type": (lambda: [device(priority="high")], "'priority' must be a whole number, not 'high'"),
    "a name that is none": (lambda: [device(name=None)], "'name' must be a text, not None"),
    "no name": (lambda: [device(name="")], "'name' is empty"),
    "something uncallable": (lambda: [device(available=True)], "'available' must be a function, not True"),
    "a level as text": (lambda: [device(api_level="1")], "'api_level' must be a whole number, not '1'"),
    "a wrong level": (lambda: [device(api_level=7)], "has api_level 7, this Penstock speaks 1"),
    "a taken name": (lambda: [device(name="cpu")], "packages 'penstock' and 'strange'"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_spec_names_plugin_and_package_and_can_be_skipped(add: Add, wrong: str) -> None:
    make, said = WRONG[wrong]
    name = add("register_devices", make)
    with pytest.raises(PenstockError, match=said.replace("() failed", r"\(\) failed")) as caught:
        engine_host(name).devices()
    assert "lugin 'strange' of package 'strange'" in caught.value.message
    assert "--skip-broken-plugins" in caught.value.message
    loaded = engine_host(name, skip=True)
    assert set(loaded.devices()) == set(engine_host().devices())
    [row] = [row for row in loaded.report() if row[0] == "strange"]
    assert row[4].startswith("broken: ")
    with pytest.raises(ConfigError, match="Skipped as broken: plugin 'strange'"):
        loaded.pick("devices", "odd", "device")


def test_what_is_well_in_a_broken_plugin_stays(add: Add) -> None:
    name = add("register_devices", lambda: [device(name="good"), device(api_level=7)])
    assert "good" in engine_host(name, skip=True).devices()


def test_the_report_looks_at_every_family(add: Add) -> None:
    name = add("register_weight_sources", lambda: [1 / 0])
    loaded = engine_host(name, skip=True).check()
    [row] = [row for row in loaded.report() if row[0] == "strange"]
    assert "register_weight_sources() failed with ZeroDivisionError" in row[4]


def _policy(**fields: Any) -> Callable[[], list[SchedulePolicySpec]]:
    return lambda: [SchedulePolicySpec(**{"name": "odd", "api_level": 1, "factory": FirstComeFirstServed, **fields})]


def test_options_must_exist(add: Add) -> None:
    name = add("register_schedule_policies", _policy(options=["priority_aging_s"]))
    with pytest.raises(PluginError, match=r"'options' names 'priority_aging_s'.*Did you mean 'priority_ageing_s'") as caught:
        engine_host(name).schedule_policies()
    assert "'strange'" in caught.value.message


class Keys:
    """Fine as it is; subclasses are not."""

    name = "odd"

    def order(self, waiting: Any) -> Any:
        return waiting.arrival_ns

    def victims(self, running: Any) -> Any:
        return running.arrival_ns


class Typo(Keys):
    def order(self, waiting: Any) -> Any:
        return waiting.nope


class Scalar(Keys):
    def order(self, waiting: Any) -> Any:
        return waiting.arrival_ns.min()


class ScalarOfOne(Keys):
    def victims(self, running: Any) -> Any:
        return running.blocks.squeeze()


class Listed(Keys):
    def victims(self, running: Any) -> Any:
        return running.arrival_ns.tolist()


class Texts(Keys):
    def order(self, waiting: Any) -> Any:
        return waiting.arrival_ns.astype(str)


class NoVictims:
    name = "odd"

    def order(self, waiting: Any) -> Any:
        return waiting.arrival_ns


def raising() -> Any:
    raise RuntimeError("no licence")


POLICIES: dict[Any, str] = {
    Typo: r"order\(\) failed with AttributeError: 'Waiting' object has no attribute 'nope' \(test_plugin_faults.py, line \d+\)",
    Scalar: r"order\(\) must return a numpy array of 1 keys for 1 rows, not int64",
    ScalarOfOne: r"victims\(\) must return an array of shape \(1,\) for 1 rows, not \(\)",
    Listed: r"victims\(\) must return a numpy array of 1 keys for 1 rows, not list",
    Texts: r"order\(\) must return an array of numbers \(integers or floats\), not of <U21",
    NoVictims: r"factory\(\) returned a NoVictims, which is no scheduling policy: it has no 'victims'",
    raising: r"factory\(\) failed with RuntimeError: no licence \(test_plugin_faults.py, line \d+\)",
    (lambda: None): r"factory\(\) returned NoneType, which is no scheduling policy: it has no 'name' and no 'order' and no 'victims'",
    (lambda needed: needed): r"factory\(\) failed with TypeError: .*missing 1 required positional argument",
}


@pytest.mark.parametrize("factory", POLICIES)
@pytest.mark.parametrize("skip", [False, True])
def test_a_broken_policy_does_not_start(add: Add, factory: Any, skip: bool) -> None:
    name = add("register_schedule_policies", _policy(factory=factory))
    engine = Engine(
        build({"scheduling_policy": "odd"}), output=lambda message: None, device=FakeDevice(), plugins=engine_host(name, skip=skip)
    )
    with pytest.raises(PluginFault, match=POLICIES[factory]) as caught:
        engine._choose()
    assert caught.value.message.startswith("The scheduling policy 'odd' (plugin 'strange' of package 'strange') is broken: ")
    assert caught.value.message.endswith(" Fix or uninstall it, or choose another with --scheduling-policy.")


@pytest.mark.parametrize("policy", [FirstComeFirstServed(), PriorityWithAgeing(), PriorityWithAgeing(0.0), Keys()])
def test_good_policies_pass_the_probe(policy: Any) -> None:
    def blame(method: str, error: Any) -> Exception:
        raise AssertionError((method, error))

    checked = CheckedPolicy(policy, blame)
    assert checked.name == policy.name
    probe(checked)


class LateFault(Keys):
    """Passes every probe and fails when it matters."""

    served = 0

    def order(self, waiting: Any) -> Any:
        LateFault.served += 1
        if LateFault.served > 2:
            raise KeyError("tenant")
        return np.zeros(waiting.arrival_ns.size, np.float32)


def admit(key: int) -> Admit:
    return Admit(
        key=key,
        incarnation=1,
        prompt=i32([1, 2, 3]),
        hashes=b"",
        root_hash=b"",
        choices=i32([0]),
        sampling=SamplingParams(),
        max_tokens=5,
        eos=EMPTY_I32,
        arrival_ns=key,
    )


def test_a_policy_that_fails_at_run_time_is_named_in_the_engines_failure(add: Add) -> None:
    LateFault.served = 0
    name = add("register_schedule_policies", _policy(factory=LateFault))

    async def main() -> None:
        engine = Engine(
            build({"max_num_seqs": 1, "block_size": 4, "scheduling_policy": "odd"}),
            output=lambda message: None,
            device=FakeDevice(FakeOptions(vocab_size=211)),
            plugins=engine_host(name),
        )
        try:
            async with trio.open_nursery() as nursery:
                await engine.start(nursery)
                engine.post(*map(admit, (1, 2, 3, 4)))
                with trio.fail_after(20):
                    await trio.sleep_forever()
        finally:
            engine.close()

    with pytest.raises(BaseExceptionGroup) as caught:
        trio.run(main)
    [error] = caught.value.exceptions
    assert isinstance(error, PluginFault)
    assert "The scheduling policy 'odd' (plugin 'strange' of package 'strange') is broken: order() failed with KeyError" in error.message


def test_a_device_that_raises_is_named(add: Add) -> None:
    def probe_fails() -> bool:
        raise OSError("no driver")

    name = add("register_devices", lambda: [device(available=probe_fails, factory=raising)])
    with pytest.raises(
        PluginFault, match=r"The device 'odd' \(plugin 'strange'.*available\(\) failed with OSError: no driver.*--skip-broken"
    ):
        engine_host(name).choose_device("auto")
    assert engine_host(name, skip=True).choose_device("auto").name != "odd"
    name = add("register_devices", lambda: [device(factory=raising)])
    with pytest.raises(PluginFault, match=r"The device 'odd'.*factory\(\) failed with RuntimeError.*choose another with --device\."):
        engine_host(name).choose_device("odd").factory()
    name = add("register_devices", lambda: [device(factory=dict)])
    with pytest.raises(PluginFault, match=r"factory\(\) returned a dict, which is no device: it has no 'capabilities' and no 'load'"):
        engine_host(name).choose_device("odd").factory()
    name = add("choose_device", lambda candidates: candidates[99])
    with pytest.raises(PluginFault, match=r"Plugin 'strange'.*choose_device\(\) failed with IndexError"):
        engine_host(name).choose_device("auto")
    assert engine_host(name, skip=True).choose_device("auto").name != "odd"


def test_models_and_attention_backends_are_named(add: Add) -> None:
    def facts(config: dict[str, Any]) -> Any:
        return config["hidden"]

    name = add("register_models", lambda: [ModelSpec(name="odd", api_level=1, architectures=["Odd"], facts=facts, factory=raising)])
    with pytest.raises(PluginFault, match=r"The model 'odd' \(plugin 'strange'.*facts\(\) failed with KeyError: 'hidden'"):
        engine_host(name).models()["odd"].facts({})

    def supports(facts: Any, dtype: str) -> str | None:
        raise ValueError(dtype)

    spec = AttentionSpec(name="odd", api_level=1, devices=["cpu"], supports=supports, factory=raising)
    name = add("register_attention_backends", lambda: [spec])
    none: Any = None
    with pytest.raises(PluginFault, match=r"The attention backend 'odd'.*supports\(\) failed with ValueError: bfloat16"):
        engine_host(name).attention_backends()["odd"].supports(none, "bfloat16")
    assert engine_host(name, skip=True).attention_backends()["odd"].supports(none, "bfloat16") is not None


@pytest.mark.parametrize("answer", [True, False, "", 3])
def test_an_answer_of_supports_that_is_no_reason_is_named(answer: Any, add: Add) -> None:
    spec = AttentionSpec(name="odd", api_level=1, devices=["cpu"], supports=lambda facts, dtype: answer, factory=raising)
    name = add("register_attention_backends", lambda: [spec])
    none: Any = None
    said = rf"The attention backend 'odd' \(plugin 'strange'.*supports\(\) returned {answer!r}: it must be None \(it does\), or a text"
    with pytest.raises(PluginFault, match=said):
        engine_host(name).attention_backends()["odd"].supports(none, "bfloat16")
    assert isinstance(engine_host(name, skip=True).attention_backends()["odd"].supports(none, "bfloat16"), str)


def test_tokenizers_are_named(add: Add) -> None:
    def matches(path: str) -> bool:
        raise OSError(path)

    spec = TokenizerSpec(name="odd", api_level=1, matches=matches, factory=lambda path: None)
    name = add("register_tokenizers", lambda: [spec])
    with pytest.raises(PluginFault, match=r"The tokenizer 'odd'.*matches\(\) failed with OSError: /x.*--skip-broken-plugins"):
        first_match(PluginHost("text", extra=[name]).load().tokenizers(), "/x", "tokenizer")
    loaded = PluginHost("text", extra=[name], skip_broken=True).load()
    with pytest.raises(CheckpointError, match="No tokenizer plugin"):
        first_match({"odd": loaded.tokenizers()["odd"]}, "/x", "tokenizer")
    with pytest.raises(PluginFault, match=r"factory\(\) returned NoneType, which is no tokenizer: it has no 'bos_id'"):
        loaded.tokenizers()["odd"].factory("/x")


@pytest.mark.parametrize(
    ("level", "said"), [(1, "must return a list of route handlers, not NoneType"), (2, "returned NoneType, which is no transport")]
)
def test_transports_are_named(add: Add, level: int, said: str) -> None:
    name = add("register_transports", lambda: [TransportSpec(name="odd", api_level=level, factory=lambda gateway: None)])  # type: ignore[arg-type,return-value]
    with pytest.raises(PluginFault, match=rf"The transport 'odd' \(plugin 'strange'.*{said}"):
        PluginHost("edge", extra=[name]).load().transports()["odd"].factory(None)


def test_commands_are_named(add: Add) -> None:
    name = add("register_commands", lambda group: group.nope())
    group = click.Group("penstock")
    with pytest.raises(
        PluginFault, match=r"Plugin 'strange' of package 'strange' is broken: register_commands\(\) failed with AttributeError"
    ):
        PluginHost("root", extra=[name]).load().hook.register_commands(group=group)
    PluginHost("root", extra=[name], skip_broken=True).load().hook.register_commands(group=group)
    assert "bench" in group.commands


def test_hooks_at_request_boundaries_are_named_and_never_skipped_in_silence(add: Add) -> None:
    name = add("engine_ready", lambda engine, epoch: 1 / 0)
    with pytest.raises(PluginFault, match=r"Plugin 'strange'.*engine_ready\(\) failed with ZeroDivisionError"):
        PluginHost("text", extra=[name], skip_broken=True).load().hook.engine_ready(engine=0, epoch=1)


def test_a_plugins_own_words_for_the_user_pass(add: Add) -> None:
    def factory() -> Any:
        raise ConfigError("--priority-ageing-s: odd takes none.", param="priority_ageing_s")

    name = add("register_schedule_policies", _policy(factory=factory))
    with pytest.raises(ConfigError, match="odd takes none"):
        engine_host(name).schedule_policies()["odd"].factory()


def test_members_are_those_of_the_protocols() -> None:
    assert FAMILIES["devices"].members() == ["capabilities", "load"]
    assert FAMILIES["chat_renderers"].members() == ["render"]
    assert {"encode_batch", "eos_ids"} <= set(FAMILIES["tokenizers"].members())
    assert {"step", "logits", "plain"} <= set(FAMILIES["models"].members())
    assert {"store", "attend", "copy"} <= set(FAMILIES["attention_backends"].members())
    assert FAMILIES["weight_sources"].members() == []


@pytest.mark.parametrize(
    ("factory", "said"), [(lambda tokens, special: 1 / 0, "failed with ZeroDivisionError"), (lambda tokens, special: None, "NoneType")]
)
def test_a_grammar_backend_whose_factory_is_broken_is_known_at_start(add: Add, factory: Any, said: str) -> None:
    name = add("register_grammars", lambda: [GrammarSpec(name="odd", api_level=1, kinds=["choice"], factory=factory, priority=99)])
    plugins = PluginHost("text", extra=[name]).load()
    config = build({"model": str(demo_folder())})
    with pytest.raises(PluginFault, match=f"The grammar backend 'odd' .*'strange'.*factory.*{said}"):
        TextSide(config, plugins, to_edges=lambda *_: None, to_engines=lambda *_: None, to_root=None)


def _format(**fields: Any) -> Callable[[], list[FormatSpec]]:
    values = {"name": "odd", "api_level": 1, "role": "tools", "matches": lambda template: False, "factory": lambda opening: None}
    return lambda: [FormatSpec(**{**values, **fields})]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"role": "thoughts"}, "its field 'role' must be 'tools' or 'reasoning' or 'both', not 'thoughts'"),
        ({"aliases": ["hermes"]}, "takes a name of the output format 'hermes' of package 'penstock'"),
        ({"aliases": ["deepseekv3"]}, "takes a name of the output format 'deepseek_v3' of package 'penstock'"),
    ],
)
def test_a_format_that_could_not_be_chosen_or_takes_anothers_name(add: Add, fields: dict[str, Any], said: str) -> None:
    name = add("register_output_formats", _format(**fields))
    with pytest.raises(PluginError, match=said):
        PluginHost("text", extra=[name]).load().output_formats()
    role = {"role": "reasoning", "aliases": ["hermes"]}  # names of calls alone are free for reasoning
    assert "odd" in PluginHost("text", extra=[add("register_output_formats", _format(**role), "other")]).load().output_formats()


@pytest.mark.parametrize("what", ["none", "plain"])
def test_a_plugin_that_does_nothing_is_said(add: Add, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str) -> None:
    if what == "plain":
        module = types.ModuleType("plain")
        module.register_devices = list  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "plain", module)
        name, said = "plain", "plugin plain of package plain has no function with @hookimpl"
    else:
        name, said = add("register_devices", lambda: None), "register_devices() returned None: it registers nothing"
    with caplog.at_level("WARNING"):
        engine_host(name).devices()
    assert said in caplog.text


class NotNumbers(Keys):
    def order(self, waiting: Any) -> Any:
        return np.full(waiting.arrival_ns.shape, np.nan)


class Writes(Keys):
    def order(self, waiting: Any) -> Any:
        keys = waiting.arrival_ns
        keys += 1
        return keys


@pytest.mark.parametrize(("factory", "said"), [(NotNumbers, "NaN"), (Writes, "read-only")])
def test_a_policy_whose_keys_are_no_numbers_or_that_writes_is_known_at_start(factory: Any, said: str) -> None:
    def blame(call: str, error: Exception | str) -> Exception:
        return PluginFault(f"{call}() {error}")

    with pytest.raises(PluginFault, match=rf"order\(\).*{said}"):
        probe(CheckedPolicy(factory(), blame))


def _side(name: str) -> None:
    TextSide(
        build({"model": str(demo_folder())}),
        PluginHost("text", extra=[name]).load(),
        to_edges=lambda *_: None,
        to_engines=lambda *_: None,
        to_root=None,
    )


def test_templates_that_are_none_name_the_renderer(add: Add) -> None:
    class Odd:
        templates = 3

        def render(self, *arguments: Any, **more: Any) -> str:
            return ""

    spec = ChatRendererSpec(name="odd", api_level=1, matches=lambda folder: True, factory=lambda folder, template: Odd())
    with pytest.raises(PluginFault, match=r"The chat renderer 'odd' \(plugin 'strange'.*'templates' are 3"):
        _side(add("register_chat_renderers", lambda: [spec]))


def test_an_attribute_that_is_none_names_the_tokenizer(add: Add) -> None:
    class Odd(HuggingFaceTokenizer):
        vocab_size = None  # type: ignore[assignment]

        def __init__(self) -> None: ...

        bos_id = None
        name = "odd"
        eos_ids: list[int] = []  # noqa: RUF012
        special_ids = frozenset()
        max_chars_per_token = 0

    spec = TokenizerSpec(name="odd", api_level=1, matches=lambda folder: True, factory=lambda folder: Odd())
    with pytest.raises(PluginFault, match=r"The tokenizer 'odd' \(plugin 'strange' of package 'strange'\) is broken: its 'vocab_size'"):
        _side(add("register_tokenizers", lambda: [spec]))
