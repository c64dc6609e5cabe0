"""Masks of the sampler: in plain torch against bits one by one, and what is drawn under them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock.kernels import native
from penstock.kernels.sampling import api
from penstock.plugins.devices.host_ops import HostOps
from penstock.plugins.devices.torch_ops import TorchOps


@given(st.integers(1, 100), st.lists(st.integers(-1, 2), min_size=1, max_size=4), st.integers(0, 2**32 - 1))
def test_a_row_keeps_what_its_mask_allows(vocab: int, rows: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    words = -(-vocab // 32)
    mask = rng.integers(-(2**31), 2**31, (3, words)).astype(np.int32)
    allowed = np.unpackbits(mask.view(np.uint8), bitorder="little").reshape(3, -1)[:, :vocab].astype(bool)
    logits = rng.standard_normal((len(rows), vocab)).astype(np.float32)
    wanted = np.stack([row if which < 0 else np.where(allowed[which], row, -np.inf) for row, which in zip(logits, rows, strict=True)])
    for ops in (TorchOps, HostOps):  # the second by the C kernels, where there are any
        found = torch.from_numpy(logits.copy())
        ops.mask(ops.__new__(ops), found, torch.from_numpy(mask), torch.tensor(rows, dtype=torch.int32))
        assert np.array_equal(found.numpy(), wanted)


@pytest.mark.skipif(native.library() is None, reason="no C kernels on this machine")
def test_a_row_that_names_no_mask_touches_nothing() -> None:
    logits = torch.zeros(2, 40)
    with pytest.raises(IndexError, match="mask_rows"):
        api.mask_(logits, torch.zeros(1, 2, dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32))
    assert not logits.any()
