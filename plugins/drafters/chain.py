"""Drafts one after the other: what drafters that have layers of their own share.

What it is: `Chain`, which makes the columns of a drafter's own steps on the model's histories and blocks, and runs them one token after the other. A row ends where its
next block was not given yet. Where columns lie on the host rows that have ended are left out; elsewhere they become padding, so that nothing is looked at, and
a step is a graph: one for each number of rows (rounded up) replays for every token.
What it does not know: whose layers they are.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from penstock.core.protocol.columns import Column, i32
from penstock.plugins.devices.lane import Graph, Outputs
from penstock.plugins.devices.rings import Upload
from penstock.plugins.drafters.api import Parts, Proposal, Seen
from penstock.plugins.models.api import Columns

Tensor = torch.Tensor
First = Callable[[Seen, Proposal, Tensor, Tensor, "Tensor | None"], Tensor]
"""(seen, proposal, slots, ends, which rows of the proposal these are or None for all) -> logits."""
Following = Callable[[Seen, Tensor, Tensor, "Tensor | None"], Tensor]
"""(seen, slots, positions, which rows of the step before these are or None for all) -> logits."""
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Rows of a graph."""
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
        self._lane = parts.lane
        self._sizes = [size for size in SIZES if size <= parts.max_rows] if parts.graphs else []
        self._graphs: dict[tuple[int, bool, bool], Graph] = {}
        """(rows, whether somebody is not greedy, whether it is the first step)."""
        # What graphs read and write: slots, the positions that are drafted for, tokens.
        self._slots, self._ends, self._tokens = torch.zeros(3, parts.max_rows, dtype=torch.int32, device=parts.lane.device).unbind()

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
        if not self._direct:  # a row a token, which attention may split over its keys
            each, starts = slots.repeat_interleave(2), torch.stack([ends - 2, ends - 1], 1).view(-1)
            return self._ops.decode_inputs(each, starts, seen.history, seen.table, self._size), self._steps[: 2 * rows].view(-1, 2)[
                :, 1
            ].contiguous()
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
        fixed: bool = True,
    ) -> Column:
        """out [R, K]: `first` gives logits for the token at position `ends`, having computed the position `before` it, `following` computes one position and gives
        those for one `before` it. How many steps each row had, at least; on a device all as many as there are. `fixed`: so is what `first` looks at,
        so that it may be captured, as `following` is in any case."""
        if self._direct:
            return self._run_here(seen, proposal, out, first, following, before)
        rows = len(out)
        size = next((size for size in self._sizes if size >= rows), 0)
        used = size or rows
        self._grow(rows)
        self._slots[:rows].copy_(proposal.slots)
        self._slots[rows:used].fill_(-1)
        self._ends[:rows].copy_(proposal.ends)

        def step(width: int, begins: bool) -> Outputs:
            """All on the same memory, one position further each time."""
            slots, ends = self._slots[:width], self._ends[:width]
            slots.copy_(self._alive(seen, slots, ends - before))
            logits = first(seen, proposal, slots, ends, None) if begins else following(seen, slots, ends - before, None)
            tokens = torch.where(slots >= 0, proposal.guess(logits, slots, ends), -1)
            self._ops.write_tokens(slots, ends, tokens, seen.history)
            self._tokens[:width].copy_(tokens)
            ends.add_(1)
            return ()

        for k in range(out.shape[1]):
            if not size or (k == 0 and not fixed):
                step(rows, k == 0)
            else:
                self._replay(size, proposal.hot, k == 0, step)
            out[:, k] = self._tokens[:rows]
        return i32([out.shape[1]] * rows)

    def _grow(self, rows: int) -> None:
        if rows > len(self._slots):  # beyond what graphs are for
            self._slots, self._ends, self._tokens = torch.zeros(3, 2 * rows, dtype=torch.int32, device=self._slots.device).unbind()
            self._steps = torch.arange(4 * rows + 2, dtype=torch.int32, device=self._slots.device)
            self._graphs.clear()

    def _replay(self, size: int, hot: bool, begins: bool, step: Callable[[int, bool], Outputs]) -> None:
        """By the graph; captured when it is first asked for. Once before, on padding, so that nothing is compiled or allocated inside the capture."""
        graph = self._graphs.get((size, hot, begins))
        if graph is None:
            slots, ends = self._slots[:size].clone(), self._ends[:size].clone()
            self._slots[:size].fill_(-1)
            step(size, begins)
            graph = self._graphs[size, hot, begins] = self._lane.capture(lambda: step(size, begins))
            self._slots[:size].copy_(slots)
            self._ends[:size].copy_(ends)
        graph.replay()

    def forget(self) -> None:
        """The pool has changed: what was captured on the old one is gone."""
        self._graphs.clear()

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
