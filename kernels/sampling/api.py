"""Checked entry of sampling over a batch of rows.

    draw(logits[R, V], temperature[R], top_k[R], top_p[R], min_p[R], seeds[R], choices[R], positions[R]) -> tokens[R]
    penalise(logits[R, V], counts[R, V], in_prompt[R, V], repetition[R], frequency[R], presence[R]) -> logits[R, V]
    logprobs(logits[R, V], tokens[R], k) -> (ids[R, 1 + k], values[R, 1 + k], ranks[R])
    mask_(logits[R, V], mask[Q, ceil(V / 32)], mask_rows[R])

logits: contiguous float32, -inf allowed (masked tokens). Settings: temperature, top_p, min_p float32; top_k, choices, positions int32; seeds
int64 (the 64-bit Philox key); a temperature of 0 is greedy; top_k <= 0, top_p >= 1 and min_p <= 0 are off. A token of -1: the row holds a
NaN or +inf, or nothing above -inf. counts int32, in_prompt bool. Drawn tokens int32; ids, ranks (1-based) int64.
Every row's result depends on that row alone. The definitions are in reference.py.
"""

from __future__ import annotations

import torch

from penstock.kernels import native
from penstock.kernels.checks import require, tensor
from penstock.kernels.native.bind import check
from penstock.kernels.sampling import torch as portable


def draw(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    choices: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """One token per row by Gumbel-max over the kept set; see the module."""
    tensor("logits", logits, (None, None), torch.float32)
    rows = (logits.shape[0],)
    require(logits.shape[1] > 0, "logits must have at least one column")
    for name, value in (("temperature", temperature), ("top_p", top_p), ("min_p", min_p)):
        tensor(name, value, rows, torch.float32)
    for name, value in (("top_k", top_k), ("choices", choices), ("positions", positions)):
        tensor(name, value, rows, torch.int32)
    tensor("seeds", seeds, rows, torch.int64)
    out = torch.empty(logits.shape[0], dtype=torch.int32)
    lib = native.library()
    if lib is None:
        tokens, values = portable.draw(logits, temperature, top_k, top_p, min_p, seeds, choices, positions)
        return out.copy_(tokens.masked_fill_(~torch.isfinite(values), -1))
    settings = (temperature, top_k, top_p, min_p, seeds, choices, positions)
    code = lib.lib.ps_draw(
        logits.data_ptr(), *logits.shape, *(value.data_ptr() for value in settings), out.data_ptr(), torch.get_num_threads()
    )
    if code:
        raise MemoryError("no scratch memory for sampling")
    return out


def penalise(
    logits: torch.Tensor,
    counts: torch.Tensor,
    in_prompt: torch.Tensor,
    repetition: torch.Tensor,
    frequency: torch.Tensor,
    presence: torch.Tensor,
) -> torch.Tensor:
    """New logits; see reference.penalise for the formulas."""
    tensor("logits", logits, (None, None), torch.float32)
    tensor("counts", counts, logits.shape, torch.int32)
    tensor("in_prompt", in_prompt, logits.shape, torch.bool)
    for name, value in (("repetition", repetition), ("frequency", frequency), ("presence", presence)):
        tensor(name, value, (logits.shape[0],), torch.float32)
    return portable.penalise(logits, counts, in_prompt, repetition, frequency, presence)


def mask_(logits: torch.Tensor, mask: torch.Tensor, mask_rows: torch.Tensor) -> None:
    """In place: row r keeps the tokens t whose bit t % 32 of word t // 32 in mask[mask_rows[r]] (int32) is 1, the others become -inf; below 0: untouched.
    Raises IndexError for a row that names no mask."""
    tensor("logits", logits, (None, None), torch.float32)
    tensor("mask", mask, (None, -(-logits.shape[1] // 32)), torch.int32)
    tensor("mask_rows", mask_rows, (logits.shape[0],), torch.int32)
    lib = native.library()
    if lib is None:
        portable.mask_(logits, mask, mask_rows)
        return
    check(lib.lib.ps_mask(logits.data_ptr(), *logits.shape, mask.data_ptr(), len(mask), mask_rows.data_ptr(), torch.get_num_threads()))


def logprobs(logits: torch.Tensor, tokens: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The chosen token first, then the k most likely; from raw logits."""
    tensor("logits", logits, (None, None), torch.float32)
    tensor("tokens", tokens, (logits.shape[0],), torch.int64)
    require(0 <= k <= logits.shape[1], "k must be between 0 and the vocabulary's size")
    return portable.logprobs(logits, tokens, k)
