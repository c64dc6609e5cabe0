"""Shared by the kernel tests: seeds, threads, poisoned memory, float64 truths."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from penstock.kernels import native


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(7)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    chosen: torch.dtype = request.param
    return chosen


@pytest.fixture
def compiled() -> None:
    """Skips where this machine has no C library: bit-equality is promised for the C kernels only."""
    if native.library() is None:
        pytest.skip(native.describe())
