"""Sharded quantised checkpoints, damaged in every way that files are: each is read, or refused by an error that names the tensor or the file. Nothing else is raised."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stored_formats import FORMATS
from test_readers import answers, model_folder, settings

from penstock.core.protocol.errors import CheckpointError, UnsupportedFeature
from penstock.plugins.devices.cpu import CpuDevice
from penstock.plugins.quantizers.torchao import TorchAo
from penstock.plugins.weights.checkpoint import Checkpoint

Rng = np.random.Generator
TORCHAO = Path(__file__).with_name("torchao_layers.safetensors")
LAYERS = ["int8", "int8_dynamic", "float8", "intx4_zeros", "int4", "int4_zeros"]
INDEX = "model.safetensors.index.json"
TRIES = 12
"""Of each format."""


def shards(folder: Path, count: int = 3) -> list[Path]:
    """The folder's one file as several, a layer's tensors spread over them."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = []
    where = {}
    for index in range(count):
        file = folder / f"model-{index + 1:05d}-of-{count:05d}.safetensors"
        own = names[index::count]
        save_file({name: tensors[name] for name in own}, file, {"format": "pt"})
        where |= dict.fromkeys(own, file.name)
        files.append(file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return files


def load(folder: Path) -> None:
    CpuDevice().load(settings(folder), lambda phase, fraction: None).close()


def refused(call: Callable[[], None], *what: object) -> CheckpointError | UnsupportedFeature | None:
    """The error that names something, or None. Whatever else is raised is a failure that says what was damaged."""
    try:
        call()
    except (CheckpointError, UnsupportedFeature) as error:
        return error
    except BaseException as error:
        raise AssertionError(f"{what}: {error!r}") from error
    return None


def cut(file: Path, rng: Rng) -> str:
    data = file.read_bytes()
    file.write_bytes(data[: int(rng.integers(0, len(data)))])
    return file.name


def header(file: Path, rng: Rng) -> str:
    data = bytearray(file.read_bytes())
    data[int(rng.integers(0, 8 + struct.unpack("<Q", data[:8])[0]))] = int(rng.integers(0, 256))
    file.write_bytes(data)
    return ""


def gone(file: Path, rng: Rng) -> str:
    file.unlink()
    return file.name


def empty(file: Path, rng: Rng) -> str:
    file.write_bytes(b"")
    return file.name


def tensors_of(change: Callable[[str, torch.Tensor, Rng], torch.Tensor | None]) -> Callable[[Path, Rng], str]:
    def changed(file: Path, rng: Rng) -> str:
        tensors = load_file(file)
        name = sorted(tensors)[int(rng.integers(len(tensors)))]
        new = change(name, tensors[name], rng)
        left = {one: tensor for one, tensor in tensors.items() if one != name} | ({} if new is None else {name: new.contiguous()})
        save_file(left, file, {"format": "pt"})
        return name

    return changed


def shape(name: str, tensor: torch.Tensor, rng: Rng) -> torch.Tensor:
    flat = tensor.reshape(-1)
    kind = rng.integers(4)
    return flat[:-1] if kind == 0 else flat if kind == 1 else torch.cat((flat, flat)) if kind == 2 else tensor[None]


def dtype(name: str, tensor: torch.Tensor, rng: Rng) -> torch.Tensor:
    wanted = (torch.uint8, torch.int16, torch.float32, torch.int64, torch.float16)[int(rng.integers(5))]
    return tensor.float().nan_to_num().to(wanted)


def numbers(name: str, tensor: torch.Tensor, rng: Rng) -> torch.Tensor:
    data = tensor.clone().reshape(-1)
    raw = data.view(torch.uint8)
    for _ in range(3):
        raw[int(rng.integers(raw.numel()))] = int(rng.integers(256))
    if data.is_floating_point() and data.dtype.itemsize > 1 and rng.integers(2):
        data[int(rng.integers(data.numel()))] = float("nan")
    return data.view(tensor.shape)


DAMAGE: dict[str, Callable[[Path, Rng], str]] = {
    "cut": cut,
    "header": header,
    "gone": gone,
    "empty": empty,
    "missing": tensors_of(lambda name, tensor, rng: None),
    "shape": tensors_of(shape),
    "dtype": tensors_of(dtype),
    "numbers": tensors_of(numbers),
}
ALWAYS = ("cut", "gone", "empty")
"""What cannot be read at all."""


@pytest.mark.parametrize("name", FORMATS)
def test_damage_is_named(name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng()
    whole, _ = model_folder(tmp_path, FORMATS[name], 4)
    files = shards(whole)
    load(whole)
    kept = {file: file.read_bytes() for file in files}
    ways = [*DAMAGE, *rng.choice(list(DAMAGE), TRIES - len(DAMAGE))]
    for way in ways:
        file = files[int(rng.integers(len(files)))]
        what = DAMAGE[way](file, rng)
        error = refused(lambda: load(whole), way, what, file)
        if error is None:
            assert way not in ALWAYS, (way, file)
        else:
            said = f"{error.message} {error.param}"
            assert what.rpartition(".")[0] in said or file.name in said, (way, what, said)
        for one, data in kept.items():
            one.write_bytes(data)


@pytest.mark.parametrize("name", ["awq", "ct w4a16", "bnb nf4"])
def test_several_files_are_one_checkpoint(name: str, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    one, _ = model_folder(tmp_path / "one", FORMATS[name], 4)
    many, _ = model_folder(tmp_path / "many", FORMATS[name], 4)
    shards(many, 5)
    assert answers(one)[0] == answers(many)[0]


INDEXES: list[Any] = [
    {},
    [],
    {"weight_map": {}},
    {"weight_map": {"a": 3}},
    {"weight_map": {"a": "../x.safetensors"}},
    {"weight_map": {"a": "none.safetensors"}},
]


@pytest.mark.parametrize("index", INDEXES, ids=str)
def test_a_wrong_index_is_named(index: Any, tmp_path: Path) -> None:
    whole, _ = model_folder(tmp_path, FORMATS["awq"], 4)
    shards(whole)
    (whole / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"index\.json"):
        load(whole)


JUNK: list[Any] = [None, -1, 0, 1, 3, 1 << 40, "x", "", [], ["x"], {}, {"x": 1}, 3.5, True, False]


def junk(value: Any, rng: Rng) -> Any:
    """One value somewhere within, replaced or taken away."""
    if isinstance(value, dict) and value and rng.integers(4):
        name = list(value)[int(rng.integers(len(value)))]
        if not rng.integers(5):
            return {key: one for key, one in value.items() if key != name}
        return {**value, name: junk(value[name], rng)}
    if isinstance(value, list) and value and rng.integers(2):
        return [junk(value[0], rng), *value[1:]]
    return JUNK[int(rng.integers(len(JUNK)))]


@pytest.mark.parametrize("name", FORMATS)
def test_junk_in_the_configuration_is_named(name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng()
    whole, _ = model_folder(tmp_path, FORMATS[name], 4)
    config = json.loads((whole / "config.json").read_text())
    for _ in range(TRIES):
        said = {**config, "quantization_config": junk(FORMATS[name].config, rng)}
        (whole / "config.json").write_text(json.dumps(said))
        error = refused(lambda: load(whole), said["quantization_config"])
        assert error is None or error.param


@pytest.mark.parametrize("layer", LAYERS)
def test_junk_in_a_header_of_torchao_is_named(layer: str, tmp_path: Path) -> None:
    rng = np.random.default_rng()
    tensors = {name: value for name, value in load_file(TORCHAO).items() if name.startswith(f"{layer}.")}
    with safe_open(str(TORCHAO), framework="pt") as handle:
        note = json.loads(handle.metadata()[f"{layer}.weight"])
    (tmp_path / "config.json").write_text("{}")
    reader = TorchAo({"quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}})
    for _ in range(30):
        said = junk(note, rng)
        save_file(tensors, tmp_path / "model.safetensors", {f"{layer}.weight": json.dumps(said)})
        weights = Checkpoint(tmp_path, torch.float32)

        def read(weights: Checkpoint = weights) -> None:
            scheme = reader.scheme(weights, layer, 8, 64)
            if scheme is None:
                reader.wide(weights, layer, 8, 64)
            else:
                reader.read(weights, layer, scheme, 8, 64, torch.device("cpu"))

        error = refused(read, said)
        assert error is None or layer in error.message
