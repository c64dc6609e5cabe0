"""Layers that torchao itself quantised (make_torchao.py) are read as it dequantises them; what it writes and is not read is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from penstock.core.protocol.errors import CheckpointError, PenstockError, UnsupportedFeature
from penstock.kernels.linear.scheme import Scheme, dequantise
from penstock.plugins.quantizers.torchao import TorchAo
from penstock.plugins.weights.checkpoint import Checkpoint

FILE = Path(__file__).with_name("torchao_layers.safetensors")
N, K, GROUP = 8, 64, 32
READER = {"quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}
SCHEMES = {
    "int8": Scheme("int8"),
    "int8_dynamic": Scheme("int8", activations="token"),
    "int8_whole": Scheme("int8", rows=0),
    "float8": Scheme("fp8_e4m3"),
    "float8_whole": Scheme("fp8_e4m3", rows=0),
    "float8_dynamic": Scheme("fp8_e4m3", activations="token"),
    "intx4": Scheme("int4", GROUP),
    "intx4_zeros": Scheme("int4", GROUP, zeros=True),
    "intx8_zeros": Scheme("int8", GROUP, zeros=True),
    "intx6": Scheme("int8", GROUP),
    "int8_dynamic_intx4": Scheme("int4", GROUP),
    "int4": Scheme("int4", GROUP),
}


def notes() -> dict[str, str]:
    with safe_open(str(FILE), framework="pt") as handle:
        found: dict[str, str] = handle.metadata()
    return found


def checkpoint(folder: Path, layer: str, said: dict[str, Any] | None = None, **tensors: torch.Tensor) -> Checkpoint:
    """The layer alone, with other tensors or a changed header."""
    own = {name: value for name, value in load_file(FILE).items() if name.startswith(f"{layer}.")}
    header = json.loads(notes()[f"{layer}.weight"])
    header["_data"] |= said or {}
    (folder / "config.json").write_text("{}")
    own |= {f"{layer}._weight_{name}": value for name, value in tensors.items()}
    save_file(own, folder / "model.safetensors", {f"{layer}.weight": json.dumps(header)})
    return Checkpoint(folder, torch.float32)


def read(weights: Checkpoint, layer: str) -> torch.Tensor:
    quantizer = TorchAo(READER)
    scheme = quantizer.scheme(weights, layer, N, K)
    assert scheme is not None
    return dequantise(quantizer.read(weights, layer, scheme, N, K, torch.device("cpu")))


@pytest.mark.parametrize("layer", SCHEMES)
def test_layers_mean_what_the_library_says(layer: str, tmp_path: Path) -> None:
    weights = checkpoint(tmp_path, layer)
    assert TorchAo(READER).scheme(weights, layer, N, K) == SCHEMES[layer]
    meant = load_file(FILE)[f"meant.{layer}"]
    rounded = 2**-8 if layer not in ("int4",) else 0.0  # its dequantize() gives bfloat16
    torch.testing.assert_close(read(weights, layer), meant, rtol=rounded, atol=0)
    weights.finish()  # nothing of it was left


def test_zero_points_that_are_no_whole_numbers_are_kept_in_full_width(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights, quantizer = checkpoint(tmp_path, "int4_zeros"), TorchAo(READER)
    assert quantizer.scheme(weights, "int4_zeros", N, K) is None
    found = quantizer.wide(weights, "int4_zeros", N, K)
    assert found is not None
    torch.testing.assert_close(found, load_file(FILE)["meant.int4_zeros"], rtol=1e-6, atol=1e-6)
    assert "full width" in caplog.text
    weights.finish()


def test_a_layer_that_torchao_left_alone_stays_as_it_is(tmp_path: Path) -> None:
    weights = checkpoint(tmp_path, "int8")
    assert TorchAo(READER).scheme(weights, "other", N, K) is None
    assert TorchAo(READER).wide(weights, "other", N, K) is None


WRONG: dict[str, tuple[str, dict[str, Any], dict[str, torch.Tensor], type[PenstockError], str]] = {
    "rows": ("int8", {}, {"qdata": torch.zeros(N - 1, K, dtype=torch.int8)}, CheckpointError, "_weight_qdata"),
    "dtype": ("int8", {}, {"qdata": torch.zeros(N, K, dtype=torch.int16)}, CheckpointError, "_weight_qdata"),
    "scales": ("int8", {}, {"scale": torch.ones(N - 1, 1)}, CheckpointError, "_weight_scale"),
    "NaN": ("float8", {}, {"scale": torch.full((N, 1), float("nan"))}, CheckpointError, "_weight_scale"),
    "zeros": ("intx4_zeros", {}, {"zero_point": torch.ones(N, dtype=torch.int8)}, CheckpointError, "_weight_zero_point"),
    "half zeros": ("intx4_zeros", {}, {"zero_point": torch.full((N, 2), 0.5)}, UnsupportedFeature, "_weight_zero_point"),
    "codes": ("intx4", {}, {"qdata": torch.full((N, K), 9, dtype=torch.int8)}, CheckpointError, "_weight_qdata"),
    "block": ("int8", {"block_size": [0, 64]}, {}, CheckpointError, "block_size"),
    "bits": ("intx4", {"target_dtype": {"_type": "torch.dtype", "_data": "uint4"}}, {}, CheckpointError, "target_dtype"),
    "factors": ("int8", {}, {"act_pre_scale": torch.ones(K)}, UnsupportedFeature, "act_pre_scale"),
    "no FP8": ("float8", {}, {"qdata": torch.zeros(N, K, dtype=torch.int8)}, CheckpointError, "_weight_qdata"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_refused_by_name(name: str, tmp_path: Path) -> None:
    layer, said, tensors, kind, says = WRONG[name]
    with pytest.raises(kind, match=says):
        read(checkpoint(tmp_path, layer, said, **tensors), layer)


def test_other_classes_and_missing_headers_are_refused(tmp_path: Path) -> None:
    tensors = {"int8._weight_qdata": torch.zeros(N, K, dtype=torch.int8)}
    (tmp_path / "config.json").write_text("{}")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"int8\._weight_qdata.*header"):
        TorchAo(READER).scheme(Checkpoint(tmp_path, torch.float32), "int8", N, K)
    for said, kind, says in (
        ('{"_type": "Int4TilePackedTo4dTensor", "_data": {}}', UnsupportedFeature, "Int4TilePackedTo4dTensor"),
        ("{", CheckpointError, "no JSON"),
    ):
        save_file(tensors, tmp_path / "model.safetensors", {"int8.weight": said})
        with pytest.raises(kind, match=says):
            TorchAo(READER).scheme(Checkpoint(tmp_path, torch.float32), "int8", N, K)


def test_a_configuration_without_a_type_is_refused() -> None:
    with pytest.raises(CheckpointError, match="quant_type"):
        TorchAo({"quant_type": {"default": {}}})


def test_pickled_files_are_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*save it as safetensors"):
        Checkpoint(tmp_path, torch.float32)
