"""Plugins of the level before: frozen ones go on working, by the family's `adapt`; others are refused with what to do."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
import torch
import trio
from safetensors.torch import save_file

from penstock.core.contract import families
from penstock.core.contract.devices import RunnerConfig
from penstock.core.contract.fake_device import FakeDevice
from penstock.core.contract.families import FAMILIES
from penstock.core.contract.hookspecs import API_LEVEL, AttentionSpec, SchedulePolicySpec, TransportSpec
from penstock.core.contract.host import PluginHost
from penstock.core.processes.engine import Engine
from penstock.core.protocol.config import build
from penstock.core.protocol.errors import PluginError, UnsupportedFeature
from penstock.core.protocol.messages import Extension, Message
from penstock.core.protocol.sampling import SamplingParams
from penstock.core.runtime.device_queue import InlineDeviceQueue
from penstock.plugins.devices.cpu import CpuDevice
from penstock.plugins.devices.driver import Driver, Job, Options
from penstock.plugins.policies.fcfs import FirstComeFirstServed
from penstock.transports.edge import transport_factories

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
    edge.factories = list(transport_factories(host("edge", "frozen_transport"), build({"transports": ["frozen"]})))
    edge.start()
    try:
        assert httpx.get(f"http://127.0.0.1:{edge.port}/frozen").json() == {"active": 0}
    finally:
        edge.stop()


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """checkpoint(**config changes) -> a tiny random Llama."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1]))
    from devices_gpu.conftest import CONFIG, tensors

    def make(**changes: Any) -> Path:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
        save_file(tensors(CONFIG, torch.float32), folder / "model.safetensors")
        return folder

    return make


def answers(folder: Path, plugins: Any, **over: Any) -> list[tuple[list[int], list[bytes]]]:
    settings: dict[str, Any] = {
        "model_path": str(folder), "dtype": "auto", "max_model_len": None, "block_size": 16, "max_num_seqs": 4, "max_num_batched_tokens": 32,
        "kv_cache_memory_bytes": 1 << 20, "num_gpu_blocks_override": None, "gpu_memory_utilization": 0.9, "load_format": "auto",
        "deterministic": False, "enforce_eager": False, "attention_backend": None, "seed": 0, "threads": 1, "max_logprobs": 20,
    }  # fmt: skip
    runner = CpuDevice().load(RunnerConfig(**{**settings, **over}, plugins=plugins), lambda phase, fraction: None)
    asks = SamplingParams(temperature=0.0, logprobs=3, prompt_logprobs=2)
    jobs = [Job(prompt=np.arange(3, 3 + length, dtype=np.int32), params=asks, max_tokens=5) for length in (1, 20, 37)]
    Driver(runner, Options(chunk=lambda rng: rng.randint(1, 20), scatter=True, share=True, seed=2)).run(jobs)
    return [(job.tokens, [*job.logprobs, repr(sorted(job.prompt_logprobs.items())).encode()]) for job in jobs]


def test_a_frozen_attention_backend_serves(checkpoint: Any) -> None:
    loaded = host("engine", "frozen_attention")
    truth = answers(checkpoint(), None, attention_backend="torch")
    found = answers(checkpoint(), loaded, attention_backend="frozen-plain")
    for (tokens, logprobs), (mine, others) in zip(truth, found, strict=True):
        assert tokens == mine
        for a, b in zip(logprobs[:-1], others[:-1], strict=True):
            assert np.allclose(np.frombuffer(a, np.float32), np.frombuffer(b, np.float32), atol=1e-4)


def test_a_table_for_cuda_of_the_level_before_is_refused() -> None:
    adapt = FAMILIES["attention_backends"].adapt
    assert adapt is not None
    with pytest.raises(PluginError, match="level 2"):
        adapt(old_attention(["cuda"]))
    both = adapt(old_attention(["cuda", "cpu"]))
    assert isinstance(both, AttentionSpec)
    assert both.devices == ["cpu"]


def old_attention(devices: list[str]) -> AttentionSpec:
    return AttentionSpec(name="old", api_level=1, devices=devices, supports=lambda facts, dtype: None, factory=lambda **options: None)


def test_a_frozen_model_serves_bit_for_bit(checkpoint: Any) -> None:
    loaded = host("engine", "frozen_model")
    truth = answers(checkpoint(), None)
    assert answers(checkpoint(architectures=["FrozenForCausalLM"], model_type="frozen"), loaded) == truth
    [spec] = [spec for spec in loaded.models().values() if spec.name == "frozen-model"]
    with pytest.raises(UnsupportedFeature, match="CPU alone"):
        spec.factory(facts=None, builder=SimpleNamespace(device=torch.device("meta")), attention=None, max_len=1)
