"""Drafts one after the other: what drafters that have layers of their own share.

What it is: `Chain`, which makes the columns of a drafter's own steps on the model's histories and blocks, and runs them one token after the other. A row ends where its
next block was not given yet. Where columns lie on the host rows that have ended are left out; elsewhere they become padding, so that nothing is looked at.
What it does not know: whose layers they are.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from penstock.core.protocol.columns import Column, i32
from penstock.plugins.devices.rings import Upload
from penstock.plugins.drafters.api import Parts, Proposal, Seen
from penstock.plugins.models.api import Columns

Tensor = torch.Tensor
First = Callable[[Seen, Proposal, Tensor, Tensor, "Tensor | None"], Tensor]
"""(seen, proposal, slots, ends, which rows of the proposal these are or None for all) -> logits."""
Following = Callable[[Seen, Tensor, Tensor, "Tensor | None"], Tensor]
"""(seen, slots, positions, which rows of the step before these are or None for all) -> logits."""
UPLOADS = 12
"""Columns that go up in a step at most, times steps in flight: no launch waits for an earlier copy."""


class Chain:
    """One drafter's."""

    def __init__(self, parts: Parts) -> None:
        self.dtype = parts.dtype
        self.max_tokens = parts.max_tokens
        self._ops = parts.ops
        self._direct = parts.lane.direct
        self._vocab = parts.facts.vocab_size
        self._size = parts.block_size
        self._max_len = parts.max_len
        self._upload = Upload(parts.lane, UPLOADS, 4 * parts.max_rows)
        self._steps = torch.arange(2 * parts.max_rows + 2, dtype=torch.int32, device=parts.lane.device)

    def sent(self, column: Column) -> Tensor:
        """On the device."""
        return self._upload.send(column)[0]

    def ragged(self, seen: Seen, slots: Column, starts: Column, counts: Column) -> Columns:
        """Columns of a step whose numbers the host knows."""
        q_start = np.zeros(len(slots) + 1, np.int32)
        np.cumsum(counts, out=q_start[1:])
        sent = self._upload.send(i32(slots), i32(starts), q_start)
        columns: Columns = self._ops.ragged_inputs(*sent, seen.history, seen.table, self._size, int(q_start[-1]), 0 if self._direct else -1)
        return columns

    def pairs(self, seen: Seen, slots: Tensor, ends: Tensor) -> tuple[Columns, Tensor]:
        """Two tokens a row, the last before `ends`; and which token rows are the last ones."""
        rows = len(slots)
        q_start = self._steps[: 2 * rows + 2 : 2].contiguous()[: rows + 1]
        columns = self._ops.ragged_inputs(slots, ends - 2, q_start, seen.history, seen.table, self._size, 2 * rows, 0)
        return columns, q_start[1:] - 1

    def single(self, seen: Seen, slots: Tensor, positions: Tensor) -> tuple[Columns, Tensor]:
        """One token a row."""
        return self._ops.decode_inputs(slots, positions, seen.history, seen.table, self._size), self._steps[: len(slots)]

    def run(
        self,
        seen: Seen,
        proposal: Proposal,
        out: Tensor,
        first: First,
        following: Following,
        before: int = 1,
    ) -> Column:
        """out [R, K]: `first` gives logits for the token at position `ends`, having computed the position `before` it, `following` computes one position and gives
        those for one `before` it. How many steps each row had, at least; on a device all as many as there are."""
        if self._direct:
            return self._run_here(seen, proposal, out, first, following, before)
        slots = proposal.slots
        for k in range(out.shape[1]):
            positions = proposal.ends + k
            slots = self._alive(seen, slots, positions - before)
            logits = first(seen, proposal, slots, positions, None) if k == 0 else following(seen, slots, positions - before, None)
            tokens = proposal.guess(logits, slots, positions)
            out[:, k] = tokens
            self._ops.write_tokens(slots, positions, tokens, seen.history)
        return i32([out.shape[1]] * len(out))

    def _alive(self, seen: Seen, slots: Tensor, positions: Tensor) -> Tensor:
        """Rows without a place for this position become padding."""
        inside = (slots >= 0) & (positions < self._max_len)
        block = (positions // self._size).clamp_max(seen.table.shape[1] - 1)
        given = seen.table[slots.clamp_min(0).long(), block.long()] >= 0
        return torch.where(inside & given, slots, -1)

    def _run_here(
        self,
        seen: Seen,
        proposal: Proposal,
        out: Tensor,
        first: First,
        following: Following,
        before: int,
    ) -> Column:
        made = np.zeros(len(out), np.int32)
        left = np.arange(len(out))
        every, ends, values = proposal.slots.numpy(), proposal.ends.numpy(), out.numpy()
        table, history = seen.table.numpy(), seen.history.numpy()
        kept = left
        for k in range(out.shape[1]):
            last = ends[left] + np.int32(k - before)
            given = table[every[left], np.minimum(last // self._size, table.shape[1] - 1)] >= 0
            given &= last < self._max_len
            left, kept, last = left[given], kept[given], last[given]
            if not left.size:
                break
            slots, positions = every[left], ends[left] + np.int32(k)
            at = torch.from_numpy(slots), torch.from_numpy(positions)
            where = torch.from_numpy(kept)
            logits = first(seen, proposal, *at, where) if k == 0 else following(seen, at[0], torch.from_numpy(last), where)
            made[left] += 1
            tokens = proposal.guess(logits, *at).numpy()
            values[left, k] = tokens
            fits = (tokens >= 0) & (tokens < self._vocab) & (positions < history.shape[1])
            left, kept = left[fits], np.flatnonzero(fits)
            history[slots[fits], positions[fits]] = tokens[fits]
        return made
