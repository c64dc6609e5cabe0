"""Trees of drafts, grown level by level: what drafters with a layer of their own share where drafts are no chain.

What it is: `Growth`, which runs a drafter's layer over the nodes of one level of all rows at once and takes the likeliest tokens behind each; and `ranked`, what these are. Nodes that have children
are a tree of their own behind the root (the place before the last token, where the layer has already been): their keys and values lie there one after the other, and each sees its ancestors.
Where columns lie on the host rows whose next block was not given yet are left out; elsewhere they become padding, and a level is a graph.
What it does not know: whose layer it is, how drafts are verified.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from penstock.plugins.devices.lane import Graph
from penstock.plugins.drafters.api import Parts, Proposal, Seen
from penstock.plugins.drafters.chain import SIZES
from penstock.plugins.drafters.trees import Laid, Tree
from penstock.plugins.models.api import Columns

Tensor = torch.Tensor
Guess = Callable[[Tensor, Tensor, Tensor], Tensor]
Following = Callable[[Columns, Tensor, Tensor], Tensor]
"""(columns, the tokens' ids, for each which row of the level before it came from) -> logits."""


def ranked(guess: Guess, logits: Tensor, slots: Tensor, positions: Tensor, most: int) -> list[Tensor]:
    """The likeliest token [R], the second, ...: what would be drawn, then what would be drawn if that were not there, with the same noise. The logits are overwritten."""
    found = []
    for rank in range(most):
        last = rank + 1 == most
        found.append(guess(logits if last else logits.clone(), slots, positions))
        if not last:
            logits.scatter_(1, found[-1].clamp_min(0).long()[:, None], -torch.inf)
    return found


@dataclass(frozen=True)
class _Level:
    """Nodes of one depth that have children."""

    nodes: Tensor
    """[n] drafts: node - 1."""
    inner: Tensor
    """[n] their numbers among all such nodes."""
    above: Tensor
    """[n] which of the level before is the parent."""
    most: int
    """Children of a node, at most: the highest rank and one."""
    children: list[tuple[int, int, int]]
    """(draft, which of these nodes is its parent, rank)."""
    depth: int


class Growth:
    """One drafter's."""

    def __init__(self, tree: Tree, parts: Parts) -> None:
        device = parts.lane.device
        parents, depths = tree.parents.tolist(), tree.depths.tolist()
        inner = [node for node in range(1, tree.nodes) if node in parents]
        self._laid = None
        if inner:
            above = [inner.index(parents[node]) if parents[node] else -1 for node in inner]
            self._laid = Laid(Tree.made(above, [0] * len(inner)), device)
        self.roots = [(node - 1, int(tree.ranks[node])) for node in range(1, tree.nodes) if not parents[node]]
        """(draft, rank) of those right behind the root."""
        self._levels: list[_Level] = []
        before = [0]
        for depth in range(1, tree.deepest):
            mine = [node for node in inner if depths[node] == depth]
            children = [(c - 1, mine.index(parents[c]), int(tree.ranks[c])) for c in range(1, tree.nodes) if parents[c] in mine]
            columns = [[node - 1 for node in mine], [inner.index(node) for node in mine], [before.index(parents[node]) for node in mine]]
            nodes, numbers, over = (torch.tensor(column, dtype=torch.int32, device=device) for column in columns)
            self._levels.append(_Level(nodes, numbers, over, 1 + max(rank for _, _, rank in children), children, depth))
            before = mine
        self.widest = max((len(level.nodes) for level in self._levels), default=1)
        self._ops, self._lane, self._size, self._max_len = parts.ops, parts.lane, parts.block_size, parts.max_len
        self._sizes = [size for size in SIZES if size <= parts.max_rows] if parts.graphs else []
        self._graphs: dict[tuple[int, bool, int], Graph] = {}
        """(rows, whether somebody is not greedy, level)."""
        rows, drafts = parts.max_rows, tree.nodes - 1
        # What graphs read and write: slots, the positions that are drafted for first, drafts.
        self._slots, self._ends = torch.zeros(2, rows, dtype=torch.int32, device=device).unbind()
        self._drafts = torch.zeros(rows, drafts, dtype=torch.int32, device=device)

    def forget(self) -> None:
        """The pool has changed: what was captured on the old one is gone."""
        self._graphs.clear()

    def begin(self, guess: Guess, logits: Tensor, slots: Tensor, ends: Tensor, out: Tensor) -> None:
        """The drafts right behind the root, of its logits."""
        found = ranked(guess, logits, slots, ends, 1 + max(rank for _, rank in self.roots))
        for draft, rank in self.roots:
            out[:, draft] = found[rank]

    def run(self, seen: Seen, proposal: Proposal, out: Tensor, following: Following) -> None:
        """The others. out [R, K] has those behind the root."""
        if self._lane.direct:
            self._run_here(seen, proposal, out, following)
            return
        rows = len(out)
        size = next((size for size in self._sizes if size >= rows), 0)
        used = size or rows
        if rows > len(self._slots):  # beyond what graphs are for
            self._slots, self._ends = torch.zeros(2, 2 * rows, dtype=torch.int32, device=out.device).unbind()
            self._drafts = self._drafts.new_zeros(2 * rows, out.shape[1])
            self._graphs.clear()
        self._slots[:rows].copy_(proposal.slots)
        self._slots[rows:used].fill_(-1)
        self._ends[:rows].copy_(proposal.ends)
        self._drafts[:rows].copy_(out)
        for index in range(len(self._levels)):
            if size:
                self._replay(size, proposal.hot, index, lambda width, at: self._level(seen, proposal, width, at, following))
            else:
                self._level(seen, proposal, rows, index, following)
        out.copy_(self._drafts[:rows])

    def _replay(self, size: int, hot: bool, index: int, level: Callable[[int, int], None]) -> None:
        """By the graph; captured when it is first asked for. Once before, on padding, so that nothing is compiled or allocated inside the capture."""
        graph = self._graphs.get((size, hot, index))
        if graph is None:
            kept = self._slots[:size].clone(), self._drafts[:size].clone()
            self._slots[:size].fill_(-1)
            level(size, index)

            def body() -> tuple[Tensor, ...]:
                level(size, index)
                return ()

            graph = self._graphs[size, hot, index] = self._lane.capture(body)
            self._slots[:size].copy_(kept[0])
            self._drafts[:size].copy_(kept[1])
        graph.replay()

    def _level(self, seen: Seen, proposal: Proposal, rows: int, index: int, following: Following) -> None:
        """On the fixed memory: one level further."""
        level, slots, ends, drafts = self._levels[index], self._slots[:rows], self._ends[:rows], self._drafts[:rows]
        last = ends - 1 + level.inner[-1]
        block = (last // self._size).clamp_max(seen.table.shape[1] - 1)
        given = (slots >= 0) & (last < self._max_len) & (seen.table[slots.clamp_min(0).long(), block.long()] >= 0)
        found = self._grown(seen, proposal, torch.where(given, slots, -1), ends, drafts, level, following)
        for draft, parent, rank in level.children:
            drafts[:, draft] = torch.where(given, found[rank].view(rows, -1)[:, parent], -1)

    def _run_here(self, seen: Seen, proposal: Proposal, out: Tensor, following: Following) -> None:
        left = np.arange(len(out))
        table = seen.table.numpy()
        rows_before = torch.arange(len(out))
        width = 1
        for level in self._levels:
            slots, ends = proposal.slots.numpy()[left], proposal.ends.numpy()[left]
            last = ends - 1 + int(level.inner[-1])
            given = table[slots, np.minimum(last // self._size, table.shape[1] - 1)] >= 0
            given &= (last < self._max_len) & (out.numpy()[left] >= 0)[:, level.nodes.numpy()].all(1)
            kept = torch.from_numpy(np.flatnonzero(given))
            left = left[given]
            if not left.size:
                return
            at = torch.from_numpy(left)
            drafts = out[at]
            found = self._grown(seen, proposal, proposal.slots[at], proposal.ends[at], drafts, level, following, rows_before[kept] * width)
            rows_before, width = torch.arange(len(left)), len(level.nodes)
            for draft, parent, rank in level.children:
                out[at, draft] = found[rank].view(len(left), -1)[:, parent]

    def _grown(
        self,
        seen: Seen,
        proposal: Proposal,
        slots: Tensor,
        ends: Tensor,
        drafts: Tensor,
        level: _Level,
        following: Following,
        before: Tensor | None = None,
    ) -> list[Tensor]:
        """The likeliest tokens [R x n] behind each node of a level. `before`: where the level before has each row's first; None: all rows are there still."""
        assert self._laid is not None
        rows, count = len(slots), len(level.nodes)
        each = slots.repeat_interleave(count)
        places = (ends[:, None] - 1 + level.inner).view(-1)
        columns = self._ops.decode_inputs(each, places, seen.history, seen.table, self._size)
        columns = self._laid.columns(columns, level.inner.repeat(rows))
        if before is None:
            width = 1 if level.depth == 1 else len(self._levels[level.depth - 2].nodes)
            before = torch.arange(rows, device=slots.device) * width
        over = (before[:, None] + level.above).view(-1)
        tokens = drafts[:, level.nodes.long()].reshape(-1)
        logits = following(columns, tokens.clamp_min(0), over)
        return ranked(proposal.guess, logits, each, (ends + level.depth).repeat_interleave(count), level.most)
