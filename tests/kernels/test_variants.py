"""Each instruction set by itself: what this machine has is forced in turn and must give the right numbers, the same for a row in any batch; what it has not
still compiles."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional

from penstock.kernels import native
from penstock.kernels.attention import paged_attention
from penstock.kernels.linear import pack, pack_gated
from penstock.kernels.linear.scheme import Scheme, dequantise
from penstock.kernels.native import bind, build
from penstock.kernels.quantised.api import pack_quantised
from tests.kernels import test_attention, test_decoder, test_quantised


@pytest.fixture
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Kernels of that instruction set."""
    name: str = request.param
    if not build.compilers():
        pytest.skip("no C compiler")
    if build.missing(name):
        pytest.skip(f"this processor lacks {', '.join(build.missing(name))}")
    monkeypatch.setenv("PENSTOCK_KERNELS", name)
    bind._load.cache_clear()
    yield name
    bind._load.cache_clear()


forced = pytest.mark.parametrize("variant", build.VARIANTS, indirect=True)


@forced
def test_it_runs_as_asked(variant: str) -> None:
    library = native.library()
    assert library is not None
    assert library.isa == variant
    assert native.describe() == f"C kernels ({variant})"


@forced
@pytest.mark.parametrize(("n", "k"), [(50, 33), (272, 515), (64, 2048)])
def test_linear(variant: str, dtype: torch.dtype, n: int, k: int) -> None:
    weight, x = (torch.randn(n, k) * 0.5).to(dtype), torch.full((60, k), torch.nan, dtype=dtype)
    x[3:57] = torch.randn(54, k)
    layer, gated = pack(weight), pack_gated(weight, weight.flip(0), "silu")
    whole, products = layer(x[3:57], out_dtype=torch.float32), gated(x[3:57])
    truth = functional.linear(x[3:57].double(), weight.double())
    torch.testing.assert_close(whole.double(), truth, rtol=2e-6, atol=2e-6 * (4 + k / 16))
    size = truth.abs().clamp(min=1) * truth.flip(1).abs().clamp(min=1)
    assert ((products.double() - functional.silu(truth) * truth.flip(1)).abs() / size).max() < (2**-6 if dtype == torch.bfloat16 else 2e-4)
    for rows in range(1, 51):  # every height of tile, alone and beside another
        part = slice(57 - rows, 57)
        assert torch.equal(layer(x[part], out_dtype=torch.float32), whole[-rows:]), rows
        assert torch.equal(gated(x[part]), products[-rows:]), rows


@forced
@pytest.mark.parametrize(("kind", "zeros"), test_quantised.FORMATS)
def test_codes(variant: str, dtype: torch.dtype, kind: str, zeros: bool) -> None:
    for k, group in ((97, 0), (90, 20), (1150, 1100)):
        part = test_quantised.codes(Scheme(kind, group, 1, zeros), 80, k)
        layer, x = pack_quantised([part]), test_quantised.rows_of(230, k, dtype)
        whole = layer(x, out_dtype=torch.float32)
        test_quantised.right(whole, x, dequantise(part), None)
        for rows in (1, 2, 3, 5, 6, 7, 12, 13, 16, 24, 50, 200):
            assert torch.equal(layer(x[230 - rows :], out_dtype=torch.float32), whole[230 - rows :]), rows


@forced
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "window"), [(12, 4, 64, 0), (5, 1, 80, 50), (8, 8, 16, 0)])
def test_attention_of_any_chunk(variant: str, dtype: torch.dtype, heads: int, kv_heads: int, dim: int, window: int) -> None:
    cache = test_attention.Cache(kv_heads, 16, dim, dtype)
    blocks, slots = cache.sequence(200)
    q, i32 = torch.randn(200, heads, dim).to(dtype), test_attention.i32
    whole = paged_attention(q, cache.k, cache.v, test_attention.table([blocks]), i32([0, 200]), i32([200]), 0.2, window)
    limit = 2**-7 if dtype == torch.bfloat16 else 2e-5
    torch.testing.assert_close(whole.double(), test_attention.truth(q, cache, slots, window, 0.2), rtol=limit, atol=limit)
    for begin, end in ((0, 1), (1, 18), (62, 67), (100, 200), *((at, at + 1) for at in range(120, 200, 7))):
        part = paged_attention(
            q[begin:end], cache.k, cache.v, test_attention.table([blocks]), i32([0, end - begin]), i32([end]), 0.2, window
        )
        assert torch.equal(part, whole[begin:end]), (begin, end)


@forced
@pytest.mark.parametrize("name", ["qwen2-sliding", "mixed", "kv-int8"])
def test_whole_steps(variant: str, dtype: torch.dtype, name: str) -> None:
    test_decoder.test_equals_the_separate_operations(dtype, name)
    test_decoder.test_solo_batched_chunked_and_decoded_are_equal(dtype, name)


@pytest.mark.parametrize("name", build.VARIANTS)
def test_what_the_processor_lacks_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(build, "cpu_flags", lambda: "flags : sse2 avx\nmodel name : old")
    monkeypatch.setenv("PENSTOCK_KERNELS", name)
    bind._load.cache_clear()
    try:
        with pytest.raises(ValueError, match=f"PENSTOCK_KERNELS={name} needs a processor with avx2, fma, f16c"):
            native.library()
    finally:
        bind._load.cache_clear()


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64") or not build.compilers(), reason="no compiler for x86-64")
@pytest.mark.parametrize("name", build.VARIANTS)
def test_every_variant_compiles(name: str) -> None:
    """Also where it cannot run."""
    assert build.build(name).stat().st_size > 0
