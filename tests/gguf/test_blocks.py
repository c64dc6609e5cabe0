"""Blocks of numbers against the `gguf` package's own reading of them, bit by bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from gguf_kit import KIND, RANDOM, blocks_for, torch_rows

from penstock.kernels.linear.scheme import dequantise
from penstock.plugins.gguf.types import FORMS
from penstock.plugins.quantizers.ggml import BLOCKS, SCHEMES, WIDE, quantised, widened

SHAPE = (6, 768)


def rows_of(form: str, seed: int = 0) -> np.ndarray:
    """Bytes of SHAPE in this form: random ones where the package cannot write it, else random weights."""
    if form in RANDOM:
        return blocks_for(SHAPE, form, seed)
    weights = np.random.default_rng(seed).normal(0, 0.1, SHAPE).astype(np.float32)
    weights[0, :32] = 0
    weights[1, :32] *= 1e4
    return quantize(weights, KIND[form])


def test_sizes_are_those_of_the_format() -> None:
    for number, form in FORMS.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)] == (form.values, form.nbytes), form
        assert gguf.GGMLQuantizationType(number).name == form.name


@pytest.mark.parametrize("form", sorted(WIDE))
def test_widened_is_what_the_package_says(form: str) -> None:
    for seed in range(3):
        rows = rows_of(form, seed)
        expected = torch_rows(dequantize(rows, KIND[form]))
        assert torch.equal(widened(form, torch_rows(rows), torch.float32), expected)
        assert torch.equal(widened(form, torch_rows(rows), torch.bfloat16), expected.bfloat16())


@pytest.mark.parametrize("form", sorted(WIDE))
def test_any_bytes_with_finite_scales_mean_the_same(form: str) -> None:
    block = BLOCKS[form]
    random = np.random.default_rng(1)
    blocks = random.integers(0, 256, (512, block.nbytes), dtype=np.uint8)
    for place in RANDOM.get(form, (0, 2) if form in ("Q4_1", "Q5_1") else (0,)):
        blocks[:, place + 1] &= 0x3F  # no exponent of infinity
    expected = dequantize(blocks, KIND[form])
    assert np.isfinite(expected).all()
    assert torch.equal(widened(form, torch_rows(blocks), torch.float32), torch_rows(expected))


@pytest.mark.parametrize("form", sorted(SCHEMES))
def test_a_scheme_loses_nothing(form: str) -> None:
    for seed in range(3):
        rows = rows_of(form, seed)
        found = quantised(form, torch_rows(rows))
        assert (found.n, found.k) == SHAPE
        assert found.data.dtype == found.scheme.dtype
        assert list(found.scales.shape) == [found.scheme.scale_rows(found.n), found.scheme.groups(found.k)]
        assert torch.equal(dequantise(found), torch_rows(dequantize(rows, KIND[form])))


def test_long_matrices_are_widened_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch_rows(rows_of("Q4_K"))
    whole = widened("Q4_K", rows, torch.float32)
    for at_once in (1, 769, 2 * 768):
        monkeypatch.setattr("penstock.plugins.quantizers.ggml.AT_ONCE", at_once)
        assert torch.equal(widened("Q4_K", rows, torch.float32), whole)


@pytest.mark.parametrize("form", sorted(WIDE))
def test_damaged_scales_are_not_taken_for_numbers(form: str) -> None:
    rows = torch_rows(rows_of(form))
    place = RANDOM.get(form, (0,))[0]
    rows[3, place : place + 2] = torch.tensor([0, 0x7E], dtype=torch.uint8)  # NaN
    with pytest.raises(ValueError, match="NaN"):
        widened(form, rows, torch.float32)
    if form in SCHEMES:
        with pytest.raises(ValueError, match="NaN"):
            quantised(form, rows)
