"""Seeded random weights of plausible scale (`--load-format dummy`): speed tests without a checkpoint.

What it is: a Weights source that invents each tensor from (seed, name), whatever the order in which they are taken: norms are 1, biases 0,
everything else normal with a standard deviation of `std`.
What it does not know: models, files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch


class DummyWeights:
    """See plugins/models/api.py: Weights."""

    def __init__(self, *, dtype: torch.dtype, seed: int, std: float = 0.02, device: torch.device | None = None) -> None:
        """With `device` the numbers are made there (others than on the host for the same seed)."""
        self._dtype, self._seed, self._std, self._device = dtype, seed, std, device or torch.device("cpu")

    def take(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """See Weights.take."""
        if name.endswith("norm.weight"):
            return torch.ones(*shape, dtype=self._dtype, device=self._device)
        if name.endswith(".bias"):
            return torch.zeros(*shape, dtype=self._dtype, device=self._device)
        digest = hashlib.sha256(f"{self._seed} {name}".encode()).digest()
        generator = torch.Generator(self._device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.empty(*shape, device=self._device).normal_(0.0, self._std, generator=generator).to(self._dtype)

    def ignore(self, *names: str) -> None:
        """Nothing is left over here."""

    def finish(self) -> None:
        """Nothing to close."""

    def identity(self) -> str:
        """See Weights."""
        return f"dummy {self._seed}"
