"""The benches of quantised weights run to their end on something small, and what they write means what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from penstock.core.protocol.model_folder import demo_folder
from penstock.kernels.linear.scheme import dequantise
from penstock.plugins.commands.bench import cpu_peers, quality, widened
from penstock.plugins.commands.quant import writing
from penstock.plugins.quantizers.compressed import CompressedTensors
from penstock.plugins.weights.checkpoint import Checkpoint


def test_forms_of_a_random_model_come_in_the_order_that_they_should(tmp_path: Path) -> None:
    forms = ["w8a16/rtn", "w4a16/rtn", "w4a16/awq", "w4a16/rtn/w8a16"]
    found = quality.main([str(tmp_path), *forms, "--shape", "tiny", "--texts", "4", "--calibration", "4", "--seed", "3"])
    kl = {form: one["kl_mean"] for form, one in found["forms"].items()}
    assert kl["w8a16/rtn"] < 0.05 * kl["w4a16/rtn"]
    assert found["forms"]["w4a16/awq"]["kl_less_rtn"][1] < 0
    assert kl["w4a16/rtn/w8a16"] != kl["w4a16/rtn"]
    assert json.loads((tmp_path / "quality.json").read_text())["forms"].keys() == set(forms)
    assert [file.name for file in tmp_path.iterdir()] == ["quality.json"]


def test_a_widened_checkpoint_has_the_values_of_the_quantised_one(tmp_path: Path) -> None:
    out, wide = tmp_path / "q", tmp_path / "wide"
    plan = writing.plan(writing.open_source(demo_folder()), "w4a16")
    partial = writing.start(plan, out, {})
    writing.write(plan, partial, writing.nearest(plan))
    writing.finish(plan, partial, out)
    assert widened.widened(out, wide) == len(plan.schemes)
    assert "quantization_config" not in json.loads((wide / "config.json").read_text())
    stored, source = load_file(wide / "model.safetensors"), load_file(demo_folder() / "model.safetensors")
    assert {name: value.shape for name, value in stored.items()} == {name: value.shape for name, value in source.items()}
    reader, weights = CompressedTensors(plan.configuration()), Checkpoint(out, torch.float32)
    for layer in ("model.layers.0.self_attn.q_proj", "model.layers.7.mlp.down_proj"):
        shape = plan.source.shapes[f"{layer}.weight"]
        scheme = reader.scheme(weights, layer, *shape)
        assert scheme is not None
        assert torch.equal(stored[f"{layer}.weight"], dequantise(reader.read(weights, layer, scheme, *shape, torch.device("cpu"))))
    assert torch.equal(stored["model.norm.weight"], source["model.norm.weight"].float())


def test_workers_decode_in_turns(capsys: pytest.CaptureFixture[str]) -> None:
    found = cpu_peers.main([str(demo_folder()), "--forms", "int4+int8", "no form", "--rounds", "1", "--tokens", "8", "--prompt", "8"])
    assert found["penstock int4+int8"] > 0
    assert "penstock no form         does not work" in capsys.readouterr().out
