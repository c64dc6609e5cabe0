"""Paged attention in Triton against float64, with poisoned memory, any batch, any chunks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from penstock.kernels.attention import triton as kernel

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}


class Case:
    """Sequences of given (rows, length) over a poisoned paged cache; `truth` in float64."""

    def __init__(
        self, shape: list[tuple[int, int]], *, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: str, size: int = 16
    ) -> None:
        self.shape, self.heads, self.kv_heads, self.dim, self.size = shape, heads, kv_heads, dim, size
        self.device = device
        width = max(1, max(-(-length // size) for _, length in shape))
        blocks = sum(-(-length // size) for _, length in shape) + 2
        order = torch.randperm(blocks)
        self.k_cache, self.v_cache = (torch.full((blocks, kv_heads, size, dim), torch.nan, dtype=dtype, device=device) for _ in range(2))
        self.tables = torch.full((len(shape), width), blocks - 1, dtype=torch.int32)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        at = 0
        for row, (_, length) in enumerate(shape):
            count = -(-length // size)
            self.tables[row, :count] = order[at : at + count].int()
            at += count
            position = torch.arange(length)
            slots = self.tables[row].long()[position // size] * size + position % size
            self.keys.append(torch.randn(length, kv_heads, dim).to(dtype))
            self.values.append(torch.randn(length, kv_heads, dim).to(dtype))
            kernel.write_kv(self.k_cache, self.v_cache, self.keys[-1].to(device), self.values[-1].to(device), slots.to(device))
        self.tables = self.tables.to(device)
        starts = torch.tensor([0] + [rows for rows, _ in shape]).cumsum(0)
        self.q_start, self.kv_len = starts.int().to(device), torch.tensor([length for _, length in shape]).int().to(device)
        self.q = torch.randn(int(starts[-1]), heads, dim).to(dtype).to(device)
        self.scale = dim**-0.5

    def truth(self, window: int = 0, softcap: float = 0.0, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        out, lse = torch.zeros(self.q.shape, dtype=torch.float64), torch.full(self.q.shape[:2], -torch.inf, dtype=torch.float64)
        q, at = self.q.cpu().double(), 0
        for (rows, length), keys, values in zip(self.shape, self.keys, self.values, strict=True):
            if length:
                group = self.heads // self.kv_heads
                k, v = (x.double().repeat_interleave(group, 1).transpose(0, 1) for x in (keys, values))
                scores = q[at : at + rows].transpose(0, 1) @ k.transpose(1, 2) * self.scale
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                position, key = torch.arange(length - rows, length)[:, None], torch.arange(length)[None]
                seen = (key <= position) & ((key > position - window) if window else True)
                scores = scores.masked_fill(~seen, -torch.inf)
                if sinks is not None:
                    scores = torch.cat((scores, sinks.cpu().double()[:, None, None].expand(-1, rows, 1)), -1)
                weights = scores.softmax(-1)[..., :length]
                out[at : at + rows] = (weights @ v).transpose(0, 1)
                lse[at : at + rows] = scores.logsumexp(-1).T
            at += rows
        return out, lse

    def empty(self) -> tuple[Tensor, Tensor]:
        return torch.full_like(self.q, torch.nan), torch.full(self.q.shape[:2], torch.nan, device=self.device)


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    got = got.cpu().double()
    assert not got.isnan().any()
    assert (got - want).norm() <= tolerance * want.norm() + 1e-12


RAGGED = [(5, 37), (1, 20), (0, 0), (1, 0), (3, 50)]


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 64), (3, 1, 80), (6, 1, 16)])
def test_ragged(heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: str) -> None:
    case = Case(RAGGED, heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype, device=device)
    out, lse = case.empty()
    kernel.ragged_attention(case.q, case.k_cache, case.v_cache, case.tables, case.q_start, case.kv_len, case.scale, out=out, lse=lse)
    want, want_lse = case.truth()
    close(out, want, TOLERANCE[dtype])
    alive = want_lse.isfinite()
    assert torch.equal(lse.cpu().isfinite(), alive)
    assert (lse.cpu().double() - want_lse)[alive].abs().max() < 2e-3
    again = kernel.ragged_attention(case.q, case.k_cache, case.v_cache, case.tables, case.q_start, case.kv_len, case.scale)
    assert torch.equal(again, out)


@pytest.mark.parametrize(("window", "extras"), [(1, ""), (7, "softcap"), (33, "sinks"), (20, "softcap sinks")])
def test_window_softcap_sinks(window: int, extras: str, device: str) -> None:
    dtype = torch.float16
    case = Case([(1, 70), (1, 3), (6, 41)], heads=2, kv_heads=1, dim=32, dtype=dtype, device=device)
    softcap = 3.0 if "softcap" in extras else 0.0
    sinks = torch.randn(2, device=device) if "sinks" in extras else None
    out, lse = case.empty()
    arguments = (case.q, case.k_cache, case.v_cache, case.tables, case.q_start, case.kv_len, case.scale)
    for used in (0, window):
        want, want_lse = case.truth(used, softcap, sinks)
        for deterministic in (False, True):
            for counters in (None, counters_for(True, 3, device)):
                kernel.paged_attention(
                    *arguments,
                    used,
                    num_decode=2,
                    softcap=softcap,
                    sinks=sinks,
                    out=out,
                    lse=lse,
                    counters=counters,
                    deterministic=deterministic,
                )
                close(out, want, TOLERANCE[dtype])
                assert (lse.cpu().double() - want_lse).abs().max() < 2e-3


def counters_for(fused: bool, cells: int, device: str) -> Tensor | None:
    return torch.zeros(cells, dtype=torch.int32, device=device) if fused else None


@pytest.mark.parametrize(("own", "fused"), [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize("window", [0, 9])
def test_who_decodes_is_known_to_the_device_only(window: int, own: bool, fused: bool, device: str) -> None:
    """num_decode -1: one-row sequences anywhere among the others, empty ones behind them, padding tokens that nobody writes."""
    dtype = torch.float16
    shape = [(1, 70), (5, 38), (1, 1), (1, 129), (20, 20), (1, 16), (0, 0), (0, 0)]
    case = Case(shape, heads=4, kv_heads=2, dim=32, dtype=dtype, device=device)
    rows = case.q.shape[0]
    qkv = torch.full((rows + 7, 8, 32), torch.nan, dtype=dtype, device=device)
    qkv[:rows, :4] = case.q
    at = 0
    for (count, length), keys, values in zip(case.shape, case.keys, case.values, strict=True):
        qkv[at : at + count, 4:6], qkv[at : at + count, 6:] = keys[length - count :].to(device), values[length - count :].to(device)
        at += count
    out = torch.full_like(qkv[:, :4], torch.nan, memory_format=torch.contiguous_format)
    lse = torch.full((len(qkv), 4), torch.nan, device=device)
    workspace = torch.full((kernel.workspace_elements(len(shape), 4, 32),), torch.nan, device=device)
    extras = {"new_k": qkv[:, 4:6], "new_v": qkv[:, 6:]} if own else {}
    kernel.paged_attention(
        qkv[:, :4], case.k_cache, case.v_cache, case.tables, case.q_start, case.kv_len, case.scale, window, num_decode=-1, out=out, lse=lse,
        workspace=workspace, counters=(counters := counters_for(fused, 16, device)), **extras,
    )  # fmt: skip
    assert counters is None or (counters == 0).all()
    want, want_lse = case.truth(window)
    close(out[:rows], want, TOLERANCE[dtype])
    assert (lse[:rows].cpu().double() - want_lse).abs().max() < 2e-3
    assert out[rows:].isnan().all()
    assert lse[rows:].isnan().all()
    alone = kernel.decode_attention(
        case.q[7:8],
        case.k_cache,
        case.v_cache,
        case.tables[3:4],
        case.kv_len[3:4],
        case.scale,
        window,
        workspace=workspace,
        counters=counters,
    )
    assert torch.equal(alone[0], out[7])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "size"), [(4, 2, 64, 16), (5, 1, 80, 64), (3, 3, 16, 32)])
def test_decode(heads: int, kv_heads: int, dim: int, size: int, fused: bool, dtype: torch.dtype, device: str) -> None:
    lengths = [1, 16, 33, 64, 0, 129]
    case = Case([(1, n) for n in lengths], heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype, device=device, size=size)
    out, lse = case.empty()
    workspace = torch.full((kernel.workspace_elements(len(lengths), heads, dim),), torch.nan, device=device)
    arguments = (case.k_cache, case.v_cache, case.tables, case.kv_len, case.scale)
    counters = counters_for(fused, len(lengths) * kv_heads, device)
    for _ in range(2):
        kernel.decode_attention(case.q, *arguments, out=out, lse=lse, workspace=workspace, counters=counters)
        assert counters is None or (counters == 0).all()
    want, want_lse = case.truth()
    close(out, want, TOLERANCE[dtype])
    alive = want_lse.isfinite()
    assert (lse.cpu().double() - want_lse)[alive].abs().max() < 2e-3
    assert (out[4] == 0).all()
    assert (lse[4] == -torch.inf).all()
    for row in (1, 5):  # alone and through a table of slots: the same bits
        rows = torch.tensor([row], dtype=torch.int32, device=device)
        alone = kernel.decode_attention(
            case.q[row : row + 1],
            case.k_cache,
            case.v_cache,
            case.tables,
            case.kv_len[row : row + 1],
            case.scale,
            table_rows=rows,
            counters=counters,
        )
        assert torch.equal(alone[0], out[row])


@pytest.mark.parametrize("window", [0, 70])
def test_decode_rows_fold_the_segments_that_chunks_fold(window: int, device: str) -> None:
    """Deterministic mode: sequences of up to four segments, all rows at once, one row each in the split kernel, and as the device sorts them."""
    size = kernel.SEGMENT
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shape = [(1, 3 * size + 5), (1, size), (1, size + 1), (1, 3), (0, 0), (1, 2 * size)]
    case = Case(shape, heads=4, kv_heads=2, dim=32, dtype=dtype, device=device)
    case.tables = torch.nn.functional.pad(case.tables, (0, 40), value=0)  # a server's table is wider than its sequences: empty segments
    sinks = torch.randn(4, device=device)
    arguments = (case.q, case.k_cache, case.v_cache, case.tables, case.q_start, case.kv_len, case.scale, window)
    assert kernel.segment_of(case.tables.shape[1] * 16) == size
    want, want_lse = case.truth(window, sinks=sinks)
    workspace = torch.full((kernel.workspace_elements(len(shape), 4, 32, deterministic=True),), torch.nan, device=device)
    found = []
    for decodes in (0, 4, -1):
        out, lse = case.empty()
        kernel.paged_attention(*arguments, num_decode=decodes, sinks=sinks, out=out, lse=lse, workspace=workspace, deterministic=True)
        close(out, want, TOLERANCE[dtype])
        assert (lse.cpu().double() - want_lse).abs().max() < 2e-3
        found.append((out, lse))
    for out, lse in found[1:]:
        assert torch.equal(out, found[0][0])
        assert torch.equal(lse, found[0][1])


def test_segments_are_few_enough_and_never_smaller_than_the_least() -> None:
    for longest in (1, 64, 1000, 4097, 8192, 131_072, 131_088, 1_000_000):
        segment = kernel.segment_of(longest)
        assert segment >= kernel.SEGMENT
        assert segment & (segment - 1) == 0
        assert -(-longest // segment) <= kernel.SEGMENTS
    for longest in (32 * kernel.SEGMENT, 128 * kernel.SEGMENT):
        assert kernel.segment_of(longest + 16) == kernel.segment_of(longest) == longest // 32


def test_rows_do_not_depend_on_batch_or_chunks(device: str) -> None:
    """A token gets the same bits whole, chunked, and as a decode row: deterministic mode rests on this."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    case = Case([(75, 75), (4, 50)], heads=2, kv_heads=1, dim=32, dtype=dtype, device=device)
    arguments = (case.q, case.k_cache, case.v_cache, case.tables, case.q_start, case.kv_len, case.scale)
    whole = kernel.ragged_attention(*arguments, deterministic=True)
    parts = []
    for first, last in ((0, 1), (1, 20), (20, 21), (21, 64), (64, 75)):
        start = torch.tensor([0, last - first], dtype=torch.int32, device=device)
        length = torch.tensor([last], dtype=torch.int32, device=device)
        parts.append(
            kernel.paged_attention(
                case.q[first:last], case.k_cache, case.v_cache, case.tables[:1], start, length, case.scale, num_decode=int(last - first == 1),
                deterministic=True,
            )
        )  # fmt: skip
    assert torch.equal(torch.cat(parts), whole[:75])


@pytest.mark.parametrize("window", [0, 9])
def test_this_steps_keys_from_a_dense_tensor(window: int, device: str) -> None:
    """With new_k and new_v: what lies before the step comes from the pages, the rest from the step's own tensors, strided as in qkv."""
    dtype = torch.float16
    case = Case([(1, 20), (5, 38), (40, 40), (0, 0), (3, 35)], heads=4, kv_heads=2, dim=32, dtype=dtype, device=device)
    qkv = torch.full((case.q.shape[0] + 3, 8, 32), torch.nan, dtype=dtype, device=device)
    at = 0
    for (rows, length), keys, values in zip(case.shape, case.keys, case.values, strict=True):
        qkv[at : at + rows, 4:6], qkv[at : at + rows, 6:] = keys[length - rows :].to(device), values[length - rows :].to(device)
        at += rows
    qkv[: case.q.shape[0], :4] = case.q
    out, lse = torch.full_like(qkv[:, :4], torch.nan, memory_format=torch.contiguous_format), torch.empty(len(qkv), 4, device=device)
    kernel.paged_attention(
        qkv[:, :4], case.k_cache, case.v_cache, case.tables, case.q_start, case.kv_len, case.scale, window, num_decode=1, out=out, lse=lse,
        new_k=qkv[:, 4:6], new_v=qkv[:, 6:],
    )  # fmt: skip
    want, want_lse = case.truth(window)
    rows = case.q.shape[0]
    close(out[:rows], want, TOLERANCE[dtype])
    assert (lse[:rows].cpu().double() - want_lse).abs().max() < 2e-3
    assert out[rows:].isnan().all()


def test_strided_q_padding_tokens_and_pool_slices(device: str) -> None:
    case = Case([(1, 40), (6, 22)], heads=4, kv_heads=2, dim=32, dtype=torch.float16, device=device)
    pool = torch.full((2, *case.k_cache.shape), torch.nan, dtype=torch.float16, device=device).transpose(0, 1)
    pool[:, 0], pool[:, 1] = case.k_cache, case.v_cache
    wide = torch.full((10, 8, 32), torch.nan, dtype=torch.float16, device=device)
    wide[:7, :4] = case.q
    out = torch.full((10, 4, 32), 7.0, dtype=torch.float16, device=device)
    kernel.paged_attention(wide[:, :4], pool[:, 0], pool[:, 1], case.tables, case.q_start, case.kv_len, case.scale, num_decode=1, out=out)
    close(out[:7], case.truth()[0], TOLERANCE[torch.float16])
    assert (out[7:] == 7).all()


def test_merge(device: str) -> None:
    case = Case([(3, 60), (2, 33)], heads=2, kv_heads=1, dim=32, dtype=torch.float32, device=device)
    want, want_lse = case.truth()
    parts = []
    for low, high in ((0, 32), (32, 60)):
        part = Case([(3, 60), (2, 33)], heads=2, kv_heads=1, dim=32, dtype=torch.float32, device=device)
        part.q, outs, lses, at = case.q, [], [], 0
        for (rows, length), keys, values in zip(case.shape, case.keys, case.values, strict=True):
            q = case.q[at : at + rows].cpu().double().transpose(0, 1)
            position, key = torch.arange(length - rows, length)[:, None], torch.arange(length)[None]
            seen = (key <= position) & (key >= low) & (key < high)
            scores = (q @ keys.double().repeat_interleave(2, 1).transpose(0, 1).transpose(1, 2) * case.scale).masked_fill(~seen, -torch.inf)
            lse = scores.logsumexp(-1)
            weights = torch.exp(scores - lse[..., None]).nan_to_num(0.0)
            outs.append((weights @ values.double().repeat_interleave(2, 1).transpose(0, 1)).transpose(0, 1))
            lses.append(lse.T)
            at += rows
        parts += [torch.cat(outs).float().to(device).contiguous(), torch.cat(lses).float().to(device).contiguous()]
    lse = torch.empty_like(parts[1])
    got = kernel.merge(*parts, lse=lse)
    close(got, want, 1e-5)
    assert (lse.cpu().double() - want_lse).abs().max() < 1e-4
    dead = torch.full_like(parts[1], -torch.inf)
    assert (kernel.merge(torch.zeros_like(parts[0]), dead, torch.zeros_like(parts[0]), dead) == 0).all()


def test_refusals(device: str) -> None:
    case = Case([(1, 4)], heads=2, kv_heads=1, dim=32, dtype=torch.float16, device=device)
    with pytest.raises(ValueError, match="one dtype"):
        kernel.decode_attention(case.q.float(), case.k_cache, case.v_cache, case.tables, case.kv_len, 1.0)
    with pytest.raises(ValueError, match="above 0"):
        kernel.decode_attention(case.q, case.k_cache, case.v_cache, case.tables, case.kv_len, -1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_big(dim: int, dtype: torch.dtype, device: str) -> None:
    shape = [(1, 3000), (1, 1), (1, 777), (700, 1500), (33, 33), (128, 4000)]
    case = Case(shape, heads=16, kv_heads=4, dim=dim, dtype=dtype, device=device)
    for window in (0, 500):
        want, want_lse = case.truth(window)
        results = []
        for deterministic in (False, True):
            out, lse = case.empty()
            kernel.paged_attention(
                case.q, case.k_cache, case.v_cache, case.tables, case.q_start, case.kv_len, case.scale, window, num_decode=3, out=out, lse=lse,
                deterministic=deterministic,
            )  # fmt: skip
            close(out, want, TOLERANCE[dtype])
            assert (lse.cpu().double() - want_lse).abs().max() < 5e-3
            again, _ = case.empty()
            kernel.paged_attention(
                case.q, case.k_cache, case.v_cache, case.tables, case.q_start, case.kv_len, case.scale, window, num_decode=3, out=again,
                lse=lse, deterministic=deterministic,
            )  # fmt: skip
            assert torch.equal(again, out)
            results.append(
                kernel.paged_attention(
                    case.q, case.k_cache, case.v_cache, case.tables, case.q_start, case.kv_len, case.scale, window, num_decode=3,
                    deterministic=deterministic,
                )
            )  # fmt: skip
            close(results[-1], want, TOLERANCE[dtype])
        at = 0
        for row, (rows, length) in enumerate(shape):
            for first, last in ((0, rows), (rows - 1, rows), (0, rows // 2)):  # alone, as a decode row, as an earlier chunk: the same bits
                if last > first:
                    part = kernel.ragged_attention(
                        case.q[at + first : at + last], case.k_cache, case.v_cache, case.tables[row : row + 1],
                        torch.tensor([0, last - first], dtype=torch.int32, device=device),
                        torch.tensor([length - rows + last], dtype=torch.int32, device=device), case.scale, window, deterministic=True,
                    )  # fmt: skip
                    assert torch.equal(part, results[1][at + first : at + last])
            at += rows
        for row in range(3):
            alone = kernel.decode_attention(
                case.q[row : row + 1],
                case.k_cache,
                case.v_cache,
                case.tables[row : row + 1],
                case.kv_len[row : row + 1],
                case.scale,
                window,
            )
            assert torch.equal(alone[0], results[0][row])
    assert math.isfinite(float(want.norm()))
