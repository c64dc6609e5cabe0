"""The truth about sampling, one row at a time, in numpy float64.

What it is: the definition that every other implementation is compared with. A row of logits passes, in this order: penalties, bias and
masks, temperature, top-k, top-p, min-p; then Gumbel-max takes one token of the kept set.
Sources: Gumbel-max trick (Gumbel 1954; arXiv 1411.0030); Philox4x32-10 (Salmon et al., SC 2011); nucleus sampling (arXiv 1904.09751);
min-p (arXiv 2407.01082); penalties as OpenAI (frequency, presence) and CTRL (repetition, arXiv 1909.05858) define them.
Filters keep every token whose value is at least a threshold, so equal values stay or go together:
- top-k: the k-th largest value; top-p: the value of the last token of the shortest most-likely-first prefix whose probability,
  renormalised over what top-k kept, reaches p; min-p: log(min_p) below the largest value.
What it does not know: batches, torch, slots.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
U32 = npt.NDArray[np.uint32]

DRAW = 0
"""`purpose` of the noise that chooses an output token. Later uses of randomness take other numbers, so that streams never overlap."""

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


def philox4x32(counter: npt.ArrayLike, key: int, rounds: int = 10) -> U32:
    """Philox4x32: counter [..., 4] of 32-bit words, a 64-bit key (low word first) -> [..., 4] uint32."""
    words = np.asarray(counter, dtype=np.uint64)
    c0, c1, c2, c3 = (words[..., i] for i in range(4))
    k0, k1 = key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(rounds):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ np.uint64(k0), p1 & low, (p0 >> shift) ^ c3 ^ np.uint64(k1), p0 & low
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def gumbel(seed: int, choice: int, position: int, tokens: npt.ArrayLike, purpose: int = DRAW) -> F64:
    """Standard Gumbel noise of the given token ids: key = seed, counter = (choice, position, purpose, token), first output word x,
    u = (x + 1/2) / 2^32, noise = -log(-log(u))."""
    ids = np.asarray(tokens, dtype=np.uint64)
    counter = np.empty((*ids.shape, 4), np.uint64)
    counter[..., 0], counter[..., 1], counter[..., 2], counter[..., 3] = choice, position, purpose, ids
    u = (philox4x32(counter, seed & 0xFFFFFFFFFFFFFFFF)[..., 0].astype(np.float64) + 0.5) * 2.0**-32
    return np.asarray(-np.log(-np.log(u)))


def penalise(
    logits: F64, prompt: npt.ArrayLike, output: npt.ArrayLike, *, repetition: float = 1.0, frequency: float = 0.0, presence: float = 0.0
) -> F64:
    """Repetition looks at prompt and output, frequency and presence at the output only."""
    out = np.array(logits, np.float64)
    counts = np.bincount(np.asarray(output, np.int64), minlength=out.size)
    seen = (counts > 0) | (np.bincount(np.asarray(prompt, np.int64), minlength=out.size) > 0)
    out[seen] = np.where(out[seen] > 0, out[seen] / repetition, out[seen] * repetition)
    return np.asarray(out - frequency * counts - presence * (counts > 0))


def restrict(
    logits: F64, *, bias: dict[int, float] | None = None, allowed: list[int] | None = None, banned: list[int] | None = None
) -> F64:
    """Add `bias`, then keep `allowed` only, then drop `banned`."""
    out = np.array(logits, np.float64)
    for token, value in (bias or {}).items():
        out[token] += value
    if allowed is not None:
        keep = np.zeros(out.size, bool)
        keep[allowed] = True
        out[~keep] = -np.inf
    if banned:
        out[banned] = -np.inf
    return out


def bad_word_ends(history: list[int], bad_words: list[list[int]]) -> list[int]:
    """Tokens that would complete one of the sequences after `history`."""
    return [word[-1] for word in bad_words if len(word) == 1 or history[-(len(word) - 1) :] == word[:-1]]


def softmax(x: F64) -> F64:
    weights = np.exp(x - np.max(x))
    return np.asarray(weights / weights.sum())


def keep_mask(scaled: F64, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> npt.NDArray[Any]:
    """Which tokens the filters keep, of logits already divided by the temperature. top_k <= 0, top_p >= 1, min_p <= 0 are off."""
    x = np.array(scaled, np.float64)
    keep = np.isfinite(x)
    if 0 < top_k < x.size:
        keep &= x >= np.sort(x)[-top_k]
    if top_p < 1:
        masked = np.where(keep, x, -np.inf)
        order = np.argsort(-masked, kind="stable")
        before = np.cumsum(softmax(masked)[order])
        last = int(np.searchsorted(before, top_p, side="left"))
        keep &= x >= masked[order[min(last, int(keep.sum()) - 1)]]
    if min_p > 0:
        keep &= x >= np.max(x) + math.log(min_p)
    return keep


def draw(
    logits: F64,
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    choice: int = 0,
    position: int = 0,
) -> int:
    """One token; temperature 0 takes the largest logit. Of equal scores the lowest id wins."""
    x = np.asarray(logits, np.float64)
    if temperature <= 0:
        return int(np.argmax(x))
    scaled = x / temperature
    kept = np.flatnonzero(keep_mask(scaled, top_k=top_k, top_p=top_p, min_p=min_p))
    return int(kept[np.argmax(scaled[kept] + gumbel(seed, choice, position, kept))])


def log_softmax(logits: F64) -> F64:
    x = np.asarray(logits, np.float64)
    top = x.max()
    return np.asarray(x - top - math.log(np.exp(x - top).sum()))


def rank(logits: F64, token: int) -> int:
    """1-based: one more than the number of tokens with a larger logit."""
    x = np.asarray(logits)
    return int((x > x[token]).sum()) + 1
