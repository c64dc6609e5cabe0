"""Checkpoints whose layers do not all have the same bits: each layer means what its own settings say, and what cannot be read so is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from stored_formats import Layer, awq, gptq
from test_readers import CONFIG, CPU, FACTS, LAYERS, answers, blamed, reader, settings

from penstock.core.protocol.errors import CheckpointError, UnsupportedFeature
from penstock.kernels.linear.scheme import dequantise
from penstock.plugins.devices.quantising import quantizer_for
from penstock.plugins.weights.checkpoint import Checkpoint

Make = Callable[[np.random.Generator, int, int], Layer] | None
BASE = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": True}
ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 16, "sym": True, "packing_format": "auto_round:auto_gptq"}


def stored(bits: int, group: int, *, sym: bool = True, act_order: bool = False, v2: bool = False) -> Make:
    return lambda rng, n, k: gptq(rng, n, k, bits=bits, group=group, sym=sym, act_order=act_order, v2=v2)


def of_awq(group: int) -> Make:
    return lambda rng, n, k: awq(rng, n, k, group=group)


PLAIN = stored(4, 16)
CASES: dict[str, tuple[dict[str, Any], Callable[[str], Make]]] = {
    "dynamic": (
        BASE
        | {
            "dynamic": {
                r"-:model\.layers\.0\.mlp\.down": {},  # fits a name's beginning
                r"layers\.0": {"bits": 8},  # fits none: patterns begin where names do
                r"+:.*\.k_proj$": {"bits": 8, "group_size": 8},
                r".*\.1\..*(gate|up)_proj": {"group_size": -1, "sym": False},
                r".*\.1\.mlp": {"bits": 8, "group_size": 8, "desc_act": True},  # the first that fits holds
            }
        },
        lambda name: (
            None
            if name == "model.layers.0.mlp.down_proj"
            else stored(8, 8)
            if name.endswith("k_proj")
            else stored(4, -1, sym=False)
            if name.endswith(("layers.1.mlp.gate_proj", "layers.1.mlp.up_proj"))
            else stored(8, 8, act_order=True)
            if name == "model.layers.1.mlp.down_proj"
            else PLAIN
        ),
    ),
    "extra_config": (
        ROUND
        | {
            "extra_config": {
                r".*layers\.1.*": {"bits": 8, "group_size": 8},
                r"self_attn\.[ko]": {"bits": 8},  # fits anywhere
                "model.layers.1.mlp.up_proj": {"bits": 4, "group_size": 8},  # a name comes before all patterns
                "model.layers.0.mlp.up_proj": {"bits": 16, "data_type": "float"},
            }
        },
        lambda name: (
            None
            if name == "model.layers.0.mlp.up_proj"
            else stored(4, 8)
            if name == "model.layers.1.mlp.up_proj"
            else stored(8, 8)
            if ".1." in name
            else stored(8, 16)
            if name.endswith(("k_proj", "o_proj"))
            else PLAIN
        ),
    ),
    "extra_config, awq": (
        ROUND | {"sym": False, "packing_format": "auto_round:auto_awq", "extra_config": {"down_proj$": {"group_size": 8}}},
        lambda name: of_awq(8 if name.endswith("down_proj") else 16),
    ),
    "gptq_v2": (
        BASE | {"checkpoint_format": "gptq_v2", "sym": False, "dynamic": {".*proj": {"bits": 8}}},
        lambda name: stored(8, 16, sym=False, v2=True),
    ),
}


def folders(folder: Path, config: dict[str, Any], make: Callable[[str], Make]) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """(the quantised model, its twin in float32, the twin's tensors)."""
    rng = np.random.default_rng(11)
    plain = {"model.embed_tokens.weight": (97, 32), "model.norm.weight": (32,), "lm_head.weight": (97, 32)}
    for layer in range(2):
        plain |= {f"model.layers.{layer}.{norm}_layernorm.weight": (32,) for norm in ("input", "post_attention")}
    dense = {name: torch.from_numpy(rng.normal(0, 0.3, shape)).float() for name, shape in plain.items()}
    kept = dict(dense)
    for index in range(2):
        for short, (n, k) in LAYERS.items():
            name = f"model.layers.{index}.{short}"
            of = make(name)
            made = Layer({}, rng.normal(0, 0.1, (n, k))) if of is None else of(rng, n, k)
            dense[f"{name}.weight"] = torch.from_numpy(made.dense).float()
            kept |= {f"{name}{end}": value for end, value in made.tensors.items()} or {f"{name}.weight": dense[f"{name}.weight"]}
    for path, tensors, own in ((folder / "q", kept, {"quantization_config": config}), (folder / "wide", dense, {})):
        path.mkdir()
        (path / "config.json").write_text(json.dumps(CONFIG | own))
        save_file({name: value.contiguous() for name, value in tensors.items()}, path / "model.safetensors")
    return folder / "q", folder / "wide", dense


@pytest.mark.parametrize("name", CASES)
def test_each_layer_means_what_its_own_settings_say(name: str, tmp_path: Path) -> None:
    config, make = CASES[name]
    quantised, wide, dense = folders(tmp_path, config, make)
    quantizer, weights = reader(config), Checkpoint(quantised, torch.float32)
    for index in range(2):
        for short, (n, k) in LAYERS.items():
            layer = f"model.layers.{index}.{short}"
            scheme = quantizer.scheme(weights, layer, n, k)
            assert (scheme is None) == (make(layer) is None), layer
            if scheme is not None:
                assert torch.equal(dequantise(quantizer.read(weights, layer, scheme, n, k, CPU)), dense[f"{layer}.weight"]), layer
    (tokens, logprobs), (expected, others) = answers(quantised), answers(wide)
    assert tokens == expected
    np.testing.assert_allclose(logprobs, others, rtol=2e-3, atol=2e-3)


def test_what_some_layers_have_is_said() -> None:
    assert reader(CASES["dynamic"][0] | {"dynamic": {"a": {"bits": 8}, "b": {"bits": 4}}}).method == (
        "gptq, 4 bits, groups of 16; some layers 8 bits, groups of 16"
    )
    assert reader(BASE | {"dynamic": {"-:a": {}}}).method == "gptq, 4 bits, groups of 16"


@pytest.mark.parametrize("name", ["dynamic", "extra_config"])
def test_invented_weights_have_each_layers_bits(name: str) -> None:
    config, make = CASES[name]
    quantizer = reader(config)
    found = {
        layer: quantizer.scheme(object(), layer, 48, 32) for layer in ("model.layers.0.self_attn.k_proj", "model.layers.0.mlp.gate_proj")
    }
    assert [scheme and scheme.bits for scheme in found.values()] == [8, 4]
    wide = "model.layers.0.mlp." + ("down_proj" if name == "dynamic" else "up_proj")
    assert make(wide) is None
    assert quantizer.scheme(object(), wide, 48, 32) is None


WRONG: list[tuple[dict[str, Any], type[Exception], str, str]] = [
    (BASE | {"dynamic": {".*": {"bits": 3}}}, UnsupportedFeature, "bits", r"dynamic\.\.\*\.bits"),
    (BASE | {"dynamic": {".*": {"group_size": 0}}}, CheckpointError, "group_size", "above 0 or -1"),
    (BASE | {"dynamic": {".*": {"sym": "no"}}}, CheckpointError, "sym", "true or false"),
    (BASE | {"dynamic": {".*": {"checkpoint_format": "gptq_v2"}}}, UnsupportedFeature, "checkpoint_format", "a layer of its own"),
    (BASE | {"dynamic": {"-:(": {}}}, CheckpointError, "-:(", "no regular expression"),
    (BASE | {"dynamic": [".*"]}, CheckpointError, "dynamic", "must be an object"),
    (BASE | {"dynamic": {".*": 8}}, CheckpointError, ".*", "must be an object"),
    (ROUND | {"extra_config": {"a.b": {"bits": 2}}}, UnsupportedFeature, "bits", r"extra_config\.a\.b\.bits"),
    (ROUND | {"extra_config": {"a.b": {"bits": 8, "data_type": "mx_fp"}}}, UnsupportedFeature, "data_type", "only int"),
    (ROUND | {"extra_config": {"*a": {"bits": 8}}}, CheckpointError, "*a", "no regular expression"),
    (CASES["extra_config, awq"][0] | {"extra_config": {"a.b": {"bits": 8}}}, UnsupportedFeature, "bits", "only 4"),
]


@pytest.mark.parametrize(("config", "kind", "param", "says"), WRONG)
def test_what_cannot_be_read_so_is_refused_by_name(config: dict[str, Any], kind: type[Any], param: str, says: str) -> None:
    with pytest.raises(kind, match=says) as error:
        quantizer_for(settings("."), {"quantization_config": config}, FACTS, "cpu", blamed)
    assert error.value.param == param


def test_a_layer_that_should_be_wide_and_is_not_is_named(tmp_path: Path) -> None:
    config, make = CASES["dynamic"]
    quantised, _, _ = folders(tmp_path, config, lambda name: make(name) or PLAIN)
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.down_proj is not quantised, but the files hold its 'qweight'"):
        answers(quantised)
