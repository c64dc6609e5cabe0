"""Rotary step and paged attention: against float64, with poisoned caches, and every way of cutting a prefill."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from penstock.kernels.attention import allocate_cache, paged_attention, read_kv, reference, write_kv
from penstock.kernels.rope import reference as rope_reference
from penstock.kernels.rope import rope_and_cache


def i32(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


class Cache:
    """One layer's cache, all NaN, and blocks handed out in a shuffled order."""

    def __init__(self, kv_heads: int, block: int, dim: int, dtype: torch.dtype, blocks: int = 64) -> None:
        # as a pool lays them out: a block holds K and V of all layers, this one is in the middle
        pages = torch.full((blocks, 3, 2, kv_heads, block, dim), torch.nan, dtype=dtype)
        self.k, self.v = pages[:, 1, 0], pages[:, 1, 1]
        self.free = torch.randperm(blocks).tolist()
        self.block, self.dtype, self.kv_heads, self.dim = block, dtype, kv_heads, dim

    def sequence(self, length: int) -> tuple[list[int], Tensor]:
        """Blocks of a new sequence of `length` random keys and values, and its slots."""
        blocks = [self.free.pop() for _ in range(-(-length // self.block))]
        at = torch.arange(length)
        slots = (i32(blocks)[at // self.block] * self.block + at % self.block).int()
        k, v = (torch.randn(length, self.kv_heads, self.dim).to(self.dtype) for _ in range(2))
        write_kv(self.k, self.v, k, v, slots)
        assert torch.equal(read_kv(self.k, slots, values=False), k)
        assert torch.equal(read_kv(self.v, slots, values=True), v)
        return blocks, slots


def table(rows: list[list[int]]) -> Tensor:
    width = max(len(row) for row in rows) + 1
    return i32([row + [-7] * (width - len(row)) for row in rows])  # what lies behind a sequence's blocks is never read


def truth(q: Tensor, cache: Cache, slots: Tensor, window: int, scale: float) -> Tensor:
    """Float64 attention of one sequence's last q.shape[0] positions."""
    group = q.shape[1] // cache.kv_heads
    k = read_kv(cache.k, slots, values=False).double().repeat_interleave(group, 1)
    v = read_kv(cache.v, slots, values=True).double().repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * scale
    position = torch.arange(len(slots) - q.shape[0], len(slots))[:, None]
    at = torch.arange(len(slots))[None]
    hidden = (at > position) | ((at <= position - window) if window else torch.zeros(1, 1, dtype=torch.bool))
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


SHAPES = [(8, 4, 32), (12, 4, 64), (3, 1, 80), (4, 4, 96), (8, 2, 128), (2, 1, 256), (71, 1, 16), (14, 2, 112)]
WINDOWS = [(0, SHAPES), (37, SHAPES), (1, SHAPES[:1]), (64, SHAPES[1:2])]


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "window"), [(*shape, window) for window, shapes in WINDOWS for shape in shapes])
def test_equals_float64(dtype: torch.dtype, heads: int, kv_heads: int, dim: int, window: int) -> None:
    cache = Cache(kv_heads, 16, dim, dtype)
    lengths, rows = [1, 5, 64, 65, 200, 33], [1, 5, 1, 17, 70, 0]
    sequences = [cache.sequence(length) for length in lengths]
    q = (torch.randn(sum(rows), heads, dim) * 2).to(dtype)
    starts = [0, *torch.tensor(rows).cumsum(0).tolist()]
    out = torch.full_like(q, torch.nan)
    paged_attention(q, cache.k, cache.v, table([blocks for blocks, _ in sequences]), i32(starts), i32(lengths), dim**-0.5, window, out=out)
    for index, (_, slots) in enumerate(sequences):
        part = slice(starts[index], starts[index + 1])
        if rows[index]:
            wanted = truth(q[part], cache, slots, window, dim**-0.5)
            limit = 2**-7 if dtype == torch.bfloat16 else 2e-5
            torch.testing.assert_close(out[part].double(), wanted, rtol=limit, atol=limit)


@pytest.mark.parametrize("levels", [(0, 3, 5, 9, 40, 12, 45), (60, 57, 20, -50, 62, 70), (-80, -76, -71, -60, 90)])
def test_scores_that_rise_and_fall_from_tile_to_tile(dtype: torch.dtype, levels: tuple[int, ...]) -> None:
    """By less and by more than what a row's base of weights lets pass: each row equals float64, and itself alone."""
    cache, length = Cache(2, 16, 64, dtype), 64 * len(levels) - 7
    blocks, slots = cache.sequence(length)
    level = torch.tensor(levels).repeat_interleave(64)[:length, None, None] + torch.randn(length, 2, 1)
    values = read_kv(cache.v, slots, values=True)
    write_kv(cache.k, cache.v, (level / 8).expand(-1, -1, 64).to(dtype).contiguous(), values, slots)
    q = torch.ones(length, 4, 64, dtype=dtype)
    out = paged_attention(q, cache.k, cache.v, table([blocks]), i32([0, length]), i32([length]), 0.125)
    limit = 2**-7 if dtype == torch.bfloat16 else 2e-4  # a score of 90 is itself rounded by some 1e-5
    torch.testing.assert_close(out.double(), truth(q, cache, slots, 0, 0.125), rtol=limit, atol=limit)
    for row in (0, 63, 64, 200, length - 1):
        alone = paged_attention(q[row : row + 1], cache.k, cache.v, table([blocks]), i32([0, 1]), i32([row + 1]), 0.125)
        assert torch.equal(alone[0], out[row])


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "window"), [(8, 4, 32, 0), (12, 4, 64, 0), (5, 1, 80, 50), (71, 1, 16, 0)])
def test_a_row_does_not_know_its_batch_nor_its_chunk(dtype: torch.dtype, heads: int, kv_heads: int, dim: int, window: int) -> None:
    cache = Cache(kv_heads, 32, dim, dtype)
    blocks, _ = cache.sequence(230)
    other, _ = cache.sequence(150)
    q = torch.randn(230, heads, dim).to(dtype)
    whole = paged_attention(q, cache.k, cache.v, table([blocks]), i32([0, 230]), i32([230]), 0.2, window)
    assert torch.equal(whole, paged_attention(q, cache.k, cache.v, table([blocks]), i32([0, 230]), i32([230]), 0.2, window))
    torch.set_num_threads(1)
    assert torch.equal(whole, paged_attention(q, cache.k, cache.v, table([blocks]), i32([0, 230]), i32([230]), 0.2, window))
    torch.set_num_threads(2)
    for cuts in ([1, 2, 3, 64, 65, 130, 230], [100, 101, 229, 230], [16, 230]):
        begin = 0
        for end in cuts:
            part = paged_attention(q[begin:end], cache.k, cache.v, table([blocks]), i32([0, end - begin]), i32([end]), 0.2, window)
            assert torch.equal(part, whole[begin:end]), (begin, end)
            begin = end
    mixed = torch.cat((torch.randn(40, heads, dim).to(dtype), q[229:], q[50:90]))
    got = paged_attention(mixed, cache.k, cache.v, table([other, blocks, blocks]), i32([0, 40, 41, 81]), i32([150, 230, 90]), 0.2, window)
    assert torch.equal(got[40], whole[229])
    assert torch.equal(got[41:], whole[50:90])


@pytest.mark.parametrize(("rotary", "dim"), [(32, 32), (64, 64), (20, 80), (96, 96), (6, 16)])
@pytest.mark.parametrize("norms", [False, True])
def test_rope_equals_float64(dtype: torch.dtype, rotary: int, dim: int, norms: bool) -> None:
    heads, kv_heads, tokens = 6, 2, 19
    angle = torch.rand(50, rotary // 2, dtype=torch.float64) * 6
    cos_sin = torch.cat((angle.cos(), angle.sin()), dim=1).float()
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim).to(dtype)
    positions, slots = torch.randint(0, 50, (tokens,)).int(), torch.randperm(8 * 16)[:tokens].int()
    slots[4] = -1
    weights = [torch.randn(dim).to(dtype), torch.randn(dim).to(dtype)] if norms else [None, None]
    cache = Cache(kv_heads, 16, dim, dtype, blocks=8)
    before = qkv.clone()
    out = torch.full((tokens, heads, dim), torch.nan, dtype=dtype)
    got = rope_and_cache(qkv, positions, cos_sin, cache.k, cache.v, slots, heads, kv_heads, *weights, eps=1e-6, out=out)
    assert torch.equal(qkv, before)
    wide = Cache(kv_heads, 16, dim, torch.float64, blocks=8)
    doubles = [None if weight is None else weight.double() for weight in weights]
    wanted = rope_reference.rope_and_cache(
        qkv.double(), positions, cos_sin.double(), wide.k, wide.v, slots, heads, kv_heads, *doubles, 1e-6
    )
    limit = 2**-6 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got.double(), wanted, rtol=limit, atol=limit)
    written = slots[slots >= 0]
    torch.testing.assert_close(
        read_kv(cache.k, written, values=False).double(), read_kv(wide.k, written, values=False), rtol=limit, atol=limit
    )
    assert torch.equal(read_kv(cache.v, written, values=True), qkv.view(tokens, -1, dim)[slots >= 0, heads + kv_heads :])
    assert int((~torch.isnan(cache.k)).sum()) == len(written) * kv_heads * dim  # nothing else was touched
    assert int((~torch.isnan(cache.v)).sum()) == len(written) * kv_heads * dim
    alone = rope_and_cache(qkv[7:8], positions[7:8], cos_sin, cache.k, cache.v, slots[7:8], heads, kv_heads, *weights, eps=1e-6)
    assert torch.equal(alone, got[7:8])


def test_bad_indices_are_refused(dtype: torch.dtype) -> None:
    cache = Cache(2, 16, 32, dtype, blocks=4)
    q = torch.randn(3, 4, 32).to(dtype)

    def attend(tables: object, starts: object, lengths: object) -> None:
        paged_attention(q, cache.k, cache.v, i32(tables), i32(starts), i32(lengths), 1.0)

    with pytest.raises(IndexError, match="block"):
        attend([[4]], [0, 3], [3])
    with pytest.raises(IndexError, match="kv_len"):
        attend([[1]], [0, 3], [2])
    with pytest.raises(IndexError, match="kv_len"):
        attend([[1]], [0, 3], [17])
    with pytest.raises(IndexError, match="q_start"):
        attend([[1]], [0, 2], [3])
    with pytest.raises(ValueError, match="q_start must have shape"):
        attend([[1]], [0, 1, 3], [3])
    qkv, cos_sin, zero = torch.randn(1, 8 * 32).to(dtype), torch.ones(5, 32), i32([0])
    with pytest.raises(IndexError, match="position"):
        rope_and_cache(qkv, i32([5]), cos_sin, cache.k, cache.v, zero, 4, 2)
    with pytest.raises(IndexError, match="slot"):
        rope_and_cache(qkv, zero, cos_sin, cache.k, cache.v, i32([64]), 4, 2)
    with pytest.raises(ValueError, match="multiples of 16"):
        allocate_cache(1, 1, 16, 20, dtype)


def test_no_rows(dtype: torch.dtype) -> None:
    cache = Cache(2, 16, 32, dtype, blocks=4)
    empty = torch.empty(0, 4, 32, dtype=dtype)
    assert paged_attention(empty, cache.k, cache.v, torch.empty(0, 1, dtype=torch.int32), i32([0]), i32([]), 1.0).shape == (0, 4, 32)


def test_reference_equals_float64() -> None:
    """The torch truth that machines without a compiler run."""
    cache = Cache(2, 16, 32, torch.float32)
    blocks, slots = cache.sequence(70)
    q = torch.randn(9, 4, 32)
    got = reference.paged_attention(q, cache.k, cache.v, table([blocks]), i32([0, 9]), i32([70]), 0.3, 20)
    torch.testing.assert_close(got.double(), truth(q, cache, slots, 20, 0.3), rtol=1e-5, atol=1e-5)
