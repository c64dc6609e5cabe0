"""A loaded model on the CPU: slots, paged cache, and the two halves of a step.

What it is: the Runner of core/contract/devices.py. Token history and block table of each slot are numpy arrays; a step's index columns (token
values, positions, cache slots) are computed from them by vectorised numpy, then the model runs as one call, and the draw writes tokens back.
`forward` keeps one hidden state a row; where Sample asks for prompt log-probabilities the row is computed again with all its positions
kept (the same values are written to the cache again), so that other steps never pay for them.
`--deterministic`: the native kernels compute every row by a fixed chain of operations whatever else is in the step, so the same path serves
both modes; the flag adds a self-test at warm-up that compares alone, batched, chunked and shared-block runs bit by bit on this machine.
What it does not know: requests, scheduling, which attention backend or model family it drives.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from penstock.core.contract.devices import MemoryTable, ModelFacts, refuse_columns
from penstock.core.protocol.columns import EMPTY_I32, I32
from penstock.core.protocol.errors import EngineFailure
from penstock.core.protocol.messages import Forward, LogprobColumns, Sample, StepDone
from penstock.plugins.devices.slot_sampler import SlotSampler, columns_of
from penstock.plugins.models.api import Model

PROMPT_LOGIT_ELEMENTS = 1 << 23
"""Prompt log-probabilities are computed for at most this many logits at a time (32 MiB of float32)."""


class CpuRunner:
    """See core/contract/devices.py: Runner. Not thread-safe: all calls come from the device's thread."""

    def __init__(
        self,
        *,
        facts: ModelFacts,
        model: Model,
        pool: torch.Tensor,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        dtype: str,
        attention: str,
        deterministic: bool,
        fingerprint: str,
        kv_layout: str,
        memory: Callable[[int], MemoryTable],
    ) -> None:
        self.facts = facts
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.dtype = dtype
        self.attention = attention
        self.deterministic = deterministic
        self.fingerprint = fingerprint
        self.kv_layout = kv_layout
        self._model = model
        self._pool = pool
        self._program = model.bind(pool)
        self._width = -(-max_model_len // block_size) + 1  # a planner may reserve for one token more than is ever computed
        # one column more than is ever computed: a full context still draws a token, which nothing reads back
        self.history: I32 = np.zeros((max_num_seqs, max_model_len + 1), np.int32)
        self.block_table: I32 = np.full((max_num_seqs, self._width), -1, np.int32)
        self.sampler = SlotSampler(max_num_seqs, facts.vocab_size, self.history)
        self._hidden = torch.empty(max_num_seqs, facts.hidden_size, dtype=pool.dtype)
        self._logits = torch.empty(max_num_seqs, facts.vocab_size, dtype=torch.float32)
        self._range: I32 = np.arange(max(max_num_seqs, max_num_batched_tokens) + 1, dtype=np.int32)
        self._shift, self._mask = block_size.bit_length() - 1, block_size - 1
        self._rows = 0
        self._last: Forward | None = None
        self._started_ns = 0
        self.memory = memory(self.history.nbytes + self.block_table.nbytes + self._hidden.nbytes + self._logits.nbytes)

    # ------------------------------------------------------------------ forward

    def forward(self, work: Forward) -> None:
        """See Runner.forward. Raises EngineFailure if a row names a block that its slot does not hold, or a token that does not exist."""
        refuse_columns(work)
        self._started_ns = time.monotonic_ns()
        if len(work.copy_src):
            source, target = torch.from_numpy(work.copy_src.astype(np.int64)), torch.from_numpy(work.copy_dst.astype(np.int64))
            for layer in self._pool:
                layer[:, target] = layer[:, source]
        if len(work.place_slots):
            self._place(work)
        if len(work.block_slots):
            self.block_table[work.block_slots, work.block_index] = work.block_ids
        rows = len(work.slots)
        if rows > self._hidden.shape[0]:
            self._hidden = torch.empty(rows, self.facts.hidden_size, dtype=self._pool.dtype)
        self._rows = rows
        self._last = work
        if rows:
            self._step(work.slots, work.starts, work.counts, work.num_decode == rows, self._hidden[:rows])

    def _place(self, work: Forward) -> None:
        at = 0
        for slot, count in zip(work.place_slots.tolist(), work.place_counts.tolist(), strict=True):
            self.history[slot, :count] = work.place_tokens[at : at + count]
            self.block_table[slot] = -1
            self.sampler.clear(slot)
            at += count

    def _step(self, slots: I32, starts: I32, counts: I32, decode: bool, hidden: torch.Tensor) -> None:
        """Compute tokens [starts, starts + counts) of `slots`. hidden: one row for each sequence's last token, or for every token."""
        rows = len(slots)
        if decode:
            ends = starts + 1
            q_start = self._range[: rows + 1]
            tokens = self.history[slots, starts]
            positions = np.ascontiguousarray(starts)
            last = self._range[:rows]
            owner = slots
        else:
            ends = starts + counts
            q_start = np.zeros(rows + 1, np.int32)
            np.cumsum(counts, out=q_start[1:])
            owner = np.repeat(slots, counts)
            positions = self._range[: q_start[-1]] + np.repeat(starts - q_start[:-1], counts)
            tokens = self.history[owner, positions]
            last = q_start[1:] - 1 if hidden.shape[0] == rows else self._range[: q_start[-1]]
        shift = self._shift
        table = self.block_table[slots, : (int(ends.max()) + self._mask) >> shift]
        cache_slots = (self.block_table[owner, positions >> shift] << shift) + (positions & self._mask)
        as_tensor = torch.from_numpy
        try:
            self._program(
                as_tensor(tokens),
                as_tensor(positions),
                as_tensor(cache_slots),
                as_tensor(table),
                as_tensor(q_start),
                as_tensor(ends),
                as_tensor(last),
                hidden=hidden,
            )
        except IndexError as error:  # a block that was never given (-1), a token outside the vocabulary
            raise EngineFailure(f"A step names what does not exist: {error}.") from error

    # ------------------------------------------------------------------ sample

    def sample(self, work: Sample) -> Callable[[], StepDone]:
        """See Runner.sample: everything is done when this returns; the returned call only hands it over."""
        refuse_columns(work)
        if work.places:
            self.sampler.place(work.places)
        prompt = self._prompt_logprobs(work) if len(work.prompt_rows) else None
        rows = len(work.rows)
        tokens, bad, found = EMPTY_I32, EMPTY_I32, None
        if rows:
            hidden = self._hidden[: self._rows]
            if rows != self._rows or work.rows.tobytes() != self._range[:rows].tobytes():
                hidden = hidden[torch.from_numpy(work.rows.astype(np.int64))]
            if rows > self._logits.shape[0]:
                self._logits = torch.empty(rows, self.facts.vocab_size, dtype=torch.float32)
            logits = self._model.logits(hidden, self._logits[:rows])
            tokens, bad, found = self.sampler.sample(logits, work.slots, work.positions)
            self.history[work.slots, work.positions] = tokens
        done = StepDone(
            engine=work.engine,
            epoch=work.epoch,
            step=work.step,
            slots=work.slots,
            tokens=tokens,
            started_ns=self._started_ns,
            finished_ns=time.monotonic_ns(),
            logprobs=found,
            prompt_logprobs=prompt,
            bad_rows=bad,
        )
        return lambda: done

    def _prompt_logprobs(self, work: Sample) -> LogprobColumns:
        """Log-probabilities of the prompt tokens that the last Forward's rows predict, a bounded number of logits at a time."""
        assert self._last is not None
        chunk = max(1, PROMPT_LOGIT_ELEMENTS // self.facts.vocab_size)
        parts: list[LogprobColumns] = []
        for index, (row, k) in enumerate(zip(work.prompt_rows.tolist(), work.prompt_topk.tolist(), strict=True)):
            slot, start, count = (int(column[row]) for column in (self._last.slots, self._last.starts, self._last.counts))
            count = min(count, int(self.sampler.prompt_len[slot]) - 1 - start)
            if count <= 0:
                continue
            hidden = torch.empty(count, self.facts.hidden_size, dtype=self._pool.dtype)
            if count == 1 and int(self._last.counts[row]) == 1:
                hidden.copy_(self._hidden[row : row + 1])
            else:
                one = self._range[:1]
                self._step(one + slot, one + start, one + count, False, hidden)
            for first in range(0, count, chunk):
                last = min(count, first + chunk)
                logits = self._model.logits(hidden[first:last], torch.empty(last - first, self.facts.vocab_size))
                at = self._range[first + 1 : last + 1] + start
                wants = np.full(last - first, k, np.int32)
                parts.append(columns_of(logits, self.history[slot, at], wants, np.full(last - first, index, np.int32), at))
        fields = ("rows", "positions", "counts", "ranks", "ids", "values")
        return (
            LogprobColumns(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in fields})
            if parts
            else LogprobColumns()
        )

    # ------------------------------------------------------------------ life

    def warm_up(self, progress: Callable[[str], None]) -> None:
        """Touch a decode step of one row and of a full batch, and a prefill chunk; then, if asked for, the deterministic self-test."""
        from penstock.plugins.devices.self_test import self_test, touch

        touch(self, progress)
        if self.deterministic:
            self_test(self, progress)

    def close(self) -> None:
        """Nothing outlives the runner."""
        self._last = None
