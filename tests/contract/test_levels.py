"""Plugins of the level before: frozen ones go on working, by the family's `adapt`; others are refused with what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
import trio

from penstock.core.contract import families
from penstock.core.contract.fake_device import FakeDevice
from penstock.core.contract.families import FAMILIES
from penstock.core.contract.hookspecs import API_LEVEL, SchedulePolicySpec, TransportSpec
from penstock.core.contract.host import PluginHost
from penstock.core.processes.engine import Engine
from penstock.core.protocol.config import build
from penstock.core.protocol.errors import PluginError
from penstock.core.protocol.messages import Extension, Message
from penstock.core.runtime.device_queue import InlineDeviceQueue
from penstock.plugins.policies.fcfs import FirstComeFirstServed

FROZEN = Path(__file__).parent / "frozen"


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in FROZEN.iterdir():
        monkeypatch.syspath_prepend(str(folder))


def bump(monkeypatch: pytest.MonkeyPatch, name: str, level: int, adapt: Any) -> None:
    monkeypatch.setitem(API_LEVEL, name, level)
    monkeypatch.setitem(families.FAMILIES, name, FAMILIES[name]._replace(adapt=adapt))


def host(role: Any, module: str) -> PluginHost:
    return PluginHost(role, extra=[module], skip_broken=False).load()


def strangers(loaded: PluginHost, name: str) -> dict[str, Any]:
    """The specs that are not built in: those have today's level, whatever that is in this test."""
    family = loaded.specs(FAMILIES[name])
    return {key: spec for key, spec in family.items() if key.startswith("frozen")}


def test_every_family_that_left_its_first_level_can_adapt() -> None:
    for family in FAMILIES.values():
        assert family.level == 1 or family.adapt is not None, f"{family.name}: a level was raised and plugins of the one before left behind"
        assert family.levels()[0] == API_LEVEL[family.name]


def test_frozen_plugins_load_today() -> None:
    [policy] = strangers(host("engine", "frozen_policy"), "schedule_policies").values()
    assert isinstance(policy, SchedulePolicySpec)
    [transport] = strangers(host("edge", "frozen_transport"), "transports").values()
    assert isinstance(transport, TransportSpec)


def test_a_frozen_actor_answers() -> None:
    said: list[Message] = []

    async def main() -> None:
        plugins = host("engine", "frozen_actor")
        device = FakeDevice()
        engine = Engine(
            build({}), output=said.append, device=device, policy=FirstComeFirstServed(), plugins=plugins, queue=InlineDeviceQueue
        )
        async with trio.open_nursery() as nursery:
            await engine.start(nursery)
            engine.post(Extension(kind="frozen.ask", data=b"1234567"))
            nursery.cancel_scope.cancel()
        engine.close()

    trio.run(main)
    assert said == [Extension(kind="frozen.answer", data=b"7")]


def test_a_plugin_of_the_level_before_is_adapted(monkeypatch: pytest.MonkeyPatch) -> None:
    def adapt(spec: SchedulePolicySpec) -> SchedulePolicySpec:
        return msgspec.structs.replace(spec, api_level=2, doc=f"adapted from {spec.api_level}")

    bump(monkeypatch, "schedule_policies", 2, adapt)
    [spec] = strangers(host("engine", "frozen_policy"), "schedule_policies").values()
    assert (spec.api_level, spec.doc) == (2, "adapted from 1")
    waiting = type("Waiting", (), {"prompt_tokens": np.array([3, 9], np.int32)})
    assert spec.factory().order(waiting).tolist() == [-3, -9]


@pytest.mark.parametrize(("level", "adapt"), [(2, None), (3, lambda spec: spec)])
def test_what_cannot_be_adapted_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, level: int, adapt: Any) -> None:
    bump(monkeypatch, "transports", level, adapt)
    with pytest.raises(PluginError, match=r"has api_level 1, this Penstock speaks"):
        host("edge", "frozen_transport").specs(FAMILIES["transports"])


def test_a_frozen_transport_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "transports"))
    from edge_kit import Edge

    edge = Edge(tmp_path, {})
    [spec] = strangers(host("edge", "frozen_transport"), "transports").values()
    edge.factories = [spec.factory]
    edge.start()
    try:
        assert httpx.get(f"http://127.0.0.1:{edge.port}/frozen").json() == {"active": 0}
    finally:
        edge.stop()
