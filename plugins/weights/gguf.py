"""Tensors of a GGUF file, taken one by one.

What it is: the mapped file behind the names that Hugging Face checkpoints have, rows of queries and keys in the order that those have; a tensor in a quantised
form is widened when it is taken, or given as bytes to the quantizer. What is held wide though the file holds it small is said once.
What it does not know: the container's layout, what blocks of numbers mean, configurations.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Sequence

import torch

from penstock.core.protocol.errors import CheckpointError
from penstock.plugins.gguf.config import Fields, architecture_of
from penstock.plugins.gguf.container import GgufFile, Place
from penstock.plugins.gguf.names import EMBEDDING, ROPE_FACTORS, stored_name, turned
from penstock.plugins.gguf.types import FLOATS
from penstock.plugins.quantizers.ggml import SCHEMES, widened

log = logging.getLogger("penstock.weights")
TORCH = {name: getattr(torch, dtype) for name, dtype in FLOATS.items()}
ENDS_BYTES = 1 << 16


class GgufWeights:
    """See plugins/models/api.py: Weights. `raw` gives a quantised tensor's bytes, `form` how it is stored, `called` its name in the file."""

    def __init__(self, path: str, dtype: torch.dtype) -> None:
        self._file = GgufFile(path)
        self._dtype = dtype
        self._left = set(self._file.tensors)
        self._ignored = {ROPE_FACTORS}
        self._wide: list[str] = []  # appended to by several threads
        self._heads: dict[str, int] = {}
        architecture = architecture_of(self._file)
        if architecture == "llama":
            fields = Fields(self._file, architecture)
            query = fields.integer("attention.head_count")
            self._heads = {"query": query, "key": fields.integer("attention.head_count_kv", query)}

    def called(self, name: str) -> str:
        """As the file calls it."""
        return stored_name(name) or name

    def has(self, name: str) -> bool:
        """See Weights."""
        return self.called(name) in self._file.tensors

    def form(self, name: str) -> str:
        """How it is stored ("Q8_0"). Raises CheckpointError."""
        return self._place(name, "").form.name

    def take(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """See Weights.take."""
        place = self._place(name, f"; the configuration asks for one of shape {list(shape)}")
        stored = self.called(name)
        if list(place.shape) != list(shape):
            raise CheckpointError(
                f"{self._file.name}: tensor {stored!r} has shape {list(place.shape)}, the fields say {list(shape)}.", param=stored
            )
        rows = self.raw(name)
        if place.form.name in TORCH:
            return rows.view(TORCH[place.form.name]).reshape(*shape).to(self._dtype)
        if place.form.name not in SCHEMES and stored != EMBEDDING:
            self._wide.append(place.form.name)
        try:
            return widened(place.form.name, rows.reshape(math.prod(shape[:-1]), -1), self._dtype).reshape(*shape)
        except ValueError as error:
            raise CheckpointError(f"{self._file.name}: tensor {stored!r} {error}: the file is damaged.", param=stored) from None

    def raw(self, name: str) -> torch.Tensor:
        """Its bytes: [rows, bytes of a row] of a matrix, uint8."""
        place = self._place(name, "")
        stored = self.called(name)
        self._left.discard(stored)
        rows = torch.from_numpy(self._file.array(stored))
        heads = self._heads.get(turned(name) or "")
        if heads is None:
            return rows
        if place.shape[0] % (2 * heads):
            raise CheckpointError(
                f"{self._file.name}: tensor {stored!r} has {place.shape[0]} rows, which are not those of {heads} heads.", param=stored
            )
        return _turned_back(rows.reshape(place.shape[0], -1), heads).reshape(rows.shape)

    def ignore(self, *names: str) -> None:
        """See Weights.ignore."""
        self._ignored.update(self.called(name) for name in names)

    def finish(self) -> None:
        """See Weights.finish."""
        if self._wide:
            log.warning(
                "%s: %s are held in full width, because their blocks have minima: their values are those of the file, the memory and the time are those of"
                " an unquantised model.",
                self._file.name,
                " and ".join(f"{count} tensors of {form}" for form, count in sorted(Counter(self._wide).items())),
            )
        left = sorted(self._left - self._ignored)
        if left:
            more = f" and {len(left) - 5} more" if len(left) > 5 else ""
            raise CheckpointError(
                f"{self._file.name} holds tensors that this architecture does not use: {', '.join(left[:5])}{more}. Serving without them would give"
                " wrong answers.",
                param=left[0],
            )

    def identity(self) -> str:
        """See Weights: a digest of the fields, the list of tensors and both ends of the data (not of every byte)."""
        data, start = self._file.data, self._file.start
        digest = hashlib.sha256(data[: start + ENDS_BYTES])
        digest.update(data[max(start, len(data) - ENDS_BYTES) :])
        digest.update(str(len(data)).encode())
        return digest.hexdigest()

    def _place(self, name: str, wanted: str) -> Place:
        stored = self.called(name)
        place = self._file.tensors.get(stored)
        if place is None:
            raise CheckpointError(f"{self._file.name}: tensor {stored!r} is missing{wanted}.", param=stored)
        return place


def _turned_back(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from neighbours side by side to first halves before second ones."""
    return rows.view(heads, -1, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)
