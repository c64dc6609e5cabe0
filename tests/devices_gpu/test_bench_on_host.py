"""The device benchmark's own machinery, on host memory: it must not fail for the first time on a machine that is lent for minutes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.plugins.commands.bench import cuda_bench, cuda_quantised_load, cuda_speculation
from penstock.plugins.devices import cuda
from penstock.plugins.devices.lane import HostLane

TINY = {**cuda_bench.LLAMA_8B, "vocab_size": 4096, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 16}
TINY |= {"num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(autouse=True)
def _on_host(monkeypatch: pytest.MonkeyPatch, reference: dict[str, Any]) -> None:
    def load(self: Any, config: Any, progress: Callable[[str, float], None]) -> Any:
        return cuda.load(config, progress, HostLane(), {"bfloat16": torch.float32}, depth=2, **reference)

    monkeypatch.setattr(cuda.CudaDevice, "load", load)


def test_decoding_two_in_flight(tmp_path: Path) -> None:
    path = cuda_bench.folder_of(TINY, tmp_path, "tiny")
    runner, seconds, said = cuda_bench.load(path, load_format="dummy", max_num_seqs=4, kv_cache_memory_bytes=8 << 20, max_model_len=900)
    assert seconds > 0
    assert any("captured graphs" in phase for phase in said)
    cuda_bench.fill(runner, 3, 40)
    found = cuda_bench.decode(runner, 3, 40, 12)
    assert (found["replays"], found["steps"]) == (12, 12)
    assert 0 <= found["device_idle"] <= 1
    assert cuda_bench.weight_bytes(runner) < runner.memory.weights


def test_serving_all_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = cuda_bench.folder_of(TINY, tmp_path, "tiny")
    from penstock.core.contract.host import PluginHost

    monkeypatch.setattr(PluginHost, "choose_device", lambda self, wanted: type("Spec", (), {"factory": cuda.CudaDevice}))
    found = cuda_bench._serve(path, requests=6, max_num_seqs=4, input_len=9, output_len=5)
    assert found["all_answered"]
    assert found["output_tokens"] == 30
    assert found["ring_waits"] == 0


def test_loads_of_quantised_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(cuda_quantised_load, "_serve", lambda path, **over: asked.append(over) or {"output_tokens_s": 1.0})
    monkeypatch.setattr(cuda.torch.cuda, "get_device_name", lambda: "a card")
    for name in ("full:fp8:int8", "burst:none", "small:fp8"):
        cuda_quantised_load.run(name, tmp_path)
    found = json.loads((tmp_path / "load.json").read_text())
    assert (asked[0]["quantization"], asked[0]["kv_cache_dtype"], asked[0]["output_len"]) == ("fp8", "int8", 1000)
    assert "quantization" not in asked[1]
    assert found["full:fp8:int8"] == {"output_tokens_s": 1.0}
    assert found["small:fp8"]["error"].startswith("KeyError")


def test_sections_report_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "engine.json").write_text("{}")
    monkeypatch.setattr(cuda_bench.os, "_exit", lambda code: None)
    monkeypatch.setattr(cuda_bench, "ceilings", lambda root, known: 1 / 0)
    cuda_bench.run_section("ceilings", tmp_path, tmp_path)
    assert "ZeroDivisionError" in json.loads((tmp_path / "ceilings.json").read_text())["error"]


def test_every_section_exists_and_results_are_merged(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert all(callable(getattr(cuda_bench, name)) for name in cuda_bench.LIMITS_S)
    assert set(cuda_bench.TOGETHER) <= set(cuda_bench.LIMITS_S)
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU: the section would run")
    cuda_bench.main([str(tmp_path), "ceilings"])
    found = json.loads((tmp_path / "engine.json").read_text())["ceilings"]
    assert "error" in found
    assert "FAILED" in capfd.readouterr().out


def test_drafts_that_lie_as_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_speculation, "WIDTHS", (3,))
    monkeypatch.setattr(cuda_speculation, "CONTEXT", 40)
    monkeypatch.setattr(cuda_speculation, "STEPS", 6)
    path = cuda_bench.folder_of(TINY, tmp_path, "tiny")
    monkeypatch.setattr(cuda_bench, "settings", _small(cuda_bench.settings))
    found: dict[str, Any] = {}
    cuda_speculation.measure(path, [2], found)
    assert found["rows_2"]["K3_lies0.0"]["tokens_a_row_and_step"] == 4
    assert 1 < found["rows_2"]["K3_lies0.5"]["tokens_a_row_and_step"] < 3
    cuda_speculation.draft_model(path, path, [2], found)
    assert found["draft_1b_rows_2"]["K4"]["tokens_a_row_and_step"] > 3


def _small(settings: Callable[..., Any]) -> Callable[..., Any]:
    return lambda path, **over: settings(path, **{**over, "max_num_seqs": 2, "kv_cache_memory_bytes": 16 << 20, "max_model_len": 900})
