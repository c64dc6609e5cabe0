"""Paged attention over a cache in 8 bits against float64: all kinds, odd shapes, poisoned memory, the same bits for every chunk in deterministic mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from penstock.core.contract.devices import ModelFacts
from penstock.kernels.attention import coded
from penstock.kernels.attention import triton as kernel
from penstock.kernels.attention.codes import KINDS, LARGEST, decode, encode
from penstock.kernels.rope import triton as rope
from penstock.plugins.attention.pages import Cache, Pages

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 5e-3}
"""Beside what the codes say: probabilities and queries of some eight bits, as in bfloat16."""


def cache_of(kind: str, heads: int, dim: int, blocks: int, device: str, size: int = 16) -> tuple[Cache, coded.Codes]:
    """The second layer of three, in pages full of NaN, but that its codes are numbers, as in any pool: the largest ones."""
    facts = ModelFacts(
        architecture="x", model_type="x", vocab_size=9, hidden_size=9, intermediate_size=9, num_layers=3, num_heads=heads, num_kv_heads=heads,
        head_dim=dim, max_position=99,
    )  # fmt: skip
    pages = Pages(facts, torch.bfloat16, torch.device(device), size, kind)
    cache: Cache = pages.caches(pages.allocate(blocks).fill_(0xFF))[1]
    assert cache.k_scale is not None
    for codes in cache[:2]:
        codes.fill_({"fp8_e4m3": 0x7E, "fp8_e5m2": 0x7B, "int8": 0x7F}[kind])
    return cache, coded.codes_of(kind, cache.k_scale)


SHAPES = [(4, 1, 64, True), (3, 1, 96, False), (2, 2, 32, True), (8, 1, 16, False)]
"""Query and KV heads, dimensions, whether the last piece adds all up."""
if torch.cuda.is_available():  # too much for the interpreter
    SHAPES += [(32, 8, 128, True), (8, 8, 128, False), (16, 2, 256, False)]


class Case:
    """Sequences of given (rows, length); `truth` in float64 of what the codes mean."""

    def __init__(
        self,
        shape: list[tuple[int, int]],
        kind: str,
        *,
        heads: int,
        kv_heads: int,
        dim: int,
        dtype: torch.dtype,
        device: str,
        size: int = 16,
    ) -> None:
        self.shape, self.heads, self.kv_heads, self.scale = shape, heads, kv_heads, dim**-0.5
        width = max(1, max(-(-length // size) for _, length in shape))
        blocks = sum(-(-length // size) for _, length in shape) + 2
        order = torch.randperm(blocks)
        self.cache, self.codes = cache_of(kind, kv_heads, dim, blocks, device, size)
        tables = torch.full((len(shape), width), blocks - 1, dtype=torch.int32)
        self.stored: list[tuple[Tensor, Tensor]] = []
        self.wide: list[tuple[Tensor, Tensor]] = []
        at = 0
        for row, (_, length) in enumerate(shape):
            count = -(-length // size)
            tables[row, :count] = order[at : at + count].int()
            at += count
            position = torch.arange(length)
            slots = (tables[row].long()[position // size] * size + position % size).to(device)
            k, v = ((torch.randn(length, kv_heads, dim) * torch.rand(length, kv_heads, 1).exp()).to(dtype).to(device) for _ in range(2))
            coded.write_kv(self.cache.k, self.cache.v, self.codes, k, v, slots)
            self.wide.append((k, v))
            keys, values = coded.read_kv(self.cache.k, self.cache.v, self.codes, slots)
            self.stored.append((keys.cpu().double(), values.cpu().double()))
        self.tables = tables.to(device)
        starts = torch.tensor([0] + [rows for rows, _ in shape]).cumsum(0)
        self.q_start, self.kv_len = starts.int().to(device), torch.tensor([length for _, length in shape]).int().to(device)
        self.q = torch.randn(int(starts[-1]), heads, dim).to(dtype).to(device)

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.q, self.cache.k, self.cache.v, self.tables, self.q_start, self.kv_len, self.scale

    def truth(self, window: int = 0, softcap: float = 0.0, sinks: Tensor | None = None) -> Tensor:
        out = torch.zeros(self.q.shape, dtype=torch.float64)
        q, at, group = self.q.cpu().double(), 0, self.heads // self.kv_heads
        for (rows, length), pair in zip(self.shape, self.stored, strict=True):
            if length and rows:
                k, v = (x.repeat_interleave(group, 1).transpose(0, 1) for x in pair)
                scores = q[at : at + rows].transpose(0, 1) @ k.transpose(1, 2) * self.scale
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                position, key = torch.arange(length - rows, length)[:, None], torch.arange(length)[None]
                seen = (key <= position) & ((key > position - window) if window else True)
                scores = scores.masked_fill(~seen, -torch.inf)
                if sinks is not None:
                    scores = torch.cat((scores, sinks.cpu().double()[:, None, None].expand(-1, rows, 1)), -1)
                out[at : at + rows] = (scores.softmax(-1)[..., :length] @ v).transpose(0, 1)
            at += rows
        return out


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    got = got.cpu().double()
    assert not got.isnan().any()
    assert (got - want).norm() <= tolerance * want.norm() + 1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fixed", [None, 0.01])
def test_codes(kind: str, fixed: float | None) -> None:
    x = torch.randn(64, 3, 48) * torch.logspace(-9, 6, 64)[:, None, None]
    x[5], x[6, 1, 7], x[7, 2, 3] = 0.0, torch.nan, -torch.inf
    codes, scales = encode(x, kind, fixed)
    back = decode(codes, scales, kind, torch.float64)
    broken = torch.zeros(64, 3, dtype=torch.bool)
    broken[6, 1], broken[7, 2] = True, True
    assert torch.equal(scales.isnan(), broken)
    assert torch.equal(back.isnan(), broken[..., None].expand_as(back))
    assert not back[5].any()
    kept = ~broken & (x.abs().amax(-1) <= 0.01 * LARGEST[kind] if fixed else True)
    step = {"fp8_e4m3": 2**-4, "fp8_e5m2": 2**-3, "int8": 0.0}[kind]
    smallest = {"fp8_e4m3": 2**-10, "fp8_e5m2": 2**-17, "int8": 0.5}[kind]
    bound = torch.maximum(x.abs().double() * step, scales.double()[..., None] * smallest * 1.001)
    assert bool(((back - x).abs() <= bound)[kept].all())
    if fixed:
        over = ~broken & ~(x.abs().amax(-1) <= 0.01 * LARGEST[kind])
        assert bool((back.abs().amax(-1)[over] <= float(scales[0, 0]) * LARGEST[kind]).all())
    else:  # the largest element uses what there is, and scales were rounded up
        assert bool((back.abs().amax(-1)[kept] >= x.abs().amax(-1)[kept] * 0.92).all())
        assert bool((scales.double() * LARGEST[kind] * (1 + 1e-6) >= x.abs().amax(-1).double())[~broken].all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 64), (3, 1, 80), (8, 1, 16)])
def test_ragged(kind: str, heads: int, kv_heads: int, dim: int, device: str) -> None:
    dtype = torch.bfloat16
    case = Case([(5, 37), (1, 20), (0, 0), (3, 50)], kind, heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype, device=device)
    out = torch.full_like(case.q, torch.nan)
    kernel.ragged_attention(*case.arguments, out=out, codes=case.codes)
    close(out, case.truth(), TOLERANCE[dtype])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "fused"), SHAPES)
def test_decode(kind: str, heads: int, kv_heads: int, dim: int, fused: bool, dtype: torch.dtype, device: str) -> None:
    if dtype == torch.float32:
        dtype = torch.float16
    case = Case([(1, 1), (1, 131), (1, 77)], kind, heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype, device=device)
    out = torch.full_like(case.q, torch.nan)
    counters = torch.zeros(3 * kv_heads, dtype=torch.int32, device=device) if fused else None
    at = (case.q, case.cache.k, case.cache.v, case.tables, case.kv_len, case.scale)
    for config in (None, {"BLOCK_N": 32, "SPLITS": 4, "MIN_SPLIT": 32, "num_warps": 4, "num_stages": 2}):
        kernel.decode_attention(*at, out=out, counters=counters, codes=case.codes, config=config)
        close(out, case.truth(), TOLERANCE[dtype])
        assert counters is None or not counters.any()


@pytest.mark.parametrize("rows", [coded.MANY_ROWS, coded.MOST_ROWS])
def test_many_rows(rows: int, device: str) -> None:
    """Short ones in one piece, a long one cut, and padding between them."""
    lengths = [0 if row % 7 == 0 else 1 + row * 5 % 40 for row in range(rows)]
    lengths[rows // 2] = 3 * coded.config_of(16, rows)["MIN_SPLIT"] + 9
    shape = [(1, length) for length in lengths]
    case = Case(shape, "fp8_e4m3", heads=4, kv_heads=1, dim=16, dtype=torch.bfloat16, device=device)
    out = torch.full_like(case.q, torch.nan)
    counters = torch.zeros(rows, dtype=torch.int32, device=device)
    kernel.decode_attention(
        case.q, case.cache.k, case.cache.v, case.tables, case.kv_len, case.scale, out=out, codes=case.codes, counters=counters
    )
    close(out, case.truth(), TOLERANCE[torch.bfloat16])
    assert not counters.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sharp", [0.0, 8.0])
def test_decode_with_weights_far_apart(kind: str, sharp: float, device: str) -> None:
    """Alike to the last bit that counts, and so far apart that a block's largest is no measure for another block's."""
    case = Case([(1, 300), (1, 129)], kind, heads=4, kv_heads=2, dim=64, dtype=torch.bfloat16, device=device)
    case.q *= sharp
    out = torch.full_like(case.q, torch.nan)
    kernel.decode_attention(case.q, case.cache.k, case.cache.v, case.tables, case.kv_len, case.scale, out=out, codes=case.codes)
    close(out, case.truth(), TOLERANCE[torch.bfloat16])


def test_pieces_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows are cut into many pieces, and a workspace for many rows has room for fewer."""
    monkeypatch.setattr(coded, "tuned", lambda name: {"BLOCK_N": 128, "TARGET": 64, "MAX_SPLITS": 32})
    pieces = [coded.config_of(128, rows)["SPLITS"] for rows in (1, 2, 3, 8, 16, 64)]
    assert pieces == [32, 32, 16, 8, 4, 4]
    assert coded.config_of(128, 1)["MIN_SPLIT"] == 128
    assert coded.config_of(128, 64)["MIN_SPLIT"] == 512
    room = kernel.workspace_elements(5, 8, 128, codes=True)
    assert all(rows * coded.config_of(128, rows)["SPLITS"] * 8 * 130 <= room for rows in range(1, 6))
    assert kernel.workspace_elements(0, 8, 128, codes=True) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", [0, 1])
def test_who_reads_a_row_that_is_no_number_gets_none(kind: str, which: int, device: str) -> None:
    case = Case([(1, 90), (1, 60)], kind, heads=4, kv_heads=2, dim=32, dtype=torch.bfloat16, device=device)
    case.codes.scales[case.tables[0, 1].long(), 1, 3, which] = torch.nan
    out = kernel.decode_attention(case.q, case.cache.k, case.cache.v, case.tables, case.kv_len, case.scale, codes=case.codes)
    assert out[0, 2:].isnan().all()
    close(out[0, :2], case.truth()[0, :2], TOLERANCE[torch.bfloat16])
    close(out[1], case.truth()[1], TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize(("window", "extras"), [(1, ""), (7, "softcap"), (33, "sinks"), (20, "softcap sinks")])
def test_window_softcap_sinks(window: int, extras: str, device: str) -> None:
    case = Case([(1, 70), (1, 3), (6, 41)], "fp8_e4m3", heads=2, kv_heads=1, dim=32, dtype=torch.bfloat16, device=device, size=32)
    softcap = 3.0 if "softcap" in extras else 0.0
    sinks = torch.randn(2, device=device) if "sinks" in extras else None
    out = torch.full_like(case.q, torch.nan)
    for used in (0, window):
        want = case.truth(used, softcap, sinks)
        for deterministic in (False, True):
            for decode_rows in (2, -1):
                extra: dict[str, Any] = {"softcap": softcap, "sinks": sinks, "deterministic": deterministic, "codes": case.codes}
                kernel.paged_attention(*case.arguments, used, num_decode=decode_rows, out=out, **extra)
                close(out, want, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("kind", KINDS)
def test_this_steps_keys_may_be_wide(kind: str, device: str) -> None:
    shape = [(1, 70), (5, 38), (20, 20)]
    case = Case(shape, kind, heads=4, kv_heads=2, dim=32, dtype=torch.bfloat16, device=device)
    new = [torch.cat([pair[i][length - rows :] for (rows, length), pair in zip(shape, case.wide, strict=True)]) for i in range(2)]
    for row, (rows, length) in enumerate(shape[1:], 1):
        for i in range(2):
            case.stored[row][i][length - rows :] = case.wide[row][i][length - rows :].cpu().double()
    out = kernel.paged_attention(*case.arguments, num_decode=1, new_k=new[0], new_v=new[1], codes=case.codes)
    close(out, case.truth(), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("kind", KINDS)
def test_deterministic_bits(kind: str, device: str) -> None:
    """A position's bits are the same as a decode row, in any chunk, and beside anybody."""
    length = 100
    whole = Case([(length, length)], kind, heads=2, kv_heads=1, dim=32, dtype=torch.bfloat16, device=device)
    extra: dict[str, Any] = {"deterministic": True, "codes": whole.codes}
    want = kernel.paged_attention(*whole.arguments, **extra)
    close(want, whole.truth(), TOLERANCE[torch.bfloat16])
    at = (whole.cache.k, whole.cache.v, whole.tables)
    for first, last in ((0, 40), (40, 77), (77, length)):
        start, ends = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, last - first], [last]))
        assert torch.equal(kernel.paged_attention(whole.q[first:last], *at, start, ends, whole.scale, **extra), want[first:last])
    for position in (0, 63, 64, length - 1):
        start, ends = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 1], [position + 1]))
        one = kernel.paged_attention(whole.q[position : position + 1], *at, start, ends, whole.scale, num_decode=1, **extra)
        assert torch.equal(one[0], want[position])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dim", "rotary", "normed", "fixed"), [(64, 64, False, None), (80, 32, True, None), (16, 16, False, (0.02, 0.5))])
def test_stored_as_the_reference_does(
    kind: str, dim: int, rotary: int, normed: bool, fixed: tuple[float, float] | None, device: str
) -> None:
    """Bit for bit what codes.encode makes of the same rotated keys; a row that is no number stays one's own; nothing else is written."""
    heads, kv_heads, tokens = 4, 2, 9
    cache, codes = cache_of(kind, kv_heads, dim, 3, device)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim, device=device).to(torch.bfloat16)
    qkv.view(tokens, -1, dim)[:, heads:] *= torch.logspace(-4, 3, tokens, device=device)[:, None, None].to(torch.bfloat16)
    qkv.view(tokens, -1, dim)[3, heads] = 0.0
    qkv.view(tokens, -1, dim)[4, heads + 1, 2] = torch.nan
    qkv.view(tokens, -1, dim)[5, -1, 3] = torch.inf
    angle = torch.rand(50, rotary // 2, device=device)
    table = torch.cat((angle.cos(), angle.sin()), 1)
    positions = torch.arange(tokens, dtype=torch.int32, device=device) + 7
    slots = torch.tensor([3, 20, 21, 22, 47, 5, -1, 40, 41], dtype=torch.int32, device=device)
    norms = [torch.randn(dim, device=device).to(torch.bfloat16) if normed else None for _ in range(2)]
    kept = torch.empty(tokens, kv_heads, dim, dtype=torch.bfloat16, device=device)
    rope.rope_and_cache(
        qkv, positions, table, cache.k, cache.v, slots, heads, kv_heads, *norms, k_out=kept, codes=codes, fixed=fixed
    )  # fmt: skip
    other, own = cache_of(kind, kv_heads, dim, 3, device)
    keep = slots >= 0
    at, inside = slots[keep].long() // 16, slots[keep].long() % 16
    other.k[at, :, inside], own.scales[at, :, inside, 0] = encode(kept[keep], kind, fixed and fixed[0])
    values = qkv.view(tokens, -1, dim)[:, -kv_heads:]
    coded.by_dimension(other.v)[at, :, :, inside], own.scales[at, :, inside, 1] = encode(values[keep], kind, fixed and fixed[1])
    for mine, theirs in ((cache.k, other.k), (cache.v, other.v), (codes.scales, own.scales)):
        if mine.dtype == torch.bfloat16:
            assert torch.equal(mine.isnan(), theirs.isnan())
            mine, theirs = mine.nan_to_num(0.0), theirs.nan_to_num(0.0)
        wrong = (mine != theirs).nonzero()
        assert not len(wrong), (wrong[:20].tolist(), mine[mine != theirs][:20].tolist(), theirs[mine != theirs][:20].tolist())
