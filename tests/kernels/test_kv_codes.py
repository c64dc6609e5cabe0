"""The KV cache in eight bits on the CPU: codes as torch makes them, attention over them against float64 and in every cut, on each instruction set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

from penstock.core.contract.devices import ModelFacts
from penstock.kernels import native
from penstock.kernels.attention import Scales, paged_attention, read_kv, reference, write_kv
from penstock.kernels.attention.codes import KINDS, encode
from penstock.kernels.native import bind, build
from penstock.kernels.rope import rope_and_cache
from penstock.plugins.attention.native import NativeAttention
from penstock.plugins.attention.pages import Cache

FACTS = ModelFacts(
    architecture="", model_type="", vocab_size=64, hidden_size=64, intermediate_size=64, num_layers=3, num_heads=1, num_kv_heads=1,
    head_dim=16, max_position=4096,
)  # fmt: skip


def i32(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


class Paged:
    """The middle layer of a pool, every byte of which is a NaN (of E4M3, E5M2, bfloat16), and blocks handed out in a shuffled order."""

    def __init__(self, kind: str, heads: int, kv_heads: int, dim: int, block: int = 16, blocks: int = 64) -> None:
        facts = msgspec.structs.replace(FACTS, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim)
        self.attention = NativeAttention(facts, torch.bfloat16, torch.device("cpu"), block, kind)
        self.pool = self.attention.allocate(blocks).fill_(0xFF)
        self.cache: Cache = self.attention.caches(self.pool)[1]
        scales = self.attention.scales(self.cache)
        assert scales is not None
        self.scales: Scales = scales
        self.free = torch.randperm(blocks).tolist()
        self.block, self.kv_heads, self.dim = block, kv_heads, dim

    def sequence(self, length: int) -> tuple[list[int], Tensor]:
        """Blocks of a new sequence of random keys and values of very different sizes, and its slots."""
        blocks = [self.free.pop() for _ in range(-(-length // self.block))]
        at = torch.arange(length)
        slots = (i32(blocks)[at // self.block] * self.block + at % self.block).int()
        k, v = (torch.randn(length, self.kv_heads, self.dim) * torch.rand(length, self.kv_heads, 1).mul(4).exp() / 9 for _ in range(2))
        write_kv(self.cache.k, self.cache.v, k, v, slots, self.scales)
        return blocks, slots

    def attend(self, q: Tensor, tables: Tensor, starts: list[int], lengths: list[int], window: int = 0) -> Tensor:
        scale = self.dim**-0.5
        return paged_attention(q, self.cache.k, self.cache.v, tables, i32(starts), i32(lengths), scale, window, scales=self.scales)

    def truth(self, q: Tensor, slots: Tensor, window: int) -> Tensor:
        """Float64 attention of one sequence's last q.shape[0] positions, over what the codes mean."""
        group = q.shape[1] // self.kv_heads
        k = read_kv(self.cache.k, slots, values=False, scales=self.scales).double().repeat_interleave(group, 1)
        v = read_kv(self.cache.v, slots, values=True, scales=self.scales).double().repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q.double(), k) * self.dim**-0.5
        position, at = torch.arange(len(slots) - q.shape[0], len(slots))[:, None], torch.arange(len(slots))[None]
        hidden = (at > position) | ((at <= position - window) if window else torch.zeros(1, 1, dtype=torch.bool))
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def table(rows: list[list[int]]) -> Tensor:
    width = max(len(row) for row in rows) + 1
    return i32([row + [-7] * (width - len(row)) for row in rows])


def compare(kind: str, dtype: torch.dtype, heads: int, kv_heads: int, dim: int, window: int) -> None:
    paged = Paged(kind, heads, kv_heads, dim)
    lengths, rows = [1, 5, 64, 65, 200, 33], [1, 5, 1, 17, 70, 0]
    sequences = [paged.sequence(length) for length in lengths]
    q = (torch.randn(sum(rows), heads, dim) * 2).to(dtype)
    starts = [0, *torch.tensor(rows).cumsum(0).tolist()]
    out = paged.attend(q, table([blocks for blocks, _ in sequences]), starts, lengths, window)
    for index, (_, slots) in enumerate(sequences):
        if rows[index]:
            part = slice(starts[index], starts[index + 1])
            wanted = paged.truth(q[part], slots, window)
            limit = 2**-7 if dtype == torch.bfloat16 else 2e-5
            torch.testing.assert_close(out[part].double(), wanted, rtol=limit, atol=limit * float(wanted.abs().max()))


SHAPES = [(8, 4, 32, 0), (12, 4, 64, 37), (3, 1, 80, 0), (8, 1, 128, 64), (2, 1, 256, 1), (71, 1, 16, 0), (14, 2, 112, 37)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "window"), SHAPES)
def test_equals_float64(kind: str, dtype: torch.dtype, heads: int, kv_heads: int, dim: int, window: int) -> None:
    compare(kind, dtype, heads, kv_heads, dim, window)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fixed", [None, (0.021, 0.4)])
def test_codes_are_those_of_torch(kind: str, dtype: torch.dtype, fixed: tuple[float, float] | None) -> None:
    """Of ordinary, tiny, huge and zero rows, and of rows that are not finite; and nothing else is touched."""
    heads, kv_heads, dim, tokens = 2, 3, 48, 40
    paged = Paged(kind, heads, kv_heads, dim)
    paged.attention.fix_scales([None, fixed, None])
    paged.cache = paged.attention.caches(paged.pool)[1]
    qkv = torch.randn(tokens, (heads + 2 * kv_heads), dim) * torch.logspace(-30, 30, tokens)[torch.randperm(tokens), None, None]
    qkv[3] = 0
    qkv[5, 3, 7], qkv[6, 6, 0], qkv[7, 2:] = torch.nan, torch.inf, -torch.inf
    qkv = qkv.to(dtype)
    slots = torch.randperm(64 * 16)[:tokens].int()
    slots[11] = -1
    scales = paged.attention.scales(paged.cache)
    assert scales is not None
    still = torch.tensor([[1.0] * 8 + [0.0] * 8]).repeat(tokens, 1)  # no rotation: what is stored is what came
    args = (qkv.view(tokens, -1), torch.arange(tokens).int(), still, paged.cache.k, paged.cache.v, slots, heads, kv_heads)
    rope_and_cache(*args, scales=scales)
    keep = slots >= 0
    at, other = slots[keep].long(), Paged(kind, heads, kv_heads, dim)
    for index, which in enumerate(("k", "v")):
        rows = qkv[keep, heads + index * kv_heads :][:, :kv_heads]
        _, wanted = encode(rows, kind, None if fixed is None else fixed[index])
        stored = (paged.cache.k_scale, paged.cache.v_scale)[index]
        assert stored is not None
        got = stored[at // 16, :, at % 16]
        assert torch.equal(got.isnan(), wanted.isnan())
        assert bool(got.isnan().any())
        assert torch.equal(got.nan_to_num(), wanted.nan_to_num()), which
        assert float(got[~got.isnan()].min()) > 0
    write_kv(other.cache.k, other.cache.v, qkv[:, heads:-kv_heads], qkv[:, -kv_heads:], slots, other.scales._replace(fixed=fixed))
    end = 2 * 3 * kv_heads * 16 * dim  # codes of all layers; behind them scales, where torch's NaN has other bits
    assert torch.equal(paged.pool[:, :end], other.pool[:, :end])


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "window"), [(8, 4, 32, 0), (12, 4, 64, 0), (5, 1, 80, 50), (71, 1, 16, 0)])
def test_a_row_does_not_know_its_batch_nor_its_chunk(
    kind: str, dtype: torch.dtype, heads: int, kv_heads: int, dim: int, window: int
) -> None:
    """Few rows are widened in registers, many in memory: the same bits."""
    paged = Paged(kind, heads, kv_heads, dim, block=32)
    blocks, _ = paged.sequence(230)
    other, _ = paged.sequence(150)
    q = torch.randn(230, heads, dim).to(dtype)
    whole = paged.attend(q, table([blocks]), [0, 230], [230], window)
    assert not bool(whole.isnan().any())
    torch.set_num_threads(1)
    assert torch.equal(whole, paged.attend(q, table([blocks]), [0, 230], [230], window))
    torch.set_num_threads(2)
    for cuts in ([1, 2, 3, 64, 65, 130, 230], [100, 101, 229, 230], [16, 230]):
        begin = 0
        for end in cuts:
            part = paged.attend(q[begin:end], table([blocks]), [0, end - begin], [end], window)
            assert torch.equal(part, whole[begin:end]), (begin, end)
            begin = end
    mixed = torch.cat((torch.randn(40, heads, dim).to(dtype), q[229:], q[50:90]))
    got = paged.attend(mixed, table([other, blocks, blocks]), [0, 40, 41, 81], [150, 230, 90], window)
    assert torch.equal(got[40], whole[229])
    assert torch.equal(got[41:], whole[50:90])


@pytest.mark.parametrize("kind", KINDS)
def test_a_copied_page_is_the_same_page(kind: str) -> None:
    paged = Paged(kind, 4, 2, 32)
    blocks, _ = paged.sequence(50)
    q = torch.randn(3, 4, 32).bfloat16()
    before = paged.attend(q, table([blocks]), [0, 3], [50])
    elsewhere = [paged.free.pop() for _ in blocks]
    paged.attention.copy(paged.pool, i32([*blocks, -1]), i32([*elsewhere, 0]))
    paged.pool[blocks] = 0xFF
    assert torch.equal(paged.attend(q, table([elsewhere]), [0, 3], [50]), before)


def test_a_pool_of_one_block() -> None:
    paged = Paged("int8", 4, 2, 32, blocks=1)
    blocks, slots = paged.sequence(11)
    q = torch.randn(3, 4, 32)
    got = paged.attend(q, table([blocks]), [0, 3], [11])
    torch.testing.assert_close(got.double(), paged.truth(q, slots, 0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_reference_equals_float64(kind: str) -> None:
    paged = Paged(kind, 4, 2, 32)
    blocks, slots = paged.sequence(70)
    q = torch.randn(9, 4, 32)
    at = (table([blocks]), i32([0, 9]), i32([70]), 32**-0.5, 20, paged.scales)
    got = reference.paged_attention(q, paged.cache.k, paged.cache.v, *at)
    torch.testing.assert_close(got.double(), paged.truth(q, slots, 20), rtol=1e-4, atol=1e-4)


def test_what_does_not_belong_together_is_refused() -> None:
    paged, q = Paged("int8", 4, 2, 32), torch.randn(1, 4, 32)
    blocks, _ = paged.sequence(20)

    def attend(k: Tensor, v: Tensor, scales: Scales | None) -> None:
        paged_attention(q, k, v, table([blocks]), i32([0, 1]), i32([20]), 1.0, scales=scales)

    k, v = paged.cache.k, paged.cache.v
    with pytest.raises(ValueError, match=r"k_cache must be torch\.float32"):
        attend(k, v, None)
    with pytest.raises(ValueError, match="codes must be fp8_e4m3, fp8_e5m2, int8, not int4"):
        attend(k, v, paged.scales._replace(kind="int4"))
    with pytest.raises(ValueError, match="the values' scales must be as far from block to block"):
        attend(k, v, paged.scales._replace(v=paged.scales.v.clone()))
    with pytest.raises(ValueError, match=r"the keys' scales must be torch\.bfloat16"):
        attend(k, v, paged.scales._replace(k=paged.scales.k.float()))
    wide = torch.randn(4, 2, 16, 32)
    with pytest.raises(ValueError, match=r"k_cache must be torch\.uint8"):
        attend(wide, wide, paged.scales)


@pytest.fixture(
    params=[("x86-64", "sse2", "generic"), ("x86-64-v3", "avx2", "avx2"), ("x86-64-v4", "avx512bw", "avx512")], ids=lambda of: of[2]
)
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The library compiled for an instruction set that this machine has."""
    architecture, flag, wanted = request.param
    if native.library() is None or flag not in build.cpu_flags().split():
        pytest.skip("no compiler, or no such CPU")
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "TUNING", ((f"-march={architecture}",),))
    monkeypatch.setattr(build, "FLAGS", ("-O1", *build.FLAGS[1:]))
    bind._load.cache_clear()
    library = native.library()
    assert library is not None
    assert library.isa == wanted
    yield wanted
    bind._load.cache_clear()


@pytest.mark.long
@pytest.mark.usefixtures("instructions")
def test_each_instruction_set(dtype: torch.dtype) -> None:
    for kind in KINDS:
        for shape in SHAPES:
            compare(kind, dtype, *shape)
        test_codes_are_those_of_torch(kind, dtype, None)
        test_a_row_does_not_know_its_batch_nor_its_chunk(kind, dtype, 12, 4, 64, 0)
        test_a_row_does_not_know_its_batch_nor_its_chunk(kind, dtype, 71, 1, 16, 0)
