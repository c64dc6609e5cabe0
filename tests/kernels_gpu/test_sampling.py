"""Device sampling against the float64 definition; penalties, bias, masks, bad words, counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from penstock.kernels.sampling import reference
from penstock.kernels.sampling import torch as portable
from penstock.kernels.sampling import triton as sampling

SETTINGS = [  # temperature, top_k, top_p, min_p
    (0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.7, 5, 1.0, 0.0), (1.3, 0, 0.9, 0.0), (0.8, 20, 0.6, 0.0), (2.0, 0, 1.0, 0.1),
    (1.5, 40, 0.95, 0.02), (1.0, 1, 1.0, 0.0), (1.0, 0, 1e-6, 0.0), (1e-30, 0, 1.0, 0.0), (3.0, 3, 0.5, 0.0), (1.0, 10**6, 0.99, 1.0),
]  # fmt: skip


def columns(rows: list[tuple[float, int, float, float]], device: str) -> tuple[torch.Tensor, ...]:
    kinds = (torch.float32, torch.int32, torch.float32, torch.float32)
    return tuple(torch.tensor([row[i] for row in rows], dtype=kind, device=device) for i, kind in enumerate(kinds))


@pytest.mark.parametrize("vocab", [37, 1100])
def test_draws_are_the_definition(vocab: int, device: str) -> None:
    rows = len(SETTINGS)
    logits = torch.randn(rows, vocab) * 3
    logits[4, ::3] = -torch.inf
    logits[6] = (logits[6] * 2).round() / 2  # ties
    seeds = torch.randint(-(2**62), 2**62, (rows,))
    choices, positions = torch.randint(0, 9, (rows,)).int(), torch.randint(0, 2**17, (rows,)).int()
    settings = columns(SETTINGS, device)
    workspace = torch.full((sampling.workspace_elements(rows, vocab),), torch.nan, dtype=torch.float64, device=device)
    out = torch.full((rows,), -9, dtype=torch.int32, device=device)
    more = (seeds.to(device), choices.to(device))
    sampling.draw(logits.to(device), *settings, *more, positions.to(device), out=out, workspace=workspace)
    for row, (temperature, top_k, top_p, min_p) in enumerate(SETTINGS):
        scaled = logits[row].numpy() if temperature <= 0 else (logits[row] / np.float32(temperature)).numpy()
        if not np.isfinite(scaled.max()):
            temperature = 0.0
        want = reference.draw(
            logits[row].double().numpy() if temperature <= 0 else scaled.astype(np.float64), temperature=min(1.0, temperature), top_k=top_k,
            top_p=float(np.float32(top_p)), min_p=min_p, seed=int(seeds[row]), choice=int(choices[row]), position=int(positions[row]),
        )  # fmt: skip
        assert int(out[row]) == want, SETTINGS[row]
    order = torch.tensor([5, 2, -1, 8], dtype=torch.int32, device=device)  # through slots, in another batch: the same tokens
    kept = order.clamp_min(0).long()
    mixed = sampling.draw(logits.to(device)[kept], *settings, *more, positions.to(device)[kept], slots=order)
    assert mixed.tolist() == [int(out[5]), int(out[2]), -1, int(out[8])]


def test_bad_rows(device: str) -> None:
    logits = torch.randn(4, 50)
    logits[0] = -torch.inf
    logits[1, 3] = torch.nan
    logits[2, 4] = torch.inf
    settings = columns([(1.0, 3, 0.9, 0.1)] * 4, device)
    zeros = torch.zeros(4, dtype=torch.int32, device=device)
    got = sampling.draw(logits.to(device), *settings, torch.zeros(4, dtype=torch.int64, device=device), zeros, zeros)
    assert got[:3].tolist() == [-1, -1, -1]
    assert int(got[3]) >= 0


def test_philox_known_answers(device: str) -> None:
    """Random123's vectors reach the kernel through the portable version, which other tests compare with them."""
    tokens = torch.randint(0, 2**31 - 1, (64,))
    logits = torch.zeros(1, 64)
    for seed, choice, position in ((0, 0, 0), (-1, 5, 2**31 - 1), (0x243F6A8885A308D3 - 2**63, 3, 77)):
        one = [torch.full((64,), value, dtype=torch.int64) for value in (choice, position, seed)]
        words = portable.philox_word(one[0], one[1], reference.DRAW, torch.arange(64), one[2])
        settings = columns([(1.0, 0, 1.0, 0.0)], device)
        args = [
            torch.tensor([value], dtype=kind, device=device)
            for value, kind in ((seed, torch.int64), (choice, torch.int32), (position, torch.int32))
        ]
        assert int(sampling.draw(logits.to(device), *settings, *args)) == int(words.argmax())
    assert tokens.numel() == 64


def test_penalties_and_counts(device: str) -> None:
    vocab, history = 90, torch.randint(0, 90, (3, 24), dtype=torch.int32)
    counts = torch.full((4, vocab), 77, dtype=torch.int32, device=device)
    in_prompt = torch.ones(4, vocab, dtype=torch.bool, device=device)

    def i32(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    sampling.start_counts(counts, in_prompt, i32(2, 0), history.to(device), i32(1, 2), i32(10, 0), i32(20, 7))
    sampling.count_(counts, i32(2, -1, 2, 0), i32(int(history[1, 12]), 5, 88, -1))
    want = torch.bincount(history[1, 10:20], minlength=vocab)
    want[int(history[1, 12])] += 1
    want[88] += 1
    assert torch.equal(counts[2].cpu().long(), want)
    assert torch.equal(in_prompt[2].cpu(), torch.bincount(history[1, :10], minlength=vocab) > 0)
    assert not in_prompt[0].any()
    assert (counts[1] == 77).all()
    logits = torch.randn(3, vocab, device=device)
    before = logits.clone()
    settings = [torch.tensor(values, device=device) for values in ([1.0, 1.3, 0.8], [0.0, 0.5, -0.5], [0.1, 0.0, 0.7])]
    sampling.penalise_(logits, i32(2, -1, 0), counts, in_prompt, *settings, slots=i32(1, 0, 2))
    slots = torch.tensor([1, 2])
    rows = portable.penalise(
        before[[0, 2]].cpu(), counts[[2, 0]].cpu(), in_prompt[[2, 0]].cpu(), *(setting.cpu()[slots] for setting in settings)
    )
    assert torch.allclose(logits[[0, 2]].cpu(), rows, atol=1e-6)
    assert torch.equal(logits[1], before[1])


def test_bias_masks_and_bad_words(device: str) -> None:
    def i32(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    logits = torch.randn(3, 70, device=device)
    want = logits.clone()
    sampling.scatter_bias_(logits, i32(0, 2, -1, 2), i32(5, 69, 3, 0), torch.tensor([2.5, -torch.inf, 1.0, -1.0], device=device))
    want[0, 5] += 2.5
    want[2, 69] = -torch.inf
    want[2, 0] -= 1.0
    assert torch.equal(logits, want)
    allowed = torch.rand(2, 70) < 0.5
    bits = torch.nn.functional.pad(allowed, (0, 96 - 70)).view(2, 3, 32).long() << torch.arange(32)
    packed = bits.sum(-1).to(torch.int32).to(device)
    sampling.mask_(logits, packed, i32(1, -1, 0))
    want[0, ~allowed[1].to(device)] = -torch.inf
    want[2, ~allowed[0].to(device)] = -torch.inf
    assert torch.equal(logits, want)
    history = torch.zeros(2, 16, dtype=torch.int32, device=device)
    history[1, 3:6] = i32(7, 8, 9)
    words, starts, sizes = i32(8, 9, 11, 7, 9, 12, 13, 1, 2, 7, 8, 9, 14), i32(0, 3, 6, 7, 0), i32(3, 3, 1, 6, 3)
    logits = torch.zeros(3, 70, device=device)
    sampling.ban_words_(logits, history, i32(1, 1, 0, 1, -1), i32(0, 1, -1), i32(6, 6, 0), words, starts, sizes, 6)
    assert torch.nonzero(logits == -torch.inf).tolist() == [[0, 13], [1, 11]]


@pytest.mark.gpu
def test_big(device: str) -> None:
    rows, vocab = 64, 128256
    logits = (torch.randn(rows, vocab) * 2.5).to(device)
    picks = [SETTINGS[row % len(SETTINGS)] for row in range(rows)]
    settings = columns(picks, device)
    seeds = torch.randint(-(2**62), 2**62, (rows,)).to(device)
    choices, positions = torch.zeros(rows, dtype=torch.int32, device=device), torch.arange(rows, dtype=torch.int32, device=device)
    got = sampling.draw(logits, *settings, seeds, choices, positions)
    want, _ = portable.draw(logits.cpu(), *(s.cpu() for s in settings), seeds.cpu(), choices.cpu(), positions.cpu())
    assert torch.equal(got.cpu().long(), want)
    assert torch.equal(sampling.draw(logits, *settings, seeds, choices, positions), got)
    assert torch.equal(sampling.draw(logits[7:8], *(s[7:8] for s in settings), seeds[7:8], choices[7:8], positions[7:8]), got[7:8])


def test_penalties_of_tokens_that_are_not_counted_yet(device: str) -> None:
    rows, vocab, slots = 5, 70, 3
    history = torch.randint(0, vocab, (slots, 40), dtype=torch.int32, device=device)
    history[1, 10:16] = 7
    counts = torch.randint(0, 2, (2, vocab), dtype=torch.int32, device=device)
    in_prompt = torch.rand(2, vocab, device=device) < 0.2
    where = torch.tensor([1, 1, 1, 0, 2], dtype=torch.int32, device=device)
    pool = torch.tensor([1, 1, 1, 0, -1], dtype=torch.int32, device=device)
    depths = torch.tensor([0, 1, 5, 3, 4], dtype=torch.int32, device=device)
    positions = torch.tensor([11, 12, 16, 20, 20], dtype=torch.int32, device=device)
    settings = [torch.rand(slots, device=device) + 0.5 for _ in range(3)]
    logits = torch.randn(rows, vocab, device=device)
    raw = logits.clone()
    sampling.penalise_(logits, pool, counts, in_prompt, *settings, slots=where, ahead=(depths, positions, history, 5))
    for row in range(rows):
        alone = raw[row : row + 1].clone()
        more = counts.clone()
        for back in range(1, int(depths[row]) + 1):
            more[pool[row], history[where[row], positions[row] - back]] += 1
        sampling.penalise_(alone, pool[row : row + 1], more, in_prompt, *settings, slots=where[row : row + 1])
        assert torch.equal(logits[row], alone[0])
