"""Sampling over a batch of rows in torch, on any device.

What it is: the portable implementation behind api.py. Rows with different settings mix; every row's result depends on that row alone, so
that a sequence draws the same token alone or batched. Noise is made for kept tokens only.
What it does not know: slots, histories, requests.
"""

from __future__ import annotations

import numpy as np
import torch

from penstock.kernels.sampling.reference import DRAW

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


def _mul_hi_lo(constant: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32-bit words of constant * x for x in [0, 2^32) held as int64 (which would overflow: so by halves)."""
    upper = constant * (x >> 16) + ((constant * (x & 0xFFFF)) >> 16)
    return upper >> 16, (constant * x) & _MASK


def philox_word(choice: torch.Tensor, position: torch.Tensor, purpose: int, token: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
    """First output word of Philox4x32-10 (int64 in [0, 2^32)); all arguments int64 tensors of one shape, `seed` the 64-bit key."""
    c0, c1, c2, c3 = choice & _MASK, position & _MASK, torch.full_like(token, purpose), token & _MASK
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        h0, l0 = _mul_hi_lo(_M0, c0)
        h1, l1 = _mul_hi_lo(_M1, c2)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0


def greedy(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [R, V] float32 -> (token ids [R] int64, their logits [R]); the value is not finite if a row is bad."""
    values, tokens = logits.max(dim=-1)
    return tokens, values


def thresholds(scaled: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """The value that a token must reach to be kept, per row [R] float32; see reference.py for the definition of each filter."""
    vocab = scaled.shape[1]
    top = scaled.amax(dim=-1)
    limit = torch.full_like(top, -torch.inf)
    wanted = torch.nonzero((top_k > 0) & (top_k < vocab)).flatten()
    if wanted.numel():
        ks = top_k[wanted].long()
        best = scaled[wanted].topk(int(ks.max()), dim=-1).values
        limit[wanted] = best.gather(1, (ks - 1)[:, None])[:, 0]
    wanted = torch.nonzero(top_p < 1).flatten()
    if wanted.numel():
        ordered = scaled[wanted].sort(dim=-1, descending=True).values
        ordered = ordered.masked_fill(ordered < limit[wanted][:, None], -torch.inf)
        total = torch.softmax(ordered.double(), dim=-1).cumsum(dim=-1)
        kept = torch.isfinite(ordered).sum(dim=-1)
        last = torch.minimum((total < top_p[wanted].double()[:, None]).sum(dim=-1), kept - 1).clamp_min(0)
        limit[wanted] = torch.maximum(limit[wanted], ordered.gather(1, last[:, None])[:, 0])
    wanted = torch.nonzero(min_p > 0).flatten()
    if wanted.numel():
        limit[wanted] = torch.maximum(limit[wanted], top[wanted] + min_p[wanted].log())
    return limit


def mask_(logits: torch.Tensor, mask: torch.Tensor, mask_rows: torch.Tensor) -> None:
    """See api.mask_."""
    words = mask.index_select(0, mask_rows.clamp_min(0).long())
    bits = torch.arange(32, dtype=torch.int32, device=mask.device)
    kept = ((words.unsqueeze(2) >> bits) & 1).view(len(words), -1)[:, : logits.shape[1]].bool()
    logits.masked_fill_(~(kept | (mask_rows < 0).unsqueeze(1)), -torch.inf)


def draw(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    choices: torch.Tensor,
    positions: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens [R] int64, largest logits [R], not finite where the row is bad); see api.draw."""
    best, values = greedy(logits)
    tokens = best.clone()
    hot = torch.nonzero((temperature > 0) & torch.isfinite(values / temperature)).flatten()
    if hot.numel():
        scaled = logits[hot] / temperature[hot][:, None]
        limit = thresholds(scaled, top_k[hot], top_p[hot], min_p[hot])
        row, token = torch.nonzero((scaled >= limit[:, None]) & torch.isfinite(scaled), as_tuple=True)
        source = hot[row]
        word = philox_word(choices[source].long(), positions[source].long(), DRAW, token, seeds[source])
        noise = -torch.log(-torch.log((word.double() + 0.5) * 2.0**-32))
        score = scaled[row, token].double() + noise
        winner = torch.full((hot.numel(),), -torch.inf, dtype=torch.float64, device=logits.device)
        winner.scatter_reduce_(0, row, score, "amax")
        candidates = torch.where(score == winner[row], token, torch.full_like(token, logits.shape[1]))
        chosen = torch.full((hot.numel(),), logits.shape[1], dtype=torch.int64, device=logits.device)
        tokens[hot] = chosen.scatter_reduce_(0, row, candidates, "amin")
    return tokens, values


def penalise(
    logits: torch.Tensor,
    counts: torch.Tensor,
    in_prompt: torch.Tensor,
    repetition: torch.Tensor,
    frequency: torch.Tensor,
    presence: torch.Tensor,
) -> torch.Tensor:
    """logits [R, V], counts [R, V] int32 of output tokens, in_prompt [R, V] bool, settings [R] -> new logits [R, V]."""
    present = counts > 0
    factor = torch.where(present | in_prompt, repetition[:, None], torch.ones_like(repetition)[:, None])
    out = torch.where(logits > 0, logits / factor, logits * factor)
    return out - frequency[:, None] * counts - presence[:, None] * present


def logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, k: int, shown: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Raw logits [R, V] float32 and chosen tokens [R] -> (ids [R, 1 + k] int64, log-probabilities [R, 1 + k] float32, ranks [R] int64): the
    chosen token first, then the k most likely. `shown` [R, V]: the same logits, -inf for those that are not to be among the latter."""
    chosen = logits.gather(1, tokens[:, None])
    if logits.device.type == "cpu":  # torch counts by adding up int64, eight times slower
        ranks = torch.from_numpy(np.count_nonzero(logits.numpy() > chosen.numpy(), axis=1)) + 1
    else:
        ranks = (logits > chosen).sum(dim=-1) + 1
    if k:
        values, ids = (logits if shown is None else shown).topk(k, dim=-1)
        ids, values = torch.cat([tokens[:, None], ids], 1), torch.cat([chosen, values], 1)
    else:
        ids, values = tokens[:, None], chosen
    return ids, values - torch.logsumexp(logits, dim=-1, keepdim=True), ranks
