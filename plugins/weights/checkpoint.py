"""Tensors of a Hugging Face folder's safetensors files, taken one by one.

What it is: memory-mapped reading of `model.safetensors` or of the shards that `model.safetensors.index.json` names, with checks that
name the tensor and the file. A tensor is converted to the wanted dtype when it is taken, so that beside the packed weights only one
layer's tensors exist at a time.
What it does not know: what the names mean.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from penstock.core.errors import CheckpointError, UnsupportedFeature

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def shards(path: str | Path) -> dict[str, Path] | list[Path]:
    """tensor name -> file for a sharded checkpoint, or [file] for a single one. Raises CheckpointError."""
    folder = Path(path)
    if (folder / INDEX).is_file():
        try:
            table = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            named = {str(name): folder / str(file) for name, file in table.items()}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{folder / INDEX} has no usable 'weight_map' ({error}).", param="weight_map") from None
        for file in sorted(set(named.values())):
            if file.parent != folder:
                raise CheckpointError(f"{folder / INDEX} names {file}, which lies outside the folder.", param="weight_map")
            if not file.is_file():
                raise CheckpointError(f"{folder / INDEX} names {file.name}, which does not exist.", param="weight_map")
        return named
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    others = sorted(file.name for file in folder.glob("*") if file.suffix in (".bin", ".pt", ".pth", ".gguf"))
    hint = f" ({', '.join(others[:3])} cannot be read: only safetensors are)" if others else ""
    raise CheckpointError(f"{folder} holds neither {SINGLE} nor {INDEX}{hint}.", param="model")


class Checkpoint:
    """See plugins/models/api.py: Weights. `dtype` is what taken tensors are converted to."""

    def __init__(self, path: str | Path, dtype: torch.dtype) -> None:
        self._folder = Path(path)
        self._dtype = dtype
        self._open: dict[Path, Any] = {}
        found = shards(path)
        if isinstance(found, list):
            self._where = dict.fromkeys(self._handle(found[0]).keys(), found[0])
        else:
            self._where = found
            for file in sorted(set(found.values())):
                self._where |= {name: file for name in self._handle(file).keys() if name not in found}  # noqa: SIM118 (not a dict)
        self._left = set(self._where)
        self._ignored: set[str] = set()

    def _handle(self, file: Path) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safe_open(str(file), framework="pt", device="cpu")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{file} is no readable safetensors file ({error}).", param="model") from None
        return self._open[file]

    def take(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """See Weights.take."""
        file = self._where.get(name)
        if file is None:
            raise CheckpointError(
                f"{self._folder}: tensor {name!r} is missing; the configuration asks for one of shape {list(shape)}.", param=name
            )
        self._left.discard(name)
        try:
            value: torch.Tensor = self._handle(file).get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{file}: tensor {name!r} cannot be read ({error}).", param=name) from None
        if list(value.shape) != list(shape):
            raise CheckpointError(
                f"{file}: tensor {name!r} has shape {list(value.shape)}, the configuration says {list(shape)}.", param=name
            )
        if value.dtype not in FLOATS:
            raise UnsupportedFeature(f"{file}: tensor {name!r} is {value.dtype}: quantised weights are not supported yet.", param=name)
        return value.to(self._dtype).contiguous()

    def ignore(self, *names: str) -> None:
        """See Weights.ignore."""
        self._ignored.update(names)

    def finish(self) -> None:
        """See Weights.finish."""
        self._open.clear()
        left = sorted(self._left - self._ignored)
        if left:
            more = f" and {len(left) - 5} more" if len(left) > 5 else ""
            raise CheckpointError(
                f"{self._folder} holds tensors that this architecture does not use: {', '.join(left[:5])}{more}."
                " Serving without them would give wrong answers.",
                param=left[0],
            )


def identity(path: str | Path, load_format: str, seed: int) -> str:
    """A digest that changes with the checkpoint: config.json, and each shard's size, header and both ends (not every byte: reading a large
    checkpoint twice would double the start). For dummy weights the seed takes the shards' place."""
    digest = hashlib.sha256((Path(path) / "config.json").read_bytes())
    if load_format == "dummy":
        digest.update(f"dummy {seed}".encode())
        return digest.hexdigest()
    found = shards(path)
    for file in sorted(set(found if isinstance(found, list) else found.values())):
        size = file.stat().st_size
        with file.open("rb") as stream:
            header = stream.read(min(size, 8))
            digest.update(header + stream.read(min(int.from_bytes(header, "little"), size, 1 << 24)) + stream.read(1 << 16))
            stream.seek(max(0, size - (1 << 16)))
            digest.update(stream.read() + str(size).encode())
    return digest.hexdigest()
