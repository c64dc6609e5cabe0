"""Sampling state of the device's slots, and the draw of one step.

What it is: one column per sampling setting, indexed by slot, so that the work per step does not grow with Python; counts for penalties in
a pool whose rows are only taken by slots that ask; the few settings that are lists (bias, allowed tokens, bad words, minimum length) are
applied row by row to those rows alone. Order: penalties, bias, allowed tokens, bad words, minimum length; then temperature and filters.
Log-probabilities come from the raw logits.
What it does not know: the model, blocks, which request a slot serves.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from penstock.core.protocol.columns import EMPTY_I32, F32, I32, I64, Column
from penstock.core.protocol.messages import LogprobColumns, SlotSampling
from penstock.kernels.argmax import argmax
from penstock.kernels.sampling.api import draw, logprobs, penalise

PENALTY, LISTS, MINIMUM, LOGPROBS, WARM = 1, 2, 4, 8, 16
ADJUSTED = PENALTY | LISTS | MINIMUM
"""Bits of `flags`: needs counts; has bias, allowed tokens or bad words; has stop ids masked until min_tokens; wants log-probabilities; is not
greedy. No bit set: the largest logit, and nothing else."""


class SlotSampler:
    """`history` [slots, max_len] int32 is the runner's token history."""

    def __init__(self, max_num_seqs: int, vocab_size: int, history: Column) -> None:
        self._vocab = vocab_size
        self._history = history
        self._temperature: F32 = np.zeros(max_num_seqs, np.float32)
        self._top_k: I32 = np.zeros(max_num_seqs, np.int32)
        self._top_p: F32 = np.ones(max_num_seqs, np.float32)
        self._min_p: F32 = np.zeros(max_num_seqs, np.float32)
        self._repetition: F32 = np.ones(max_num_seqs, np.float32)
        self._frequency: F32 = np.zeros(max_num_seqs, np.float32)
        self._presence: F32 = np.zeros(max_num_seqs, np.float32)
        self._seed: I64 = np.zeros(max_num_seqs, np.int64)
        self._choice: I32 = np.zeros(max_num_seqs, np.int32)
        self._logprobs: I32 = np.full(max_num_seqs, -1, np.int32)
        self._flags: I32 = np.zeros(max_num_seqs, np.int32)
        self.prompt_len: I32 = np.zeros(max_num_seqs, np.int32)
        self._places: dict[int, SlotSampling] = {}
        self._lists: dict[int, _Lists] = {}
        self._pool_row: I32 = np.full(max_num_seqs, -1, np.int32)
        self._free_rows: list[int] = []
        self._counts = torch.empty(0, vocab_size, dtype=torch.int32)
        self._in_prompt = torch.empty(0, vocab_size, dtype=torch.bool)

    @property
    def nbytes(self) -> int:
        """Bytes of the counts that slots asked for so far."""
        return self._counts.nbytes + self._in_prompt.nbytes

    def place(self, places: Sequence[SlotSampling]) -> None:
        """Sequences enter slots; what was there before is forgotten."""
        for place in places:
            slot, params = place.slot, place.params
            self.clear(slot)
            self._places[slot] = place
            self._temperature[slot] = 0.0 if params.greedy else params.temperature
            self._top_k[slot] = min(max(0, params.top_k), self._vocab)
            self._top_p[slot] = params.top_p
            self._min_p[slot] = params.min_p
            self._repetition[slot] = params.repetition_penalty
            self._frequency[slot] = params.frequency_penalty
            self._presence[slot] = params.presence_penalty
            self._seed[slot] = params.seed or 0
            self._choice[slot] = place.choice
            self._logprobs[slot] = -1 if params.logprobs is None else params.logprobs
            self.prompt_len[slot] = place.prompt_len
            flags = 0
            if params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0:
                flags |= PENALTY
            if params.logit_bias or params.allowed_token_ids is not None or params.bad_words_token_ids:
                flags |= LISTS
                self._lists[slot] = _Lists(place)
            if params.min_tokens > 0 and len(place.stop_ids):
                flags |= MINIMUM
            if params.logprobs is not None:
                flags |= LOGPROBS
            if not params.greedy:
                flags |= WARM
            self._flags[slot] = flags

    def clear(self, slot: int) -> None:
        """Give the slot's state back."""
        self._places.pop(slot, None)
        self._lists.pop(slot, None)
        self._flags[slot] = 0
        row = int(self._pool_row[slot])
        if row >= 0:
            self._pool_row[slot] = -1
            self._free_rows.append(row)

    def sample(self, logits: torch.Tensor, slots: Column, positions: Column) -> tuple[I32, I32, LogprobColumns | None]:
        """logits [R, V] float32 (overwritten) -> (tokens [R], rows whose logits were bad, log-probabilities). Tokens of bad rows are 0."""
        flags = self._flags[slots]
        if not flags.any():
            tokens: I32 = argmax(logits).numpy()
            return tokens, _clear_bad(tokens), None
        raw: torch.Tensor | None = None
        rows = np.flatnonzero(flags & LOGPROBS)
        if rows.size:
            raw = logits[torch.from_numpy(rows)]
        if (flags & ADJUSTED).any():
            self._adjust(logits, slots, positions, flags)
        if (flags & WARM).any():
            tokens = draw(
                logits,
                torch.from_numpy(self._temperature[slots]),
                torch.from_numpy(self._top_k[slots]),
                torch.from_numpy(self._top_p[slots]),
                torch.from_numpy(self._min_p[slots]),
                torch.from_numpy(self._seed[slots]),
                torch.from_numpy(self._choice[slots]),
                torch.from_numpy(np.ascontiguousarray(positions, np.int32)),
            ).numpy()
        else:
            tokens = argmax(logits).numpy()
        bad = _clear_bad(tokens)
        if (flags & PENALTY).any():
            self._count(slots, tokens, flags)
        found = None if raw is None else columns_of(raw, tokens[rows], self._logprobs[slots[rows]], rows, np.asarray(positions)[rows])
        return tokens, bad, found

    def _adjust(self, logits: torch.Tensor, slots: Column, positions: Column, flags: I32) -> None:
        """Penalties, bias and masks, in place, on the rows that have them."""
        rows = np.flatnonzero(flags & PENALTY)
        if rows.size:
            for row in rows:
                if self._pool_row[slots[row]] < 0:
                    self._start_counting(int(slots[row]), int(positions[row]))
            which = torch.from_numpy(rows)
            pool = torch.from_numpy(self._pool_row[slots[rows]].astype(np.int64))
            named = slots[rows]
            logits[which] = penalise(
                logits[which],
                self._counts[pool],
                self._in_prompt[pool],
                torch.from_numpy(self._repetition[named]),
                torch.from_numpy(self._frequency[named]),
                torch.from_numpy(self._presence[named]),
            )
        for row in np.flatnonzero(flags & LISTS):
            self._lists[int(slots[row])].apply(logits[row], self._history[slots[row], : positions[row]])
        for row in np.flatnonzero(flags & MINIMUM):
            place = self._places[int(slots[row])]
            if int(positions[row]) - place.prompt_len < place.params.min_tokens:
                logits[row, torch.from_numpy(np.array(place.stop_ids, np.int64))] = -torch.inf
            else:
                self._flags[slots[row]] &= ~MINIMUM

    def _start_counting(self, slot: int, position: int) -> None:
        """Counts from the slot's history (prompt, and outputs that it brought along) before its first draw here."""
        if not self._free_rows:
            had = self._counts.shape[0]
            grown = max(4, 2 * had)
            self._counts = torch.cat([self._counts, torch.zeros(grown - had, self._vocab, dtype=torch.int32)])
            self._in_prompt = torch.cat([self._in_prompt, torch.zeros(grown - had, self._vocab, dtype=torch.bool)])
            self._free_rows.extend(range(grown - 1, had - 1, -1))
        row = self._free_rows.pop()
        self._pool_row[slot] = row
        split = min(int(self.prompt_len[slot]), position)
        outputs = np.bincount(self._history[slot, split:position], minlength=self._vocab).astype(np.int32)
        self._counts[row] = torch.from_numpy(outputs)
        self._in_prompt[row] = False
        self._in_prompt[row, torch.from_numpy(self._history[slot, :split].astype(np.int64))] = True

    def _count(self, slots: Column, tokens: I32, flags: I32) -> None:
        rows = np.flatnonzero(flags & PENALTY)
        if rows.size:
            pool = torch.from_numpy(self._pool_row[slots[rows]].astype(np.int64))
            self._counts[pool, torch.from_numpy(tokens[rows].astype(np.int64))] += 1


def _clear_bad(tokens: I32) -> I32:
    """Rows whose token is -1; their token becomes 0, so that it may be written to a history."""
    if tokens.min() >= 0:
        return EMPTY_I32
    bad = np.flatnonzero(tokens < 0).astype(np.int32)
    tokens[bad] = 0
    return bad


class _Lists:
    """Bias, allowed tokens and bad words of one slot, as tensors."""

    def __init__(self, place: SlotSampling) -> None:
        params = place.params
        self._bias_ids = torch.tensor(list(params.logit_bias), dtype=torch.int64)
        self._bias = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)
        self._allowed = None if params.allowed_token_ids is None else torch.tensor(params.allowed_token_ids, dtype=torch.int64)
        self._single = torch.tensor(sorted({word[0] for word in params.bad_words_token_ids if len(word) == 1}), dtype=torch.int64)
        self._longer: dict[int, list[tuple[I32, int]]] = {}
        """Token before the last -> (tokens before the last, last): only words that the newest token continues are looked at."""
        for word in params.bad_words_token_ids:
            if len(word) > 1:
                self._longer.setdefault(word[-2], []).append((np.asarray(word[:-1], np.int32), word[-1]))

    def apply(self, logits: torch.Tensor, history: Column) -> None:
        """logits [V], in place."""
        if len(self._bias):
            logits[self._bias_ids] += self._bias
        if self._allowed is not None:
            kept = logits[self._allowed]
            logits.fill_(-torch.inf)
            logits[self._allowed] = kept
        if len(self._single):
            logits[self._single] = -torch.inf
        if self._longer and len(history):
            near = self._longer.get(int(history[-1]), ())
            banned = [last for prefix, last in near if np.array_equal(history[-len(prefix) :], prefix)]
            if banned:
                logits[torch.tensor(banned)] = -torch.inf


def columns_of(raw: torch.Tensor, tokens: Column, wants: Column, rows: Column, positions: Column) -> LogprobColumns:
    """Log-probabilities of raw logits [R, V] at `tokens` [R] and the wants[i] most likely ones, as columns."""
    most = int(wants.max())
    ids, values, ranks = logprobs(raw.contiguous(), torch.from_numpy(tokens.astype(np.int64)), min(most, raw.shape[1]))
    counts = np.minimum(wants, raw.shape[1]).astype(np.int32) + 1
    kept = np.arange(ids.shape[1])[None] < counts[:, None]
    return LogprobColumns(
        rows=rows.astype(np.int32),
        positions=positions.astype(np.int32),
        counts=counts,
        ranks=ranks.numpy().astype(np.int32),
        ids=ids.numpy()[kept].astype(np.int32),
        values=values.numpy()[kept],
    )
