"""A weight source as a plugin: the tensors of a model from one file, `weights.npz` (numpy's `savez`), beside its config.json.

Install it beside Penstock (`pip install ./examples/weights_npz`) and start with `--load-format npz`. numpy has no bfloat16: save such tensors as
float32, which holds every one of their values.
What it does not know: what the names mean, which model asks.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from penstock.core.contract.hookspecs import WeightSourceSpec, hookimpl
from penstock.core.protocol.errors import CheckpointError, UnsupportedFeature

if TYPE_CHECKING:
    import torch

FILE = "weights.npz"


class NpzWeights:
    """Each tensor is read from the file when it is taken."""

    def __init__(self, path: str, dtype: torch.dtype) -> None:
        self.file = Path(path) / FILE
        self.dtype = dtype
        try:
            self.arrays = np.load(self.file)
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise CheckpointError(f"{self.file} cannot be read: {error}.", param="model") from None
        self.names = frozenset(self.arrays.files)
        self.left = set(self.names)

    def has(self, name: str) -> bool:
        return name in self.names

    def take(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        import torch

        if name not in self.names:
            raise CheckpointError(f"{self.file}: tensor {name!r} is missing; the model asks for one of shape {list(shape)}.", param=name)
        try:
            value = self.arrays[name]
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise CheckpointError(f"{self.file}: tensor {name!r} cannot be read: {error}.", param=name) from None
        if value.dtype.kind != "f":
            raise UnsupportedFeature(f"{self.file}: tensor {name!r} is {value.dtype}, no float.", param=name)
        if value.shape != tuple(shape):
            raise CheckpointError(
                f"{self.file}: tensor {name!r} has shape {list(value.shape)}, the model asks for {list(shape)}.", param=name
            )
        self.left.discard(name)
        return torch.from_numpy(value).to(self.dtype).contiguous()

    def ignore(self, *names: str) -> None:
        self.left.difference_update(names)

    def finish(self) -> None:
        self.arrays.close()
        if self.left:
            raise CheckpointError(f"{self.file} holds tensors that the model does not use: {', '.join(sorted(self.left))}.", param="model")

    def identity(self) -> str:
        """The whole content: such files are small."""
        with self.file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()


def factory(path: str, load_format: str, *, dtype: torch.dtype, **options: object) -> NpzWeights:
    return NpzWeights(path, dtype)


@hookimpl
def register_weight_sources() -> list[WeightSourceSpec]:
    return [WeightSourceSpec(name="npz", api_level=1, doc=f"one {FILE} a model", load_formats=["npz"], factory=factory)]
